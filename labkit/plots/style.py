"""How a figure of labkit is drawn: the back end, the look, and the few elements that figures are made of.

Lines, marks and bands come from hvPlot and a table (`lines`, `points`), what it does not have from HoloViews: intervals, bars with a hatch,
frames, texts, and what moves, of arrays that may be empty. All carry their options for both back ends: bokeh where somebody can move the
picture, matplotlib where a picture is stored. Importing this module loads neither; the first figure does.

Used by all figures; `extension`, `interactive` and `save` are public through `labkit.plots`.
"""

from __future__ import annotations

import functools
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.cluster.emulation import unsteadiness
from labkit.cluster.notice import front_end, shell, telling
from labkit.errors import LabError, RunError, file_path, like, several
from labkit.plots.claims import between
from labkit.runs.analysis import slowdown_reached
from labkit.runs.record import RunRecord, directories

if TYPE_CHECKING:
    import pandas as pd

# Okabe and Ito's colours, distinct for colour-blind readers; marker, dash or hatch repeat it without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "d", "v", ">", "<")
DASHES = (("solid", "-"), ("dashed", "--"), ("dotdash", "-."), ("dotted", ":"))  # bokeh's name, matplotlib's name
SMALL, LARGE = (6, 16), (9, 46)  # single marks: bokeh's size, matplotlib's
HATCHES = (None, "//", "..", "xx", "\\\\", "oo", None)
GREY = "#555555"
# In captions, of a run that no cluster has made.
ORIGINS = {"counterfactual": "counterfactual: another update on recorded arrivals", "simulated": "simulated"}
FONTS = {"title": 14, "labels": 12, "xticks": 12, "yticks": 12, "legend": 12}  # points of a page, of which 96 pixels are an inch
PICTURE = 0.8  # of a point of a page is one of a picture, of which 120 are: 960 pixels wide, both have the same text
FONT, PICTURE_FONT = "DejaVu Sans, Verdana, sans-serif", "DejaVu Sans"  # matplotlib brings it along; Verdana is as wide
IN_A_ROW = 72  # characters of a row of the legend, with 8 for each mark, that fit a cell of 750 pixels
WIDE = 72  # characters of a title that fit; longer ones are smaller,
LONGEST = 115  # and of more the rest is left out: a picture would become as wide as its title

OFF = 0.1  # the share by which an emulated slowdown may miss what was asked before a caption says so
# Title and note are broken into lines where a cell is narrower than they are; bokeh would cut them. The figure is as much taller, which also has
# bokeh lay it out again: it does not for a title.
WRAP = """
const pen = document.createElement("canvas").getContext("2d")
plot.unwrapped ??= plot.height
let height = plot.unwrapped
for (const title of titles) {
  const whole = title.text === title.wrapped?.shown ? title.wrapped.whole : title.text
  pen.font = `${title.text_font_style} ${title.text_font_size} ${title.text_font}`
  const lines = []
  for (const word of whole.split(" ")) {
    const longer = lines.length ? `${lines.at(-1)} ${word}` : word
    if (lines.length && pen.measureText(longer).width <= plot.inner_width) lines.splice(-1, 1, longer)
    else lines.push(word)
  }
  const shown = lines.join("\\n")
  title.wrapped = {whole, shown}
  if (title.text !== shown) [title.text, plot.stale] = [shown, true]
  height += Math.round((lines.length - 1) * parseFloat(title.text_font_size) * 1.6)
}
plot.wanted = height  // the latest: a page lays a figure out several times, at first with hardly any width
setTimeout(() => {  // not in the middle of a layout
  if (plot.stale && plot.height === plot.wanted) plot.height += 1  // from one line to two and back: it is laid out for one
  plot.stale = false
  if (plot.height !== plot.wanted) plot.height = plot.wanted
}, 0)
"""
PICTURES = (".png", ".svg", ".pdf")  # what matplotlib writes
MODES = ("static", "interactive")

_loaded: dict[str, str | None] = {}
_replacing = threading.Lock()  # the streams of the process, by one thread at a time


def extension(mode: str | None = None) -> str:
    """Load the plotting back end, once; every figure calls it.

    Parameters
    ----------
    mode : "static" (matplotlib, PNG) or "interactive" (bokeh). Default: the environment variable LABKIT_PLOTS, else
        interactive in a kernel that a Jupyter server started for a notebook, and static everywhere else: in batches, and in Colab and
        VS Code, which do not keep the scripts of a figure.

    Returns
    -------
    The mode. `DataFrame.hvplot` works afterwards, with the same back end, and HoloViews draws tables of labkit as any DataFrame:
    `hv.Curve(run.curve(), "seconds", "score")`.

    Examples
    --------
    >>> mode = labkit.plots.extension()  # "static" where figures cannot move, as here
    """
    mode = mode or ("interactive" if interactive() else "static")
    if mode not in MODES:
        raise ValueError(f"there is no plotting mode {mode!r}; it can be 'static' (pictures) or 'interactive' (bokeh).")
    cell, execution = _cell()
    # The scripts of bokeh are in the output of the cell that loaded them, and lost when that cell runs again.
    again = mode == "interactive" and cell is not None and cell == _loaded.get("cell") and execution != _loaded.get("execution")
    if _loaded.get("mode") == mode and not again:
        return mode
    with telling("The first figure of this kernel: its libraries are being loaded."):
        _load(mode)
    _loaded.update(mode=mode, cell=cell, execution=execution)
    return mode


