"""Rewards of responses: one number per row, from a reward model, a column, or verified labels.

Shapes: N rows, B pairs of a batch, T tokens of the reward model, D its width.

A reward model has a tokenizer and a chat template of its own, so it reads the text of prompt and
response. Its score is read at the last token of that text, found from the lengths: a padding token
is often the token that ends a text as well, and says nothing about where the text ends.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

from wmtp_modules.data.rows import check_one_response_each
from wmtp_modules.files import json_fault, stand_in
from wmtp_modules.parallel.sharding import DTYPES
from wmtp_modules.run.watchdog import Watchdog
from wmtp_modules.scoring.score_table import (
    ScoreTable,
    compute_scores,
    fingerprint_checkpoint,
    fingerprint_rows,
    fingerprint_tokenizer,
)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
TOLD = 200  # characters of a library's error
SHOWN = 40  # characters of a prompt or response in an error


class RewardModel:
    """A classifier with one label in Hugging Face format that reads a whole conversation.

    Works for every decoder whose classification class has ``score``, a linear layer on the last
    hidden state, as Llama's has (Llama-3-8B ``FsfairX-LLaMA3-RM``).

    Args:
        folder: weights, config, tokenizer and chat template. Nothing is downloaded, and no code
            from the folder is run.
        dtype: of the trunk's parameters; the score is taken in fp32.

    Raises:
        ImportError: if transformers is not installed.
        ValueError: if the folder is missing, damaged or not a checkpoint, lacks weights (a score
            head above all), has more than one label, or has no chat template.
    """

    def __init__(self, folder: str | Path, *, device: torch.device, dtype: torch.dtype) -> None:
        try:
            from transformers import AutoModelForSequenceClassification, AutoTokenizer
        except ImportError as error:
            raise ImportError(
                "a reward model needs transformers: pip install wmtp[reward], or uv sync --extra "
                "reward"
            ) from error
        if not Path(folder, "config.json").is_file():
            raise ValueError(
                f"{folder} holds no config.json: name the folder of a reward model in Hugging Face "
                "format"
            )
        for path in sorted(Path(folder).iterdir()):
            found = stand_in(path) if path.suffix in (".json", ".safetensors", ".bin") else None
            if found:
                raise ValueError(f"{path} is {found}")
        local = dict(local_files_only=True, trust_remote_code=False)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, **local)
        except Exception as error:  # of transformers or tokenizers: of no common class
            raise ValueError(
                f"{folder} holds no tokenizer that can be read ({_told(error)})"
            ) from error
        if cast(Any, self._tokenizer).chat_template is None:
            raise ValueError(
                f"the tokenizer in {folder} has no chat template: add the one that the reward "
                "model was trained with as chat_template.jinja"
            )
        self._folder = folder
        self._text(("a prompt", "a response"))  # a template that is broken is told before all else
        try:
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, **local
            )
        except Exception as error:  # also of safetensors, pickle and huggingface_hub
            raise ValueError(
                f"{folder} is not a readable reward model, or its weights are damaged "
                f"({_told(error)})"
            ) from error
        # A key that is missing was initialised at random: its scores would be noise.
        missing = sorted(loading["missing_keys"], key=lambda key: (key != "score.weight", key))
        if missing:
            named = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise ValueError(
                f"{folder} lacks {len(missing)} weights of a {type(model).__name__} ({named}): it "
                "is not a trained reward model"
            )
        if model.config.num_labels != 1:
            raise ValueError(
                f"{folder} has num_labels {model.config.num_labels}: a reward model gives one score"
            )
        if not isinstance(getattr(model, "score", None), torch.nn.Linear):
            raise ValueError(
                f"{folder} is a {type(model).__name__}, which does not read its score off the last "
                "token: use a decoder such as LlamaForSequenceClassification"
            )
        model.score.float()  # bf16 keeps 8 bits: near 4 that is a step of 0.03 between rewards
        self._model = model.to(device).eval().requires_grad_(False)
        self._device = device

    def _text(self, pair: tuple[str, str]) -> str:
        """The conversation as the model reads it, special tokens and all."""
        turns = zip(("user", "assistant"), pair, strict=True)
        conversation = [{"role": role, "content": text} for role, text in turns]
        try:
            return self._tokenizer.apply_chat_template(conversation, tokenize=False)
        except Exception as error:  # whatever the template's own text raises
            raise ValueError(
                f"the chat template in {self._folder} cannot be used ({_told(error)}): get the one "
                "that the reward model was trained with"
            ) from error

    @torch.no_grad()
    def score(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        """Rewards of some pairs of prompt and response, scored together, fp32 [B].

        Raises:
            ValueError: if a conversation is too long for the model, has tokens that the model does
                not know, or gets a score that is not finite.
        """
        texts = [self._text(pair) for pair in pairs]
        # The template writes the special tokens, BOS included.
        ids = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        lengths = [len(row) for row in ids]
        limit = self._model.config.max_position_embeddings
        n_embeddings = self._model.get_input_embeddings().num_embeddings
        for pair, row in zip(pairs, ids, strict=True):
            if len(row) > limit:
                raise ValueError(
                    f"{_shown(pair)} has {len(row)} tokens of the reward model, which takes "
                    f"{limit}: leave out rows of that length, or use a reward model that takes them"
                )
            if not row or max(row) >= n_embeddings:
                found = f"has token {max(row)}" if row else "becomes no token at all"
                raise ValueError(
                    f"{_shown(pair)} {found}, the reward model has {n_embeddings}: "
                    f"{self._folder} holds the tokenizer or chat template of another model"
                )
        # Padded here, on the right, with any token: causal attention does not see it.
        rows = [torch.tensor(row) for row in ids]
        tokens_BT = pad_sequence(rows, batch_first=True)
        mask_BT = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        hidden_BTD = self._model.base_model(
            input_ids=tokens_BT.to(self._device),
            attention_mask=mask_BT.to(self._device),
            use_cache=False,
        ).last_hidden_state
        last_B = torch.tensor(lengths, device=self._device) - 1
        last_BD = hidden_BTD[torch.arange(len(ids), device=self._device), last_B]
        scores_B = self._model.score(last_BD.float()).squeeze(-1).cpu().numpy()
        for pair, score in zip(pairs, scores_B, strict=True):
            if not np.isfinite(score):
                raise ValueError(
                    f"the reward of {_shown(pair)} is {score}: check the reward model's checkpoint "
                    "and dtype"
                )
        return scores_B


@dataclass(frozen=True)
class RewardStatistics:
    """Mean and population standard deviation of the training set's rewards; standardises all."""

    mean: float
    std: float

    @classmethod
    def of(cls, rewards_N: np.ndarray) -> "RewardStatistics":
        """Of rewards [N]; ValueError if there are none, one is not finite, or all are equal."""
        rewards_N = np.asarray(rewards_N, np.float64)
        if len(rewards_N) == 0:
            raise ValueError("there are no rewards: the data set is empty")
        _check_finite(rewards_N, "rewards")
        if rewards_N.min() == rewards_N.max():
            raise ValueError(
                f"every response has reward {rewards_N[0]:g}: a critic needs good and bad responses"
            )
        return cls(float(rewards_N.mean()), float(rewards_N.std()))

    def standardise(self, rewards_N: np.ndarray) -> np.ndarray:
        """(R - mean) / std, fp64 [N]."""
        return (np.asarray(rewards_N, np.float64) - self.mean) / self.std


