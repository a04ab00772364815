"""Four ranks as two hosts: what is not shared, or not the same, is said before anything is built.

Ranks 2 and 3 are the other host. What it sees under a config's path is played by another path.
"""

import json
import os
import time

import pytest
import torch.distributed as dist
from omegaconf import OmegaConf

from wmtp_modules.parallel.process_group import rank_zero_first
from wmtp_modules.run import hosts

pytestmark = pytest.mark.slow


def four_ranks(rank, folder):
    os.environ.update(LOCAL_WORLD_SIZE="2", LOCAL_RANK=str(rank % 2))
    dist.init_process_group("gloo")
    hosts.PATIENCE_S = 0.3
    is_b, found = rank >= 2, {}

    def check(**theirs):
        """What is told where host b sees ``theirs`` in place of its paths."""
        cfg = {
            "output_dir": folder / "run",
            "dataset": {"source": [folder / "train.jsonl", folder / "model"]},
        }
        cfg |= {"checkpointer": {"checkpoint_dir": folder / "model"}, "seed": 1}
        cfg |= {"reference": {"table_dir": folder / "table"}}
        cfg = json.loads(json.dumps(cfg, default=str))
        for key, path in theirs.items() if is_b else ():
            path = [str(one) for one in path] if isinstance(path, list) else str(path)
            OmegaConf.update(node := OmegaConf.create(cfg), key, path)
            cfg = OmegaConf.to_container(node)
        try:
            hosts.check_hosts(OmegaConf.create(cfg))
        except ValueError as error:
            return str(error).replace(str(folder), "")
        return None

    found["shared"] = check()
    found["own output"] = check(output_dir=folder / "b" / "run")
    found["own table"] = check(**{"reference.table_dir": folder / "b" / "table"})
    found["copies"] = check(**{"checkpointer.checkpoint_dir": folder / "b" / "model"})
    found["other data"] = check(
        **{"dataset.source": [folder / "b" / "train.jsonl", folder / "model"]}
    )
    found["no model"] = check(**{"checkpointer.checkpoint_dir": folder / "nowhere"})
    os.environ["LOCAL_WORLD_SIZE"] = "4"
    found["one host"] = check(output_dir=folder / "b" / "run")

    os.environ["LOCAL_WORLD_SIZE"] = "2"
    with rank_zero_first():
        started = time.monotonic()
        time.sleep(0.2)
        found["turn"] = [started, time.monotonic()]
    (folder / f"found_{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def test_what_hosts_see(tmp_path, forks):
    for place in (tmp_path, tmp_path / "b"):
        (place / "model").mkdir(parents=True)
        (place / "model" / "params.json").write_text("{}")
        (place / "train.jsonl").write_text(f"{len(place.parts)}\n")
    forks.call(four_ranks, tmp_path, ranks=4)
    found = [json.loads((tmp_path / f"found_{rank}.json").read_text()) for rank in range(4)]
    name = os.uname().nodename
    for rank, one in enumerate(found):
        assert one["shared"] is one["copies"] is one["one host"] is None
        assert one["own output"] == (
            f"output_dir: host {name} does not see what host {name} writes in "
            f"{'/b' * (rank > 1)}/run: name a folder on a file system that all hosts share, "
            "docs/nodes.md"
        )
        assert one["own table"].startswith("reference.table_dir: host")
        assert one["other data"].startswith("dataset.source[0]: ")
        assert f"train.jsonl is another one on host {name} than on host {name}" in one["other data"]
        assert f"is on host {name} and not on host {name}: copy it" in one["no model"]
    assert not list(tmp_path.rglob(".shared_*"))
    (_, first), (theirs, ends), *rest = (found[rank]["turn"] for rank in (0, 2, 1, 3))
    assert first <= theirs
    assert all(ends <= begins for begins, _ in rest)
    assert max(begins for begins, _ in rest) < min(end for _, end in rest)  # these at once
