"""`labkit/imports.py`: how an object is recorded as JSON, and found again by name or import path.

(`test_imports.py` is about who imports whom.)
"""

from __future__ import annotations

import json
import types
from pathlib import Path

import numpy as np
import pytest

import labkit
from labkit.errors import PartitionError, ProblemError, UpdateError
from labkit.imports import by_value, constructor_arguments, import_path, imported, is_same, plain, rule_title, short
from labkit.partition import make_partition
from labkit.updates import make_update


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


def test_constructor_arguments():
    assert constructor_arguments(Child(3, a=1)) == {"c": 3, "a": 1, "b": 2}
    with pytest.raises(ProblemError, match=r"Forgetful does not store its argument 'd'. Write self.d = d"):
        constructor_arguments(Forgetful(4, c=3, a=1))


def test_plain_is_json():
    value = plain({"a": (1, np.float32(0.5), Path("x")), 2: None, "f": len})
    assert json.loads(json.dumps(value)) == {"a": [1, 0.5, "x"], "2": None, "f": {"by_value": "len"}}
    assert by_value(value) == "len" and by_value(plain({"a": [1, [{"b": len}]]})) == "len"
    assert by_value({"a": [1, "b"], "c": None}) is None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"by_value": "net"}, "train:net", True),
        ([{"name": {"by_value": "net"}, "k": 1}], [{"name": "train:net", "k": 1}], True),
        ({"by_value": "net"}, "train:other", False),
        ({"by_value": "net"}, "net", False),  # a name of labkit's
        ("a:net", "b:net", False),
        ({"by_value": "net"}, {"by_value": "other"}, False),
        ({"name": "train:net", "k": 1}, {"name": {"by_value": "net"}, "k": 2}, False),
    ],
)
def test_a_function_of_a_script_is_the_one_that_is_imported_from_it(one, other, same):
    assert is_same(one, other) is same and is_same(other, one) is same


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


# -- updates and partitions of the user's own --------------------------------------------------------------------------


class Halved(labkit.AGWU):
    """Has no name of its own: it must not be taken for AGWU."""

    def __init__(self, share=0.5, **options):
        super().__init__(**options)
        self.share = share


class Biased(labkit.UDPA):
    def __init__(self, bias=(1.0, 2.0), *, stratified=False):
        super().__init__(stratified=stratified)
        self.bias = bias


class Nameless(labkit.updates.Update):
    def __init__(self, lr):
        pass


def defined_in_a_notebook(base):
    cell = {"__name__": "__main__", "base": base}
    exec("class Mine(base):\n    pass", cell)
    return cell["Mine"]


@pytest.mark.parametrize(
    ("rule", "make", "settings"),
    [
        (Halved(share=np.float32(0.25), quality="raw"), make_update, {"share": 0.25, "quality": "raw"}),
        (Biased(bias=(1, 3)), make_partition, {"bias": [1, 3], "stratified": False}),
    ],
)
def test_a_class_of_the_users_own_is_recorded_by_import_path(rule, make, settings):
    config = json.loads(json.dumps(rule.config()))
    assert config == {"name": f"{__name__}:{type(rule).__name__}", **settings} and rule_title(config) == type(rule).__name__
    again = make(config)
    assert type(again) is type(rule) and again.config() == config
    assert type(make(config["name"])) is type(rule)


@pytest.mark.parametrize(("base", "make"), [(labkit.AGWU, make_update), (labkit.IDPA, make_partition)])
def test_a_class_of_a_notebook_is_recorded_by_name_alone(base, make):
    config = defined_in_a_notebook(base)().config()
    assert config == {**base().config(), "name": {"by_value": "Mine"}} and rule_title(config) == "Mine"
    with pytest.raises(ValueError, match=r"'Mine' cannot be imported. Give the object itself, or put its class into a module"):
        make(config)


def test_labkit_s_own_are_recorded_by_their_names():
    assert labkit.AGWU().config() == {"name": "agwu", "quality": "normalised"} and rule_title({"name": "agwu"}) == "agwu"
    assert labkit.UDPA(stratified=True).config() == {"name": "udpa", "stratified": True}
    assert labkit.IDPA(3).config() == {"name": "idpa", "batches": 3, "speeds": None, "smoothing": 5, "stratified": False}


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: make_update("no_such:Mine"), ValueError, "no module 'no_such' can be imported"),
        (lambda: make_update(f"{__name__}:Halve"), ValueError, "Did you mean 'Halved'"),
        (lambda: make_update("labkit:UDPA"), ValueError, "update='labkit:UDPA' is not a class derived from labkit's Update"),
        (lambda: make_partition("json:dumps"), ValueError, "is not a class derived from labkit's Partition"),
        (lambda: make_update({"name": f"{__name__}:Halved", "shore": 1}), ValueError, r"has no setting 'shore'. It has: share"),
        (lambda: make_partition({"name": "idpa", "batch": 1}), ValueError, "idpa has no setting 'batch'.*Did you mean 'batches'"),
        (lambda: make_update("mine"), ValueError, 'named by its import path: "my_module:MyUpdate"'),
        (lambda: Nameless(3).config(), UpdateError, "Nameless does not store its argument 'lr'"),
        (lambda: type("P", (Biased,), {"__init__": lambda self, x: None})(3).config(), PartitionError, "argument 'x'"),
    ],
)
def test_what_cannot_be_recorded_or_found_is_refused_with_the_reason(make, error, words):
    with pytest.raises(error, match=words):
        make()
