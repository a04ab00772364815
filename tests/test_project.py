"""What the repository promises beside its code: pins, lock, licence, commands, no addresses."""

import json
import re
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata

from wmtp_modules.catalog import files_of_clone

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def shipped_files() -> list[Path]:
    """Files that git tracks, or would with the next ``git add``."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git clone")
    listed = subprocess.check_output(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    )
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


# ------------------------------------------------------------------- pins and lock


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock() -> dict[str, tuple[str, list[str]]]:
    """Version and hashes by package; the lock's lines, continuations joined."""
    lines = (ROOT / "requirements.lock").read_text().replace("\\\n", " ").splitlines()
    packages = {}
    for line in lines:
        if not line or line.lstrip().startswith("#"):
            continue
        match = re.match(r"([A-Za-z0-9._-]+)==([^ ;]+)(?: ;[^#]*?)?((?:\s+--hash=\S+)*)\s*$", line)
        assert match, f"not a pinned requirement: {line[:100]}"
        name, version, hashes = match.groups()
        packages[normal(name)] = (version, re.findall(r"--hash=sha256:[0-9a-f]{64}\b", hashes))
    return packages


def pins() -> dict[str, str]:
    """What an image installs: dependencies, the reward extra and the build backend."""
    project = PYPROJECT["project"]
    listed = [
        *project["dependencies"],
        *project["optional-dependencies"]["reward"],
        *PYPROJECT["build-system"]["requires"],
    ]
    found = {}
    for requirement in listed:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^ ;*]+)", requirement)
        assert match, f"{requirement!r} is not pinned to one version"
        found[normal(match[1])] = match[2]
    return found


def test_lock_and_pyproject_agree():
    locked = {name: version for name, (version, _) in read_lock().items()}
    wrong = {
        name: (pin, locked.get(name)) for name, pin in pins().items() if locked.get(name) != pin
    }
    assert not wrong, "export requirements.lock again, as CONTRIBUTING.md says"


def test_lock_has_hashes_and_no_address():
    packages = read_lock()
    assert len(packages) > len(pins())
    assert [name for name, (_, hashes) in packages.items() if not hashes] == []
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    assert "--index" not in text
    assert "--find-links" not in text


def test_lock_has_the_command_that_contributing_names():
    head = (ROOT / "requirements.lock").read_text().splitlines()[1].lstrip("# ")
    assert head.startswith("uv export --no-dev")
    assert head in (ROOT / "CONTRIBUTING.md").read_text()


def test_development_pins_match_the_extra():
    """transformers is an extra and the tests' reference: one version."""
    dev, reward = (
        PYPROJECT["dependency-groups"]["dev"],
        PYPROJECT["project"]["optional-dependencies"],
    )
    assert set(reward["reward"]) <= set(dev)
    assert all("==" in requirement for requirement in dev)


# ------------------------------------------------------------------------- contents

INDEX_ADDRESS = re.compile(
    rb"pypi\.(?:org|python\.org)|pythonhosted\.|download\.pytorch\.|/simple/|--(?:extra-)?index-url"
    rb"|^\s*index-url|UV_(?:DEFAULT_)?INDEX|PIP_INDEX_URL",
    re.MULTILINE,
)
MACHINE_PATH = re.compile(rb"(?<![\w.$}])/(?:root|home|Users|work|mnt|data\d?)/[\w.-]+")


def test_no_index_address_and_no_path_of_one_machine():
    found = {}
    for path in shipped_files():
        if path == Path(__file__):
            continue
        text = path.read_bytes()
        hits = [m.group() for m in (*INDEX_ADDRESS.finditer(text), *MACHINE_PATH.finditer(text))]
        if hits:
            found[str(path.relative_to(ROOT))] = hits[:3]
    assert found == {}


@pytest.mark.parametrize(
    "line",
    [b"https://pypi.org/x", b"index-url = x", b"pip --extra-index-url x", b"cd /home/me/wmtp"],
)
def test_the_scan_sees(line):
    assert INDEX_ADDRESS.search(line) or MACHINE_PATH.search(line)


def test_uv_lock_is_not_shipped():
    names = {path.name for path in shipped_files()}
    assert "uv.lock" not in names
    assert {"requirements.lock", "pyproject.toml", "LICENSE", "README.md"} <= names


def test_licence_is_mit():
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("MIT License\n\nCopyright (c) 2026 The WMTP developers\n")
    assert 'THE SOFTWARE IS PROVIDED "AS IS"' in text
    assert PYPROJECT["project"]["license"] == "MIT"


def test_importing_the_package_imports_nothing():
    """torch's entry point imports it in every process that imports torch."""
    assert (ROOT / "wmtp_modules" / "__init__.py").read_text().strip() == ""


CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
CONFIGS = [path for path in CONFIGS if path.parent.name != "environments"]  # of no recipe


def test_there_are_configs():
    assert len(CONFIGS) > 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_config_is_headed_by_its_command(path):
    head = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        head.append(line)
    name = path.relative_to(ROOT).as_posix()
    pattern = rf"tune run (?:--\w+ \S+ )*(recipes/\w+\.py) --config {re.escape(name)}(?:\s|$)"
    match = re.search(pattern, "\n".join(head))
    assert match, f"{name} does not begin with a comment that holds its tune run command"
    assert (ROOT / match[1]).is_file()


