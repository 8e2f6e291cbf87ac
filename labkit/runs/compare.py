"""The cost cards of several runs side by side: a row a run, labelled by what differs; a damaged one is a row with the reason.

Used by users through `labkit.compare`, and by `labkit.experiments`.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.errors import RunError, instance, plain_scalar, several
from labkit.imports import rule_title
from labkit.names import named
from labkit.runs import labels
from labkit.runs.record import RunRecord, directories

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 5  # names in a line
FIRST = ("run", "score", "loss", "seconds", "state", "reason")  # a narrow terminal has room for few columns


@named
def compare(runs: RunRecord | str | Path | Iterable[RunRecord | str | Path]) -> pd.DataFrame:
    """The cost cards of several runs, a row a run, labelled by its strategy and what differs among them: "AGWU + IDPA, lr 0.01".

    A label has two settings, or as many as tell the runs apart, and "..." where there are more. The first columns are what came out; all
    settings that differ are columns behind the partition (the loss as "loss function"). `score` and `loss` are those of the test set; a
    column `lower_is_better` says of which runs that holds of the score. A run that cannot be read does not take the table down: its
    `state` is "damaged", and `reason` says why. Directories of runs, and folders of them, can be given as well.

        labkit.compare(runs).hvplot.scatter("seconds", "score", by="update")    # after labkit.plots.extension()

    Examples
    --------
    >>> table = labkit.compare([run])
    >>> table[["update", "partition", "state"]].values.tolist()
    [['agwu', 'idpa', 'done']]
    """
    import pandas as pd

    from labkit.tables import Table

    given = [_runs("runs", runs)] if isinstance(runs, (RunRecord, str, Path)) else several("runs", runs, _runs)
    runs = list(chain.from_iterable(given))
    if not runs:
        print("No runs were given to compare: the table is empty.")
    cards, unread, unmeasured = [], [], []  # in the order given; those of which not even the settings can be read come last
    for run in runs:
        try:
            run = RunRecord(run) if isinstance(run, (str, Path)) else run
        except RunError as error:
            unread.append({"run": Path(run).name, "name": Path(run).name, "state": "damaged", "reason": str(error)})
            continue
        try:
            card, is_measured = run.read_summary()
            cards.append((run, card))
            unmeasured += [] if is_measured else [run]
        except RunError as error:
            rules = {"update": rule_title(run.config.update), "partition": rule_title(run.config.partition)}
            about = {"name": run.name, **rules, "state": "damaged", "origin": run.origin, "seed": run.config.seed}
            cards.append((run, {**about, "reason": str(error)}))
    if len(unmeasured) == 1:
        unmeasured[0].summary()  # which says how to measure it
    elif unmeasured:
        names = ", ".join(run.name for run in unmeasured[:SHOWN]) + (
            f" and {more} more" if (more := len(unmeasured) - SHOWN) > 0 else ""
        )
        print(
            f"No scores of {len(unmeasured)} runs are measured yet: {names}. Of each, run = labkit.load_run(path), run.problem() and run.curve() "
            "measure them, if you trust who made it; labkit.load_run(path, problem=problem).curve() where its model is of a notebook or a script."
        )
    runs = [run for run, _ in cards]
    rows = [{"run": label, **card} for label, (_, card) in zip(labels.labels(runs), cards, strict=True)] + unread
    columns = dict.fromkeys(name for row in sorted(rows, key=lambda row: "reason" in row) for name in row)
    columns = dict.fromkeys([*(name for name in FIRST if name in columns), *columns])
    table = Table(rows, columns=list(columns))
    if table.empty:
        return table
    if "partition" not in table:
        return table.set_index("run")
    for name, values in reversed(labels.differing(runs).items()):
        if name not in table:
            table.insert(table.columns.get_loc("partition") + 1, name, pd.Series(values, dtype=_type(values)))
    return table.drop(columns="weight_per_worker", errors="ignore").set_index("run")


def _runs(name: str, given: Any) -> list[RunRecord] | list[Path]:
    """A run in a list, or the directories that a path means."""
    given = plain_scalar(given)
    if isinstance(given, (str, Path)):
        return directories(given)
    return [instance(name, given, RunRecord, " or its directory")]


def _type(values: list) -> type | None:
    """Lists and mappings stay what they are in a column."""
    return object if any(isinstance(value, list | tuple | dict) for value in values) else None
