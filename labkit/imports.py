"""Things that are found again by an import path: what a record names, and what a user gives by name.

    "my_module:make_model"      something of the user's own
    "labkit:Classifier"         something of labkit, by its public name: a file that moves takes no record with it

Used wherever a problem, a model, a rule or a partition is written into a record or read back from one.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from labkit.errors import ProblemError, did_you_mean


def import_path(value: Any) -> str | dict[str, str]:
    """ "module:name" of a function or class that other processes can import, else {"by_value": name}.

    What labkit makes public is named by the package that does: "labkit:Classifier", "labkit.models:lenet".
    """
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if not name or module in (None, "__main__"):
        return {"by_value": short(value)}
    parts = module.split(".")
    faces = [".".join(parts[:n]) for n in range(1, len(parts))] if parts[0] == "labkit" else []
    return next((f"{place}:{name}" for place in [*faces, module] if _find(place, name) is value), {"by_value": short(value)})


def _find(module: str, name: str) -> Any:
    """The thing of this name in a module that is loaded; None where there is none."""
    found = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def imported(path: str) -> Any:
    """What "module:name" stands for; ProblemError where it cannot be found."""
    module_name, _, name = path.partition(":")
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        raise ProblemError(
            f"{path!r}: no module {module_name!r} can be imported in process {os.getpid()}. Put its folder on "
            "PYTHONPATH on every machine of the lab, or give the function itself."
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ProblemError(f"{path!r}: {module_name!r} has no {name!r}.{did_you_mean(part, dir(found))}")
        found = getattr(found, part)
    return found


def short(value: Any) -> str:
    """A name for `value` that fits into a message."""
    name = getattr(value, "__qualname__", None) or repr(value)
    name = " ".join(name.split())
    return name if len(name) <= 80 else name[:77] + "..."
