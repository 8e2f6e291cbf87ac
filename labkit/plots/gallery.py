"""The page of a gallery: filters, parallel coordinates, Pareto front, small multiples and a table of many runs, in one HTML file.

    gallery.html      the rows as JSON (`data`), `gallery.css` and `gallery.js` of this folder: nothing is fetched
    Row, Curve        what is shown, of a run, of a notebook in a sweep or of a trial in a search

The script draws with SVG. A policy in the page lets the browser run this one script, by its digest, and load nothing; what a record holds
is in the JSON alone, in which no character ends an element, and becomes text nodes of the page.

Used by `labkit.experiments.gallery`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from labkit.plots.style import evenly
from labkit.runs.files import replacing

if TYPE_CHECKING:
    import pandas as pd

POINTS = 60  # of a curve, at most
CARDS = 300  # small multiples that are shown before a button shows the others
MOST_TEXT = 300  # characters of a value or an error
AXES = ("seconds", "samples", "score", "loss")
FOLDER = Path(__file__).parent
BODY = """
<header><h1>{title}</h1><span id="count" role="status"></span>
<button type="button" id="reset">Show all</button> <button type="button" id="theme">Light or dark</button></header>
<p>{about}</p>
<noscript><p>This page draws itself with a script of its own, which is switched off here.</p></noscript>
<div id="layout"><form id="filters" aria-label="Filters" autocomplete="off"></form><main>
<section id="parallel-part"><h2>Settings and results</h2><p>A line for each run. Drag along an axis of numbers to filter by it. <span id="tint"></span></p>
<svg id="parallel" role="img"></svg></section>
<section id="front-part"><h2>Pareto front</h2><div id="front-choices" class="choices"></div>
<svg id="front" role="img" viewBox="0 0 700 320"></svg><p id="front-said"></p></section>
<section id="cards-part"><h2>Curves</h2><div class="choices"><label>y <select id="curve-y"></select></label>
<label>x <select id="curve-x"></select></label></div><p id="cards-said"></p><ul id="cards"></ul>
<button type="button" id="more" hidden></button></section>
<section id="detail" tabindex="-1" aria-live="polite" hidden></section>
<section><h2>Table</h2><div class="wide"><table id="table"></table></div></section>
</main></div>
"""


@dataclass(frozen=True)
class Curve:
    """A learning curve: a table with the columns `AXES`, NaN where there is no value; `dashed` where it is not that of the test set."""

    table: pd.DataFrame
    dashed: bool = False

    def as_json(self) -> dict[str, Any]:
        kept = self.table.iloc[evenly(len(self.table), POINTS)]
        return {name: [*map(_value, kept[name].tolist())] for name in AXES} | {"dashed": self.dashed}


@dataclass(frozen=True)
class Row:
    """What is shown of one run, notebook or trial; `links` are files by what they are called."""

    name: str
    state: str
    settings: Mapping[str, Any]
    results: Mapping[str, Any]
    curves: Sequence[Curve] = ()
    links: Mapping[str, Path] = field(default_factory=dict)
    error: str = ""


def write(path: Path, title: str, about: str, rows: Sequence[Row], less: Iterable[str] = ()) -> Path:
    """Write the page; links are relative to its folder. Of the results in `less`, less is better; of others the page guesses by their names."""
    data = {"columns": _columns(rows, set(less)), "rows": [_row(row, path.parent) for row in rows], "shown": CARDS}
    style, script = ((FOLDER / f"gallery.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; base-uri 'none'; form-action 'none'"
    )
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width"><title>labkit: {escape(title)}</title><style>{style}</style></head><body>'
        f"{BODY.format(title=escape(title), about=escape(about))}"
        f'<script type="application/json" id="data">{in_element(data)}</script><script>{script}</script></body></html>'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(page.encode(errors="replace"))
    return path


def in_element(data: Any) -> str:
    """JSON that can stand in a script element: no character of it begins a tag, a comment or an entity."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _columns(rows: Sequence[Row], less: set[str]) -> list[dict[str, Any]]:
    """Name, kind and values of each setting and result, in the order in which they come; of these what no row has is left out."""
    found = []
    for kind in ("setting", "result"):
        of_rows = [row.settings if kind == "setting" else row.results for row in rows]
        for name in dict.fromkeys(name for own in of_rows for name in own):
            values = [_value(own.get(name)) for own in of_rows]
            there = [value for value in values if value is not None]
            numeric = bool(there) and all(isinstance(value, int | float) for value in there)
            if there or kind == "setting":
                column = {"name": str(name), "kind": kind, "numeric": numeric, "values": values}
                found.append(column | ({"less": True} if name in less else {}))
    return found


def _row(row: Row, folder: Path) -> dict[str, Any]:
    links = [{"text": text, "href": _href(file, folder)} for text, file in row.links.items()]
    curves = [curve.as_json() for curve in row.curves]
    return {"name": row.name, "state": row.state, "error": row.error[:MOST_TEXT], "links": links, "curves": curves}


def _href(file: Path, folder: Path) -> str:
    """A relative address, which names no scheme whatever the file is called."""
    return "./" + quote(os.path.relpath(file, folder).replace(os.sep, "/"))


def _value(value: Any) -> Any:
    """A number of five digits, a text, or None."""
    if value is None or isinstance(value, str):
        return value if value is None else value[:MOST_TEXT]
    if isinstance(value, Mapping) and "by_value" in value:  # a function of a notebook
        return str(value["by_value"])[:MOST_TEXT]
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) < 2**53:
        return value
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return json.dumps(value, default=str)[:MOST_TEXT]
    return float(f"{number:.5g}") if math.isfinite(number) else None
