"""`tune run` of our recipes, past torchtune's package of that name; what its launcher is told."""

import logging
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import config_from_args, get_args_parser

from wmtp_modules import tune_plugin
from wmtp_modules.cli.tune import activate

TUNE = Path(sys.executable).with_name("tune")
RECIPE = """
import os, sys
from torchtune import config

@config.parse
def main(cfg):
    with open(f"ran_{os.environ.get('RANK', 'alone')}", "w") as file:
        file.write(f"{cfg.x} {__file__} {sys.argv[0]}")

if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture
def user_folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "__init__.py").touch()
    (tmp_path / "recipes" / "toy.py").write_text(RECIPE)
    (tmp_path / "toy.yaml").write_text("x: 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["elsewhere"])
    for name in (*tune_plugin.LAUNCHER_DEFAULTS, tune_plugin.SPOKEN_FILE):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "excepthook", lambda *_: print("a traceback"))
    for name in tune_plugin.LAUNCHER_LOGS:
        monkeypatch.setattr(logging.getLogger(name), "filters", [])
    return tmp_path


def launcher_settings() -> dict[str, str]:
    return {name: os.environ[name] for name in tune_plugin.LAUNCHER_DEFAULTS if name in os.environ}


def test_tune_run_gets_the_current_folder_first(user_folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/bin/tune", "run", "recipes/toy.py"])
    tune_plugin.activate()
    assert sys.path == [str(user_folder), "elsewhere"]
    assert launcher_settings() == tune_plugin.LAUNCHER_DEFAULTS


def test_the_module_of_tune_gets_the_launchers_settings(user_folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["-m", "run", "recipes/toy.py"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "torchtune._cli.tune", "run"])
    tune_plugin.activate()
    assert sys.path == ["elsewhere"]
    assert launcher_settings() == tune_plugin.LAUNCHER_DEFAULTS


def test_what_the_user_set_stays(user_folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tune", "run", "recipes/toy.py"])
    for name in tune_plugin.LAUNCHER_DEFAULTS:
        monkeypatch.setenv(name, "7")
    tune_plugin.activate()
    assert set(launcher_settings().values()) == {"7"}


def test_torchrun_reads_the_launchers_settings(user_folder, monkeypatch):
    """Under these names, and its own options come first."""
    monkeypatch.setattr(sys, "argv", ["tune", "run", "recipes/toy.py"])
    tune_plugin.activate()
    for options, signals, seconds in (
        ([], "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", 300),
        (["--signals-to-handle", "SIGTERM", "--shutdown-timeout", "5"], "SIGTERM", 5),
    ):
        config, _, _ = config_from_args(get_args_parser().parse_args([*options, "script.py"]))
        assert config.signals_to_handle == signals
        assert config.shutdown_timeout == seconds


@pytest.mark.parametrize(
    "argv",
    [
        ["/some/bin/tune", "ls"],
        ["/some/bin/tune"],
        ["/some/bin/pytest", "run"],
        ["-m", "run"],
        ["-c"],
        [""],
        [],
    ],
)
def test_other_processes_are_left_alone(user_folder, monkeypatch, argv):
    monkeypatch.setattr(sys, "argv", argv)
    hook = sys.excepthook
    tune_plugin.activate()
    assert sys.path == ["elsewhere"]
    assert launcher_settings() == {}
    assert sys.excepthook is hook
    assert tune_plugin.SPOKEN_FILE not in os.environ


def test_embedded_interpreter_without_argv(user_folder, monkeypatch):
    monkeypatch.delattr(sys, "argv")
    tune_plugin.activate()
    assert sys.path == ["elsewhere"]


@pytest.mark.parametrize("recipe", ["x.py", "/far/x.py", "recipes/toy", "rho1_wmtp_distributed"])
def test_folder_without_a_package_recipes(user_folder, monkeypatch, recipe):
    """A recipe that is not torchtune's has the launcher's settings; the search order stays."""
    (user_folder / "recipes" / "__init__.py").unlink()
    monkeypatch.setattr(sys, "argv", ["tune", "run", "full_finetune_distributed", "--config", "x"])
    assert tune_plugin.activate() is True
    assert launcher_settings() == {}
    monkeypatch.setattr(sys, "argv", ["tune", "run", "--nproc_per_node", "2", recipe])
    assert tune_plugin.activate() is True
    assert sys.path == ["elsewhere"]
    assert launcher_settings() == tune_plugin.LAUNCHER_DEFAULTS


def test_deleted_current_folder(user_folder, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr(sys, "argv", ["tune", "run", "recipes/toy.py"])
    tune_plugin.activate()


@pytest.mark.parametrize("argv", [["/bin/tune", "run", "recipes/toy.py"], ["/bin/torchrun"]])
def test_a_launcher_is_silent_about_workers_that_spoke(user_folder, monkeypatch, capsys, argv):
    monkeypatch.setattr(sys, "argv", argv)
    tune_plugin.activate()
    file = Path(os.environ[tune_plugin.SPOKEN_FILE])
    about_workers = ChildFailedError.__new__(ChildFailedError)
    log = logging.getLogger("torch.distributed.elastic.multiprocessing.api")

    def said() -> str:
        for error in (about_workers, SignalException("signal", signal.SIGINT), OSError("own")):
            sys.excepthook(type(error), error, None)
        is_logged = log.filter(logging.makeLogRecord({"msg": "failed (exitcode: 1)"}))
        return capsys.readouterr().out + ("a line" if is_logged else "")

    assert said() == "a traceback\n" * 3 + "a line"  # a crash, of which no worker said anything
    tune_plugin.note_spoken()
    assert said() == "a traceback\n"  # of the launcher's own error
    file.unlink()


@pytest.mark.parametrize(("exitcode", "shown"), [(-9, True), (-11, True), (-15, False), (1, False)])
def test_a_launcher_says_which_worker_was_killed(user_folder, monkeypatch, exitcode, shown, capsys):
    """The others lost it and say so, but the kernel's reason is known to the launcher only."""
    monkeypatch.setattr(sys, "argv", ["/bin/tune", "run", "recipes/toy.py"])
    tune_plugin.activate()
    tune_plugin.note_spoken()
    error = ChildFailedError.__new__(ChildFailedError)
    ends = {0: (2.0, 1), 1: (1.0, exitcode)}
    error.failures = {
        rank: SimpleNamespace(timestamp=when, exitcode=code) for rank, (when, code) in ends.items()
    }
    sys.excepthook(type(error), error, None)
    assert capsys.readouterr().out == "a traceback\n" * shown
    Path(os.environ[tune_plugin.SPOKEN_FILE]).unlink()


