"""A report of runs as one page: what came out, the figures, the settings, where it was made, and how it is made again.

The page is a file of its own: pictures and style are in it, it has no script, and it opens without a network. What cannot be drawn
is a sentence with the reason, so that a damaged run does not keep the others from being read. As a PDF it is the same page, all of it
opened, printed by a Chromium of this machine, which has a profile of its own and no network.

    cost cards           a column a run, `Run.summary`
    figures of all       curves, staleness, balance
    figures of each      timeline, weights, membership
    settings, machine    config.json without what is of any length, environment.json
    how to reproduce     the calls that train it anew (`labkit.runs.calls`), with the versions; that replay it; that go on from it

Used through `labkit.plots`, and by `python -m labkit report`.
"""

from __future__ import annotations

import base64
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.errors import LabError, file_path
from labkit.plots import style
from labkit.plots.membership import membership
from labkit.plots.runs import balance, curves, staleness, timeline, weights
from labkit.runs.calls import calls, from_record
from labkit.runs.export import settings
from labkit.runs.files import find_json, replacing
from labkit.runs.labels import labels

if TYPE_CHECKING:
    from labkit.runs.record import RunRecord

OF_ALL = {
    curves: "Test score of the global weights against time.",
    staleness: "How many versions were made while a push was computed.",
    balance: "Mean over longest time of the workers' local passes; 1 is even.",
}
OF_EACH = {
    timeline: "When each worker computed, waited and exchanged weights; a tick above: its push was merged.",
    weights: "Each worker's share of the weights with which pushes were merged, beside its share of the samples.",
    membership: "Test score over time, and who was here when.",
}
STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid #8884; vertical-align: top; overflow-wrap: anywhere }
th:first-child { white-space: nowrap }
.wide { overflow-x: auto }
figure { margin: 1.5rem 0 }
img { max-width: 100%; background: white; border-radius: 4px }
pre { overflow-x: auto; padding: .5rem; background: #8882 }
@media print {
  :root { color-scheme: light; font-size: 12px }
  body { margin: 0; padding: 0; max-width: none }
  figure, tr { break-inside: avoid }
  img { max-height: 10cm }
  h2, h3, summary { break-after: avoid }
  pre { white-space: pre-wrap; overflow-wrap: anywhere }
}
"""
FORMS = (".html", ".pdf")
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge", "microsoft-edge")
PRINT = (
    "--headless", "--disable-gpu", "--no-first-run", "--no-pdf-header-footer", "--disable-extensions", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
PRINT_S = 120.0


def report(runs: RunRecord | str | Path | Sequence[RunRecord | str | Path], path: str | Path = "report.html") -> Path:
    """Write a report of a run, or of several side by side, as one file that needs no network; returns its path.

    A path that ends in `.html` is a page, one that ends in `.pdf` the same page as printed by Chromium, which has to be on PATH.

    Raises `RunError` where nothing of a run can be read, or none was given; what of it cannot be drawn is said in the page. `LabError`
    where there is no Chromium, or it does not print. Nothing is written then.

    Examples
    --------
    >>> labkit.plots.report([run], "report.html").name
    'report.html'
    """
    runs, path = style.some_runs(runs), file_path("path", path)
    if path.suffix not in FORMS:
        raise ValueError(f"path={str(path)!r} must end in {' or '.join(FORMS)}.")
    if not runs:
        raise LabError("a report needs a run at least. Give those of labkit.load_run.")
    printer = _chromium() if path.suffix == ".pdf" else None
    style.extension()
    page = "\n".join(_page(runs, opened=printer is not None)).encode()
    if printer is not None:
        page = _printed(page, printer)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(page)
    return path


def _chromium() -> str:
    for name in CHROMIUM:
        if found := shutil.which(name):
            return found
    raise LabError(
        f"a report as PDF is printed by Chromium, and none of {', '.join(CHROMIUM)} is on PATH. Install one (apt install chromium), or "
        "write the report to a path that ends in .html, and print that page."
    )


def _printed(page: bytes, chromium: str) -> bytes:
    """A page as PDF. The browser and all that it starts have ended afterwards."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        source, made = Path(folder) / "report.html", Path(folder) / "report.pdf"
        source.write_bytes(page)
        own = [f"--user-data-dir={folder}/profile", *(["--no-sandbox"] if os.geteuid() == 0 else [])]  # it has none as root
        command = [chromium, *PRINT, *own, f"--print-to-pdf={made}", source.as_uri()]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, **streams, cwd=folder, start_new_session=True)
        try:
            said = process.communicate(timeout=PRINT_S)[1].decode(errors="replace").strip().splitlines()
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise LabError(f"{chromium} printed no PDF in {PRINT_S:g} s. Give a path that ends in .html.") from None
            raise
        pdf = made.read_bytes() if made.exists() else b""
    if process.returncode != 0 or not pdf.startswith(b"%PDF"):
        why = f": {said[-1]}" if said else "."
        raise LabError(f"{chromium} printed no PDF and ended with {process.returncode}{why}")
    return pdf