def test_readme_test_command_is_the_one_of_ci():
    assert (
        (ROOT / ".ci" / "run").read_text().rstrip().splitlines()[-1].startswith("say uv run pytest")
    )
    assert "uv run pytest" in (ROOT / "README.md").read_text()


def test_every_download_pattern_has_its_flag():
    """``hf download --include A B`` takes A as the pattern and B as the one file to fetch."""
    for name in ("README.md", "docs/7b.md"):
        (command,) = re.findall(r"hf download facebook.*", (ROOT / name).read_text())
        assert re.findall(r'(\S+) "([^"]+)"', command) == [
            ("--include", "7B_1T_4/*"),
            ("--include", "tokenizer.model"),
        ]


def test_readme_commands_of_the_7b_model_are_those_of_the_configs():
    section = (ROOT / "README.md").read_text().split("## The 7B model")[1].split("\n## ")[0]
    for name in ("reference", "7b"):
        path = f"configs/rho1/{name}.yaml"
        (command,) = re.findall(rf"^uv run (tune run .* {path})$", section, re.MULTILINE)
        assert f"#   {command}\n" in (ROOT / path).read_text()
    assert len(re.findall(r"^(?:uv|vllm|cp) ", section, re.MULTILINE)) == 8


def test_what_is_large_stays_out_of_git_and_images():
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"/checkpoints/", "/data/", "/runs/", ".venv/"} <= set(ignored)
    left_out = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".venv/", "runs/", "checkpoints/", "/data/"} <= set(left_out)
    assert not {".git", ".git/"} & set(left_out)  # the commit that a run is stamped with


def test_commits_and_ci_are_checked_with_the_same_tools():
    ci = (ROOT / ".ci" / "run").read_text()
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    for tool in ("ruff check", "ruff format", "pyrefly check"):
        assert f"say uv run {tool}" in ci
        assert f"entry: uv run {tool}" in hooks


def test_the_workflow_runs_ci_on_every_python():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "- run: .ci/run\n" in workflow
    pythons = re.search(r"python: (\[.*\])", workflow)[1]
    low, high = re.fullmatch(
        r">=3\.(\d+),<3\.(\d+)", PYPROJECT["project"]["requires-python"]
    ).groups()
    assert json.loads(pythons) == [f"3.{minor}" for minor in range(int(low), int(high))]


def test_the_changelog_names_this_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert versions[1] == PYPROJECT["project"]["version"]


def test_types_are_part_of_the_package():
    assert (ROOT / "wmtp_modules" / "py.typed").read_text() == ""


def check_metadata(text: bytes) -> None:
    """Of a wheel: valid as the standard has it, and what somebody looks for who finds it."""
    told = Metadata.from_email(text, validate=True)
    assert (told.name, told.license_expression, told.license_files) == ("wmtp", "MIT", ["LICENSE"])
    assert told.description_content_type == "text/markdown"
    assert told.description == (ROOT / "README.md").read_text()
    assert len(told.summary) < 120
    assert told.author == "The WMTP developers"
    assert {"llm", "multi-token-prediction"} <= set(",".join(told.keywords).split(","))
    classifiers = told.classifiers  # which of them exist knows hatchling, at the build
    assert not [one for one in classifiers if one.startswith("License")]  # the expression says it
    minors = re.findall(r"Python :: 3\.(\d+)", "\n".join(classifiers))
    low, high = re.findall(r"3\.(\d+)", PYPROJECT["project"]["requires-python"])
    assert [*map(int, minors)] == [*range(int(low), int(high))]
    assert {"Documentation", "Changelog"} <= told.project_urls.keys()
    assert all((ROOT / document).is_file() for document in told.project_urls.values())


@pytest.mark.slow
def test_wheel_holds_the_library_only(tmp_path):
    """torchtune owns a top-level ``recipes``: a wheel of ours must not write into it."""
    done = subprocess.run(
        ["uv", "build", "--wheel", "--out-dir", tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode and "hatchling" in done.stderr and "network" in done.stderr.lower():
        pytest.skip("the build backend is not cached and there is no network")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"wmtp_modules", "wmtp-0.1.0.dist-info"}
    assert {"wmtp_modules/tune_plugin.py", "wmtp_modules/py.typed"} <= set(names)
    shipped = {f"wmtp_modules/shipped/{name}": p for name, p in files_of_clone(ROOT).items()}
    assert {name for name in names if "/shipped/" in name} == shipped.keys()
    assert "wmtp_modules/shipped/configs/critic_7b.yaml" in shipped
    for name, path in shipped.items():
        assert zipfile.ZipFile(wheel).read(name) == path.read_bytes()
    check_metadata(zipfile.ZipFile(wheel).read("wmtp-0.1.0.dist-info/METADATA"))
    assert "wmtp-0.1.0.dist-info/licenses/LICENSE" in names
    (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
    told = zipfile.ZipFile(wheel).read(entry_points).decode()
    assert "wmtp_tune = wmtp_modules.cli.tune:activate" in told
    assert "wmtp = wmtp_modules.cli.main:main" in told
