"""A disk that is full at any write of a run: one sentence, and with room the run goes on.

Each kind of file that a run writes is met once by an error that the process gets in place of a
write (``fill_disk`` of fork_server.py). What torch and safetensors make of a real full disk is in
tests/test_files.py.
"""

import re

import pytest
import torch

RECIPE = "recipes/rho1_wmtp_distributed.py"

pytestmark = pytest.mark.slow


def kind(path, folder):
    """The file's place in the folder, whatever its step or part."""
    return re.sub(r"\d+", "*", path.removeprefix(f"{folder}/"))


def weights_of(folder):
    return torch.load(folder / "last" / "consolidated.pth", weights_only=True)


def test_a_disk_that_is_full_at_any_write(forks, tiny_quickstarts, tmp_path):
    """Training states, metrics, best/, last/, picture and summary, each at its first write."""
    config = tiny_quickstarts.config(
        "base", max_steps=4, save_every_n_steps=2, run_val_every_n_steps=2, keep_last=2
    )
    command = [RECIPE, "--config", config, "resume_from_checkpoint=true"]
    whole = tmp_path / "whole"
    done = forks.run([*command, f"output_dir={whole}"], full_disk=(whole, 10**9))
    assert done.returncode == 0, done.stderr[-4000:]
    first = {}
    for number, path in enumerate(done.writes, start=1):
        first.setdefault(kind(path, whole).removesuffix(".tmp"), number)
    assert any("training_state" in name for name in first)
    assert len(first) >= 8, first
    run, named = tmp_path / "run", set()
    started = []
    for n in sorted(first.values()):
        folder = run / str(n)
        full = forks.start([*command, f"output_dir={folder}"], full_disk=(folder, n))
        started.append((n, folder, full))
    for n, folder, full in started:
        assert full.wait() == [1], f"write {n}: {full.stderr[-2000:]}"
        assert "No space left on device" in full.stderr
        found = re.search(rf"{folder}/([\w.-]+)", full.stderr.splitlines()[-1])
        assert found, full.stderr
        named.add(found[1])
        assert not (folder / "summary.json").exists()
    assert len(named) >= 4, named
    again = [(f, forks.start([*command, f"output_dir={f}"])) for _, f, _ in started]
    want = weights_of(whole)
    for folder, done in again:
        assert done.wait() == [0], done.stderr[-2000:]
        got = weights_of(folder)
        assert all(torch.equal(got[key], tensor) for key, tensor in want.items())
