"""How an object is recorded, and how it is found again: a name or an import path, and its settings as JSON.

    "my_module:make_model"      something of the user's own
    "labkit:Classifier"         something of labkit, by its public name: records stay valid where a file moves
    {"by_value": "my_net"}      what cannot be imported, as it was defined in a notebook cell, for instance: its name alone

The settings of a problem, an update or a partition are the arguments of its constructor, each stored as an attribute of its name.

Used wherever a problem, a model, an update or a partition is written into a record or made again from one.
"""

import functools
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from labkit.errors import ProblemError, did_you_mean, known


def import_path(value: Any) -> str | dict[str, str]:
    """ "module:name" of a function or class that other processes can import, else {"by_value": name}.

    What labkit makes public is named by the package that does: "labkit:Classifier", "labkit.models:lenet".
    """
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if not name or module in (None, "__main__"):
        return {"by_value": short(value)}
    parts = module.split(".")
    faces = [".".join(parts[:n]) for n in range(1, len(parts))] if parts[0] == "labkit" else []
    return next((f"{home}:{name}" for home in [*faces, module] if _find(home, name) is value), {"by_value": short(value)})


def _find(module: str, name: str) -> Any:
    """The thing of this name in a module that is loaded; None where there is none."""
    return functools.reduce(lambda found, part: getattr(found, part, None), name.split("."), sys.modules.get(module))


def imported(path: str, error: type[Exception] = ProblemError) -> Any:
    """What "module:name" stands for; `error` where it cannot be found."""
    module_name, _, name = path.partition(":")
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        if missing.name is None or not f"{module_name}.".startswith(f"{missing.name}."):
            raise  # the module is there; something that it imports is not
        raise error(
            f"{path!r}: no module {module_name!r} can be imported in process {os.getpid()}. Put its folder on "
            "PYTHONPATH on every machine of the lab, or give the function or the object itself."
        ) from missing
    for part in name.split("."):
        if not hasattr(found, part):
            raise error(f"{path!r}: {module_name!r} has no {name!r}.{did_you_mean(part, dir(found))}")
        found = getattr(found, part)
    return found


def argument_names(cls: type) -> list[str]:
    """The arguments of the constructor of a class, also those that it hands on to a base class as **keywords."""
    names: list[str] = []
    for base in (base for base in cls.__mro__ if "__init__" in vars(base)):
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        names += [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names


def constructor_arguments(thing: Any, error: type[Exception] = ProblemError) -> dict[str, Any]:
    """What `thing` was made with, by name; `error` where an argument was not stored as an attribute of its name."""
    for name in (names := argument_names(type(thing))):
        if not hasattr(thing, name):
            raise error(
                f"{type(thing).__name__} does not store its argument {name!r}. Write self.{name} = {name} in its "
                "constructor, so that the record of a run can name it."
            )
    return {name: getattr(thing, name) for name in names}


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
    elif not isinstance(value, list | tuple):
        return None
    return next((name for name in map(by_value, value) if name is not None), None)


def is_same(one: Any, other: Any) -> bool:
    """Do two records name the same thing? A function of a script is {"by_value": "net"} there, and "train:net" where it is imported."""
    if isinstance(one, Mapping) and isinstance(other, Mapping) and one.keys() == other.keys():
        return all(is_same(value, other[name]) for name, value in one.items())
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return all(map(is_same, one, other))
    for value, path in ((one, other), (other, one)):
        if isinstance(value, Mapping) and [*value] == ["by_value"] and isinstance(path, str):
            module, _, name = path.partition(":")
            return bool(module) and name == value["by_value"]
    return one == other


def chosen(what: str, given: Any, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What a user has chosen, and its settings: a name of `options`, an import path, one of these with settings
    ({"name": "huber", "delta": 2.0}), or the function, class or object itself.

    Names may be written in any case, with or without hyphens. ValueError for another name, TypeError for what is neither.
    """
    settings = dict(given) if isinstance(given, Mapping) else {"name": given}
    name = settings.pop("name", None)
    if isinstance(name, str) and ":" in name:
        return imported(name, ValueError), settings
    if isinstance(name, str):
        spelt = {_letters(option): option for option in options}
        advice = ' An import path "my_module:mine" or a function will do as well.'
        return options[known(what, spelt.get(_letters(name), name), options, advice)], settings
    if isinstance(given, Mapping) or not (callable(name) or hasattr(name, "update")):
        raise TypeError(f'{what}={short(given)} must be a name, an import path, {{"name": ..., settings}} or a function.')
    return name, settings


def check_settings(title: str, make: Callable, settings: Mapping[str, Any], beside: tuple[str, ...] = ()) -> None:
    """ValueError for a setting that `make` has not, with those that it has (but for those `beside`)."""
    parameters = inspect.signature(make).parameters.values()
    free = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in beside]
    for name in settings:
        if name in beside or (name not in free and not any(p.kind is p.VAR_KEYWORD for p in parameters)):
            listed = f"It has: {', '.join(free) or 'none'}.{did_you_mean(name, free)}"
            raise ValueError(f"{title} has no setting {name!r}. {listed}")


def reference(value: Any) -> Any:
    """What `chosen` gets, as the record has it: functions and classes by import path or, where they have none, by value."""
    if isinstance(value, list | tuple):
        return [reference(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): reference(item) for key, item in value.items()}
    if callable(value):
        return import_path(value)
    return value.tolist() if hasattr(value, "tolist") else plain(value)


def _letters(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).lower()


def rule_config(rule: Any, error: type[Exception]) -> dict[str, Any]:
    """Name and settings of an update or a partition, as JSON; the name of a class of the user's own is its import path."""
    own = type(rule).__module__.partition(".")[0] != "labkit"
    return {"name": import_path(type(rule)) if own else rule.name, **plain(constructor_arguments(rule, error))}


def make_rule(what: str, given: str | Mapping[str, Any], rules: Mapping[str, type], base: type) -> Any:
    """An update or a partition from a name of `rules`, an import path, or one of these and settings (`rule_config`).

    ValueError where the name or a setting does not exist, with the known ones, or where the class cannot be imported.
    """
    settings = dict(given) if isinstance(given, Mapping) else {"name": given}
    if (lost := by_value(settings)) is not None:
        raise ValueError(f"{what}: {lost!r} cannot be imported. Give the object itself, or put its class into a module.")
    name = str(settings.pop("name", ""))
    if ":" in name:
        cls = imported(name, ValueError)
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise ValueError(f"{what}={name!r} is not a class derived from labkit's {base.__name__}.")
    else:
        advice = f' A class of your own is named by its import path: "my_module:My{base.__name__}".'
        cls = rules[known(what, name.lower(), rules, advice)]
    options = argument_names(cls)
    for setting in settings:
        if setting not in options:
            listed = f"It has: {', '.join(options) or 'none'}.{did_you_mean(setting, options)}"
            raise ValueError(f"{name} has no setting {setting!r}. {listed}")
    return cls(**settings)


def rule_title(config: Mapping[str, Any]) -> str:
    """An update or a partition for figures, tables and folders: "agwu", or the name of a class of the user's own."""
    name = config["name"]
    path = str(name["by_value"] if isinstance(name, Mapping) else name)
    return path.replace(":", ".").rpartition(".")[2]


def short(value: Any) -> str:
    """A name for `value` that fits into a message."""
    name = getattr(value, "__qualname__", None) or re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # another one in each process
    name = " ".join(name.split())
    return name if len(name) <= 80 else name[:77] + "..."
