"""Figures of a search: a picture and a page each, and titles that are the answer."""

from __future__ import annotations

import threading

import numpy as np
import pandas as pd
import pytest

from labkit import plots
from labkit.errors import RunError
from labkit.plots.search import ABSENT, LINES, LIVE, MOST, POINTS, _Watch, history, score_name
from tests.plots.helpers import elements, title

FLOAT = {"name": "FloatDistribution", "attributes": {"low": 1e-3, "high": 1.0, "log": True}}
WIDTH = {"name": "IntDistribution", "attributes": {"low": 1, "high": 9, "log": False, "step": 1}}
MOMENTUM = {"momentum": {"name": "FloatDistribution", "attributes": {"low": 0.0, "high": 0.9, "log": False}}}
CHOICE = {
    "name": "CategoricalDistribution",
    "attributes": {"choices": ["sgd", "adam"]},
    "spaces": [["sgd", MOMENTUM], ["adam", {}]],
}


class Found:
    """What the figures read of a search of n trials on two workers, the third of them failed and the fourth pruned."""

    def __init__(self, n=12, method="gp", seed=0, lower=False):
        random = np.random.default_rng(seed)
        self.name, self.lower_is_better, self.state, self.objectives = "found", lower, "done", ["score", "time"]
        self.config = {"method": method, "space": {"lr": FLOAT, "width": WIDTH, "optimiser": CHOICE}}
        lr, optimiser = 10 ** random.uniform(-3, 0, n), random.choice(["sgd", "adam"], n)
        self._table = pd.DataFrame(
            {"trial": range(n), "lr": lr, "width": random.integers(1, 10, n), "optimiser": optimiser}
            | {"momentum": np.where(optimiser == "sgd", 0.5, np.nan), "score": 1 - (np.log10(lr) + 1) ** 2 / 4}
        )
        self._table["time"] = 1.0 + self._table.width
        self._table["state"] = ["failed" if i == 2 else "pruned" if i == 3 else "done" for i in range(n)]
        self._table.loc[self._table.state == "failed", "score"] = np.nan
        start = np.arange(n) // 2 * 1.0
        self._timeline = pd.DataFrame(
            {"trial": range(n), "fold": None, "worker": np.arange(n) % 2, "start": start, "end": start + 0.9, "passes": 1.0}
        )

    def table(self):
        return self._table.copy()

    def timeline(self):
        return self._timeline.copy()

    def front(self):
        done = self._table[self._table.state == "done"]
        order = done.sort_values(["score", "time"], ascending=[False, True])
        return order[order.time.cummin().diff().fillna(-1) < 0]

    def importance(self):
        if len(self._table) < 4:
            raise RunError("too few trials")
        return pd.Series({"lr": 0.75, "width": 0.15, "optimiser": 0.1})


FIGURES = {
    "history": plots.search_history,
    "history-of-several": lambda found: plots.search_history(
        [found, Found(method="random"), Found(method="random", seed=1)], x="seconds"
    ),
    "points": plots.search_points,
    "table": plots.search_table,
    "importance": plots.search_importance,
    "timeline": plots.search_timeline,
    "front": plots.search_front,
    "live": plots.search_live,
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name == "live" else name for name in FIGURES])
def test_a_picture(name, tmp_path):
    assert plots.save(FIGURES[name](Found()), tmp_path / "x.png").stat().st_size > 5_000


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_a_page(name, tmp_path):
    assert "Bokeh" in plots.save(FIGURES[name](Found()), tmp_path / "x.html").read_text()


def best_of(found):
    return found._table[found._table.state == "done"].score.max()


