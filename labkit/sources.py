"""The source of users' modules: what this kernel has loaded is what the other processes of a run import.

    kernel    pack(thing)  -> Packed: its pickle, and the text of each module of the user's own that it needs
    worker    unpickled    -> modules whose text here is another one are dropped; what is imported then comes from the texts sent

A module of the user's own is a .py file outside of Python, of site-packages and of labkit. Which ones a thing needs is read from the
names in its pickle and from the import statements in those modules.

Python does not retain the text that a module was loaded from. It is read when labkit first sees the module after it was loaded or
reloaded, and compared with the functions and constants that the module holds, with what it has taken from others that were reloaded
since, and with the bytecode that Python wrote: where the file was edited and not reloaded, or a cell has changed the module, that is a
ClusterError with the file's name. What a cell changes within a list, a dict or an object is not noticed; nor are values that were
computed in an edited file where Python writes no bytecode. In threads of the kernel there is nothing to send.

Used by `labkit.cluster.lab`, by `labkit.training.supervisor` for the server and for workers that come late, and wherever the record
of a run holds the digests of what was trained.
"""

import ast
import dis
import functools
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import linecache
import marshal
import os
import pickle
import re
import sys
import sysconfig
import threading
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import cloudpickle

from labkit.errors import ClusterError, LabError, WorkerError, traceback_of
from labkit.locks import parsed

PLAIN = (bool, int, float, complex, str, bytes, tuple, type(None))
PROCESS = uuid.uuid4().hex  # of this process
SIMPLE = int | float | complex | str | bytes | tuple | list | dict | set | frozenset | None
_Cached = type(functools.cache(lambda: None))


@dataclass(frozen=True)
class Source:
    """The text of one module."""

    name: str
    file: str
    text: str
    is_package: bool = False
    fixed: bool = False  # it belongs to a C extension, which a process cannot load twice

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


# -- in the kernel: which modules, and what is in them -----------------------------------------------------------------

# By module, with whether its bytecode is that of another text; reloading makes a new spec.
_seen: dict[str, tuple[importlib.machinery.ModuleSpec, Source, bool]] = {}


def find_source(name: str) -> Source | None:
    """What a module of the user's own was loaded from; None where it is not loaded, or is none."""
    module, spec = sys.modules.get(name), getattr(sys.modules.get(name), "__spec__", None)
    if not is_own(name, module) or spec is None:
        return None
    if name not in _seen or _seen[name][0] is not spec:
        try:
            if isinstance(spec.loader, Sent):
                text = spec.loader.get_source(name)
            else:
                text = importlib.util.decode_source(Path(module.__file__).read_bytes())
        except (OSError, SyntaxError, UnicodeDecodeError):
            return None
        source = Source(name, module.__file__, text, hasattr(module, "__path__"), _has_extension(name))
        _seen[name] = spec, source, _has_other_bytecode(spec, source)
    return _seen[name][1]


def _has_other_bytecode(spec: importlib.machinery.ModuleSpec, source: Source) -> bool:
    """Is what Python wrote beside the file when it last loaded it, here or in another process, the bytecode of another text?"""
    if type(spec.loader) is not importlib.machinery.SourceFileLoader:
        return False
    try:
        written = Path(spec.cached)
        if sys.dont_write_bytecode or not all(os.access(path, os.W_OK) for path in (written, written.parent)):
            return False  # it may be older
        content = written.read_bytes()
        return (
            content[:4] == importlib.util.MAGIC_NUMBER
            and _comparable(marshal.loads(content[16:])) != _compiled(source)["<module>"][0]
        )
    except (OSError, TypeError, ValueError, EOFError, SyntaxError):
        return False


def is_own(name: str, module: ModuleType | None) -> bool:
    file = getattr(module, "__file__", None)
    if not isinstance(file, str) or not file.endswith(".py") or name in ("__main__", "__mp_main__"):
        return False
    return name.partition(".")[0] not in _others() and not file.startswith(_folders()) and "-packages/" not in Path(file).as_posix()


