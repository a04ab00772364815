"""torchtune's ``tune`` with our recipes and configs, put in place in memory.

torchtune 0.6.1 knows the recipes of one list and has no entry point for others. ``activate`` is a
``torch.backends`` entry point, which torch calls at the end of ``import torch``, in every process:
anywhere but in ``tune`` it ends after a look at the command line. In ``tune`` torchtune is then
half imported, so only the class that makes subcommands is touched: once ``tune`` makes them, three
are made from the classes of ``commands.py``, and our recipes stand in torchtune's list.
"""

import sys

from wmtp_modules import tune_plugin


def activate() -> None:
    """Prepare a launcher (``tune_plugin``) and, in ``tune``, its subcommands."""
    # Some other program of that name has not imported torchtune by now.
    if not tune_plugin.activate() or "torchtune" not in sys.modules:
        return
    from torchtune._cli.subcommand import Subcommand

    def create(cls, *args, **kwargs):
        from wmtp_modules.cli.commands import COMMANDS, know_ours

        know_ours()
        return COMMANDS.get(cls, cls)(*args, **kwargs)

    Subcommand.create = classmethod(create)