def test_titles_are_the_answers():
    found = Found()
    best = found.table().score.max()
    assert title(plots.search_history(found)) == f"gp finds held-out score {best:.4g}"
    both = [Found(method=method, seed=seed) for method in ("gp", "random") for seed in range(3)]
    for other in both[3:]:
        other._table["score"] -= 0.5
    high = np.median([best_of(other) for other in both[:3]])
    assert title(plots.search_history(both)) == f"gp finds held-out score {high:.4g}, the highest of 2"
    assert title(plots.search_history([both[0], both[3]])) == (
        f"2 methods find held-out score {best_of(both[3]):.4g} to {best_of(both[0]):.4g}"
    ), "a seed"
    assert title(plots.search_history([found, Found(method="other")])) == f"2 methods find held-out score {best:.4g}"
    lowest = Found(lower=True).table().score.min()
    assert title(plots.search_history(Found(lower=True))) == f"gp finds held-out score {lowest:.4g}"
    row = found.table().loc[found.table().score.idxmax()]
    assert title(plots.search_points(found)).startswith(
        f"Best by held-out score {row.score:.4g}: lr {row.lr:.3g}, width {row.width}, optim"
    )
    assert title(plots.search_table(found)) == "found: 10 done, 1 pruned, 1 failed of 12 trials"
    assert title(plots.search_importance(found)) == "lr seems to matter most: 75 %"
    assert title(plots.search_importance(Found(40))) == "lr matters most: 75 %"
    assert title(plots.search_front(found)).startswith(
        f"{len(found.front())} of 10 trials are worth a choice: held-out score from "
    )
    assert title(plots.search_timeline(found)) == "Blocks have a run 92 % of the time"  # 0.9 of each second, but for the last gap


def words(figure):
    """Title and note of a page."""
    import holoviews as hv

    return hv.renderer("bokeh").get_plot(figure).state.html_attributes["aria-label"]


def test_a_score_is_named_by_what_it_is_measured_on():
    found = Found()
    assert score_name(found) == "held-out score" and "by held-out score alone" in words(plots.search_history(found))
    assert "score: held-out score" in words(plots.search_table(found))
    found.objectives = ["score"]
    assert title(plots.search_points(found)).startswith("Best held-out score ") and "alone" not in words(
        plots.search_history(found)
    )
    found.config["problem"] = {"notebook": "n.ipynb"}
    assert score_name(found) == "score" and title(plots.search_history(found)).startswith("gp finds score ")
    found.config |= {"problem": "m:p", "code": {"python": "3", "objective": {"mine": "0"}}}
    assert score_name(found) == "score", "of a function of a run"
    found.config["objectives"] = [["score", None], ["mine", None]]
    assert score_name(found) == "held-out score"
    found.objectives = ["time"]
    assert score_name(found) == "time"


@pytest.mark.parametrize("figure", [one for name, one in FIGURES.items() if name != "history-of-several"])
def test_of_a_search_without_trials_the_figure_is_a_message_and_what_is_no_search_is_refused(figure, tmp_path):
    assert plots.save(figure(Found(0)), tmp_path / "empty.png").stat().st_size > 2_000
    with pytest.raises(TypeError, match="must be a search"):
        figure(3)


def test_trials_that_break_a_constraint_are_marked_and_one_objective_has_no_front():
    found = Found()
    found.config |= {"constraints": {"time": [None, 4.0], "score": [0.1, None], "width": [2, 3]}}
    found._table["feasible"] = found._table.time <= 4
    found.front = lambda: found._table[found._table.feasible].iloc[:2]
    figure = plots.search_front(found)
    drawn = {label.partition(" (")[0] for label in elements(figure, "Scatter")}
    assert {"front", "another trial", "breaks a constraint"} >= drawn >= {"front", "breaks a constraint"}
    assert ": time from " in title(plots.search_front(found, x="score", y="time"))
    assert len(history(found)) == (found._table.feasible & found._table.score.notna()).sum()
    with pytest.raises(ValueError, match="Did you mean 'score'"):
        plots.search_front(found, x="scor")
    found.objectives = ["score", "time", "width"]
    assert not elements(plots.search_front(found), "Curve"), "no line through trials that are on the front by what is not drawn"
    found.objectives = ["score"]
    with pytest.raises(ValueError, match="has one objective"):
        plots.search_front(found)


