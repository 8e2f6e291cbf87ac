"""Digests of the code behind a search, by which it is known again: a record holds but names, and two lambdas have the same one.

    parts(make)  ->  {"make": "3f0c...", "make: WIDTH": "9a1b...", "net": "77d1..."}

Followed are the user's own functions, classes and objects, of notebook cells and of modules outside of site-packages: their bytecode without
lines and comments, defaults, what they close over, and the globals that they name. So the same cell, executed again in a new kernel or further
down, has the same digests, and an edit elsewhere in a module changes nothing. What a function changes itself (a counter, a list that it appends
to) is left out, and so are weights, data that is no array, and whatever is of a library, which goes by its name.

Used by `labkit.experiments.search`.
"""

import dis
import functools
import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from torch import nn

from labkit.data import Dataset
from labkit.errors import LabError
from labkit.imports import by_value, constructor_arguments, plain, short
from labkit.partition import Partition
from labkit.problems.problem import Problem
from labkit.sources import code_of, find_source, held, imported_in, is_own, on_disk
from labkit.updates import Update

SCALARS = bool | int | float | complex | str | bytes | None
CONTAINERS = list | tuple | dict | set | frozenset
CHANGING = (
    "add",
    "append",
    "clear",
    "discard",
    "extend",
    "insert",
    "pop",
    "popitem",
    "remove",
    "reverse",
    "setdefault",
    "sort",
    "update",
)
PATH = re.compile(r"([A-Za-z_][\w.]*):[A-Za-z_][\w.]*")
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"  # of the bytecode


def digests(**things: Any) -> dict[str, Any]:
    """For the record of a search: the `parts` of each thing that has some, by its name, with the version of Python that compiled them."""
    found = {name: own for name, thing in things.items() if (own := parts(thing))}
    return {"python": VERSION, **found}


def differing(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str] | None:
    """The name of a thing and of a part of it that differ between two `digests`; None where nothing does, or where it cannot be told, as
    another Python has compiled them."""
    if earlier["python"] != now["python"]:
        return None
    for name in dict.fromkeys([*earlier, *now]):
        before, after = ({} if name == "python" else of.get(name, {}) for of in (earlier, now))
        for part in dict.fromkeys([*after, *before]):
            if before.get(part) != after.get(part):
                return name, part
    return None


def parts(thing: Any) -> dict[str, str]:
    """The digest of each function, class and value of the user's own in a thing, or in a dict of things, by its name. A function of a library
    counts by its name."""
    reader = _Reader()
    for name, one in (thing if isinstance(thing, Mapping) else {short(thing): thing}).items():
        text = reader.read(one)
        if text not in reader.found and not isinstance(one, Problem | Update | Partition | type):
            reader.found[name] = text
    return {name: hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16] for name, text in reader.found.items()}


class _Reader:
    """Makes texts of values; what is the user's own has one of its own in `found`, by name."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self.names: dict[int, tuple[str, Any]] = {}  # of functions and classes that were met; with them, so that they stay
        self.around: list[int] = []  # the ids of what is being read

    def read(self, value: Any) -> str:
        if isinstance(value, SCALARS):
            return self._scalar(value)
        if id(value) in self.names:
            return self.names[id(value)][0]
        if id(value) in self.around:
            return "..."
        self.around.append(id(value))
        try:
            return self._read(value)
        finally:
            self.around.pop()

    def _scalar(self, value: Any) -> str:
        path = PATH.fullmatch(value) if isinstance(value, str) else None
        if path and (code := _module_code(path[1])):
            self.found[path[1]] = code
        return repr(value)

    def _read(self, value: Any) -> str:
        if isinstance(value, dict):
            return f"{{{', '.join(f'{self.read(key)}: {self.read(one)}' for key, one in value.items())}}}"
        if isinstance(value, CONTAINERS):
            texts = [self.read(one) for one in value]
            return f"{type(value).__name__}({', '.join(sorted(texts) if isinstance(value, set | frozenset) else texts)})"
        if isinstance(value, functools.partial):
            return f"partial({self.read(value.func)}, {self.read(value.args)}, {self.read(value.keywords)})"
        if isinstance(value, MethodType):
            return f"{self.read(value.__self__)}.{self.read(value.__func__)}"
        if isinstance(value, property):
            return f"property({self.read(value.fget)}, {self.read(value.fset)})"
        if (inner := _unwrapped(value)) is not None:
            return f"{type(value).__name__}({self.read(inner)})"
        if isinstance(value, FunctionType | type):
            read = self._function if isinstance(value, FunctionType) else self._class
            return read(value) if _is_own(value) else short(value)
        if isinstance(value, Problem | Update | Partition):
            return self._labelled(type(value), self._arguments(value))
        if isinstance(value, Dataset):  # its samples are in the record of the problem; items of the user's own are code
            return self.read(getattr(value, "_own", None))
        if isinstance(value, nn.Module):  # what it is made of, without weights
            parts = [
                (name, type(one), one.extra_repr(), _settings(one) if _is_own(type(one)) else {})
                for name, one in value.named_modules()
            ]
            return f"module{self.read(parts)}"
        if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
            content = np.ascontiguousarray(value).view(np.uint8)
            return f"array{value.shape}, {value.dtype}, {hashlib.sha256(content).hexdigest()}"
        if isinstance(value, os.PathLike):
            return repr(os.fspath(value))
        if _is_own(type(value)):
            return self._labelled(type(value), _settings(value))
        return _title(value)

    def _labelled(self, cls: type, settings: Mapping[str, Any]) -> str:
        return f"{self.read(cls)}({self.read(settings)})"

    def _arguments(self, value: Any) -> dict[str, Any]:
        """What a problem or a rule was made with; of this the record of a search holds what JSON holds."""
        try:
            arguments = constructor_arguments(value)
        except LabError:
            return {}
        for name, one in arguments.items():
            if by_value(plain(one)) is not None and not isinstance(one, Dataset) and (text := self.read(one)) not in self.found:
                self.found[name] = self.found.get(name, "") + text
        return arguments

    def _name(self, value: Any) -> str:
        name = first = value.__qualname__.rpartition("<locals>.")[2]
        n = 1
        while name in self.found:
            name, n = f"{first} {n + 1}", n + 1
        self.found[name] = ""
        self.names[id(value)] = name, value
        return name

    def _function(self, function: FunctionType) -> str:
        name, codes = self._name(function), list(_codes(function.__code__))
        texts = [repr(_without_docstring(function)), self.read(function.__defaults__), self.read(function.__kwdefaults__)]
        for variable, value in self._named(function, codes):
            text = self.read(value)
            if variable in function.__globals__ and text == type(value).__qualname__:
                continue  # a lab or a run, say: another time it may not be there yet
            if isinstance(value, SCALARS | CONTAINERS):
                self.found[f"{name}: {variable}"] = text
            else:
                texts.append(f"{variable} = {text}")
        texts += [f"{module} = {code}" for module in _imported(codes) if (code := _module_code(module))]
        self.found[name] = "\n".join(texts)
        return name

    def _named(self, function: FunctionType, codes: list[CodeType]) -> Iterator[tuple[str, Any]]:
        """What a function closes over and the globals that it names, but for what it changes."""
        names = dict.fromkeys(name for code in codes for name in code.co_names)
        values = dict(zip(function.__code__.co_freevars, map(held, function.__closure__ or ()), strict=True))
        values |= {name: function.__globals__[name] for name in names if name in function.__globals__ and name not in values}
        changed, stores = _changes(codes)
        for name, value in values.items():
            if isinstance(value, ModuleType):
                own = names if is_own(value.__name__, value) else ()
                yield from ((f"{name}.{one}", vars(value)[one]) for one in own if one in vars(value))
            elif not (name in changed or name.startswith("__") or (stores and isinstance(value, list | dict | set))):
                yield name, value

    def _class(self, cls: type) -> str:
        name = self._name(cls)
        of = {own: value for own, value in sorted(vars(cls).items()) if not own.startswith("__") or isinstance(value, FunctionType)}
        bases = [self.read(base) for base in cls.__bases__]
        self.found[name] = "\n".join([*bases, *(f"{own} = {self.read(value)}" for own, value in of.items() if own != "_abc_impl")])
        return name


def _is_own(value: Any) -> bool:
    """Is a function or a class the user's own: of a cell, of a module of theirs, or made by a script that is no module?"""
    name = value.__module__ or ""
    return name in ("__main__", "__mp_main__") or name not in sys.modules or is_own(name, sys.modules[name])


