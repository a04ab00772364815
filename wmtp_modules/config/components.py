"""What a config's ``_component_`` may name: an allow-list that only the user can extend.

A config is data, and others' configs are run like one's own. Calling any dotted path would let one
call ``os.system``, so a component has to lie in a namespace of the list and, since modules hold
what they import, be defined there as well: ``wmtp_modules.quickstarts.stdlib.Path`` is not. What
begins with an underscore is private there, and nobody has looked at what a config could do with it.

The list is extended by an environment variable and not by a key: a config must not allow itself.
"""

import difflib
import importlib
import os
import types
from collections.abc import Iterable
from typing import Any

NAMESPACES = (
    "torch.optim",
    "torchao.optim",
    "torchtune.models",
    "torchtune.training.metric_logging",
    "wmtp_modules.data",
    "wmtp_modules.models",
    "wmtp_modules.quickstarts",
    "wmtp_modules.run.metric_logging",
)
VARIABLE = "WMTP_ALLOWED_COMPONENTS"
# Modules that users' configs, and those kept by their runs, name as they were called before.
MOVED = {
    "wmtp_modules.quickstart": "wmtp_modules.quickstarts.stdlib",
    "wmtp_modules.quickstart_eval": "wmtp_modules.quickstarts.functions",
    "wmtp_modules.training.metric_logging": "wmtp_modules.run.metric_logging",
}


class NotAllowedError(ImportError):
    """A component that a config may not name."""


def todays_name(dotted_path: str) -> str:
    """The path itself, or where what it names is since its module has moved."""
    module, dot, name = dotted_path.rpartition(".")
    return f"{MOVED.get(module, module)}{dot}{name}"


def locate(dotted_path: str) -> Any:
    """The object at a dotted path such as ``torch.optim.AdamW``, its modules imported as needed.

    Raises:
        NotAllowedError: if the path is not allowed or private, which is found before anything is
            imported, or the object is defined outside the allowed namespaces.
        ImportError: if a module is not there or fails, or has no such attribute.
    """
    first, *rest = dotted_path.split(".")
    if not all((first, *rest)):
        raise ImportError("it is not a dotted path")
    added = (name.strip() for name in os.environ.get(VARIABLE, "").split(","))
    allowed = (*NAMESPACES, *filter(None, added))
    named = max((one for one in allowed if _is_inside(dotted_path, [one])), key=len, default="")
    # The list may itself name what is private: whoever extends it trusts that.
    if private := [part for part in dotted_path[len(named) :].split(".") if part.startswith("_")]:
        raise NotAllowedError(
            f"'{private[0]}' is private: a config may not name it. "
            + _way_out(dotted_path, allowed)
        )
    if not named:
        module, _, name = dotted_path.rpartition(".")
        near = difflib.get_close_matches(module, allowed, n=1, cutoff=0.8)
        hint = f"did you mean '{near[0]}.{name}'? " if near else ""
        raise NotAllowedError(hint + _way_out(dotted_path, allowed))
    found, name = _import(first), first
    for part in rest:
        if hasattr(found, part):
            found = getattr(found, part)
        else:
            known = [n for n in dir(found) if not n.startswith("_")]
            match = closest(part, known)
            hint = f" (did you mean '{match}'?)" if match else ""
            problem = f"'{name}' has no '{part}'{hint}"
            if not isinstance(found, types.ModuleType) or not hasattr(found, "__path__"):
                raise ImportError(problem)
            # Not read off the package: torch.optim takes its modules off itself.
            found = _import(f"{found.__name__}.{part}", problem)
        name = f"{name}.{part}"
        # Before going on from it: what is reached through a stranger is a stranger, or its method.
        is_named = any(f"{one}.".startswith(f"{name}.") for one in allowed)
        home = _home(found)
        # A constant has none and runs nothing; a method of one can.
        is_ours = _is_inside(home, allowed) if home else not callable(found)
        if not is_named and not is_ours:
            where = home or type(found).__name__
            raise NotAllowedError(
                f"'{name}' is defined in '{where}'. " + _way_out(dotted_path, allowed)
            )
    return found


def closest(key: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant, by spelling or by initials (lr, learning_rate)."""

    def initials(name: str) -> str:
        return "".join(word[:1] for word in name.split("_"))

    for name in known:
        if name.casefold() == key.casefold():
            return name
    for match in difflib.get_close_matches(key, known, n=1):
        return match
    return next((name for name in known if initials(key) == name or initials(name) == key), None)


def _is_inside(name: str, allowed: Iterable[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in allowed)


def _home(found: Any) -> str | None:
    """The module that defines an object, or the object's own name if it is a module."""
    home = getattr(found, "__name__" if isinstance(found, types.ModuleType) else "__module__", None)
    return home if isinstance(home, str) else None


def _way_out(path: str, allowed: tuple[str, ...]) -> str:
    return (
        f"A config may only name what is defined in {', '.join(allowed)}. If you trust the code "
        f"that it names, add it to the environment variable: {VARIABLE}={path} (several are "
        "separated by commas)"
    )


def _import(module: str, not_found: str | None = None) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:  # it is there, and itself imports something that is not
            raise ImportError(f"'{module}' needs '{error.name}', which is not installed") from error
        raise ImportError(not_found or f"no module '{module}'") from error
    except Exception as error:  # any code runs at import; whatever it raises belongs in the report
        raise ImportError(f"importing '{module}' raises {error!r}") from error
