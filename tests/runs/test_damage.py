"""The damage matrix: each file of a run is cut, changed, swapped, deleted, permuted, filled with other types; every reader then
refuses it by name, or says what it said before.

Used by pytest. It covers `labkit/runs/files.py`, `status.py`, `metrics.py` and `compare.py` together with the readers of a run.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pandas as pd
import pytest

import labkit
from labkit import chaos, plots
from labkit.errors import RunError
from labkit.runs import checkpoints
from labkit.runs import status as how_it_ended
from labkit.runs.events import Recorder, Table, read_events, read_rows
from labkit.runs.files import read_json, write_json
from labkit.training import resume as resuming
from tests.helpers import problem
from tests.runs.test_old_records import FOLDER, plain, rows

FILES = ("config.json", "environment.json", "layout.json", "status.json", "events.jsonl", "metrics.parquet", "newest", "middle")
HOWS = ("truncate", "line", "empty", "swap", "delete", "permute", "types")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two runs of equal settings; and what the first says."""
    folder = tmp_path_factory.mktemp("damage")
    with labkit.connect("threads", 2) as lab:
        for name, seed in (("a", 1), ("b", 2)):
            labkit.train(problem(), lab, runs=folder / "runs", name=name, passes=3, seed=seed, checkpoints=5).wait(60)
    path = folder / "runs" / "a"
    return folder, {**said(path), "version": middle(path)}


READERS = {
    "status": lambda run: run.status(),
    "state": lambda run: run.state,
    "summary": lambda run: run.summary(),
    "curve": lambda run: rows(run.curve()),
    "events": lambda run: rows(run.events),
    "allocations": lambda run: rows(run.allocations()),
    "balance": lambda run: rows(run.balance()),
    "time_to": lambda run: run.time_to(0.4),
    "flat": lambda run: run.flat().tobytes(),
    "weights": lambda run: {name: (value.shape, value.tobytes()) for name, value in run.weights().items()},
    "model": lambda run: [value.numpy().tobytes() for value in run.model().state_dict().values()],
    "middle": lambda run: run.flat(run.middle).tobytes(),
    "config": lambda run: dict(run.config),
}
RESUMED = "is done: all of its"


