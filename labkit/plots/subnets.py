"""Figures of subnets: where their subdomains lie on a sample, how good each is alone, how long each took, accuracy over settings.

Of a volume the middle slice is drawn, with the subdomains that meet it. Figures call the subdomain of subnet 3 "part 3".

Used through `labkit.plots`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.errors import like
from labkit.plots import claims, style

if TYPE_CHECKING:
    import holoviews as hv
    import pandas as pd

FRAMES = (1, 5, 2, 4)  # colours of four kinds of subdomain, by odd and even row and column: no two of a kind touch
AXES = {"xlabel": "column (pixels)", "ylabel": "row (pixels)"}
MOST_BARS = 12  # subnets whose names fit under their bars
INSET = 0.01  # of the longer side of the image, by which frames of one kind lie further inside than those of the next


def decomposition(parts: Any, image: np.ndarray) -> hv.Overlay:
    """A `labkit.Decomposition` drawn on one sample (C, H, W) or (C, D, H, W): a frame for each subdomain, with its number.

    Examples
    --------
    >>> figure = labkit.plots.decomposition(labkit.Decomposition((2, 2), overlap=2), np.zeros((1, 8, 8)))
    """
    like("parts", parts, ("n_parts", "windows"), "a labkit.Decomposition")
    style.extension()
    sample = np.asarray(image)
    rows = _visible(parts, sample.shape)
    grey = sample.mean(0, dtype=np.float64)
    note = "frames: what each subnet sees"
    if sample.ndim == 4:
        note += f"; slice {len(grey) // 2} of {len(grey)} of the first axis"
        grey = grey[len(grey) // 2]
    elements = [style.raster(grey)]
    for part, (down, across), (row, column) in rows:
        kind = 2 * (row % 2) + column % 2
        inside, colour = INSET * max(grey.shape) * (kind + 0.6), style.COLOURS[FRAMES[kind]]
        left, top, right, bottom = across.start + inside, down.start + inside, across.stop - inside, down.stop - inside
        frame = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
        middle = ((left + right) / 2, (top + bottom) / 2, str(part))
        elements += [style.strokes([frame], "", ("x", "y"), kind, 2.5, color=colour), style.labels([middle], colour, 11)]
    shared = ", ".join(str(pixels) for pixels in dict.fromkeys(parts.overlap))
    title = f"{parts.n_parts} parts of {' x '.join(map(str, parts.shapes(sample.shape)[0][1:]))} pixels, overlap {shared}"
    return style.finish(elements, title, note, **AXES, **style.image_axes(grey.shape, 5.5))


def part_accuracy(joined: Any) -> hv.Overlay:
    """Test accuracy of each subnet alone, at its subdomain of the image; `joined` is what `labkit.train_subnets` returns.

    Examples
    --------
    >>> figure = labkit.plots.part_accuracy(joined)
    """
    _trained(joined)
    style.extension()
    shape, chosen = joined.config["shape"], joined.decomposition
    rows = _visible(chosen, shape)
    score = {part: joined.part_rows[part]["accuracy"] for part, _, _ in rows}
    # As wide as the cell of the grid, without the overlap, so that nothing is hidden.
    n_down, n_across = chosen.grid[-2:]
    values = 100 * np.array([score[part] for part, _, _ in sorted(rows, key=lambda row: row[2])]).reshape(n_down, n_across)
    cells = style.heat(values, "accuracy (%)", "{:.1f}".format, (shape[-1] / n_across, shape[-2] / n_down))
    best, worst = max(score, key=score.get), min(score, key=score.get)
    title = f"Alone, part {best} reaches {_percent(score[best])}, part {worst} {_percent(score[worst])}"
    together = joined.summary()["accuracy"]
    made = "; synthetic data" if joined.config["synthetic"] else ""
    where = f", slice {shape[1] // 2} of {shape[1]}" if len(shape) == 4 else " of each subnet"
    note = f"test accuracy (%){where}; joined: {_percent(together)}; 1 seed{made}"
    return style.finish(cells, title, note, **AXES, **style.image_axes(shape[-2:], 5.5))


def part_times(joined: Any) -> hv.Overlay:
    """Seconds of training: each subnet, the coarse network, and the baselines.

    Of more than MOST_BARS subnets only the median and the longest are drawn.

    Examples
    --------
    >>> figure = labkit.plots.part_times(joined)
    """
    import pandas as pd

    _trained(joined)
    style.extension()
    parts, rows = joined.part_rows, {row["model"]: row for row in joined.rows}
    parallel = rows["CNN-DNN"]["seconds"]
    each = [row["seconds"] for row in parts]
    times = {f"part {row['part']}": row["seconds"] for row in parts}
    if len(parts) > MOST_BARS:
        times = {f"median of\n{len(parts)} parts": float(np.median(each)), "longest\npart": max(each)}
    times |= {"coarse": parallel - max(each), "longest\n+ coarse": parallel}
    team, at_once = joined.config.get("team"), max(row.get("batched", 1) for row in parts)
    where = f"with {team['n_workers']} workers each" if team else "with a worker each"
    title = f"{len(parts)} subnets {where if at_once == 1 else f'(up to {at_once} at once on a worker)'}: {parallel:.1f} s"
    if "global CNN" in rows:
        times["global\nCNN"] = whole = rows["global CNN"]["seconds"]
        title += f", the global network {whole:.1f} s"
    workers = joined.config["n_workers"]
    needed = f"{workers} worker{'s' * (workers > 1)} needed {rows['CNN-DNN']['wall_s']:.1f} s"
    note = style.caption([joined], needed, "1 seed")
    return style.columns(pd.DataFrame({"training": times}), title, note, ylabel="time (s)", text="{:.1f}")


def part_scores(frame: pd.DataFrame) -> hv.Overlay:
    """Test accuracy of each network over settings; `frame` has the columns setting, seed, network and accuracy, a row a training.

    A mark is the median over seeds, its stroke reaches from the lowest to the highest. A network is best in a setting where its lowest is above
    the highest of all others, of three seeds at least.

    Examples
    --------
    >>> import pandas as pd
    >>> rows = [(f"{n} x {n}", seed, network, 0.8 + 0.01 * n) for n in (2, 4) for seed in (0, 1) for network in ("coarse", "transfer")]
    >>> figure = labkit.plots.part_scores(pd.DataFrame(rows, columns=["setting", "seed", "network", "accuracy"]))
    """
    style.extension()
    style.check_columns(frame, ["setting", "seed", "network", "accuracy"])
    settings, networks = list(dict.fromkeys(frame["setting"])), list(dict.fromkeys(frame["network"]))
    shift = {network: 0.7 * ((number + 0.5) / len(networks) - 0.5) for number, network in enumerate(networks)}
    cells = frame.assign(accuracy=100 * frame["accuracy"]).groupby(["network", "setting"], sort=False)["accuracy"]
    table = cells.agg(["min", "median", "max"]).reset_index()
    table = table.assign(
        at=table["setting"].map(settings.index) + table["network"].map(shift), number=table["network"].map(networks.index)
    )
    elements = style.points(table.sort_values(["number", "at"]), "at", "median", "network")
    n_seeds = frame["seed"].nunique()
    note = f"median of {n_seeds} seeds, stroke: lowest to highest" if n_seeds > 1 else "1 seed"
    best = []
    for setting in settings:
        each = {network: cells.get_group((network, setting)) for network in networks if (network, setting) in cells.groups}
        if len(each) > 1 or len(networks) == 1:
            best.append(claims.stands_out({network: own.to_numpy() for network, own in each.items()}))
    first = max(networks, key=best.count)
    title = f"Best in {best.count(first)} of {len(settings)} settings: {first}"
    if not best.count(first):
        title = f"No network stands out of the spread of {n_seeds} seed{'s' * (n_seeds > 1)}"
    return style.finish(
        [style.ticks(table["at"], table["min"], table["max"]), *elements], title, note, grid="y", xlabel="",
        ylabel="test accuracy (%)", xticks=list(enumerate(settings)), xlim=(-0.6, len(settings) - 0.4),
    )  # fmt: skip


def _trained(joined: Any) -> None:
    """TypeError where these are no trained subnets."""
    like("joined", joined, ("part_rows", "rows", "config"), "what labkit.train_subnets returns")


def _visible(parts: Any, shape: Sequence[int]) -> list[tuple[int, tuple[slice, slice], tuple[int, int]]]:
    """(number, window in the last two axes, row and column) of each subdomain; of a volume, of those that meet its middle slice."""
    found = []
    for part, window in enumerate(parts.windows(shape)):
        if len(window) == 2 or parts.place(part)[0] == parts.grid[0] // 2:
            found.append((part, window[-2:], parts.place(part)[-2:]))
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
