"""Checks of arguments: refused with the values and the known ones. (That errors survive pickling: test_init.py.)"""

from __future__ import annotations

import math

import numpy as np
import pytest

from labkit.errors import known, real, whole


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
