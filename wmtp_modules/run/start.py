"""From a recipe's command line to its process group; errors of the user end in one sentence."""

import functools
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

from wmtp_modules.catalog import recipes
from wmtp_modules.config.file import read_config
from wmtp_modules.config.secrets import guard_output, hidden
from wmtp_modules.files import alone_in
from wmtp_modules.parallel.process_group import (
    check_environment,
    init_process_group,
    local_device,
    patient_barrier,
)
from wmtp_modules.run.hosts import check_hosts
from wmtp_modules.run.metric_logging import note_last_words
from wmtp_modules.run.stopping import StopRequests, exit_code
from wmtp_modules.run.storing import arrive, followed, localized
from wmtp_modules.run.watchdog import explain_lost_rank
from wmtp_modules.tune_plugin import note_spoken

# Seconds that a rank which failed alone waits before it says so: rank 0 may fail in the same way a
# little later, and then speaks for all.
PATIENCE = 60
# Not for users: fp32 activations meet a bf16 scale on purpose; torchtune's attention logs through a
# cached function, which a compiled block meets.
for told in (
    "Mismatch dtype between input and weight",
    "Dynamo detected a call to a `functools.lru_cache`-wrapped function",
):
    warnings.filterwarnings("ignore", message=told)

FAILED, JOINING = "wmtp/rank_0_failed", "wmtp/rank_0_joins"  # keys of the launcher's store


@contextmanager
def exit_with_message(*errors: type[Exception]) -> Iterator[None]:
    """End the process with a sentence on stderr, and exit code 1, at what its user can correct.

    Of what every rank finds only rank 0 speaks, and on another host the first rank there; the rest
    wait for the launcher to end them. What another rank found alone carries its number. Errors of
    other kinds keep their traceback.
    """
    try:
        yield
    except errors as error:
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()  # the sentence gets a line of its own
        sentence, rank = hidden(f"{type(error).__name__}: {error}"), os.environ.get("RANK", "0")
        note_last_words(sentence)
        if not rank.isdecimal() or int(rank) == 0:
            _tell_others(FAILED)
            note_spoken()
            sys.exit(sentence)
        if _rank_zero_speaks():
            if os.environ.get("LOCAL_RANK") == "0":  # of another host, which has its own launcher
                note_spoken()
                sys.exit(sentence)
            time.sleep(PATIENCE)  # an earlier end would have the launcher kill rank 0
            sys.exit(1)
        note_spoken()
        sys.exit(f"rank {rank}: {sentence}")


def parse(main: Callable[[DictConfig], None]) -> Callable[[], None]:
    """Decorator of a recipe's main: the config that the command line names, or one sentence."""

    @functools.wraps(main)
    def wrapper() -> None:
        guard_output()
        with exit_with_message(ValueError, OSError):
            check_environment()
            cfg = localized(read_config(description=sys.modules[main.__module__].__doc__))
        main(cfg)

    return wrapper


def launched_as() -> str:
    """How this process's recipe was started, but for its config: ``tune run ... RECIPE``."""
    world, local = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    nodes = f" --nnodes {world // local}" if world > local else ""
    recipe = os.path.relpath(sys.argv[0]) if os.path.isabs(sys.argv[0]) else sys.argv[0]
    recipe = sys.argv[0] if recipe.startswith("..") else recipe
    for name, path in recipes().items():  # holds on other machines as well
        if str(path) == sys.argv[0] and recipe != f"recipes/{name}.py":
            recipe = name
    command = f"tune run{nodes} --nproc_per_node {local} {shlex.quote(recipe)}"
    return command.replace("\n", " ")  # one line, whatever a folder is called


@contextmanager
def process_group(
    cfg: DictConfig, **stop_requests: str
) -> Iterator[tuple[torch.device, DeviceMesh, StopRequests]]:
    """The process group of a recipe, with signals heard; all ranks leave it together.

    Rank 0 is alone in ``output_dir`` until then; where another run is at work the process ends with
    its name. A replay writes nothing.

    Yields:
        This rank's device, the data-parallel mesh, and what may end the runs early.
    """
    hours = cfg.get("max_hours")
    with ExitStack() as stack:
        if int(os.environ.get("RANK", 0)) == 0 and not cfg.get("replay"):
            with exit_with_message(OSError):  # before anything is written there
                stack.enter_context(alone_in(cfg.output_dir, wait=False))
        stops = stack.enter_context(StopRequests(hours, cfg.output_dir, **stop_requests))
        stack.enter_context(exit_code(stops))
        with exit_with_message(ValueError, OSError):
            local_device(cfg.device)  # what every rank finds comes before rank 0 says it joins
            if os.environ.get("RANK") == "0":
                _tell_others(JOINING)
            device, mesh = init_process_group(cfg.device, cfg.get("collective_timeout_s"))
        with exit_with_message(ValueError, OSError):
            if not cfg.get("replay"):  # what is in a store comes now, however long it takes
                stack.enter_context(followed(cfg))
            arrive(cfg)
            if not cfg.get("replay"):
                check_hosts(cfg)
        stack.enter_context(explain_lost_rank(cfg.output_dir))
        patient_barrier()
        yield device, mesh, stops
    patient_barrier()  # a rank that leaves early would abort another's gloo threads
    dist.destroy_process_group()


def _rank_zero_speaks() -> bool:
    """Whether rank 0 has failed as well, on another rank that has.

    Before they join a process group rank 0 waits for nobody: it either fails too or continues to
    join, and until then no clock decides. Afterwards it may be waiting for this very rank.
    """
    try:
        store = _store()
        started = time.monotonic()
        while not store.check([FAILED]):
            late = time.monotonic() - started > PATIENCE
            if late if dist.is_initialized() else store.check([JOINING]):
                return store.check([FAILED])
            time.sleep(0.1)
        return True
    except (RuntimeError, ValueError):  # no torchrun, whose like may still end this rank
        time.sleep(PATIENCE)
        return False


def _tell_others(key: str) -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        with suppress(RuntimeError, ValueError):  # no launcher: every rank speaks for itself
            _store().set(key, "1")


@functools.cache
def _store() -> dist.Store:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise ValueError("not started by torchrun")
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))