@dataclass(frozen=True)
class Responses:
    """N tokenised rows, their standardised rewards, and f(R): how much each is wanted, in [0, 1].

    Rewards and ``good`` are fp64 [N], and empty if a config has no rewards.
    """

    rows: Dataset
    rewards: np.ndarray = field(default_factory=lambda: np.zeros(0))
    good: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def above(self, threshold: float | None) -> np.ndarray:
        """Indices of the rows with a reward above a threshold; of all rows for None."""
        if threshold is None or not len(self.rewards):
            return np.arange(len(self.rows))
        return np.flatnonzero(self.rewards > threshold)

    def good_rows(self) -> np.ndarray:
        """Indices of the good rows, f(R) above one half; of all rows without rewards."""
        return np.flatnonzero(self.good > 0.5) if len(self.good) else np.arange(len(self.rows))


def goodness(
    rewards_N: np.ndarray,
    standardised_N: np.ndarray,
    good: str,
    *,
    threshold: float = 0.0,
    temperature: float = 1.0,
) -> np.ndarray:
    """f(R), how much a response is wanted: fp64 [N] in [0, 1].

    Args:
        rewards_N: as they come.
        standardised_N: with the training set's statistics.
        good: ``label`` (R itself, 0 or 1), ``above`` (1 where the standardised R is above
            ``threshold``) or ``sigmoid`` ((R - threshold) / temperature, of the standardised R).

    Raises:
        ValueError: for ``label`` if a reward is neither 0 nor 1.
    """
    if good == "label":
        strange = np.flatnonzero((rewards_N != 0) & (rewards_N != 1))
        if len(strange):
            raise ValueError(
                f"rewards.good: label needs rewards of 0 and 1, and row {strange[0]} has "
                f"{rewards_N[strange[0]]:g}: set rewards.good to above or sigmoid"
            )
        return np.asarray(rewards_N, np.float64)
    if good == "above":
        return (standardised_N > threshold).astype(np.float64)
    return 1 / (1 + np.exp(-(standardised_N - threshold) / temperature))


