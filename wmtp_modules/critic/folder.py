"""A critic's folder: its value head, the record that marks it complete, and unfinished training."""

import hashlib
import json
import math
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from wmtp_modules.critic.figures import shortcomings
from wmtp_modules.critic.pairs import fingerprint_responses
from wmtp_modules.critic.rewards import Responses
from wmtp_modules.files import alone_in, new_file, read_json
from wmtp_modules.models.value_head import HEADS, ValueHead
from wmtp_modules.run.figures import TrainingError
from wmtp_modules.scoring.score_table import fingerprint_checkpoint, fingerprint_tokenizer

HEAD_FILE, RECORD_FILE = "value_head.safetensors", "critic.json"
PROGRESS = ("step", "heldout_losses", "evaluations_since_best", "best_head")


class TrainingState:
    """Progress of a critic's training, written after every evaluation so that a kill loses little.

    A state with another ``fingerprint`` of what the critic is made from is not resumed.
    """

    def __init__(self, folder: Path, fingerprint: dict) -> None:
        self._path = folder / "state.pt"
        self._fingerprint = fingerprint
        self.step = 0
        self.heldout_losses: list[float] = []
        self.evaluations_since_best = 0
        self.best_head: dict[str, torch.Tensor] = {}

    def resume(self, head: ValueHead, optimizer: torch.optim.Optimizer) -> None:
        """Continue from a state of the same fingerprint, if any; ValueError if it is damaged."""
        if not self._path.exists():
            return
        try:
            state = torch.load(self._path, map_location="cpu", weights_only=True)
            if state["fingerprint"] != self._fingerprint:
                return
            head.load_state_dict(state["head"])
            optimizer.load_state_dict(state["optimizer"])
            for name in PROGRESS:
                setattr(self, name, state[name])
        except Exception as error:  # of a pickle with flipped bits, there is no telling which
            raise ValueError(
                f"{self._path} is damaged or no state of a critic's training: delete it, and the "
                "critic is trained from its start"
            ) from error

    def evaluated(
        self, heldout_loss: float, head: ValueHead, optimizer: torch.optim.Optimizer
    ) -> float:
        """Record and return a held-out loss, equal on all ranks; TrainingError if not finite."""
        if not math.isfinite(heldout_loss):
            raise TrainingError(
                f"the critic's held-out loss after step {self.step} is {heldout_loss}: lower "
                "critic.optimizer.lr"
            )
        if heldout_loss < min(self.heldout_losses, default=float("inf")):
            self.evaluations_since_best = 0
            self.best_head = {key: value.clone() for key, value in head.state_dict().items()}
        else:
            self.evaluations_since_best += 1
        self.heldout_losses.append(heldout_loss)
        if dist.get_rank() == 0:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            state = {name: getattr(self, name) for name in PROGRESS}
            state |= {"head": head.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"fingerprint": self._fingerprint}
            with new_file(self._path) as unfinished, unfinished.open("wb") as file:
                torch.save(state, file)
        return heldout_loss


def settings_of(critic: dict) -> dict:
    """How a critic is trained, of a config's keys: no matter to a policy, but another is another.

    Left out is where it lies, and what its fingerprint names.
    """
    elsewhere = ("checkpoint_dir", "dataset", "objective", "head")
    return {key: value for key, value in critic.items() if key not in elsewhere}


def save_critic(folder: Path, head: ValueHead, record: dict) -> None:
    """Write the value head, then the record that marks the folder as complete.

    The record has the ``fingerprint`` of what it was trained from, ``settings`` and ``report``.
    """
    state = {key: value.cpu().contiguous() for key, value in head.state_dict().items()}
    with alone_in(folder, wait=True):  # no head of one process with the record of another
        with new_file(folder / HEAD_FILE) as unfinished:
            save_file(state, unfinished)
        with new_file(folder / RECORD_FILE) as unfinished:
            unfinished.write_text(json.dumps(record, indent=1))


