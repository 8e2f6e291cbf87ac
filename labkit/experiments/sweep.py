"""Sweeps: one notebook executed over a grid of parameters, by several kernels at once, and the table of what came out.

A run is named by a hash of the notebook, its parameters and the version of labkit, so that a finished run is found
again and not repeated; a failed one stays with its notebook and its error until a retry is asked for. What is wrong with
the grid, the notebook or the folder is an error before a kernel starts. What a run reports, it writes to its folder.

    runs/<sweep>/<notebook>-<8 hex>/   notebook.ipynb  params.json  status.json  results.json  error.txt

Used as `labkit.sweep`, `labkit.summary` and `labkit.report`, by `python -m labkit sweep`, and to test the notebooks.
"""

import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

import pandas as pd

from labkit.errors import SweepError, did_you_mean, file_path, flag, real, text, whole
from labkit.experiments.executor import GRACE, check_kernel, execute, state
from labkit.experiments.notebook import conform, load, plain, read_parameters
from labkit.locks import alone
from labkit.names import named
from labkit.runs.files import find_json, is_folder, write_json
from labkit.runs.record import directories
from labkit.tables import Table

ROOM = 50e6  # bytes that must be free where the runs go


@named
def sweep(
    notebook: str | os.PathLike[str],
    grid: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    lab: Any = None,
    out: str | os.PathLike[str] | None = None,
    parallel: int = 1,
    retry_failed: bool = False,
    fresh: bool = False,
    timeout: float = 3600.0,
    kernel_name: str = "python3",
    progress: bool = True,
) -> pd.DataFrame:
    """Execute a notebook for each point of a grid, and return the table of all runs in `out` (see `summary`).

    A kernel starts in the notebook's own folder, as in JupyterLab; relative paths in the notebook are relative to that.
    What a run has found gets into the table by two lines of its notebook:

        run_dir: str = "runs/my-notebook"                # in the parameters cell: each run is given a folder of its own, its absolute path
        labkit.report(run_dir, {"score": run.test_score})    # in the last cell: the columns of this run

    `labkit.train(..., runs=run_dir)` and `plots.save(figure, f"{run_dir}/curves.png")` put the rest there, too. Without them the table has
    status and seconds alone, which is said. Ctrl-C stops the running kernels, and the same call goes on from there. Two sweeps into one folder share its runs: each run is executed
    by one of them, and what the other is still at has the status "running" in the table.

    A cell may put out what it likes. Of a stream that is longer than 100,000 characters, the notebook has beginning and end, and
    `cell-<number>-<stream>.txt` beside it up to 10 million characters. All figures and other outputs of a notebook have 50 MB
    (each counts for 10 kB at least); what does not fit is left out, and a note is there instead. An error in a cell that is tagged
    `raises-exception` is no failure.

    Parameters
    ----------
    notebook
        Path of the notebook; it has a cell tagged `parameters`.
    grid
        Values for each parameter, of which all combinations are run (the last varies fastest), or a list of dicts, one
        a run. A single value, a string too, counts as one.
    lab
        A `Lab`: each of its workers executes one notebook at a time, and has to see `out`. Without it the kernels are
        started from here. A notebook connects to a lab of its own, not to this one, whose workers are busy.
    out
        Folder of the runs; default `runs/<notebook>`, and another name where that holds the runs of another notebook of this name.
    parallel
        Kernels at once when there is no lab.
    retry_failed, fresh
        Run those again that failed; run all of them again.
    timeout
        Seconds that a run may take.
    kernel_name
        Jupyter's name of the kernel.
    progress
        Print a line when a run starts or ends, with the time that is left, and a count at the end.

    Raises
    ------
    SweepError
        Before a kernel starts: unknown parameter, value of a wrong type, unreadable notebook, unwritable folder.
        Later: the lab broke down. A run that fails is a row of the table and not an exception.

    Examples
    --------
    >>> import nbformat
    >>> cells = [
    ...     nbformat.v4.new_code_cell('lr = 0.1\\nrun_dir = ""', metadata={"tags": ["parameters"]}),
    ...     nbformat.v4.new_code_cell('import labkit\\nlabkit.report(run_dir, {"score": 1 - lr})'),
    ... ]
    >>> kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    >>> nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), "train.ipynb")
    >>> table = labkit.sweep("train.ipynb", {"lr": [0.1, 0.2]}, out="tonight")
    >>> table.score.tolist()
    [0.9, 0.8]
    """
    try:
        path = file_path("notebook", notebook).absolute()
        folder = _own_folder(path) if out is None else file_path("out", out).absolute()
        parallel, timeout, kernel_name = (
            whole("parallel", parallel),
            real("timeout", timeout, above=0),
            text("kernel_name", kernel_name),
        )
        flags = {"retry_failed": retry_failed, "fresh": fresh, "progress": progress}
        retry_failed, fresh, progress = (flag(name, value) for name, value in flags.items())
        if lab is not None and not all(hasattr(lab, name) for name in ("workers", "map")):
            raise TypeError(f"lab is a {type(lab).__name__}; give one of labkit.connect(...).")
    except (TypeError, ValueError) as error:
        raise SweepError(str(error)) from None
    jobs = _jobs(path, grid, folder, kernel_name, timeout)
    check_kernel(kernel_name)
    _check_folder(folder)
    before = {job["id"]: _state(job) for job in jobs}
    again = {"", "interrupted"} | ({"failed"} if retry_failed else set()) | ({"failed", "done"} if fresh else set())
    todo = [job for job in jobs if before[job["id"]] in again]
    for job in todo:
        job["before"] = before[job["id"]]
    ids = [job["id"] for job in jobs]
    with alone(folder):
        order = (find_json(folder / "sweep.json") or {}).get("runs", [])
        write_json(folder / "sweep.json", {"notebook": str(path), "runs": ids + [run for run in order if run not in ids]})
    if progress and (missing := _missing(jobs[0])):
        print(missing, flush=True)
    if todo:
        _execute(todo, folder, lab, parallel, progress)
    if progress:
        print(_count(jobs, before, todo), flush=True)
    return summary(folder)