def _load(mode: str) -> None:
    import holoviews as hv

    from labkit.tables import register

    if mode == "static":
        with _quiet():  # a picture needs no script: without its loader, a notebook stays some 100 kB smaller
            import hvplot.pandas  # it switches to bokeh, so the choice comes after it

            hv.extension("matplotlib", "bokeh", display_formats=["png"])
    else:
        # Inline: the scripts travel in the notebook (6 MB), because the nodes of a cluster often cannot reach a CDN,
        # and then every figure stays blank without a message. Notebooks are committed without outputs; batches are static.
        hv.extension("bokeh", "matplotlib", inline=True, logo=False, display_formats=["html"])
        _inline_styles()
        with _quiet():  # its own loader would ask the CDN again
            import hvplot.pandas  # noqa: F401
        hv.Store.set_current_backend("bokeh")
        _leave_stdout()
    hv.Store.renderers["matplotlib"].dpi = 120
    register()


@functools.cache
def _inline_styles() -> None:
    """Figures carry the styles of Panel, which HoloViews would fetch from its CDN in a notebook."""
    from bokeh.models import UIElement
    from panel.io.notebook import patch_inline_stylesheets
    from panel.viewable import Viewable

    def inline(_: Any, root: Any) -> None:
        for model in root.select({"type": UIElement}):
            patch_inline_stylesheets(model)

    Viewable._preprocessing_hooks.append(inline)


class _Uncaptured(list):
    """In place of what pyviz_comms collects of the output of a message's handler."""

    def __enter__(self) -> _Uncaptured:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def _leave_stdout() -> None:
    """Messages of a page are handled without replacing `sys.stdout`: JupyterLab has them handled in a thread of their own, beside a cell that
    prints, whose lines would be lost."""
    import pyviz_comms

    pyviz_comms.StandardOutput = _Uncaptured


def interactive() -> bool:
    """Whether figures and progress bars can move here: see `extension`; loads nothing.

    Examples
    --------
    >>> labkit.plots.interactive()  # no: this is no notebook
    False
    """
    mode = os.environ.get("LABKIT_PLOTS") or _loaded.get("mode")
    if mode:
        if mode not in MODES:
            raise ValueError(f"LABKIT_PLOTS is {mode!r}; it can be 'static' (pictures) or 'interactive' (bokeh).")
        return mode == "interactive"
    return front_end() == "jupyter"


def _cell() -> tuple[str | None, str | None]:
    """The notebook cell that is being executed and this execution of it, each as its id; None where there is none."""
    kernel = getattr(shell(), "kernel", None)
    parent = (kernel.get_parent("shell") if kernel else None) or {}
    return parent.get("metadata", {}).get("cellId"), parent.get("header", {}).get("msg_id")


@contextmanager
def _quiet() -> Iterator[None]:
    """What this thread prints and displays in a notebook is dropped. Of other threads, which may say how far a run is, all is there."""
    if (ipython := shell()) is None:
        yield
        return
    with _replacing:
        publisher, streams, own = ipython.display_pub, (sys.stdout, sys.stderr), threading.get_ident()
        publish, quiet = publisher.publish, [_OfOthers(stream) for stream in streams]

        def publish_of_others(*args: Any, **named: Any) -> None:
            if threading.get_ident() != own:
                publish(*args, **named)

        publisher.publish = publish_of_others
        sys.stdout, sys.stderr = quiet
        try:
            yield
        finally:
            sys.stdout, sys.stderr = streams
            publisher.publish = publish
            for stream in quiet:
                stream.own = None  # who has taken it for the stream can go on with it


