"""How busy the machine is, beside a run's figures."""

import math

import pytest

from wmtp_modules.tracking.system import SystemMetrics

INTERVAL, ENABLE = "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"


@pytest.fixture
def machine(monkeypatch):
    """machine(**variables): MLflow's variables, by default every sample an interval of its own."""

    def made(**variables):
        monkeypatch.delenv(ENABLE, raising=False)
        for name, value in ({INTERVAL: "0"} | variables).items():
            monkeypatch.setenv(name, value)
        return SystemMetrics(said.append), said

    said = []
    return made


def test_processors_memory_and_disk_under_mlflow_s_names(machine):
    one, said = machine()
    one.new()  # processors are compared with the sample before
    found = one.new()
    assert {
        "system/cpu_utilization_percentage",
        "system/system_memory_usage_megabytes",
        "system/disk_available_megabytes",
    } <= set(found)
    assert all(math.isfinite(value) for value in found.values())
    assert 0 < found["system/system_memory_usage_percentage"] < 100
    assert said == []


def test_nothing_before_an_interval_has_ended(machine):
    one, _ = machine(**{INTERVAL: "3600"})
    assert one.new() == {}


@pytest.mark.parametrize("value", ["false", "0"])
def test_mlflow_s_variable_switches_it_off(machine, value):
    one, said = machine(**{ENABLE: value})
    assert one.new() == {}
    assert said == []


def test_a_variable_that_says_nothing_is_a_warning(machine):
    one, (told,) = machine(**{INTERVAL: "often"})
    assert INTERVAL in told
    assert one.new() == {}  # of an interval of ten seconds


def test_a_monitor_that_fails_is_a_warning_once(machine):
    class Gone:
        def collect_metrics(self):
            raise RuntimeError("GPU is lost")

    one, said = machine()
    one._monitors.append(Gone())
    assert one.new() == one.new() == {}
    assert len(said) == 1
    assert "GPU is lost" in said[0]