def summary(out: str | os.PathLike[str]) -> pd.DataFrame:
    """The table of a sweep's folder: a row a run, or as many as the run reported.

    Columns: the parameters that differ between the runs, the results (a name that is taken gets the ending `_result`), `status` (done,
    failed, interrupted, running, or damaged: a file of it cannot be read), `error` (cell and error in a line), `seconds` that the notebook
    was executed (`notebook_seconds` where a notebook has a result or a parameter `seconds` of its own), the parameters that were set and
    are the same for all, `notebook` (the executed one), `id`.

    Examples
    --------
    >>> import nbformat
    >>> cells = [
    ...     nbformat.v4.new_code_cell('lr = 0.1\\nrun_dir = ""', metadata={"tags": ["parameters"]}),
    ...     nbformat.v4.new_code_cell('import labkit\\nlabkit.report(run_dir, {"score": 1 - lr})'),
    ... ]
    >>> kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    >>> nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), "train.ipynb")
    >>> _ = labkit.sweep("train.ipynb", {"lr": [0.1]}, out="tonight")
    >>> labkit.summary("tonight").score.tolist()  # of a sweep that is running, too
    [0.9]
    """
    table, folder = read(out)[0], file_path("out", out)
    if table.empty and not (folder / "sweep.json").exists():
        runs = [run for run in directories(folder) if run != folder]
        what = f"{len(runs)} runs, of which labkit.compare({str(folder)!r}) is the table" if runs else "no runs"
        print(f"{folder} is no folder of a sweep: it holds {what}.")
    return table


