"""Two ranks write one training state and judge it together."""

import json
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from wmtp_modules.run.training_state import TrainingStates

pytestmark = pytest.mark.slow


def judge(rank, folder):
    """Save, damage a file of each rank in turn, and write down what each rank takes for newest."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    model = torch.nn.Linear(8, 8)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    states = TrainingStates(folder / "states", 9)
    for step in (1, 2):
        states.save(step, model, optimizer, {"step": step}, {})
        states.wait()
    files = sorted(json.loads((folder / "states/step_000002/manifest.json").read_text())["files"])
    found = {"files": files}
    for name in (None, "__0_0.distcp", "__1_0.distcp", "rank_0.pt", "rank_1.pt"):
        file = folder / "states" / "step_000002" / (name or "run.pt")
        before = file.read_bytes()
        dist.barrier()
        if name and rank == 0:
            file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        dist.barrier()
        found[str(name)] = states.newest().name
        dist.barrier()
        if rank == 0:
            file.write_bytes(before)
        dist.barrier()
    (folder / f"found_{rank}.json").write_text(json.dumps(found))
    states.close()
    dist.destroy_process_group()


def test_a_file_of_any_rank_is_missed_by_all(tmp_path, forks):
    forks.call(judge, tmp_path)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"found_{rank}.json").read_text())
        files = ["__0_0.distcp", "__1_0.distcp", ".metadata", "rank_0.pt", "rank_1.pt", "run.pt"]
        assert found.pop("files") == sorted(files)
        assert found.pop("None") == "step_000002"
        assert set(found.values()) == {"step_000001"}, found
