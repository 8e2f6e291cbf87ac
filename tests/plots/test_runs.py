"""Figures of runs hold what the events hold, and their titles state what was found."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from labkit import plots
from labkit.plots import style
from labkit.plots.claims import rounded
from labkit.runs.analysis import summary
from labkit.runs.events import COLUMNS, effective
from tests.plots.helpers import Recorded, elements, note, rates, title


def test_curves_hold_the_curve_and_the_crossing(tmp_path):
    fast, slow = Recorded(tmp_path, "a"), Recorded(tmp_path, "b", "SGWU")
    figure = plots.curves([slow, fast], x="samples", target=0.6)
    table = fast.curve()
    quick, late = (rounded(np.interp(0.6, run.curve()["score"], run.curve()["samples"]), 2) for run in (fast, slow))
    drawn = elements(figure, "Curve")[f"AGWU + IDPA: 60 % at {quick} samples"]
    assert np.array_equal(drawn["samples"], table["samples"]) and np.array_equal(drawn["score"], table["score"])
    said = f"60 % is reached after {quick} samples (AGWU + IDPA) to {late} samples (SGWU + IDPA)"
    assert title(figure) == title(figure, "matplotlib") == said, "one seed each: no winner"
    assert title(plots.curves(fast, x="samples", target=0.6)) == f"AGWU + IDPA reaches 60 % after {quick} samples"
    assert title(plots.curves([fast, slow], target=0.93)).startswith("Only AGWU + IDPA reaches 93 %, after ")
    assert title(plots.curves(fast, target=0.999)) == "AGWU + IDPA does not reach 99.9 % test accuracy"


def test_seeds_share_a_line_and_other_settings_do_not(tmp_path):
    seeds = [Recorded(tmp_path, f"s{seed}", seed=seed) for seed in range(3)]
    other = Recorded(tmp_path, "even", slowdown=(1, 1))
    drawn = elements(plots.curves([*seeds, other], x="samples"), "Curve")
    assert sorted(drawn) == ["AGWU + IDPA, no slowdown, 1 seed", "AGWU + IDPA, slowdown 1:4, 3 seeds"]
    line = drawn["AGWU + IDPA, slowdown 1:4, 3 seeds"]
    every = np.stack([np.interp(line["samples"], run.curve()["samples"], run.curve()["score"]) for run in seeds])
    assert np.allclose(line["score"], np.median(every, axis=0))
    (band,) = elements(plots.curves(seeds, x="samples"), "Area").values()
    assert np.allclose(band["low"], every.min(axis=0)) and np.allclose(band["high"], every.max(axis=0))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_winner_and_a_band_are_of_three_seeds(n, tmp_path):
    quick, late = ([Recorded(tmp_path, f"{rule}-{seed}", rule, seed=seed) for seed in range(n)] for rule in ("AGWU", "SGWU"))
    figure = plots.curves([*late, *quick], target=0.6)
    assert title(figure).startswith("AGWU + IDPA reaches 60 % first, after " if n == 3 else "60 % is reached after ")
    assert len(elements(figure, "Area")) == (n == 3) and len(figure.traverse(lambda line: line, ["Curve"])) == (4 if n == 2 else 2)
    stale = title(plots.staleness([*late, *quick]))
    assert stale.startswith("AGWU + IDPA is stalest: median" if n == 3 else "Median staleness 0 to 1, ")
    assert title(plots.balance([*late, *quick])).startswith("Local passes are balanced to 0.8"), "their ranges overlap"


@pytest.mark.parametrize("y", ["score", "loss"])
@pytest.mark.parametrize("later", [(0.5, 0.8), (0.85, 0.88), (0.5, 0.5)], ids=str)
def test_the_first_point_of_a_line_is_in_sight_or_the_caption_says_that_the_axis_is_cut(run, y, later):
    from holoviews import Store

    values = np.array([0.1, *np.linspace(*later, 9)]) if y == "score" else np.array([9.0, *np.linspace(*later, 9)])
    curve = run.curve().iloc[:10].assign(**{y: values})
    run.curve = lambda: curve
    figure = plots.curves(run, y=y)
    bottom, top = Store.lookup_options("bokeh", figure, "plot").kwargs["ylim"]
    assert (bottom <= values[1:]).all() and (values[1:] <= top).all()
    assert bottom <= values[0] <= top or f"axis cut: lines begin at {values[0]:.3g}" in note(figure)
    assert ("axis cut" in note(figure)) == (np.ptp(later) > 0 and np.ptp(values[1:]) < np.ptp(values) / 3)


def test_axes_of_time_and_of_samples_begin_at_zero(run):
    from holoviews import Store

    for figure in (plots.curves(run), plots.curves(run, "samples"), plots.timeline(run)):
        for backend in ("bokeh", "matplotlib"):
            assert Store.lookup_options(backend, figure, "plot").kwargs["xlim"][0] == 0


def test_runs_of_one_name_have_a_line_each_whose_colour_is_theirs(tmp_path):
    """Labelled by the rate, and by the directory where all is equal; a run without a point leaves its colour free."""
    runs = [Recorded(tmp_path / folder, "same") for folder in "abc"]
    for run, lr in zip(runs, (0.01, 0.1, 0.1), strict=True):
        run.config = run.config.replace(problem={"model": "lenet", "lr": lr})
    said = ["lr 0.01", "lr 0.1 (b/same)", "lr 0.1 (c/same)"]
    for draw in (plots.curves, plots.balance):
        assert [label.partition(": mean")[0] for label in elements(draw(runs), "Curve")] == [
            f"AGWU + IDPA, {what}" for what in said
        ]
    assert set(elements(plots.staleness(runs), "Rectangles")) == {f"AGWU + IDPA, {what}" for what in said}

    def colour(figure, what):
        curve = elements(figure, "Curve")[f"AGWU + IDPA, {what}"]
        return curve.opts.get("style", backend="matplotlib").kwargs["color"]

    whole = colour(plots.curves(runs), said[2])
    runs[0].curve = lambda: Recorded(tmp_path / "d", passes=0).curve()
    assert colour(plots.curves(runs), said[2]) == whole


def test_the_timeline_adds_up_to_the_events(tmp_path):
    run = Recorded(tmp_path, update="SGWU", slowdown=(1, 2, 4))
    spans = run.timeline().assign(length=lambda table: table["end"] - table["start"])
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
    assert list(run.timeline()[["activity", "start", "end"]].itertuples(index=False, name=None)) == expected


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
    assert list(run.timeline()[["activity", "start", "end"]].itertuples(index=False, name=None)) == expected


def test_timeline_names_who_waits_most(tmp_path, run):
    slow = Recorded(tmp_path, "sync", "SGWU")
    releases = slow.events[slow.events["kind"] == "release"]
    share = (releases.groupby("worker")["wait_s"].sum() / releases.groupby("worker")["seconds"].max()).astype(float)
    expected = f"SGWU + IDPA: worker {share.idxmax()} waits {100 * share.max():.1f} % of its time"
    figure = plots.timeline(slow)
    assert title(figure) == expected.replace(".0 %", " %")
    assert "in brackets: of all workers' time" in note(figure)
    assert len(elements(figure, "Segments")[""]) == (slow.events["kind"] == "merge").sum()
    assert title(plots.timeline(run)) == "AGWU + IDPA: no worker waits more than 0.5 % of its time"


def test_staleness_counts_every_merge_once(tmp_path, run):
    merges = run.events[run.events["kind"] == "merge"]
    bars = elements(plots.staleness(run), "Rectangles")
    for worker, own in merges.groupby("worker"):
        counts = np.bincount(own["staleness"].astype(int), minlength=3)
        assert np.array_equal(bars[f"worker {worker}"]["top"], counts)
    other = Recorded(tmp_path, "sync", "SGWU")
    other.name = run.name  # names may repeat in two folders
    bars = elements(plots.staleness([run, other]), "Rectangles")
    assert np.allclose(bars["AGWU + IDPA"]["top"], 100 * np.bincount(merges["staleness"].astype(int)) / len(merges))
    assert list(bars["SGWU + IDPA"]["top"]) == [100, 0, 0], "shares, as one run may have more merges than another"


@pytest.mark.parametrize("values", [[0] * 7 + [1] * 7, [*range(14)], [0] * 13 + [9], [2] * 14], ids=str)
def test_table_and_figure_have_the_same_quantiles_of_staleness_and_each_occurred(run, values):
    run.events.loc[run.events["kind"] == "merge", "staleness"] = values
    card = summary(run.events, run.config, None)
    said = f"median staleness {card['staleness_p50']:g}, 95 % of the merges at most {card['staleness_p95']:g}"
    assert title(plots.staleness(run)) == f"AGWU + IDPA: {said}"
    for name, share in (("staleness_p50", 0.5), ("staleness_p95", 0.95)):
        assert card[name] in values and np.mean(np.array(values) < card[name]) < share <= np.mean(np.array(values) <= card[name])


def test_far_staleness_still_fits(tmp_path, run):
    run.events.loc[run.events["kind"] == "merge", "staleness"] = np.arange(14) * 10
    bars = elements(plots.staleness(run), "Rectangles")
    assert sum(bar["top"].sum() for bar in bars.values()) == 14
    assert all(len(bar) <= 26 for bar in bars.values())


def test_balance_holds_the_ratios(run):
    ratio = run.balance()["ratio"]
    figure = plots.balance(run)
    ((label, line),) = elements(figure, "Curve").items()
    assert np.allclose(line["ratio"], ratio)
    assert label == f"AGWU + IDPA: mean {ratio[1:].mean():.2f} from pass 2 on" and f"{ratio[1:].mean():.2f}" in title(figure)


def test_weights_are_shares(run):
    bars = elements(plots.weights(run), "Rectangles")
    assert np.allclose(bars["share of the samples"]["top"], [80, 20])
    assert np.allclose(bars["effective weight"]["top"], [200 / 3, 100 / 3])


def test_speed_compares_the_fastest_with_the_slowest():
    assert title(plots.speed(rates(1000.0, 4000.0, 2000.0, slowdown=1))) == "Worker 1 is 4.0 times as fast as worker 0"
    with pytest.raises(ValueError, match="no column slowdown"):
        plots.speed(rates(1.0, slowdown=1).drop(columns="slowdown"))


def test_bad_arguments_are_refused(run):
    with pytest.raises(ValueError, match=r"x='epochs' is not known\. Known: seconds, samples"):
        plots.curves(run, x="epochs")
    with pytest.raises(ValueError, match="target=90 must be above 0 and at most 1"):
        plots.curves(run, target=90)
    with pytest.raises(ValueError, match="at least one"):
        plots.balance([])


def test_a_target_is_drawn_where_no_line_is(run):
    from holoviews import Store

    for target in (0.01, 1.0):
        low, high = Store.lookup_options("bokeh", plots.curves(run, target=target), "plot").kwargs["ylim"]
        assert low <= target < high


def test_what_a_resume_has_undone_is_drawn_where_time_went_and_counted_nowhere_else(run):
    merged = run.events[run.events["kind"] == "merge"].groupby("worker").size()
    last = run.events[run.events["kind"] == "merge"]["version"].max()
    resume = pd.DataFrame([{"kind": "resume", "version": last - 4, "seconds": run.events["seconds"].max()}], columns=COLUMNS)
    spans = len(run.timeline())
    run.events = pd.concat([run.events, resume.dropna(axis=1)], ignore_index=True)[COLUMNS]
    counts = effective(run.events)
    assert len(counts[counts["kind"] == "merge"]) == merged.sum() - 4
    assert len(run.timeline()) == spans
    for figure in (plots.staleness(run), plots.weights(run), plots.timeline(run)):
        assert title(figure)


def test_any_column_of_the_curve_is_drawn(tmp_path, monkeypatch):
    run = Recorded(tmp_path)
    curve = run.curve().assign(mae=lambda table: 3.0 - table.score)
    run.curve, run.trained = lambda: curve, lambda curve: curve[["mae"]].rename(columns={"mae": "train_loss"})
    figure = plots.curves(run, "samples", 2.5, y="mae")
    where = np.interp(-2.5, -curve["mae"], curve["samples"])
    assert title(figure) == f"AGWU + IDPA reaches mae 2.5 after {rounded(where, 2)} samples"
    (drawn,) = elements(figure, "Curve").values()
    assert np.array_equal(drawn["mae"], curve["mae"])
    assert title(plots.curves(run, y="train_loss")) == "Training loss against time"
    with pytest.raises(ValueError, match=r"y='maee' is not known. Known: score, mae.*Did you mean 'mae'\?"):
        plots.curves(run, y="maee")
    curve.loc[3:4, "mae"] = np.nan
    notes, finish = [], style.finish
    monkeypatch.setattr(style, "finish", lambda *given, **options: notes.append(given[2:]) or finish(*given, **options))
    plots.curves(run, y="mae")
    assert "2 NaN not drawn" in notes[0][0]
    curve["mae"] = np.nan
    assert "mae is NaN in every row" in str(plots.curves(run, y="mae").traverse(lambda element: element.data, ["Text"]))
