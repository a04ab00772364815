import errno
import json
import os
import pickle
import shutil
import threading

import pytest
import torch
import torch.distributed.checkpoint as dcp

from wmtp_modules.run import training_state
from wmtp_modules.run.training_state import TrainingStates


class Trained:
    """A model whose parameters tell the step, its optimizer and its states."""

    def __init__(self, parent, keep_last=2, optimizer=torch.optim.AdamW):
        self.model = torch.nn.Linear(40, 50)
        self.optimizer = optimizer(self.model.parameters(), lr=0.1)
        self.parent = parent
        self.states = TrainingStates(parent, keep_last)

    def step(self):
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()

    def save(self, step, **given):
        run = {"step": step, "config": {"seed": 1}}
        own = {"rng": torch.get_rng_state()}
        self.states.save(step, self.model, self.optimizer, run, own, **given)
        return self.parent / f"step_{step:06d}"

    def saved(self, step):
        folder = self.save(step)
        self.states.wait()
        return folder

    def values(self):
        """Everything that the next update depends on."""
        moments = [self.optimizer.state[p] for p in self.model.parameters()]
        flat = [value for state in moments for value in state.values()]
        return [x.detach().clone() for x in (*self.model.parameters(), *flat)]


@pytest.fixture
def trained(tmp_path, gloo_group):
    made = []

    def make(keep_last=2, **given):
        made.append(Trained(tmp_path / "states", keep_last, **given))
        return made[-1]

    yield make
    for one in made:
        one.states._writer.shutdown()


def names(trained):
    return sorted(path.name for path in trained.parent.iterdir())


# ------------------------------------------------------------------------- writing


