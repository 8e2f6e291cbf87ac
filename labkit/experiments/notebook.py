"""One notebook and its parameters cell, read strictly.

A notebook of labkit has one cell tagged `parameters`, one literal a line with a type and a comment. papermill puts a
cell of new values behind it, and is lenient: it skips a line that it cannot read, sets a name that nobody has, turns a
tuple into text. So the cell and the values are checked here, before a kernel starts, and a message names the culprit.

Used as `labkit.parameters`, by `labkit.experiments.sweep`, `labkit.experiments.executor` and `python -m labkit sweep`.
"""

import ast
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any

from labkit.errors import SweepError, file_path
from labkit.locks import parsed

_importing = threading.Lock()
TYPES = {"int": int, "float": (int, float), "bool": bool, "str": str, "list": list, "tuple": list, "dict": dict}


@dataclass(frozen=True)
class Parameter:
    """A line of a parameters cell: `steps: int = 200  # optimiser steps` gives name, type, default (200) and help."""

    name: str
    type: str
    default: Any
    help: str = ""


def plain(value: Any, name: str, strict: bool = True) -> Any:
    """`value` in JSON types: tuples and arrays become lists, numpy scalars Python's, a `Path` an absolute path.

    What has no JSON form is a `SweepError` that names it; with `strict=False` it becomes text. nan and inf are fine.
    """
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, PurePath):
        return os.path.abspath(value)
    if isinstance(value, (list, tuple)):
        return [plain(item, name, strict) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {str.__str__(key): plain(item, name, strict) for key, item in value.items()}
    for way in ("item", "tolist"):  # arrays of numpy, torch and pandas; `item` where there is a single number
        if hasattr(value, way) and (way == "tolist" or getattr(value, "ndim", None) == 0):
            inner = getattr(value, way)()
            if type(inner) is not type(value):
                return plain(inner, name, strict)
    if not strict:
        return str(value)
    raise SweepError(
        f"{name!r} has a value of type {type(value).__name__}, which a notebook cannot be given. "
        "Use numbers, strings, True, False, None, and lists or dicts (with text keys) of these."
    )


def import_nbformat() -> ModuleType:
    """nbformat, for what imports it or papermill the first time: without the package by which its jsonschema could check a format that no
    notebook has, and whose grammars take 3 s of a core."""
    optional = "rfc3987_syntax"
    with _importing:  # notebooks are executed in threads
        is_hidden = "jsonschema" not in sys.modules and optional not in sys.modules
        if is_hidden:
            sys.modules[optional] = None
        try:
            import nbformat
        finally:
            if is_hidden:
                del sys.modules[optional]
    return nbformat


def load(notebook: str | os.PathLike[str]) -> dict:
    """The notebook as nbformat 4.5 without outputs: what is hashed, and what each run starts from."""
    nbformat = import_nbformat()
    path = file_path("notebook", notebook)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["nbformat"] != 4:
            raise SweepError(f"{path} has notebook format {content['nbformat']}; open and save it in JupyterLab first.")
        if content["nbformat_minor"] < 5:
            content = nbformat.v4.upgrade(nbformat.from_dict(content))
        cells, content["nbformat_minor"] = content["cells"], 5
        for number, cell in enumerate(cells):
            cell.setdefault("id", f"cell-{number}")
            cell.setdefault("metadata", {})
            cell["source"] = "".join(cell["source"])
            if cell["cell_type"] == "code":
                cell.update(outputs=[], execution_count=None)
    except FileNotFoundError:
        raise SweepError(f"there is no notebook {path}. The present folder is {Path.cwd()}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SweepError(f"{path} cannot be read as a notebook ({type(error).__name__}: {error}).") from error
    return json.loads(json.dumps(content))


def parameters(notebook: str | os.PathLike[str]) -> list[Parameter]:
    """The parameters of a notebook: the lines of its cell tagged `parameters`, in order.

    Raises
    ------
    SweepError
        There is no such cell, or a line in it is not `name = literal` or `name: type = literal`, or papermill, which
        does the setting, cannot read it (it skips a line with a second "=", silently).

    Examples
    --------
    >>> import nbformat
    >>> cell = nbformat.v4.new_code_cell("seed = 0\\nlr = 0.1", metadata={"tags": ["parameters"]})
    >>> nbformat.write(nbformat.v4.new_notebook(cells=[cell]), "train.ipynb")
    >>> [parameter.name for parameter in labkit.parameters("train.ipynb")]
    ['seed', 'lr']
    """
    return read_parameters(load(notebook), Path(notebook).name)


def read_parameters(content: dict, name: str) -> list[Parameter]:
    """`parameters` of a notebook that is loaded already."""
    nbformat = import_nbformat()
    import papermill

    tagged = [cell for cell in content["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    if not tagged:
        raise SweepError(
            f"{name} has no cell tagged 'parameters'. Give the cell that sets them this tag (in JupyterLab: the gear "
            "at the top right, Cell Tags)."
        )
    source = tagged[0]["source"]
    node = nbformat.from_dict(json.loads(json.dumps(content)))
    node.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python 3"}
    with quiet():
        known = papermill.inspect_notebook(node)
    try:
        tree = parsed(ast.parse, source)
    except SyntaxError as error:
        raise SweepError(f"{name}: line {error.lineno} of the parameters cell is not Python: {error.msg}.") from error
    found = []
    for statement in tree.body:
        line = f"{name}: line {statement.lineno} of the parameters cell, `{ast.get_source_segment(source, statement)}`,"
        match statement:
            case ast.Assign(targets=[ast.Name(id=variable)]) | ast.AnnAssign(target=ast.Name(id=variable)):
                pass
            case _:
                raise SweepError(f"{line} is not `name = literal`. Move it to the next cell.")
        try:
            default = ast.literal_eval(statement.value)
            plain(default, variable)
        except (ValueError, TypeError, SweepError):
            raise SweepError(
                f"{line} is not a literal. Use numbers, strings, True, False, None, lists and dicts; move what is "
                "computed to the next cell."
            ) from None
        if variable not in known:
            raise SweepError(
                f"{line} cannot be read by papermill, which would skip it. Write `{variable}: type = literal  # help` "
                "with a plain type and no second '=' in the line, its comment included."
            )
        kind = getattr(statement, "annotation", None)
        kind = ast.unparse(kind) if kind is not None else "Any" if default is None else type(default).__name__
        found.append(Parameter(variable, kind.strip("'\""), default, known[variable]["help"]))
    return found


def conform(value: Any, parameter: Parameter, notebook: str) -> Any:
    """`value` if it is of the parameter's type (an int given for a float becomes one), otherwise a `SweepError`."""
    if value is None and parameter.default is None:
        return None
    base, _, inner = parameter.type.removesuffix("]").partition("[")
    kind = TYPES.get(base.lower(), object)
    fits = isinstance(value, kind) and not (isinstance(value, bool) and base in ("int", "float"))
    if fits and base == "list" and inner in TYPES:
        value = [conform(item, Parameter(parameter.name, inner, parameter.default), notebook) for item in value]
    if not fits:
        raise SweepError(
            f"{notebook}: parameter {parameter.name!r} is {parameter.type} (default {parameter.default!r}), "
            f"and {value!r} is {type(value).__name__}."
        )
    try:
        return float(value) if base == "float" else value
    except OverflowError:  # an int of hundreds of digits
        raise SweepError(f"{notebook}: the value of parameter {parameter.name!r} is too large for a float.") from None


# -- quiet -------------------------------------------------------------------------------------------------------------

_LOGGERS = ("papermill", "papermill.translators", "papermill.utils", "traitlets")
_levels: dict[str, int] = {}
_inside = [0]
_lock = threading.Lock()


@contextmanager
def quiet() -> Iterator[None]:
    """papermill and traitlets log nothing; what they would log is in the exception. Several threads may be inside at once."""
    with _lock:
        _inside[0] += 1
        for name in _LOGGERS if _inside[0] == 1 else ():
            _levels[name] = logging.getLogger(name).level
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        with _lock:
            _inside[0] -= 1
            for name in _LOGGERS if _inside[0] == 0 else ():
                logging.getLogger(name).setLevel(_levels[name])
