"""Two hosts of two ranks each: they start, one is lost, the other ends clearly, and resumes alone.

Each host is a network namespace with a name and an address of its own, joined by a virtual cable,
where the kernel lets us make them (root on Linux); else two launchers on this machine, which cannot
lose a cable. The first line that a test prints says which. All share one file system.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest
from omegaconf import OmegaConf

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).parents[2]
TUNE = str(Path(sys.executable).with_name("tune"))
TIMEOUT_S = 20  # collective_timeout_s
GIVES_UP_S = TIMEOUT_S + 60 + 30  # a collective's own time-out, and leaving on a busy machine
STEPS, SAVED = 60, 2


class Hosts:
    """Two of them, a and b; a has rank 0 and the rendezvous."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._port = folder, 29400 + os.getpid() % 500
        self._started: list[subprocess.Popen] = []
        self._names = {host: f"wmtp{os.getpid() % 10**6}{host}" for host in "ab"}
        self.has_cable = shutil.which("ip") is not None and self._lay_cable()
        what = "network namespaces" if self.has_cable else "two launchers without namespaces"
        print(f"Two hosts: {what}", flush=True)

    def _lay_cable(self) -> bool:
        a, b = self._names["a"], self._names["b"]
        lines = [f"netns add {a}", f"netns add {b}"]
        lines += [f"link add {a[-8:]} type veth peer name {b[-8:]}"]
        for n, name in enumerate((a, b), 1):
            inside = f"-n {name}"
            lines += [f"link set {name[-8:]} netns {name}", f"{inside} link set lo up"]
            lines += [f"{inside} addr add 10.77.0.{n}/24 dev {name[-8:]}"]
            lines += [f"{inside} link set {name[-8:]} up"]
        for line in lines:
            if subprocess.run(["ip", *line.split()], capture_output=True).returncode:
                self.close()
                return False
        for name in (a, b):  # what `ip netns exec` mounts over /etc/hosts
            file = Path("/etc/netns") / name / "hosts"
            file.parent.mkdir(parents=True)
            file.write_text("127.0.0.1 localhost\n10.77.0.1 host-a\n10.77.0.2 host-b\n")
        return True

    def start(self, host: str, log: str, *overrides: str, nodes: int = 2) -> subprocess.Popen:
        """A launcher with two ranks; its output goes to the file ``log``."""
        at = "host-a" if self.has_cable else "localhost"
        command = [TUNE, "run", "--nnodes", str(nodes), "--nproc_per_node", "2"]
        command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{at}:{self._port}"]
        command += ["--rdzv_id", "two-hosts", "rho1_wmtp_distributed"]
        command += ["--config", str(self.folder / "config.yaml"), *overrides]
        if self.has_cable:
            name = f'hostname host-{host} && exec "$@"'
            inside = ["ip", "netns", "exec", self._names[host], "unshare", "--uts"]
            command = [*inside, "sh", "-c", name, "sh", *command]
        with (self.folder / log).open("a") as file:
            started = subprocess.Popen(
                command,
                cwd=self.folder,
                env=os.environ
                | {"OMP_NUM_THREADS": "1", "WMTP_HOST_OF_TEST": host + str(self.folder)},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self._started.append(started)
        return started

    def kill(self, host: str) -> None:
        """Its power goes: every process at once."""
        mark = f"WMTP_HOST_OF_TEST={host}{self.folder}\0".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if mark in (entry / "environ").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)

    def pull_cable(self) -> None:
        name = self._names["b"]
        subprocess.run(["ip", "-n", name, "link", "set", name[-8:], "down"], check=True)

    def plug_in(self) -> None:
        name = self._names["b"]
        subprocess.run(["ip", "-n", name, "link", "set", name[-8:], "up"], check=True)

    def said(self, log: str) -> str:
        return (self.folder / log).read_text()

    def close(self) -> None:
        for host in "ab":
            self.kill(host)
        for started in self._started:
            started.wait(60)
        for name in self._names.values() if shutil.which("ip") else ():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory, tiny_tokenizer_path):
    tmp_path = tmp_path_factory.mktemp("two_hosts")
    text = Path(textwrap.__file__).read_text()
    for name, part in {"train": text[:10000], "val": text[10000:12000]}.items():
        rows = [{"text": part[i : i + 40]} for i in range(0, len(part), 40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = OmegaConf.load(ROOT / "configs" / "quickstart" / "base.yaml")
    for key in ("assets_dir", "prepare", "controls", "requires", "tracking", "metric_logger"):
        cfg.pop(key, None)
    rows_of = {"_component_": "wmtp_modules.data.rows_dataset"}
    cfg.update(
        {
            "output_dir": str(tmp_path / "run"),
            "model": {
                "_component_": "wmtp_modules.models.mtp_llama2",
                "vocab_size": 512,
                "num_layers": 6,
                "n_future_tokens": 4,
                "num_heads": 4,
                "num_kv_heads": 2,
                "embed_dim": 32,
                "max_seq_len": 64,
                "intermediate_dim": 64,
            },
            "tokenizer": {
                "_component_": "torchtune.models.llama2.llama2_tokenizer",
                "path": str(tiny_tokenizer_path),
                "max_seq_len": 64,
            },
            "dataset": rows_of | {"source": str(tmp_path / "train.jsonl")},
            "dataset_val": rows_of | {"source": str(tmp_path / "val.jsonl")},
            "weighting": {"name": "top_loss"},  # depends on the joint micro-batch
            "batch_size": 1,
            "gradient_accumulation_steps": 2,
            "data_parallel_shard": 2,
            "num_warmup_steps": 2,
            "max_steps": STEPS,
            "run_val_every_n_steps": STEPS,
            "save_every_n_steps": SAVED,
            "keep_last": 99,
            "log_every_n_steps": 1,
            "collective_timeout_s": TIMEOUT_S,
            "resume_from_checkpoint": True,
        }
    )
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    hosts = Hosts(tmp_path)
    yield hosts
    hosts.close()


def losses(folder: Path) -> dict[int, float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def wait_for(condition, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def begun(hosts: Hosts, run: str) -> dict[str, subprocess.Popen]:
    """Both hosts, once they train and have a state."""
    tunes = {h: hosts.start(h, f"{run}_{h}", f"output_dir={hosts.folder / run}") for h in "ab"}

    def trains() -> bool:
        codes = [tune.poll() for tune in tunes.values()]
        assert codes == [None, None], hosts.said(f"{run}_a") + hosts.said(f"{run}_b")
        return (hosts.folder / run / "training_state" / f"step_{SAVED:06d}").exists()

    wait_for(trains)
    return tunes


def check_clear_end(hosts: Hosts, run: str, host: str, said: str) -> None:
    """One sentence of a host, which is the last line on its screen."""
    lines = [line for line in hosts.said(f"{run}_{host}").splitlines() if line]
    assert lines[-1].endswith("resume_from_checkpoint=true continues from what was saved"), lines
    assert re.match(said, lines[-1]), lines[-1]
    assert sum("continues from what was saved" in line for line in lines) == 1
    assert not any("Traceback" in line or "frame #" in line for line in lines), lines
    print(f"{run}: {lines[-1]}", flush=True)


@pytest.fixture(scope="module")
def uninterrupted(hosts) -> dict[int, float]:
    """Losses by step of a run on both hosts that nothing happened to."""
    tunes = [
        hosts.start(host, f"whole_{host}", f"output_dir={hosts.folder}/whole") for host in "ab"
    ]
    codes = [tune.wait(600) for tune in tunes]
    assert codes == [0, 0], hosts.said("whole_a") + hosts.said("whole_b")
    found = losses(hosts.folder / "whole")
    assert [*found] == [*range(1, STEPS + 1)]
    return found


def test_a_host_is_lost_and_the_other_goes_on_alone(hosts, uninterrupted):
    tunes = begun(hosts, "killed")
    hosts.kill("b")
    started = time.monotonic()
    assert tunes["a"].wait(GIVES_UP_S) == 1
    print(f"Host a ended {time.monotonic() - started:.0f} s after b was lost", flush=True)
    check_clear_end(hosts, "killed", "a", r"Rank [01] \(process \d+ on .*\) lost another rank, or")
    folder = hosts.folder / "killed"
    assert len(losses(folder)) < STEPS
    assert json.loads((folder / "exit.json").read_text())["reason"] in ("lost", "hung")
    # As many packs in a joint micro-batch: 2 ranks x 2, before 4 x 1.
    changes = (f"output_dir={folder}", "batch_size=2", "data_parallel_shard=null")
    alone = hosts.start("a", "alone", *changes, nodes=1)
    assert alone.wait(600) == 0, hosts.said("alone")
    assert "It was saved by 4 ranks and continues with 2" in hosts.said("alone")
    found = losses(folder)
    worst = max(abs(found[step] / loss - 1) for step, loss in uninterrupted.items())
    print(f"Largest difference of a loss to the uninterrupted run: {worst:.1e}", flush=True)
    assert worst < 1e-6
    assert [*found] == [*uninterrupted]


def test_a_cable_is_pulled_and_both_come_back(hosts, uninterrupted):
    if not hosts.has_cable:
        pytest.skip("two launchers on one machine have no cable between them")
    tunes, started = begun(hosts, "pulled"), time.monotonic()
    hosts.pull_cable()
    for host, tune in tunes.items():
        assert tune.wait(GIVES_UP_S) == 1
        print(f"Host {host} ended after {time.monotonic() - started:.0f} s", flush=True)
    check_clear_end(
        hosts, "pulled", "a", r"Rank 2 \(process \d+ on host-b\) hangs: nothing was heard"
    )
    check_clear_end(
        hosts, "pulled", "b", r"Rank [23] \(process \d+ on host-b\) hears nothing of the"
    )
    hosts.plug_in()
    changes = (f"output_dir={hosts.folder}/pulled",)
    again = [hosts.start(host, f"again_{host}", *changes) for host in "ab"]
    assert [tune.wait(600) for tune in again] == [0, 0], hosts.said("again_a")
    assert losses(hosts.folder / "pulled") == uninterrupted
