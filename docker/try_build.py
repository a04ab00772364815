"""Runs the steps of docker/Dockerfile without a container engine, as far as that goes.

    sudo python3 docker/try_build.py

makes a root file system from Debian's packages (debootstrap), runs the Dockerfile's own steps in
it, and ends with its CMD as the image's user, cut to five training steps. Nothing but the standard
library is imported, and no step is written down here a second time: they are read from the file.

What differs from ``docker build``: the base is Debian bookworm with its own Python 3.11 for
``python:3.11-slim-bookworm``, uv is this machine's, cached wheels are this machine's, certificates
are this machine's, and the steps share its kernel and network. No GPU is looked at.

Exit codes: 0 all ran, 1 a step failed, 77 it cannot be tried here (one sentence says why).
"""

import argparse
import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
CANNOT_TRY = 77
# What python:3.11-slim has that matters here: the interpreter, and the headers for torch.compile.
STAND_IN_PACKAGES = "ca-certificates,python3,python3-dev,python3-venv"
# Of the CMD: five steps of the plain model, without the runs that it requires and its controls.
SHORT = [
    *("max_steps=5", "requires=null", "controls=null", "checkpointer=null"),
    *("weighting.name=uniform", "reference=null"),
]
# This machine's certificates, proxies and uv's settings: which registry it asks, and how.
PASSED_ON = re.compile(r"(?i)SSL_CERT_.*|UV_.*|https?_proxy|no_proxy")
IGNORED = {"LABEL", "STOPSIGNAL", "EXPOSE", "HEALTHCHECK", "VOLUME"}


