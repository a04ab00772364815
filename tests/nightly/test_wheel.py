"""A wheel built from the clone, in a new environment and another folder: what a user types there.

The folder has a space in its path, the user is an ordinary one (root becomes nobody for this; who
is not root is one already) who may not write to the environment, and no git is there.

pip installs all of it, some gigabytes. WMTP_TEST_SITE=FOLDER takes the dependencies from a folder
of installed packages (a ``site-packages``) instead, and proves all but pip's resolution.
"""

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHORT = ("max_steps=3", "num_warmup_steps=1", "run_val_every_n_steps=3", "save_every_n_steps=3")
ORDINARY = {}  # of subprocess.run
if os.geteuid() == 0:
    ORDINARY = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid, "extra_groups": []}

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def top():
    """A folder that others may enter; pytest's own is closed to them."""
    with tempfile.TemporaryDirectory(prefix="from a wheel ") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture(scope="module")
def python() -> str:
    """This interpreter, or the system's of its version where the user may not run it."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for one in (Path(sys.base_prefix, "bin", name), shutil.which(name, path=os.defpath)):
        if one and subprocess.run(["test", "-x", one], **ORDINARY).returncode == 0:
            return str(one)
    pytest.skip(f"there is no {name} that an ordinary user may run: install one in /usr/bin")


@pytest.fixture(scope="module")
def user(top, python):
    """user(folder, *command): its output, of a program of the new environment."""
    build = ["uv", "build", "--wheel", "--out-dir", top / "dist"]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (top / "dist").glob("*.whl")
    subprocess.run([python, "-m", "venv", top / "an env"], check=True)
    bin_folder = top / "an env" / "bin"
    pip = [bin_folder / "python", "-m", "pip", "install", "--quiet"]
    if site := os.environ.get("WMTP_TEST_SITE"):
        (new_site,) = (top / "an env").glob("lib/python*/site-packages")
        (new_site / "dependencies.pth").write_text(f"{site}\n")
        subprocess.run([*pip, "--no-deps", "--no-index", wheel], check=True)
        main = "import sys\nfrom torchtune._cli.tune import main\nsys.exit(main())\n"
        # A path with a space is no word of a "#!" line: pip writes such a head for /bin/sh.
        head = f"#!/bin/sh\n'''exec' \"{bin_folder}/python\" \"$0\" \"$@\"\n' '''\n"
        (bin_folder / "tune").write_text(head + main)
        (bin_folder / "tune").chmod(0o755)
    else:
        done = subprocess.run([*pip, wheel], capture_output=True, text=True)
        if done.returncode and "No matching distribution" in done.stderr:
            pytest.skip("pip reaches no index: WMTP_TEST_SITE=FOLDER proves the rest")
        assert done.returncode == 0, done.stderr[-2000:]
    for name in ("a home", "tmp"):
        own(top / name)

    def run(folder, *command, code=0):
        own(folder := top / folder)
        env = {"PATH": str(bin_folder), "HOME": str(top / "a home"), "TMPDIR": str(top / "tmp")}
        env["OMP_NUM_THREADS"] = "1"
        command = [str(bin_folder / command[0]), *map(str, command[1:])]
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, timeout=3000, **ORDINARY
        )
        assert done.returncode == code, done.stderr[-4000:]
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    run.top = top
    return run


def own(path: Path) -> None:
    """A folder of the user's, made if need be."""
    path.mkdir(exist_ok=True)
    if ORDINARY:
        shutil.chown(path, ORDINARY["user"], ORDINARY["group"])


def test_the_user_is_an_ordinary_one_and_has_no_git(user):
    told = (
        "import os, shutil, wmtp_modules\n"
        "print(os.geteuid() > 0, os.access(wmtp_modules.__path__[0], os.W_OK), shutil.which('git'))"
    )
    writes = str(not ORDINARY)  # to what it has installed itself
    assert user("names", "python", "-c", told).split() == ["True", writes, "None"]