def test_the_live_figure_has_the_same_elements_from_the_beginning(monkeypatch):
    plots.extension("interactive")
    found, whole = Found(0), Found()
    found.state = "running"
    figure = plots.search_live(found)
    import holoviews as hv

    panels = figure.traverse(lambda view: view, [hv.DynamicMap])
    from bokeh.models import Plot

    shown = list(hv.renderer("bokeh").get_plot(figure).state.select({"type": Plot}))
    assert len(shown) == 5 == len({plot.y_range.id for plot in shown}) == len({plot.x_range.id for plot in shown}), (
        "axes of their own"
    )
    kinds = [[type(element) for element in panel[()].traverse(lambda element: element, [hv.Element])] for panel in panels]
    assert [title(panel[()]) for panel in panels] == [
        "found: none begun of 0 trials",
        "found: waiting for a held-out score",
        "found: waiting for two trials with a held-out score",
        "What matters: no trial has a score yet",
        "Who trained what when",
    ]
    found._table, found._timeline, found.state = whole._table, whole._timeline, "done"
    for thread in threading.enumerate():
        if thread.name == "live-found":
            thread.join(60)
            assert not thread.is_alive()
    assert title(panels[1][()]) == f"found: best by held-out score {whole.table().score.max():.4g} after 11 trials"
    assert [title(panel[()]) for panel in panels[:1] + panels[2:]] == [
        title(figure(whole)) for figure in (plots.search_table, plots.search_points, plots.search_importance, plots.search_timeline)
    ]
    assert kinds == [[type(element) for element in panel[()].traverse(lambda element: element, [hv.Element])] for panel in panels]


def texts(figure):
    import holoviews as hv

    return [
        str(text).replace("\N{NO-BREAK SPACE}", " ")
        for labels in figure.traverse(lambda element: element, [hv.Labels])
        for text in labels.dimension_values("text")
    ]


def paths(element):
    """The points of each path of a line with gaps."""
    rows = element.array().astype(float)
    return [part[~np.isnan(part[:, 0])] for part in np.split(rows, np.flatnonzero(np.isnan(rows[:, 0]))) if len(part) > 1]


def test_the_table_has_the_best_trials_then_those_under_way_then_the_latest():
    found = Found(40)
    found.objectives = ["score"]
    found._table["error"], found._table["seconds"] = "", 0.9
    found._table.loc[38:, ["state", "score"]] = "running", np.nan
    found._table.loc[2, "error"] = "RuntimeError: it broke"
    head, *rows = texts(plots.search_table(found))
    assert head.split() == ["trial", "state", "score", "s", "lr", "width", "optimiser", "momentum"]
    best = found._table[found._table.state == "done"].sort_values("score", ascending=False).head(3)
    assert [row.split()[:3] for row in rows[:3]] == [
        [rank, str(trial), "done"] for rank, trial in zip(("best", "2nd", "3rd"), best.trial, strict=True)
    ]
    latest = [str(trial) for trial in range(37, 20, -1) if trial not in set(best.trial)][:7]
    assert [row.split()[0] for row in rows[3:]] == ["39", "38", *latest] and rows[3].split()[1:3] == ["running", "-"]
    found.objectives, found.config["constraints"] = ["score", "time"], {"time": [None, 4.0]}
    found._table["feasible"] = found._table.time <= 4
    fronts = [row.split()[1] for row in texts(plots.search_table(found)) if row.startswith("front")]
    assert fronts and set(map(int, fronts)) <= set(found.front().trial)


def test_a_table_of_many_parameters_says_how_many_it_leaves_out(tmp_path):
    found = Found()
    for i in range(12):
        found.config["space"][f"parameter_{i}"] = WIDTH
        found._table[f"parameter_{i}"] = np.arange(12) % 9 + 1
    head, *rows = texts(plots.search_table(found))
    assert (
        head.endswith(f"+{12 + 4 - sum(word in found._table for word in head.split()) + 4} more")
        and max(map(len, [head, *rows])) < 115
    )
    assert len(title(plots.search_points(found))) < 120


def test_a_trial_that_ended_early_is_not_the_best():
    found = Found()
    table = history(found)  # of which `Search.history` is made
    assert len(table) == 11 and table.trials.tolist() == list(range(1, 12)) and table.seconds.is_monotonic_increasing
    assert np.array_equal(table.best, table.score.where(table.state == "done").cummax().ffill())
    best = found._table[found._table.state == "done"].score.max()
    found._table.loc[3, "score"] = 7.0
    assert title(plots.search_history(found)) == f"gp finds held-out score {best:.4g}"
    assert title(plots.search_points(found)).startswith(f"Best by held-out score {best:.4g}")
    assert elements(plots.search_history(found), "Scatter")["a pruned trial"].array()[:, 1] == [7.0]


