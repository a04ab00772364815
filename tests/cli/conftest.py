"""The two command lines in this process, each in an empty folder."""

import logging
import sys

import pytest
from click.testing import CliRunner
from torchtune import _recipe_registry as registry
from torchtune._cli import run as torchtunes_run
from torchtune._cli.subcommand import Subcommand
from torchtune._cli.tune import main as torchtunes_main

from wmtp_modules import tune_plugin
from wmtp_modules.cli.main import main
from wmtp_modules.cli.tune import activate
from wmtp_modules.run import storing

OF_A_PROJECT = {"here", "beside_0", "beside_1", "beside_2", "recipes"}


@pytest.fixture
def wmtp(tmp_path, monkeypatch):
    """wmtp(words..., code=0): what it prints, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WMTP_ENVIRONMENT", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(storing, "_places", {})  # of a process, which this one is not

    def wmtp(*words, code=0):
        done = CliRunner().invoke(main, [*map(str, words)])
        assert done.exit_code == code, done.output
        return done.output

    return wmtp


@pytest.fixture
def tune(tmp_path, monkeypatch, capsys):
    """tune(words...): what it prints, in an empty folder; afterwards torchtune is as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Subcommand, "create", Subcommand.__dict__["create"])
    monkeypatch.setattr(registry, "_ALL_RECIPES", [*registry._ALL_RECIPES])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for name in (*tune_plugin.LAUNCHER_DEFAULTS, tune_plugin.SPOKEN_FILE, "PYTHONPATH"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name in tune_plugin.LAUNCHER_LOGS:
        monkeypatch.setattr(logging.getLogger(name), "filters", [])

    def tune(*words):
        monkeypatch.setattr(sys, "argv", ["/some/bin/tune", *map(str, words)])
        activate()
        try:
            torchtunes_main()
        except SystemExit as ended:  # as a recipe ends
            if ended.code:
                raise
        return capsys.readouterr().out

    before = {*sys.modules}
    monkeypatch.delitem(sys.modules, "recipes", raising=False)
    yield tune
    for name in [one for one in sys.modules if one.partition(".")[0] in OF_A_PROJECT - before]:
        del sys.modules[name]


@pytest.fixture
def launched(monkeypatch):
    """What torchrun is given, instead of starting anything."""
    given = []
    monkeypatch.setattr(torchtunes_run, "run", given.append)
    return given