def test_one_worker_of_a_launcher_speaks(user_folder, monkeypatch):
    (user_folder / "said").touch()
    monkeypatch.setenv(tune_plugin.SPOKEN_FILE, str(user_folder / "said"))
    assert [tune_plugin.first_to_speak() for _ in range(3)] == [True, False, False]


def test_a_launcher_of_several_hosts_drops_what_its_store_says(user_folder, monkeypatch, capfd):
    """C++ writes it past Python; what the launcher itself fails with is shown."""
    monkeypatch.setattr(sys, "argv", ["/bin/tune", "run", "--nnodes", "2", "recipes/toy.py"])
    monkeypatch.setattr(sys, "excepthook", lambda *_: os.write(2, b"a traceback"))
    stderr = os.dup(2)
    try:
        tune_plugin.activate()
        tune_plugin.note_spoken()
        log = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
        for text in (b"before ", b"frames of C++ "):
            os.write(2, text)
            log.filter(logging.makeLogRecord({"msg": "failed (exitcode: 1)"}))
        sys.excepthook(OSError, OSError("own"), None)
    finally:
        os.dup2(stderr, 2)
    assert capfd.readouterr().err == "before a traceback"
    Path(os.environ[tune_plugin.SPOKEN_FILE]).unlink()


def test_a_launcher_whose_workers_have_ended_does_not_wait_for_ever(user_folder):
    """In a process of its own: it waits as for a store that is cut off, its worker has spoken."""
    code = (
        "import subprocess, sys, time; from wmtp_modules import tune_plugin as t; "
        "t.LAUNCHER_LEAVES_S = 1; sys.argv = ['torchrun', '--nnodes=2', 'x.py']; t.activate(); "
        "ended = subprocess.Popen(['true']); living = subprocess.Popen(['sleep', '3']); "
        "t.note_spoken(); print(t.os.environ[t.SPOKEN_FILE], flush=True); time.sleep(1000)"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    assert time.monotonic() - started > 3  # not before its last worker
    assert not Path(done.stdout.strip()).exists()


def test_a_worker_whose_word_cannot_be_noted(user_folder, monkeypatch):
    tune_plugin.note_spoken()  # no launcher
    monkeypatch.setenv(tune_plugin.SPOKEN_FILE, str(user_folder / "none" / "file"))
    tune_plugin.note_spoken()
    assert not (user_folder / "none").exists()


def test_torch_calls_it():
    (point,) = [p for p in entry_points(group="torch.backends") if p.name == "wmtp_tune"]
    assert point.load() is activate


def test_loading_it_imports_nothing_more():
    """It runs in every process that imports torch: wmtp_modules itself has to stay empty."""
    code = (
        "import os, sys; before = set(sys.modules); import wmtp_modules.cli.tune; "
        "print(sorted(set(sys.modules) - before))"
    )
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    modules = ("wmtp_modules", *(f"wmtp_modules.{name}" for name in ("cli", "cli.tune")))
    assert output.strip() == str([*modules, "wmtp_modules.tune_plugin"])


def torchao_says(text: str) -> list[str]:
    shown = []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())
    logger = logging.getLogger("torchao")
    logger.addHandler(handler)
    try:
        logger.warning(text)
    finally:
        logger.removeHandler(handler)
    return shown


