"""A notebook is told what takes long, as long as it takes."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest

from labkit.cluster import notice
from tests.helpers import until


@pytest.fixture
def shown(monkeypatch):
    shown = []
    monkeypatch.setattr("labkit.cluster.notice.front_end", lambda: "jupyter")
    monkeypatch.setattr("labkit.cluster.notice.EVERY_S", 0.01)
    monkeypatch.setattr("IPython.display.display", lambda what, **how: shown.append((what, how["update"])))
    return shown


def test_a_line_says_what_takes_long_and_is_gone_afterwards(shown):
    texts = iter(["1 of 2", None, "1 of 2", "2 of 2"])

    def text():
        if (now := next(texts)) is None:
            raise OSError("busy")
        return now

    with notice.telling(text, after=0.01), notice.telling("a part of it", after=0):
        until(lambda: len(shown) == 2)
    assert shown == [({"text/plain": "1 of 2"}, False), ({"text/plain": "2 of 2"}, True), ({}, True)]


def test_what_is_quick_or_not_in_a_notebook_is_not_told(shown, monkeypatch):
    with notice.telling("quick", after=60):
        pass
    monkeypatch.setattr("labkit.cluster.notice.front_end", lambda: "")
    with notice.telling("a script", after=0):
        pass
    assert not shown


def test_a_terminal_has_a_line_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr("labkit.cluster.notice.TERMINAL_S", 0.01)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    told = []
    with notice.telling("Connecting to the workers (dask)."):
        until(lambda: told.append(capsys.readouterr().err) or "so far" in "".join(told))
    assert re.match(r"Connecting to the workers \(dask\)\. \d+ s so far\.\n", "".join(told))


def test_a_block_that_fails_takes_its_line_along(shown):
    with pytest.raises(ZeroDivisionError), notice.telling("work", after=0.01):
        until(lambda: shown)
        raise ZeroDivisionError
    assert shown[-1] == ({}, True)
    with notice.telling("again", after=0.01):
        until(lambda: len(shown) == 3)


@pytest.mark.parametrize(
    ("environment", "modules", "expected"),
    [
        ({}, (), ""),
        ({"JPY_SESSION_NAME": "a.ipynb"}, (), "jupyter"),
        ({"VSCODE_PID": "7"}, (), ""),  # inherited from an editor
        ({"JPY_SESSION_NAME": "a.ipynb", "LABKIT_KERNEL": "/tmp/x"}, (), ""),  # of a sweep
        ({"JPY_SESSION_NAME": "a.ipynb"}, ("google.colab",), "colab"),
    ],
)
def test_the_front_end_of_a_kernel(environment, modules, expected, monkeypatch):
    for name in ("JPY_SESSION_NAME", "VSCODE_PID", "LABKIT_KERNEL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in modules:
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    assert notice.front_end() == "", "a script, which may be started from a terminal of an editor"
    monkeypatch.setattr(notice, "shell", lambda: SimpleNamespace(kernel=None))
    assert notice.front_end() == expected
    monkeypatch.setattr(sys.modules["__main__"], "__vsc_ipynb_file__", "a.ipynb", raising=False)
    assert notice.front_end() == ("vscode" if expected != "colab" and "LABKIT_KERNEL" not in environment else expected)
