"""What a ``tune run`` of our recipes needs: to find them, and a launcher that lets them save.

torchtune installs a top-level package ``recipes`` that refuses to be imported. ``tune run`` turns
``recipes/x.py`` into the module name ``recipes.x``; with torchrun options it starts
``python -m recipes.x``, which looks in the current folder first, but with one process it searches
the current folder last and meets torchtune's package: the one-process run gets the search order of
the others.

torchrun dies of SIGUSR1, with which Slurm announces the end of a job, and leaves its workers
behind; and it kills workers that take longer than 30 seconds to save after a signal. Both are
defaults of options, which are other ones here.

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


def activate() -> None:
    """Prepare a ``tune run`` beside our own ``recipes``; does nothing in any other process.

    Puts the current folder first on ``sys.path``, and sets the launcher's defaults unless the user
    has. ``python -m torchtune._cli.tune`` puts the current folder first by itself.
    """
    argv = getattr(sys, "argv", [])  # an interpreter inside another program may have none
    if argv[1:2] != ["run"] or not os.path.isfile(os.path.join("recipes", "__init__.py")):
        return
    is_script = os.path.basename(argv[0]) == "tune"
    # While Python looks for the module of -m, which imports torch, that is all argv tells.
    is_module = argv[0] == "-m" and "torchtune._cli.tune" in sys.orig_argv
    if is_script:
        sys.path.insert(0, os.getcwd())
    if is_script or is_module:
        for name, value in LAUNCHER_DEFAULTS.items():
            os.environ.setdefault(name, value)
