"""Send what runs that have ended could not: figures to MLflow, files to their store.

    python -m wmtp_modules.sync RUN_DIR

RUN_DIR is a run's folder; of a run in a store the one in the cache, which the run named at its end.
Its controls and stages below it are sent with it. MLflow's store is the one of the run; the
environment variable MLFLOW_TRACKING_URI goes before it.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from wmtp_modules.config.secrets import HIDDEN, guard_output, hidden
from wmtp_modules.files import alone_in, read_json
from wmtp_modules.storage.background import rest_of
from wmtp_modules.storage.places import endpoint
from wmtp_modules.storage.upload import RECORD, Follower
from wmtp_modules.tracking.deliver import Delivery
from wmtp_modules.tracking.follow import ended_as, say
from wmtp_modules.tracking.outbox import ORDER, Outbox
from wmtp_modules.tracking.store import problem_of, uri_of


def send_figures(run_dir: Path) -> str:
    """Give MLflow what it lacks of one run; returns a sentence that says where that is.

    Raises:
        ValueError: if the store cannot be used.
        InUseError: if the run is still at work, and delivers by itself.
    """
    outbox = Outbox(run_dir)
    order = outbox.order()
    assert order is not None  # who calls has seen its file
    uri = uri_of(order.uri)
    with alone_in(run_dir, wait=False), alone_in(outbox.folder, wait=False):
        delivery = Delivery(outbox, uri, say)
        try:
            delivery.send(order, ended_as(outbox, order))
        except Exception as error:  # whatever MLflow, a driver or a server may raise
            raise ValueError(f"{problem_of(uri, error)}: start the same command again") from error
        delivery.position.problem = None
        outbox.save(delivery.position)
    return f"{run_dir} is whole in MLflow: run {delivery.position.run_id} in {hidden(uri)}"


def send_files(folder: Path) -> str:
    """Bring a folder's store up to it, and say what came of it.

    Raises:
        ValueError: if the environment names another store than the folder's.
        InUseError: if its run is still at work.
        StoreError: if the store cannot be used, or not all could be sent.
    """
    known = read_json(folder / RECORD)
    if known["endpoint"] and not endpoint() and HIDDEN not in known["endpoint"]:
        os.environ["AWS_ENDPOINT_URL"] = known["endpoint"]
    elif known["endpoint"] != hidden(endpoint() or ""):
        raise ValueError(
            f"{folder} goes to the store at {known['endpoint'] or 'AWS'}, and AWS_ENDPOINT_URL is "
            f"{hidden(endpoint() or 'not set')}: set it as it was"
        )
    with alone_in(folder, wait=False):
        follower = Follower(folder.absolute(), known["url"], known["kind"])
        follower.look()
        n_before = len(follower.missing())
        follower.send()
        if left := rest_of(follower):
            raise ValueError(left)
    return f"{n_before} files sent: all of {folder} is in {known['url']}"


def jobs_of(folder: Path) -> list[tuple[Callable[[Path], str], Path]]:
    """What to do for a folder: figures first, since sending them writes down how far they are.

    Raises:
        ValueError: if nothing of it is to be sent anywhere.
    """
    runs = sorted(file.parent.parent for file in folder.rglob(f"tracking/{ORDER}"))
    stored = [folder] if (folder / RECORD).exists() else []
    if not runs and not stored:
        raise ValueError(
            f"{folder} keeps nothing for MLflow or a store: give a run's output_dir, or the folder "
            "in the cache (storage.cache) that the run named at its end"
        )
    return [*((send_figures, run) for run in runs), *((send_files, one) for one in stored)]


def main(argv: list[str] | None = None, *, prog: str = "python -m wmtp_modules.sync") -> None:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", type=Path, nargs="+", metavar="RUN_DIR")
    guard_output()
    failed = False
    for folder in parser.parse_args(argv).run_dir:
        try:
            jobs = jobs_of(folder)
        except ValueError as error:
            jobs, failed = [], True
            print(error, file=sys.stderr)
        for send, where in jobs:
            try:
                print(send(where))
            except (ValueError, OSError) as error:
                failed = True
                print(hidden(str(error)), file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
