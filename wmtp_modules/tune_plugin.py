"""What a ``tune run`` of our recipes needs: to find them, a launcher that lets them save and speak.

torchtune installs a top-level package ``recipes`` that refuses to be imported. ``tune run`` turns
``recipes/x.py`` into the module name ``recipes.x``; with torchrun options it starts
``python -m recipes.x``, which looks in the current folder first, but with one process it searches
the current folder last and meets torchtune's package: the one-process run gets the search order of
the others.

torchrun dies of SIGUSR1, with which Slurm announces the end of a job, and leaves its workers
behind; and it kills workers that take longer than 30 seconds to save after a signal. Both are
defaults of options, which are other ones here.

A launcher whose workers ended by an error of the user, or were stopped, knows no more than their
exit codes, and buries the sentence that says why under a traceback of its own. A worker that has
spoken tells it so (``note_spoken``), and it keeps quiet: the last line on the screen is ours. Its
exit code stays what it is. Where a worker was killed, its number says more than those that lost it,
and the traceback is shown. When another host is lost, C++ code of the launcher prints some 60 lines
about the store that was there: they are held back as well.

torchao 0.15 warns in every process that its C++ extensions, which nothing here calls, are not made
for torch 2.13. No user can mend that, as torchtune 0.6.1 needs the one and we the other: the line
is held back in every process of an environment that has these two, and no other line is.

``activate`` is a ``torch.backends`` entry point, which torch calls at the end of ``import torch``,
before torchrun reads its options. It runs in every process that imports torch, hence the standard
library only.
"""

import os
import sys

LAUNCHER_DEFAULTS = {
    # of --signals-to-handle: torch's own, and SIGUSR1
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    # of --shutdown-timeout, in seconds: the scheduler's grace shall be what ends a slow save
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300",
}

SPOKEN_FILE = "WMTP_SPOKEN_FILE"  # a worker that has told its user why it ends writes there
# Those of torchrun that tell of workers which end.
LAUNCHER_LOGS = tuple(
    f"torch.distributed.elastic.{name}" for name in ("multiprocessing.api", "agent.server.api")
)

LAUNCHER_LEAVES_S = 20  # after the last of its workers
# Of pyproject.toml. With any other version torchao's line is news, and shown.
EXPECTED = "torch version 2.13.0", "torchao version 0.15.0"


def is_news(record) -> bool:
    """A filter of torchao's logger: False for the line about the versions that are pinned."""
    text = str(record.msg)
    is_it = text.startswith("Skipping import of cpp extensions due to incompatible torch version")
    return not (is_it and all(version in text for version in EXPECTED))


def note_spoken() -> None:
    """Tell the launcher, if there is one, that the reason why this worker ends is on the screen."""
    path = os.environ.get(SPOKEN_FILE)
    if path:
        try:
            with open(path, "a") as file:
                file.write("spoken\n")
        except OSError:  # the launcher then speaks as well
            return