def read_steps(text: str) -> list[tuple[str, str]]:
    """(instruction, what follows) of each step; comments dropped, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    found = []
    for line in filter(str.strip, joined.splitlines()):
        instruction, _, rest = line.strip().partition(" ")
        found.append((instruction.upper(), " ".join(rest.split())))
    return found


def flags_of(rest: str) -> tuple[dict[str, list[str]], str]:
    """Leading ``--name=value`` of an instruction, and what follows them."""
    flags: dict[str, list[str]] = {}
    while match := re.match(r"--([\w-]+)=(\S+)\s+", rest):
        flags.setdefault(match[1], []).append(match[2])
        rest = rest[match.end() :]
    return flags, rest


def substitute(text: str, variables: dict[str, str]) -> str:
    """``$NAME`` and ``${NAME}`` as a Dockerfile has them outside of RUN; unknown ones are empty."""
    return re.sub(r"\$\{?(\w+)\}?", lambda match: variables.get(match[1], ""), text)


def left_out(name: str, patterns: list[str]) -> bool:
    """Whether .dockerignore leaves a path below the repository out."""
    parts = name.split("/")
    for pattern in patterns:
        pattern = pattern.strip("/")
        if pattern.startswith("**/"):
            if any(fnmatch.fnmatch(part, pattern[3:]) for part in parts):
                return True
        elif fnmatch.fnmatch("/".join(parts[: pattern.count("/") + 1]), pattern):
            return True
    return False


class Build:
    """A root file system in which steps run."""

    def __init__(self, root: Path, uv: str, cache: Path) -> None:
        self.root, self.uv, self.cache = root, uv, cache
        self.variables: dict[str, str] = {}
        self.environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.user, self.folder, self.command = "root", "/", None
        self.shell = ["/bin/sh", "-c"]

    def take(self, instruction: str, rest: str) -> None:
        """One step.

        Raises:
            ValueError: for an instruction that is not known here.
            subprocess.CalledProcessError: if a RUN fails.
        """
        if instruction == "ARG":
            name, _, value = rest.partition("=")
            self.variables.setdefault(name, substitute(value, self.variables))
        elif instruction == "ENV":
            for name, value in (word.split("=", 1) for word in shlex.split(rest)):
                self.environment[name] = substitute(value, self.environment)
        elif instruction == "SHELL":
            self.shell = json.loads(rest)
        elif instruction == "WORKDIR":
            self.folder = rest
            self._inside(rest).mkdir(parents=True, exist_ok=True)
        elif instruction == "USER":
            self.user = rest
        elif instruction == "CMD":
            self.command = json.loads(rest)
        elif instruction == "COPY":
            self._copy(*flags_of(rest))
        elif instruction == "RUN":
            flags, command = flags_of(rest)
            caches = [re.search(r"target=([^,]+)", one)[1] for one in flags.pop("mount", [])]
            if flags:
                raise ValueError(f"RUN {' '.join(flags)} is not known here: extend {__file__}")
            self.run([*self.shell, command], caches)
        elif instruction not in IGNORED | {"FROM"}:
            raise ValueError(f"{instruction} is not known here: extend {__file__}")

    def run(self, command: list[str], caches: list[str] = (), minutes: float = 60) -> None:
        """A command inside, as the user and in the folder that the steps so far have named.

        Mounts live in a namespace of their own, so that nothing stays mounted whatever happens.
        """
        binds = [(str(self.cache), str(self._inside(one))) for one in caches]
        binds += [("/etc/ssl/certs", str(self._inside("/etc/ssl/certs")))]
        for name in ("/etc/resolv.conf", "/etc/hosts"):  # an engine makes both
            binds.append((name, str(self._inside(name))))
        script = ["set -e", "mount --make-rprivate /"]
        for source, target in binds:
            if Path(source).is_dir():
                Path(target).mkdir(parents=True, exist_ok=True)
            else:
                Path(target).touch()
            script.append(shlex.join(["mount", "--bind", source, target]))
        script += [
            shlex.join(["mount", "-t", "proc", "proc", str(self.root / "proc")]),
            shlex.join(["mount", "--rbind", "/dev", str(self.root / "dev")]),
            shlex.join(["mount", "-t", "tmpfs", "tmpfs", str(self.root / "tmp")]),
        ]
        passed_on = {name: os.environ[name] for name in os.environ if PASSED_ON.fullmatch(name)}
        home, user = "/root", []
        if self.user != "root":
            # As an engine does: the home of that number in the image's own list of users.
            entry = next(
                line.split(":")
                for line in self._inside("/etc/passwd").read_text().splitlines()
                if self.user in (line.split(":")[0], line.split(":")[2])
            )
            home, user = entry[5], [f"--userspec={entry[2]}:{entry[3]}"]
        inner = ["sh", "-c", f'cd {shlex.quote(self.folder)} && exec "$@"', "sh", *command]
        # The shell stays the namespace's first process, and root: when it goes, all go.
        script += [shlex.join(["chroot", *user, str(self.root), *inner]), "exit $?"]
        subprocess.run(
            [
                "unshare",
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "sh",
                "-c",
                "\n".join(script),
            ],
            env={**passed_on, **self.environment, "HOME": home},
            check=True,
            timeout=60 * minutes,
            stdin=subprocess.DEVNULL,
        )

    def _copy(self, flags: dict[str, list[str]], rest: str) -> None:
        *sources, target = rest.split()
        if flags.get("from") == ["uv"]:
            shutil.copy(self.uv, self._inside(target))
            return
        patterns = (REPOSITORY / ".dockerignore").read_text().splitlines()
        patterns = [one for one in patterns if one and not one.startswith("#")]
        folder = self._inside(os.path.join(self.folder, target))
        for source in sources:
            if (REPOSITORY / source).is_file():
                shutil.copy2(REPOSITORY / source, folder)
                continue

            def ignore(place: str, names: list[str]) -> list[str]:
                below = Path(place).relative_to(REPOSITORY)
                return [one for one in names if left_out((below / one).as_posix(), patterns)]

            shutil.copytree(
                REPOSITORY / source, folder, ignore=ignore, symlinks=True, dirs_exist_ok=True
            )
        for owner in flags.get("chown", []):
            self.run(["chown", "-R", owner, self.folder])

    def _inside(self, path: str) -> Path:
        return self.root / path.lstrip("/")


def why_not() -> str | None:
    """Why it cannot be tried here, or None."""
    if os.geteuid() != 0:
        return "making a root file system takes root: run it with sudo"
    for program in ("debootstrap", "unshare", "chroot", "uv"):
        if shutil.which(program) is None:
            return f"there is no {program}: install it, debootstrap and the others by apt-get"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        return "this machine lets nobody make a mount namespace: run it outside of a container"
    return None


def mirror() -> str:
    """The archive that this machine's own packages come from."""
    told = subprocess.check_output(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)"], text=True
    )
    return told.split()[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, help="where it goes, 9 GB; a new folder below TMPDIR")
    parser.add_argument("--keep", action="store_true", help="leave it there")
    chosen = parser.parse_args()
    if reason := why_not():
        print(f"Cannot try the Dockerfile here: {reason}.")
        return CANNOT_TRY
    if chosen.root and chosen.root.exists():  # it is removed at the end, and may be another build's
        print(f"Cannot try the Dockerfile here: {chosen.root} is there already, name a new folder.")
        return CANNOT_TRY
    root = chosen.root or Path(tempfile.mkdtemp(prefix="wmtp-root-"))
    root.mkdir(exist_ok=True)
    root.chmod(0o755)  # "/" of the image's user, and a temporary folder is closed to others
    cache = Path(subprocess.check_output(["uv", "cache", "dir"], text=True).strip())
    try:
        # It mounts as well: in a namespace, so that what is removed at the end holds no mount.
        command = ["debootstrap", "--variant=minbase", f"--include={STAND_IN_PACKAGES}"]
        command = ["unshare", "--mount", *command, "bookworm", str(root), mirror()]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        build = Build(root, uv_program(), cache)
        for instruction, rest in read_steps((REPOSITORY / "docker" / "Dockerfile").read_text()):
            print(f"+ {instruction} {rest}", flush=True)
            build.take(instruction, rest)
        print(f"+ as user {build.user}: {shlex.join(build.command + SHORT)}", flush=True)
        build.run([*build.command, *SHORT])
    except subprocess.CalledProcessError as error:
        print(f"A step ended with {error.returncode}; it is the last one with a + above.")
        return 1
    finally:
        if not chosen.keep:
            shutil.rmtree(root, ignore_errors=True)
    print("Every step of docker/Dockerfile ran, and its command trained.")
    return 0


def uv_program() -> str:
    """uv itself, where what is on the PATH is a script in front of it."""
    ask = "import os; print(os.environ['UV'])"  # uv tells its children
    command = ["uv", "run", "--no-project", "python3", "-c", ask]
    return subprocess.check_output(command, text=True).strip()


if __name__ == "__main__":
    sys.exit(main())