class _OfOthers:
    """A stream that drops what the thread writes that has made it."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.own = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self.own else self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def save(figure: Any, path: str | os.PathLike[str]) -> Path:
    """Write a figure to `path`: a PNG, SVG or PDF by matplotlib, without a browser, or, for `.html`, a page that needs no network.

    Returns the path. Missing folders are made; an ending other than .png, .svg, .pdf and .html is a ValueError. What `DataFrame.hvplot`
    draws can be saved as well.

    Examples
    --------
    >>> labkit.plots.save(labkit.plots.curves([run]), "curves.html").name
    'curves.html'
    """
    path = file_path("path", path)
    if path.suffix not in (*PICTURES, ".html"):
        raise ValueError(f"cannot save a figure as {path.name!r}: use a name that ends in {', '.join(PICTURES)} or .html.")
    extension()
    like("figure", figure, ("opts", "traverse"), "a figure of labkit.plots")
    import holoviews as hv
    from bokeh.resources import INLINE

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in PICTURES:
        hv.save(figure, str(path), fmt=path.suffix[1:], backend="matplotlib", dpi=120)
    else:
        _inline_styles()
        hv.save(figure, str(path), fmt="html", backend="bokeh", resources=INLINE)
        path.write_text(re.sub(r'<link rel="[a-z-]*icon"[^>]*>', "", path.read_text("utf-8")), "utf-8")  # Panel's, from its CDN
    return path


def styled(element: Any, bokeh: dict[str, Any], matplotlib: dict[str, Any], **both: Any) -> Any:
    """An element with its options for either back end, and those that `both` have."""
    return element.opts(**bokeh, **both, backend="bokeh").opts(**matplotlib, **both, backend="matplotlib")


def of_table(table: pd.DataFrame, kind: str, x: str, y: str, label: str = "", **options: Any) -> Any:
    """An element that hvPlot makes of a table, without its look."""
    element = table.hvplot(kind=kind, x=x, y=y, **options).relabel(label)
    element.id = None  # the options of hvPlot are for the back end of the moment alone
    return element


def lines(
    table: pd.DataFrame,
    x: str,
    y: str,
    by: str,
    numbers: dict[str, int] | None = None,
    band: tuple[str, str] | None = None,
    steps: bool = False,
) -> list[Any]:
    """A line with markers for each value of `by`, drawn by hvPlot. Colour, marker and dash go by `numbers`, else by the order;
    between the columns `band` (low, high) it is shaded, where they differ. With `steps` each value holds until the next one."""
    elements = []
    for label, number, own in sorted(_groups(table, by, numbers), key=lambda group: group[1]):
        if band is not None and (own[band[1]] > own[band[0]]).any():
            edges, n = own[[x, *band]], np.arange(2 * len(own) - 1)
            edges = edges.iloc[n // 2].assign(**{x: own[x].to_numpy()[(n + 1) // 2]}) if steps else edges
            fill = {"color": (colour := of_number(COLOURS, number)), "line_alpha": 0}
            area = of_table(edges, "area", x=x, y=band[0], y2=band[1])
            elements.append(styled(area, fill, {"facecolor": colour, "linewidth": 0}, alpha=0.2))
        curve, dots = of_table(own, "line", x, y, label), of_table(some(own), "scatter", x, y, label)
        elements.append(_stroke(curve, number, steps) * _dots(dots, number))
    return elements


def points(table: pd.DataFrame, x: str, y: str, by: str, numbers: dict[str, int] | None = None, small: bool = False) -> list[Any]:
    """Single marks for each value of `by`, drawn by hvPlot; colour and marker go by `numbers`, else by the order."""
    groups = _groups(table, by, numbers)
    return [_dots(of_table(own, "scatter", x, y, label), number, SMALL if small else LARGE) for label, number, own in groups]


def line(x: Any, y: Any, number: int, label: str, dims: tuple[str, str], steps: bool = False) -> Any:
    """As one of `lines`, of arrays that may be empty: for what moves, which must have the same elements each time."""
    import holoviews as hv

    dots = hv.Scatter((some(x), some(y)), *dims, label=label)
    return _stroke(hv.Curve((x, y), *dims, label=label), number, steps) * _dots(dots, number)


def marks(x: Any, y: Any, number: int, label: str, dims: tuple[str, str], small: bool = False) -> Any:
    """As one of `points`, of arrays that may be empty."""
    import holoviews as hv

    return _dots(hv.Scatter((x, y), *dims, label=label), number, SMALL if small else LARGE)


def strokes(paths: Sequence[Any], label: str, dims: tuple[str, str], dash: int, width: float, **look: Any) -> Any:
    """Paths of points (x, y) of one look, as one line with gaps."""
    import holoviews as hv

    points = np.concatenate([np.vstack([path, [np.nan, np.nan]]) for path in paths] or [np.empty((0, 2))])
    return _stroke(hv.Curve(points, *dims, label=label), dash, width=width, **look)


def of_number(looks: Sequence[Any], number: int) -> Any:
    """The colour, marker, dash or hatch of what has a number; after the last one they begin again."""
    return looks[number % len(looks)]


def _groups(table: pd.DataFrame, by: str, numbers: dict[str, int] | None) -> list[tuple[str, int, pd.DataFrame]]:
    """Label, number and rows of each value of a column."""
    groups = {str(label): own for label, own in table.groupby(by, sort=False)}
    numbers = numbers or {label: number for number, label in enumerate(groups)}
    return [(label, numbers[label], own) for label, own in groups.items()]


def some(points: Any) -> Any:
    """Some 15 of them: a marker on each of 500 points hides the line."""
    return points[:: max(1, len(points) // 15)]


def evenly(n: int, most: int) -> np.ndarray:
    """Which of n are drawn: all of them, or `most`, evenly, with both ends."""
    return np.linspace(0, n - 1, min(n, most)).round().astype(int)


def _stroke(curve: Any, number: int, steps: bool = False, width: float = 2, **look: Any) -> Any:
    dash, look = of_number(DASHES, number), {"color": of_number(COLOURS, number), **look}
    bokeh = {"line_dash": dash[0], "line_width": width, "framewise": True}
    matplotlib = {"linestyle": dash[1], "linewidth": width}
    return styled(curve, bokeh, matplotlib, interpolation="steps-post" if steps else "linear", **look)


def _dots(dots: Any, number: int, size: tuple[int, int] = (8, 36)) -> Any:
    look = {"color": of_number(COLOURS, number), "marker": of_number(MARKERS, number)}
    return styled(dots, {"size": size[0], "framewise": True}, {"s": size[1]}, **look)


def ticks(x: Any, bottom: Any, top: Any) -> Any:
    """Thin black strokes upwards."""
    import holoviews as hv

    return styled(hv.Segments((x, bottom, x, top)), {"line_width": 1}, {"linewidth": 1}, color="black")


def level(y: float) -> Any:
    """A dashed horizontal line."""
    import holoviews as hv

    bokeh, matplotlib = {"line_dash": "dashed", "line_width": 1.5}, {"linestyle": "--", "linewidth": 1.5}
    return styled(hv.HLine(y), bokeh, matplotlib, color=GREY)


def boxes(rows: Any, number: int, label: str, names: Sequence[str] = ("left", "bottom", "right", "top")) -> Any:
    """Filled rectangles (left, bottom, right, top), their colour and hatch by `number`."""
    import holoviews as hv

    colour, hatch = of_number(COLOURS, number), of_number(HATCHES, number)

    def hatched(plot: Any, element: Any) -> None:
        """HoloViews passes no hatch on to bokeh, whose name of matplotlib's "//" is its first letter."""
        plot.handles["glyph"].update(hatch_pattern=hatch and hatch[0], hatch_color="white")

    return styled(
        hv.Rectangles(rows, kdims=list(names), label=label),
        {"fill_color": colour, "line_alpha": 0, "tools": ["hover"], "hooks": [hatched], "framewise": True},
        {"facecolor": colour, "edgecolor": "white", "linewidth": 0, "hatch": hatch},
    )


