"""What a ``tune run`` of our recipes needs: to find them, a launcher that lets them save, quiet.

torchtune installs a top-level package ``recipes`` that refuses to be imported. ``tune run`` turns
``recipes/x.py`` into the module name ``recipes.x``; with torchrun options it starts
``python -m recipes.x``, which looks in the current folder first, but with one process it searches
the current folder last and meets torchtune's package: the one-process run gets the search order of
the others.

torchrun dies of SIGUSR1, with which Slurm announces the end of a job, and leaves its workers
behind; and it kills workers that take longer than 30 seconds to save after a signal. Both are
defaults of options, which are other ones here.

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

# Of pyproject.toml. With any other version torchao's line is news, and shown.
EXPECTED = "torch version 2.13.0", "torchao version 0.15.0"


def is_news(record) -> bool:
    """A filter of torchao's logger: False for the line about the versions that are pinned."""
    text = str(record.msg)
    is_it = text.startswith("Skipping import of cpp extensions due to incompatible torch version")
    return not (is_it and all(version in text for version in EXPECTED))


def activate() -> None:
    """Hold back torchao's line, and prepare a ``tune run`` beside our own ``recipes``.

    For ``tune run`` puts the current folder first on ``sys.path``, and sets the launcher's defaults
    unless the user has. ``python -m torchtune._cli.tune`` puts the folder first by itself.
    """
    import logging  # torch has it by now; what only asks for this module's names need not

    logging.getLogger("torchao").addFilter(is_news)
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
