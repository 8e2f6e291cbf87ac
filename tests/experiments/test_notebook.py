"""The parameters cell: what is read from it, what is refused by name, and what becomes of values.

No kernel is started.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from labkit.errors import SweepError
from labkit.experiments.notebook import Parameter, conform, parameters, plain, quiet
from tests.experiments.helpers import write


def test_parameters_are_read_with_type_default_and_help(tmp_path):
    found = parameters(write(tmp_path / "n.ipynb"))
    assert found[:3] == [
        Parameter("seed", "int", 0, "of everything"),
        Parameter("lr", "float", 0.1, "learning rate"),
        Parameter("sizes", "list[int]", [1, 2], ""),
    ]
    assert [(p.name, p.type) for p in found[3:]] == [("strategy", "str"), ("extra", "Any"), ("run_dir", "str")]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, "n.ipynb has no cell tagged 'parameters'"),
        ("a = 1\ns = 'a=b'", r"line 2 of the parameters cell, `s = 'a=b'`, cannot be read by papermill"),
        ("a: int = 1  # such that a=1", "second '=' in the line, its comment included"),
        ("a = 1; b = 2", "cannot be read"),
        ("a: int | None = 1", "cannot be read"),
        ("import os", r"`import os`, is not `name = literal`"),
        ("a = b = 1", "is not `name = literal`"),
        ("a, b = 1, 2", "is not `name = literal`"),
        ("a = 2\nb = a * 2", "line 2 .* is not a literal"),
        ("a = float('nan')", "is not a literal"),
        ("a: int", "is not a literal"),
        ("a = {1, 2}", "is not a literal"),
        ("a = 1 +", "line 1 of the parameters cell is not Python"),
    ],
)
def test_a_line_that_papermill_would_skip_is_named(tmp_path, cell, message):
    with pytest.raises(SweepError, match=message):
        parameters(write(tmp_path / "n.ipynb", first=cell))


def test_what_is_no_notebook_is_named(tmp_path):
    with pytest.raises(SweepError, match="there is no notebook"):
        parameters(tmp_path / "n.ipynb")
    for text in ("{", "[]", "{}", '{"nbformat": 3, "cells": []}', '{"nbformat": 4, "nbformat_minor": 5, "cells": [1]}'):
        (tmp_path / "n.ipynb").write_text(text)
        with pytest.raises(SweepError, match=r"cannot be read as a notebook|has notebook format 3"):
            parameters(tmp_path / "n.ipynb")


def test_values_become_json_types():
    class Name(str):
        pass

    given = (True, np.bool_(False), np.int8(3), Name("x"), [np.arange(2)], {"k": (None,)}, 2**80)
    assert plain(given, "v") == [True, False, 3, "x", [[0, 1]], {"k": [None]}, 2**80]
    assert json.loads(json.dumps(plain(given, "v"))) == plain(given, "v")
    for foreign in (object(), b"", {1, 2}, 1j, np.longdouble(1), {2: 3}, np.datetime64("2020-01-01")):
        with pytest.raises(SweepError, match="'v' has a value of type"):
            plain([foreign], "v")


def test_an_int_is_a_float_and_a_none_default_takes_anything():
    assert repr(conform(1, Parameter("x", "float", 0.1), "n")) == "1.0"
    assert conform("a", Parameter("x", "Any", None), "n") == "a"
    assert conform(None, Parameter("x", "int", None), "n") is None
    assert conform([1, 2], Parameter("x", "tuple", (1, 2)), "n") == [1, 2]
    with pytest.raises(SweepError):
        conform(None, Parameter("x", "int", 1), "n")


def test_quiet_is_undone_by_the_last_of_several_threads():
    level, inside, leave = logging.getLogger("papermill").level, threading.Event(), threading.Event()

    def stay():
        with quiet():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=stay)
    thread.start()
    inside.wait(60)
    with quiet():
        pass
    assert logging.getLogger("papermill").level > logging.CRITICAL
    leave.set()
    thread.join()
    assert logging.getLogger("papermill").level == level


def test_in_a_fresh_process_a_notebook_is_read_without_the_grammars_of_formats_that_it_has_not(tmp_path):
    path = str(write(tmp_path / "n.ipynb"))
    code = f"import sys, labkit; labkit.parameters({path!r}); print('rfc3987_syntax' in sys.modules, 'papermill' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=Path(__file__).parents[2])
    assert ran.stdout.split() == ["False", "True"], ran.stderr