def test_searches_that_did_not_go_at_the_same_time_have_a_line():
    early, late = Found(), Found(seed=1)
    late._timeline[["start", "end"]] += 100
    (line,) = elements(plots.search_history([early, late], "seconds"), "Curve").values()
    assert line["seconds"].tolist() == [100.9] and line["held-out score"] == np.median([best_of(early), history(late).best.iloc[0]])


def test_a_trial_without_one_of_the_objectives_breaks_no_axis():
    found = Found()
    found._table.loc[3, "time"] = np.nan  # pruned before
    lines = [path for one in elements(plots.search_points(found), "Curve").values() for path in paths(one)]
    assert all(len(line) == 6 for line in lines)
    heights = np.array(lines)[:, -1, 1]
    assert sorted(heights)[:2] == [ABSENT, 0] and max(heights) == 1


def test_a_trial_passes_below_the_axis_of_a_parameter_that_it_does_not_have_and_none_is_a_choice():
    found = Found()
    found.objectives = ["score"]
    found.config["space"]["dropout"] = {"attributes": {"choices": [None, 0.5]}}
    found._table["dropout"] = [np.nan, 0.5] * 6
    figure = plots.search_points(found)
    lines = [path for label, one in elements(figure, "Curve").items() for path in paths(one) if label != "the best"]
    lines.append(elements(figure, "Curve")["the best"].array().astype(float))
    assert len(lines) == 11 and not np.isnan(np.concatenate(lines)).any()
    heights = np.array(lines)[:, :, 1]  # lr, width, optimiser, momentum, dropout, score
    assert ((heights[:, 3] < 0) == (heights[:, 2] == 1)).all() and set(heights[:, 4]) == {0, 1}
    assert {"none", "None", "sgd", "adam"} <= set(texts(figure))


def test_of_thousands_of_trials_some_are_drawn():
    found = Found(4000)
    found.objectives, found.state = ["score"], "running"
    lines = elements(plots.search_points(found), "Curve")
    assert {label: len(paths(one)) for label, one in lines.items() if label != "the best"} == {
        "": LINES,
        f"the best {MOST} of 3,999": MOST - 1,
    }
    assert len(elements(plots.search_history(found), "Scatter")[f"a trial ({POINTS} of 3,998 drawn)"]) == POINTS
    assert sum(map(len, elements(LIVE[-1](found, _Watch(found).look()), "Rectangles").values())) == POINTS
    assert sum(map(len, elements(plots.search_timeline(found), "Rectangles").values())) == 4000


def test_while_a_search_goes_its_importance_is_computed_ever_more_rarely():
    whole, found, counted = Found(400), Found(0), []
    found.importance = lambda: counted.append(len(found._table)) or pd.Series({"lr": 1.0})
    found.state, watch = "running", _Watch(found)
    assert watch.look().importance is None
    for n in range(1, 401):
        found._table, found._timeline = whole._table.iloc[:n], whole._timeline.iloc[:n]
        seen = watch.look()
        assert seen.counted <= (found._table.score.notna()).sum() <= 1.1 * seen.counted + 2
    assert len(counted) < 60
    found.state = "done"
    assert watch.look().counted == 399 == watch.look().counted and counted.count(400) <= 1


def test_importance_is_a_bar_a_parameter_of_the_largest_ones():
    found = Found()
    found.importance = lambda: pd.Series({f"a_long_name_of_a_parameter_{i}": 1 / 20 for i in range(20)})
    figure = plots.search_importance(found)
    assert len(elements(figure, "Rectangles")["importance"]) == 15 == len(texts(figure))
    assert texts(plots.search_importance(Found(3))) == [] and title(plots.search_importance(Found(3))) == "What matters"


def test_the_legend_of_a_picture_is_that_of_a_page_and_has_what_is_drawn():
    import holoviews as hv

    figure = plots.search_points(Found(40))
    page = hv.renderer("bokeh").get_plot(figure).state.legend[0]
    picture = hv.renderer("matplotlib").get_plot(figure).handles["axis"].get_legend()
    said = [text.get_text() for text in picture.get_texts()]
    assert said == [item.label.value for item in page.items] == ["on the front (4)", "the best by held-out score"]
    assert [handle.get_marker() for handle in picture.legend_handles] == ["None", "o"], "lines without and with markers"
