"""Deals packed rows out to ranks, in batches on their device: a resumable epoch, held-out packs."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from wmtp_modules.data.packing import PackedDataset, collate


def to_device(batch: dict, device: torch.device) -> dict:
    """The batch with every tensor, also inside lists, on the device."""
    return {
        key: [x.to(device) for x in value] if isinstance(value, list) else value.to(device)
        for key, value in batch.items()
    }


class PackSampler(Sampler[int]):
    """One epoch of a rank, which reads packs r, r + world, ...

    Together the ranks see the packs in order, so the joint micro-batch does not depend on how many
    share it. The state is the number of packs that all ranks together have read: another number of
    ranks goes on at the same pack.
    """

    def __init__(self, n_packs: int, rank: int, world: int) -> None:
        self._n_packs, self._rank, self._world = n_packs, rank, world
        self._read = 0

    def __iter__(self) -> Iterator[int]:
        for index in range(self._read + self._rank, self._n_packs, self._world):
            self._read += self._world
            yield index

    def state_dict(self) -> dict[str, int]:
        return {"packs": self._read}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._read = state["packs"]


def packs_of_epoch(n_packs: int, joint: int, packs_per_step: int) -> int:
    """How many of the packs an epoch takes: whole optimizer steps, the rest is left out.

    Packs fewer than a step has are taken in whole joint micro-batches of ``joint``.
    """
    whole = packs_per_step if n_packs >= packs_per_step else joint
    return n_packs // whole * whole


def epoch_dataloader(
    dataset: PackedDataset, batch_size: int, rank: int, world: int, packs_per_step: int
) -> StatefulDataLoader:
    """One epoch of a rank, ``packs_of_epoch``; its state goes on with any number of ranks.

    Args:
        batch_size: packs of a rank's micro-batch.
        packs_per_step: packs of an optimizer step.

    Raises:
        ValueError: if the data set has fewer packs than one joint micro-batch.
    """
    n_packs, joint = len(dataset), world * batch_size
    if n_packs < joint:
        raise ValueError(
            f"the dataset packs into {n_packs} rows of {dataset.max_seq_len} tokens, fewer "
            f"than one joint micro-batch of {world} ranks x {batch_size}: lower batch_size or add "
            "data"
        )
    sampler = PackSampler(packs_of_epoch(n_packs, joint, packs_per_step), rank, world)
    # A generator of its own: from torch's, each iterator would draw a number that it does not
    # need, and a resumed run makes one more of them.
    return StatefulDataLoader(
        dataset, batch_size, sampler=sampler, collate_fn=collate, generator=torch.Generator()
    )


def heldout_batches(
    dataset: PackedDataset, batch_size: int, rank: int, world: int, device: torch.device
) -> Iterator[dict]:
    """Each pack once. Ranks take part in equally many forwards, as FSDP needs, so the last batch
    is filled up with packs that supervise nothing."""
    joint = world * batch_size
    for start in range(0, len(dataset), joint):
        items = []
        for index in range(start + rank, start + joint, world):
            item = dict(dataset[min(index, len(dataset) - 1)])
            if index >= len(dataset):
                item["keep"] = torch.zeros_like(item["keep"])
            items.append(item)
        yield to_device(collate(items), device)
