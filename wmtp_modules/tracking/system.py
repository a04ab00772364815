"""How busy rank 0's machine is: processors, memory, disk, network and NVIDIA GPUs.

Sampled by MLflow's own monitors, in the process that follows a run. MLflow's thread would end for
good at the first call that fails.
"""

import time
from collections.abc import Callable
from typing import Any

SYSTEM = "system/"  # begin of a name
INTERVAL_S = 10.0  # MLflow's own default


class SystemMetrics:
    """Means over intervals, under MLflow's names: ``system/cpu_utilization_percentage``.

    MLflow's variables hold: MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL in seconds, and
    MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false for none.

    Args:
        say: takes a sentence for the user.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        from mlflow import environment_variables as variables

        self._say, self._monitors, self._interval_s = say, [], INTERVAL_S
        enable = variables.MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
        try:
            if enable.get() or not enable.is_set():
                self._monitors = _monitors()
            own_s = variables.MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get()
            self._interval_s = INTERVAL_S if own_s is None else own_s
        except ValueError as error:
            say(f"Warning: {error}")
        self._ends_at = time.monotonic() + self._interval_s

    def new(self) -> dict[str, float]:
        """Take a sample; the means of an interval that has ended with it, else nothing."""
        if not self._monitors:
            return {}
        means: dict[str, float] = {}
        try:
            for one in self._monitors:
                one.collect_metrics()
            if time.monotonic() < self._ends_at:
                return {}
            self._ends_at = time.monotonic() + self._interval_s
            for one in self._monitors:
                means |= {f"{SYSTEM}{name}": v for name, v in one.aggregate_metrics().items()}
                one.clear_metrics()
        except Exception as error:  # of the system's files, or of a GPU that is gone
            self._monitors = []
            self._say(f"Warning: how busy this machine is cannot be read any more: {error}")
        return means


def _monitors() -> list[Any]:
    """Those that work here: without an NVIDIA GPU its one is not made."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    kinds: tuple[Any, ...] = CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor
    found = []
    for kind in kinds:
        try:
            found.append(kind())
        except (ImportError, RuntimeError, AttributeError, OSError):  # no GPU, no network
            continue
    return found