def rated(
    rows: dict[str, Dataset],
    raw: dict[str, np.ndarray],
    *,
    both_kinds: bool,
    good: str,
    threshold: float = 0.0,
    temperature: float = 1.0,
) -> tuple[dict[str, Responses], RewardStatistics]:
    """Responses of "train", "heldout" and, where it has rows of its own, "critic".

    All are standardised by what the critic learns from. ``raw`` are their rewards, the rest as for
    ``goodness``.

    Raises:
        ValueError: as ``goodness``; with ``both_kinds`` also unless the critic learns from, and is
            judged on, good and bad responses.
    """
    taught = "critic" if "critic" in rows else "train"
    statistics = RewardStatistics.of(raw[taught])
    found = {}
    for name, one in rows.items():
        standardised = statistics.standardise(raw[name])
        how = {"threshold": threshold, "temperature": temperature}
        found[name] = Responses(one, standardised, goodness(raw[name], standardised, good, **how))
    names = {taught: "critic.dataset" if "critic" in rows else "dataset", "heldout": "dataset_val"}
    for name, key in names.items() if both_kinds else ():
        if np.ptp(found[name].good) == 0:
            raise ValueError(
                f"{key}: every response is {found[name].good[0]:g} good by rewards.good {good}: a "
                "critic learns from good and bad responses and is judged on both"
            )
    return found, statistics


class RewardTables:
    """Rewards of data sets, computed once and kept in tables.

    Args:
        source: "reward_model", "column" or "labels".
        batch_tokens: tokens that are scored at a time, padding included.
        checkpoint_dir: folder of the reward model; the other sources have none.
        dtype: that the reward model runs in, by name.
    """

    def __init__(
        self,
        source: str,
        *,
        table_dir: str | Path,
        tokenizer_path: str | Path,
        max_seq_len: int,
        batch_tokens: int,
        checkpoint_dir: str | Path | None,
        dtype: str,
        device: torch.device,
        watchdog: Watchdog,
    ) -> None:
        self._source = source
        self._table_dir = Path(table_dir)
        self._batch_tokens = batch_tokens
        self._made_from = partial(
            reward_fingerprint,
            source=source,
            max_seq_len=max_seq_len,
            tokenizer_path=tokenizer_path,
            checkpoint_dir=checkpoint_dir,
            dtype=dtype,
        )
        self._checkpoint_dir, self._dtype, self._device = checkpoint_dir, dtype, device
        self._watchdog = watchdog
        self._model: RewardModel | None = None  # loaded when the first response must be scored

    def of(self, rows: Dataset, split: str, *, score: bool) -> np.ndarray:
        """Rewards of the rows of a split, fp64 [N], equal on all ranks; a collective.

        With ``score`` the table is completed first; else it must be there.

        Raises:
            ValueError: if the rows lack what the source reads, or the table is of something else.
        """
        check_one_response_each(rows)
        folder = self._table_dir / split
        fingerprint = self._watchdog.on_rank_zero(lambda: self._made_from(rows))
        if score:
            if self._source != "reward_model":
                reward_rows(rows, self._source)  # all of them are sound
            with self._watchdog:
                compute_scores(
                    folder,
                    fingerprint,
                    rows,
                    self._score,
                    inputs=self._inputs,
                    batch_tokens=self._batch_tokens,
                    rank=dist.get_rank(),
                    world=dist.get_world_size(),
                    desc=f"rewards ({split})",
                    beat=self._watchdog.beat,
                )
        return ScoreTable.open(folder, fingerprint, rows).per_row().astype(np.float64)

    def _inputs(self, part: Dataset) -> list:
        if self._source == "reward_model":
            return list(zip(part["prompt"], part["response"], strict=True))
        return list(part["reward"])

    def _score(self, batch: list) -> list[np.ndarray]:
        if self._source == "reward_model":
            if self._model is None:
                assert self._checkpoint_dir is not None
                with self._watchdog.paused():
                    self._model = RewardModel(
                        self._checkpoint_dir, device=self._device, dtype=DTYPES[self._dtype]
                    )
            batch = list(self._model.score(batch))
        return [np.array([reward], np.float32) for reward in batch]


