"""What the store has of a run that this disk has not, before the run begins."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from wmtp_modules.files import sync
from wmtp_modules.storage import store
from wmtp_modules.storage.mirror import INCOMPLETE
from wmtp_modules.storage.places import Place
from wmtp_modules.storage.store import Object
from wmtp_modules.storage.upload import MANIFEST, RUN, STATE, Follower, is_not_sent, signature_of

Objects = dict[str, Object]  # by what follows the run's URL


def follower_of(place: Place, cache: Path, *, resume: bool = True) -> Follower:
    """Fetch what is newer in the store, and return what keeps the store up to the folder.

    Of training states the newest whole one comes, if it is newer than those here; of other folders
    those that are whole. What has changed here since it was sent stays.

    Args:
        resume: False starts over, which leaves all of it in the store until the run has begun.

    Raises:
        StoreError: if the store cannot be used, or the disk has no room.
        ValueError: if starting over would delete a run that was interrupted.
    """
    follower = Follower(place.path, place.url, place.kind, is_anew=not resume)
    found = store.objects_in(follower.url)
    units: dict[str, Objects] = {}
    for name, there in found.items():
        units.setdefault(name.rpartition("/")[0], {})[name] = there
    whole = {unit: files for unit, files in units.items() if _is_whole(unit, files)}
    # What another process has deleted or replaced there is not up.
    follower.up = {
        name: value
        if value[2] == found[name].etag or _parent(name) in whole
        else (0, 0, found[name].etag)
        for name, value in follower.up.items()
        if name in found
    }
    follower.reopen(units.keys() - whole.keys())
    if not resume:
        _refuse_interrupted(place, whole, found)
        return follower
    with store.errors_of(follower.url, cache):
        newer = _newer_states(place.path, whole)
        for unit, files in whole.items():
            run = unit if RUN.fullmatch(unit) else None
            if STATE.fullmatch(unit):
                if unit in newer:
                    _fetch_folder(follower, unit, files)
            elif place.kind == "run" and run is not None:
                is_behind = any(_run_of(state) == run for state in newer)
                _fetch_files(follower, files, all_of_them=is_behind)
            else:
                _fetch_folder(follower, unit, files)
    for name, there in found.items():
        # Older states and what is not whole: they go when the next state is up. What is here as
        # well is sent again, or goes with what is here.
        follower.up.setdefault(name, (0, 0, there.etag))
    for name in [name for name in follower.up if name.rpartition("/")[2] == INCOMPLETE]:
        del follower.up[name]
    follower.save()
    return follower


def _is_whole(unit: str, files: Objects) -> bool:
    is_state = STATE.fullmatch(unit) is not None
    names = {name.rpartition("/")[2] for name in files}
    return INCOMPLETE not in names and (not is_state or MANIFEST in names)


def _newer_states(folder: Path, whole: dict[str, Objects]) -> set[str]:
    """For each run the newest whole state in the store, if no state here has as many steps."""
    newest: dict[str, str] = {}
    for unit in filter(STATE.fullmatch, whole):
        parent = _parent(unit)
        if parent not in newest or _step(unit) > _step(newest[parent]):
            newest[parent] = unit
    here = {
        parent: [_step(f"training_state/{path.name}") for path in (folder / parent).glob("step_*")]
        for parent in newest
    }
    return {unit for parent, unit in newest.items() if max([-1, *here[parent]]) < _step(unit)}


def _refuse_interrupted(place: Place, whole: dict[str, Objects], found: Iterable[str]) -> None:
    for unit in filter(STATE.fullmatch, whole):
        run = _run_of(unit)
        summary = f"{run}/summary.json" if run else "summary.json"
        if summary not in found:
            raise ValueError(
                f"{place.url}/{run}".rstrip("/") + f" holds a run that was interrupted after step "
                f"{_step(unit)} or later: set resume_from_checkpoint=true to continue it, take "
                "another output_dir, or delete it in the store to start over"
            )


def _fetch_files(follower: Follower, files: Objects, *, all_of_them: bool) -> None:
    """Those of a run that are not here, or older: each is an object of its own."""
    for name, there in files.items():
        if all_of_them or _is_older(follower, name, there):
            _gather_all(follower, {name: there}, follower.folder)


def _fetch_folder(follower: Follower, unit: str, files: Objects) -> None:
    """One that appears under its name when all of it is here."""
    folder = follower.folder / unit
    names = [f"{unit}/{p.name}" if unit else p.name for p in folder.glob("*") if p.is_file()]
    here = {name: signature_of(follower.folder / name) for name in names if not is_not_sent(name)}
    if any(not follower.is_up(name, signature) for name, signature in here.items()):
        return  # changed here: it stays, and goes up
    if not any(_is_older(follower, name, files[name]) for name in files):
        return
    partial = folder.with_name(f"{folder.name}.partial")
    inside = {name.removeprefix(f"{unit}/"): there for name, there in files.items()}
    for name, there in inside.items():
        url = f"{follower.url}/{unit}/{name}" if unit else f"{follower.url}/{name}"
        store.gather(url, there, store.part_of(partial / name, there))
    for name, there in inside.items():
        store.part_of(partial / name, there).replace(partial / name)
    for extra in partial.iterdir():  # parts of what has been replaced in the store meanwhile
        if extra.name not in inside:
            extra.unlink()
    sync(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    _note(follower, files)


def _gather_all(follower: Follower, files: Objects, folder: Path) -> None:
    for name, there in files.items():
        part = store.part_of(folder / name, there)
        store.gather(f"{follower.url}/{name}", there, part)
        part.replace(folder / name)
    _note(follower, files)


def _note(follower: Follower, files: Objects) -> None:
    for name, there in files.items():
        now = (follower.folder / name).stat()
        follower.up[name] = (now.st_size, now.st_mtime_ns, there.etag)
    follower.save()


def _is_older(follower: Follower, name: str, there: Object) -> bool:
    """Not here; or as it was when it was last sent or fetched, and replaced in the store since."""
    path = follower.folder / name
    if not path.exists():
        return True
    now, before = path.stat(), follower.up.get(name)
    is_same = before is not None and before[:2] == (now.st_size, now.st_mtime_ns)
    return is_same and before is not None and before[2] != there.etag


def _step(unit: str) -> int:
    found = STATE.fullmatch(unit)
    return int(found[1]) if found else -1


def _run_of(state: str) -> str:
    return state[: state.rindex("training_state/")].rstrip("/")


def _parent(name: str) -> str:
    return name.rpartition("/")[0]
