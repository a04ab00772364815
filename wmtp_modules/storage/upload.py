"""Writing: a store follows a folder, and nothing in it ever looks whole that is not.

Files that lie in a run's folder itself are objects of their own and appear whole. Those of any
other folder (a checkpoint, a training state, a table) belong together: while they change the store
has ``.incomplete`` beside them, a state no ``manifest.json``, and both go first and come last.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wmtp_modules.config.secrets import hidden
from wmtp_modules.files import read_json
from wmtp_modules.storage import store
from wmtp_modules.storage.mirror import INCOMPLETE
from wmtp_modules.storage.places import endpoint

LOOSE_EVERY_S = 30.0  # such as metrics.jsonl, which grows with every step
RECORD = ".store.json"  # in the folder: what the store has of it
MANIFEST = "manifest.json"
STATE = re.compile(r"(?:.*/)?training_state/step_(\d+)")
# Folders whose files are objects of their own.
RUN = re.compile(r"|tracking|(?:.*/)?controls/[^/]+(?:/tracking)?")
# Locks, and what is being written or has been replaced. Dot files are ours, but for DCP's.
NOT_SENT = re.compile(
    r"\.(?!metadata$).*|.*\.(partial|old|tmp|dropped|damaged\d*|lock)(-\d+-[0-9a-f]{8})?"
)
COMES_LAST = ("summary.json", MANIFEST)  # they say that the others are there

Signature = tuple[int, int]  # bytes, time of the last change in ns
NOT_OURS = (0, 0, "")  # of what may be in the store, and is not as it is here


class Follower:
    """Sends what changes in a folder to a URL. One process and thread at a time.

    Args:
        folder: of a run, or what belongs together as a whole.
        url: its place in the store.
        kind: "run" or "folder".
        is_anew: the run starts over: states and summary of the one before go when it has begun.
    """

    def __init__(self, folder: Path, url: str, kind: str, *, is_anew: bool = False) -> None:
        self.folder, self.url, self.kind = folder, url.rstrip("/"), kind
        self.beat: Callable[[], object] = lambda: None
        self._is_anew, self._began = is_anew, time.time_ns()
        self._sending = folder.with_name(f".{folder.name}.sending")
        self.up: dict[str, tuple[int, int, str]] = {}  # and the etag; zeros: not seen here
        self._open: set[str] = set()  # folders whose objects are not whole
        self._gone: set[str] = set()  # folders that the last pass missed here
        self._saved: set[str] = set()  # folders of states of which this process has sent one
        self._is_unsure = False  # whether the store has what was sent: a call has failed
        self._loose_at = float("-inf")  # when files that are objects of their own were last sent
        record = folder / RECORD
        if record.exists() and (before := read_json(record))["url"] == self.url:
            self.up = {name: tuple(value) for name, value in before["up"].items()}
            self._open = set(before["open"])

    def save(self) -> None:
        """Write down what the store has; by now the run's folder may be gone."""
        if not self.folder.exists():
            return
        known: dict = {"url": self.url, "kind": self.kind, "endpoint": hidden(endpoint() or "")}
        known |= {"up": self.up, "open": sorted(self._open)}
        # Written often and not synced: without it the store is asked, and files are sent again.
        unfinished = self.folder / f"{RECORD}.tmp"
        unfinished.write_text(json.dumps(known))
        unfinished.replace(self.folder / RECORD)

    def is_up(self, name: str, signature: Signature) -> bool:
        return name in self.up and self.up[name][:2] == signature

    def reopen(self, units: Iterable[str]) -> None:
        """Folders that the store has in part: the next pass makes them whole, or deletes them."""
        self._open |= set(units)

    def look(self) -> None:
        """Ask the store what it has: a bucket may have been emptied, or deleted and made anew.

        Raises:
            StoreError: if it cannot be used.
        """
        found = store.objects_in(self.url)
        self.up = {
            name: of if of[2] == found[name].etag else (0, 0, found[name].etag)
            for name, of in self.up.items()
            if name in found
        }
        self.save()

    def missing(self) -> dict[str, int]:
        """Files that are not up as they are here, with their bytes."""
        return {
            name: files[name][0]
            for unit, files in self._scan().items()
            for name in files
            if not self.is_up(name, files[name]) or unit in self._open
        }

    # ----------------------------------------------------------------- one pass

    def send(self, *, settle_s: float = 0.0) -> None:
        """Bring the store up to the folder: folders first, the oldest of them first.

        Args:
            settle_s: pass over what changed within these seconds; 0 sends everything.

        Raises:
            StoreError: with the first that could not be sent; what was is not sent again.
        """
        if self._is_unsure:
            self.look()
        self._is_unsure = True
        self._send(settle_s)
        self._is_unsure = False

    def _send(self, settle_s: float) -> None:
        here = self._scan()
        self._start_over(here)
        loose = [unit for unit in here if self._is_loose(unit)]
        limit = time.time_ns() - int(settle_s * 1e9)
        due = [
            unit
            for unit in sorted(here.keys() - loose, key=lambda unit: _newest(here[unit]))
            if self._is_due(unit, here[unit])
            # A state gets its name when it is complete; other folders may still grow.
            and (not settle_s or STATE.fullmatch(unit) or _newest(here[unit]) < limit)
        ]
        if due or not settle_s or time.monotonic() - self._loose_at > LOOSE_EVERY_S:
            for unit in loose:  # before a state comes up, so that no metrics of it are missing
                self._send_loose(here[unit], [n for n in here[unit] if not n.endswith(COMES_LAST)])
            for unit in due:
                self._send_unit(unit, here[unit])
            for unit in loose:
                self._send_loose(here[unit], [n for n in here[unit] if n.endswith(COMES_LAST)])
                for name in [n for n in self.up if _parent(n) == unit and n not in here[unit]]:
                    self._delete(name)
            self._loose_at = time.monotonic()
        gone = {_parent(name) for name in self.up} | self._open
        gone -= here.keys()
        for unit in sorted(gone & self._gone if settle_s else gone):
            # Missing twice: while a folder is replaced it is not there for a moment.
            if not STATE.fullmatch(unit):
                self._drop_unit(unit)
        self._drop_states(gone, here)
        self._gone = gone

    def _scan(self) -> dict[str, dict[str, Signature]]:
        """Files by folder, both by what follows the folder's own path."""
        found: dict[str, dict[str, Signature]] = {}
        for top, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if not NOT_SENT.fullmatch(name)]
            unit = Path(top).relative_to(self.folder).as_posix().removeprefix(".")
            for name in names:
                if not NOT_SENT.fullmatch(name):
                    with suppress(FileNotFoundError):  # it has just been replaced
                        now = os.stat(os.path.join(top, name))
                        signature = now.st_size, now.st_mtime_ns
                        found.setdefault(unit, {})[_joined(unit, name)] = signature
        return found

    def _is_loose(self, unit: str) -> bool:
        return self.kind == "run" and RUN.fullmatch(unit) is not None

    def _send_loose(self, files: dict[str, Signature], names: list[str]) -> None:
        for name in sorted(names):
            if not self.is_up(name, files[name]):
                with self._frozen([name], copy=True) as frozen:
                    self._put(frozen, name, files[name])

    def _is_due(self, unit: str, files: dict[str, Signature]) -> bool:
        changed = not all(self.is_up(name, files[name]) for name in files)
        return changed or bool(self._no_more(unit, files)) or unit in self._open

    def _no_more(self, unit: str, files: dict[str, Signature]) -> list[str]:
        return [name for name in self.up if _parent(name) == unit and name not in files]

    def _send_unit(self, unit: str, files: dict[str, Signature]) -> None:
        todo = [name for name in files if not self.is_up(name, files[name])]
        with self._frozen(todo) as frozen:
            if todo and not frozen.exists():
                return  # it has been deleted meanwhile
            self._begin(unit)
            manifest = _joined(unit, MANIFEST)
            if manifest in self.up and todo != [manifest]:
                self._delete(manifest)
            for name in self._no_more(unit, files):
                self._delete(name)
            for name in _in_order(todo):
                self._put(frozen, name, files[name])
            if any(signature_of(frozen / name) != files[name] for name in todo):
                for name in todo:  # a file grew meanwhile: the next pass sends it
                    self.up.pop(name, None)
                self.save()
                return
            if manifest in files and manifest not in self.up:  # it was up before, and had to go
                self._put(self.folder, manifest, files[manifest])
            self._end(unit)
        if STATE.fullmatch(unit):
            self._saved.add(_parent(unit))

    def _drop_states(self, gone: set[str], here: dict) -> None:
        """Those that the run has dropped, where another one is up.

        Of those that never were here, as the run began on an empty disk, none goes before this
        process has sent a state: the newest may turn out damaged.
        """
        for unit in sorted(filter(STATE.fullmatch, gone)):
            others = [one for one in here if _parent(one) == _parent(unit) and STATE.fullmatch(one)]
            is_kept = any(not self._is_due(one, here[one]) for one in others)
            is_strange = any(self.up[n][:2] == (0, 0) for n in self.up if _parent(n) == unit)
            if is_kept and (_parent(unit) in self._saved or not is_strange):
                self._drop_unit(unit)

    def _drop_unit(self, unit: str) -> None:
        self._begin(unit)
        names = [name for name in self.up if _parent(name) == unit]
        for name in sorted(names, key=lambda name: not name.endswith(COMES_LAST)):
            self._delete(name)
        self._end(unit)

    def _start_over(self, here: dict) -> None:
        """As ``Run.begin`` does here when it does not resume, once it has begun."""
        config = here.get("", {}).get("config.yaml")
        if not self._is_anew or config is None or config[1] < self._began:
            return
        found = store.objects_in(self.url)
        for name in [*self.up]:
            if name not in found:
                del self.up[name]
        for name in sorted(found, key=lambda name: not name.endswith(COMES_LAST)):
            unit, is_end = _parent(name), name in ("summary.json", "exit.json")
            if STATE.fullmatch(unit) and unit not in here:
                self.up.setdefault(name, (0, 0, found[name].etag))
                if unit not in self._open:
                    self._begin(unit)
            elif not is_end or name in here.get("", {}):
                continue
            self._delete(name)
        for unit in [unit for unit in self._open if STATE.fullmatch(unit) and unit not in here]:
            self._end(unit)
        self._is_anew = False

    # ------------------------------------------------------------------- objects

    def _begin(self, unit: str) -> None:
        self._open.add(unit)
        self.save()
        store.put_text("Not all objects beside this one are there.\n", self._marker(unit))
        self.beat()

    def _end(self, unit: str) -> None:
        store.delete(self._marker(unit))
        self._open.discard(unit)
        self.save()
        self.beat()

    def _marker(self, unit: str) -> str:
        return f"{self.url}/{_joined(unit, INCOMPLETE)}"

    def _put(self, frozen: Path, name: str, signature: Signature) -> None:
        if not (frozen / name).exists():
            return
        if name not in self.up:  # who goes on after a kill has to know that it may be there
            self.up[name] = NOT_OURS
            self.save()
        there = store.put(frozen / name, f"{self.url}/{name}", self.beat)
        self.up[name] = (*signature, there.etag)
        self.save()

    def _delete(self, name: str) -> None:
        store.delete(f"{self.url}/{name}")
        self.up.pop(name, None)
        self.save()
        self.beat()

    @contextmanager
    def _frozen(self, names: list[str], *, copy: bool = False) -> Iterator[Path]:
        """A folder with these files, which stay while the run deletes them; without, if it has.

        Links, or copies of those that the run writes on.
        """
        shutil.rmtree(self._sending, ignore_errors=True)
        try:
            for name in names:
                target = self._sending / name
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    try:
                        (shutil.copy2 if copy else os.link)(self.folder / name, target)
                    except FileNotFoundError:
                        raise
                    except OSError:  # a file system without links
                        shutil.copy2(self.folder / name, target)
                except FileNotFoundError:
                    shutil.rmtree(self._sending, ignore_errors=True)
                    break
            yield self._sending
        finally:
            shutil.rmtree(self._sending, ignore_errors=True)


def _joined(unit: str, name: str) -> str:
    return f"{unit}/{name}" if unit else name


def _parent(name: str) -> str:
    return name.rpartition("/")[0]


def _newest(files: dict[str, Signature]) -> int:
    return max(changed for _, changed in files.values())


def _in_order(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (name.endswith(COMES_LAST), name))


def is_not_sent(name: str) -> bool:
    """Whether a file, by its name or path, is none of the run's."""
    return NOT_SENT.fullmatch(name.rpartition("/")[2]) is not None


def signature_of(path: Path) -> Signature:
    """Zeros for a file that is not there."""
    with suppress(FileNotFoundError):
        now = path.stat()
        return now.st_size, now.st_mtime_ns
    return 0, 0