def reward_rows(rows: Dataset, source: str) -> np.ndarray:
    """Rewards that come with the data, fp64 [N]: any number ("column"), or 0 and 1 ("labels").

    Raises:
        ValueError: if the source is another, or a reward is missing, not finite or not a label.
    """
    if source not in ("column", "labels"):
        raise ValueError(f"rewards.source is {source!r}: column and labels come with the data")
    if "reward" not in rows.column_names:
        raise ValueError(
            f"rewards.source {source} needs rows with a reward, and this data set has none: add "
            "the field, or use reward_model"
        )
    column = rows.select_columns("reward").with_format("arrow")[:]["reward"]
    rewards_N = column.cast("float64").to_numpy()  # null becomes NaN
    _check_finite(rewards_N, f"values of rewards.source {source}")
    strange = np.flatnonzero((rewards_N != 0) & (rewards_N != 1))
    if source == "labels" and len(strange):
        raise ValueError(
            f"{len(strange)} of {len(rewards_N)} labels are neither 0 nor 1, the first is "
            f"{rewards_N[strange[0]]:g} in row {strange[0]}: set rewards.source: column for them"
        )
    return rewards_N


def reward_fingerprint(
    rows: Dataset,
    source: str,
    *,
    max_seq_len: int,
    tokenizer_path: str | Path,
    checkpoint_dir: str | Path | None = None,
    dtype: str | None = None,
) -> dict:
    """What a table of rewards depends on, as ``compute_scores`` asks for it.

    Reads every byte of a reward model: with several ranks compute it on rank 0 and share it. Of a
    reward model ``pairs`` is the content of prompt and response, whose border the tokens do not
    show, and ``reward_tokenizer`` its tokenizer and chat template.

    Raises:
        ValueError: if the rows lack what the source reads (``prompt`` and ``response`` for a reward
            model, else ``reward``), or the folder holds no weights.
    """
    fingerprint = {
        "kind": "rewards",
        "per": "row",
        "n_heads": 1,
        "source": source,
        "dataset": fingerprint_rows(rows),
        "tokenizer": fingerprint_tokenizer(tokenizer_path),
        "max_seq_len": max_seq_len,
    }
    if source == "reward_model":
        assert checkpoint_dir is not None
        fingerprint |= {
            "pairs": _fingerprint_pairs(rows),
            "checkpoint": fingerprint_checkpoint(checkpoint_dir),
            "reward_tokenizer": _fingerprint_chat(Path(checkpoint_dir)),
            "dtype": dtype,
        }
    else:
        fingerprint["rewards"] = hashlib.sha256(reward_rows(rows, source).tobytes()).hexdigest()
    return fingerprint


def _fingerprint_pairs(rows: Dataset) -> str:
    """Content hash of prompts and responses; ValueError if a row has none."""
    if not {"prompt", "response"} <= set(rows.column_names):
        raise ValueError(
            "a reward model scores prompt/response rows, and this data set has none: its records "
            "need the fields prompt and response"
        )
    digest, row = hashlib.sha256(), 0
    for batch in rows.select_columns(["prompt", "response"]).iter(batch_size=4096):
        for pair in zip(batch["prompt"], batch["response"], strict=True):
            if None in pair:
                raise ValueError(
                    f"a reward model scores prompt/response rows, and row {row} of this data set "
                    "is plain text: leave plain text out"
                )
            digest.update(json.dumps(pair).encode())
            row += 1
    return digest.hexdigest()


def _fingerprint_chat(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in filter(Path.exists, (folder / name for name in TOKENIZER_FILES)):
        digest.update(f"{path.name} {fingerprint_tokenizer(path)}\n".encode())
    return digest.hexdigest()


def _check_finite(rewards_N: np.ndarray, what: str) -> None:
    bad = np.flatnonzero(~np.isfinite(rewards_N))
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(rewards_N)} {what} are missing or not finite, the first in row "
            f"{bad[0]}: give every response a reward, or leave those rows out"
        )


def _told(error: Exception) -> str:
    """What a library says of a damaged file, in one line; Python's own errors say nothing."""
    if isinstance(error, TypeError | KeyError | AttributeError | IndexError):
        return "a value in it is of the wrong kind"
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", json_fault(error))
    return " ".join(text.replace("NoneType", "null").split())[:TOLD]


def _shown(pair: tuple[str, str]) -> str:
    prompt, response = (text[:SHOWN] for text in pair)
    return f"the pair {prompt!r}, {response!r}"
