"""Settings of a problem: checked on the way in, written to the record as JSON, found again by import path.

What JSON cannot hold is kept by its name alone, as {"by_value": name}, so that reading it back can say what is missing.

Used by problems.py and models/__init__.py; imports nothing but errors.py.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import numbers
import operator
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from labkit.errors import ProblemError


def known(name: str, value: Any, options: Iterable[Any], advice: str = "") -> Any:
    """`value`, if it is one of `options`; otherwise ValueError with all of them and the nearest."""
    options = list(options)
    if value in options:
        return value
    near = difflib.get_close_matches(str(value), [str(option) for option in options], n=1)
    question = f" Did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(str(option) for option in options) or "(none)"
    raise ValueError(f"{name}={value!r} is not known. Known: {listed}.{question}{advice}")


def whole(name: str, value: Any) -> int:
    """`value` as an int of at least 1; TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}={value!r} must be a whole number, not {type(value).__name__}.")
    value = operator.index(value)
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1.")
    return value


def real(name: str, value: Any, above: float = -math.inf, least: float = -math.inf, below: float = math.inf) -> float:
    """`value` as a float with above < value < below and value >= least; TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} must be a number, not {type(value).__name__}.")
    value = float(value)
    if not (above < value < below and value >= least):
        low = f"above {above:g}" if math.isfinite(above) else f"at least {least:g}"
        raise ValueError(f"{name}={value:g} must be {low} and {f'below {below:g}' if below < math.inf else 'finite'}.")
    return value


def kept_arguments(thing: Any) -> dict[str, Any]:
    """Constructor arguments of `thing` by name, also those handed on to a base class as **keywords.

    Each must have been kept as an attribute of its name: ProblemError otherwise.
    """
    kept: dict[str, Any] = {}
    for base in type(thing).__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        for name in (p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)):
            if not hasattr(thing, name):
                raise ProblemError(
                    f"{type(thing).__name__} does not keep its argument {name!r}. Write self.{name} = {name} in its "
                    "constructor, so that the record of a run can name it."
                )
            kept[name] = getattr(thing, name)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return kept


def plain(value: Any) -> Any:
    """`value` with nothing in it that JSON cannot hold."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return {"by_value": short(value)}


def by_value(value: Any) -> str | None:
    """The name of something in `value` that JSON could not hold, if there is one."""
    if isinstance(value, Mapping):
        if "by_value" in value:
            return str(value["by_value"])
        value = value.values()
    elif not isinstance(value, list):
        return None
    return next((name for name in map(by_value, value) if name is not None), None)


def import_path(value: Any) -> str | dict[str, str]:
    """ "module:name" of a function or class that other processes can import, else {"by_value": name}."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    found = sys.modules.get(module) if module != "__main__" else None
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{module}:{name}" if name and found is value else {"by_value": short(value)}


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
            near = difflib.get_close_matches(part, dir(found), n=1)
            question = f" Did you mean {near[0]!r}?" if near else ""
            raise ProblemError(f"{path!r}: {module_name!r} has no {name!r}.{question}")
        found = getattr(found, part)
    return found


def short(value: Any) -> str:
    """A name for `value` that fits into a message."""
    name = getattr(value, "__qualname__", None) or repr(value)
    name = " ".join(name.split())
    return name if len(name) <= 80 else name[:77] + "..."
