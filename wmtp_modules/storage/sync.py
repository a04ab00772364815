"""Sends what a run could not bring into its store:

    python -m wmtp_modules.storage.sync RUN_DIR

RUN_DIR is the folder that the run named at its end.
"""

import argparse
import os
import sys
from pathlib import Path

from wmtp_modules.config.secrets import HIDDEN, hidden
from wmtp_modules.files import alone_in, read_json
from wmtp_modules.storage.background import rest_of
from wmtp_modules.storage.places import endpoint
from wmtp_modules.storage.upload import RECORD, Follower


def send_rest(folder: Path) -> str:
    """Send it, and say what came of it.

    Raises:
        ValueError: if no store follows the folder.
        InUseError: if its run is still at work.
        StoreError: if the store cannot be used.
    """
    record = folder / RECORD
    if not record.exists():
        raise ValueError(
            f"{folder} is no folder that goes into a store: give the one that the run named at its "
            "end, or the run's output_dir in the cache (storage.cache)"
        )
    known = read_json(record)
    if known["endpoint"] and not endpoint() and HIDDEN not in known["endpoint"]:
        os.environ["AWS_ENDPOINT_URL"] = known["endpoint"]
    elif known["endpoint"] != hidden(endpoint() or ""):
        raise ValueError(
            f"{folder} goes to the store at {known['endpoint'] or 'AWS'}, and AWS_ENDPOINT_URL is "
            f"{hidden(endpoint() or 'not set')}: set it as it was"
        )
    with alone_in(folder, wait=False):
        follower = Follower(folder.absolute(), known["url"], known["kind"])
        n_before = len(follower.missing())
        follower.send()
        left = rest_of(follower)
    return left or f"{n_before} files sent: all of {folder} is in {known['url']}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    try:
        print(send_rest(parser.parse_args().run_dir))
    except (ValueError, OSError) as error:
        sys.exit(hidden(f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    main()
