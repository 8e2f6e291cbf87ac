"""The examples of the public docstrings: each name has one, and what it says comes out.

Tests the docstrings of what `labkit/__init__.pyi` names, after the lines that `docs/build.py` puts before the reference.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import sys

import numpy as np
import pytest
import torch

import labkit
from tests.test_docs import build  # noqa: F401, a fixture

NEEDED = {"jets.generate": "pythia8mc", "jets.events": "fastjet", "jets.to_awkward": "vector"}  # the extra `jets`
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def public() -> list[str]:
    """Public names of `labkit` and of its packages that have a docstring of their own."""
    names = [name for name in labkit.__all__ if not name.startswith("_")]
    for package in [name for name in names if inspect.ismodule(getattr(labkit, name))]:
        names += [f"{package}.{own}" for own in importlib.import_module(f"labkit.{package}").__all__ if own not in names]
    return [name for name in names if callable(found(name))]


def found(name: str) -> object:
    thing = labkit
    for part in name.split("."):
        thing = getattr(thing, part)
    return thing


class Checker(doctest.OutputChecker):
    """What is printed on the way to a value, such as progress, is not part of an example."""

    def check_output(self, want: str, got: str, options: int) -> bool:
        n_lines = len(want.splitlines())
        return super().check_output(want, "".join(got.splitlines(keepends=True)[-n_lines:]) if n_lines else "", options)


NAMES = public()


@pytest.fixture(scope="module")
def before(build, tmp_path_factory):  # noqa: F811
    """What the reference says is there before each example."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("examples"))
        names: dict[str, object] = {}
        exec(compile(build.BEFORE, "docs/build.py", "exec"), names)
        yield names
        names["lab"].close()


@pytest.mark.parametrize("name", NAMES)
def test_each_public_name_has_an_example(name):
    assert ">>> " in (found(name).__doc__ or ""), f"labkit.{name} has no example in its docstring"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_what_an_example_says_comes_out(name, before, monkeypatch, tmp_path):
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    if name in ("chaos.fill_disk", "chaos.free_disk") and sys.platform != "linux":
        pytest.skip("a full disk is made with prlimit(), which only Linux has")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0), np.random.seed(0)
    if before["lab"].closed:  # by an example with a lab of its own
        before["lab"] = labkit.connect("threads", 2)
    example = doctest.DocTestParser().get_doctest(inspect.cleandoc(found(name).__doc__ or ""), dict(before), name, None, 0)
    said: list[str] = []
    result = doctest.DocTestRunner(Checker(), optionflags=OPTIONS, verbose=False).run(example, out=said.append)
    if result.failed:
        pytest.fail("".join(said), pytrace=False)