@functools.cache
def _folders() -> tuple[str, ...]:
    """Where Python is."""
    return tuple({sysconfig.get_path(path) + "/" for path in ("stdlib", "platstdlib")})


@functools.cache
def _others() -> frozenset[str]:
    """labkit and what it stands on: never the user's own, also where somebody works on them."""
    try:
        needed = metadata.requires("labkit") or []
    except metadata.PackageNotFoundError:
        needed = ["torch", "numpy", "dask", "ipyparallel", "cloudpickle"]
    return frozenset({"labkit", "distributed", *(re.match(r"[\w.-]+", line)[0].replace("-", "_") for line in needed)})


def _has_extension(name: str) -> bool:
    top, endings = name.partition(".")[0], tuple(importlib.machinery.EXTENSION_SUFFIXES)
    modules = (module for other, module in list(sys.modules.items()) if other.startswith(f"{top}."))
    return any(str(getattr(module, "__file__", "")).endswith(endings) for module in modules)


def needed(*things: Any) -> dict[str, Source]:
    """By name, the modules of the user's own without which `things` cannot be used elsewhere; none where they cannot be pickled."""
    if (pickled := _pickled(things)) is None:
        return {}
    paths = {match.decode() for match in re.findall(rb"([A-Za-z_][\w.]*):[A-Za-z_]", pickled.file.getbuffer())}  # "my_module:Mine"
    found, todo = {}, [*pickled.names, *paths]
    while todo:
        name = todo.pop()
        if name not in found and (source := find_source(name)):
            found[name] = source
            todo += [".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 1)]
            todo += _imports(source)
    return found


class _Pickler(cloudpickle.Pickler):
    """Notes the modules of what it pickles, also those that functions import which travel by value; and what these are."""

    def __init__(self, things: tuple) -> None:
        self.file = io.BytesIO()
        super().__init__(self.file, protocol=5, buffer_callback=lambda _: None)  # names alone: arrays are left out
        self.things = things
        self.names: set[str] = set()
        self.values: list[str] = []  # what travels by value: code, constants, settings of objects
        self.dump(things)

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, ModuleType):
            self.names.add(obj.__name__)
        elif isinstance(obj, CodeType):
            self.names |= set(imported_in(obj))
        else:
            self.names.add(str(getattr(obj, "__module__", "")))
        reduced = super().reducer_override(obj)
        if isinstance(obj, FunctionType) and reduced is not NotImplemented:
            self.values.append(_content(obj))
        elif not isinstance(obj, type) and not any(obj is thing for thing in self.things):  # settings of those are in the record
            self.values += [f"{name}={value!r}" for name, value in _settings(obj).items() if isinstance(value, PLAIN)]
        return reduced


def _pickled(things: tuple) -> _Pickler | None:
    try:
        return _Pickler(things)
    except Exception:  # whoever sends them says why
        return None


def _settings(obj: Any) -> dict[str, Any]:
    return {} if type(obj).__module__.startswith("labkit.") else getattr(obj, "__dict__", {})


def _content(function: FunctionType) -> str:
    """The code of a function, and the plain values that it holds or reads: defaults, those of the functions around it, globals."""
    code, names = function.__code__, function.__code__.co_freevars
    inside = dict(zip(names, map(held, function.__closure__ or ()), strict=True))
    inside |= {name: function.__globals__[name] for name in code.co_names if name in function.__globals__}
    values = {name: value for name, value in inside.items() if isinstance(value, PLAIN)}
    return repr((code_of(code), function.__defaults__ and list(map(_plain, function.__defaults__)), sorted(values.items())))


def code_of(code: CodeType) -> tuple:
    """A code without where it stands, the same in each process."""
    constants = [code_of(each) if isinstance(each, CodeType) else _plain(each) for each in code.co_consts]
    return code.co_code.hex(), code.co_names, code.co_varnames, constants


def _plain(value: Any) -> str:
    return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value if isinstance(value, PLAIN) else type(value))


