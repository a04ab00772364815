"""A disk that is full at any write of a run: one sentence, and with room the run goes on.

Everything that a run leaves in its folder is met once by an error in place of a write
(``fill_disk`` of fork_server.py). What torch and safetensors make of a real full disk is in
tests/test_files.py.
"""

import pytest
import torch

RECIPE = "recipes/rho1_wmtp_distributed.py"

pytestmark = pytest.mark.slow


def kind(path, folder):
    """The first name in the folder, without what a write puts behind it until it is done."""
    return path.removeprefix(f"{folder}").strip("/").split("/")[0].split(".")[0]


def weights_of(folder):
    return torch.load(folder / "last" / "consolidated.pth", weights_only=True)


@pytest.mark.parametrize("kinds", ["one", pytest.param("all", marks=pytest.mark.nightly)])
def test_a_disk_that_is_full_at_any_write(forks, tiny_quickstarts, tmp_path, kinds):
    """Training states, metrics, best/, last/, picture and summary, each at its first write."""
    config = tiny_quickstarts.config(
        "base", max_steps=4, save_every_n_steps=2, run_val_every_n_steps=2, keep_last=2
    )
    command = [RECIPE, "--config", config, "resume_from_checkpoint=true"]
    whole = tmp_path / "whole"
    done = forks.run([*command, f"output_dir={whole}"], full_disk=(whole, 10**9))
    assert done.returncode == 0, done.stderr[-4000:]
    chosen = {}
    for number, path in enumerate(done.writes, start=1):
        chosen.setdefault(kind(path, whole), number)
    assert "training_state" in chosen
    assert len(chosen) >= 4, chosen
    states = [n for n, path in enumerate(done.writes, start=1) if "/training_state/" in path]
    chosen["the end of the last state"] = states[-1]
    if kinds == "one":
        chosen = {"the end of the last state": states[-1]}
    want = weights_of(whole)
    for n in sorted(set(chosen.values())):
        folder = tmp_path / str(n)
        full = forks.run([*command, f"output_dir={folder}"], full_disk=(folder, n))
        assert full.wait() == [1], f"write {n}: {full.stderr[-2000:]}"
        assert "No space left on device" in full.stderr
        assert str(folder) in full.stderr.splitlines()[-1]
        assert not (folder / "summary.json").exists()
        done = forks.run([*command, f"output_dir={folder}"])
        assert done.wait() == [0], f"after write {n}: {done.stderr[-2000:]}"
        got = weights_of(folder)
        assert all(torch.equal(got[key], tensor) for key, tensor in want.items())