def _page(runs: list[RunRecord], opened: bool) -> Iterator[str]:
    details = "<details open>" if opened else "<details>"
    names = labels(runs)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    yield f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>labkit: {escape(title)}</title>'
    yield f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>"
    yield "<h2>What came out</h2>"
    yield _table(dict(zip(names, (_card(run) for run in runs), strict=True)))
    yield "<h2>Figures</h2>"
    for draw, about in OF_ALL.items():
        yield _figure(draw, runs, about)
    for run, name in zip(runs, names, strict=True):
        yield f"<h2>{escape(name)}</h2>"
        for draw, about in OF_EACH.items():
            yield _figure(draw, run, about)
        yield f"{details}<summary>Settings</summary>{_table({'': settings(run)})}</details>"
        machine = _flat(find_json(run.path / "environment.json") or {})
        own = {name: value for name, value in machine.items() if name not in ("digest", "run")}
        yield f"{details}<summary>Machine and versions</summary>{_table({'': own})}</details>"
        yield "<h3>How to reproduce</h3>"
        if versions := _versions(machine):
            yield f"<p>Made with {escape(versions)}; seed {run.config.seed}.</p>"
        yield f"<p>Trained anew:</p><pre>{escape(calls(run))}</pre>"
        yield f"<p>From its record:</p><pre>{escape(from_record(run))}</pre>"
    yield "</body></html>"


def _versions(machine: Mapping[str, Any]) -> str:
    """Of Python and the packages that a run was made with, as its flat environment.json has them."""
    packages = {name.removeprefix("versions "): version for name, version in machine.items() if name.startswith("versions ")}
    known = {"Python": machine.get("python"), **packages}
    return ", ".join(f"{name} {version}" for name, version in known.items() if version)


def _card(run: RunRecord) -> dict[str, Any]:
    try:
        return _flat(run.summary())
    except LabError as error:
        return {"state": "damaged", "reason": str(error)}


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{before}{name} ") if isinstance(value, Mapping) else {f"{before}{name}": value}
    return found


def _table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """A column a mapping, a row a key."""
    import pandas as pd

    texts = {name: {key: _shown(value) for key, value in column.items()} for name, column in columns.items()}
    with pd.option_context("display.max_colwidth", None):
        shown = pd.DataFrame(texts, dtype=object).fillna("").to_html(header=any(columns), border=0)
    return f'<div class="wide">{shown}</div>'


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _figure(draw: Callable[..., Any], of: Any, about: str) -> str:
    """The picture with its title as alternative text, or why there is none."""
    import holoviews as hv

    try:
        figure = draw(of)
        with tempfile.TemporaryDirectory() as folder:
            picture = base64.b64encode(style.save(figure, Path(folder) / "figure.png").read_bytes()).decode()
    except LabError as error:
        return f"<p>No {escape(draw.__name__)}: {escape(str(error))}</p>"
    title = hv.Store.lookup_options("bokeh", figure, "plot").kwargs.get("title") or about
    caption = f"<figcaption>{escape(about)}</figcaption>"
    return f'<figure><img src="data:image/png;base64,{picture}" alt="{escape(title)}">{caption}</figure>'
