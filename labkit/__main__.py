"""The command line: `python -m labkit demo | notebooks | sweep | summary | search | compare | watch | report | gallery | doctor`.

Everything here can be done from a notebook too; the commands are for batch systems, for `make run`, and for finding out
what a machine has. Exit code: 0 when all went well, 1 when a run or a probe failed, 2 for a wrong request.

With `--json` a command writes one JSON value to standard output, and all that it prints else to standard error; what it refuses is
{"error": ..., "message": ...}.

Used from the shell and by the Makefile.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from labkit.cluster.connect import connect
from labkit.data import named, open_dataset
from labkit.data.fetch import ways
from labkit.errors import LabError, SweepError
from labkit.experiments.demo import copy_notebooks, demo
from labkit.experiments.notebook import parameters
from labkit.experiments.sweep import summary, sweep
from labkit.imports import imported
from labkit.runs.compare import compare
from labkit.runs.config import RunConfig
from labkit.runs.record import directories
from labkit.runs.summary import plain
from labkit.runs.unfinished import look
from labkit.training.page import serve


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    options.tell = partial(print, file=sys.stdout, flush=True)
    # Batch systems end a job by SIGTERM: as after Ctrl-C, running kernels are to end too.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        # Workers' threads and kernels print as well.
        with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
            code, answer = options.run(options)
    except LabError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code, answer = 2, {"error": type(error).__name__, "message": str(error)}
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from here: finished runs are reused.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    if options.json and answer is not None:
        options.tell(json.dumps(answer, indent=2))
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m labkit", description="Train networks on uneven clusters.")
    parser.add_argument("--version", action="version", version=f"labkit {importlib.metadata.version('labkit')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="write the answer as JSON, all else to standard error")
    add = partial(commands.add_parser, parents=[common])

    demo_ = add("demo", help="compare five ways of training: a table and a figure")
    demo_.add_argument("--out", default="runs/demo", metavar="DIR", help="folder of the runs (default: %(default)s)")
    demo_.set_defaults(run=_demo)

    copies = add("notebooks", help="write labkit's notebooks to a folder, to open and change")
    copies.add_argument("out", nargs="?", default="notebooks", metavar="DIR", help="the folder (default: %(default)s)")
    copies.set_defaults(run=_notebooks)

    sweep = add("sweep", help="execute a notebook over a grid of parameters")
    sweep.add_argument("notebook", metavar="NOTEBOOK")
    sweep.add_argument(
        "--grid", action="append", default=[], metavar="NAME=A,B,...",
        help="values of a parameter; may be given several times. A list is written in brackets: sizes=[1,2],[3,4]",
    )  # fmt: skip
    sweep.add_argument("--out", metavar="DIR", help="folder of the runs (default: runs/<notebook>)")
    sweep.add_argument("--parallel", type=int, default=1, metavar="N", help="kernels at once (default: %(default)s)")
    sweep.add_argument("--timeout", type=float, default=3600, metavar="S", help="seconds a run (default: %(default)s)")
    sweep.add_argument("--retry-failed", action="store_true", help="run those again that failed")
    sweep.add_argument("--fresh", action="store_true", help="run all of them again")
    sweep.add_argument("--kind", choices=["threads", "dask", "ipyparallel"], help="execute on the workers of a lab of this kind")
    sweep.add_argument("--n-workers", type=int, metavar="N", help="workers of that lab")
    sweep.set_defaults(run=_sweep)

    table = add("summary", help="print the table of a sweep")
    table.add_argument("out", metavar="DIR", help="folder of the runs")
    table.set_defaults(run=lambda options: _shown(summary(options.out)))

    search = add("search", help="search the settings of a problem that win")
    search.add_argument(
        "problem", metavar="MODULE:NAME", help="a problem, a class of problems, a function of a point that makes one, or a notebook"
    )
    search.add_argument(
        "--set", action="append", default=[], metavar="NAME=LOW:HIGH[:log][:int] or NAME=A,B,...", dest="space",
        help="a range of a parameter, or its choices; once for each parameter. One value is a constant: data=digits. Choices with parameters of "
        """their own are JSON: 'optimiser={"sgd": {"momentum": "0:0.9"}, "adam": {}}'""",
    )  # fmt: skip
    search.add_argument("--method", default="gp", help="gp, evolution, tpe, random or grid (default: %(default)s)")
    for name, of, metavar, text in (
        ("trials", int, "N", "how many (default: 40, or the whole grid)"),
        ("workers-per-trial", int, "N", "workers of a block (default: 2)"),
        ("folds", int, "N", "train each trial on so many folds"),
        ("prune", str, "RULE", "end trials that do badly early: asha, hyperband, extrapolate, or with folds wilcoxon"),
        ("target", float, "X", "begin no trial any more when one has reached this score"),
        ("passes", float, "X", "length of a trial, in passes over the samples (default: 5)"),
        ("local-steps", int, "N", "steps between two exchanges of weights (default: a pass over the worker's share)"),
        ("update", str, "RULE", "how weights are merged (default: agwu)"),
        ("partition", str, "RULE", "how samples are shared out (default: idpa)"),
        ("seed", int, "N", "of the points (default: 0)"),
        ("name", str, "NAME", "of the search (default: search)"),
        ("runs", str, "DIR", "folder that it is recorded in (default: runs)"),
    ):
        search.add_argument(f"--{name}", type=of, metavar=metavar, help=text, default=argparse.SUPPRESS)
    search.add_argument(
        "--objective", action="append", metavar="NAME", default=argparse.SUPPRESS,
        help="what is searched, once for each: score (the default), loss, time, size, or what a notebook reports",
    )  # fmt: skip
    search.add_argument(
        "--constraint", action="append", metavar="NAME=HIGH or NAME=LOW:HIGH", default=[],
        help="bounds of what is measured, once for each: size=50000, accuracy=0.9: (no highest)",
    )  # fmt: skip
    search.add_argument("--fresh", action="store_true", help="begin anew instead of going on with a search of this name")
    search.add_argument("--kind", choices=["threads", "dask", "ipyparallel"], help="where the workers are")
    search.add_argument("--n-workers", type=int, metavar="N", help="workers of the lab")
    search.set_defaults(run=_search)

    runs = add(
        "compare", help="print a table of runs: what came out, which still go on, and the calls that follow or continue those"
    )
    runs.add_argument(
        "runs", nargs="*", default=["runs"], metavar="RUN", help="directory of a run, or a folder of runs (default: runs)"
    )
    runs.set_defaults(run=_compare)

    page = add("watch", help="follow a run on a page of its own, on this machine")
    page.add_argument("path", metavar="RUN", help="its directory")
    page.add_argument("--port", type=int, default=0, metavar="N", help="of the page (default: a free one)")
    page.add_argument("--with-parent", action="store_true", help="end when standard input does")
    page.set_defaults(run=_watch)

    report = add("report", help="write a page with tables and figures of runs")
    report.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="directory of a run, such as runs/first-run, or a folder of runs or of a sweep; several are put side by side",
    )
    report.add_argument(
        "--out", default="report.html", metavar="FILE", help="the page, .html or .pdf (by a Chromium on PATH; default: %(default)s)"
    )
    report.set_defaults(run=_report)

    gallery = add("gallery", help="write a page on which many runs are filtered and compared")
    gallery.add_argument("folder", metavar="DIR", help="folder of a sweep, of a search, or of runs")
    gallery.add_argument("--out", metavar="FILE", help="the page (default: gallery.html in the folder)")
    gallery.set_defaults(run=_gallery)

    add("doctor", help="show what this machine has").set_defaults(run=lambda options: doctor())
    return parser


# -- sweep, summary ----------------------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> tuple[int, Any]:
    code = demo(options.out)
    return code, records(summary(options.out))


def _notebooks(options: argparse.Namespace) -> tuple[int, Any]:
    return copy_notebooks(options.out), {"path": os.path.abspath(options.out)}


def _sweep(options: argparse.Namespace) -> tuple[int, Any]:
    grid = parse_grid(options.grid, {p.name: p.type for p in parameters(options.notebook)})
    settings = {name: getattr(options, name) for name in ("out", "parallel", "timeout", "retry_failed", "fresh")}
    if options.kind is None and options.n_workers is None:
        table = sweep(options.notebook, grid, **settings)
    else:
        with connect(options.kind, options.n_workers) as lab:
            table = sweep(options.notebook, grid, lab=lab, **settings)
    return _shown(table)


def _shown(table: pd.DataFrame) -> tuple[int, Any]:
    """The table of a sweep, printed and as records; 1 where a run failed."""
    shown = table.assign(notebook=[os.path.relpath(path) for path in table["notebook"]])
    text = repr(shown) if sys.stdout.isatty() else shown.to_string(index=False, max_colwidth=100, float_format="{:.4g}".format)
    print(text if len(shown) else "No runs here.")
    return int("failed" in set(table["status"])), records(table)


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as JSON has them: null for what is missing or no number."""
    return json.loads(json.dumps(plain(table.to_dict("records")), default=str))


