import json
import math
import re

import pytest
import torch

from wmtp_modules.run.bad_steps import (
    SPIKE_HISTORY,
    BadSteps,
    look_again,
    print_replay,
    row_ids,
    what_is_wrong,
)
from wmtp_modules.run.figures import token_losses

TARGETS = torch.tensor([3, 0])
ROWS = [torch.tensor([[2, 2, 5], [7, -1, -1]]), torch.tensor([[9, -1, -1]])]


def test_a_sound_step_has_nothing_wrong():
    figures = {"loss": torch.tensor(1e30), "reference loss": None}
    assert what_is_wrong(figures, TARGETS) == ""


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["loss", "gradient norm"])
def test_what_is_no_number_is_named(name, value):
    figures = {"loss": torch.tensor(1.0), "gradient norm": torch.tensor(2.0)}
    found = what_is_wrong(figures | {name: torch.tensor(value)}, TARGETS)
    assert found == f"the {name} is {value}"


def test_a_step_without_targets_is_no_step():
    assert what_is_wrong({"loss": torch.tensor(0.0)}, torch.zeros(4)) == "no token is supervised"


def test_rows_without_padding():
    assert row_ids(ROWS[0]) == [2, 5, 7]


@pytest.fixture
def steps(tmp_path, gloo_group):
    return BadSteps(tmp_path, limit=2)


def lines(tmp_path, name):
    return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]


def test_only_skipped_steps_in_a_row_are_over_the_limit(steps, tmp_path):
    steps.skip(4, "the loss is nan", ROWS)
    assert not steps.is_over_limit
    steps.look_for_spike(5, 1.0, ROWS)
    steps.skip(6, "the loss is nan", ROWS)
    assert not steps.is_over_limit
    steps.skip(7, "the gradient norm is inf", ROWS[1:])
    assert steps.is_over_limit
    rows = [[[2, 5, 7], [9]]]  # of the one rank, by micro-batch
    assert lines(tmp_path, "skipped_steps.jsonl") == [
        {"step": 4, "reason": "the loss is nan", "rows": rows},
        {"step": 6, "reason": "the loss is nan", "rows": rows},
        {"step": 7, "reason": "the gradient norm is inf", "rows": [[[9]]]},
    ]
    told = steps.why_stopped(lambda states: None)
    assert told.startswith(
        "the gradient norm is inf in step 7, and the run stops as it was the 2. of 2 skipped steps"
    )
    assert "--config" in told

    def full(states):
        raise OSError("no room")

    unkept = steps.why_stopped(full)
    assert "A replay is not possible: no room" in unkept
    assert "--config" not in unkept


def losses(n):
    return [2.0 + 0.1 * (i % 3) for i in range(n)]


def test_a_spike_needs_history_and_height(steps, tmp_path):
    steps.look_for_spike(1, 2.0, ROWS)
    steps.look_for_spike(2, 50.0, ROWS)  # too early to tell
    steps = BadSteps(tmp_path, limit=2)
    for step, loss in enumerate(losses(SPIKE_HISTORY), start=1):
        steps.look_for_spike(step, loss, ROWS)
    steps.look_for_spike(17, 2.3, ROWS)
    assert not (tmp_path / "loss_spikes.jsonl").exists()
    steps.look_for_spike(18, 4.0, ROWS)
    (spike,) = lines(tmp_path, "loss_spikes.jsonl")
    assert (spike["step"], spike["loss"]) == (18, 4.0)
    assert spike["mean_before"] == pytest.approx(2.1, abs=0.02)
    assert spike["rows"] == [[[2, 5, 7], [9]]]


def test_a_loss_that_is_no_number_does_not_blind(steps, tmp_path):
    """Of tokens without weight, in a step whose objective is sound."""
    for step, loss in enumerate(losses(SPIKE_HISTORY), start=1):
        steps.look_for_spike(step, loss, ROWS)
    for step, loss in ((17, math.inf), (18, math.nan), (19, 2.1), (20, 4.0)):
        steps.look_for_spike(step, loss, ROWS)
    spikes = lines(tmp_path, "loss_spikes.jsonl")
    assert [(s["step"], s["loss"]) for s in spikes] == [(17, "inf"), (18, "nan"), (20, 4.0)]


def test_a_resumed_run_judges_by_the_same_history(steps, tmp_path):
    """And the files say what its lists do, not what steps did that are undone."""
    for step, loss in enumerate(losses(SPIKE_HISTORY), start=1):
        steps.look_for_spike(step, loss, ROWS)
    steps.skip(17, "the loss is nan", ROWS)
    state = steps.state_dict()
    steps.skip(18, "the loss is nan", ROWS)
    steps.look_for_spike(19, 9.0, ROWS)
    resumed = BadSteps(tmp_path, limit=2)
    resumed.load_state_dict(state)
    resumed.write_files()
    assert [line["step"] for line in lines(tmp_path, "skipped_steps.jsonl")] == [17]
    assert not (tmp_path / "loss_spikes.jsonl").exists()
    assert resumed.in_a_row == 1
    resumed.look_for_spike(18, 4.0, ROWS)
    assert [line["step"] for line in lines(tmp_path, "loss_spikes.jsonl")] == [18]


def test_a_replay_names_rows_module_and_gradients(gloo_group, tiny_model_args):
    """A token that only one document holds, with an embedding that is no number."""
    from wmtp_modules.models import mtp_llama2
    from wmtp_modules.parallel.sharding import init_weights_

    model = mtp_llama2(**tiny_model_args)
    init_weights_(model, 0)
    with torch.no_grad():
        model.tok_embeddings.weight[7] = torch.nan
    tokens = torch.arange(8)[None].repeat(2, 1)
    tokens[1, 7] = 6
    batch = {
        "tokens": tokens,
        "doc": torch.zeros(2, 8, dtype=torch.int64),
        "keep": torch.ones(2, 8, dtype=torch.bool),
        "input_pos": tokens,
        "row": torch.tensor([3, 4])[:, None].repeat(1, 8),
    }
    batch["tokens"][0, 3] = 7

    def loss_step(batch):
        torch.nn.Linear(2, 2)(torch.full((1, 2), torch.nan))  # another model's is not looked at
        return token_losses(model, batch)[0].sum(), {}, {}

    rows, losses, modules, gradients = look_again(model, batch, loss_step)
    assert rows == "rows 3, 4"
    assert losses == "losses that are not finite in rows 3"
    assert modules == "first output that is not finite: tok_embeddings"
    assert re.match(r"gradients that are not finite: .* and \d+ more$", gradients)


def test_a_replay_that_finds_nothing_says_so(gloo_group, capsys):
    print_replay(5, [["rows 0, 1 and 12 more"]])
    printed = capsys.readouterr().out
    assert "rank 0, micro-batch 1: rows 0, 1 and 12 more\n" in printed
    assert "everything is finite this time" in printed
    print_replay(5, [["rows 3", "gradients that are not finite: a, b"], ["rows 4"]])
    printed = capsys.readouterr().out
    assert "micro-batch 1: rows 3\n    gradients that are not finite: a, b\n" in printed
    assert "everything" not in printed
