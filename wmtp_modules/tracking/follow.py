"""The process beside rank 0 that tells MLflow what the run writes down.

A process, not a thread: a client's work would take Python's lock from the steps, and it outlives
a run that is killed, whose status it then sets. MLflow's own asynchronous logging keeps what
waits in memory, gives up after some attempts, and a kill loses it.
"""

import os
import select
import signal
import sys
import time
from pathlib import Path

from wmtp_modules.config.secrets import guard_output, hidden
from wmtp_modules.files import alone_in, read_json, sync_command
from wmtp_modules.tracking.deliver import Delivery
from wmtp_modules.tracking.outbox import ORDER, Order, Outbox
from wmtp_modules.tracking.store import problem_of
from wmtp_modules.tracking.system import SystemMetrics

TICK_S = 1.0  # between two looks at the file
LONGEST_WAIT_S = 30.0  # between two attempts in an outage
LINGER_S = 10.0  # that a run's end waits for a store that does not answer
SILENT_END = "the process ended without a word (killed, or out of memory)"


def say(sentence: str) -> None:
    sys.stderr.write(f"\n{hidden(sentence)}\n")
    sys.stderr.flush()


def has_ended(process: int | None) -> bool:
    """Whether the process of a pidfd, None of one that was gone already, runs no more."""
    return process is None or bool(select.select([process], [], [], 0)[0])


def ended_as(outbox: Outbox, order: Order) -> str:
    """Status of a run that is over; tags why where it could not say so itself."""
    if order.status is None:
        exit_file = outbox.run_dir / "exit.json"
        reason = read_json(exit_file).get("reason") if exit_file.exists() else SILENT_END
        order.tags["exit_reason"] = str(reason)
    return order.status or "KILLED"


def follow(run_dir: Path, session: str, uri: str, parent: int | None, *, is_required: bool) -> bool:
    """Deliver until the run has ended and MLflow has all, or does not answer any more.

    Args:
        run_dir: the run's folder.
        session: the start of the run that is followed; another one has another follower.
        uri: of the store.
        parent: a pidfd of the run's process, None if that has ended.
        is_required: the run itself tells that the store cannot be used at its start, and ends.

    Returns:
        Whether MLflow has all.
    """
    outbox = Outbox(run_dir)
    with alone_in(outbox.folder, wait=True):  # the follower of the start before ends by itself
        delivery = Delivery(outbox, uri, say)
        machine = SystemMetrics(say)
        wait, ended_at, is_away = TICK_S, None, False
        while True:
            order = outbox.order()
            if order is None or order.session != session:
                return True  # another start of the run has its own follower
            is_over = order.status is not None or has_ended(parent)
            if is_over and ended_at is None:
                ended_at = time.monotonic()
            if not is_over:
                delivery.sample(machine.new())
            try:
                delivery.send(order, ended_as(outbox, order) if is_over else None)
            except Exception as error:  # whatever MLflow, a driver or a server may raise
                problem = problem_of(uri, error)
                if not is_away:
                    if delivery.position.session == session or not is_required:
                        say(
                            f"Warning: {problem}: the run goes on, its figures stay in "
                            f"{outbox.metrics} and are sent when it answers"
                        )
                    _note(outbox, delivery, session, problem)
                is_away, wait = True, min(2 * wait, LONGEST_WAIT_S)
            else:
                if is_away:
                    say(f"The MLflow store {hidden(uri)} has got everything")
                    _note(outbox, delivery, session, None)
                is_away, wait = False, TICK_S
                if is_over:
                    return True
            if ended_at is not None and time.monotonic() - ended_at > LINGER_S:
                say(
                    f"MLflow has not got everything of {outbox.run_dir}: "
                    f"`{sync_command(outbox.run_dir)}` sends the rest"
                )
                return False
            _sleep(wait, outbox, session, parent, is_over)


def _note(outbox: Outbox, delivery: Delivery, session: str, problem: str | None) -> None:
    delivery.position.session, delivery.position.problem = session, problem
    try:
        outbox.save(delivery.position)
    except OSError as error:  # a full disk: the store knows what it has got
        say(f"Warning: {error}")


def _sleep(seconds: float, outbox: Outbox, session: str, parent: int | None, is_over: bool) -> None:
    """Until there is something to do: a run that ends shall not wait for a long pause."""
    until = time.monotonic() + (min(seconds, 2.0) if is_over else seconds)
    file = outbox.folder / ORDER
    before = file.stat().st_mtime_ns if file.exists() else None
    while time.monotonic() < until:
        time.sleep(0.1)
        if not is_over and has_ended(parent):
            return
        if (file.stat().st_mtime_ns if file.exists() else None) != before:
            return


def main() -> None:
    guard_output()
    run_dir, session, pid = sys.argv[1:]
    try:
        parent = os.pidfd_open(int(pid))
    except ProcessLookupError:
        parent = None
    for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(one, signal.SIG_IGN)  # meant for the run, after whose end this ends
    if "WMTP_QUIET_TRACKING" not in os.environ:  # else the run waits
        os.nice(5)
    uri, is_required = os.environ["MLFLOW_TRACKING_URI"], "WMTP_QUIET_TRACKING" in os.environ
    done = follow(Path(run_dir), session, uri, parent, is_required=is_required)
    sys.exit(0 if done else 1)


if __name__ == "__main__":
    main()
