"""`labkit/experiments/copies.py`: Optuna reads what was copied; the journal is in test_study.py, too."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

import optuna
import pytest

from labkit.experiments import copies
from labkit.experiments.copies import quiet, write_sqlite
from labkit.experiments.space import Space
from labkit.experiments.study import STORAGE, Study

SPACE = Space({"x": (1e-3, 1.0, "log"), "kind": {"a": {}, "b": {"n": (1, 9, "int")}}})


@pytest.mark.parametrize("n_objectives", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_optuna_reads_both_copies_alike(tmp_path, n_objectives):
    study = Study(SPACE, "random", 0, 3, tmp_path, prune="asha", n_objectives=n_objectives, constrained=True)
    for number in range(6):
        study.ask()
        study.begin(number, None, [0, 1])
        if n_objectives == 1:
            study.report(number, 1, 0.5 - number / 10)
    study.tell(0, "done", [0.5, -3.0][:n_objectives], violations={"size <= 3": -1.0})
    study.tell(1, "failed", error="no")
    study.tell(2, "done", [0.75, 2.0][:n_objectives], violations={"size <= 3": 2.0})
    if n_objectives == 1:
        study.tell(3, "pruned", 0.2)
    began = datetime(2026, 11, 29, 12)
    (tmp_path / "a.db").write_text("an earlier one")
    write_sqlite(tmp_path / "a.db", tmp_path.name, n_objectives, study.frozen(began))
    journal = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / STORAGE)))
    sqlite = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'a.db'}")
    lines, tables = (optuna.load_study(study_name=tmp_path.name, storage=storage) for storage in (journal, sqlite))
    assert len(tables.directions) == n_objectives
    for a, b, trial in zip(lines.trials, tables.trials, study.trials, strict=True):
        assert a.number == b.number and a.state == b.state and a.params == b.params and a.distributions == b.distributions
        assert a.constraints == b.constraints == trial["violations"] and a.intermediate_values == b.intermediate_values
        if b.state.name == "COMPLETE":
            assert a.values == b.values == trial["values"]
        assert abs(b.datetime_start - began - timedelta(seconds=trial["asked"])) < timedelta(seconds=0.01)
        assert {name.partition(" ")[0]: value for name, value in b.params.items()} == trial["point"]
    assert tables.trials[1].user_attrs == {"workers": [0, 1], "error": "no"}
    assert [trial.number for trial in tables.best_trials] == [0]  # the other one breaks its constraint
    sqlite.remove_session()
    sqlite.engine.dispose()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.db", "log.jsonl", STORAGE]


def test_two_threads_may_write_one_copy_at_once(tmp_path, monkeypatch):
    """As the end of a search and `to_sqlite` do."""
    study, both = Study(SPACE, "random", 0, 3), threading.Barrier(2)
    for _ in range(3):
        study.ask()
    tables = copies._tables

    def at_once(trials):
        both.wait(20)
        return tables(trials)

    monkeypatch.setattr(copies, "_tables", at_once)
    with ThreadPoolExecutor(2) as pool:
        written = [pool.submit(write_sqlite, tmp_path / "a.db", "a", 1, study.frozen(datetime(2026, 11, 29))) for _ in range(2)]
        assert [one.result(60) for one in written] == [None, None]
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'a.db'}")
    assert len(optuna.load_study(study_name="a", storage=storage).trials) == 3 and [*tmp_path.iterdir()] == [tmp_path / "a.db"]
    storage.remove_session()
    storage.engine.dispose()


def test_optuna_says_what_it_said_before_also_after_several_threads_were_quiet_at_once():
    before = optuna.logging.get_verbosity()
    first, second = quiet(), quiet()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert optuna.logging.get_verbosity() == optuna.logging.ERROR, "the other one is still inside"
    second.__exit__(None, None, None)
    assert optuna.logging.get_verbosity() == before
