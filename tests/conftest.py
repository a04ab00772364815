"""Fixtures of several test files, and how a plain ``pytest`` runs. Nothing is downloaded."""

import os

# Before anything imports torch. Threads that wait for a core which another test has would spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing that a test starts writes to this folder's runs/: it names its stores itself.
os.environ["WMTP_ENVIRONMENT"] = os.path.join(os.path.dirname(__file__), "environment.yaml")
# A machine's load comes when it comes: only its own tests look at it.
os.environ["MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"] = "false"
# Without the bytecode of torch and its like, each process that starts compiles for ten seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import faulthandler
import gc
import importlib.util
import logging
import signal
import subprocess
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import sentencepiece as spm
from hypothesis import settings

sys.dont_write_bytecode = False
# By default an example that takes 200 ms fails, which says how busy the machine is.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

MOST_WORKERS = 4
BOUND_S = {"nightly": 3600, "slow": 400, "": 300}  # of one test with what it sets up, by its marker


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """All tests go to some processes, a file at a time, the slow files first.

    Named files or tests stay in this process, where ``-s`` and ``--pdb`` work, and so does all
    where -n says so or pytest-xdist is not installed: an image has no development packages.
    """
    option, everything = config.option, config.args_source is config.ArgsSource.TESTPATHS
    is_worker = "PYTEST_XDIST_WORKER" in os.environ  # which would start workers of its own
    if is_worker or not config.pluginmanager.hasplugin("xdist") or option.dist != "no":
        return
    if option.numprocesses is None and everything and not (option.usepdb or option.collectonly):
        # One more than there are processors, as many a test waits for something.
        option.numprocesses = min(MOST_WORKERS, (os.cpu_count() or 1) + 1)
    if option.numprocesses:
        option.dist, option.loadscopereorder = "loadfile", False


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What is nightly is slow. Files with slow tests first: what comes last should be short."""
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker("slow")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)  # stable


def pytest_configure(config):
    config.bound_file = os.fdopen(os.dup(2), "w")  # stderr itself is captured during a test
    config.pluginmanager.register(load(Path(__file__).with_name("servers.py")), "servers")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A test that hangs ends its process with a traceback of every thread.

    Also where the interpreter is stuck in C. xdist starts another worker and goes on.
    """
    if not item.config.option.usepdb:
        bound = next(s for mark, s in BOUND_S.items() if not mark or item.get_closest_marker(mark))
        faulthandler.dump_traceback_later(bound, exit=True, file=item.config.bound_file)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def load(path: Path):
    """A module by its path: tests are no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory):
    """The ``ForkServer`` of fork_server.py, for fixtures of a file; tests take ``forks``."""
    module = load(Path(__file__).with_name("fork_server.py"))
    server = module.ForkServer(tmp_path_factory.mktemp("fork_server"))
    yield server
    server.close()


@pytest.fixture
def forks(fork_server):
    """The same; what a test has left running is killed."""
    yield fork_server
    fork_server.close_started()


class Children:
    """Forked children of this process, which see what a test has patched."""

    def __init__(self) -> None:
        self._pids: list[int] = []

    def begin(self, function: Callable, *args) -> int:
        """The process id of one that calls a function, and exits with 1 if that raises."""
        pid = os.fork()
        if pid == 0:
            code = 1
            gc.disable()  # torch's garbage of the tests before ends a child that collects it
            logging.getLogger().handlers.clear()  # pytest's: warnings go to stderr
            try:
                function(*args)
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
                print(error.code, file=sys.stderr)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        self._pids.append(pid)
        return pid

    def ends(self, *pids: int) -> list[int]:
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]

    def close(self) -> None:
        for pid in self._pids:
            with suppress(ChildProcessError):  # it has been waited for
                if os.waitpid(pid, os.WNOHANG) == (0, 0):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)


@pytest.fixture
def children():
    """``Children``; what a test has left running is killed."""
    started = Children()
    yield started
    started.close()


@pytest.fixture(scope="module")
def drawn():
    """drawn(): a context in which pictures are drawn. The others of a file's tests hold no picture:
    one takes as long as the training of a small model.
    """
    from matplotlib.figure import Figure

    with pytest.MonkeyPatch.context() as patch:

        @contextmanager
        def draw() -> Iterator[None]:
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(Figure, "savefig", savefig)
                yield

        savefig = Figure.savefig
        forked = load(Path(__file__).with_name("fork_server.py"))
        patch.setattr(Figure, "savefig", forked.save_nothing)
        yield draw


@pytest.fixture
def waits(monkeypatch):
    """waits(): a context, which gives a list of what in it would wait for a GPU.

    Operators that need a tensor's contents, and methods that fetch them.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    names = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2"}
    found: list[str] | None = None

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            index = args[1] if func._overloadpacket.__name__ == "index" else ()
            by_mask = any(i is not None and i.dtype == torch.bool for i in index)
            if by_mask or func._overloadpacket.__name__ in names:
                found.append(str(func))
            return func(*args, **(kwargs or {}))

    @contextmanager
    def watch():
        nonlocal found
        found = []
        with monkeypatch.context() as patch, Watching():
            for name in ("tolist", "cpu", "numpy"):
                method = getattr(torch.Tensor, name)

                def fetching(self, *args, name=name, method=method, **kwargs):
                    found.append(f"Tensor.{name}")
                    return method(self, *args, **kwargs)

                patch.setattr(torch.Tensor, name, fetching)
            yield found

    return watch


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(kib): a file system of that size; grown by a second call."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def make(kib):
        again = ["-o", f"remount,size={kib}k"] if os.path.ismount(disk) else ["-o", f"size={kib}k"]
        command = ["mount", "-t", "tmpfs", *again, "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a small disk is a mounted tmpfs, which takes root")
        return disk

    yield make
    if os.path.ismount(disk):
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # a log may be open


@pytest.fixture(autouse=True, scope="module")
def forget_places():
    """A process remembers what its configs named in stores: for one file's tests only."""
    yield
    if storing := sys.modules.get("wmtp_modules.run.storing"):
        storing._places.clear()


STDLIB = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="session")
def benchmarks() -> Path:
    """The folder of real benchmark files, which are not in this repository."""
    folder = os.environ.get("WMTP_BENCHMARKS")
    if not folder:
        pytest.skip("WMTP_BENCHMARKS names no folder of benchmarks: see tests/samples/README.md")
    assert Path(folder).is_dir(), f"WMTP_BENCHMARKS is {folder!r}, which is no folder"
    return Path(folder)


@pytest.fixture(scope="session")
def samples() -> Path:
    """Small files in the benchmarks' formats."""
    return Path(__file__).with_name("samples")


@pytest.fixture(scope="session")
def tiny_tokenizer_path(tmp_path_factory) -> Path:
    """A Llama-style SentencePiece model of 512 pieces, trained on standard-library source."""
    folder = tmp_path_factory.mktemp("tokenizer")
    names = ["ast", "bisect", "calendar", "heapq", "json/decoder", "queue", "textwrap"]
    corpus = folder / "corpus.txt"
    corpus.write_text("".join((STDLIB / f"{name}.py").read_text() for name in names))
    spm.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=512,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_digits=True,
        pad_id=-1,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture
def tiny_model_args() -> dict:
    """Two trunk blocks and four heads with grouped queries: the smallest model with every part."""
    return dict(
        vocab_size=512,
        num_layers=6,
        n_future_tokens=4,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=32,
        max_seq_len=64,
        intermediate_dim=64,
    )


@pytest.fixture
def gloo_group(tmp_path):
    """A one-process gloo group, for what needs a mesh but no second rank."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