def middle(path):
    there = checkpoints.versions(path)
    return there[len(there) // 2]


def said(path, version=None, readers=READERS):
    """By reader what it says, or the RunError; any other error is raised."""
    answers = {}
    for name, read in readers.items():
        try:
            run = labkit.load_run(path, problem=problem())
            run.middle = middle(path) if version is None else version
            answers[name] = read(run)
        except RunError as error:
            answers[name] = error
    return answers


def holds(path, expected, file, readers=READERS):
    """Each reader says what it said, or names a file of the run."""
    wrong = []
    for name, answer in said(path, expected["version"], readers).items():
        if isinstance(answer, RunError):
            assert file.stem in str(answer) or "checkpoints" in str(answer) or "metrics.parquet" in str(answer), str(answer)
        elif plain(answer) != plain(expected[name]):
            wrong.append(name)
    return wrong


def file_of(path, name):
    if name in ("newest", "middle"):
        return checkpoints.file_of(path, middle(path) if name == "middle" else checkpoints.versions(path)[-1])
    return path / name


def other_types(value):
    """A JSON value with each of its own replaced by one of another type."""
    if isinstance(value, dict):
        return {key: other_types(part) for key, part in value.items()}
    return [value] if isinstance(value, str) else "1"


def damage(file, how, other):
    """The file damaged so; False where it cannot be."""
    content = file.read_bytes()
    text = file.suffix in (".json", ".jsonl")
    if how == "truncate":
        file.write_bytes(content[: len(content) * 2 // 3])
    elif how == "line" and file.suffix == ".jsonl":
        file.write_bytes(b"".join(content.splitlines(True)[:-4]))
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "swap":
        file.write_bytes(other.read_bytes())
    elif how == "delete":
        file.unlink()
    elif how == "permute" and file.suffix == ".json":
        stored = json.loads(content)
        lists = {key: value[::-1] if isinstance(value, list) else value for key, value in stored.items()}
        file.write_text(json.dumps(dict(reversed(lists.items()))))
    elif how == "permute":
        parts = content.splitlines(True) if text else [content[:99], content[99:199], content[199:]]
        parts[1], parts[-2] = parts[-2], parts[1]
        file.write_bytes(b"".join(parts))
    elif how == "types" and text:
        lines = [content] if file.suffix == ".json" else content.splitlines()
        file.write_text("\n".join(json.dumps(other_types(json.loads(line))) for line in lines) + "\n")
    else:
        return False
    return True


@pytest.mark.parametrize(("name", "how"), [("layout.json", "permute"), ("metrics.parquet", "swap"), ("events.jsonl", "line")])
def test_no_damage_gives_another_number(name, how, made, tmp_path):
    damaged_so(name, [how], made, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_no_damage_of_any_kind_gives_another_number(name, made, tmp_path):
    damaged_so(name, HOWS, made, tmp_path)


def damaged_so(name, hows, made, tmp_path):
    folder, expected = made
    for how in hows:
        path = Path(shutil.copytree(folder / "runs" / "a", tmp_path / how / "a"))
        file, other = file_of(path, name), file_of(folder / "runs" / "b", name)
        if not damage(file, how, other):
            continue
        wrong = holds(path, expected, file)
        assert not wrong, (name, how, wrong)
        try:
            labkit.resume(path)
        except RunError as error:
            assert RESUMED in str(error) or file.name in str(error) or "is missing" in str(error), (how, str(error))
        table = labkit.compare([folder / "runs" / "b", path])
        assert len(table) == 2 and table.state.iloc[0] == "done" and table.state.iloc[1] in ("done", "damaged")
        if table.state.iloc[1] == "done":
            assert table.score.iloc[1] == expected["summary"]["score"] and table.seconds.iloc[1] == expected["summary"]["seconds"]


# -- what goes on from a record: replay, simulation, resume --------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(made):
    """A run that was stopped, beside those that are done; and what goes on from it."""
    folder = made[0]
    with labkit.connect("threads", 2) as lab:
        settings = {"passes": 200, "checkpoints": 200, "seed": 1, "on_version": lambda run, *_: run.stop()}
        assert labkit.train(problem(), lab, runs=folder / "runs", name="c", **settings).wait(60).state == "stopped"
        yield folder / "runs" / "c", lab


def resumed(path, lab, monkeypatch):
    """What a server would go on from."""
    monkeypatch.setattr(resuming, "begin", lambda path, lab, problem, spec, lock, *_: (lock.release(), spec)[1])
    spec = labkit.resume(path, lab, problem=problem())
    lab.release(spec.config.id)
    state = {key: value for key, value in spec.state.items() if key in ("done", "round", "incarnations")}
    return spec.state["version"], spec.weights.tobytes(), state, spec.config.replace(resumed=(), created="", sources={})


def replayed(path, folder):
    run = labkit.replay(labkit.load_run(path, problem=problem()), runs=folder)
    return run.flat().tobytes(), run.recorded()["version"], rows(run.events.drop(columns=["seconds", "time"]))


def simulated(path, folder):
    return labkit.simulate(labkit.load_run(path, problem=problem()), runs=folder).summary()["seconds"]


@pytest.mark.parametrize(("name", "how"), [("events.jsonl", "line"), ("newest", "swap")])
def test_nothing_goes_on_from_a_damaged_record(name, how, made, stopped, tmp_path, monkeypatch, capsys):
    goes_on(name, [how], made, stopped, tmp_path, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FILES if name != "metrics.parquet"])
def test_nothing_goes_on_from_a_record_damaged_in_any_way(name, made, stopped, tmp_path, monkeypatch, capsys):
    goes_on(name, HOWS, made, stopped, tmp_path, monkeypatch, capsys)


def goes_on(name, hows, made, stopped, tmp_path, monkeypatch, capsys):
    folder, (cut, lab), end = made[0], stopped, tmp_path / "ends"
    done, whole = folder / "runs" / "a", shutil.copytree(cut, tmp_path / "whole" / "c")
    expected = {replayed: replayed(done, end), simulated: simulated(done, end), resumed: resumed(whole, lab, monkeypatch)}
    for how in hows:
        for read, of in ((replayed, done), (simulated, done), (resumed, cut)):
            path = Path(shutil.copytree(of, tmp_path / f"{how}-{read.__name__}" / of.name))
            file = file_of(path, name)
            if not damage(file, how, file_of(folder / "runs" / "b", name)):
                continue
            capsys.readouterr()
            try:
                answer = read(path, lab, monkeypatch) if read is resumed else read(path, end)
            except RunError as error:
                assert file.name in str(error) or "checkpoints" in str(error), (how, read, str(error))
                continue
            if read is resumed and answer[0] < expected[read][0]:  # from an older version, which is said
                assert "Not used" in capsys.readouterr().out, (name, how)
                answer = expected[read]
            assert answer == expected[read], (name, how, read.__name__)


def test_a_run_that_lost_its_status_and_its_layout_says_how_it_ended(made, tmp_path, capsys):
    path = Path(shutil.copytree(made[0] / "runs" / "a", tmp_path / "a"))
    for file in ("status.json", "layout.json", "metrics.parquet"):
        (path / file).unlink()
    run = labkit.load_run(path, problem=problem())
    assert run.state == "done" and plain(run.status()) == plain(made[1]["status"]) and run.layout.size and len(run.curve())
    text = capsys.readouterr().out
    assert "status.json is missing. It was made anew" in text and "layout.json is missing" in text
    again = labkit.load_run(path, problem=problem())
    assert again.state == "done" and again.layout == run.layout and not capsys.readouterr().out


@pytest.mark.parametrize("key", ("state", "reason"))
def test_a_status_that_leaves_out_what_each_has_is_made_anew(key, made, tmp_path, capsys):
    path = Path(shutil.copytree(made[0] / "runs" / "a", tmp_path / "a"))
    run = labkit.load_run(path, problem=problem())
    status = read_json(path / "status.json")
    write_json(path / "status.json", {name: value for name, value in status.items() if name != key}, run=run.config.id)
    assert plain(run.status()) == plain(made[1]["status"])
    assert f"status.json is not whole: its {key} is none that labkit writes. It was made anew" in capsys.readouterr().out


def test_events_that_do_not_lead_to_the_checkpoint_are_refused_by_resume_and_a_torn_line_is_not(made, tmp_path):
    path = Path(shutil.copytree(made[0] / "runs" / "a", tmp_path / "a"))
    (path / "status.json").unlink()
    version = checkpoints.versions(path)[-1]
    merged = checkpoints.read_state(path, version)[1]["done"]
    lines = (path / "events.jsonl").read_bytes().splitlines(True)
    last = max(i for i, line in enumerate(lines) if b'"merge"' in line)
    (path / "events.jsonl").write_bytes(b"".join(lines) + b'{"seq":99,"ki')
    assert how_it_ended.check_continued(path, version, merged) == version
    for end in (b"", b'{"seq":99,"ki', bytes(9) + b"\n"):
        (path / "events.jsonl").write_bytes(b"".join(lines[:last]) + end)
        with pytest.raises(
            RunError, match=rf"events.jsonl does not lead to version {version}, which was saved after {merged} samples"
        ):
            how_it_ended.check_continued(path, version, merged)
    (path / "events.jsonl").write_bytes(b"".join([*lines[:3], lines[3].replace(b"1", b"2", 1), *lines[4:]]))
    with pytest.raises(RunError, match=r"line 4 is damaged: it does not fit its checksum"):
        how_it_ended.check_continued(path, version, merged)


def test_the_newest_version_is_not_another_one(made, tmp_path):
    path = Path(shutil.copytree(made[0] / "runs" / "a", tmp_path / "a"))
    newest, run = checkpoints.versions(path)[-1], labkit.load_run(path)
    checkpoints.file_of(path, newest).unlink()
    with pytest.raises(
        RunError, match=rf"{newest:08d}\.npz is missing, the last version of run a.*version {checkpoints.versions(path)[-1]}"
    ):
        run.flat()
    assert len(run.flat(checkpoints.versions(path)[-1])) == run.layout.size


def test_one_damaged_run_takes_no_table_and_no_figure_down(made, tmp_path, capsys):
    paths = [Path(shutil.copytree(made[0] / "runs" / name, tmp_path / name)) for name in "ab"]
    lost = Path(shutil.copytree(paths[0], tmp_path / "c"))
    (lost / "config.json").write_text("{")
    (paths[1] / "events.jsonl").write_bytes((paths[0] / "events.jsonl").read_bytes())
    table = labkit.compare([paths[1], lost, paths[0]])
    assert table.state.tolist() == ["damaged", "done", "damaged"] and table.index[-1] == "c"
    assert "events.jsonl, line 1 is damaged" in table.reason.iloc[0] and "config.json cannot be read" in table.reason.iloc[2]
    assert table.score.iloc[1] == made[1]["summary"]["score"]
    runs = [labkit.load_run(path) for path in paths]
    plots.staleness(runs)
    assert "Left out of the figure: " in capsys.readouterr().out
    with pytest.raises(RunError, match="line 1 is damaged"):
        plots.staleness(runs[1])
    assert any("line 1 is damaged" in wrong for wrong in chaos.audit(runs[1])) and chaos.audit(runs[0]) == []


CHANGED = {
    "a sample too many": (lambda row: row["kind"] == "merge", {"samples": 33}, "does not lead to how the run ended"),
    "another kind": (lambda row: row["kind"] == "push", {"kind": "posh"}, "'posh' is not known"),
    "a text for a number": (lambda row: row["kind"] == "push", {"loss": "0.5"}, "its loss is '0.5'"),
    "another number": (lambda row: row["kind"] == "release", {"seq": 7000}, "is missing or out of place"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_records_without_checksums_are_checked_by_what_they_say(what, tmp_path):
    path = Path(shutil.copytree(FOLDER / "format-2-agwu", tmp_path / "a"))
    which, change, match = CHANGED[what]
    table = read_rows(path)
    next(row for row in table if which(row)).update(change)
    (path / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    with pytest.raises(RunError, match=match):
        labkit.load_run(path).summary()


def test_a_growing_record_is_read_from_where_the_last_reading_ended(tmp_path):
    table, recorder = Table(tmp_path), Recorder(tmp_path)
    for number in range(48):
        recorder.event(*(("start",) if number == 3 else ("hold",)), worker=None if number < 5 else 1, message="x" * (number % 3))
        if number % 7 == 0:
            table.read()
    offset = table._tail.offset
    assert 0 < offset < (tmp_path / "events.jsonl").stat().st_size
    pd.testing.assert_frame_equal(table.read(), read_events(tmp_path))
    assert table.read() is table.read()
    recorder.close()


def flips(content, n, seed):
    draw = random.Random(seed)
    for _ in range(n):
        at, bit = draw.randrange(len(content)), draw.randrange(8)
        yield content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


OF_FILE = {
    "config.json": ("config", "status"),
    "environment.json": ("config",),
    "layout.json": ("weights",),
    "status.json": ("status",),
    "events.jsonl": ("events",),
    "metrics.parquet": ("curve",),
    "newest": ("flat",),
    "middle": ("middle",),
}


def flipped(name, n, seed, made, tmp_path):
    folder, expected = made
    path = Path(shutil.copytree(folder / "runs" / "a", tmp_path / "a"))
    file = file_of(path, name)
    content = file.read_bytes()
    readers = {reader: READERS[reader] for reader in OF_FILE[name]}
    for number, damaged in enumerate(flips(content, n, seed)):
        file.write_bytes(damaged)
        wrong = holds(path, expected, file, readers)
        assert not wrong, (name, number, wrong)


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_gives_another_number(name, made, tmp_path):
    flipped(name, 5, 0, made, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_none_of_many_flipped_bits_gives_another_number(name, made, tmp_path):
    flipped(name, 60 if name in ("metrics.parquet", "layout.json", "status.json") else 150, 1, made, tmp_path)
