"""Runs of several updates on several kinds of uneven workers, and how long each takes to a fixed accuracy.

The updates take turns on one lab, so that other work on the machine meets them all. Used by the benchmark of the updates.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

import labkit
from labkit import plots
from labkit.plots import style

KINDS = ("none", "steady", "jitter", "drift", "stalls")
BARRED = ("sgwu", "localsgd", "diloco", "allreduce")  # all wait for all


def grid(problem, updates: list, kinds: dict, seeds: list, target: float, kind: str, settings: dict) -> Iterator[tuple]:
    """(row, run) for each run; the run is None where it failed. `kinds` maps a name to the settings of `connect`."""
    if "sgwu" not in updates:
        raise ValueError(f"updates={updates} has no 'sgwu', by which the others are measured.")
    for uneven, ways in kinds.items():
        with labkit.connect(kind or None, 2, **ways) as lab:
            labkit.train(problem, lab, name=f"warm-up-{uneven}", **{**settings, "passes": 0.2}).wait(600)
            for number, seed in enumerate(seeds):
                turn = number % len(updates)
                for update in updates[turn:] + updates[:turn]:
                    row = {"uneven": uneven, "update": label(update), "seed": seed}
                    run = labkit.train(problem, lab, update=update, seed=seed, name="-".join(map(str, row.values())), **settings)
                    try:
                        run.wait(600)
                    except labkit.LabError as error:
                        yield row | {"seconds_to_target": np.inf, "error": str(error).splitlines()[0]}, None
                        continue
                    reached = run.time_to(target)
                    yield row | {"seconds_to_target": np.inf if reached is None else reached, **card(run)}, run


def card(run) -> dict:
    found = run.summary()
    return {key: found[key] for key in ("score", "seconds", "samples_per_s", "wait_share", "staleness_p95")}


def label(update) -> str:
    """ "fedbuff", or with its settings: "fedbuff size=4"."""
    if isinstance(update, str):
        return update
    return " ".join([update["name"], *(f"{key}={value}" for key, value in update.items() if key != "name")])


def ways(kinds: list, slowdown: list, jitter: float, drift: float, stalls: list) -> dict:
    """The settings of `connect` for each kind of unevenness."""
    extra = {"steady": {}, "jitter": {"jitter": jitter}, "drift": {"drift": drift}, "stalls": {"stalls": stalls}}
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kinds has {kind!r}. Known: {', '.join(KINDS)}.")
    return {kind: {} if kind == "none" else {"slowdown": slowdown, **extra[kind]} for kind in kinds}


def compared(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each kind and update: seconds to the target over the seeds, and how much sooner than SGWU, within a seed.

    A run that does not reach the target takes for ever; where SGWU does not reach it, nothing can be concluded.
    """
    keys = ["uneven", "update"]
    times = table.set_index([*keys, "seed"]).seconds_to_target
    first = times.xs("sgwu", level="update").replace(np.inf, np.nan).rename("first")
    both = times.reset_index().join(first, on=["uneven", "seed"])
    both["sooner"] = both["first"] / both.seconds_to_target
    groups = both.groupby(keys, sort=False)
    found = groups.seconds_to_target.agg(["median", "min", "max"]).add_prefix("seconds_")
    found["reached"] = groups.seconds_to_target.agg(lambda seconds: int(np.isfinite(seconds).sum()))
    found["seeds"] = groups.seconds_to_target.size()
    found = found.join(groups.sooner.agg(["median", "min", "max"]).add_prefix("sooner_"))
    columns = [name for name in ("score", "samples_per_s", "wait_share", "staleness_p95") if name in table]
    return found.join(table.groupby(keys)[columns].median())


def best(found: pd.DataFrame, uneven: str) -> pd.Series | None:
    """The row of the asynchronous update that most seeds bring to the target, and soonest; None if SGWU or all others never are."""
    here = found.loc[[uneven]]
    here = here[[name.split()[0] not in BARRED for _, name in here.index]]
    here = here[np.isfinite(here.seconds_median) & here.sooner_median.notna()]
    here = here[here.reached == here.reached.max()]
    return None if here.empty else here.loc[here.seconds_median.idxmin()]


def dots(found: pd.DataFrame, target: float, runs: list):
    """Median time to the target by kind of unevenness, a mark for each update, strokes over the seeds."""
    plots.extension()
    kinds, updates = (list(dict.fromkeys(found.index.get_level_values(key))) for key in ("uneven", "update"))
    times = found[["seconds_median", "seconds_min", "seconds_max"]]
    never = 1.12 * np.nanmax(times.replace(np.inf, np.nan).fillna(1.0).to_numpy())
    elements = [style.level(never)]
    for number, update in enumerate(updates):
        middle, low, high = times.xs(update, level="update").reindex(kinds).clip(upper=never).to_numpy().T
        x = np.arange(len(kinds)) + (number - (len(updates) - 1) / 2) * 0.8 / len(updates)
        elements.append(style.ticks(x, low, high))
        elements.append(style.marks(x, middle, number, update, ("kind", "seconds")))
    note = style.caption(runs, "dashed: never", "strokes: seeds")
    axes = {"ylabel": f"time to {100 * target:g} % (s)", "xticks": list(enumerate(kinds)), "ylim": (0, 1.05 * never)}
    return style.finish(elements, title(found), note, xlabel="", grid="y", **axes)


def title(found: pd.DataFrame) -> str:
    """The kinds of unevenness on which most is gained by not waiting."""
    gains = {kind: best(found, kind) for kind in dict.fromkeys(found.index.get_level_values("uneven"))}
    gains = {kind: row for kind, row in gains.items() if row is not None and row.sooner_median > 1}
    most = sorted(gains, key=lambda kind: -gains[kind].sooner_median)[:2]
    texts = [f"{gains[kind].name[1].split()[0]} {gains[kind].sooner_median:.2f}x ({kind})" for kind in most]
    return f"Sooner than SGWU: {', '.join(texts)}" if texts else "No asynchronous update is sooner than SGWU"


def longer(runs: list, steps: list) -> pd.DataFrame:
    """How long SGWU takes, and another update, with local passes of other lengths: wall times, simulated from two such runs."""
    rows = []
    for local_steps in steps:
        made = [labkit.simulate(run, local_steps=local_steps, name=f"{run.name}-{local_steps}-steps") for run in runs]
        seconds = [again.summary()["seconds"] for again in made]
        rows.append({"local_steps": local_steps, "sgwu_s": seconds[0], "other_s": seconds[1], "ratio": seconds[0] / seconds[1]})
    return pd.DataFrame(rows).set_index("local_steps")
