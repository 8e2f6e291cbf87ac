"""Figures of jets: their masses by class, where their embeddings lie, by class and by cluster, and what more workers do to speed and accuracy.

Used by users, as `labkit.jets.masses`, `embedding`, `before_and_after` and `worlds`, and by notebooks 12 and 13.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.errors import known
from labkit.jets.clustering import accuracy
from labkit.jets.evaluation import chosen, embedded, network
from labkit.jets.files import SUBSTRUCTURE, Jets
from labkit.jets.problem import first
from labkit.plots import style
from labkit.problems import Clock
from labkit.problems.problem import noise

if TYPE_CHECKING:
    import holoviews as hv
    import pandas as pd

BINS, HIGHEST = 40, 250.0
SHOWN = 600  # jets in a scatter


def masses(jets: Jets, of: str = "mass", note: str = "") -> hv.Overlay:
    """The distribution of the mass in GeV, or of another of `SUBSTRUCTURE`, a line for each class; each has the area 1.

    Examples
    --------
    >>> figure = labkit.jets.masses(jets, "trimmed")
    """
    known("of", of, ("mass", *(SUBSTRUCTURE if "substructure" in jets.of_jet else ())))
    style.extension()
    values = jets.of_jet["mass"] if of == "mass" else jets.of_jet["substructure"][:, SUBSTRUCTURE.index(of)]
    low, high = (0.0, HIGHEST) if of in ("mass", "trimmed") else (float(values.min()), float(np.quantile(values, 0.995)))
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    middle, elements, peaks = (edges[1:] + edges[:-1]) / 2, [], []
    for number, name in enumerate(jets.classes):
        own = values[jets.label == number]
        if not len(own):
            continue
        height = np.histogram(own, edges)[0] / (len(own) * (edges[1] - edges[0]))
        peaks.append(f"{name} {middle[height.argmax()]:.3g}")
        elements.append(style.line(middle, height, number, name, (of, "share")))
    if not elements:
        return style.message("The masses of the jets", "there are no jets to draw.")
    unit = " (GeV)" if of in ("mass", "trimmed") else ""
    what = {"mass": "Mass", "trimmed": "Trimmed mass"}.get(of, of)
    title = f"{what} of the jets by class: highest at {', '.join(peaks)}{' GeV' if unit else ''}"
    return style.finish(elements, title, note, xlabel=f"{what.lower()}{unit}", ylabel="share per unit", ylim=(0, None))


def embedding(
    z: Any, label: Any, classes: Any, clusters: Any = None, note: str = "", title: str = "", centres: Any = None
) -> hv.Overlay:
    """Embeddings z (n, d) along their two widest directions, coloured by class, with the `centres` (K, d) of clusters; the title says how
    well `clusters` (n,) agree with the classes.

    Examples
    --------
    >>> z, label, centres, of = labkit.jets.embedded(clustered.problem(), labkit.jets.network(clustered))
    >>> figure = labkit.jets.embedding(z, label, jets.classes, of, centres=centres)
    """
    style.extension()
    z, label = np.asarray(z, np.float64), np.asarray(label)
    centred = z - z.mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)

    def flattened(values: np.ndarray) -> np.ndarray:
        flat = values @ directions[:2].T
        return flat if flat.shape[1] > 1 else np.column_stack([flat, np.zeros(len(flat))])

    flat, axes = flattened(centred), (f"first {title}", f"second {title}")  # figures under each other have axes of their own
    shown = np.random.default_rng(0).permutation(len(z))[:SHOWN]
    elements = []
    for number, name in enumerate(classes):
        own = shown[label[shown] == number]
        if len(own):
            elements.append(style.marks(flat[own, 0], flat[own, 1], number, name, axes))
    if not elements:
        return style.message("Embeddings of jets", "there are no jets to draw.")
    if centres is not None:
        middle = flattened(np.asarray(centres, np.float64) - z.mean(0))
        elements.append(style.labels([(x, y, str(number)) for number, (x, y) in enumerate(middle.tolist(), 1)], "black", 11))
    if clusters is not None:
        agree = 100 * accuracy(np.asarray(clusters), label)
        title = f"{title or 'Clusters and classes'}: {agree:.0f} % of the jets are in the cluster of their class"
    note = note or (f"{len(shown)} of {len(z)} jets" if len(shown) < len(z) else "")
    return style.finish(elements, title or "Embeddings of jets by class", note, xlabel="widest direction", ylabel="second widest")


def before_and_after(run: Any, classes: Sequence[str], note: str = "") -> hv.Layout:
    """The test jets of a run of UCluster in its embedding: above after pretraining, with the clusters of k-means, below at the version that
    `labkit.jets.chosen` takes. Numbers are the centres of the clusters; `classes` are the names of the labels.

    Examples
    --------
    >>> figure = labkit.jets.before_and_after(clustered, jets.classes)
    """
    problem, curve, last = run.opened_problem("its jets are drawn"), run.curve(), chosen(run)
    before = curve.loc[curve["spread"] == 1.0, "version"]  # those without clusters
    views = []
    for title, version in (("Before clustering", int(before.max()) if len(before) else 0), ("After clustering", last)):
        trained = network(run, version)
        if not first(trained).settled:
            problem.settle(trained, Clock(0, 1, problem.pretrain, noise(run.config["seed"], 0)))
        z, label, centres, clusters = embedded(problem, trained)
        views.append(embedding(z, label, classes, clusters, note, title, centres))
    return style.stack(views, height=11)


def worlds(frame: pd.DataFrame, note: str = "") -> hv.Layout:
    """What more workers do at one global batch: above jets per second, below accuracy, a mark a run and a line through their means. The line
    under the title says `note`, and how many runs there are of each number of workers.

    `frame`: n_workers, samples_per_s, accuracy; a row a run.

    Examples
    --------
    >>> import pandas as pd
    >>> frame = pd.DataFrame({"n_workers": [1, 2, 4], "samples_per_s": [450, 880, 1700], "accuracy": [0.79, 0.78, 0.78]})
    >>> figure = labkit.jets.worlds(frame)
    """
    style.extension()
    style.check_columns(frame, ["n_workers", "samples_per_s", "accuracy"])
    if frame.empty:
        return style.message("Speed and accuracy by workers", "there is no run to draw.")
    frame = frame.sort_values("n_workers")
    means = frame.groupby("n_workers")[["samples_per_s", "accuracy"]].mean()
    at, least, most = means.index.to_numpy(float), means.index[0], means.index[-1]
    speed, found = (means[name].to_numpy(float) for name in ("samples_per_s", "accuracy"))
    per_run, n_runs = frame["n_workers"].to_numpy(float), frame["n_workers"].value_counts()
    counted = f"{n_runs.min()} to {n_runs.max()} runs" if n_runs.min() < n_runs.max() else f"{n_runs.max()} runs"
    counted = "one run" if n_runs.max() == 1 else counted
    note = ", ".join(filter(None, [note, f"{counted} of each number of workers"]))
    several_runs = bool(n_runs.max() > 1)  # otherwise the line has a mark on each run
    axes = {"xlabel": "workers", "xticks": [(x, f"{x:g}") for x in at], "xlim": (0.8 * at[0], at[-1] + 0.2 * at[0])}
    dims, drawn = ("workers", "jets/s"), "mean of the runs" if several_runs else "measured"
    rate = [
        style.line(at, speed[0] * at / at[0], 1, "in proportion", dims),
        *([style.marks(per_run, frame["samples_per_s"].to_numpy(float), 3, "a run", dims)] if several_runs else []),
        style.line(at, speed, 0, drawn, dims),
    ]
    title = f"{most:g} workers train {speed[-1] / speed[0]:.2f} times the jets per second of {least:g}"
    upper = style.finish(rate, title, note, ylabel="jets per second", ylim=(0, None), **axes)
    dims = ("workers", "accuracy (%)")
    values = 100 * frame["accuracy"].to_numpy(float)
    accuracy_ = [
        *([style.marks(per_run, values, 3, "a run", dims)] if several_runs else []),
        style.line(at, 100 * found, 2, drawn, dims),
    ]
    within = frame.groupby("n_workers")["accuracy"].agg(np.ptp).max()
    title = f"Accuracy of {least:g} to {most:g} workers: {'means ' * several_runs}{100 * np.ptp(found):.1f} points apart"
    title += f", seeds up to {100 * within:.1f}" if several_runs else ""
    low, high = max(0.0, values.min() - 10), min(100.0, values.max() + 10)
    lower = style.finish(accuracy_, title, ylabel="accuracy (%)", ylim=(low, high), **axes)
    return style.stack([upper, lower], height=9)
