"""A critic's folder and its unfinished training come back, or say what is wrong with them."""

import json
import time

import pytest
import torch
import torch.distributed as dist

from wmtp_modules.critic import folder
from wmtp_modules.critic.folder import (
    HEAD_FILE,
    RECORD_FILE,
    TrainingState,
    check_critic,
    load_value_head,
    read_critic,
    save_critic,
)
from wmtp_modules.models.value_head import ValueHead


@pytest.fixture
def head():
    torch.manual_seed(0)
    head = ValueHead(16, "turn")
    torch.nn.init.normal_(head.out.weight)
    return head


def test_a_critic_comes_back_bit_for_bit(head, tmp_path):
    head.base.fill_(0.3)
    record = {
        "fingerprint": {"trunk": "a", "head": "turn"},
        "settings": {"seed": 1},
        "report": {"pairs": 0},
    }
    save_critic(tmp_path / "c", head, record)
    loaded = load_value_head(tmp_path / "c", 16)
    for key, value in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert check_critic(tmp_path / "c", {"trunk": "a", "head": "turn"}) == record
    assert check_critic(tmp_path / "c", {"trunk": "a", "head": "turn"}, {"seed": 1}) == record
    with pytest.raises(ValueError, match=r"something else \(seed: the critic has 1, this run 2"):
        check_critic(tmp_path / "c", {"trunk": "a", "head": "turn"}, {"seed": 2})


def test_a_critic_from_another_trunk_is_an_error(head, tmp_path):
    save_critic(
        tmp_path, head, {"fingerprint": {"trunk": "a", "x": 1}, "settings": {}, "report": {}}
    )
    with pytest.raises(
        ValueError, match=r"something else \(trunk: the critic has 'a', this run 'b'"
    ):
        check_critic(tmp_path, {"trunk": "b", "x": 1})
    with pytest.raises(ValueError, match="holds no trained critic: add 'critic' to stages"):
        check_critic(tmp_path / "none", {})


def test_damaged_folders(head, tmp_path):
    save_critic(tmp_path, head, {"fingerprint": {"head": "turn"}, "settings": {}, "report": {}})
    file = tmp_path / HEAD_FILE
    with pytest.raises(ValueError, match="no turn head of width 8"):
        load_value_head(tmp_path, 8)
    with pytest.raises(ValueError, match="holds no trained critic"):
        load_value_head(tmp_path / "none", 16)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="is missing, damaged"):
        load_value_head(tmp_path, 16)
    (tmp_path / RECORD_FILE).write_text(json.dumps({"report": {}}))
    with pytest.raises(ValueError, match=r"critic\.json is damaged"):
        read_critic(tmp_path)


def test_training_state_resumes_and_keeps_the_best(head, tmp_path, gloo_group):
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1)
    state = TrainingState(tmp_path, {"trunk": "a"})
    for step, loss in enumerate((0.5, 0.4, 0.6, 0.7)):
        y = torch.tensor([[False, True, True]])
        head(torch.randn(1, 3, 16), torch.randn(1, 3, 3), y).sum().backward()
        optimizer.step()
        state.step = step + 1
        state.evaluated(loss, head, optimizer)
        if loss == 0.4:
            best = {key: value.clone() for key, value in head.state_dict().items()}
    assert state.evaluations_since_best == 2
    assert dist.get_rank() == 0
    again, fresh = TrainingState(tmp_path, {"trunk": "a"}), ValueHead(16, "turn")
    again.resume(fresh, torch.optim.AdamW(fresh.parameters(), lr=0.1))
    assert (again.step, again.evaluations_since_best) == (4, 2)
    assert again.heldout_losses == [0.5, 0.4, 0.6, 0.7]
    for key, value in head.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value)
        assert torch.equal(again.best_head[key], best[key])
    other = TrainingState(tmp_path, {"trunk": "b"})
    other.resume(ValueHead(16, "turn"), optimizer)
    assert other.step == 0


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04\x95", b"[" * 1000, b"\xff\xfe"])
def test_a_damaged_state_of_training_says_what_to_do(tmp_path, content):
    (tmp_path / "state.pt").write_bytes(content)
    head = ValueHead(8, "state")
    state = TrainingState(tmp_path, {"trunk": "t"})
    with pytest.raises(ValueError, match=r"state\.pt is damaged .*: delete it, and the critic is"):
        state.resume(head, torch.optim.AdamW(head.parameters()))


def test_a_state_of_training_that_runs_code_is_refused(tmp_path):
    class RunsCode:
        def __reduce__(self):
            return (type(tmp_path).touch, (tmp_path / "spy",))

    torch.save({"fingerprint": {"trunk": "t"}, "head": RunsCode()}, tmp_path / "state.pt")
    head = ValueHead(8, "state")
    state = TrainingState(tmp_path, {"trunk": "t"})
    with pytest.raises(ValueError, match="damaged or no state of a critic's training"):
        state.resume(head, torch.optim.AdamW(head.parameters()))
    assert not (tmp_path / "spy").exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"fingerprint": [], "settings": {}, "report": {}}',
        '{"fingerprint": {}, "settings": null, "report": {}}',
    ],
)
def test_a_damaged_record_of_a_critic(tmp_path, content):
    (tmp_path / "critic.json").write_text(content)
    with pytest.raises(ValueError, match=r"critic\.json is damaged: train the critic again"):
        check_critic(tmp_path, {"trunk": "t"}, {"seed": 1})


def test_two_processes_leave_no_head_with_the_record_of_the_other(tmp_path, children, monkeypatch):
    """The first one is slow between the two files, and the second comes in between."""
    new_file = folder.new_file

    def save(number, seconds):
        def slowly(path):
            if path.name == RECORD_FILE:
                (tmp_path / "between").touch()
                time.sleep(seconds)
            return new_file(path)

        monkeypatch.setattr(folder, "new_file", slowly)
        head = ValueHead(4, "state")
        torch.nn.init.constant_(head.base, number)
        record = {"fingerprint": {"head": "state"}, "settings": {}, "report": {"number": number}}
        save_critic(tmp_path / "critic", head, record)

    first = children.begin(save, 1, 0.5)
    while not (tmp_path / "between").exists():
        time.sleep(0.01)
    assert children.ends(children.begin(save, 2, 0.0), first) == [0, 0]
    record = json.loads((tmp_path / "critic" / RECORD_FILE).read_text())
    assert load_value_head(tmp_path / "critic", 4).base.item() == record["report"]["number"]
