"""Checks of arguments: refused with the values and the known ones. (That errors survive pickling: test_init.py.)"""

from __future__ import annotations

import json
import math
import traceback
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from labkit.errors import (
    DataError,
    calling,
    file_path,
    flag,
    is_own_code,
    known,
    real,
    several,
    shortened,
    text,
    traceback_of,
    whole,
)


def test_known():
    assert known("optimiser", "sgd", ("sgd", "adam")) == "sgd"
    with pytest.raises(ValueError, match=r"optimiser='adm' is not known. Known: sgd, adam. Did you mean 'adam'\?"):
        known("optimiser", "adm", ("sgd", "adam"))
    with pytest.raises(ValueError, match=r"Did you mean 'agwu'\?"):
        known("update", "AGWU", ("sgwu", "agwu"))
    with pytest.raises(ValueError, match=r"Did you mean 'run'\?"):
        known("name", "runs", ("Run", "run"))
    with pytest.raises(ValueError, match=r"a=1 is not known. Known: \(none\).$"):
        known("a", 1, ())
    assert type(known("optimiser", np.str_("sgd"), ("sgd",))) is str and type(known("part", np.int64(1), range(3))) is int
    assert known("fold", None, (None, 0)) is None
    for bad in (True, [1], np.array([1, 2]), math.nan):
        with pytest.raises(ValueError, match="part="):
            known("part", bad, (0, 1))


def test_whole():
    assert whole("n", np.int64(3)) == 3 and type(whole("n", np.int64(3))) is int
    for given in (3, 3.0, np.float32(3), np.array(3), np.array(3.0), np.uint8(3), torch.tensor(3), torch.tensor(3.0), Fraction(3)):
        assert whole("n", given) == 3 and type(whole("n", given)) is int
    for bad in (2.5, True, np.True_, torch.tensor(True), "3", np.str_("3"), None, math.nan, math.inf, [3], np.array([3]), 3 + 0j):
        with pytest.raises(TypeError, match=r"n=.* must be a whole number"):
            whole("n", bad)
    for bad, most in ((0, 9), (10, 9)):
        with pytest.raises(ValueError, match=f"n={bad} must be at"):
            whole("n", bad, most=most)
    assert whole("n", 2**53) == 2**53 and whole("n", 10**400, most=math.inf) == 10**400
    with pytest.raises(ValueError, match="must be at most 9007199254740992"):
        whole("n", 10**400)
    for bad in (10**400, 10**5000, -(10**5000)):
        with pytest.raises(ValueError, match=r"n=.* must be at (least 1|most 9)"):
            whole("n", bad, most=9)


def test_what_is_masked_is_no_number():
    """numpy calls it 0."""
    for check in (whole, real, flag, text):
        for masked in (np.ma.masked, np.ma.array(3, mask=True)):
            with pytest.raises(TypeError, match="n="):
                check("n", masked)
    assert whole("n", np.ma.array(3)) == 3


def test_real():
    assert real("lr", np.float32(0.5), above=0) == 0.5 and real("m", 0, least=0, below=1) == 0.0
    with pytest.raises(ValueError, match="lr=0 must be above 0 and finite"):
        real("lr", 0, above=0)
    with pytest.raises(ValueError, match="m=1 must be at least 0 and below 1"):
        real("m", 1, least=0, below=1)
    for bad, error in ((math.nan, ValueError), (math.inf, ValueError), (True, TypeError), ("0.1", TypeError)):
        with pytest.raises(error, match="lr="):
            real("lr", bad, above=0)
    for given in (np.float32(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2)):
        assert real("lr", given) == 0.5 and type(real("lr", given)) is float
    assert real("timeout", math.inf, least=0, finite=False) == math.inf
    for bad in (math.nan, -1, -math.inf):
        with pytest.raises(ValueError, match=r"timeout=.* must be at least 0"):
            real("timeout", bad, least=0, finite=False)
    with pytest.raises(ValueError, match="x=1000"):
        real("x", 10**400)


