"""Figures of jets: their masses by class, and where their embeddings lie, by class and by cluster.

Used by users, as `labkit.jets.masses` and `labkit.jets.embedding`, and by notebook 12.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.errors import known
from labkit.jets.clustering import accuracy
from labkit.jets.files import SUBSTRUCTURE, Jets
from labkit.plots import style

if TYPE_CHECKING:
    import holoviews as hv

BINS, HIGHEST = 40, 250.0
SHOWN = 600  # jets in a scatter


def masses(jets: Jets, of: str = "mass", note: str = "") -> hv.Overlay:
    """The distribution of the mass in GeV, or of another of `SUBSTRUCTURE`, a line for each class; each has the area 1."""
    known("of", of, ("mass", *(SUBSTRUCTURE if "substructure" in jets.of_jet else ())))
    style.extension()
    values = jets.of_jet["mass"] if of == "mass" else jets.of_jet["substructure"][:, SUBSTRUCTURE.index(of)]
    low, high = (0.0, HIGHEST) if of in ("mass", "trimmed") else (float(values.min()), float(np.quantile(values, 0.995)))
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    middle, elements, legend, peaks = (edges[1:] + edges[:-1]) / 2, [], [], []
    for number, name in enumerate(jets.classes):
        own = values[jets.label == number]
        if not len(own):
            continue
        height = np.histogram(own, edges)[0] / (len(own) * (edges[1] - edges[0]))
        peaks.append(f"{name} {middle[height.argmax()]:.3g}")
        elements.append(style.line(middle, height, number, name, (of, "share")))
        legend.append((name, number, "line"))
    if not elements:
        return style.message("The masses of the jets", "there are no jets to draw.")
    unit = " (GeV)" if of in ("mass", "trimmed") else ""
    what = {"mass": "Mass", "trimmed": "Trimmed mass"}.get(of, of)
    title = f"{what} of the jets by class: highest at {', '.join(peaks)}{' GeV' if unit else ''}"
    return style.finish(elements, title, note, legend, xlabel=f"{what.lower()}{unit}", ylabel="share per unit", ylim=(0, None))


def embedding(z: Any, label: Any, classes: Any, clusters: Any = None, note: str = "", title: str = "") -> hv.Overlay:
    """Embeddings z (n, d) along their two widest directions, coloured by class; the title says how well `clusters` (n,) agree with it."""
    style.extension()
    z, label = np.asarray(z, np.float64), np.asarray(label)
    centred = z - z.mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    flat = centred @ directions[:2].T
    if flat.shape[1] < 2:
        flat = np.column_stack([flat, np.zeros(len(flat))])
    shown = np.random.default_rng(0).permutation(len(z))[:SHOWN]
    elements, legend = [], []
    for number, name in enumerate(classes):
        own = shown[label[shown] == number]
        if len(own):
            elements.append(style.marks(flat[own, 0], flat[own, 1], number, name, ("first", "second")))
            legend.append((name, number, "mark"))
    if not elements:
        return style.message("Embeddings of jets", "there are no jets to draw.")
    if clusters is not None:
        agree = 100 * accuracy(np.asarray(clusters), label)
        title = f"{title or 'Clusters and classes'}: {agree:.0f} % of the jets are in the cluster of their class"
    note = note or (f"{len(shown)} of {len(z)} jets" if len(shown) < len(z) else "")
    return style.finish(
        elements, title or "Embeddings of jets by class", note, legend, xlabel="widest direction", ylabel="second widest"
    )
