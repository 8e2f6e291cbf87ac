"""The demo behind `make run`: five ways to train on two uneven workers, compared; and where the notebooks are that come with labkit.

It sweeps notebook 03 over the strategies, prints the table, draws the curves and names the winner in one line. The runs come one
after the other, since they are timed.

Used by `python -m labkit demo` and `notebooks`; the benchmark notebook repeats it with several seeds.
"""

import math
import os
import shutil
import sys
from pathlib import Path

import pandas as pd

from labkit.errors import SweepError, file_path
from labkit.experiments.sweep import sweep

STRATEGIES = ["sgwu+udpa", "sgwu+idpa", "agwu+udpa", "agwu+idpa", "allreduce+udpa"]
DEMO_COLUMNS = {
    "strategy": "strategy",
    "score": "score",
    "seconds_to_target": "seconds to target",
    "samples_per_s": "samples/s",
    "wait_share": "wait %",
    "load_share": "load %",
    "staleness_p50": "staleness p50",
    "status": "status",
}
# Of notebook 03: 8,000 of the 60,000 training images of Fashion-MNIST, so that the five runs take some four minutes on 2 cores.
SETTINGS = {"train_samples": 8000, "test_samples": 4000, "passes": 6.0, "local_steps": 32, "target": 0.85}


def demo(out: str | os.PathLike[str] = "runs/demo") -> int:
    """Sweep the third notebook over five strategies, one after another, and print which was fastest.

    Writes `table.csv` and `curves.png` to `out`. Returns 0, or 1 when a run failed.
    """
    out = file_path("out", out)
    notebook = notebooks() / "03-update-the-weights.ipynb"
    print("Five ways to train on two uneven workers, one after another, because they are timed.", flush=True)
    table = sweep(notebook, {**SETTINGS, "strategy": STRATEGIES}, out=out, retry_failed=True)
    # The folder may hold runs of earlier settings, too; those of this call come first.
    table = table[table["strategy"].isin(STRATEGIES)].drop_duplicates("strategy").reset_index(drop=True)
    shown = table.reindex(columns=list(DEMO_COLUMNS)).rename(columns=DEMO_COLUMNS)
    for name in ("wait %", "load %"):
        shown[name] = 100 * shown[name].astype(float)
    shown["strategy"] = [label(name) for name in shown["strategy"]]
    shown.to_csv(out / "table.csv", index=False)
    print(shown.to_string(index=False, na_rep="-", float_format="{:.3g}".format))
    print(verdict(table) + _open(_draw(table, out), table))
    return int("failed" in set(table["status"]))


def notebooks() -> Path:
    """The folder of labkit's notebooks: of the clone that is imported, else the copies in the package. SweepError where neither is."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "notebooks", package / "notebooks"):
        if (folder / "03-update-the-weights.ipynb").is_file():
            return folder
    raise SweepError(f"{package} is without its notebooks. Install labkit again: pip install --force-reinstall --no-deps labkit.")


def copy_notebooks(out: str | os.PathLike[str] = "notebooks") -> int:
    """Write labkit's notebooks to a folder, with what they import beside them; those that are there already stay as they are.

    Prints what was written. Returns 0.
    """
    source, out = notebooks(), file_path("out", out)
    files = [path for pattern in ("*.ipynb", "benchmarks/*.ipynb", "benchmarks/*.py") for path in sorted(source.glob(pattern))]
    new = [path for path in files if not (out / path.relative_to(source)).exists()]
    for path in new:
        target = out / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    kept = f"; {len(files) - len(new)} were there and stay as they are" if len(new) < len(files) else ""
    print(f"{len(new)} files were written to {out}{kept}. python -m jupyter lab {out} opens them.")
    return 0


def label(strategy: str) -> str:
    """A strategy as people write it: "AGWU + IDPA" for "agwu+idpa"."""
    return "AllReduce" if strategy == "allreduce+udpa" else " + ".join(part.upper() for part in strategy.split("+"))


def verdict(table: pd.DataFrame) -> str:
    """Who reached the target accuracy first, and by how much, in one sentence. Copes with runs and values that miss."""
    table = table.reindex(columns=list(dict.fromkeys([*table.columns, "seconds_to_target", "target", "score"])))
    if (table["status"] != "done").all():
        return f"None of the {len(table)} runs finished; the first error: {next(iter(table['error']), '')}."
    targets = table["target"].astype(float).dropna()
    goal = f"{100 * targets.iloc[0]:.3g} % accuracy" if len(targets) else "the target accuracy"
    done = table[table["status"] == "done"].drop_duplicates("strategy").set_index("strategy")
    times, scores = done["seconds_to_target"].astype(float), done["score"].astype(float).dropna()
    times = times[times.map(math.isfinite)].sort_values()
    if times.empty:
        best = f"; best: {label(scores.idxmax())} with {100 * scores.max():.3g} %" if len(scores) else ""
        return f"No strategy reached {goal}{best}."
    winner, first = times.index[0], times.iloc[0]
    sentence = f"{label(winner)} reached {goal} in {first:.3g} s"
    baseline = STRATEGIES[0]
    other = baseline if baseline in times.index[1:] else next(iter(times.index[1:]), None)
    if winner != baseline and other != baseline:
        return f"{sentence}; {label(baseline)} {'did not reach it' if baseline in done.index else 'failed'}."
    if other is None:
        return f"{sentence}, and no other did."
    return f"{sentence}, {times[other] / first:.2g}x sooner than {label(other)} ({times[other]:.3g} s)."


def _draw(table: pd.DataFrame, out: Path) -> Path | None:
    """curves.png of the runs that the notebooks made; None, and a line with the reason, where it cannot be drawn."""
    try:
        from labkit.plots.runs import curves
        from labkit.plots.style import extension, save
        from labkit.training.run import load_run

        extension("static")
        paths = [path for path in table.get("run", []) if isinstance(path, str)]
        if not paths:
            raise SweepError("no notebook reported a run")
        targets = table["target"].dropna() if "target" in table else []
        target = float(targets.iloc[0]) if len(targets) else None
        figure = curves([load_run(path) for path in paths], target=target)
        return save(figure, out / "curves.png")
    except Exception as error:  # the table stands without its figure
        print(f"No figure: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def _open(figure: Path | None, table: pd.DataFrame) -> str:
    """The files worth opening: the figure, and the notebook of the winner."""
    reached = table[table["status"] == "done"]
    if "seconds_to_target" in reached:
        reached = reached.sort_values("seconds_to_target", key=lambda column: column.astype(float))
    files = [figure, *(reached if len(reached) else table)["notebook"].head(1)]
    return " Open " + " and ".join(os.path.relpath(file) for file in files if file) + "."
