"""Figures of a search: a picture and a page each, and titles that are the answer."""

from __future__ import annotations

import threading

import numpy as np
import pandas as pd
import pytest

from labkit import plots
from labkit.errors import RunError
from labkit.plots.search import _ended
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


def test_titles_are_the_answers():
    found = Found()
    best = found.table().score.max()
    assert title(plots.search_history(found)) == f"gp finds {best:.4g}"
    others = [Found(method="random", seed=seed) for seed in (1, 2)]
    winner = max(
        {"gp": best, "random": np.median([other.table().score.max() for other in others])}.items(), key=lambda pair: pair[1]
    )
    assert title(plots.search_history([found, *others])) == f"{winner[0]} finds {winner[1]:.4g}, the highest of 2"
    assert title(plots.search_history([found, Found(method="other")])) == f"gp and other find {best:.4g}"
    lowest = Found(lower=True).table().score.min()
    assert title(plots.search_history(Found(lower=True))) == f"gp finds {lowest:.4g}"
    row = found.table().loc[found.table().score.idxmax()]
    assert title(plots.search_points(found)).startswith(f"Best: lr {row.lr:.3g}, width {row.width}, optimiser {row.optimiser}")
    assert title(plots.search_importance(found)) == "lr matters most: 75 %"
    assert title(plots.search_front(found)).startswith(f"{len(found.front())} of 10 trials are worth a choice: score from ")
    assert title(plots.search_timeline(found)) == "Blocks have a run 92 % of the time"  # 0.9 of each second, but for the last gap


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
    assert {"front", "another trial", "breaks a constraint"} >= set(elements(figure, "Scatter")) >= {"front", "breaks a constraint"}
    assert ": time from " in title(plots.search_front(found, x="score", y="time"))
    assert len(_ended(found)) == (found._table.feasible & found._table.score.notna()).sum()
    with pytest.raises(ValueError, match="Did you mean 'score'"):
        plots.search_front(found, x="scor")
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
    hv.renderer("bokeh").get_plot(figure)
    kinds = [[type(element) for element in panel[()].traverse(lambda element: element, [hv.Element])] for panel in panels]
    assert title(panels[0][()]) == "found: waiting for a score"
    found._table, found._timeline, found.state = whole._table, whole._timeline, "done"
    for thread in threading.enumerate():
        if thread.name == "live-found":
            thread.join(10)
            assert not thread.is_alive()
    assert title(panels[0][()]) == f"found: best score {whole.table().score.max():.4g} after 11 trials"
    assert title(panels[1][()]) == title(plots.search_timeline(whole))
    assert kinds == [[type(element) for element in panel[()].traverse(lambda element: element, [hv.Element])] for panel in panels]
