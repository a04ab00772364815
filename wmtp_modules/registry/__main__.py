"""Models in MLflow's registry.

    python -m wmtp_modules.registry register RUN_DIR NAME [--evaluation EVAL_DIR]
    python -m wmtp_modules.registry promote NAME [WHICH]     # WHICH: a version, or an alias
    python -m wmtp_modules.registry fetch NAME FOLDER [--which WHICH]
    python -m wmtp_modules.registry list NAME

The store is --uri, else that of the run, else that of the environment (WMTP_ENVIRONMENT); the
variable MLFLOW_TRACKING_URI goes before them. A new version is the candidate, one that is promoted
production, which fetch takes.
"""

import argparse
import sys
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wmtp_modules.config.file import read_environment
from wmtp_modules.config.secrets import hidden
from wmtp_modules.registry.models import CANDIDATE, PRODUCTION, Registry
from wmtp_modules.tracking.outbox import Outbox


def parser(prog: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--uri", help="of the MLflow store")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser("register", help="a finished run's best checkpoint, as candidate")
    one.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    one.add_argument("name", metavar="NAME")
    one.add_argument("--evaluation", type=Path, metavar="EVAL_DIR", help="for the model card")
    one = commands.add_parser("promote", help="give a version the alias production")
    one.add_argument("name", metavar="NAME")
    one.add_argument("which", metavar="WHICH", nargs="?", default=CANDIDATE)
    one = commands.add_parser("fetch", help="copy a version into a folder that recipes take")
    one.add_argument("name", metavar="NAME")
    one.add_argument("folder", type=Path, metavar="FOLDER")
    one.add_argument("--which", metavar="WHICH", default=PRODUCTION)
    one = commands.add_parser("list", help="versions with their aliases and runs")
    one.add_argument("name", metavar="NAME")
    return made


def main(argv: list[str] | None = None, *, prog: str = "python -m wmtp_modules.registry") -> int:
    """Run the command line; returns the exit code."""
    args = parser(prog).parse_args(argv)
    try:
        print(run(args))
    except (ValueError, OSError) as error:
        print(hidden(f"error: {error}"), file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace) -> str:
    order = Outbox(args.run_dir).order() if args.command == "register" else None
    registry = Registry(args.uri or (order.uri if order else _uri_of_environment()))
    if args.command == "register":
        version, is_new = registry.register(args.run_dir, args.name, args.evaluation)
        done = "registered" if is_new else "was registered; its card is new"
        return f"{args.name} version {version} {done} (@{CANDIDATE})"
    if args.command == "promote":
        version = registry.promote(args.name, args.which)
        return f"{args.name} version {version} is @{PRODUCTION}"
    if args.command == "fetch":
        version = registry.fetch(args.name, args.folder, args.which)
        return f"{args.folder}: {args.name} version {version}, a checkpoint_dir of every recipe"
    lines = [
        f"{version}  {' '.join(f'@{alias}' for alias in aliases):24}  run {run_id}"
        for version, aliases, run_id in registry.versions(args.name)
    ]
    return "\n".join(lines) or f"{args.name} has no versions"


def _uri_of_environment() -> str | None:
    try:
        return OmegaConf.select(read_environment([]), "tracking.uri")
    except OmegaConfBaseException as error:  # a variable that is not set
        raise ValueError(f"tracking.uri of the environment: {error}".partition("\n")[0]) from error


if __name__ == "__main__":
    sys.exit(main())
