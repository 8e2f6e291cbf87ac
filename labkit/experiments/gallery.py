"""`labkit.gallery`: many runs on one page. What is in a folder becomes the rows of it (`labkit.plots.gallery`).

    a sweep       a row for what each notebook has reported, its parameters, the curves of the runs in its folder, the executed notebook
    a search      a row for each trial, its point and what came out
    other runs    a row for each, its strategy and the settings that differ, its cost card and its curve

All of it is read from the records: nothing that they name is imported, and what cannot be read is a row that says why.

Used by users, and by `python -m labkit gallery`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.errors import LabError, RunError, file_path, plain_scalar, several
from labkit.experiments.sweep import read
from labkit.plots.gallery import Curve, Row, write
from labkit.runs import labels
from labkit.runs.config import FILE as CONFIG
from labkit.runs.events import effective
from labkit.runs.files import is_folder
from labkit.runs.record import RunRecord, directories

if TYPE_CHECKING:
    import pandas as pd

    from labkit.experiments.search import Search

PAGE = "gallery.html"
RESULTS = ("score", "loss", "seconds", "samples_per_s", "wait_share", "staleness_p50", "balance", "bytes")  # of a cost card
ABOUT = ("status", "state", "error", "notebook", "id", "trial", "workers", "run")  # columns of tables that are no result


def gallery(runs: str | Path | Search | RunRecord | Iterable[RunRecord | str | Path], path: str | Path | None = None) -> Path:
    """Write a page on which many runs are filtered and compared, one HTML file that needs no network; returns its path.

    It has filters, parallel coordinates, a Pareto front of any two numbers, the curves as small multiples, and a table with links to
    the executed notebooks.

    Parameters
    ----------
    runs : the folder of a sweep, of a search or of runs (also of folders with runs); a `Search`; or a run, or several, also by their directories.
    path : the page, by default `gallery.html` in the folder. Links on it are relative: it moves with the folder.

    Raises
    ------
    RunError
        There are no runs.
    ValueError
        The path does not end in .html.

    Examples
    --------
    >>> labkit.gallery(run.path.parent, "gallery.html").name
    'gallery.html'
    """
    from labkit.experiments.search import FILE as SEARCH
    from labkit.experiments.search import Search, load_search

    runs = [runs] if isinstance(runs, RunRecord) else plain_scalar(runs)
    folder = runs.path if isinstance(runs, Search) else file_path("runs", runs) if isinstance(runs, str | Path) else None
    page = file_path("path", path) if path is not None else (folder or Path()) / PAGE
    if page.suffix != ".html":
        raise ValueError(f"path={str(page)!r} must end in .html.")
    if folder is not None and not is_folder(folder):
        raise RunError(f"there is no folder {folder}.")
    less: set[str] = set()
    if folder is None:
        found = [run if isinstance(run, RunRecord) else file_path("runs", run) for run in several("runs", runs, lambda _, run: run)]
        rows, what = _of_runs(found, less), "runs"
    elif isinstance(runs, Search) or (folder / SEARCH).exists():
        rows, what = _of_search(runs if isinstance(runs, Search) else load_search(folder), less), "trials of a search"
    elif (folder / "sweep.json").exists() or any(folder.glob("*/params.json")):
        rows, what = _of_sweep(folder, less), "rows of a sweep"
    else:
        rows, what = _of_runs(_runs_in(folder), less), "runs"
    if not rows:
        raise RunError(f"there are no runs in {folder}." if folder is not None else "a gallery needs a run at least.")
    title = folder.resolve().name if folder is not None else what
    return write(page, title, f"{len(rows)} {what}", rows, less)


def _runs_in(folder: Path) -> list[Path]:
    """The directories of the runs in a folder; none of a folder without one."""
    found = directories(folder)
    return [] if found == [folder] and not (folder / CONFIG).exists() else found


def _of_runs(runs: Sequence[RunRecord | Path], less: set[str]) -> list[Row]:
    read, unread = [], []
    for run in runs:
        try:
            read.append(run if isinstance(run, RunRecord) else RunRecord(run))
        except RunError as error:
            unread.append(Row(Path(run).name, "damaged", {}, {}, error=str(error)))
    differing = labels.differing(read)
    strategies = [run.label for run in read]
    if len(set(strategies)) > 1:
        differing = {"strategy": strategies, **differing}
    less |= _less(read)
    rows = []
    of_each = zip(read, labels.ends(read), labels.labels(read, by_directory=False), strict=True)
    for at, (run, end, label) in enumerate(of_each):
        settings = {name: values[at] for name, values in differing.items()}
        state, results, error = _card(run)
        name = end if run.name == run.path.name else f"{run.name} ({end})"
        rows.append(Row(f"{name}: {label}", state, settings, results, _curves([run]), _links(run.path), error))
    return rows + unread


def _of_sweep(folder: Path, less: set[str]) -> list[Row]:
    table, given = read(folder)
    measured = [name for name in table.columns if name not in (*given, *ABOUT)]
    varied = [name for name in given if table[name].map(str).nunique() > 1]
    rows = []
    for values in table.to_dict("records"):
        own = Path(values["notebook"]).parent
        runs = _readable(directories(own))
        less |= _less(runs)
        name = ", ".join(f"{name}={values[name]}" for name in varied if _is_there(values[name])) or own.name
        name += f": {values['label']}" if isinstance(values.get("label"), str) else ""  # of a notebook that reports several rows
        settings, results = ({name: values[name] for name in names} for names in (given, measured))
        rows.append(Row(name, values["status"], settings, results, _curves(runs), _links(own), str(values["error"] or "")))
    return rows


def _of_search(search: Search, less: set[str]) -> list[Row]:
    table = search.table()
    less |= {"score"} if search.lower_is_better else set()
    points = search.points[: len(table)]  # more may have been asked for since
    names = dict.fromkeys(name for point in points for name in point)
    measured = [name for name in table.columns if name not in (*names, *ABOUT)]
    rows = []
    for values, point in zip(table.to_dict("records"), points, strict=True):
        number = values["trial"]
        folders = sorted(path for path in (search.path / "trials").glob(f"{number}*") if path.name.partition("-")[0] == str(number))
        links = {text: file for own in folders for text, file in _links(own).items()}
        results, runs = {name: values[name] for name in measured}, [run for own in folders for run in _readable(directories(own))]
        rows.append(Row(f"trial {number}", values["state"], point, results, _curves(runs), links, str(values["error"] or "")))
    return rows


# -- of one run ---------------------------------------------------------------------------------------------------------


def _readable(paths: Iterable[Path]) -> list[RunRecord]:
    found = []
    for path in paths:
        with contextlib.suppress(RunError):
            found.append(RunRecord(path))
    return found


def _less(runs: Iterable[RunRecord]) -> set[str]:
    return {"score"} if any(run.config.lower_is_better for run in runs) else set()


def _card(run: RunRecord) -> tuple[str, dict[str, Any], str]:
    """State, results and what is wrong; without a curve that is measured already no score and no loss."""
    try:
        state = run.status()
        curve, unread = run.read_curve()
        card = run.card(state["state"], curve)
    except LabError as error:
        return "damaged", {}, str(error)
    return state["state"], {name: card[name] for name in RESULTS}, ". ".join(filter(None, [state.get("reason"), unread]))


def _curves(runs: Iterable[RunRecord]) -> list[Curve]:
    found = []
    for run in runs:
        with contextlib.suppress(LabError):  # its row says what is wrong
            (table, _), dashed = run.read_curve(), False
            if table is None:
                table, dashed = _pushed(run), True
            if len(table):
                found.append(Curve(table, dashed))
    return found


def _pushed(run: RunRecord) -> pd.DataFrame:
    """Training loss and held-out score of what workers have pushed, by time: of a run whose curve is not measured."""
    events = effective(run.events)
    pushes = events[events.kind == "push"]
    return pushes.assign(samples=pushes.samples.cumsum())


def _links(folder: Path) -> dict[str, Path]:
    files = {"notebook": folder / "notebook.ipynb", "report": folder / "report.html"}
    return {text: file for text, file in files.items() if file.exists()}


def _is_there(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))