def test_a_state_is_that_of_its_step_though_training_goes_on(trained, monkeypatch):
    """The files are written only after two more steps."""
    one, gate = trained(), threading.Event()
    write = dcp.FileSystemWriter.write_data

    def late(*args):
        assert gate.wait(60)
        return write(*args)

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", late)
    one.step()
    at_save = one.values()
    folder = one.save(1)
    one.step()
    one.step()
    assert names(one) == ["step_000001.partial"]
    gate.set()
    one.states.wait()
    run, own = one.states.load(folder, one.model, one.optimizer)
    assert run["step"] == 1
    assert own is not None
    for got, want in zip(one.values(), at_save, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_that_has_not_stepped_is_saved_as_it_is(trained, kind):
    """Asked for its state, DCP would step it: Adam's bias correction would be one ahead."""
    one = trained(optimizer=kind)
    folder = one.saved(0)
    assert not one.optimizer.state
    two = Trained(one.parent, optimizer=kind)
    two.states.load(folder, two.model, two.optimizer)
    assert not two.optimizer.state
    for each in (one, two):
        each.step()
    assert all(map(torch.equal, one.values(), two.values()))


def test_every_file_is_in_the_manifest_and_synced_before_the_name(trained, monkeypatch):
    one, done = trained(), []
    fsync, rename = os.fsync, type(one.parent).rename

    def note_fsync(fd):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    def note_rename(self, target):
        done.append(f"rename {self.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(type(one.parent), "rename", note_rename)
    one.step()
    folder = one.saved(1)
    files = {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == files
    assert {"rank_0.pt", "run.pt", ".metadata", "__0_0.distcp"} == files
    named = done.index("rename step_000001.partial")
    synced = {name.removesuffix(".tmp") for name in done[:named]}
    assert files | {"manifest.json", "step_000001.partial"} <= synced
    assert "states" in done[named:]


@pytest.mark.parametrize("keep_last", [1, 2])
def test_older_states_go_and_nothing_else(trained, keep_last):
    one = trained(keep_last)
    one.parent.mkdir()
    for name in ("step_notes", "mine", "step_000001.partial", "step_000001.dropped"):
        (one.parent / name).mkdir()
    one.step()
    for step in (1, 2, 3):
        one.saved(step)
    kept = ["step_000002", "step_000003"][-keep_last:]
    assert names(one) == ["mine", *kept, "step_notes"]
    one.states.drop_all()
    assert names(one) == ["mine", "step_notes"]


def test_the_only_sound_state_stays_beside_damaged_newer_ones(trained):
    """Counted by number alone, keep_last: 1 would keep the damaged one and drop the other."""
    one = trained(keep_last=1)
    one.step()
    later = shutil.copytree(one.saved(9), one.parent.with_name("later"))
    one.states.drop_all()
    one.saved(1)
    shutil.copytree(later, one.parent / "step_000009")
    (one.parent / "step_000009" / "run.pt").write_bytes(b"damaged")
    assert one.states.newest().name == "step_000001"
    one.saved(2)
    assert names(one) == ["step_000002", "step_000009.damaged"]
    one.saved(9)
    assert names(one) == ["step_000009", "step_000009.damaged"]
    assert one.states.newest().name == "step_000009"


def test_damaged_states_do_not_count_and_stay(trained):
    """Also after a start that no longer looks at them, and more than one of a step."""
    before = trained(keep_last=2)
    before.step()
    before.saved(1)
    before.saved(2)
    for _ in range(2):
        (before.parent / "step_000002" / "run.pt").write_bytes(b"damaged")
        one = trained(keep_last=2)
        assert one.states.newest().name == "step_000001"
        one.step()
        one.saved(2)
    later = trained(keep_last=2)
    assert later.states.newest().name == "step_000002"
    later.step()
    later.saved(3)
    later.saved(4)
    kept = ["step_000002.damaged", "step_000002.damaged1"]
    assert names(later) == [*kept, "step_000003", "step_000004"]
    later.states.drop_all()
    assert names(later) == kept


def test_older_states_stay_where_told_to(trained):
    one = trained(keep_last=1)
    one.step()
    one.saved(1)
    one.save(2, keep_older=True)
    one.save(3, keep_older=True)
    one.states.wait()
    assert names(one) == ["step_000001", "step_000002", "step_000003"]
    one.saved(4)
    assert names(one) == ["step_000004"]


def test_a_file_that_cannot_be_read_is_damage(trained, monkeypatch):
    one = trained()
    one.step()
    one.saved(1)

    def bad_block(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(training_state, "file_hash", bad_block)
    with pytest.raises(ValueError, match=r"cannot be read: Input/output error"):
        one.states.newest()


def test_a_full_disk_is_one_sentence_and_costs_nothing(trained, monkeypatch):
    one = trained()
    one.step()
    folder = one.saved(1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*args, **given):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = type(one.parent)
    for module, name in ((path, "mkdir"), (torch, "save"), (path, "write_text"), (os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(OSError, match=r"step_000002 could not be written .*No space left"):
                one.saved(2)
        assert names(one) == ["step_000001"], name
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert one.states.newest() == folder
    one.saved(3)


def test_a_failed_save_shows_before_the_next(trained, monkeypatch):
    one = trained()
    one.step()
    assert not one.states.has_failed
    monkeypatch.setattr(TrainingStates, "_publish", lambda *args: 1 / 0)
    one.save(1)
    one.states._writing.exception()
    assert one.states.has_failed
    with pytest.raises(OSError, match="rank 0: division by zero"):
        one.save(2)


# ------------------------------------------------------------------------- reading


def test_newest_is_by_number(trained):
    one = trained(keep_last=9)
    assert one.states.newest() is None
    one.step()
    for step in (999999, 1000000):
        one.saved(step)
    (one.parent / "step_2000000.partial").mkdir()
    assert one.states.newest() == one.parent / "step_1000000"


def damage(folder, how):
    file = folder / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    if how == "a flipped bit":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif how == "a cut file":
        file.write_bytes(data[:-1])
    elif how == "a missing file":
        (folder / "run.pt").unlink()
    elif how == "no manifest":
        (folder / "manifest.json").unlink()
    elif how == "a cut manifest":
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text[:-20])
    elif how == "a manifest that leads out":
        (folder.parent / "other").write_bytes(b"")
        entry = {"size": 0, "sha256": training_state.file_hash(folder.parent / "other")}
        (folder / "manifest.json").write_text(json.dumps({"files": {"../other": entry}}))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("a flipped bit", "the content of __0_0.distcp has changed"),
        ("a cut file", "__0_0.distcp has [0-9]+ bytes, not [0-9]+"),
        ("a missing file", "run.pt is missing"),
        ("no manifest", "it has no manifest.json"),
        ("a cut manifest", "manifest.json cannot be read: JSONDecodeError"),
        ("a manifest that leads out", "'../other' is not a file name"),
    ],
)
def test_a_damaged_state_is_named_passed_over_and_kept(trained, caplog, how, said):
    one = trained()
    one.step()
    sound, damaged = one.saved(1), one.saved(2)
    damage(damaged, how)
    assert one.states.newest() == sound
    (record,) = (r for r in caplog.records if r.name == training_state.__name__)
    assert f"{damaged} is damaged" in record.message
    assert "passed over and kept" in record.message
    assert damaged.exists()
    damage(sound, how)
    with pytest.raises(ValueError, match=f"no training state can be resumed: .*{said}.*; .*{said}"):
        one.states.newest()


@pytest.mark.parametrize("name", [".metadata", "run.pt", "rank_0.pt"])
def test_a_state_that_carries_code_is_refused_and_does_not_run_it(trained, tmp_path, name):
    """With a manifest of its own: hashes prove that nothing changed, not who wrote it."""
    one = trained()
    one.step()
    folder = one.saved(1)
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {ran}",)

    data = pickle.dumps(Evil())
    if name != ".metadata":
        torch.save({"step": 1, "optimizer": Evil()}, folder / name)
    else:
        (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name} (carries Python code|was not opened: .*system)"):
        one.states.load(folder, one.model, one.optimizer)
    assert not ran.exists()


def test_metadata_that_leads_out_of_the_folder(trained):
    one = trained()
    one.step()
    folder = one.saved(1)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../other"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"'\.\./other' is not a file name"):
        one.states.load(folder, one.model, one.optimizer)


def test_shards_hold_tensors_only(trained):
    one = trained()
    one.step()
    folder = one.saved(1)
    dcp.save({"model": {"weight": "text", "bias": "text"}, "optimizer": {}}, checkpoint_id=folder)
    one.optimizer.state.clear()
    run = torch.load(folder / "run.pt", weights_only=True)
    torch.save(run | {"optimizer": {}}, folder / "run.pt")
    with pytest.raises(ValueError, match="does not hold this model and optimizer"):
        one.states.load(folder, one.model, one.optimizer)


def test_a_state_of_another_model(trained):
    one = trained()
    one.step()
    folder = one.saved(1)
    one.model = torch.nn.Linear(40, 51)
    one.optimizer = torch.optim.AdamW(one.model.parameters())
    with pytest.raises(ValueError, match="does not hold this model and optimizer"):
        one.states.load(folder, one.model, one.optimizer)