def parse_grid(texts: Sequence[str], types: dict[str, str]) -> dict[str, list]:
    """`["seed=0,1", "sizes=[1,2],[3]"]` as a grid. `types` gives each parameter's type: text for a str stays text."""
    named = _named("--grid", texts).items()
    return {name: [_value(text.strip(), types.get(name, ""), name) for text in _split(values)] for name, values in named}


def _named(option: str, texts: Sequence[str]) -> dict[str, str]:
    """What is given by name, each once."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip()
        if not equals or not name:
            raise SweepError(f"{option} {text!r} is not NAME=VALUE,VALUE,...")
        if name in found:
            raise SweepError(f"{option} gives {name!r} twice. Write its values in one: {option} {name}=A,B")
        found[name] = values
    return found


def _split(text: str, at: str = ",") -> list[str]:
    """Split at the commas, or another character, that are not inside brackets or braces."""
    texts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == at and depth == 0:
            texts.append("")
        else:
            texts[-1] += character
    return texts


def _value(text: str, type_: str, name: str, option: str = "--grid") -> Any:
    if type_ == "str":
        return text
    if text.lower() in ("true", "false", "none", "null"):
        return {"true": True, "false": False}.get(text.lower())
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf)", text, re.IGNORECASE):
        return float(text)
    if text[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise SweepError(f"{option} {name}: {text} is not JSON ({error}); text in it is double-quoted.") from None
    return text


# -- search ------------------------------------------------------------------------------------------------------------


def _search(options: argparse.Namespace) -> tuple[int, Any]:
    from labkit.experiments.search import search

    sys.path.insert(0, os.getcwd())  # as `python -m` has it, also where this is a console script
    given = {
        name: value
        for name, value in vars(options).items()
        if name not in ("command", "run", "json", "tell", "problem", "space", "constraint", "kind", "n_workers")
    }
    problem = options.problem if options.problem.endswith(".ipynb") else imported(options.problem)
    space, constraints = parse_space(options.space), parse_constraints(options.constraint)
    with connect(options.kind, options.n_workers) as lab:
        try:
            found = search(problem, space, lab, constraints=constraints, **given)
        except (ValueError, TypeError) as error:
            raise LabError(str(error)) from error
    table = found.table()
    print(table.sort_values("score", ascending=found.lower_is_better).to_string(index=False, float_format="{:.4g}".format))
    print(found)
    if (table.state == "done").any():
        _save_figures(found)
    return int(not (table.state == "done").any()), {"path": str(found.path), "trials": records(table)}


def _save_figures(found: Any) -> None:
    """What a notebook draws of a search, as PNG files beside its log."""
    from labkit import plots

    for name in ("table", "history", "points", "importance", "timeline", *(["front"] if len(found.objectives) > 1 else [])):
        draw = getattr(plots, f"search_{name}")
        try:
            print(os.path.relpath(plots.save(draw(found), found.path / f"{name}.png")))
        except LabError as error:  # importance of too few trials
            print(f"no {name}.png: {error}")


def parse_space(texts: Sequence[str]) -> dict[str, Any]:
    """`["lr=1e-4:0.5:log", "width=4:32:int", "batch_size=32,64"]` as the space of a search."""
    return {name: _form(values, name) for name, values in _named("--set", texts).items()}


def _form(text: str, name: str) -> Any:
    """A range, a list of choices, or a dict of them, of one parameter of a space."""
    if text.strip().startswith("{"):
        return _choices(_value(text.strip(), "", name, "--set"), name)
    if len(parts := _split(text, ":")) > 1:
        ends = [_value(part.strip(), "", name, "--set") for part in parts]
        if all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends[:2]):
            return tuple(ends)
    return [_value(choice.strip(), "", name, "--set") for choice in _split(text)]


def _choices(given: dict[str, Any], name: str) -> dict[str, Any]:
    """Choices with parameters of their own, which are written as those of the space: {"sgd": {"momentum": "0:0.9"}, "adam": {}}."""
    for choice, below in given.items():
        if not isinstance(below, dict):
            raise SweepError(f"--set {name}: what comes with {choice!r} is {below!r}; give a dict of parameters, or {{}}.")
    return {
        choice: {own: _choices(form, own) if isinstance(form, dict) else _form_of(form, own) for own, form in below.items()}
        for choice, below in given.items()
    }


def _form_of(given: Any, name: str) -> Any:
    return _form(given, name) if isinstance(given, str) else given if isinstance(given, list) else [given]


def parse_constraints(texts: Sequence[str]) -> dict[str, Any]:
    """`["size=50000", "accuracy=0.9:"]` as the constraints of a search."""
    found = {}
    for name, values in _named("--constraint", texts).items():
        ends = [_value(end.strip(), "", name) if end.strip() else None for end in values.split(":")]
        found[name] = ends[0] if len(ends) == 1 else tuple(ends)
    return found


# -- compare -----------------------------------------------------------------------------------------------------------


def _compare(options: argparse.Namespace) -> tuple[int, Any]:
    table = compare(options.runs)
    print(repr(table) if sys.stdout.isatty() else table.to_string(max_colwidth=100, float_format="{:.4g}".format))
    for path in chain.from_iterable(map(directories, options.runs)):
        with contextlib.suppress(LabError):  # a row of the table says why it cannot be read
            if run := look(path, RunConfig.load(path)):
                print(run.text)
    return int(not {"failed", "damaged"}.isdisjoint(table["state"])), records(table.reset_index())


# -- watch -------------------------------------------------------------------------------------------------------------


def _watch(options: argparse.Namespace) -> tuple[int, Any]:
    """Serve until it is ended; the address is said at once."""

    def said(url: str) -> None:
        options.tell(json.dumps({"url": url, "path": os.path.abspath(options.path)}) if options.json else url)

    return serve(options.path, options.port, options.with_parent, said), None


# -- report ------------------------------------------------------------------------------------------------------------


def _report(options: argparse.Namespace) -> tuple[int, Any]:
    from labkit import plots
    from labkit.plots.style import some_runs
    from labkit.training.run import read_run

    runs = some_runs(options.runs, read_run)
    plots.extension("static")
    try:
        page = plots.report(runs, options.out)
    except ValueError as error:
        raise LabError(str(error)) from error
    print(os.path.relpath(page))
    return 0, {"path": str(page), "runs": {str(run.path): _card(run) for run in runs}}


def _card(run: Any) -> dict[str, Any]:
    try:
        return plain(run.summary())
    except LabError as error:
        return {"state": "damaged", "reason": str(error)}


def _gallery(options: argparse.Namespace) -> tuple[int, Any]:
    from labkit.experiments.gallery import gallery

    try:
        page = gallery(options.folder, options.out)
    except ValueError as error:
        raise LabError(str(error)) from error
    print(os.path.relpath(page))
    return 0, {"path": str(page)}


# -- doctor ------------------------------------------------------------------------------------------------------------


def doctor() -> tuple[int, Any]:
    """Print what this machine has, and return it by name; 1 when something needed is missing or a lab does not start."""
    missing, found = [], {}

    def probe(name: str, ask: Callable[[], str], needed: bool = True) -> None:
        try:
            answer = ask()
        except Exception as error:  # a probe must not end the others
            answer = "missing" if isinstance(error, ImportError) else f"FAILED: {type(error).__name__}: {error}"
            missing.extend([name] * needed)
        found[name] = answer
        print(f"{name:22} {answer}", flush=True)

    probe("Python", lambda: f"{platform.python_version()} ({sys.executable})")
    probe("platform", platform.platform)
    probe("CPUs", lambda: f"{os.cpu_count()}, load {', '.join(f'{load:.1f}' for load in os.getloadavg())}")
    probe("labkit", lambda: f"{importlib.metadata.version('labkit')} ({Path(__file__).parent})")
    probe("torch", _torch)
    needed, optional = packages()
    for name in needed:
        probe(name, lambda name=name: importlib.metadata.version(name))
    for name in optional:
        probe(f"{name} (optional)", lambda name=name: importlib.metadata.version(name), needed=False)
    probe("fashion-mnist", _fashion)
    probe("lab of 1 thread", _lab)
    print(f"Not in order: {', '.join(missing)}." if missing else "All in order.")
    return int(bool(missing)), {"found": found, "not_in_order": missing}


def packages() -> tuple[list[str], list[str]]:
    """What labkit needs beside torch, and what its extras for users add, by its own metadata."""
    found: tuple[dict[str, None], dict[str, None]] = {}, {}  # dicts: in order, each once
    for requirement in importlib.metadata.requires("labkit") or []:
        name, extra = re.match(r"[\w.-]+", requirement)[0], re.search(r"extra\s*==\s*['\"]([\w-]+)", requirement)
        if extra is None or extra[1] != "test":
            found[extra is not None][name] = None
    needed, optional = found
    return [name for name in needed if name != "torch"], [name for name in optional if name not in needed]


def _torch() -> str:
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no CUDA device"
    return f"{torch.__version__}, {torch.get_num_threads()} threads, {device}"


def _fashion() -> str:
    """What is on this machine: nothing is fetched, and a lab needs none."""
    if named.fashion_folder() is None:
        by = f"fetches {named.FASHION.megabytes} MB by {' or '.join(way for way, _ in ways(named.FASHION))}"
        return f'not on this machine; the first labkit.open_dataset("fashion-mnist") {by}, or set LABKIT_DATA to a folder with its files'
    data = open_dataset("fashion-mnist")
    return f"{data.n_train:,} training samples from {data.path}" + (f" ({data.note})" if data.note else "")


def _lab() -> str:
    with connect("threads", 1, timeout=30) as lab:
        return f"starts, and answers {lab.map(abs, [-1], timeout=30)[0]}"


if __name__ == "__main__":
    sys.exit(main())
