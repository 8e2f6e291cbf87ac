"""Copies of a search in files of Optuna's own, which optuna-dashboard and jupyterlab-optuna open: nothing is read back from them.

    optuna.log    a journal, which grows with the search
    optuna.db     SQLite, written whole at the end of a search

Used by `labkit.experiments.study` (the journal) and `labkit.experiments.search` (SQLite).
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import distribution_to_json
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import FrozenTrial, TrialState

CONSTRAINT = "constraints:"  # before the name of one in the attributes of a trial


class Journal:
    """A study in a journal file, made anew; whoever calls is the only one who writes it."""

    def __init__(self, file: Path, n_objectives: int) -> None:
        file.unlink(missing_ok=True)
        with quiet():
            self._storage = JournalStorage(_Lines(file))
            self._study = optuna.create_study(
                study_name=file.parent.name, directions=["maximize"] * n_objectives, storage=self._storage
            )

    def add(self, trial: FrozenTrial) -> None:
        self._study.add_trial(trial)

    def report(self, number: int, step: int, value: float) -> None:
        self._storage.set_trial_intermediate_value(self._id(number), step, value)

    def tell(self, number: int, state: TrialState, values: Sequence[float] | None, constraints: dict[str, float]) -> None:
        for name, value in constraints.items():
            self._storage.set_trial_system_attr(self._id(number), CONSTRAINT + name, value)
        self._study.tell(number, values, state)

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)


class _Lines(BaseJournalBackend):
    """A journal file of one writer, who need not lock it, nor wait until it is on the disk: the log of the search is."""

    def __init__(self, file: Path) -> None:
        self.file, self.logs = file, []

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        return self.logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = [json.dumps(log, separators=(",", ":")) + "\n" for log in logs]
        with open(self.file, "a") as file:
            file.writelines(lines)
        self.logs += map(json.loads, lines)


def write_sqlite(file: Path, name: str, n_objectives: int, trials: Sequence[FrozenTrial]) -> None:
    """A study as a SQLite file, which replaces an earlier one. Optuna makes the tables; rows are written all at once, as one by one
    they take milliseconds each."""
    draft = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
    draft.unlink(missing_ok=True)
    try:
        with quiet():
            storage = RDBStorage(f"sqlite:///{draft}")
            optuna.create_study(study_name=name, directions=["maximize"] * n_objectives, storage=storage)
            storage.remove_session()
            storage.engine.dispose()
        with contextlib.closing(sqlite3.connect(draft)) as database, database:
            for table, columns, rows in _tables(trials):
                marks = ", ".join("?" * len(columns.split(",")))
                database.executemany(f"INSERT INTO {table} ({columns}) VALUES ({marks})", rows)
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)


def _tables(trials: Sequence[FrozenTrial]) -> Iterator[tuple[str, str, list[tuple]]]:
    """Table, columns and rows; a trial has its number plus 1 as its id."""
    each = list(enumerate(trials, 1))
    times = "datetime_start, datetime_complete"
    yield (
        "trials",
        f"trial_id, number, study_id, state, {times}",
        [(id, id - 1, 1, trial.state.name, _utc(trial.datetime_start), _utc(trial.datetime_complete)) for id, trial in each],
    )
    yield (
        "trial_params",
        "trial_id, param_name, param_value, distribution_json",
        [
            (id, name, trial.distributions[name].to_internal_repr(value), distribution_to_json(trial.distributions[name]))
            for id, trial in each
            for name, value in trial.params.items()
        ],
    )
    yield (
        "trial_values",
        "trial_id, objective, value, value_type",
        [(id, at, value, "FINITE") for id, trial in each for at, value in enumerate(trial.values or ())],
    )
    columns = "trial_id, step, intermediate_value, intermediate_value_type"
    yield (
        "trial_intermediate_values",
        columns,
        [(id, step, value, "FINITE") for id, trial in each for step, value in trial.intermediate_values.items()],
    )
    for table, of in (("trial_user_attributes", "user_attrs"), ("trial_system_attributes", "system_attrs")):
        yield (
            table,
            "trial_id, key, value_json",
            [(id, key, json.dumps(value)) for id, trial in each for key, value in getattr(trial, of).items()],
        )


def _utc(time: Any) -> str | None:
    """As SQLAlchemy stores a time."""
    return None if time is None else time.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")


_inside: list[int] = []  # the verbosity as it was, once for each block that is quiet
_lock = threading.Lock()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Optuna announces each study, and which optional package of its own is not there. Several threads may be inside at once."""
    with _lock:
        _inside.append(_inside[0] if _inside else optuna.logging.get_verbosity())
        optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        with _lock:
            before = _inside.pop()
            if not _inside:
                optuna.logging.set_verbosity(before)
