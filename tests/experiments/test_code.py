"""`labkit/experiments/code.py`: the code of cells is known again by what it does, wherever it stands and in whichever kernel."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from labkit.experiments.code import VERSION, differing, digests, parts

CELL = '''
import functools
import os
import torch
import numpy as np
import labkit

WIDTH, SIZES, seen, n = 64, [16, 32], [], 0
table = np.arange(8)
by_name = {}

def helper(x):
    return x * 2

class Base:
    scale = 1.0

    def times(self, x):
        return x * self.scale

class Mine(Base):
    def __init__(self, weight):
        self.weight, self.calls, self.log = weight, 0, []

    @property
    def half(self):
        return self.weight / 2

    @functools.cached_property
    def slow(self):
        return helper(3)

    def __call__(self, run):
        """Twice."""
        self.calls += 1
        self.log.append(run)
        return self.times(self.half) + self.slow

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.rate = torch.nn.Linear(3, 4), 0.25

    def forward(self, x):
        return self.layer(x)

class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 60

    def __getitem__(self, at):
        return torch.full((1, 6, 6), at / 10), at % 3

def factory(depth):
    return lambda run: run * depth

def make(lr, *, width=WIDTH):
    """What it is."""
    global n
    n += 1
    seen.append(lr)
    from math import sqrt  # of a library
    total = [helper(size) for size in SIZES if size < WIDTH]
    return np.mean(total) + sqrt(lr)

def flip(x):
    return x.flip(-1)

def stores(run):
    table[0], missing_yet
    by_name[run] = 1
    return 1

thing = {"make": make, "mine": Mine(3), "made": factory(2), "stores": stores, "part": functools.partial(helper, 3), "net": Net(),
         "stack": torch.nn.Sequential(torch.nn.Linear(2, 3)), "array": np.arange(4), "rule": labkit.AGWU(), "mean": np.mean,
         "method": Mine(4).times, "builtin": len, "environ": os.environ,
         "objects": np.array([None, "a"]), "empty": np.zeros((0, 3)), "problem": labkit.Classifier(torch.nn.Linear, Items(), augment=flip, metrics={"one": lambda x, y: 1.0})}
'''


def read(text, before=""):
    cell = {"__name__": "__main__"}
    exec(compile(before + text, "<cell>", "exec"), cell)
    return cell["thing"], cell


def test_the_same_cell_is_the_same_further_down_with_other_comments_and_after_it_was_used(monkeypatch):
    thing, cell = read(CELL)
    first = parts(thing)
    assert {"make", "helper", "Mine", "Base", "Net", "<lambda>", "make: SIZES", "<lambda>: depth"} <= set(first)
    again, _ = read(
        CELL.replace("# of a library", "# of Python's own").replace("Twice.", "Half.").replace("What it is.", "That."), "\n\n1\n"
    )
    assert parts(again) == first
    cell["make"](1.0), thing["mine"](5), thing["net"].eval()
    monkeypatch.setenv("LABKIT_OF_A_TEST", "1")
    cell["missing_yet"] = SimpleNamespace(a=1)  # what is of a library and comes later
    assert parts(thing) == first and cell["n"] == 1 and cell["seen"] == [1.0], "what the functions change themselves"
    code = f"import tests.experiments.test_code as it; print(it.parts(it.read(it.CELL)[0]) == {first})"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.endswith("\nTrue\n")


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("return x * 2", "return x * 3", "helper"),
        ("[16, 32]", "[16, 64]", "make: SIZES"),
        ("WIDTH, SIZES, seen, n = 64", "WIDTH, SIZES, seen, n = 65", "make"),  # its default
        ("scale = 1.0", "scale = 2.0", "Base"),
        ("return x * self.scale", "return x + self.scale", "Base.times"),
        ("weight / 2", "weight / 3", "Mine.half"),
        ("helper(3)\n", "helper(4)\n", "Mine.slow"),
        ("Mine(3)", "Mine(4)", "mine"),
        ("0.25", "0.5", "net"),
        ("torch.nn.Linear(3, 4)", "torch.nn.Linear(3, 5)", "net"),
        ("Linear(2, 3)", "Linear(2, 4)", "stack"),
        ("factory(2)", "factory(3)", "<lambda>: depth"),
        ("partial(helper, 3)", "partial(helper, 4)", "part"),
        ("np.arange(4)", "np.arange(5)", "array"),
        ('"builtin": len', '"builtin": max', "builtin"),
        ("np.zeros((0, 3))", "np.zeros((0, 4))", "empty"),
        ("np.arange(8)", "np.arange(9)", "stores"),
        ("at / 10", "at / 20", "Items.__getitem__"),
        ("x.flip(-1)", "x.flip(-2)", "flip"),
        ("lambda x, y: 1.0", "lambda x, y: 2.0", "<lambda> 2"),
        ('"mean": np.mean', '"mean": np.median', "mean"),
        ("by_name[run] = 1", "by_name[run] = 2", "stores"),
        ("return lambda run: run * depth", "return lambda run: run + depth", "<lambda>"),
    ],
)
def test_an_edit_is_another_code_and_is_named(old, new, part):
    assert CELL.count(old) == 1
    one, other = (digests(problem=read(text)[0]) for text in (CELL, CELL.replace(old, new)))
    assert differing(one, other)[0] == "problem" and one["problem"].get(part) != other["problem"].get(part)
    assert differing(one, one) is None and differing(one | {"python": "2.7"}, other) is None and one["python"] == VERSION


def test_modules_of_the_users_own_are_followed_and_those_of_others_go_by_name(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_nets.py").write_text("def net():\n    return 1\n")
    thing = read(
        "def late():\n    import own_nets\n    return own_nets.net()\n\nthing = {'late': late, 'path': 'own_nets:net', 'of': 'json:loads'}"
    )[0]
    first = parts(thing)
    assert first["own_nets"] and "own_nets" not in sys.modules and "json" not in first
    thing["late"]()
    assert parts(thing) == first
    sys.modules.pop("own_nets")
    (tmp_path / "own_nets.py").write_text("def net():\n    return 12\n")
    now = parts(thing)
    assert now["own_nets"] != first["own_nets"] and now["late"] != first["late"]


def test_two_functions_of_one_name_and_one_that_calls_itself():
    thing = read(
        "def again(n):\n    return again(n - 1) if n else one\n\none = [1]\none.append(one)\nthing = [again, lambda x: x, lambda x: x + 1]"
    )[0]
    assert set(parts(thing)) >= {"again", "<lambda>", "<lambda> 2"}