def test_names_are_listed_copied_and_checked(user):
    listed = user("names", "tune", "ls")
    for name in ("rho1_wmtp_distributed", "eval_mtp", "wmtp/rho1_7b", "wmtp/quickstart_critic"):
        assert name in listed
    for name in ("rho1_wmtp_distributed", "wmtp/rho1_7b", "wmtp/critic_7b"):
        user("names", "tune", "cp", name, ".")
    copied = {path.name for path in (user.top / "names").iterdir()}
    assert copied == {"rho1_wmtp_distributed.py", "rho1_7b.yaml", "critic_7b.yaml"}
    assert "well-formed" in user("names", "tune", "validate", "rho1_7b.yaml")
    assert "well-formed" in user("names", "tune", "validate", "wmtp/critic_7b_verified")
    extra = "import importlib.util as u; print(u.find_spec('transformers') is not None)"
    if "True" in user("names", "python", "-c", extra):
        assert "well-formed" in user("names", "tune", "validate", "critic_7b.yaml")
    else:  # its reward model takes the extra, which a plain install has not
        told = user("names", "tune", "validate", "critic_7b.yaml", code=2)
        assert "pip install wmtp[reward]" in told
    bad = user.top / "names" / "bad.yaml"
    bad.write_text((user.top / "names" / "rho1_7b.yaml").read_text() + "sede: 1\n")
    assert "did you mean 'seed'?" in user("names", "tune", "validate", "bad.yaml", code=2)
    assert "did you mean 'seed'?" in user("names", "wmtp", "check", "bad.yaml", code=1)


def test_a_new_project_runs(user):
    user("a folder", "wmtp", "new", "my project")
    project = Path("a folder", "my project")
    assert len((user.top / project / "README.md").read_text().splitlines()) == 5
    user(project, "wmtp", "check", "config.yaml")
    user(project, "tune", "run", "recipe.py", "--config", "config.yaml")
    assert (user.top / project / "runs" / "first" / "summary.json").is_file()
    # The same recipe by other ways, with one process and with two.
    folder = user.top / project
    (folder / "recipes").mkdir()
    (folder / "recipes" / "mine.py").write_bytes((folder / "recipe.py").read_bytes())
    for n, recipe in enumerate(("recipe.py", "recipes/mine.py", folder / "recipe.py")):
        for ranks in ([], ["--nproc_per_node", "2"]):
            out = f"output_dir=runs/{n}_{len(ranks)}"
            user(project, "tune", "run", *ranks, recipe, "--config", "config.yaml", *SHORT, out)
            said = (folder / out.partition("=")[2] / "config.yaml").read_text().splitlines()[0]
            name = "recipe.py" if n == 2 else recipe
            assert said == f"# tune run --nproc_per_node {ranks[1] if ranks else 1} {name}"


SHORTER = {
    "rho1": [*SHORT, "controls=null"],
    "critic": [*SHORT, "controls=null", "critic.max_steps=20", "critic.eval_every_n_steps=10"],
    "eval": ["generation.samples_per_task=2", "k=[1]", "decode_speed.prompts=2"],
}
SHORTER["critic"] += ["allow_uninformative_critic=true"]


@pytest.mark.parametrize("recipe", SHORTER)
def test_quickstarts_by_name(user, recipe):
    """Shortened where this says nothing about them: tests/nightly/test_quickstarts.py does."""
    folder, name = f"{recipe} runs", {"eval": "eval_mtp"}.get(recipe, f"{recipe}_wmtp_distributed")
    config = f"wmtp/quickstart_{recipe}"
    command = ["tune", "run", "--nproc_per_node", "2", name, "--config", config]
    user(folder, *command, *SHORTER[recipe])
    out = user.top / folder / "runs" / "quickstart" / recipe
    made = out / ("report.json" if recipe == "eval" else "summary.json")
    assert json.loads(made.read_text())
    if recipe != "eval":
        said = (out / "config.yaml").read_text()
        assert said.startswith(f"# tune run --nproc_per_node 2 {name}\n")
