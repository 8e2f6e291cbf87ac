"""A new kernel is told which runs still go on or were cut off, how far they are, and what to call."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time

import pytest

import labkit
from labkit.locks import DirectoryLock
from labkit.runs import server_file, unfinished
from tests.runs.test_old_records import FOLDER


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A notebook's kernel in a folder with three runs in "runs": one goes on, one was cut off, one has ended."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("labkit.runs.unfinished.front_end", lambda: "jupyter")
    monkeypatch.setattr("labkit.runs.unfinished._told", set())
    for name in ("going", "cut", "ended"):
        shutil.copytree(FOLDER / "format-2-agwu", tmp_path / "runs" / name)
    runs = tmp_path / "runs"
    (runs / "notes").mkdir()
    (runs / "going" / "status.json").unlink()
    cut = runs / "cut" / "status.json"
    status = json.loads(cut.read_text())
    cut.write_text(
        json.dumps({**status, "state": "failed", "reason": "gone; labkit.resume('runs/cut') continues it.", "samples": 17})
    )
    lock = DirectoryLock(runs / "going")
    server_file.announce(runs / "going", ("127.0.0.1", 1), b"secret")
    yield runs
    lock.release()


def budget(run):
    return f"{json.loads((run / 'config.json').read_text())['budget']:,}"


def test_connect_tells_a_notebook_once_of_the_runs_of_the_kernel_before(runs, capsys):
    with labkit.connect("threads", 1, name="new"):
        told = capsys.readouterr().out.splitlines()
    last = [json.loads(row) for row in (runs / "going" / "events.jsonl").read_text().splitlines() if '"merge"' in row][-1]
    version = max(int(file.stem) for file in (runs / "cut" / "checkpoints").glob("*.npz"))
    of = budget(runs / "cut")
    assert told == [
        f"Run 'going' still goes on in process {os.getpid()} on {socket.gethostname()}, after {last['total']:,} of {of} samples. "
        "labkit.load_run('runs/going').attach() follows it.",
        f"Run 'cut' was cut off after 17 of {of} samples. labkit.resume('runs/cut') continues it from version {version}.",
    ]
    unfinished.tell()
    labkit.load_run("runs/going")
    assert not capsys.readouterr().out


def test_load_run_tells_of_its_run_and_a_script_without_a_terminal_is_told_nothing(runs, capsys, monkeypatch):
    labkit.load_run("runs/ended")
    assert not capsys.readouterr().out
    labkit.load_run("runs/cut")
    assert "labkit.resume('runs/cut') continues it" in capsys.readouterr().out
    monkeypatch.setattr("labkit.runs.unfinished.front_end", lambda: "")
    labkit.load_run("runs/going")
    unfinished.tell()
    assert not capsys.readouterr().out


def test_a_script_in_a_terminal_is_told_of_one_and_how_many_more_and_its_output_is_its_own(runs, capsys, monkeypatch):
    monkeypatch.setattr("labkit.runs.unfinished.front_end", lambda: "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for name in ("more", "others"):
        shutil.copytree(runs / "cut", runs / name)
    with labkit.connect("threads", 1, name="new"):
        said = capsys.readouterr()
    first, more = said.err.splitlines()
    assert "'going' still goes on" in first and more == "And 3 more such runs in runs." and not said.out
    labkit.load_run("runs/cut")
    assert not any(capsys.readouterr()), "it was counted"
    unfinished._told.clear()
    labkit.load_run("runs/cut")
    assert "labkit.resume('runs/cut') continues it" in capsys.readouterr().err


def test_of_what_a_power_cut_leaves_the_record_says_how_far_it_is(runs, capsys):
    (runs / "cut" / "status.json").unlink()
    with open(runs / "cut" / "events.jsonl", "a") as file:
        file.write('{"kind":"merge","total":')
    last = [json.loads(row) for row in (runs / "cut" / "events.jsonl").read_text().splitlines()[:-1] if '"merge"' in row][-1]
    shutil.rmtree(runs / "cut" / "checkpoints")
    labkit.load_run("runs/cut")
    far = f"was cut off after {last['total']:,} of {budget(runs / 'cut')} samples. No version was saved: train it again."
    assert far in capsys.readouterr().out


def test_it_is_bounded_and_no_damage_ends_it(runs, capsys, monkeypatch):
    monkeypatch.setattr(unfinished, "LINES", 1)
    (runs / "ended" / "status.json").unlink()
    (runs / "ended" / "config.json").write_text("{")
    unfinished.tell()
    first, more = capsys.readouterr().out.splitlines()
    assert "'going'" in first and more == "And 1 more such run in runs."
    unfinished._told.clear()
    long_ago = time.time() - 2 * unfinished.RECENT_S
    os.utime(runs / "cut" / "status.json", (long_ago, long_ago))
    unfinished.tell()
    assert len(capsys.readouterr().out.splitlines()) == 1
    monkeypatch.setattr(unfinished, "FOLDERS", 0)
    assert not unfinished.unfinished("runs") and not unfinished.unfinished("nowhere")


def test_a_run_of_this_kernel_is_no_news(runs, capsys, monkeypatch):
    monkeypatch.setattr("psutil.Process.ppid", lambda process: os.getpid())
    unfinished.tell()
    assert "'going'" not in capsys.readouterr().out
