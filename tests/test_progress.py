"""Progress bars: drawn on a terminal, whole lines in a log."""

import io
import re
import time
from contextlib import redirect_stderr
from pathlib import Path

import datasets
import huggingface_hub.utils as hub
import pytest

from wmtp_modules import progress
from wmtp_modules.progress import progress_bar, quiet_datasets


@pytest.fixture
def log(tmp_path):
    """A file to be standard error, by ``redirect_stderr``: pytest sets its own before each test."""
    with (tmp_path / "log.txt").open("w+") as file:
        yield file


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def read(file) -> str:
    file.flush()
    with open(file.name, newline="") as again:
        return again.read()


def test_a_log_gets_lines_at_intervals_and_at_the_end(log, monkeypatch):
    monkeypatch.setattr(progress, "LOG_S", 0.2)
    with redirect_stderr(log), progress_bar(desc="steps", total=50, unit="step") as bar:
        for step in range(50):
            time.sleep(0.02)
            bar.set_postfix_str(f"loss {step}", refresh=False)
            bar.update()
    text = read(log)
    assert "\r" not in text
    assert text.endswith("\n")
    lines = text.splitlines()
    assert lines[0].startswith("steps: 0/50 step [00:00<")
    assert lines[-1].startswith("steps: 50/50 step [00:01<00:00")
    assert lines[-1].endswith("loss 49]")
    assert 4 <= len(lines) <= 7
    assert len(set(lines)) == len(lines)


def test_two_bars_and_no_total_leave_whole_lines_too(log):
    with redirect_stderr(log):
        outer, inner = progress_bar(desc="outer", total=1), progress_bar(desc="inner", unit="row")
        inner.update(3)
        inner.close()
        outer.close()
        assert list(progress_bar(range(3), desc="through")) == [0, 1, 2]
    text = read(log)
    assert "\r" not in text
    assert "\x1b" not in text
    assert [line.partition(" [")[0] for line in text.splitlines()] == [
        "outer: 0/1 it",
        "inner: 0/? row",
        "inner: 3/? row",  # and nothing new of the outer one
        "through: 0/3 it",
        "through: 3/3 it",
    ]


def test_a_silent_rank_says_nothing(log):
    with redirect_stderr(log), progress_bar(desc="steps", total=3, shown=False) as bar:
        bar.update(3)
    assert read(log) == ""


def test_a_terminal_gets_a_bar():
    with redirect_stderr(Terminal()) as terminal, progress_bar(desc="steps", total=3) as bar:
        bar.update(3)
    assert "\rsteps: 100%|" in terminal.getvalue()


@pytest.fixture
def bars_of_datasets():
    datasets.enable_progress_bars()
    hub.enable_progress_bars()
    yield
    datasets.enable_progress_bars()
    hub.enable_progress_bars()


def test_datasets_draws_nothing_into_a_log(log, tmp_path, bars_of_datasets):
    def make(word: str) -> None:
        datasets.Dataset.from_generator(
            lambda: iter([{"a": word}]), cache_dir=str(tmp_path / word), fingerprint=word
        ).map(lambda row: row)

    with redirect_stderr(log):
        make("before")
        assert "\r" in read(log)  # it would
        drawn = len(read(log))
        quiet_datasets()
        make("after")
    assert read(log)[drawn:] == ""
    assert hub.are_progress_bars_disabled()


def test_datasets_draws_on_a_terminal(bars_of_datasets):
    with redirect_stderr(Terminal()):
        quiet_datasets()
    assert not datasets.are_progress_bars_disabled()


def test_every_reader_of_datasets_asks_for_quiet():
    """Whatever loads or makes a data set would draw its bars into a log."""
    for path in Path(progress.__file__).parent.rglob("*.py"):
        text = path.read_text()
        drawing = re.findall(r"^[^`\n]*(?:datasets\.load_dataset|\)\.map)\(", text, re.M)
        assert text.count("    quiet_datasets()\n") == len(drawing), path
