"""Settings of a problem: checked on the way in, written to the record as JSON, found again by import path.

What JSON cannot hold is kept by its name alone, as {"by_value": name}, so that reading it back can say what is missing.

Used by the problems, and by whoever makes one again from a record.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from labkit.errors import ProblemError
from labkit.imports import short


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
