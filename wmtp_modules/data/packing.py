"""Packs tokenised rows into sequences of fixed length, keeping document boundaries.

Legend: T positions of a pack, B packs of a batch.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset


class PackedDataset(Dataset):
    """Packs of whole rows, padded to ``max_seq_len`` tokens.

    Every row is in exactly one pack of an epoch. Which one depends only on (seed, epoch): the rows
    are dealt by ``best_fit_decreasing``, equal lengths in random order, and then the packs, and the
    rows inside each, are put in random order, so that a row's length does not say when it comes.
    Every epoch has as many packs.

    Args:
        rows: tokenised rows with columns ``tokens``, ``keep`` and optionally ``noise``, ``weight``.
        scores: by name; ``scores[name][row]`` is [len] or [len, K_ref], from a score table.
        rewards: one number per row.

    Raises:
        ValueError: if there are no rows, one is empty or longer than ``max_seq_len``, or
            ``rewards`` has a different length.

    Attributes:
        max_seq_len: T.
        n_tokens: of all rows, without padding.
        packing: hash of which rows are where in this epoch.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        *,
        max_seq_len: int,
        seed: int,
        pad_id: int = 0,
        scores: Mapping[str, Any] | None = None,
        rewards: np.ndarray | None = None,
    ) -> None:
        if len(rows) == 0:
            raise ValueError("there are no rows to pack")
        if rewards is not None and len(rewards) != len(rows):
            raise ValueError(f"there are {len(rewards)} rewards for {len(rows)} rows")
        self._lengths = row_lengths(rows)
        for row in (int(self._lengths.argmax()), int(self._lengths.argmin())):
            if not 1 <= self._lengths[row] <= max_seq_len:
                raise ValueError(
                    f"row {row} has {self._lengths[row]} tokens, max_seq_len is {max_seq_len}: "
                    "build the rows with a tokenizer.max_seq_len of at most that"
                )
        self._columns = [c for c in ("tokens", "keep", "noise", "weight") if c in rows.column_names]
        self._rows = rows.select_columns(self._columns).with_format("arrow")
        self.max_seq_len = max_seq_len
        self._seed = seed
        self._pad_id = pad_id
        self._scores = scores or {}
        self._rewards = rewards
        self.n_tokens = int(self._lengths.sum())
        self._epoch: int | None = None
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Pack anew for ``epoch``."""
        if epoch == self._epoch:
            return
        rng = np.random.default_rng([self._seed, epoch])
        shuffled = rng.permutation(len(self._lengths))
        by_length = shuffled[np.argsort(-self._lengths[shuffled], kind="stable")]
        packs = best_fit_decreasing(self._lengths[by_length], self.max_seq_len)
        places = rng.permutation(packs.max() + 1)[packs]
        self._order = by_length[np.lexsort((rng.permutation(len(places)), places))]
        self._bounds = np.concatenate([[0], np.cumsum(np.bincount(places))])
        self._epoch = epoch
        parts = (self._order.tobytes(), self._bounds.tobytes())
        self.packing = hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @property
    def scores_made_from(self) -> dict[str, dict]:
        """Fingerprint of each score table, by its name; scores in memory have none."""
        tables = self._scores.items()
        return {name: table.fingerprint for name, table in tables if hasattr(table, "fingerprint")}

    @property
    def padding_share(self) -> float:
        """Share of all packs' positions that no row fills."""
        return 1 - self.n_tokens / (len(self) * self.max_seq_len)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One pack.

        Returns:
            ``tokens`` int64 [T]; ``keep`` bool [T], supervised; ``doc`` int64 [T], document in the
            pack, -1 for padding; ``input_pos`` int64 [T], from 0 in every document; ``row`` int64
            [T], row of the data set, -1 for padding; ``noise`` bool [T]; ``weight`` fp32 [T] if the
            rows have it, 1 where they say nothing; each of ``scores`` by name, fp32 [T] or
            [T, K_ref], and ``reward`` fp32 [T] of the token's row, both NaN for padding.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        rows = self._order[self._bounds[index] : self._bounds[index + 1]]
        lengths = self._lengths[rows]
        n_tokens = int(lengths.sum())
        tail = self.max_seq_len - n_tokens
        table = self._rows[rows.tolist()]
        flat = {
            # The rows of the pack concatenated into one array, copied out of the file.
            name: np.concatenate(
                [pc.list_flatten(chunk).to_numpy(zero_copy_only=False) for chunk in column.chunks]
            )
            for name, column in zip(table.column_names, table.columns, strict=True)
        }
        if "weight" in flat:
            says = [pc.is_valid(chunk).to_numpy(False) for chunk in table["weight"].chunks]
            flat_weight = np.ones(n_tokens, np.float32)
            flat_weight[np.repeat(np.concatenate(says), lengths)] = flat["weight"]
            flat["weight"] = flat_weight
        starts = np.cumsum(lengths) - lengths
        columns: dict[str, tuple[np.ndarray, float]] = {
            "tokens": (flat["tokens"].astype(np.int64), self._pad_id),
            "keep": (flat["keep"].astype(bool), False),
            "doc": (np.repeat(np.arange(len(rows)), lengths), -1),
            "input_pos": (np.arange(n_tokens) - np.repeat(starts, lengths), 0),
            "row": (np.repeat(rows, lengths), -1),
            "noise": (flat.get("noise", np.zeros(n_tokens)).astype(bool), False),
        }
        if "weight" in flat:
            columns["weight"] = (flat["weight"], 1.0)
        for name, table in self._scores.items():
            columns[name] = (_scores_of(table, rows, lengths), np.nan)
        if self._rewards is not None:
            rewards = np.repeat(self._rewards[rows].astype(np.float32), lengths)
            columns["reward"] = (rewards, np.nan)
        pack = {}
        for name, (values, pad) in columns.items():
            padding = np.full((tail, *values.shape[1:]), pad, values.dtype)
            pack[name] = torch.from_numpy(np.concatenate([values, padding]))
        if tail:
            # Padding counts from 0 like a document, so no position exceeds T.
            pack["input_pos"][n_tokens:] = torch.arange(tail)
        return pack


