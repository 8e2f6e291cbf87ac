"""Progress: a line or a bar for a run and for work in this kernel; of subnets in `tests/subnets/test_status.py`."""

from __future__ import annotations

import pytest

from labkit.errors import RunError
from labkit.plots.progress import line, meter, show

RUNNING = {"state": "running", "samples": 25, "budget": 100, "version": 3, "seconds": 5.0, "started": True}


@pytest.mark.parametrize(
    ("change", "end"),
    [
        ({}, "version 3, 15 s left"),
        ({"workers": {0: {"score": 0.5}, 1: {"score": 0.75}, 2: {"score": None}}}, "held-out score 0.625, 15 s left"),
        ({"workers": {0: {"held_out_score": 0.5}}, "test_score": 0.9}, "held-out score 0.500, 15 s left"),
        ({"state": "done", "workers": {0: {"held_out_score": 0.5}}, "test_score": 0.9}, "version 3, test score 0.900, done"),
        ({"started": False}, "workers are starting"),
        ({"samples": 100}, "measuring the curve"),
        ({"state": "failed", "reason": "it broke."}, "failed: it broke."),
        ({"state": "done"}, "version 3, done"),
    ],
)
def test_a_line_shows_how_far_a_run_is(change, end):
    status = RUNNING | change
    assert line(status).startswith(f"{status['samples']:>3}%, {status['samples']} of 100 samples, version 3")
    assert line(status).endswith(end)


def test_a_bar_moves_to_the_end_of_a_run(monkeypatch):
    shown, read = [], iter([RUNNING, RUNNING | {"state": "done", "samples": 100}])
    monkeypatch.setenv("LABKIT_PLOTS", "interactive")
    monkeypatch.setattr("labkit.plots.progress.BAR_S", 0.01)
    monkeypatch.setattr("IPython.display.display", lambda what, **how: shown.append(what))
    monkeypatch.setattr("threading.Thread.start", lambda thread: thread.run())
    show("AGWU + IDPA", lambda: next(read))
    bar, text = shown[0].children
    last = "AGWU + IDPA: 100%, 100 of 100 samples, version 3, done"
    assert (bar.value, text.value) == (1.0, last)
    assert shown[1:] == [{"text/plain": last}], "what is saved with the notebook, where a widget would be an error"


def test_a_status_that_cannot_be_read_does_not_end_the_line(capsys, monkeypatch):
    """Now and then it fails; for good, the line says why."""

    def read():
        if found := next(statuses):
            return found
        raise RunError("the server does not answer.")

    monkeypatch.setenv("LABKIT_PLOTS", "static")
    monkeypatch.setattr("labkit.plots.progress.time.sleep", lambda seconds: None)
    statuses = iter([None, RUNNING, *[None] * 19, RUNNING, RUNNING | {"state": "done"}])
    show("a", read)
    assert capsys.readouterr().out.endswith("version 3, done\n")
    statuses = iter([RUNNING, *[None] * 20])
    show("a", read)
    assert capsys.readouterr().out.endswith("version 3, unknown: the server does not answer.\n")


def test_a_bar_whose_status_cannot_be_read_says_so_and_goes_on(monkeypatch):
    done, shown, texts = RUNNING | {"state": "done", "samples": 100}, [], []
    statuses = iter([RUNNING, *[None] * 30, RUNNING, done])

    def read():
        texts.append(shown[0].children[1].value)
        if found := next(statuses):
            return found
        raise RunError("the disk is away.")

    monkeypatch.setenv("LABKIT_PLOTS", "interactive")
    monkeypatch.setattr("labkit.plots.progress.time.sleep", lambda seconds: None)
    monkeypatch.setattr("IPython.display.display", lambda what, **how: shown.append(what))
    monkeypatch.setattr("threading.Thread.start", lambda thread: thread.run())
    show("a", read)
    assert texts[30].endswith("unknown: the disk is away.") and "unknown" not in texts[32]
    assert shown[0].children[1].value.endswith("version 3, done")


def test_a_bar_is_shown_only_for_work_that_is_long(monkeypatch):
    shown = []
    monkeypatch.setattr("labkit.plots.style.interactive", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda what, **how: shown.append(what))
    for soon, outputs in ((60.0, 0), (0.0, 2)):
        monkeypatch.setattr("labkit.plots.progress.SOON_S", soon)
        with meter("work", 10) as done:
            done(4)
            done(10)
        assert len(shown) == outputs
    bar, text = shown[0].children
    assert bar.value == 1.0 and text.value == "work: 100%, 10 of 10 samples" and shown[1] == {"text/plain": text.value}
    with pytest.raises(ZeroDivisionError), meter("work", 10) as done:
        done(4)
        raise ZeroDivisionError
    assert "text/plain" in shown[-1], "also of work that fails"