def spans(
    table: pd.DataFrame,
    column: str,
    kinds: Mapping[str, tuple[str, int]],
    rows: Mapping[int, str],
    row: str = "worker",
    between: tuple[float, float] = (-0.3, 0.3),
    unit: str = "s",
    absent: bool = True,
) -> list[Any]:
    """Bars from `start` to `end` in the row of a worker (see `rows_axis`); `kinds` says of a value of `column` its text and number.

    Without `absent`, kinds of which there is none are left out.
    """
    y, elements = heights(table[row], rows), []
    bars = np.column_stack([table["start"], y + between[0], table["end"], y + between[1]]).astype(float)
    for kind, (text, number) in kinds.items():
        own = bars[(table[column] == kind).to_numpy(bool)]
        if absent or len(own):
            elements.append(boxes(tuple(own.T), number, text, (f"start ({unit})", f"bottom ({row})", f"end ({unit})", "top")))
    return elements


def row_ticks(table: pd.DataFrame, x: str, rows: Mapping[int, str], between: tuple[float, float]) -> Any:
    """A tick at each `x` in the row of its worker."""
    y = heights(table["worker"], rows)
    return ticks(table[x].to_numpy(float), y + between[0], y + between[1])


def heights(keys: pd.Series, rows: Mapping[Any, str]) -> np.ndarray:
    """Where the row of each key is: 0, -1, and so on, the first of `rows` on top."""
    return keys.map({key: -row for row, key in enumerate(rows)}).to_numpy(float)


def rows_axis(rows: Mapping[Any, str], height: float | None = None) -> dict[str, Any]:
    """Options of a figure with a row for each of `rows` (key: text), from 0 downwards; of more than 24 only some are named."""
    named, n = [(-row, text) for row, text in enumerate(rows.values())] or [(0, "")], max(1, len(rows))
    height = float(np.clip(1.6 + 0.7 * len(rows), 3.4, 8)) if height is None else height
    return {"yticks": named if n <= 24 else named[::8], "ylim": (0.5 - n, 0.5), "ylabel": "", "grid": "x", "height": height}


def worker_rows(workers: Iterable[int], run: Any = None, status: Mapping[str, Any] | None = None) -> dict[int, str]:
    """The rows of workers, in their order, with what each is slowed down by in `run`: "worker 1 (4x)", "worker 1 (4x, then 8x)", and
    "worker 1 (4x again)" where it was set back."""
    slow, changed = (slowdowns(run), changed_slowdowns(run, status)) if run is not None else ({}, {})
    slow = {worker: f" ({by:g}x)" for worker, by in slow.items() if by != 1} | {
        worker: f" ({before:g}x, then {by:g}x)" if by != (before := slow.get(worker, 1)) else f" ({by:g}x again)"
        for worker, by in changed.items()
    }
    return {worker: f"worker {worker}{slow.get(worker, '')}" for worker in sorted(workers)}