def best_fit_decreasing(lengths: np.ndarray, room: int) -> np.ndarray:
    """Deal rows out to packs: each to the fullest one that has room for it, else to a new one.

    Args:
        lengths: int64, from the longest to the shortest, each in [1, ``room``].
        room: of an empty pack.

    Returns:
        The pack of each row, int64, counted from 0. With N rows it takes about N log(``room``).
    """
    packs_by_room = defaultdict[int, list[int]](list)
    rooms = 0  # bit r is 1 where a pack has room r
    n_packs = 0
    packs = np.empty(len(lengths), np.int64)
    # Views give plain integers, one at a time: a list of millions would take as many objects.
    rows = packs.data
    for i, length in enumerate(lengths.data):
        enough = rooms >> length
        if enough:
            found = length + (enough & -enough).bit_length() - 1  # the lowest bit that is 1
            pack = packs_by_room[found].pop()
            if not packs_by_room[found]:
                rooms ^= 1 << found
        else:
            pack, found, n_packs = n_packs, room, n_packs + 1
        rows[i] = pack
        if left := found - length:
            packs_by_room[left].append(pack)
            rooms |= 1 << left
    return packs


def collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack packs into a batch."""
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def _scores_of(table: Sequence, rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    take = getattr(table, "take", None)  # of a table on disk, in one reading
    parts = take(rows.tolist()) if take else [table[row] for row in rows.tolist()]
    parts = [np.asarray(part, np.float32) for part in parts]
    for row, part, length in zip(rows, parts, lengths, strict=True):
        if len(part) != length:
            raise ValueError(
                f"row {row} has {length} tokens but {len(part)} scores: the scores belong to other "
                "rows, so score this data set again"
            )
    return np.concatenate(parts)


def pad_rows(rows: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack rows of token ids, padded on the right, where causal attention cannot see.

    Returns:
        ``tokens`` int64 [B, T], 0 for padding; ``doc`` int64 [B, T], -1 for padding, otherwise 0.
    """
    T = max(len(row) for row in rows)
    tokens_BT = torch.zeros(len(rows), T, dtype=torch.int64)
    doc_BT = torch.full((len(rows), T), -1)
    for b, row in enumerate(rows):
        tokens_BT[b, : len(row)] = torch.from_numpy(np.asarray(row, np.int64))
        doc_BT[b, : len(row)] = 0
    return tokens_BT, doc_BT


def row_lengths(rows: datasets.Dataset) -> np.ndarray:
    """Tokens of each row, int64, from the Arrow offsets without reading the tokens."""
    tables = rows.select_columns("tokens").with_format("arrow").iter(batch_size=10_000)
    chunks = [pc.list_value_length(c) for table in tables for c in table["tokens"].chunks]
    lengths = [chunk.to_numpy() for chunk in chunks]
    return np.concatenate([np.zeros(0, np.int64), *lengths]).astype(np.int64)
