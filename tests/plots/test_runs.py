"""The figures say what the events say, can be kept as pictures, and speak up when there is nothing to draw."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from labkit import plots
from labkit.plots import style
from labkit.plots.live import Watch
from labkit.runs.events import COLUMNS, effective
from tests.helpers import settings


class Recorded:
    """What the figures read of a run; made by playing `passes` local passes of uneven workers against a clock."""

    def __init__(self, path: Path, name="small", update="AGWU", slowdown=(1, 4), passes=7, seed=0, emulated=True):
        self.name, self.path, self.label, self.state = name, path / name, f"{update} + IDPA", "done"
        about = {"passes": passes, "seed": seed, "emulated": emulated, "problem": {"model": "lenet"}}
        about |= {"update": {"name": update.lower()}, "partition": {"name": "idpa"}, "n_workers": len(slowdown)}
        self.config = settings().replace(name=name, workers=[{"index": i, "slowdown": s} for i, s in enumerate(slowdown)], **about)
        self.rows, self.barrier = [], update == "SGWU"
        if passes:
            self._play(np.random.default_rng(seed), passes, slowdown)
        self.events = pd.DataFrame(self.rows, columns=COLUMNS)
        self.path.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({k: v for k, v in row.items() if v is not None}) for row in self.rows]
        (self.path / "events.jsonl").write_text("".join(line + "\n" for line in lines))

    def _play(self, random, passes, slowdown):
        m = len(slowdown)
        clock, version, base = [0.0] * m, 0, [0] * m
        waiting = []  # (worker, pushed at)
        for i in range(m):
            self._event(0.0, "join", i)
            self._event(0.0, "release", i, version=0, wait_s=0.0)
        left = [passes] * m
        while any(left) or waiting:
            if any(left):
                i = min((i for i in range(m) if left[i] and i not in [w for w, _ in waiting]), key=lambda i: clock[i])
                compute, exchange = 0.5 * slowdown[i] ** 0.3 * random.uniform(0.9, 1.1), random.uniform(0.01, 0.03)
                clock[i] += exchange + compute + 0.02
                left[i] -= 1
                self._event(
                    clock[i], "push", i, **{"pass": passes - left[i]}, samples=300 // slowdown[i], base_version=base[i],
                    compute_s=compute, score_s=0.02, staleness=version - base[i], send_s=exchange,
                    score=1 - 0.9 * 0.9 ** (passes - left[i]), loss=0.5, bytes=900,
                )  # fmt: skip
                waiting.append((i, clock[i]))
            if self.barrier and len(waiting) < m:
                continue
            now = max(at for _, at in waiting)
            version += 1
            for i, _ in waiting:
                self._event(
                    now,
                    "merge",
                    i,
                    version=version,
                    coefficient=1 / m / slowdown[i] ** 0.5,
                    staleness=version - 1 - base[i],
                )
                base[i] = version
            for i, at in waiting:
                self._event(now + 0.01, "release", i, version=version, wait_s=now - at)
                clock[i] = now + 0.01
            waiting = []
        for i in range(m):
            self._event(clock[i], "leave", i)
        self.rows.sort(key=lambda row: row["seconds"])
        for seq, row in enumerate(self.rows):
            row["seq"] = seq

    def _event(self, seconds, kind, worker, **fields):
        self.rows.append({"time": 1e9 + seconds, "seconds": seconds, "kind": kind, "worker": worker, "incarnation": 0, **fields})

    def curve(self):
        if not self.rows:
            return pd.DataFrame(columns=["seconds", "samples", "version", "loss", "score"])
        pushes = self.events[self.events["kind"] == "push"]
        seconds = np.concatenate([[0.0], pushes["seconds"].astype(float)])
        score = (
            0.95 - 0.85 * np.exp(-seconds / (1.5 if not self.barrier else 2.5)) + 0.01 * np.sin(seconds * 7 + self.config["seed"])
        )
        return pd.DataFrame(
            {
                "seconds": seconds,
                "samples": np.concatenate([[0.0], pushes["samples"].astype(float).cumsum()]),
                "score": score,
            }
        )

    def balance(self):
        busy = self.events[self.events["kind"] == "push"].pivot(index="pass", columns="worker", values="compute_s")
        table = pd.DataFrame({"pass": busy.index, "mean_s": busy.mean(axis=1), "max_s": busy.max(axis=1)})
        return table.assign(ratio=table["mean_s"] / table["max_s"]).reset_index(drop=True)


@pytest.fixture(autouse=True)
def static():
    plots.extension("static")
    yield
    plots.extension("static")


@pytest.fixture
def run(tmp_path):
    return Recorded(tmp_path)


def title(figure, backend="bokeh"):
    import holoviews as hv

    return hv.Store.lookup_options(backend, figure, "plot").kwargs["title"]


def pieces(figure, kind):
    """The elements of one kind in a figure, by label."""
    return {piece.label: piece for piece in figure.traverse(lambda piece: piece, [kind])}


def rates(*samples_per_s, slowdown):
    return pd.DataFrame({"worker": range(len(samples_per_s)), "samples_per_s": samples_per_s, "slowdown": slowdown})


FIGURES = {
    "curves": lambda run: plots.curves([run], target=0.5),
    "timeline": plots.timeline,
    "membership": plots.membership,
    "staleness": plots.staleness,
    "balance": plots.balance,
    "weights": plots.weights,
    "speed": lambda run: plots.speed(rates(5100.0, 1290.0, slowdown=[1, 4])),
    "live": plots.live,
}


# -- back ends ---------------------------------------------------------------------------------------------------------


def test_importing_loads_no_plotting_library():
    code = "import labkit.plots, sys; print({'holoviews', 'hvplot', 'bokeh', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_a_picture_and_a_page(name, run, tmp_path):
    figure = FIGURES[name](run)
    picture = plots.save(figure, tmp_path / "figures" / f"{name}.png")
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 5_000
    page = plots.save(figure, tmp_path / f"{name}.html").read_text()
    assert "Bokeh" in page and not re.search(r"<script[^>]* src=", page)  # needs no network


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "speed"])
def test_a_run_without_events_is_told_not_drawn(name, tmp_path):
    figure = FIGURES[name](Recorded(tmp_path, "idle", passes=0))
    assert plots.save(figure, tmp_path / "empty.png").stat().st_size > 2_000
    if name != "live":
        assert "idle: no" in next(iter(figure.traverse(lambda text: text.data[2], ["Text"])))


def test_other_endings_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"'x\.pdf'.*\.png or \.html"):
        plots.save(plots.balance(run), tmp_path / "x.pdf")


def test_the_mode_is_named_or_guessed(monkeypatch):
    monkeypatch.setenv("LABKIT_PLOTS", "interactive")
    assert plots.interactive()
    monkeypatch.setenv("LABKIT_PLOTS", "moving")
    with pytest.raises(ValueError, match="'moving'; it can be 'static'"):
        plots.extension()
    monkeypatch.delenv("LABKIT_PLOTS")
    assert plots.extension() == "static"  # this is no notebook


def test_a_notebook_keeps_a_picture_and_no_script(monkeypatch, tmp_path):
    import nbformat
    from nbclient import NotebookClient
    from traitlets.config import Config

    monkeypatch.setenv("LABKIT_PLOTS", "static")
    draw = "import pandas as pd\nfrom labkit import plots\n"
    draw += "plots.speed(pd.DataFrame({'worker': [0, 1], 'samples_per_s': [9.0, 3.0], 'slowdown': [1, 3]}))"
    more = "pd.DataFrame({'x': [1, 2], 'y': [3, 4]}).hvplot.line(x='x', y='y')"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (draw, more)])
    config = Config({"KernelManager": {"transport": "ipc", "ip": str(tmp_path / "k")}})
    NotebookClient(notebook, timeout=60, kernel_name="python3", config=config).execute()
    for cell in notebook.cells:
        assert [set(output.get("data", {})) - {"text/plain"} for output in cell.outputs] == [{"image/png"}], cell.source


# -- what the figures say ----------------------------------------------------------------------------------------------


def test_curves_hold_the_curve_and_the_crossing(tmp_path):
    fast, slow = Recorded(tmp_path, "a"), Recorded(tmp_path, "b", "SGWU")
    figure = plots.curves([slow, fast], x="samples", target=0.6)
    table = fast.curve()
    where = np.interp(0.6, table["score"], table["samples"])
    drawn = pieces(figure, "Curve")[f"AGWU + IDPA: 60 % at {where:,.0f} samples"]
    assert np.array_equal(drawn["samples"], table["samples"]) and np.array_equal(drawn["score"], table["score"])
    assert title(figure) == title(figure, "matplotlib") == f"AGWU + IDPA reaches 60 % first, after {where:,.0f} samples"
    assert title(plots.curves(fast, target=0.999)) == "AGWU + IDPA does not reach 99.9 % test accuracy"


def test_seeds_share_a_line_and_other_settings_do_not(tmp_path):
    seeds = [Recorded(tmp_path, f"s{seed}", seed=seed) for seed in range(3)]
    other = Recorded(tmp_path, "even", slowdown=(1, 1))
    drawn = pieces(plots.curves([*seeds, other], x="samples"), "Curve")
    assert sorted(drawn) == ["AGWU + IDPA (even), 1 seed", "AGWU + IDPA (s0), 3 seeds"]
    line = drawn["AGWU + IDPA (s0), 3 seeds"]
    every = np.stack([np.interp(line["samples"], run.curve()["samples"], run.curve()["score"]) for run in seeds])
    assert np.allclose(line["score"], np.median(every, axis=0))
    (band,) = pieces(plots.curves(seeds, x="samples"), "Area").values()
    assert np.allclose(band["score"], every.min(axis=0)) and np.allclose(band["high"], every.max(axis=0))


def test_what_a_reader_must_know_is_said(tmp_path):
    emulated, even = Recorded(tmp_path), Recorded(tmp_path, "even", slowdown=(1, 1), emulated=False)
    even.config = even.config.replace(synthetic=True)
    assert style.caption([emulated]) == "slowness emulated: 1x, 4x"
    assert style.caption([even], "1 seed") == "synthetic data; 1 seed"
    assert style.emulated([1, 1, 1, 4, 4]) == "slowness emulated: 3 at 1x, 2 at 4x"


def test_segments_add_up_to_the_events(tmp_path):
    run = Recorded(tmp_path, update="SGWU", slowdown=(1, 2, 4))
    spans = plots.segments(run).assign(length=lambda table: table["end"] - table["start"])
    pushes, releases = (run.events[run.events["kind"] == kind] for kind in ("push", "release"))
    assert set(spans["worker"]) == {0, 1, 2}
    for worker, own in spans.groupby("worker"):
        assert (own["start"].to_numpy()[1:] >= own["end"].to_numpy()[:-1] - 1e-9).all()  # one thing at a time
        length = own.groupby("activity")["length"].sum()
        done, held = pushes[pushes["worker"] == worker], releases[releases["worker"] == worker]
        assert length["compute"] == pytest.approx((done["compute_s"] + done["score_s"]).sum())
        assert length.get("wait", 0.0) == pytest.approx(held["wait_s"].sum())
        assert length.sum() == pytest.approx(held["seconds"].max())


def test_a_worker_held_to_the_end_waits_until_it_leaves(run):
    rows = [
        {"kind": "release", "worker": 0, "seconds": 0.0, "wait_s": 0.0},
        {"kind": "push", "worker": 0, "seconds": 3.0, "compute_s": 1.5, "score_s": 0.5, "wait_s": 0.25},
        {"kind": "hold", "worker": 0, "seconds": 3.0},
        {"kind": "leave", "worker": 0, "seconds": 5.0},
    ]
    run.events = pd.DataFrame(rows, columns=COLUMNS)
    expected = [("exchange", 0.0, 0.75), ("compute", 0.75, 2.75), ("wait", 2.75, 3.0), ("wait", 3.0, 5.0)]
    assert list(plots.segments(run)[["activity", "start", "end"]].itertuples(index=False, name=None)) == expected


def test_what_is_computed_while_a_push_is_under_way_is_drawn_as_computing(run):
    rows = [
        {"kind": "release", "worker": 0, "seconds": 0.0, "wait_s": 0.0},
        {"kind": "push", "worker": 0, "seconds": 2.0, "compute_s": 2.0, "score_s": 0.0, "wait_s": 0.0, "hidden_s": 0.0},
        {"kind": "release", "worker": 0, "seconds": 3.0, "wait_s": 0.25},
        {"kind": "push", "worker": 0, "seconds": 5.0, "compute_s": 2.5, "score_s": 0.0, "wait_s": 0.0, "hidden_s": 0.5},
        {"kind": "release", "worker": 0, "seconds": 5.5, "wait_s": 0.0},
    ]
    run.events = pd.DataFrame(rows, columns=COLUMNS)
    expected = [("compute", 0.0, 2.0), ("compute", 2.0, 2.5), ("wait", 2.5, 2.75), ("exchange", 2.75, 3.0), ("compute", 3.0, 5.0)]
    expected += [("exchange", 5.0, 5.5)]
    assert list(plots.segments(run)[["activity", "start", "end"]].itertuples(index=False, name=None)) == expected


def test_the_roster_has_a_row_for_each_incarnation_and_the_figure_a_bar(run):
    def event(kind, seconds, worker=None, incarnation=0, **fields):
        return {"kind": kind, "seconds": seconds, "worker": worker, "incarnation": incarnation, **fields}

    rows = [
        event("join", np.nan, 0), event("join", np.nan, 1), event("start", 0.0), event("leave", 2.0, 1, message="it broke."),
        event("join", 3.0, 1, 1), event("join", 3.5, 2), event("resume", 4.0), event("join", 4.0, 0, 1), event("start", 4.0),
        event("join", 4.5, 1, 2), event("leave", 6.0, 0, 1), event("push", 7.0, 1, 2),
    ]  # fmt: skip
    run.events = pd.DataFrame(rows, columns=COLUMNS)
    gone = "the server was gone."
    assert sorted(plots.roster(run).itertuples(index=False, name=None)) == [
        (0, 0, 0.0, 4.0, gone), (0, 1, 4.0, 6.0, ""), (1, 0, 0.0, 2.0, "it broke."), (1, 1, 3.0, 4.0, gone), (1, 2, 4.5, 7.0, ""),
        (2, 0, 3.5, 4.0, gone),
    ]  # fmt: skip
    faults = pd.DataFrame([(2.0, "kill", 1), (1.0, "drop", 0), (1.5, "drop", 1)], columns=["seconds", "fault", "worker"])
    figure = plots.membership(run, faults)
    bars = pieces(figure, "Rectangles")
    assert {name: len(bar) for name, bar in bars.items()} == {"from the start": 2, "came later or came back": 4}
    marks = {name: len(mark) for name, mark in pieces(figure, "Scatter").items() if name in ("kill", "drop")}
    assert marks == {"kill": 1, "drop": 2}
    above, below = (title(view) for view in figure)
    assert above.startswith("AGWU + IDPA: a worker was lost 4 times, accuracy")
    assert below == "Who was here, and the 3 faults injected"


def test_timeline_names_who_waits_most(tmp_path, run):
    slow = Recorded(tmp_path, "sync", "SGWU")
    releases = slow.events[slow.events["kind"] == "release"]
    share = (releases.groupby("worker")["wait_s"].sum() / releases.groupby("worker")["seconds"].max()).astype(float)
    expected = f"SGWU + IDPA: worker {share.idxmax()} waits {100 * share.max():.1f} % of the time"
    figure = plots.timeline(slow)
    assert title(figure) == expected.replace(".0 %", " %")
    assert len(pieces(figure, "Segments")[""]) == (slow.events["kind"] == "merge").sum()
    assert title(plots.timeline(run)) == "AGWU + IDPA: no worker waits more than 0.5 % of the time"


def test_staleness_counts_every_merge_once(tmp_path, run):
    merges = run.events[run.events["kind"] == "merge"]
    bars = pieces(plots.staleness(run), "Rectangles")
    for worker, own in merges.groupby("worker"):
        counts = np.bincount(own["staleness"].astype(int), minlength=3)
        assert np.array_equal(bars[f"worker {worker}"]["top"], counts)
    other = Recorded(tmp_path, "sync", "SGWU")
    other.name = run.name  # names may repeat in two folders
    bars = pieces(plots.staleness([run, other]), "Rectangles")
    assert bars["AGWU + IDPA"]["top"].sum() == len(merges)
    assert list(bars["SGWU + IDPA"]["top"]) == [14, 0, 0]


def test_far_staleness_still_fits(tmp_path, run):
    run.events.loc[run.events["kind"] == "merge", "staleness"] = np.arange(14) * 10
    bars = pieces(plots.staleness(run), "Rectangles")
    assert sum(bar["top"].sum() for bar in bars.values()) == 14
    assert all(len(bar) <= 26 for bar in bars.values())


def test_balance_holds_the_ratios(run):
    ratio = run.balance()["ratio"]
    figure = plots.balance(run)
    ((label, line),) = pieces(figure, "Curve").items()
    assert np.allclose(line["ratio"], ratio)
    assert label == f"AGWU + IDPA: mean {ratio[1:].mean():.2f} from pass 2 on" and f"{ratio[1:].mean():.2f}" in title(figure)


def test_weights_are_shares(run):
    bars = pieces(plots.weights(run), "Rectangles")
    assert np.allclose(bars["share of the samples"]["top"], [80, 20])
    assert np.allclose(bars["effective weight"]["top"], [200 / 3, 100 / 3])


def test_speed_compares_the_fastest_with_the_slowest():
    assert title(plots.speed(rates(1000.0, 4000.0, 2000.0, slowdown=1))) == "Worker 1 is 4.0 times as fast as worker 0"
    with pytest.raises(ValueError, match="no column slowdown"):
        plots.speed(rates(1.0, slowdown=1).drop(columns="slowdown"))


def test_bad_arguments_are_refused(run):
    with pytest.raises(ValueError, match="'seconds' or 'samples', not 'epochs'"):
        plots.curves(run, x="epochs")
    with pytest.raises(ValueError, match="target is 90;"):
        plots.curves(run, target=90)
    with pytest.raises(ValueError, match="at least one"):
        plots.balance([])


# -- live --------------------------------------------------------------------------------------------------------------


def test_the_watch_takes_in_each_line_once_and_whole(run):
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
    assert len(pieces(plots.live(run), "Curve")["worker 0"]) == 7


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
    assert all(len(line) == 0 for line in pieces(panel[()], "Curve").values())
    file.write_bytes(lines)
    run.state = "done"
    for thread in threading.enumerate():
        if thread.name == f"live-{run.name}":
            thread.join(10)
            assert not thread.is_alive()
    assert {label: len(line) for label, line in pieces(panel[()], "Curve").items()} == {"worker 0": 7, "worker 1": 7}
    assert title(panel[()]).startswith("AGWU + IDPA: mean score")
    last = run.events.loc[run.events["kind"] == "push", "seconds"].max()
    assert [plot.x_range.end for plot in shown] == [last] * 3  # the axes follow


def test_what_a_resume_has_undone_is_drawn_where_time_went_and_counted_nowhere_else(run):
    merged = run.events[run.events["kind"] == "merge"].groupby("worker").size()
    last = run.events[run.events["kind"] == "merge"]["version"].max()
    resume = pd.DataFrame([{"kind": "resume", "version": last - 4, "seconds": run.events["seconds"].max()}], columns=COLUMNS)
    spans = len(plots.segments(run))
    run.events = pd.concat([run.events, resume.dropna(axis=1)], ignore_index=True)[COLUMNS]
    counts = effective(run.events)
    assert len(counts[counts["kind"] == "merge"]) == merged.sum() - 4
    assert len(plots.segments(run)) == spans
    for figure in (plots.staleness(run), plots.weights(run), plots.timeline(run)):
        assert title(figure)