EXTENSIONS = (
    "Skipping import of cpp extensions due to incompatible torch version {} for torchao version {} "
    "            Please see https://github.com/pytorch/ao/issues/2919 for more info"
)


@pytest.mark.parametrize(
    ("text", "is_shown"),
    [
        (EXTENSIONS.format("2.13.0+cu130", "0.15.0"), False),
        (EXTENSIONS.format("2.13.0+cpu", "0.15.0"), False),
        (EXTENSIONS.format("2.14.0", "0.15.0"), True),
        (EXTENSIONS.format("2.13.0", "0.16.0"), True),
        ("Skipping import of cpp extensions due to TORCHAO_FORCE_SKIP_LOADING_SO_FILES=1", True),
    ],
)
def test_torchaos_line_about_the_pinned_versions_is_held_back(text, is_shown):
    assert torchao_says(text) == ([text] if is_shown else [])


def test_the_versions_are_those_pinned_and_the_words_torchaos():
    pyproject = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    pins = dict(p.split("==") for p in pyproject["project"]["dependencies"])
    assert (
        tuple(f"{name} version {pins[name]}" for name in ("torch", "torchao"))
        == tune_plugin.EXPECTED
    )
    (line,) = re.findall(
        r'f"(Skipping import.*?)\{torch', Path(find_spec("torchao").origin).read_text()
    )
    assert EXTENSIONS.startswith(line)


def test_a_process_that_imports_torchao_says_nothing():
    code = "import torchao"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "ranks"),
    [
        ([TUNE, "run"], ["alone"]),  # of a folder that is no package; tests/cli/test_tune.py
        # Two ranks of our own recipe are in tests/recipes/test_tune_run.py.
        pytest.param([TUNE, "run", "--nproc_per_node", "2"], ["0", "1"], marks=pytest.mark.nightly),
        # What the plugin sees of this command is tested above, in this process.
        pytest.param(
            [sys.executable, "-m", "torchtune._cli.tune", "run"],
            ["alone"],
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_tune_run_finds_our_recipe(user_folder, command, ranks):
    if command[0] is TUNE:
        (user_folder / "recipes" / "__init__.py").unlink()
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "PYTHONPATH")}
    done = subprocess.run(
        [*command, "recipes/toy.py", "--config", "toy.yaml", "x=7"],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    recipe = user_folder / "recipes" / "toy.py"
    for rank in ranks:
        assert (user_folder / f"ran_{rank}").read_text().startswith(f"7 {recipe} ")
