"""The demo: who won, in one sentence, and the table and the figure that it leaves. The command itself: tests/test_main.py."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from labkit.experiments.demo import DEMO_COLUMNS, STRATEGIES, demo, label, verdict


def results(times: list, **columns: object) -> pd.DataFrame:
    """The demo's table; a time of "failed" is a failed run."""
    failed = [time == "failed" for time in times]
    table = {
        "strategy": STRATEGIES[: len(times)],
        "seconds_to_target": [None if time == "failed" else time for time in times],
        "target": [None if f else 0.85 for f in failed],
        "score": [None if f else 0.8 + number / 100 for number, f in enumerate(failed)],
        "status": ["failed" if f else "done" for f in failed],
        "error": ["In [3]: ValueError: no" if f else "" for f in failed],
        "notebook": [f"runs/demo/n-{number}/notebook.ipynb" for number in range(len(times))],
    }
    return pd.DataFrame(table | columns)


@pytest.mark.parametrize(
    ("times", "sentence"),
    [
        ([48.0, 40, 30, 21, 50], "AGWU + IDPA reached 85 % accuracy in 21 s, 2.3x sooner than SGWU + UDPA (48 s)."),
        ([20.0, 40.0, 30.0], "SGWU + UDPA reached 85 % accuracy in 20 s, 1.5x sooner than AGWU + UDPA (30 s)."),
        ([None, 40.0, 30.0], "AGWU + UDPA reached 85 % accuracy in 30 s; SGWU + UDPA did not reach it."),
        (["failed", 40.0], "SGWU + IDPA reached 85 % accuracy in 40 s; SGWU + UDPA failed."),
        ([20.0, "failed", None], "SGWU + UDPA reached 85 % accuracy in 20 s, and no other did."),
        ([None, "failed", math.nan], "No strategy reached 85 % accuracy; best: AGWU + UDPA with 82 %."),
        (["failed", "failed"], "None of the 2 runs finished; the first error: In [3]: ValueError: no."),
    ],
)  # fmt: skip
def test_the_verdict_of_the_demo(times, sentence):
    assert verdict(results(times)) == sentence


def test_the_verdict_copes_without_results():
    assert verdict(pd.DataFrame({"strategy": ["allreduce+udpa"], "status": ["done"], "error": [""]})).startswith("No strategy")
    assert label("allreduce+udpa") == "AllReduce"


def test_the_demo_writes_its_table_and_ends_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs/demo").mkdir(parents=True)
    table = results([48.0, 40.0, 30.0, 21.0, "failed"])
    monkeypatch.setattr("labkit.experiments.demo.sweep", lambda notebook, grid, out, retry_failed: table)
    assert demo() == 1
    printed = capsys.readouterr()
    assert printed.out.endswith("sooner than SGWU + UDPA (48 s). Open runs/demo/n-3/notebook.ipynb.\n")
    assert printed.err == "No figure: SweepError: no notebook reported a run\n"
    table = pd.read_csv("runs/demo/table.csv")
    assert list(table.columns) == list(DEMO_COLUMNS.values()) and len(table) == 5
