"""Models in MLflow's registry: from a run's folder into it, and out of it into a folder.

A version is a copy of a checkpoint folder among the artifacts of the run's entry in MLflow. It
exists once all of the copy is there, and a later run cannot change it.
"""

import re
import secrets
from pathlib import Path
from typing import Any

from torchtune import utils

from wmtp_modules.config.secrets import hidden
from wmtp_modules.files import new_folder
from wmtp_modules.registry.card import model_card
from wmtp_modules.scoring.score_table import fingerprint_checkpoint
from wmtp_modules.tracking.outbox import Outbox
from wmtp_modules.tracking.store import (
    is_there,
    make_run,
    open_client,
    problem_of,
    set_defaults,
    uri_of,
)

log = utils.get_logger("INFO")

CANDIDATE, PRODUCTION = "candidate", "production"
FINGERPRINT = "wmtp.fingerprint"  # tag of a version: hash of its weights and model config
LONGEST_DESCRIPTION = 5000  # characters that every version of a server takes
CARD = "README.md"
NAME = re.compile(r"[^/:.@\s][^/:@]*")


class Registry:
    """The registry of an MLflow store.

    Args:
        uri: of the store; MLFLOW_TRACKING_URI goes before it. None: only that.

    Raises:
        ValueError: if there is none, or it cannot be used. So does every method.
    """

    def __init__(self, uri: str | None = None) -> None:
        set_defaults()
        self._uri = uri_of(uri)
        self._client = self._ask(open_client, self._uri)

    def register(
        self, run_dir: str | Path, name: str, evaluation: str | Path | None = None
    ) -> tuple[str, bool]:
        """Make a version of a finished run's ``best/``, with a card, as ``candidate``.

        The same weights are not registered twice: their version gets the card of now.

        Returns:
            The version, and whether it is new.

        Raises:
            ValueError: if the run has not ended, its checkpoint is not there, or the name is none.
        """
        run_dir = Path(run_dir).absolute()
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot name a model: it has none of / : @, and no . first")
        card = model_card(run_dir, name, evaluation)
        fingerprint = fingerprint_checkpoint(run_dir / "best")
        found, folder = self._version_with(name, fingerprint), f"models/{fingerprint[:16]}"
        is_new = found is None
        run_id = found.run_id if found else self._run_of(run_dir)
        if is_new:
            log.info(f"Registering {run_dir / 'best'} as {name} in {hidden(self._uri)} ...")
            self._ask(self._client.log_artifacts, run_id, str(run_dir / "best"), folder)
        self._ask(self._client.log_text, run_id, card, f"{folder}/{CARD}")
        if is_new:
            found = self._make_version(name, run_id, folder, {FINGERPRINT: fingerprint})
        described = card.partition("\n# ")[2][:LONGEST_DESCRIPTION]
        self._ask(self._client.update_model_version, name, found.version, f"# {described}")
        self._ask(self._client.set_registered_model_alias, name, CANDIDATE, found.version)
        return str(found.version), is_new

    def promote(self, name: str, which: str = CANDIDATE) -> str:
        """Give a version, or what an alias names, the alias ``production``; returns the version."""
        version = self._version(name, which).version
        self._ask(self._client.set_registered_model_alias, name, PRODUCTION, version)
        return str(version)

    def fetch(self, name: str, folder: str | Path, which: str = PRODUCTION) -> str:
        """Copy a version, or what an alias names, into a new or empty folder; returns the version.

        The folder appears when it is whole and its weights are those that were registered.

        Raises:
            ValueError: if the folder holds something, or the copy is not what was registered.
        """
        from mlflow.artifacts import download_artifacts

        folder = Path(folder).absolute()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} holds something: name a new or empty folder")
        version = self._version(name, which)
        source = self._ask(self._client.get_model_version_download_uri, name, version.version)
        with new_folder(folder) as partial:
            self._ask(
                download_artifacts,
                artifact_uri=f"{source}/",
                dst_path=str(partial),
                tracking_uri=self._uri,
            )
            _flatten(partial)
            wanted = version.tags.get(FINGERPRINT)
            if wanted is None or fingerprint_checkpoint(partial) != wanted:
                raise ValueError(
                    f"version {version.version} of {name} is not what was registered ({source}): "
                    "fetch it again, or register the run again if it was changed there"
                )
        return str(version.version)

    def versions(self, name: str) -> list[tuple[str, list[str], str]]:
        """(version, aliases, run) of all versions of a model, the newest first."""
        model = self._model(name)
        aliases: dict[str, list[str]] = {}
        for alias, version in model.aliases.items():
            aliases.setdefault(str(version), []).append(alias)
        found = sorted(self._search(name), key=lambda one: -int(one.version))
        return [(str(v.version), sorted(aliases.get(str(v.version), [])), v.run_id) for v in found]

    # ------------------------------------------------------------------------- parts

    def _ask(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except OSError:
            raise  # this disk's
        except Exception as error:  # of MLflow, SQLAlchemy, a driver, or what a server answers
            raise ValueError(problem_of(self._uri, error)) from error

    def _run_of(self, run_dir: Path) -> str:
        """The run's entry in MLflow; one is made where it has none in this store."""
        known = Outbox(run_dir).position().run_id
        if known is not None and self._ask(is_there, self._client, known):
            return known
        made = "wmtp_registry", None, run_dir.name, secrets.token_hex(16)
        run_id = self._ask(make_run, self._client, self._uri, *made)
        self._ask(self._client.set_terminated, run_id)
        return run_id

    def _make_version(self, name: str, run_id: str, folder: str, tags: dict[str, str]) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise ValueError(problem_of(self._uri, error)) from error
        source = f"{self._ask(self._client.get_run, run_id).info.artifact_uri}/{folder}"
        return self._ask(self._client.create_model_version, name, source, run_id, tags)

    def _version_with(self, name: str, fingerprint: str) -> Any:
        found = (one for one in self._search(name) if one.tags.get(FINGERPRINT) == fingerprint)
        return next(found, None)

    def _model(self, name: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise ValueError(problem_of(self._uri, error)) from error
            names = [one.name for one in self._ask(self._client.search_registered_models)]
            there = f"there are {', '.join(names)}" if names else "there is none"
            raise ValueError(
                f"no model {name} is registered in {hidden(self._uri)}: {there}"
            ) from error

    def _version(self, name: str, which: str) -> Any:
        """A version by its number or an alias of it."""
        model = self._model(name)
        number = model.aliases.get(which, which)
        found = {str(one.version): one for one in self._search(name)}
        if str(number) not in found:
            known = [f"@{alias}" for alias in sorted(model.aliases)] + sorted(found, key=int)
            raise ValueError(f"{name} has no version {which}: it has {', '.join(known) or 'none'}")
        return found[str(number)]

    def _search(self, name: str) -> list:
        return self._ask(self._client.search_model_versions, f"name='{name}'")


def register_run(run_dir: str | Path, name: str) -> None:
    """``Registry.register`` at the end of a run, whose result no registry may spoil: it warns."""
    order = Outbox(run_dir).order()
    try:
        version, _ = Registry(order.uri if order else None).register(run_dir, name)
        log.info(f"Registered {Path(run_dir) / 'best'} as {name}, version {version} (@{CANDIDATE})")
    except (ValueError, OSError) as error:
        command = f"python -m wmtp_modules.registry register {run_dir} {name}"
        log.warning(f"The model is not registered: {hidden(str(error))}. `{command}` does it")


def _flatten(folder: Path) -> None:
    """Bring up what MLflow puts into a folder named like its source."""
    inside = [*folder.iterdir()]
    if len(inside) == 1 and inside[0].is_dir():
        for path in inside[0].iterdir():
            path.rename(folder / path.name)
        inside[0].rmdir()
