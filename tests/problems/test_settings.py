"""Settings: refused with the values and the known ones, kept as JSON, found again by import path."""

from __future__ import annotations

import json
import math
import types
from pathlib import Path

import numpy as np
import pytest

from labkit.errors import ProblemError, known, real, whole
from labkit.imports import import_path, imported, short
from labkit.problems.settings import by_value, kept_arguments, plain


def test_known():
    assert known("optimiser", "sgd", ("sgd", "adam")) == "sgd"
    with pytest.raises(ValueError, match=r"optimiser='adm' is not known. Known: sgd, adam. Did you mean 'adam'\?"):
        known("optimiser", "adm", ("sgd", "adam"))
    with pytest.raises(ValueError, match=r"a=1 is not known. Known: \(none\).$"):
        known("a", 1, ())


def test_whole():
    assert whole("n", np.int64(3)) == 3 and type(whole("n", np.int64(3))) is int
    for bad, error in ((0, ValueError), (2.0, TypeError), (True, TypeError), ("3", TypeError), (None, TypeError)):
        with pytest.raises(error, match="n="):
            whole("n", bad)


def test_real():
    assert real("lr", np.float32(0.5), above=0) == 0.5 and real("m", 0, least=0, below=1) == 0.0
    with pytest.raises(ValueError, match="lr=0 must be above 0 and finite"):
        real("lr", 0, above=0)
    with pytest.raises(ValueError, match="m=1 must be at least 0 and below 1"):
        real("m", 1, least=0, below=1)
    for bad, error in ((math.nan, ValueError), (math.inf, ValueError), (True, TypeError), ("0.1", TypeError)):
        with pytest.raises(error, match="lr="):
            real("lr", bad, above=0)


class Base:
    def __init__(self, a, *, b=2):
        self.a, self.b = a, b


class Child(Base):
    def __init__(self, c, **common):
        super().__init__(**common)
        self.c = c


class Forgetful(Child):
    def __init__(self, d, **common):
        super().__init__(**common)


def test_kept_arguments():
    assert kept_arguments(Child(3, a=1)) == {"c": 3, "a": 1, "b": 2}
    with pytest.raises(ProblemError, match=r"Forgetful does not keep its argument 'd'. Write self.d = d"):
        kept_arguments(Forgetful(4, c=3, a=1))


def test_plain_is_json():
    value = plain({"a": (1, np.float32(0.5), Path("x")), 2: None, "f": len})
    assert json.loads(json.dumps(value)) == {"a": [1, 0.5, "x"], "2": None, "f": {"by_value": "len"}}
    assert by_value(value) == "len" and by_value(plain({"a": [1, [{"b": len}]]})) == "len"
    assert by_value({"a": [1, "b"], "c": None}) is None


def test_import_path_and_back():
    assert import_path(Child) == f"{__name__}:Child" and imported(f"{__name__}:Child") is Child
    assert imported("pathlib:Path.cwd") == Path.cwd
    assert import_path(lambda: 1)["by_value"].endswith("<lambda>")
    here = types.FunctionType(short.__code__, {"__name__": "__main__"}, "net")
    assert here.__module__ == "__main__" and import_path(here) == {"by_value": here.__qualname__}


def test_imported_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(ProblemError, match=r"no module 'no_such\.module' can be imported"):
        imported("no_such.module:f")
    with pytest.raises(ProblemError, match=r"'pathlib' has no 'Pth'\. Did you mean 'P"):
        imported("pathlib:Pth")
    with pytest.raises(ProblemError, match="'pathlib' has no ''"):
        imported("pathlib:")
    (tmp_path / "needs_more.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        imported("needs_more:f")


def test_short():
    assert short(len) == "len" and short("x" * 99) == "'" + "x" * 76 + "..."
