"""Figures of single samples: which classes a trained network takes for which, and the samples that it is most wrong about.

Both are of the test set by default, or of other samples with their labels, as `Run.predictions` gives them.

Used through `labkit.plots`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.errors import ProblemError, whole
from labkit.plots import style

if TYPE_CHECKING:
    import holoviews as hv
    import pandas as pd

WRITTEN = 12  # classes, up to which the share stands in each cell
ACROSS = 6  # pictures in a row
GAP = 0.6  # between them, for three lines of text, in heights of a picture


def confusion(run: Any, data: Any = None, version: int | str | None = None) -> hv.Overlay:
    """What a `Classifier` takes each class for: a row for each class, in per cent of its samples, a column for each answer.

    `data` and `version` as of `run.evaluate`. Of a class for each pixel all pixels count. ProblemError where there are no classes.

    Examples
    --------
    >>> figure = labkit.plots.confusion(run)
    """
    import pandas as pd

    data_set, table = _predicted(run, data, version)
    if data_set.n_classes is None or "label" not in table:
        raise ProblemError(
            "a confusion matrix is of one label a sample, or one a pixel, as a Classifier has them. See run.predictions(). Where targets are "
            "one-hot, train on their classes: y.argmax(1) in place of y."
        )
    k, names = data_set.n_classes, data_set.classes or [str(n) for n in range(data_set.n_classes)]
    truth, said = (np.concatenate([np.ravel(cell) for cell in table[column]]) for column in ("label", "predicted"))
    counts = pd.crosstab(truth, said).reindex(index=range(k), columns=range(k), fill_value=0).to_numpy(float)
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    wrong = shares - np.diag(np.diag(shares))  # as drawn: the most samples would be those of the largest class
    row, column = np.unravel_index(wrong.argmax(), wrong.shape)
    title = f"{run.label}: every sample is classified correctly"
    if wrong.any():
        title = f"{run.label}: {names[row]} is taken for {names[column]} most often, in {shares[row, column]:.0f} % of its samples"
    right = np.trace(counts) / max(counts.sum(), 1)
    note = style.caption([run], f"% of each class; {int(counts.sum()):,} labels, {100 * right:.1f} % right", "1 seed")
    ticks = [(n + 0.5, name) for n, name in enumerate(names)][:: -(-k // 40)]
    axes = {"xticks": ticks, "yticks": ticks, "xrotation": 45 if max(map(len, names)) > 3 else 0, **style.image_axes((k, k), 6)}
    cells = style.heat(shares, "share (%)", lambda share: f"{share:.0f}" if k <= WRITTEN and share >= 0.5 else "")
    return style.finish(cells, title, note, xlabel="predicted class", ylabel="class", **axes)


def worst(run: Any, n: int = 12, data: Any = None, version: int | str | None = None) -> hv.Overlay:
    """The `n` samples with the largest loss as pictures, each with what it is and what the network says; of volumes the middle slice.

    `data` and `version` as of `run.evaluate`. Samples that are no pictures are in `run.predictions()`.

    Examples
    --------
    >>> figure = labkit.plots.worst(run)
    """
    n = whole("n", n)
    data_set, table = _predicted(run, data, version)
    shape = data_set.shape
    title, first = f"{run.label}: the samples with the largest loss", table.head(n)
    if len(shape) not in (3, 4):
        return style.message(title, f"Samples of shape {shape} are no pictures. Their rows: run.predictions().")
    pictures = [_rgb(picture) for picture in data_set.raw(first["sample"].to_numpy(), "test")]
    high, wide = pictures[0].shape[:2]
    gap, across = max(1, round(GAP * high)), min(ACROSS, len(pictures))
    side = max(1, wide // 8)
    down = -(-len(pictures) // across)
    mosaic = np.ones((down * (high + gap), across * (wide + side), 3))
    texts = []
    for number, (picture, row) in enumerate(zip(pictures, first.itertuples(), strict=True)):
        top, left = number // across * (high + gap) + gap, number % across * (wide + side)
        mosaic[top : top + high, left : left + wide] = picture
        texts.append((left + wide / 2, top - gap / 2, _said(row, data_set.classes)))
    if "label" in first and np.ndim(first["label"].iloc[0]) == 0:
        kinds = first["label"].value_counts()
        name = data_set.classes[kinds.index[0]] if data_set.classes else kinds.index[0]
        title = f"{run.label}: {kinds.iloc[0]} of the {len(first)} worst samples are of class {name}"
    note = f"of {len(table):,} samples; loss {first['loss'].iloc[0]:.3g} to {first['loss'].iloc[-1]:.3g}, median {table['loss'].median():.2g}"
    tall = 0.7 + min(7 * mosaic.shape[0] / mosaic.shape[1], 2.5 * down)  # inches, of which 7 are across
    elements, axes = [style.raster(mosaic), style.labels(texts, "white", 9)], style.image_axes(mosaic.shape, tall)
    return style.finish(elements, title, style.caption([run], note), xaxis=None, yaxis=None, **axes)


def _predicted(run: Any, data: Any, version: int | str | None) -> tuple[Any, pd.DataFrame]:
    """The data set of the samples, and what the network says of each."""
    style.a_run("run", run, read=None)  # from a record alone nothing is predicted
    run.opened_problem("samples are drawn")
    style.extension()
    return run.tested(data)[0].dataset, run.predictions(data, version)


def _rgb(sample: np.ndarray) -> np.ndarray:
    """A sample (C, H, W) or (C, D, H, W) as (H, W, 3) from 0 to 1: bytes as they are, other numbers from their least to their largest."""
    picture = sample.astype(np.float64) / (255 if sample.dtype == np.uint8 else 1)
    picture = picture[:, picture.shape[1] // 2] if picture.ndim == 4 else picture
    if sample.dtype != np.uint8:
        low, high = picture.min(), picture.max()
        picture = (picture - low) / (high - low or 1)
    picture = picture if len(picture) == 3 else np.repeat(picture.mean(0, keepdims=True), 3, 0)
    return np.moveaxis(picture, 0, -1)


def _said(row: Any, classes: Sequence[str] | None) -> str:
    """What a sample is, and what the network says of it, in up to three lines."""
    truth, said = getattr(row, "label", getattr(row, "target", None)), row.predicted
    if truth is None or np.ndim(truth) or np.ndim(said):
        return f"loss {row.loss:.3g}"
    if not hasattr(row, "label"):
        return f"is {truth:.3g},\nsaid {said:.3g}"
    name = (lambda number: classes[number]) if classes else str
    sure = f"\n{100 * row.probability:.0f} % sure" if np.isfinite(row.probability) else ""
    return f"is {name(truth)},\nsaid {name(said)}{sure}"