def whole_ticks(n: int) -> list[int]:
    """Ticks of an axis that counts from 1 to n."""
    step = next(step for base in (1, 10, 100, 1000, 10**4, 10**5, 10**6) for step in (base, 2 * base, 5 * base) if n <= 8 * step)
    return sorted({1, *range(step, n + 1, step)} - ({1} if step > 5 else set()))


def heat(values: np.ndarray, what: str, text: Callable[[float], str], cell: tuple[float, float] = (1, 1)) -> list[Any]:
    """Cells (rows, columns) from the origin on, the darker the larger the value, `what` from 0 to 100, with its `text` in it. (A heat map of
    hvPlot has cells of names, not of pixels, and no equal aspect in a picture.)"""
    import holoviews as hv

    wide, high = cell
    cells = [(x * wide, y * high, (x + 1) * wide, (y + 1) * high, value) for (y, x), value in np.ndenumerate(values)]
    rows = hv.Rectangles(cells, kdims=["left", "bottom", "right", "top"], vdims=what)
    both = {"color": what, "cmap": "Blues", "clim": (0, 100), "colorbar": True}
    texts = [((x + 0.5) * wide, (y + 0.5) * high, text(value)) for (y, x), value in np.ndenumerate(values) if text(value)]
    written = [labels(texts, "white", 11)] if texts else []
    return [styled(rows, {"line_color": "white", "tools": ["hover"]}, {"edgecolor": "white"}, **both), *written]


def image_axes(size: Sequence[int], height: float) -> dict[str, Any]:
    """Options of a figure that is an image of `size` (rows, columns), the first row on top."""
    shape = {"aspect": "equal", "fig_inches": (8, height)}
    return {"xlim": (0, size[1]), "ylim": (0, size[0]), "invert_yaxis": True, "grid": "", "shape": shape, "height": height}


def raster(picture: Any) -> Any:
    """An image (H, W) in grey, or (H, W, 3), of pixels from 0 to its width and height."""
    import holoviews as hv

    picture = np.asarray(picture)
    middles = [np.arange(n) + 0.5 for n in picture.shape[1::-1]]
    if picture.ndim == 3:
        return styled(hv.RGB((*middles, *np.moveaxis(picture, -1, 0)), ["x", "y"]), {}, {"interpolation": "nearest"})
    return styled(hv.Image((*middles, picture), ["x", "y"], "value"), {}, {"interpolation": "nearest"}, cmap="gray")


def labels(
    texts: Sequence[tuple[float, float, str]],
    frame: str = "",
    size: int = 10,
    dims: tuple[str, str] = ("x", "y"),
    align: str = "center",
    baseline: str = "middle",
    mono: bool = False,
    bold: bool = False,
) -> Any:
    """Texts (x, y, text); with a `frame` of a colour on a white ground, so that they can be read on any image."""
    import holoviews as hv
    from bokeh.core.properties import value

    def ground(plot: Any, element: Any) -> None:
        for text in plot.handles["artist"]:
            text.set_bbox({"facecolor": "white", "edgecolor": frame, "pad": 2})

    weight, vertical = "bold" if bold else "normal", "center" if baseline == "middle" else baseline
    bokeh = {"text_font_size": f"{size}pt", "text_color": "black", "text_align": align, "text_baseline": baseline}
    bokeh |= {"text_font": value("monospace" if mono else FONT), "text_font_style": weight}
    picture = {"size": PICTURE * size, "color": "black", "horizontalalignment": align, "verticalalignment": vertical}
    picture |= {"family": "monospace" if mono else PICTURE_FONT, "weight": weight}
    if frame:
        bokeh, picture = {**bokeh, "background_fill_color": "white", "border_line_color": frame}, {**picture, "hooks": [ground]}
    return styled(hv.Labels(texts, list(dims), "text"), bokeh, picture)