def read(out: str | os.PathLike[str]) -> tuple[pd.DataFrame, list[str]]:
    """The table of `summary`, and which of its columns are parameters."""
    out = file_path("out", out).absolute()
    if not is_folder(out):
        raise SweepError(f"there is no folder {out}; sweep(..., out=...) makes it.")
    order = {run: number for number, run in enumerate((find_json(out / "sweep.json") or {}).get("runs", []))}
    folders = sorted({path.parent for name in ("params.json", "notebook.ipynb") for path in out.glob(f"*/{name}")})
    runs = [(folder, find_json(folder / "params.json")) for folder in folders]
    unread = [folder for folder, record in runs if not _is_record(record)]
    runs = [(folder, record) for folder, record in runs if _is_record(record)]
    runs.sort(key=lambda run: order.get(run[1]["id"], len(order)))
    given = list(dict.fromkeys(name for _, record in runs for name in [*record["given"], *_differing(runs)]))
    varied = given if len(runs) < 2 else [name for name in given if name in _differing(runs)]
    reports = [find_json(folder / "results.json") for folder, _ in runs]
    reports = [reported if _is_results(reported) else None for reported in reports]
    own = {*given, *(name for reported in reports for result in reported or () for name in result)}
    last = ["status", "error", "notebook_seconds" if "seconds" in own else "seconds", "notebook", "id"]
    table, results = [], {}
    for (folder, record), reported in zip(runs, reports, strict=True):
        status = state(folder)
        if reported is None:
            status = _damaged(folder / "results.json") if (folder / "results.json").exists() else status
        row = {name: record["parameters"].get(name) for name in given}
        tail = [status["state"], status.get("error", ""), status.get("seconds", math.nan), folder / "notebook.ipynb"]
        ending = dict(zip(last, [*tail[:3], str(tail[3]), record["id"]], strict=True))
        for result in reported or [{}]:
            named = {name + "_result" * (name in given or name in last): value for name, value in result.items()}
            results |= dict.fromkeys(named)
            table.append(row | named | ending)
    for folder in unread:
        about = _damaged(folder / "params.json")
        table.append(
            {"status": about["state"], "error": about["error"], "notebook": str(folder / "notebook.ipynb"), "id": folder.name}
        )
    fixed = [name for name in given if name not in varied]
    return Table(table, columns=[*varied, *results, *last[:3], *fixed, *last[3:]]), given


def _is_record(record: Any) -> bool:
    """Is this what params.json of a run holds?"""
    kinds = {"parameters": dict, "given": list, "id": str}
    return isinstance(record, dict) and all(isinstance(record.get(key), kind) for key, kind in kinds.items())


def _is_results(reported: Any) -> bool:
    return isinstance(reported, list) and all(isinstance(row, dict) for row in reported)


def _damaged(file: Path) -> dict:
    return {"state": "damaged", "error": f"{file} is damaged or missing. Delete the folder: the same sweep then runs it again."}


def _differing(runs: Sequence[tuple[Path, Mapping]]) -> list[str]:
    """Parameters that were not set but differ between runs: the notebook's own value was changed between two sweeps."""
    names = dict.fromkeys(name for _, record in runs for name in record["parameters"])
    values = {name: [record["parameters"].get(name) for _, record in runs] for name in names}
    return [name for name, own in values.items() if any(value != own[0] for value in own)]


