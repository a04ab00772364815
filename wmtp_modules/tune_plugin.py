"""Lets ``tune run recipes/x.py`` find the recipes of the current folder with one process too.

torchtune installs a top-level package ``recipes`` that refuses to be imported. ``tune run`` turns
``recipes/x.py`` into the module name ``recipes.x``; with torchrun options it starts
``python -m recipes.x``, which looks in the current folder first, but with one process it searches
the current folder last and meets torchtune's package. ``activate`` is a ``torch.backends`` entry
point, which torch calls at the end of ``import torch``: it gives the one-process run the search
order of the others. It runs in every process that imports torch, hence the standard library only.
"""

import os
import sys


def activate() -> None:
    """Put the current folder first on ``sys.path`` in a ``tune run`` beside our own ``recipes``.

    Does nothing in any other process. ``python -m torchtune._cli.tune`` needs no help: ``-m`` puts
    the current folder first by itself.
    """
    argv = getattr(sys, "argv", [])  # an interpreter inside another program may have none
    if argv[1:2] != ["run"] or os.path.basename(argv[0]) != "tune":
        return
    if os.path.isfile(os.path.join("recipes", "__init__.py")):
        sys.path.insert(0, os.getcwd())
