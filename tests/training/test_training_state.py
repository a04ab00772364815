from functools import partial

import pytest
import torch
from omegaconf import OmegaConf
from torchtune.training import get_cosine_schedule_with_warmup

from wmtp_modules.training.training_state import (
    check_same_run,
    drop_training_states,
    load_training_state,
    newest_training_state,
    random_state,
    resolved,
    resume_schedule_,
    save_training_state,
    set_random_state,
)


def test_only_states_are_dropped(tmp_path):
    for name in ("step_000001", "step_000002.partial", "step_notes", "mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "readme.txt").touch()
    drop_training_states(tmp_path, keep=tmp_path / "step_000001")
    left = {"step_000001", "step_notes", "mine", "readme.txt"}
    assert {path.name for path in tmp_path.iterdir()} == left
    drop_training_states(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == left - {"step_000001"}
    drop_training_states(tmp_path / "none")


def test_newest_is_by_number(tmp_path):
    assert newest_training_state(tmp_path) is None
    for name in ("step_999999", "step_1000000", "step_2000000.partial", "step_notes"):
        (tmp_path / name).mkdir()
    assert newest_training_state(tmp_path) == tmp_path / "step_1000000"


@pytest.fixture
def state(tmp_path, gloo_group):
    """A state of 5 steps, its model and its config."""
    model = torch.nn.Linear(2, 2)
    cfg = OmegaConf.create(
        {"seed": 1, "max_steps": 8, "optimizer": {"lr": 0.1}, "output_dir": "a", "compile": False}
    )
    optimizer = torch.optim.AdamW(model.parameters())
    (tmp_path / "states").mkdir()
    (tmp_path / "states" / "mine.txt").touch()
    own = {"step": 5, "config": resolved(cfg)}
    folder = save_training_state(tmp_path / "states", 5, model, optimizer, own)
    assert (tmp_path / "states" / "mine.txt").exists()
    return folder, cfg, model, optimizer


def test_a_run_goes_on_under_its_own_config(state):
    folder, cfg, model, optimizer = state
    check_same_run(folder, cfg)
    check_same_run(folder, OmegaConf.merge(cfg, {"max_steps": 5, "output_dir": "b"}))
    check_same_run(folder, OmegaConf.merge(cfg, {"compile": True, "controls": ["dft"]}))
    assert load_training_state(folder, model, optimizer)["step"] == 5


def test_a_changed_config_is_named_with_both_values(state):
    folder, cfg, *_ = state
    other = OmegaConf.merge(cfg, {"optimizer": {"lr": 0.2}, "max_steps": 9, "dtype": "bf16"})
    message = r"another config \(dtype was None and is 'bf16'; optimizer.lr was 0.1 and is 0.2\): "
    with pytest.raises(ValueError, match=message):
        check_same_run(folder, other)


def test_fewer_steps_than_done(state):
    folder, cfg, *_ = state
    with pytest.raises(ValueError, match="has 5 steps done, more than max_steps 4: raise it"):
        check_same_run(folder, OmegaConf.merge(cfg, {"max_steps": 4}))


def test_another_number_of_ranks(state):
    folder, cfg, model, optimizer = state
    torch.save({}, folder / "rank_1.pt")
    for ask in (
        partial(check_same_run, folder, cfg),
        partial(load_training_state, folder, model, optimizer),
    ):
        with pytest.raises(
            ValueError, match="written by 2 ranks and cannot be resumed by 1: start as many"
        ):
            ask()


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


def test_random_state_goes_back():
    state = random_state(torch.device("cpu"))
    drawn = torch.rand(3)
    set_random_state(state, torch.device("cpu"))
    assert torch.equal(torch.rand(3), drawn)


def test_random_state_of_a_gpu_goes_back_too(monkeypatch):
    """Without a GPU: that its generator is asked, and given what it said."""
    device, put = torch.device("cuda", 1), []
    asked = {device: torch.tensor([7], dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", asked.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *given: put.append(given))
    set_random_state(random_state(device), device)
    assert put == [(asked[device], device)]
