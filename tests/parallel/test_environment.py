import pytest

from wmtp_modules.parallel.process_group import check_environment
from wmtp_modules.run import start
from wmtp_modules.run.start import exit_with_message

GOOD = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    def put(**changes):
        for name, value in (GOOD | changes).items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return put


def test_what_torchrun_sets_passes(environment):
    environment()
    check_environment()
    environment(LOCAL_RANK=None)
    check_environment()
    environment(RANK=None, WORLD_SIZE="banana")
    check_environment()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "x"}, "variable RANK is 'x', not a whole number: start with tune run"),
        ({"RANK": "-1"}, "variable RANK is '-1', not a whole number"),
        ({"WORLD_SIZE": None}, "variable WORLD_SIZE is '', not a whole number"),
        ({"LOCAL_RANK": "1.0"}, "variable LOCAL_RANK is '1.0', not a whole number"),
        ({"RANK": "2"}, "RANK is 2, which is not below WORLD_SIZE 2: ranks count from 0"),
        (
            {"MASTER_PORT": "70000"},
            "MASTER_PORT is 70000, not a port: take a free one from 1 to 65535",
        ),
    ],
)
def test_what_is_mistyped_is_named(environment, monkeypatch, changes, message):
    monkeypatch.setattr(start, "PATIENCE", 0)
    environment(**changes)
    with pytest.raises(ValueError, match=message):
        check_environment()
    with pytest.raises(SystemExit, match=message), exit_with_message(ValueError):
        check_environment()