def report(run_dir: str | os.PathLike[str], results: Mapping | Sequence[Mapping] | pd.DataFrame | None = None) -> None:
    """Hand in the results of a run, as the last cell of its notebook does: `labkit.report(run_dir, {"score": 0.9})`.

    `run_dir` is a parameter of the notebook, `run_dir: str = "runs/my-notebook"`; a sweep sets it to a folder of each run.

    A dict is one row of the sweep's table, a list of dicts or a DataFrame several. A second call replaces the first. Where another
    notebook of this Jupyter server has reported into the same folder, its results stay: these go to `results-<notebook>.json`.

    It is not the report of runs as a page of tables and figures: that is `labkit.plots.report(runs, "report.html")`.

    Examples
    --------
    >>> labkit.report("", {"score": 0.9})  # in a notebook that is run by hand, where run_dir is empty: the table alone
    """
    page = 'The report of runs, as a page, is labkit.plots.report(runs, "report.html").'
    if hasattr(results, "columns"):
        results = results.to_dict("records")
    rows = [results] if isinstance(results, Mapping) else results
    if not isinstance(rows, (list, tuple)) or not all(isinstance(row, Mapping) for row in rows):
        got = "nothing" if results is None else f"a {type(results).__name__}"
        raise SweepError(
            f"report(run_dir, results) hands in the results of a notebook, a dict, a list of dicts or a DataFrame, and got {got}. {page}"
        )
    if not isinstance(run_dir, str | os.PathLike):
        raise TypeError(f"run_dir must be the folder of a notebook's results, not a {type(run_dir).__name__}. {page}")
    rows = [{str(name): plain(value, str(name), strict=False) for name, value in row.items()} for row in rows]
    run_dir = file_path("run_dir", run_dir).absolute()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(_results_file(run_dir), rows)
    except OSError as error:
        raise SweepError(f"the results cannot be written to {run_dir}: {error.strerror}.") from error


def _results_file(folder: Path) -> Path:
    """Of this notebook, as far as it is known: a Jupyter server and VS Code tell their kernels, a sweep gives each run a folder of its own."""
    notebook, held = os.environ.get("JPY_SESSION_NAME") or getattr(sys.modules.get("__main__"), "__vsc_ipynb_file__", None), ""
    if not notebook:
        return folder / "results.json"
    stem = Path(notebook).stem
    for name in itertools.chain(["results", f"results-{stem}"], (f"results-{stem}-{number}" for number in itertools.count(2))):
        file, owner = folder / f"{name}.json", folder / f".{name}-of"
        if not (file.exists() and owner.exists()) or (other := owner.read_text(errors="replace")) == notebook:
            break
        held = held or other
    if held:
        print(f"{folder} holds the results of {held}; these are in {file.name}. Give each notebook its own run_dir.")
    owner.write_text(notebook)
    return file


# -- before the first kernel -------------------------------------------------------------------------------------------


def _own_folder(path: Path) -> Path:
    """Where the runs of a notebook go by default: none that holds those of another notebook of this name."""
    folder = Path("runs").absolute() / path.stem
    other = (find_json(folder / "sweep.json") or {}).get("notebook")
    if not isinstance(other, str) or Path(other) == path or not Path(other).exists():  # it may have been moved
        return folder
    own = folder.with_name(f"{path.stem}-{hashlib.sha256(str(path).encode()).hexdigest()[:6]}")
    print(f"{folder} holds runs of {other}; those of {path} go to {own}.")
    return own


def _missing(job: dict) -> str:
    """What the notebook needs for its results to get into the table; "" where it has it."""
    code = "\n".join(cell["source"] for cell in job["content"]["cells"] if cell["cell_type"] == "code")
    lines = [] if "run_dir" in job["parameters"] else [f'`run_dir: str = "runs/{Path(job["path"]).stem}"` in its parameters cell']
    lines += [] if re.search(r"\breport\(", code) else ['`labkit.report(run_dir, {"score": ...})` in its last cell']
    name = Path(job["path"]).name
    return (
        f"{name} reports no results, so that the table has status and seconds alone. It needs {' and '.join(lines)}."
        if lines
        else ""
    )


