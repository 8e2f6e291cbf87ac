"""The live view reads each event once, follows a run, and ends with it."""

from __future__ import annotations

import json
import threading

import numpy as np

from labkit import plots
from labkit.plots.live import Watch
from tests.plots.helpers import elements, title


def test_the_watch_reads_each_line_once_and_whole(run):
    file = run.path / "events.jsonl"
    lines = file.read_bytes()
    cut = len(lines) // 2
    file.write_bytes(lines[:cut])
    watch = Watch(run)
    before = sum(map(len, watch.look().series.values()))
    assert sum(map(len, watch.look().series.values())) == before
    file.write_bytes(lines)
    (series, here, workers), pushes = watch.look(), run.events[run.events["kind"] == "push"]
    for worker, own in pushes.groupby("worker"):
        seconds, score, rate = np.array(series[worker]).T
        assert np.array_equal(seconds, own["seconds"]) and np.array_equal(score, own["score"])
        assert np.allclose(rate, own["samples"].astype(float) / np.diff(seconds, prepend=0.0))
    assert workers == {0, 1} and [n for _, n in here] == [1, 2]
    with open(file, "a") as more:
        more.write('{"kind": "leave", "worker": 1, "seconds": 90.0, "message": "it broke."}\n')
    assert watch.look()[1:] == ([(0.0, 1), (0.0, 2), (90.0, 1)], {0})


def test_a_push_without_a_score_keeps_the_latest_and_a_late_score_is_that_of_its_push(run):
    rows = [("push", 1.0, 0.3), ("push", 2.0, None), ("push", 3.0, None), ("score", 3.1, 0.6), ("push", 4.0, None)]
    (run.path / "events.jsonl").write_text(
        "".join(
            json.dumps({"kind": kind, "worker": 0, "seconds": now, "score": score, "samples": 10}) + "\n"
            for kind, now, score in rows
        )
    )
    assert [score for _, score, _ in Watch(run).look().series[0]] == [0.3, 0.3, 0.6, 0.6]


def test_live_static_waits_for_the_end(run):
    run.state = "running"
    threading.Timer(0.2, setattr, (run, "state", "done")).start()
    assert len(elements(plots.live(run), "Curve")["worker 0"]) == 7


def test_live_follows_a_run_and_stops_with_it(run):
    import holoviews as hv
    from bokeh.models import Plot

    plots.extension("interactive")
    file = run.path / "events.jsonl"
    lines = file.read_bytes()
    file.write_bytes(b"")
    run.state = "running"
    figure = plots.live(run)
    panel = figure.traverse(lambda view: view, [hv.DynamicMap])[0]
    shown = hv.renderer("bokeh").get_plot(figure).state.select({"type": Plot})
    assert all(len(line) == 0 for line in elements(panel[()], "Curve").values())
    file.write_bytes(lines)
    run.state = "done"
    for thread in threading.enumerate():
        if thread.name == f"live-{run.name}":
            thread.join(10)
            assert not thread.is_alive()
    assert {label: len(line) for label, line in elements(panel[()], "Curve").items()} == {"worker 0": 7, "worker 1": 7}
    assert title(panel[()]).startswith("AGWU + IDPA: mean score")
    last = run.events.loc[run.events["kind"] == "push", "seconds"].max()
    assert [plot.x_range.end for plot in shown] == [last] * 3  # the axes follow
