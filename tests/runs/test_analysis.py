"""Analysis: who was here when, what time went into, how even the work was; one table of intervals for all of it."""

from __future__ import annotations

import numpy as np
import pandas as pd

from labkit.runs.analysis import CUT_OFF, crossing, intervals, lost, slowdown_reached, spans
from labkit.runs.events import COLUMNS, Recorder
from labkit.runs.record import RunRecord
from tests.helpers import settings


def events(*rows):
    """Of worker 0: (kind, seconds, more columns)."""
    made = [{"kind": kind, "seconds": at, "worker": 0, "incarnation": 0, **more} for kind, at, more in rows]
    return pd.DataFrame(made, columns=COLUMNS)


def test_intervals_go_round_from_release_to_push_and_back():
    table = intervals(
        events(
            ("join", np.nan, {}), ("release", 0.0, {}), ("push", 2.0, {}), ("hold", 2.0, {}), ("release", 3.0, {}),
            ("push", 5.0, {}), ("pull", 5.5, {}), ("release", 6.0, {}), ("regroup", 6.5, {}), ("release", 7.0, {}),
            ("push", 8.0, {}), ("hold", 8.0, {}), ("leave", 9.0, {"message": "lost"}),
        )
    )  # fmt: skip
    assert list(table[["kind", "start", "end"]].dropna().itertuples(index=False, name=None)) == [
        ("pass", 0.0, 2.0), ("answer", 2.0, 3.0), ("pass", 3.0, 5.0), ("refill", 5.0, 6.0), ("broken", 6.0, 7.0),
        ("pass", 7.0, 8.0), ("held", 8.0, 9.0), ("here", 0.0, 9.0),
    ]  # fmt: skip
    assert list(table.held.dropna()) == [2.0, 8.0] and table.message.iloc[-1] == "lost"
    assert list(table[["first", "last"]].iloc[1]) == [1, 2], "the events between which it lies"


def test_who_was_here_when_a_run_was_cut_off_is_gone():
    table = intervals(events(("join", np.nan, {}), ("start", 0.0, {}), ("push", 1.0, {}), ("resume", 1.5, {}), ("join", 1.5, {})))
    here = table[table.kind == "here"]
    assert list(here.message) == [CUT_OFF, ""] and list(here.start) == [0.0, 1.5] and list(here.end) == [1.5, 1.5]


def test_a_pass_and_an_answer_are_divided_into_spans():
    times = {"compute_s": 1.0, "score_s": 0.5, "wait_s": 0.25}
    later = {"compute_s": 2.0, "score_s": 0.0, "wait_s": 0.0, "hidden_s": 0.5}
    table = spans(
        events(("release", 0.0, {}), ("push", 2.0, times), ("release", 3.0, {"wait_s": 0.25}), ("push", 5.0, later))
    )  # fmt: skip
    assert list(table[["activity", "start", "end"]].itertuples(index=False, name=None)) == [
        ("exchange", 0.0, 0.25), ("compute", 0.25, 1.75), ("wait", 1.75, 2.0), ("compute", 2.0, 2.5), ("wait", 2.5, 2.75),
        ("exchange", 2.75, 3.0), ("compute", 3.0, 5.0),
    ]  # fmt: skip
    assert spans(events()).empty and intervals(events()).empty and lost(events()) == []


def test_where_a_line_first_reaches_a_value():
    x, y = np.array([0.0, 2.0, 4.0]), np.array([0.1, 0.5, 0.9])
    assert np.isclose(crossing(x, y, 0.3), 1.0) and crossing(x, y, 0.05) == 0.0 and np.isnan(crossing(x, y, 0.95))


def test_who_was_lost_and_has_not_come_back():
    def rows(*events):
        return pd.DataFrame([dict(zip(("kind", "worker", "message"), event, strict=False)) for event in events], columns=COLUMNS)

    first = [("join", 0), ("join", 1), ("join", 2), ("leave", 1, "no sign of life"), ("leave", 2, "lost"), ("join", 2)]
    assert lost(rows(*first)) == [1]
    assert lost(rows(*first, ("leave", 0, ""), ("leave", 2, ""))) == [1]
    assert lost(rows(*first, ("resume",), ("join", 0))) == [1, 2]


def test_the_balance_of_a_pass_is_that_of_the_workers_who_were_here(tmp_path):
    """Worker 0 is there always; 1 is lost after pass 2, 2 comes with pass 3 and is away in pass 5; pass 7 is not ended by 2."""
    settings([0, 1, 2]).save(tmp_path)
    recorder = Recorder(tmp_path)
    seconds = {0: dict.fromkeys(range(1, 8), 1.0), 1: dict.fromkeys((1, 2), 2.0), 2: dict.fromkeys((3, 4, 6), 4.0)}
    for number in range(1, 8):
        for worker in (0, 1, 2):
            if number == min(seconds[worker]):
                recorder.event("join", worker=worker)
            if number in seconds[worker]:
                recorder.event("push", worker=worker, samples=9, compute_s=seconds[worker][number], score_s=0.0, **{"pass": number})
            if (worker, number) == (1, 2):
                recorder.event("leave", worker=1, message="lost")
    recorder.close()
    table = RunRecord(tmp_path).balance()
    assert dict(zip(table["pass"], table.ratio, strict=True)) == {1: 0.75, 2: 0.75, 3: 0.625, 4: 0.625, 6: 0.625}


def test_the_slowdown_that_was_reached_is_told_where_the_record_tells_it():
    about = [
        {"index": i, "slowdown": slow, "host": "here", "device": "cpu", "threads": 1} for i, slow in enumerate((2.0, 4.0, 8.0))
    ]
    config = settings().replace(workers=about, emulated=True)
    seconds = {0: (9.0, 1.0, 1.0), 1: (1.0, 1.5, 1.5), 2: (1.0, 0.5, 0.5)}  # the first local pass does not count
    passes = [
        ("push", n, {"worker": w, "samples": 16 if w < 2 else 2, "compute_s": s}) for w in seconds for n, s in enumerate(seconds[w])
    ]
    table = events(*passes)
    assert slowdown_reached(table, config) == {0: 2.0, 1: 3.0, 2: 8.0}
    steady = {"jitter": 0.1, "drift": 9.0, "stalls": (9.0, 1.0), "origin": {"kind": "simulated"}}
    elsewhere = [{**worker, "host": f"host-{worker['index'] // 2}"} for worker in about]
    for changes in (*({name: value} for name, value in steady.items()), {"workers": elsewhere}):
        assert slowdown_reached(table, config.replace(**changes)) == {}
    for told in (events(*passes[:-1]), events(*passes, ("slow", 4.0, {}))):
        assert slowdown_reached(told, config) == {}
