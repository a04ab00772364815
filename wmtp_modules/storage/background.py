"""The thread that keeps stores up to folders during a run; nothing it meets stops the run."""

import logging
import threading
import time

from wmtp_modules.config.secrets import hidden
from wmtp_modules.files import sync_command
from wmtp_modules.storage.upload import Follower

log = logging.getLogger(__name__)

POLL_S = 2.0  # between two looks at the folders
SETTLE_S = 5.0  # a folder that changed within is passed over: it may still grow
LONGEST_PAUSE_S = 60.0  # after a failure
# At the end of a run: without any progress, and in all for a run that has been told to stop.
PATIENCE_S, STOPPED_S = 60.0, 8.0


class Background:
    """Follows folders in a thread of its own until it is closed."""

    def __init__(self, followers: list[Follower]) -> None:
        self._followers = followers
        self._ending = threading.Event()
        self._problem = ""
        self._moved = time.monotonic()  # when an object was last dealt with
        for follower in followers:
            follower.beat = self._beat
        self._thread = threading.Thread(target=self._work, name="storage", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        self._moved = time.monotonic()

    def _work(self) -> None:
        pause = POLL_S
        while not self._ending.wait(pause):
            pause = POLL_S if self._send(SETTLE_S) else min(LONGEST_PAUSE_S, max(5.0, 2 * pause))
        for pause in (1.0, 3.0, 0.0):
            if self._send(0.0):
                return
            time.sleep(pause)

    def _send(self, settle_s: float) -> bool:
        """Whether all of it is up; what is not is said once, and tried again."""
        problem = ""
        for follower in self._followers:
            try:
                follower.send(settle_s=settle_s)
            except Exception as error:  # whatever it is: the run must go on
                problem = problem or hidden(f"{error or type(error).__name__}")
        if problem and problem != self._problem:
            log.warning("Not everything is in the store: %s. It is tried again", problem)
        self._problem = problem
        return not problem

    def close(self, *, is_stopped: bool = False) -> list[str]:
        """Send the rest while that makes progress; sentences on what is not up then."""
        self._ending.set()
        self._beat()
        began = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(0.1)
            now = time.monotonic()
            if now - self._moved > PATIENCE_S or (is_stopped and now - began > STOPPED_S):
                break
        return [told for follower in self._followers if (told := rest_of(follower, self._problem))]


def rest_of(follower: Follower, problem: str = "") -> str | None:
    """What of a folder is not up, and how to send it; None if all is."""
    missing = follower.missing()
    if not missing:
        return None
    size, first = sum(missing.values()), min(missing)
    reason = f": {problem}" if problem else ""
    return (
        f"{len(missing)} files ({size / 1e6:.1f} MB), such as {first}, are not in "
        f"{hidden(follower.url)} yet{reason}. They are whole in {follower.folder}; send them with "
        f"`{sync_command(follower.folder)}`"
    )