def read_critic(folder: Path) -> dict | None:
    """The record of a complete critic, None if there is none; ValueError if it is damaged."""
    path = folder / RECORD_FILE
    if not path.exists():
        return None
    try:
        record = read_json(path)
    except ValueError:
        record = {}
    blocks = ("fingerprint", "settings", "report")
    if not all(isinstance(record.get(b), dict) for b in blocks):
        raise ValueError(f"{path} is damaged: train the critic again in another folder")
    return record


def check_critic(folder: Path, fingerprint: dict, settings: dict | None = None) -> dict:
    """The record of the critic in a folder, proven to be made from ``fingerprint``.

    ``settings`` are how this run would train it; None if any will do.

    Raises:
        ValueError: if there is none, or it was trained on another trunk, data set or reward, or
            with other settings.
    """
    record = read_critic(folder)
    if record is None:
        raise ValueError(f"{folder} holds no trained critic: add 'critic' to stages")
    found, fingerprint = record["fingerprint"], dict(fingerprint)
    if settings is not None:
        found, fingerprint = found | record["settings"], fingerprint | settings
    differences = [
        f"{key}: the critic has {found.get(key)!r}, this run {fingerprint.get(key)!r}"
        for key in sorted(found.keys() | fingerprint.keys())
        if found.get(key) != fingerprint.get(key)
    ]
    if differences:
        raise ValueError(
            f"the critic in {folder} was made from something else ({'; '.join(differences)}): "
            "delete that folder to train again, or name another critic.checkpoint_dir"
        )
    return record


def critic_fingerprint(
    train: Responses,
    heldout: Responses,
    *,
    rows_made_from: dict[str, str],
    checkpoint_dir: str | Path,
    tokenizer_path: str | Path,
    objective: str,
    head: str,
    dtype: str,
) -> dict:
    """What a critic is made from: another trunk, data set or reward makes another critic.

    ``rows_made_from`` are hashes of the tokens, by "critic" or "train", and "heldout";
    ``head`` is the kind of its value head.

    Reads every byte of the trunk: with several ranks compute it on rank 0 and share it.
    """
    good = [train.good.tolist(), heldout.good.tolist()]
    return {
        "trunk": fingerprint_checkpoint(checkpoint_dir),
        "tokenizer": fingerprint_tokenizer(tokenizer_path),
        "dataset": rows_made_from.get("critic", rows_made_from["train"]),
        "dataset_val": rows_made_from["heldout"],
        "responses": fingerprint_responses(train.rows),
        "responses_val": fingerprint_responses(heldout.rows),
        "good": hashlib.sha256(json.dumps(good).encode()).hexdigest(),
        "objective": objective,
        "head": head,
        "dtype": dtype,
    }


def useful_critic(folder: Path, fingerprint: dict, *, allow_any: bool) -> dict:
    """``check_critic``; ValueError as well if it has ``shortcomings``, unless ``allow_any``."""
    record = check_critic(folder, fingerprint)
    found = shortcomings(record["report"])
    if found and not allow_any:
        raise ValueError(
            f"the critic in {folder} knows nothing of use: {'; and '.join(found)}. Give it "
            "more data or steps, or set allow_uninformative_critic: true"
        )
    return record


def load_value_head(folder: Path, embed_dim: int) -> ValueHead:
    """The value head of a critic, on the CPU, of the kind that its record names.

    ValueError if it is missing, damaged or of another width.
    """
    record, path = read_critic(folder), folder / HEAD_FILE
    kind = record["fingerprint"].get("head") if record else None
    if kind not in HEADS:
        raise ValueError(f"{folder} holds no trained critic: add 'critic' to stages")
    head = ValueHead(embed_dim, kind)
    try:
        head.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{path} is missing, damaged, or no {kind} head of width {embed_dim}: train the "
            f"critic again ({error})"
        ) from error
    return head
