"""Sends MLflow what it has not got of runs that have ended.

    python -m wmtp_modules.tracking.sync RUN_DIR

The store is the one of the run; the environment variable MLFLOW_TRACKING_URI goes before it.
"""

import argparse
import os
import sys
from pathlib import Path

from wmtp_modules.config.secrets import hidden
from wmtp_modules.files import alone_in
from wmtp_modules.tracking.deliver import Delivery
from wmtp_modules.tracking.follow import ended_as, say
from wmtp_modules.tracking.outbox import Outbox
from wmtp_modules.tracking.store import DEFAULTS, problem_of, uri_of


def sync(run_dir: Path) -> str:
    """Deliver one run; returns a sentence that says where it is.

    Raises:
        ValueError: if the folder keeps nothing for MLflow, or the store cannot be used.
        InUseError: if the run is still at work, and delivers by itself.
    """
    outbox = Outbox(run_dir)
    order = outbox.order()
    if order is None:
        raise ValueError(f"{run_dir} keeps nothing for MLflow: name the output_dir of a run")
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="wmtp_modules.tracking.sync", description=__doc__)
    parser.add_argument("run_dir", type=Path, nargs="+", help="output_dir of a run; also below it")
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    failed = False
    for parent in parser.parse_args(argv).run_dir:
        # Controls lie below the run that has them.
        below = sorted(file.parent.parent for file in parent.rglob("tracking/run.json"))
        for run_dir in below or [parent]:
            try:
                print(sync(run_dir))
            except (ValueError, OSError) as error:
                failed = True
                print(hidden(str(error)), file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
