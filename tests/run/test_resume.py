import random

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torchtune.training import get_cosine_schedule_with_warmup

from wmtp_modules.run.resume import (
    check_not_begun,
    check_not_ended,
    check_packing,
    check_same_run,
    note_on_length,
    notes_on_resume,
    random_state,
    resolved,
    resume_schedule_,
    set_random_state,
)

CFG = OmegaConf.create(
    {
        "seed": 1,
        "max_steps": 8,
        "optimizer": {"lr": 0.1},
        "weighting": {"name": "rho1"},
        "output_dir": "a",
        "compile": False,
        "batch_size": 2,
        "gradient_accumulation_steps": 3,
    }
)


@pytest.fixture
def state(tmp_path):
    """What a state of 5 steps, saved by one rank, says of its run."""
    folder = tmp_path / "states" / "step_000005"
    folder.mkdir(parents=True)
    torch.save({"step": 5, "world": 1, "config": resolved(CFG)}, folder / "run.pt")
    return folder


def test_a_run_goes_on_under_its_own_config(state):
    assert check_same_run(state, CFG, 1)["step"] == 5
    for free in (
        {"max_steps": 5, "output_dir": "b"},
        {"compile": True, "controls": ["dft"]},
        {"keep_last": 5, "max_hours": 2.0, "collective_timeout_s": 9},
    ):
        check_same_run(state, OmegaConf.merge(CFG, free), 1)


def test_a_changed_config_is_named_with_both_values(state):
    other = OmegaConf.merge(CFG, {"optimizer": {"lr": 0.2}, "max_steps": 9, "dtype": "bf16"})
    message = r"another config \(dtype was None and is 'bf16'; optimizer.lr was 0.1 and is 0.2\): "
    with pytest.raises(ValueError, match=message):
        check_same_run(state, other, 1)


def test_keys_that_are_gone_are_of_no_matter_where_they_were_off(state):
    """Of the critic's recipe, which in version 0.1.0 could train its value head on."""

    def written_with(**keys):
        torch.save({"step": 5, "world": 1, "config": resolved(CFG) | keys}, state / "run.pt")

    written_with(auxiliary_value_coef=0.0, auxiliary_value_lr=None)
    check_same_run(state, CFG, 1)
    written_with(auxiliary_value_coef=0.5)
    with pytest.raises(ValueError, match=r"auxiliary_value_coef was 0.5 and is None"):
        check_same_run(state, CFG, 1)


def test_fewer_steps_than_done(state):
    with pytest.raises(ValueError, match="has 5 steps done, more than max_steps 4: raise it"):
        check_same_run(state, OmegaConf.merge(CFG, {"max_steps": 4}), 1)


def test_another_number_of_ranks_needs_as_many_packs_in_a_step(state):
    for world, batch_size, accumulation in ((1, 1, 6), (2, 1, 3), (3, 2, 1)):
        sizes = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        check_same_run(state, OmegaConf.merge(CFG, sizes), world)
    with pytest.raises(
        ValueError,
        match="was written with 6 packs in a step, and 2 ranks x batch_size 2 x "
        "gradient_accumulation_steps 3 are 12: choose them so that it stays 6",
    ):
        check_same_run(state, CFG, 2)


def test_rows_that_are_packed_otherwise(tmp_path):
    check_packing(tmp_path, {"packing": "a"}, "a")
    for before in ({"packing": "b"}, {}):  # those of 0.1.0 have none
        with pytest.raises(
            ValueError, match=r"in another way, so its place .*: continue it with that version, or"
        ):
            check_packing(tmp_path, before, "a")


def test_notes_say_what_another_number_of_ranks_changes(state):
    run = check_same_run(state, CFG, 1)
    assert notes_on_resume(run, CFG, 1, 99) == []
    (ranks,) = notes_on_resume(run, OmegaConf.merge(CFG, {"batch_size": 1}), 2, 99)
    assert ranks.startswith("It was saved by 1 ranks and continues with 2: the packs come in the")
    three = OmegaConf.merge(CFG, {"batch_size": 1})
    _, joint = notes_on_resume(run, three, 3, 99)
    assert joint.startswith("Joint micro-batches have 3 packs, before 2: the weights of rho1 do,")
    assert "epoch" not in joint
    assert "now ends at another pack" in notes_on_resume(run, three, 3, 8)[1]
    uniform = OmegaConf.merge(three, {"weighting": {"name": "uniform"}})
    assert notes_on_resume(run, uniform, 3, 99)[1].endswith("uniform weights do not depend on that")


def test_a_note_on_another_length():
    assert note_on_length({"max_steps": 8}, CFG, 1e-5, 1e-5) == []
    (shorter,) = note_on_length({"max_steps": 4000}, CFG, 1e-5, 2.5e-6)
    assert shorter == (
        "max_steps was 4000 and is 8: the run gets shorter, its schedule ends at the new last "
        "step, and the learning rate goes on at 2.5e-06 instead of 1e-05"
    )
    (longer,) = note_on_length({"max_steps": 4}, CFG, 0.0, 1e-5)
    assert "the run gets longer" in longer


def test_an_interrupted_run_is_not_started_over(state, tmp_path):
    (tmp_path / "training_state").symlink_to(state.parent)
    message = r"interrupted after step 5 or later: set resume_from_checkpoint=true"
    with pytest.raises(ValueError, match=message):
        check_not_begun(tmp_path)
    (tmp_path / "summary.json").touch()
    check_not_begun(tmp_path)
    check_not_begun(tmp_path / "none")


def test_a_run_without_states_is_not_started_over_a_complete_one(tmp_path):
    check_not_ended(tmp_path)
    (tmp_path / "summary.json").touch()
    with pytest.raises(ValueError, match=r"complete, under another config .*or delete .*summary"):
        check_not_ended(tmp_path)


def schedule(steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = get_cosine_schedule_with_warmup(
        optimizer, num_warmup_steps=2, num_training_steps=steps
    )
    return optimizer, scheduler


def rates(optimizer, scheduler, n):
    found = []
    for _ in range(n):
        found.append(optimizer.param_groups[0]["lr"])
        assert scheduler.get_last_lr() == found[-1:]
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("steps", [6, 12])
def test_a_resumed_schedule_has_the_rates_of_the_new_length(steps):
    whole = rates(*schedule(steps), steps)
    optimizer, scheduler = schedule(6)
    first = rates(optimizer, scheduler, 4)
    resumed, new = schedule(steps)
    # As set_state_dict leaves it: the rate of the old schedule.
    resumed.load_state_dict(optimizer.state_dict())
    resume_schedule_(new, scheduler.state_dict())
    after = rates(resumed, new, steps - 4)
    assert after == whole[4:]
    assert (first + after == whole) == (steps == 6)


def test_random_states_go_back_through_a_file(tmp_path):
    def draw():
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    torch.save(random_state(torch.device("cpu")), tmp_path / "rng.pt")
    drawn = draw()
    assert draw() != drawn
    state = torch.load(tmp_path / "rng.pt", weights_only=True)
    set_random_state(state, torch.device("cpu"))
    assert draw() == drawn


def test_random_state_of_a_gpu_goes_back_too(monkeypatch):
    """Without a GPU: that its generator is asked, and given what it said."""
    device, put = torch.device("cuda", 1), []
    asked = {device: torch.tensor([7], dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", asked.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *given: put.append(given))
    set_random_state(random_state(device), device)
    assert put == [(asked[device], device)]
