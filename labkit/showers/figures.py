"""The figures of validations: one page on which generated showers stand beside simulated ones, and beside what these differ among themselves.

Used by users through `labkit.showers.page` and `labkit.showers.fractions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.errors import like
from labkit.plots import style

if TYPE_CHECKING:
    import holoviews as hv

NAMES = ("simulated", "simulated, others", "generated")


def page(found: Any) -> hv.Layout:
    """Profiles along and across, cells, sampling fraction and separation powers of what `labkit.showers.validate` returns, under each other.

    Examples
    --------
    >>> figure = labkit.showers.page(labkit.showers.validate(gan, n=32, classifiers=[], bootstrap=2))
    """
    like("found", found, ("table", "real", "made"), "what labkit.showers.validate returns")
    style.extension()
    samples = (found.real, found.other, found.made)
    n = len(found.real["total"])
    note = f"{n} showers each" + (f"; data: {of}" if (of := getattr(found, "data", "")) else "")
    return style.stack(
        [_along(found, samples, note), _across(samples), _cells(samples), _fraction(found), _separations(found)],
        space=0.9,
        height=24,
    )


def headline(found: Any) -> str:
    """The result in a line."""
    worst = 100 * float(np.abs(found.bins["ratio"] - 1).max())
    auc = next((f", a classifier's AUC {row.value:.2f}" for row in found.table.itertuples() if row.metric == "AUC low"), "")
    return f"{found.title}: sampling fraction within {worst:.1f} %, separation of the total {found['separation total']:.3f}{auc}"


def _along(found: Any, samples: tuple, note: str) -> hv.Overlay:
    layers = np.arange(samples[0]["layer"].shape[1])
    lines = [style.line(layers, of["layer"].mean(0), i, NAMES[i], ("layer", "energy")) for i, of in enumerate(samples)]
    return style.finish(lines, headline(found), note, xlabel="layer (depth)", ylabel="mean energy (MeV)", height=3)


def _across(samples: tuple) -> hv.Overlay:
    side = samples[0]["across"].shape[1]
    x = np.arange(side) - (side - 1) / 2
    logs = [np.log10(np.maximum(of["across"].mean(0), 1e-4)) for of in samples]
    lines = [style.line(x, y, i, NAMES[i], ("x", "across")) for i, y in enumerate(logs)]
    apart = np.abs(logs[2] - logs[0]).max()
    title = f"Across, no column is more than a factor of {10**apart:.2f} off"
    return style.finish(lines, title, "", False, xlabel="x (cells from the middle)", ylabel="log10 of mean energy (MeV)", height=3)


def _cells(samples: tuple) -> hv.Overlay:
    edges = samples[0]["spectrum"][0]
    middle = (np.log10(edges[1:]) + np.log10(edges[:-1])) / 2
    lines = [
        style.line(middle, np.log10(np.maximum(of["spectrum"][1], 1e-2)), i, NAMES[i], ("cell", "count"))
        for i, of in enumerate(samples)
    ]
    hits = [of["hits"].mean() for of in samples]
    title = f"{hits[2]:.0f} cells are hit in a generated shower, {hits[0]:.0f} in a simulated one"
    return style.finish(
        lines, title, "", False, xlabel="log10 of a cell's energy (MeV)", ylabel="log10 of cells a shower, decade", height=3
    )


def _fraction(found: Any) -> hv.Overlay:
    bins = found.bins
    middle = ((bins["low"] + bins["high"]) / 2).to_numpy()
    lines = [
        style.line(middle, bins[f"fraction_{key}"].to_numpy(), i, NAMES[i], ("E", "fraction"))
        for i, key in ((0, "real"), (2, "made"))
    ]
    deep = int((bins["maximum_made"] - bins["maximum_real"]).abs().max())
    title = f"The sampling fraction by energy; the shower maximum is {deep} layer{'s' * (deep != 1)} off at most"
    return style.finish(lines, title, "", False, xlabel="energy (GeV)", ylabel="visible energy (MeV per GeV)", height=3)


def _separations(found: Any) -> hv.Overlay:
    rows = found.table[found.table["metric"].str.startswith("separation")]
    bars = rows.set_index("metric")[["value", "floor"]].rename(lambda metric: metric.removeprefix("separation "))
    title = f"Separation powers: {bars['value'].idxmax()} tells them apart best"
    bars.columns = ["generated against simulated", "floor: simulated against others"]
    return style.columns(bars, title, "0: the same, 1: apart", ylabel="separation power", xrotation=30, height=3)


def fractions(found: Mapping[str, Any]) -> hv.Overlay:
    """The sampling fraction of generated showers by energy, relative to the simulated one: a line for each of several validations, by name.

    Examples
    --------
    >>> figure = labkit.showers.fractions({"2 workers": labkit.showers.validate(gan, n=32, classifiers=[], bootstrap=2)})
    """
    if not isinstance(found, Mapping) or not found:
        raise TypeError(f"found={found!r} must be a dict of what labkit.showers.validate returns, by name.")
    style.extension()
    lines, worst, n = [], ("", 0.0), 0
    for number, (name, one) in enumerate(found.items()):
        like(f"found[{name!r}]", one, ("table", "bins"), "what labkit.showers.validate returns")
        middle, ratio, n = (
            ((one.bins["low"] + one.bins["high"]) / 2).to_numpy(),
            one.bins["ratio"].to_numpy(),
            len(one.real["total"]),
        )
        lines.append(style.line(middle, ratio, number, name, ("E", "ratio")))
        worst = max(worst, (name, float(np.abs(ratio - 1).max())), key=lambda pair: pair[1])
    title = f"The sampling fraction is within {100 * worst[1]:.1f} % of the simulated one; furthest off: {worst[0]}"
    labels = {"xlabel": "energy (GeV)", "ylabel": "sampling fraction / simulated"}
    return style.finish([style.level(1.0), *lines], title, f"{n} showers each, 1 seed", **labels)