def _jobs(path: Path, grid: Any, folder: Path, kernel_name: str, timeout: float) -> list[dict]:
    """The runs of a grid, each once, checked; a job is what `execute` needs."""
    content = load(path)
    known = {parameter.name: parameter for parameter in read_parameters(content, path.name)}
    settable = [name for name in known if name != "run_dir"]
    defaults = {name: conform(plain(known[name].default, name), known[name], path.name) for name in settable}
    source = [[cell["cell_type"], cell["source"], cell["metadata"].get("tags", [])] for cell in content["cells"]]
    release = version("labkit")
    jobs = {}
    for row in _rows(grid):
        for name in row:
            if name == "run_dir":
                raise SweepError("'run_dir' is set by the sweep, to a folder for each run. Use out=... to choose where.")
            if name not in known:
                has = f"It has: {', '.join(settable)}.{did_you_mean(name, settable)}"
                raise SweepError(f"{path.name} has no parameter {name!r}. {has}")
        given = {name: conform(plain(value, name), known[name], path.name) for name, value in row.items()}
        values = defaults | given
        text = json.dumps([source, values, release, kernel_name], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        run_folder = folder / f"{path.stem}-{digest[:8]}"
        record = {"id": digest[:8], "hash": digest, "notebook": str(path), "version": release}
        jobs[digest] = {
            "id": digest[:8], "folder": str(run_folder), "path": str(path), "cwd": str(path.parent), "content": content,
            "parameters": given | ({"run_dir": str(run_folder)} if "run_dir" in known else {}), "kernel_name": kernel_name,
            "record": record | {"given": list(given), "parameters": values}, "timeout": float(timeout),
        }  # fmt: skip
    return list(jobs.values())


def _rows(grid: Any) -> list[dict]:
    """The points of a grid as dicts; a value that is not a collection of values counts as one."""
    if isinstance(grid, Mapping):
        values = {name: list(_several(value)) for name, value in grid.items()}
        if empty := [name for name in values if not values[name]]:
            raise SweepError(f"the grid has no value for {empty[0]!r}. Leave it out to use the notebook's own.")
        return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]
    single = isinstance(grid, (str, bytes)) or not isinstance(grid, Iterable) or getattr(grid, "ndim", 1) == 0
    rows = [None] if single else list(grid)
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise SweepError(f"the grid is {str(grid)[:60]!r}; give a dict of lists, {{'seed': [0, 1]}}, or some dicts.")
    return [dict(row) for row in rows]


def _several(value: Any) -> Iterable:
    single = isinstance(value, (str, bytes, PurePath, Mapping)) or not isinstance(value, Iterable)
    return [value] if single or getattr(value, "ndim", 1) == 0 else value


def _check_folder(folder: Path) -> None:
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(1 << 16))
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise SweepError(f"runs cannot be written to {folder}: {error.strerror}. Choose another by out=...") from error
    if free < ROOM:
        raise SweepError(f"only {free / 1e6:.0f} MB are free at {folder}. Make room, or choose another by out=...")


def _state(job: dict) -> str:
    """The recorded state of a run, or "" where there is none yet."""
    record = find_json(Path(job["folder"]) / "params.json")
    if not isinstance(record, dict):
        return ""
    if record.get("hash") != job["record"]["hash"]:
        raise SweepError(f"{job['folder']} is of another run, {record.get('hash')}. Choose another folder by out=...")
    return state(Path(job["folder"]))["state"]


# -- while it runs -----------------------------------------------------------------------------------------------------


def _execute(todo: list[dict], folder: Path, lab: Any, parallel: int, progress: bool) -> None:
    """Run the jobs on a lab, or in so many threads that start a kernel each; whatever ends this early also ends them."""
    flag = folder / f".sweep-{uuid.uuid4().hex[:8]}"
    flag.touch()
    for job in todo:
        job["flag"] = str(flag)
        with alone(folder):
            if _state(job) == job["before"]:  # else another sweep has begun it meanwhile, or has ended it
                (Path(job["folder"]) / "status.json").unlink(missing_ok=True)
    ended = threading.Event()
    at_once = parallel if lab is None else len(lab.workers)
    printer = threading.Thread(target=_print_changes, args=(todo, ended, at_once), daemon=True)
    pool = ThreadPoolExecutor(parallel, thread_name_prefix="labkit-sweep")
    try:
        if progress:
            printer.start()
        if lab is None:
            list(pool.map(execute, todo))
        else:
            rounds = math.ceil(len(todo) / len(lab.workers))
            lab.map(execute, todo, timeout=rounds * (todo[0]["timeout"] + 300))  # room for kernels that start and end slowly
    except BaseException as error:
        flag.unlink(missing_ok=True)
        deadline = time.monotonic() + 6 * GRACE
        while time.monotonic() < deadline and any(_state(job) == "running" for job in todo):
            time.sleep(0.1)
        if not isinstance(error, Exception):
            raise
        finished = sum(_state(job) in ("done", "failed") for job in todo)
        raise SweepError(
            f"the lab broke down after {finished} of {len(todo)} runs ({type(error).__name__}: {error}). "
            "The same call goes on from there."
        ) from error
    finally:
        flag.unlink(missing_ok=True)
        pool.shutdown(wait=False, cancel_futures=True)
        ended.set()
        if progress:
            printer.join(timeout=10)


