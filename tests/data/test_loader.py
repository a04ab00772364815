"""Ranks share the packs of an epoch in order, and another number of them goes on from there."""

import multiprocessing
import os
import signal
import time

import pytest
import torch

from wmtp_modules.data.loader import EpochLoader, packs_of_epoch


class Packs:
    """As many packs as asked for, each its own number."""

    max_seq_len = 8

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return {"tokens": torch.tensor([index])}


def joint_batches(loaders):
    """The packs of every joint micro-batch, in the order in which one process would see them."""
    for batches in zip(*loaders, strict=True):
        ranks = [batch["tokens"].flatten().tolist() for batch in batches]
        yield [pack for packs in zip(*ranks, strict=True) for pack in packs]


def loaders(n, batch_size, world, packs_per_step, state=None):
    made = [EpochLoader(Packs(n), batch_size, r, world, packs_per_step) for r in range(world)]
    for loader in made:
        if state is not None:
            loader.load_state_dict(state)
    return made


@pytest.mark.parametrize(("batch_size", "world"), [(6, 1), (3, 2), (2, 3), (1, 6)])
def test_ranks_share_the_packs_in_order(batch_size, world):
    batches = list(joint_batches(loaders(20, batch_size, world, 6)))
    assert batches == [list(range(start, start + 6)) for start in (0, 6, 12)]


@pytest.mark.parametrize(("batch_size", "world"), [(6, 1), (3, 2), (1, 6), (2, 1), (1, 2), (1, 1)])
def test_another_number_of_ranks_goes_on_at_the_same_pack(batch_size, world):
    """Saved after two of the joint micro-batches of 2 ranks x 3; a step has 6 packs."""
    made = loaders(23, 3, 2, 6)
    for loader in made:
        iterator = iter(loader)
        next(iterator), next(iterator)
    states = [loader.state_dict() for loader in made]
    for state in states:  # that of any rank will do
        resumed = joint_batches(loaders(23, batch_size, world, 6, state))
        assert [pack for batch in resumed for pack in batch] == [12, 13, 14, 15, 16, 17]


@pytest.mark.parametrize(
    ("n_packs", "world", "batch_size", "packs_per_step"),
    [(20, 2, 3, 6), (18, 2, 3, 6), (6, 2, 3, 6), (5, 2, 1, 8), (7, 1, 2, 8), (9, 3, 1, 6)],
)
def test_as_many_packs_as_an_epoch_takes(n_packs, world, batch_size, packs_per_step):
    batches = joint_batches(loaders(n_packs, batch_size, world, packs_per_step))
    taken = [pack for batch in batches for pack in batch]
    assert len(taken) == packs_of_epoch(n_packs, world * batch_size, packs_per_step)
    assert n_packs - len(taken) < (packs_per_step if n_packs >= packs_per_step else 6)


def test_an_epoch_of_less_than_a_step_has_whole_joint_micro_batches():
    assert list(joint_batches(loaders(7, 1, 2, 16))) == [[0, 1], [2, 3], [4, 5]]


def test_a_state_at_the_end_of_an_epoch():
    (loader,) = loaders(6, 3, 1, 6)
    assert len(list(loader)) == 2
    (resumed,) = loaders(6, 3, 1, 6, loader.state_dict())
    assert list(resumed) == []


def test_fewer_packs_than_a_joint_micro_batch():
    with pytest.raises(ValueError, match="packs into 3 rows of 8 tokens, fewer than one joint"):
        loaders(3, 2, 2, 4)


@pytest.mark.parametrize("then", [0, 1])
def test_workers_read_ahead_and_the_state_does_not_say_so(then):
    """What two workers have read is ahead of what was given by up to four batches."""
    given = EpochLoader(Packs(40), 2, 0, 1, 4, workers=2)
    batches = iter(given)
    first = [next(batches)["tokens"].flatten().tolist() for _ in range(3)]
    state = given.state_dict()
    assert (first, state) == ([[0, 1], [2, 3], [4, 5]], {"packs": 6})
    rest = EpochLoader(Packs(40), 2, 0, 1, 4, workers=then)
    rest.load_state_dict(state)
    assert torch.cat([batch["tokens"] for batch in rest]).flatten().tolist() == [*range(6, 40)]
    assert [batch["tokens"][0].item() for batch in batches] == [*range(6, 40, 2)]


def test_a_state_of_an_earlier_version():
    """As torchdata 0.11 wrote it."""
    (loader,) = loaders(20, 2, 1, 4)
    sampler = {"samples_yielded": 4, "sampler_state": {"packs": 4}}
    loader.load_state_dict({"_index_sampler_state": None, "_sampler_iter_state": sampler})
    assert next(iter(loader))["tokens"].flatten().tolist() == [4, 5]


def test_a_worker_outlives_the_signals_of_its_rank():
    """A scheduler sends one to every process of a job; the rank saves before it ends."""
    batches = iter(EpochLoader(Packs(400), 2, 0, 1, 2, workers=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    for signum in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        os.kill(worker.pid, signum)
    time.sleep(0.1)
    assert len(list(batches)) == 199
    worker.join(10)
    assert worker.exitcode == 0
    batches = iter(EpochLoader(Packs(400), 2, 0, 1, 2, workers=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGTERM)
    time.sleep(0.1)

    def end_again():  # as a rank does that ends
        os.kill(worker.pid, signal.SIGTERM)
        time.sleep(10)

    with pytest.raises(RuntimeError, match="killed by signal: Terminated"):  # torch says so at once
        end_again()