def held(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def imported_in(code: CodeType) -> Iterator[str]:
    module = ""
    for step in dis.get_instructions(code):
        if step.opname == "IMPORT_NAME":
            yield (module := step.argval)
        elif step.opname == "IMPORT_FROM":
            yield f"{module}.{step.argval}"


def _parsed(source: Source) -> ast.Module:
    return parsed(ast.parse, source.text)


@functools.lru_cache(1024)
def _imports(source: Source) -> tuple[str, ...]:
    """What may be modules among the names that its statements import, also inside functions, and among its strings."""
    package, found = source.name if source.is_package else source.name.rpartition(".")[0], set()
    for node in ast.walk(_parsed(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(source, node)
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 100:
            found |= {node.value, f"{package}.{node.value}"}  # importlib.import_module(...)
    return tuple(found)


def _absolute(source: Source, node: ast.ImportFrom) -> str:
    """The module of `from .module import ...`."""
    package = (source.name if source.is_package else source.name.rpartition(".")[0]).split(".")
    parts = package[: len(package) - node.level + 1] if node.level else []
    return ".".join([*parts, *filter(None, [node.module])])


def edited(sources: Mapping[str, Source]) -> dict[str, str]:
    """What differs between these texts and the loaded modules: {module: name of a function or constant}."""
    by_file, found, outdated = {source.file: source for source in sources.values()}, {}, {}
    for name, source in sources.items():
        module = sys.modules[name]
        if not isinstance(module.__spec__.loader, importlib.abc.SourceLoader | Sent):
            continue  # a loader that changes what it loads, as pytest's does
        for function in _functions(vars(module).values(), sources):  # also what it has of a module that was reloaded since
            if function.__module__ == "__main__":
                found.setdefault(name, function.__name__)
            own, code = by_file.get(function.__code__.co_filename), function.__code__
            if own and _comparable(code) not in _compiled(own).get(code.co_qualname, ()):
                (found if own is source else outdated).setdefault(name, code.co_qualname)
        for constant, value in _constants(source).items():
            if not _alike(vars(module).get(constant), value):
                found.setdefault(name, constant)
        for what, held, now in _of_others(module, source, sources):
            if not _alike(held, now):
                outdated.setdefault(name, what)
        if _seen[name][2]:
            found.setdefault(name, "code outside of its functions")
    return found | {
        name: what for name, what in outdated.items() if name not in found
    }  # whoever has something of these comes after


def _functions(values: Iterable[Any], sources: Mapping[str, Source], inside: bool = False) -> Iterator[FunctionType]:
    """The functions among `values`, and the methods of the classes there, and of their bases, that come from these modules, or were
    put there by a cell."""
    for value in list(values):
        if isinstance(value, property):
            value = value.fget
        elif isinstance(value, staticmethod | classmethod):
            value = value.__func__
        while isinstance(value, FunctionType | _Cached) and hasattr(value, "__wrapped__"):
            value = value.__wrapped__
        if isinstance(value, FunctionType):
            yield value
        elif isinstance(value, type) and not inside and value.__module__ in {*sources, "__main__"}:
            for kind in value.__mro__:
                if kind.__module__ in {*sources, "__main__"}:
                    yield from _functions(vars(kind).values(), sources, inside=True)


def _of_others(module: ModuleType, source: Source, sources: Mapping[str, Source]) -> Iterator[tuple[str, Any, Any]]:
    """What a module has of others (imported names, and bases of its classes), and what these hold under that name now."""
    for own, (other, theirs) in _taken(source).items():
        if other in sources and theirs not in _rebound(sources[other]) and theirs in vars(sys.modules[other]):
            yield own, vars(module).get(own), vars(sys.modules[other])[theirs]
    for own, value in list(vars(module).items()):
        if isinstance(value, type) and value.__module__ == source.name:
            for base in value.__mro__[1:]:
                if base.__module__ in sources and base.__name__ in vars(sys.modules[base.__module__]):
                    yield own, base, vars(sys.modules[base.__module__])[base.__name__]


def _alike(held: Any, now: Any, deep: bool = True) -> bool:
    """Are two values of one name equal, as far as plain values tell? Of a function these are its defaults and what it closes over, of
    a class or an object its attributes."""
    if held is now:
        return True
    if isinstance(held, SIMPLE) or isinstance(now, SIMPLE):
        try:
            return type(held) is type(now) and bool(held == now or held != held)
        except Exception:  # arrays in a tuple, say
            return True
    if not deep or type(held).__qualname__ != type(now).__qualname__:
        return True
    held, now = _within(held), _within(now)
    return all(_alike(held[name], now[name], deep=isinstance(held[name], FunctionType)) for name in held if name in now)


def _within(value: Any) -> dict[str, Any]:
    if isinstance(value, FunctionType):
        cells = {f"cell {at}": cell.cell_contents for at, cell in enumerate(value.__closure__ or ()) if cell != CellType()}
        return {"defaults": value.__defaults__, "by name": value.__kwdefaults__, **cells}
    return {name: each for name, each in list(getattr(value, "__dict__", {}).items()) if not name.startswith("__")}


def _comparable(code: CodeType) -> CodeType:
    """A code without the lines and the file that it stands in."""
    constants = tuple(_comparable(each) if isinstance(each, CodeType) else each for each in code.co_consts)
    return code.replace(co_firstlineno=1, co_linetable=b"", co_filename="", co_consts=constants)


@functools.lru_cache(1024)
def _compiled(source: Source) -> dict[str, list[CodeType]]:
    """All code in a text, by the name of its function."""
    found, todo = {}, [compile(source.text, source.file, "exec", dont_inherit=True)]
    while todo:
        code = todo.pop()
        found.setdefault(code.co_qualname, []).append(_comparable(code))
        todo += [each for each in code.co_consts if isinstance(each, CodeType)]
    return found


@functools.lru_cache(1024)
def _constants(source: Source) -> dict[str, Any]:
    """Numbers, strings and tuples of these that a module is given once, in its own lines: RATE = 0.1."""
    rebound, found = _rebound(source), {}
    for node in _parsed(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        for name in [target.id for target in targets if isinstance(target, ast.Name)]:
            try:
                value = ast.literal_eval(node.value)
            except (ValueError, TypeError, SyntaxError, MemoryError):
                continue
            if isinstance(value, int | float | complex | str | bytes | tuple) and name not in rebound and "*" not in rebound:
                found[name] = value
    return found


@functools.lru_cache(1024)
def _taken(source: Source) -> dict[str, tuple[str, str]]:
    """By name, what a module has taken from another one at its top: {"RATE": ("settings", "RATE")}."""
    rebound, found = _rebound(source), {}
    for node in _parsed(source).body:
        if isinstance(node, ast.ImportFrom):
            module = _absolute(source, node)
            found |= {alias.asname or alias.name: (module, alias.name) for alias in node.names}
    return {name: where for name, where in found.items() if name not in rebound}


@functools.lru_cache(1024)
def _rebound(source: Source) -> frozenset[str]:
    """The names that a module may give several values: assigned or imported more than once, or global in a function."""
    nodes = list(ast.walk(_parsed(source)))
    times = Counter(node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load))
    times.update(
        alias.asname or alias.name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names
    )
    found = {name for node in nodes if isinstance(node, ast.Global) for name in node.names}
    return frozenset(found | {name for name, n in times.items() if n > 1 or name == "*"})


def check(sources: Mapping[str, Source]) -> None:
    """ClusterError where the kernel holds something else than these texts."""
    for name, what in edited(sources).items():
        raise ClusterError(
            f"{sources[name].file} is not what this kernel has loaded: {what!r} is another one there, and workers would import the "
            f"file. Load it again, importlib.reload({name}) or a new kernel, and make what comes from it again."
        )


# -- on the way --------------------------------------------------------------------------------------------------------


class Packed:
    """Something with the texts of the modules that it needs, as they were when it was packed; unpickled it is the thing itself."""

    def __init__(self, sources: Mapping[str, Source], pickled: bytes) -> None:
        self.sources, self.pickled = dict(sources), pickled

    def __reduce__(self) -> tuple:
        return _unpack, (PROCESS, self.sources, self.pickled)


class PackedCall:
    """A function and its arguments as bytes, so that nobody on the way (Dask's scheduler) needs what they need.

    What cannot be sent, there or back, is an error of labkit, whatever the back end would make of it.
    """

    def __init__(self, name: str, pickled: bytes, here: bool) -> None:
        self.__name__, self.pickled, self.here = name, pickled, here

    def __call__(self) -> Any:
        """What the function returns; in another process than its caller's as `Returned`."""
        fault: Exception | None = None
        try:
            fn, args = pickle.loads(self.pickled)
        except LabError:
            raise
        except Exception as error:
            fault = ClusterError(f"{self.__name__}() or what it is given cannot be loaded on a worker ({_told(error)}).")
        if fault is None:
            try:
                made = fn(*args)
            except Exception as error:
                if not unpicklable(error):
                    raise
                fault = WorkerError(f"{self.__name__}() failed: {_told(error)}", None, traceback_of(error))
        if fault is None and not self.here:
            try:
                made = Returned(dumped(made))
            except Exception as error:
                fault = ClusterError(f"what {self.__name__}() returned cannot be sent back ({_told(error)}). Return plain values.")
        if fault:
            raise fault  # out here it does not hold the other one, which could not be sent either
        return made


class Returned:
    """What a function has returned in another process, as bytes."""

    def __init__(self, pickled: bytes) -> None:
        self.pickled = pickled

    def value(self) -> Any:
        return pickle.loads(self.pickled)


def unpicklable(thing: Any) -> str:
    """Why another process would not get `thing`; "" where it would."""
    try:
        pickle.loads(dumped(thing))
    except Exception as error:
        return _told(error)
    return ""


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def pack(thing: Any) -> Any:
    """`thing` for another process: `Packed` if it needs modules of the user's own, else as it is.

    ClusterError where the kernel holds something else than their files.
    """
    check(sources := needed(thing))
    return Packed(sources, dumped(thing)) if sources else thing


def pack_call(fn: Any, args: tuple, here: bool = False) -> PackedCall:
    """A call for a worker, in this process if it is `here`: function and arguments. What was packed before stays as it was.

    ClusterError where they cannot be sent.
    """
    name = getattr(fn, "__name__", "task")
    try:
        return PackedCall(name, dumped((fn, args) if here or _has_packed(args) else pack((fn, args))), here)
    except LabError:
        raise
    except Exception as error:
        raise ClusterError(
            f"{name}() or what it is given cannot be sent to a worker ({_told(error)}). Make locks, files, generators and "
            "connections in the function, where they are used."
        ) from error


class _Located(cloudpickle.Pickler):
    """Code that travels by value keeps the name of its file or cell, and the text of it: so tracebacks show the user's own lines."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.DEFAULT_PROTOCOL)
        self.texts: dict[str, tuple[str, str]] = {}

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, CodeType):
            return super().reducer_override(obj)
        if obj.co_filename not in self.texts:
            self.texts[obj.co_filename] = _cell(obj.co_filename), "".join(linecache.getlines(obj.co_filename))
        _, arguments = self.dispatch_table[CodeType](obj)
        return located, (arguments, *self.texts[obj.co_filename])


def dumped(thing: Any) -> bytes:
    """The pickle of a thing; what it holds by value is found in tracebacks again."""
    with io.BytesIO() as file:
        _Located(file).dump(thing)
        return file.getvalue()


def located(arguments: tuple, file: str, text: str) -> CodeType:
    """A code from the arguments of its constructor, which was read from `file`; where that is not there, tracebacks take `text`."""
    if text and not os.path.exists(file):
        linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
    return CodeType(*arguments).replace(co_filename=file)


def _cell(file: str) -> str:
    """The name of a file in tracebacks: "Cell In[3]" for what a notebook holds, as IPython says."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    named = getattr(getattr(shell, "compile", None), "format_code_name", lambda _: None)(file)
    return " ".join(named) if named else file


def _has_packed(value: Any) -> bool:
    return isinstance(value, Packed) or (isinstance(value, tuple | list) and any(map(_has_packed, value)))


# -- on the worker -----------------------------------------------------------------------------------------------------


class Sent(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds and loads the modules whose texts were sent to this process."""

    def __init__(self) -> None:
        self.sources: dict[str, Source] = {}
        self.lock = threading.RLock()

    def use(self, sources: Mapping[str, Source]) -> None:
        """What is imported from now on has these texts. Modules that have others are dropped, with all that were sent before, as
        they may hold something of them."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        if all(self.sources.get(name) == source for name, source in sources.items()):
            return
        for name, source in sources.items():
            here = self.sources.get(name) or find_source(name)
            if source.fixed and here and here.digest != source.digest:
                raise ClusterError(
                    f"{source.file} has changed, and this process has loaded the one before, with a C extension that cannot be loaded "
                    "twice. Close the lab and connect() again."
                )
        for name in {*self.sources, *sources}:
            if not (sources.get(name) or self.sources[name]).fixed:
                sys.modules.pop(name, None)
        self.sources = dict(sources)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        source = self.sources.get(name)
        return source and importlib.util.spec_from_file_location(name, source.file, loader=self)

    def is_package(self, name: str) -> bool:
        return self.sources[name].is_package

    def get_source(self, name: str) -> str:
        return self.sources[name].text

    def get_code(self, name: str) -> CodeType:
        return compile(self.sources[name].text, self.sources[name].file, "exec", dont_inherit=True)


_sent = Sent()


def _unpack(process: str, sources: Mapping[str, Source], pickled: bytes) -> Any:
    if process == PROCESS:  # it has not left
        return pickle.loads(pickled)
    with _sent.lock:
        _sent.use(sources)
        return pickle.loads(pickled)


# -- in the record -----------------------------------------------------------------------------------------------------


def digests(sources: Mapping[str, Source], **values: Any) -> dict[str, str]:
    """The SHA-256 of each text, by module; "" where the kernel holds something else than the file, which the record cannot name.

    Of `values` by name (problem, update, ...) that of what travels by value, such as a function of a notebook, under "<problem>".
    """
    other = edited(sources)
    found = {name: "" if name in other else source.digest for name, source in sorted(sources.items())}
    return found | {f"<{name}>": digest for name, value in values.items() if (digest := _digest_of_values(value))}


def changed(recorded: Mapping[str, str], **values: Any) -> list[str]:
    """The files of those modules whose text is not the recorded one, the name of the module where it is not found; and of `values` (as of
    `digests`) those of which something that travels by value is another one."""
    found = []
    for name, digest in recorded.items():
        if name.startswith("<"):
            now = _digest_of_values(values.get(name[1:-1]))
            if now and now != digest and now.partition(":")[0] == digest.partition(":")[0]:
                found.append(f"what was written in a notebook for its {name[1:-1]}")
            continue
        source = find_source(name) if name in sys.modules else on_disk(name)
        if source is None or source.digest != digest or (name in sys.modules and edited({name: source})):
            found.append(source.file if source else name)
    return found


def _digest_of_values(thing: Any) -> str:
    """Of the functions and objects that travel by value with a thing, with the version of Python that compiled them; "" without any."""
    pickled = _pickled((thing,))
    if thing is None or pickled is None or not pickled.values:
        return ""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"{version}:{hashlib.sha256(chr(10).join(pickled.values).encode()).hexdigest()}"


def on_disk(name: str) -> Source | None:
    """What a module would be loaded from; nothing is loaded but the packages that it is in."""
    try:
        file = importlib.util.find_spec(name).origin
        return Source(name, file, importlib.util.decode_source(Path(file).read_bytes()))
    except (ImportError, AttributeError, TypeError, ValueError, OSError, SyntaxError):
        return None
