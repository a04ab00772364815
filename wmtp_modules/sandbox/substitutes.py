"""Makes parts of the standard library work that need more of the machine than the walls leave.

A program is one process of a user whom no file names. Within that process, locks of
``multiprocessing`` need no shared memory, and the only user and group to know are its own. Runs
inside the sandbox, so it uses only the standard library.
"""

import _thread
import grp
import importlib.machinery
import os
import pwd
import resource
import sys
import types

STACKS = 1 << 30  # bytes of address space for stacks of threads, beside a program's memory
DEFAULT_STACK = 8 << 20  # of a thread: launch.SERVER_STACK
RECURSIVE_MUTEX = 0  # kind of a SemLock


def install() -> None:
    """Once in a fork server, before anything imports ``threading`` or ``multiprocessing``."""
    user = ("nobody", "x", os.getuid(), os.getgid(), "nobody", os.environ["HOME"], "/bin/false")
    know_only(pwd, "getpw", "uid", pwd.struct_passwd(user))
    know_only(grp, "getgr", "gid", grp.struct_group(("nogroup", "x", os.getgid(), [])))
    locks = sys.modules["_multiprocessing"] = types.ModuleType("_multiprocessing")
    locks.__dict__.update(SemLock=SemLock, sem_unlink=lambda name: None, flags={})
    sys.meta_path.insert(0, HeapInScratch)
    for name in ("start_new_thread", "start_new", "start_joinable_thread"):
        if hasattr(_thread, name):
            setattr(_thread, name, with_stack(getattr(_thread, name)))


def know_only(module: types.ModuleType, get: str, by: str, entry: tuple) -> None:
    """Let ``pwd`` or ``grp`` find nothing but one entry: (name, password, number, ...)."""

    def find(wanted, own):
        if wanted != own:
            raise KeyError(f"{get}{by}(): not found: {wanted!r}")
        return entry

    setattr(module, get + by, lambda number: find(number, entry[2]))
    setattr(module, get + "nam", lambda name: find(name, entry[0]))
    setattr(module, get + "all", lambda: [entry])


def with_stack(start):
    """``start`` a thread whose stack does not count as memory: what it uses of it does."""
    memory = None

    def start_with_stack(*arguments, **named):
        nonlocal memory
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        memory = memory or soft
        size = _thread.stack_size()  # which also sets it to the default
        _thread.stack_size(size)
        stacks = (_thread._count() + 1) * (size or DEFAULT_STACK)
        resource.setrlimit(resource.RLIMIT_AS, (max(soft, min(memory + stacks, hard)), hard))
        return start(*arguments, **named)

    return start_with_stack


class HeapInScratch:
    """Finds ``multiprocessing.heap``, whose values and arrays then live in the scratch folder."""

    @staticmethod
    def find_spec(name: str, path=None, target=None):
        if name != "multiprocessing.heap":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_without_shared_memory(module: types.ModuleType) -> None:
            run(module)
            module.Arena._dir_candidates = []

        spec.loader.exec_module = run_without_shared_memory
        return spec


class SemLock:
    """``_multiprocessing.SemLock`` for the threads of one process, after its C source."""

    SEM_VALUE_MAX = (1 << 31) - 1

    def __init__(self, kind: int, value: int, maxvalue: int, name: str, unlink: bool) -> None:
        import threading  # what it does in every fork takes as long as the fork

        self.kind, self.maxvalue = kind, maxvalue
        self.handle, self.name = id(self), None  # without a name no process watches over it
        self._free = threading.Semaphore(value)
        self._held, self._holder = 0, 0  # times; the identity of a thread

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        if self.kind != RECURSIVE_MUTEX or not self._is_mine():
            if not self._free.acquire(block, timeout if block else None):
                return False
            self._holder = _thread.get_ident()
        self._held += 1
        return True

    def release(self) -> None:
        if self.kind == RECURSIVE_MUTEX and not self._is_mine():
            raise AssertionError("attempt to release recursive lock not owned by thread")
        if self.kind != RECURSIVE_MUTEX and self._get_value() >= self.maxvalue:
            raise ValueError("semaphore or lock released too many times")
        self._held -= 1
        if self.kind != RECURSIVE_MUTEX or self._held == 0:
            self._free.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_) -> None:
        self.release()

    def _count(self) -> int:
        return self._held

    def _is_mine(self) -> bool:
        return self._held > 0 and self._holder == _thread.get_ident()

    def _get_value(self) -> int:
        return self._free._value

    def _is_zero(self) -> bool:
        return self._free._value == 0

    def _after_fork(self) -> None:
        self._held = 0