def columns(table: pd.DataFrame, title: str, note: str, text: str = "", **options: Any) -> Any:
    """A figure of bars side by side: a group for each row of `table`, named by its index, in it a bar for each column.

    `text` formats the number written above each bar ("{:.0f}"); without it none is written.
    """
    n, width, top = len(table), 0.8 / table.shape[1], float(np.nanmax(table.to_numpy(float))) or 1.0
    elements, numbers = [], []
    for number, (name, tall) in enumerate(table.items()):
        left = np.arange(n) - 0.4 + number * width
        elements.append(boxes((left, np.zeros(n), left + width, tall.to_numpy(float)), number, name))
        numbers += [(x, y + 0.01 * top, text.format(y)) for x, y in zip(left + width / 2, tall, strict=True) if text]
    if numbers:
        elements.append(labels(numbers, baseline="bottom"))
    ticks = list(enumerate(table.index))[:: n // 20 + 1]
    options = {"xlabel": "", "xticks": ticks, "xlim": (-0.6, n - 0.4), "ylim": (0, 1.1 * top), **options}
    return finish(elements, title, note, table.shape[1] > 1, grid="y", **options)


def stack(views: Sequence[Any], space: float = 0.4, height: float | None = None) -> Any:
    """Figures under each other; `space` is what matplotlib leaves between them, in heights of a figure. `height` in inches is for more
    than two, between which holoviews would leave pages blank."""
    import holoviews as hv

    layout = hv.Layout(list(views)).cols(1)  # shared_axes=False would freeze live axes
    return styled(
        layout, bokeh={"toolbar": "right"}, matplotlib={"fig_inches": (8, height), "vspace": space, "sublabel_format": ""}
    )


def finish(elements: Sequence[Any], title: str, note: str = "", legend: bool = True, **options: Any) -> Any:
    """All elements in one set of axes, with title, the note under it, size and legend, for both back ends.

    The legend has what has a label, and is drawn below the axes, where no data is. `options` are those
    that the two back ends share (xlabel, ylabel, xlim, ylim, xticks, yticks), height in inches (4.5), and grid: which
    axes its lines start from ("xy", "x", "y" or "").
    """
    import holoviews as hv

    height, grid = options.pop("height", 4.5), options.pop("grid", "xy")
    title, size = _fitting(title)
    shape = options.pop("shape", {"aspect": "auto", "fig_inches": (8, height), "fig_bounds": (0, 0, 1, 1)})
    figure = hv.Overlay(list(elements))
    figure = figure.collate() if len(elements) > 1 else figure
    named = dict.fromkeys(filter(None, figure.traverse(lambda element: element.label, [hv.Element]))) if legend else {}
    n_columns = max(1, min(len(named), IN_A_ROW // (max(map(len, named), default=1) + 8)))
    more = max(0, math.ceil(len(named) / n_columns) - 1)  # rows of the legend, below the first
    fonts = FONTS | {"title": size}
    common = {"title": title, "show_grid": True, **options}
    beside = {"orientation": "vertical", "ncols": n_columns, "location": "left"}
    bokeh = {
        "responsive": True,  # as wide as the cell, at most 8 inches
        "max_width": 960,
        "height": round(120 * height) + 26 * more,
        "show_legend": bool(named),
        "legend_position": "bottom",
        "legend_opts": {**beside, "spacing": 6 if more else 24, "padding": 0, "border_line_alpha": 0},
        "gridstyle": {f"{axis}grid_line_alpha": 0 for axis in "xy" if axis not in grid},
        "fontsize": fonts,
        "hooks": [_bokeh_look(note)],
    }
    fonts = {name: PICTURE * size for name, size in fonts.items()}
    look = _matplotlib_look(title, fonts["title"], note, figure if named else None, n_columns, grid)
    matplotlib = {**shape, "fontsize": fonts, "show_legend": False, "hooks": [look]}
    return styled(figure, bokeh, matplotlib, **common)


def retitle(figure: Any, title: str, note: str) -> None:
    """Give a figure of bokeh, which `finish` drew, another title."""
    title, size = _fitting(title)
    figure.title.update(text=title, text_font_size=f"{size}pt")
    figure.html_attributes = _spoken(title, note)


def _fitting(title: str) -> tuple[str, int]:
    """What is shown of a title, and how large."""
    title = title if len(title) <= LONGEST else title[: LONGEST - 1] + "…"
    return title, max(9, min(FONTS["title"], FONTS["title"] * WIDE // max(1, len(title))))


def _spoken(title: str, note: str) -> dict[str, str]:
    """What a screen reader says of a picture."""
    return {"role": "img", "aria-label": ". ".join(filter(None, (title, note)))}


def a_run(name: str, run: Any, read: Callable[[Path], Any] | None = RunRecord) -> Any:
    """`run`, if it is one, or what `read` makes of its directory; TypeError otherwise, also for a directory without `read`."""
    if isinstance(run, str | os.PathLike) and read is not None:
        inside = directories(run)
        if len(inside) > 1:
            names = ", ".join(str(path.relative_to(file_path(name, run))) for path in inside[:8]) + ", ..." * (len(inside) > 8)
            raise RunError(f"{name}={os.fspath(run)!r} is a folder of {len(inside)} runs, and this is of one: {names}.")
        return read(inside[0])
    such = "a run, as labkit.train and labkit.load_run give it"
    if isinstance(run, str | os.PathLike):
        raise TypeError(f"{name}={os.fspath(run)!r} must be {such}: labkit.load_run({os.fspath(run)!r}).")
    return like(name, run, ("config", "curve"), such)


def some_runs(runs: Any, read: Callable[[Path], Any] = RunRecord) -> list[Any]:
    """A run, or each of several, in a list; TypeError where it is neither. A path is that of a run, or of a folder of runs: of several in
    one, those that cannot be read are left out, which is printed."""
    if isinstance(runs, str | os.PathLike) or not isinstance(runs, Iterable):
        return _runs_of("runs", runs, read)
    return list(chain.from_iterable(several("runs", runs, lambda name, given: _runs_of(name, given, read))))


def _runs_of(name: str, given: Any, read: Callable[[Path], Any]) -> list[Any]:
    if not isinstance(given, str | os.PathLike):
        return [a_run(name, given)]
    found, refused = [], []
    for path in directories(given):
        try:
            found.append(read(path))
        except RunError as error:
            refused.append(error)
    if not found:
        raise refused[0]
    for error in refused:
        print(f"Left out: {error}")
    return found


def check_columns(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """A table that a user hands in has what a figure reads; ValueError otherwise, TypeError where it is no table."""
    if not hasattr(frame, "iloc") or not hasattr(frame, "columns"):
        ours = (
            " Of a run there are plots.timeline(run), plots.balance(run) and plots.weights(run)."
            if hasattr(frame, "events")
            else ""
        )
        raise TypeError(f"a {type(frame).__name__} was given; give a pandas DataFrame with the columns {', '.join(columns)}.{ours}")
    if missing := [column for column in columns if column not in frame.columns]:
        has = ", ".join(map(str, frame.columns))
        raise ValueError(f"the frame has no column {', '.join(missing)}. It has: {has}.")


def message(title: str, text: str) -> Any:
    """A figure with the reason why there is nothing to draw."""
    import holoviews as hv

    reason = styled(hv.Text(0.5, 0.5, text), bokeh={"text_font_size": "12pt"}, matplotlib={"fontsize": PICTURE * 12})
    return finish([reason], title, xlim=(0, 1), ylim=(0, 1), xaxis=None, yaxis=None, grid="")


def names(several: Sequence[Any]) -> str:
    """Which runs or searches a message is about."""
    return ", ".join(one.name for one in several[:3]) + (f" and {len(several) - 3} more" if len(several) > 3 else "")


def caption(runs: Sequence[Any], *more: str) -> str:
    """What a reader must know to believe a figure of `runs`: emulated slowdown, asked for and reached, synthetic data, and `more`."""
    slow = dict.fromkeys(emulated(list(slowdowns(run).values())) for run in runs if run.config["emulated"])
    slow = " or ".join(filter(None, slow)).replace(" or slowdown emulated:", " or")
    made = ["synthetic data"] if any(run.config["synthetic"] for run in runs) else []
    made += sorted({ORIGINS[kind] for run in runs if (kind := (run.config.get("origin") or {}).get("kind")) in ORIGINS})
    unsteady = dict.fromkeys(unsteadiness(*(run.config[key] for key in ("jitter", "drift", "stalls"))) for run in runs)
    unsteady = " or ".join(filter(None, unsteady))
    midway = dict.fromkeys(slowed(run) for run in runs)
    return "; ".join(filter(None, [slow, reached(runs), unsteady and f"emulated {unsteady}", *midway, *made, *more]))


def reached(runs: Sequence[Any]) -> str:
    """The slowdown that emulation reached in `runs` that have ended, where it is not what was asked for: "slowdown asked 4x, reached
    4.6x"; empty elsewhere."""
    found: dict[float, list[float]] = {}
    for run in runs:
        with suppress(LabError):  # damaged: whoever reads it is told
            is_over = run.config["emulated"] and getattr(run, "state", "running") != "running"  # what moves is drawn often
            for worker, factor in slowdown_reached(run.events, run.config).items() if is_over else ():
                if abs(factor / (asked := slowdowns(run)[worker]) - 1) > OFF:
                    found.setdefault(asked, []).append(factor)
    texts = [f"asked {asked:g}x, reached {between([_factor(min(own)), _factor(max(own))])}" for asked, own in sorted(found.items())]
    return f"slowdown {'; '.join(texts)}" if texts else ""


def _factor(value: float) -> str:
    return f"{value:.0f}x" if value >= 10 else f"{value:.1f}x".replace(".0x", "x")


def changed_slowdowns(run: Any, status: Mapping[str, Any] | None = None) -> dict[int, float]:
    """By worker, the slowdown to which it was set while the run went (`Run.slow_down`), the latest one, by the `status` of the run."""
    if status is None:
        try:
            status = run.status() if hasattr(run, "status") else {}
        except LabError:  # damaged: whoever reads it is told
            status = {}
    return {int(index): float(by) for index, by in (status.get("slowed") or {}).items()}


def slowed(run: Any, status: Mapping[str, Any] | None = None) -> str:
    """The same for readers: "worker 1 set from 1x to 4x in mid-run", or "to 1x again" where it was set back; empty where nothing was changed."""
    before, texts = slowdowns(run), []
    for index, by in sorted(changed_slowdowns(run, status).items()):
        how = f"from {since:g}x to {by:g}x" if by != (since := before.get(index, 1)) else f"to {by:g}x again"
        texts.append(f"worker {index} set {how} in mid-run")
    return ", ".join(texts)


def emulated(factors: Sequence[float]) -> str:
    """[1, 4, 4, 4, 4] as "slowdown emulated: 1x, 4 at 4x"."""
    if all(factor == 1 for factor in factors):
        return ""
    if len(factors) <= 4:
        return f"slowdown emulated: {', '.join(f'{factor:g}x' for factor in factors)}"
    return f"slowdown emulated: {', '.join(f'{list(factors).count(f)} at {f:g}x' for f in dict.fromkeys(factors))}"


def slowdowns(run: Any) -> dict[int, float]:
    """The emulated slowdown of each worker, 1 for none."""
    return {int(w["index"]): float(w.get("slowdown") or 1) for w in run.config["workers"]}


def _bokeh_look(note: str) -> Any:
    def look(plot: Any, element: Any) -> None:
        from bokeh.models import CustomJS, Title

        figure = plot.state
        figure.toolbar.logo = None
        figure.output_backend = "canvas"  # for some hundred points WebGL takes longer, and most where there is no graphics card
        figure.title.text_font = FONT
        for axis in figure.axis:
            axis.update(axis_label_text_font=FONT, axis_label_text_font_style="normal", major_label_text_font=FONT)
        for legend in figure.legend:
            legend.label_text_font = FONT
        figure.html_attributes = _spoken(figure.title.text if figure.title else "", note)
        if note and not any(getattr(above, "name", "") == "note" for above in figure.above):
            text = Title(text=note, name="note", text_font_size="11pt", text_font=FONT, text_font_style="normal", text_color=GREY)
            figure.add_layout(text, "above")
        if "change:inner_width" not in figure.js_property_callbacks:
            titles = [figure.title, *(above for above in figure.above if getattr(above, "name", "") == "note")]
            wrap = CustomJS(args={"plot": figure, "titles": titles}, code=WRAP)
            figure.js_on_change("inner_width", wrap)
            figure.title.js_on_change("text", wrap)  # which changes while the figure is live

    return look


def _matplotlib_look(title: str, size: float, note: str, named: Any, n_columns: int, grid: str) -> Any:
    def look(plot: Any, element: Any) -> None:
        from matplotlib.transforms import ScaledTranslation

        axis = plot.handles["axis"]
        text = axis.get_title() or title  # of the user's own .opts(title=...) too
        axis.set_title("")
        axis.set_title(text, loc="left", fontsize=size, fontweight="bold", pad=20 if note else 8)
        above = {"xycoords": "axes fraction", "textcoords": "offset points"}
        axis.annotate(note, (0, 1), (0, 6), color=GREY, fontsize=PICTURE * 11, **above)
        axis.spines[["top", "right"]].set_visible(False)
        for name, lines in (("x", axis.xaxis), ("y", axis.yaxis)):
            lines.grid(True, alpha=0.3 if name in grid else 0)
            lines.set_zorder(-1)  # HoloViews puts its first element at 0, below a grid
        for bar in [own.handles["cax"] for own in (getattr(plot, "subplots", None) or {}).values() if "cax" in own.handles]:
            axis.apply_aspect()  # HoloViews puts a colour bar beside the axes as they were before they had their limits
            place, font = axis.get_position(), PICTURE * FONTS["yticks"]
            bar.set_position([place.x1 + 0.02, place.y0, 0.03, place.height])
            bar.tick_params(labelsize=font)
            bar.yaxis.label.set_fontsize(font)
        if named is not None:
            below = axis.transAxes + ScaledTranslation(0, -0.6, axis.figure.dpi_scale_trans)  # inches, clear of the x axis
            where = {"loc": "upper left", "bbox_to_anchor": (0, 0), "bbox_transform": below, "borderaxespad": 0}
            style = {"frameon": False, "fontsize": PICTURE * FONTS["legend"], "handlelength": 3, "ncols": n_columns}
            axis.legend(handles=_handles(named), **where, **style)

    return look


def _handles(figure: Any) -> list[Any]:
    """What matplotlib shows in the legend, as it is drawn; HoloViews makes no entry for boxes, and of a line with markers the line alone."""
    import holoviews as hv
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    found: dict[str, Any] = {}
    for element in figure.traverse(lambda element: element, [hv.Element]):
        is_box, look = isinstance(element, hv.Rectangles), hv.Store.lookup_options("matplotlib", element, "style").kwargs
        names = ("facecolor", "edgecolor", "hatch") if is_box else ("color", "linestyle", "linewidth", "marker")
        if element.label:
            handle = found.setdefault(element.label, Patch() if is_box else Line2D([], [], linestyle="none"))
            handle.set(label=element.label, **{name: look[name] for name in names if name in look})
    return [*found.values()]