def _title(value: Any) -> str:
    """What goes by its name: a function in C, or an object of a library by its class."""
    name = getattr(value, "__name__", None)
    return type(value).__qualname__ + f" {name}" * isinstance(name, str)


def _unwrapped(value: Any) -> Any:
    """The function in what decorates it; None elsewhere."""
    if isinstance(value, functools.cached_property):
        return value.func
    if isinstance(value, staticmethod | classmethod) or (callable(value) and not isinstance(value, FunctionType | type)):
        return getattr(value, "__wrapped__", None)
    return None


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A code and those within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _without_docstring(function: FunctionType) -> tuple:
    code = function.__code__
    has_one = bool(code.co_consts) and isinstance(code.co_consts[0], str) and code.co_consts[0] == function.__doc__
    return code_of(code.replace(co_consts=(None, *code.co_consts[1:])) if has_one else code)


def _changes(codes: list[CodeType]) -> tuple[set[str], bool]:
    """The names of what a function changes: which it stores, or calls a method of that changes a list, a dict or a set; and whether it
    stores an item into some."""
    changed, stores = set(), False
    for code in codes:
        before = None
        for step in dis.get_instructions(code):
            if step.opname in ("STORE_GLOBAL", "STORE_DEREF", "STORE_ATTR", "DELETE_GLOBAL"):
                changed.add(step.argval)
            elif step.argval in CHANGING and step.opname in ("LOAD_METHOD", "LOAD_ATTR") and before is not None:
                changed.add(before.argval)
            stores |= step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE")
            before = step
    return {name for name in changed if isinstance(name, str)}, stores


def _settings(value: Any) -> dict[str, Any]:
    """The attributes of an object that its methods do not change."""
    methods = {name: own for cls in type(value).__mro__ for name, own in vars(cls).items() if name != "__init__"}
    functions: list[Callable] = [own for own in methods.values() if isinstance(own, FunctionType)]
    changed, stores = _changes([code for function in functions for code in _codes(function.__code__)])
    cached = {name for name, own in methods.items() if isinstance(own, functools.cached_property)}
    return {
        name: own
        for name, own in sorted(getattr(value, "__dict__", {}).items())
        if name not in changed | cached and not (stores and isinstance(own, list | dict | set))
    }


def _imported(codes: list[CodeType]) -> Iterator[str]:
    """The modules that a function imports."""
    for code in codes:
        yield from imported_in(code)


def _module_code(name: str) -> str:
    """The code of a module of the user's own, whether it is loaded or not; "" for any other, and for what is no module."""
    try:
        module = sys.modules.get(name) or SimpleNamespace(__file__=importlib.util.find_spec(name.partition(".")[0]).origin)
        if not is_own(name, module):
            return ""
        source = find_source(name) if name in sys.modules else on_disk(name)
        return repr(code_of(compile(source.text, source.file, "exec", dont_inherit=True))) if source else ""
    except (ImportError, SyntaxError, ValueError, AttributeError):
        return ""