def test_flag():
    assert [flag("f", given) for given in (True, np.False_, 1, 0.0, torch.tensor(True))] == [True, False, True, False, True]
    for bad in ("false", None, 2, math.nan, [True], np.array([True, False])):
        with pytest.raises(TypeError, match=r"f=.* must be True or False"):
            flag("f", bad)


def test_text():
    assert type(text("name", np.str_("a"))) is str
    for bad in (3, None, b"a", ["a"], Path("a")):
        with pytest.raises(TypeError, match=r"name=.* must be a string"):
            text("name", bad)


def test_file_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert file_path("out", "~/a") == file_path("out", Path("~/a")) == file_path("out", np.str_("~/a")) == Path("/home/me/a")
    assert file_path("out", "a/~b") == Path("a/~b")
    for bad, error in (
        (3, TypeError),
        (None, TypeError),
        (b"a", TypeError),
        (["a"], TypeError),
        ("a\0", ValueError),
        ("\ud800", ValueError),
    ):
        with pytest.raises(error, match="out="):
            file_path("out", bad)


def test_several():
    for given in ([1, 2], (1, 2.0), np.array([1, 2]), torch.tensor([1, 2]), range(1, 3), iter([1, 2]), {1: "a", 2: "b"}.keys()):
        assert several("n", given, whole) == [1, 2]
    for bad in (1, "12", b"12", {1: 2}, None, np.array(1), torch.tensor(1)):
        with pytest.raises(TypeError, match=r"n=.* must be a list"):
            several("n", bad, whole)
    with pytest.raises(TypeError, match="n=True must be a whole number"):
        several("n", [1, True], whole)


def typed(code, file="<python-input-3>"):
    """What is called `f` in code as somebody types it."""
    namespace = {"json": json, "calling": calling}
    exec(compile(code, file, "exec"), namespace)
    return namespace["f"]


def raised(function):
    with pytest.raises(Exception) as caught:
        function()
    return caught.value


def test_what_is_typed_at_a_prompt_is_own_code():
    for name in ("<stdin>", "<console>", "<python-input-0>", "<ipython-input-3-abc>", "<doctest readme[2]>", __file__):
        assert is_own_code(name), name
    for name in (
        "<frozen importlib._bootstrap>",
        "<__array_function__ internals>",
        json.__file__,
        torch.__file__,
        traceback.__file__,
    ):
        assert not is_own_code(name), name


def test_own_frames_are_first_and_last_and_the_place_in_a_library_is_a_note():
    error = shortened(raised(typed("def f():\n    return json.loads('[1,')")))
    own = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    assert own == [__file__, "<python-input-3>"]
    assert [note.startswith("Raised in ") and "decoder.py:" in note for note in error.__notes__] == [True]
    assert shortened(error).__notes__ == error.__notes__ and len(error.__notes__) == 1
    assert not hasattr(shortened(raised(typed("def f():\n    return misspelt"))), "__notes__")


def test_of_an_explanation_of_what_a_function_has_raised_no_frame_is_left():
    def explained():
        with calling("data=f", DataError):
            typed("def f():\n    raise KeyError('a')")()

    error = raised(explained)
    while is_own_code(error.__traceback__.tb_frame.f_code.co_filename):  # as where labkit calls the function for itself
        error.__traceback__ = error.__traceback__.tb_next
    text = traceback_of(error)
    assert "errors.py" not in text.replace(__file__, "") and 'File "<python-input-3>"' in text
    assert text.splitlines()[-1] == "labkit.errors.DataError: data=f raised KeyError: 'a'."


def test_a_message_that_ends_in_a_full_stop_gets_no_second_one():
    with pytest.raises(DataError, match=r"^data=f raised OSError: It is gone\.$"), calling("data=f", DataError):
        raise OSError("It is gone.")