def _print_changes(jobs: list[dict], ended: threading.Event, at_once: int) -> None:
    """A line when a run starts and one when it ends, read from the runs' folders, wherever they are executed."""
    took: list[float] = []
    values = {job["id"]: {name: job["parameters"][name] for name in job["record"]["given"]} for job in jobs}
    varied = [name for name in values[jobs[0]["id"]] if len({json.dumps(v.get(name)) for v in values.values()}) > 1]
    printed = dict.fromkeys(values, "")
    last = False
    while not last:
        last = ended.wait(0.3)
        for number, job in enumerate(jobs, 1):
            if printed[job["id"]] not in ("", "running"):
                continue
            status = find_json(Path(job["folder"]) / "status.json") or {}
            if (now := status.get("state", "")) == printed[job["id"]]:
                continue
            printed[job["id"]] = now
            given = values[job["id"]]
            label = " ".join(f"{name}={given[name]}" for name in (varied or given) if name in given) or job["id"]
            took += [status["seconds"]] if now in ("done", "failed") else []
            over = sum(state not in ("", "running") for state in printed.values())
            left = _left(took, len(jobs) - over, at_once) if now != "running" else ""
            print(f"[{number}/{len(jobs)}] {label}  {_ending(status, Path(job['folder']))}{left}", flush=True)


def _left(took: Sequence[float], n: int, at_once: int) -> str:
    """The time that n more runs take, by those that have ended; they go on at once, so many of them."""
    if not took or n < 1:
        return ""
    seconds = sum(took) / len(took) * math.ceil(n / at_once)
    return f", about {f'{seconds:.0f} s' if seconds < 120 else f'{seconds / 60:.0f} min'} left"


def _ending(status: dict, folder: Path) -> str:
    if status["state"] == "running":
        return "started"
    after = f"{status['seconds']:.{0 if status['seconds'] >= 10 else 1}f} s"
    if status["state"] != "done":
        return f"{status['state']} after {after}: {status['error']}"
    reported = (find_json(folder / "results.json") or [{}])[-1]
    numbers = {name: value for name, value in reported.items() if isinstance(value, (int, float))}
    name = "score" if "score" in numbers else next(iter(numbers), None)
    return f"done in {after}" + (f"  {name} {numbers[name]:.4g}" if name else "")


def _count(jobs: list[dict], before: dict[str, str], todo: list[dict]) -> str:
    """The line "12 runs: 3 new, 9 reused, 0 failed", and runs that were interrupted or are still running."""
    executed = {job["id"] for job in todo}
    after = {job["id"]: _state(job) for job in jobs}
    new = sum(after[run] == "done" for run in executed)
    reused = sum(state == "done" and run not in executed for run, state in before.items())
    counts = [f"{new} new", f"{reused} reused", f"{sum(state == 'failed' for state in after.values())} failed"]
    counts += [f"{n} {state}" for state in ("interrupted", "running") if (n := list(after.values()).count(state))]
    earlier = sum(state == "failed" and run not in executed for run, state in before.items())
    if earlier:
        counts[-1] += f" ({earlier} of the failed are from before; retry_failed=True, or --retry-failed, runs them again)"
    return f"{len(jobs)} run{'s' if len(jobs) > 1 else ''}: {', '.join(counts)}"