def first_to_speak() -> bool:
    """Whether no worker of this launcher, that is of this host, has spoken; it counts as spoken."""
    import fcntl

    with open(os.environ[SPOKEN_FILE], "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        is_first = os.fstat(file.fileno()).st_size == 0
        file.write("spoken\n")
    return is_first


def speak_last(several_nodes: bool = False) -> None:
    """Have this launcher be silent about workers that have spoken.

    ``several_nodes``: it is one of several, and starts no worker again.
    """
    import atexit
    import logging
    import tempfile
    import threading
    import time

    file, path = tempfile.mkstemp(prefix="wmtp_spoken_")
    os.close(file)
    os.environ[SPOKEN_FILE] = path

    def spoken() -> bool:
        return os.path.exists(path) and os.path.getsize(path) > 0

    def remove() -> None:
        if os.path.exists(path):
            os.remove(path)

    before, screen = sys.excepthook, []  # a copy of stderr, once that leads nowhere

    def filter_log(record) -> bool:
        if not spoken():
            return True
        if several_nodes and not screen:  # workers that still end have stderr of their own
            screen.append(os.dup(2))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        return False

    def hook(kind, error, trace) -> None:
        # ChildFailedError and SignalException: which worker ended how, or which signal came.
        is_known = kind.__module__.startswith("torch.distributed.elastic") and spoken()
        if screen:
            os.dup2(screen[0], 2)
        if not is_known or _was_killed(error):
            before(kind, error, trace)

    def leave() -> None:
        """In a thread: end where no worker is left, and the store that is asked is cut off.

        The launcher asks it between two looks at its workers, for as long as the network tries.
        """
        lonely_s = 0
        while lonely_s < LAUNCHER_LEAVES_S:
            time.sleep(1)
            lonely_s = lonely_s + 1 if spoken() and not _living_children() else 0
        remove()
        os._exit(1)

    sys.excepthook = hook
    for name in LAUNCHER_LOGS:
        logging.getLogger(name).addFilter(filter_log)
    atexit.register(remove)
    if several_nodes:
        threading.Thread(target=leave, name="leaves without workers", daemon=True).start()


def _living_children() -> list[str]:
    """Process ids, without those that have ended and that nobody has asked about."""
    from contextlib import suppress

    found = []
    for task in os.listdir("/proc/self/task"):
        with suppress(OSError), open(f"/proc/self/task/{task}/children") as file:
            for pid in file.read().split():
                with open(f"/proc/{pid}/stat") as stat:
                    found += [pid] if stat.read().rpartition(")")[2].split()[0] != "Z" else []
    return found


def _was_killed(error: BaseException) -> bool:
    """Whether the first worker to end was ended by a signal that no launcher sends at first."""
    import signal

    failures = getattr(error, "failures", {}).values()
    first = min(failures, key=lambda failure: failure.timestamp, default=None)
    return first is not None and first.exitcode < 0 and first.exitcode != -signal.SIGTERM


def activate() -> bool:
    """Hold back torchao's line, and prepare a launcher of recipes that are not torchtune's.

    For ``tune run`` of one sets the launcher's defaults unless the user has, and puts the current
    folder first on ``sys.path`` where it has a package ``recipes``. ``python -m
    torchtune._cli.tune`` puts the folder first by itself.

    Returns:
        Whether this process is ``tune``, whatever its subcommand.
    """
    import logging  # torch has it by now; what only asks for this module's names need not

    logging.getLogger("torchao").addFilter(is_news)
    argv = getattr(sys, "argv", [])  # an interpreter inside another program may have none
    if not argv:
        return False
    has_recipes = os.path.isfile(os.path.join("recipes", "__init__.py"))
    script = os.path.basename(argv[0])
    # While Python looks for the module of -m, which imports torch, that is all argv tells.
    modules = set(sys.orig_argv) if argv[0] == "-m" else set()
    is_tune = script == "tune" or "torchtune._cli.tune" in modules
    runs = is_tune and argv[1:2] == ["run"] and (has_recipes or _names_a_recipe(argv[2:]))
    is_torchrun = script == "torchrun" or "torch.distributed.run" in modules
    if runs or (is_torchrun and has_recipes):
        nodes = any(word.startswith(("--nnodes", "--rdzv")) for word in argv)
        again = any(word.replace("_", "-").startswith("--max-restarts") for word in argv)
        nodes = nodes or "PET_NNODES" in os.environ
        speak_last(nodes and not (again or "PET_MAX_RESTARTS" in os.environ))
    if runs:
        if script == "tune" and has_recipes:
            sys.path.insert(0, os.getcwd())
        for name, value in LAUNCHER_DEFAULTS.items():
            os.environ.setdefault(name, value)
    return is_tune


def _names_a_recipe(words: list[str]) -> bool:
    """Whether one of these is a file of Python, also without its end, or a recipe of ours.

    A launcher's own values, and overrides, are none.
    """
    from wmtp_modules.catalog import recipes

    ours = recipes()
    return any(
        word.endswith(".py") or word in ours or os.path.isfile(f"{word}.py") for word in words
    )
