"""Deals packed rows out to ranks, in batches on their device: a resumable epoch, held-out packs."""

import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from wmtp_modules.data.packing import PackedDataset, collate


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The batch on the device; nobody waits for what is pinned."""
    return {name: x.to(device, non_blocking=x.is_pinned()) for name, x in batch.items()}


def packs_of_epoch(n_packs: int, joint: int, packs_per_step: int) -> int:
    """How many of the packs an epoch takes: whole optimizer steps, the rest is left out.

    Packs fewer than a step has are taken in whole joint micro-batches of ``joint``.
    """
    whole = packs_per_step if n_packs >= packs_per_step else joint
    return n_packs // whole * whole


class EpochLoader:
    """Micro-batches of one epoch of a rank, whose batch of packs r, r + world, ... is collated.

    Together the ranks see the packs in order, so the joint micro-batch does not depend on how many
    share it. The state is the number of packs that all ranks together have been given, whatever
    workers have read ahead: another number of ranks, or of workers, goes on at the same pack.

    Args:
        batch_size: packs of a rank's micro-batch.
        packs_per_step: packs of an optimizer step.
        workers: processes that read ahead; 0 reads when asked.
        pin_memory: for copies to a GPU that nobody waits for.

    Raises:
        ValueError: if the data set has fewer packs than one joint micro-batch.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        batch_size: int,
        rank: int,
        world: int,
        packs_per_step: int,
        *,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        n_packs, self._joint = len(dataset), world * batch_size
        if n_packs < self._joint:
            raise ValueError(
                f"the dataset packs into {n_packs} rows of {dataset.max_seq_len} tokens, fewer "
                f"than one joint micro-batch of {world} ranks x {batch_size}: lower batch_size or "
                "add data"
            )
        self._dataset, self._rank, self._world = dataset, rank, world
        self._n_packs = packs_of_epoch(n_packs, self._joint, packs_per_step)
        self._workers, self._pin_memory = workers, pin_memory
        self._packs = 0

    def __iter__(self) -> Iterator[dict]:
        starts = range(self._packs, self._n_packs, self._joint)
        batches = DataLoader(
            self._dataset,
            batch_sampler=[[*range(s + self._rank, s + self._joint, self._world)] for s in starts],
            collate_fn=collate,
            num_workers=self._workers,
            worker_init_fn=_leave_signals,
            pin_memory=self._pin_memory,
            # Of its own: from torch's, each epoch would draw a number, and so a resumed run more.
            generator=torch.Generator(),
        )
        for batch in batches:
            self._packs += self._joint
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"packs": self._packs}

    def load_state_dict(self, state: dict) -> None:
        """Go on there; takes the states of torchdata's loader too, which earlier versions wrote."""
        if "packs" not in state:
            state = state["_sampler_iter_state"]["sampler_state"]
        self._packs = state["packs"]


def _leave_signals(_worker: int) -> None:
    """In a worker: signals are its rank's, which saves before it ends while the worker goes on.

    A scheduler sends SIGTERM to all processes of a job, once. The second one is the rank's own, for
    a worker that has not ended when it should.
    """
    signal.set_wakeup_fd(-1)  # the rank's
    for signum in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


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
