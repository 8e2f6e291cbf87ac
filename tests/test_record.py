"""The run directory: nothing half-written is read, and nothing foreign is loaded."""

from __future__ import annotations

import json
import pickle
import threading

import numpy as np
import pytest

from labkit import record
from labkit.errors import RunError
from labkit.record import COLUMNS, Recorder

WEIGHTS = np.linspace(-1, 1, 17, dtype=np.float32)


@pytest.fixture
def recorder(tmp_path):
    made = Recorder(tmp_path)
    yield made
    made.close()


def test_events_come_back_in_order_with_all_columns(recorder, tmp_path):
    recorder.event("join", worker=0, incarnation=0, message='a "quoted"\nline, ä')
    recorder.event("start")
    recorder.event("push", worker=0, samples=7, loss=float("nan"), score=0.5, compute_s=0.25, **{"pass": 1})
    table = record.read_events(tmp_path)  # while it is still written
    assert list(table.columns) == COLUMNS and list(table.kind) == ["join", "start", "push"] and list(table.seq) == [0, 1, 2]
    assert table.message[0] == 'a "quoted"\nline, ä'
    assert np.isnan(table.seconds[0]) and table.seconds[1] == 0 and table.seconds[2] >= 0
    assert table["pass"][2] == 1 and np.isnan(table.loss[2]) and table.samples.dtype == np.float64
    assert (table.time.diff().dropna() >= 0).all()


def test_a_run_without_events_is_an_empty_table(tmp_path):
    table = record.read_events(tmp_path)
    assert len(table) == 0 and list(table.columns) == COLUMNS


def test_columns_are_checked_where_they_are_written(recorder):
    with pytest.raises(AssertionError, match="staleniss"):
        recorder.event("push", staleniss=1)


def test_events_of_several_threads_are_whole_lines(recorder, tmp_path):
    threads = [
        threading.Thread(target=lambda w=w: [recorder.event("push", worker=w, message="x" * 500) for _ in range(50)])
        for w in range(4)
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    table = record.read_events(tmp_path)
    assert list(table.seq) == list(range(200)) and (table.groupby("worker").size() == 50).all()


def test_a_recorder_goes_on_where_another_one_ended_and_closes_twice(recorder, tmp_path):
    recorder.event("start")
    recorder.close()
    recorder.close()
    other = Recorder(tmp_path)
    other.event("join")
    other.close()
    assert list(record.read_events(tmp_path).kind) == ["start", "join"]


def test_a_last_line_that_is_being_written_is_left_out(recorder, tmp_path):
    recorder.event("start")
    for half in ('{"seq": 1', ', "kind": "pu', 'sh"}'):
        with open(tmp_path / "events.jsonl", "a") as file:
            file.write(half)
        assert list(record.read_events(tmp_path).kind) == ["start"]


@pytest.mark.parametrize("line", ['{"seq": 1, "ki', "17", "[]", "null", ""])
def test_a_damaged_line_is_named(recorder, tmp_path, line):
    recorder.event("start")
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write(line + "\n")
    recorder.event("join")
    with pytest.raises(RunError, match=r"events\.jsonl, line 2 is damaged: .* Remove the line to read the rest"):
        record.read_events(tmp_path)


def test_events_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "events.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(RunError, match=r"events\.jsonl cannot be read"):
        record.read_events(tmp_path)


# -- files that are replaced -------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "config.json"
    record.write_json(file, {"a": 1})

    def half():
        with record.replacing(file) as out:
            out.write(b"{")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert record.read_json(file) == {"a": 1} and [path.name for path in tmp_path.iterdir()] == ["config.json"]
    record.write_json(file, {"b": [2.5, None, "ä"]})
    assert record.read_json(file) == {"b": [2.5, None, "ä"]}


def test_a_reader_never_sees_half_a_file(tmp_path):
    file, over = tmp_path / "status.json", threading.Event()
    record.write_json(file, {"n": 0, "filler": "x" * 5000})

    def write():
        n = 0
        while not over.is_set():
            n += 1
            record.write_json(file, {"n": n, "filler": "x" * 5000})

    threads = [threading.Thread(target=write) for _ in range(2)]
    [thread.start() for thread in threads]
    seen = {record.read_json(file)["n"] for _ in range(300)}
    over.set()
    [thread.join() for thread in threads]
    assert seen and [path.name for path in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize(
    ("text", "words"), [("{", "cannot be read"), ("[1]", "holds a list, not a JSON object"), ("", "cannot be read")]
)
def test_json_that_is_damaged_or_foreign_is_refused_by_name(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RunError, match=rf"config\.json {words}"):
        record.read_json(tmp_path / "config.json")


def test_json_that_is_missing_or_a_folder(tmp_path):
    with pytest.raises(RunError, match=r"config\.json is missing: is .* a run directory\?"):
        record.read_json(tmp_path / "config.json")
    with pytest.raises(RunError, match="cannot be read"):
        record.read_json(tmp_path)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_checkpoints_come_back_bit_for_bit(recorder, tmp_path):
    for version in (0, 7, 100_000_000):
        recorder.checkpoint(version, WEIGHTS + np.float32(version))
    assert record.checkpoint_versions(tmp_path) == [0, 7, 100_000_000]
    np.testing.assert_array_equal(record.read_checkpoint(tmp_path, 7, 17), WEIGHTS + np.float32(7))
    table = record.read_events(tmp_path)
    assert list(table.version) == [0, 7, 100_000_000] and (table.bytes == 68).all()


def test_files_that_are_not_ours_are_no_versions(recorder, tmp_path):
    recorder.checkpoint(3, WEIGHTS)
    for name in (".00000004.npy.12.34", "5a.npy", "notes.txt", "backup.npy"):
        (tmp_path / "checkpoints" / name).write_bytes(b"")
    assert record.checkpoint_versions(tmp_path) == [3]


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a checkpoint was unpickled",))


def damaged(what, file):
    whole = file.read_bytes()
    if what == "size":
        np.save(file, WEIGHTS[:-1])
    elif what == "shape":
        np.save(file, WEIGHTS.reshape(1, -1))
    elif what == "float64":
        np.save(file, WEIGHTS.astype(np.float64))
    elif what == "byte order":
        np.save(file, WEIGHTS.astype(">f4"))
    elif what == "NaN":
        np.save(file, np.where(WEIGHTS > 0.9, np.nan, WEIGHTS).astype(np.float32))
    elif what == "truncated":
        file.write_bytes(whole[:-4])
    elif what == "header":
        file.write_bytes(whole[:128])
    elif what == "empty":
        file.write_bytes(b"")
    elif what == "text":
        file.write_text("weights\n" * 20)
    elif what == "pickle":
        file.write_bytes(pickle.dumps(Trap()))
    elif what == "objects":
        np.save(file, np.array([Trap()] * 17), allow_pickle=True)
    elif what == "archive":
        with open(file, "wb") as out:
            np.savez(out, weights=WEIGHTS)


@pytest.mark.parametrize(
    "what",
    ["size", "shape", "float64", "byte order", "NaN", "truncated", "header", "empty", "text", "pickle", "objects", "archive"],
)
def test_a_damaged_or_foreign_checkpoint_is_refused_by_name(recorder, tmp_path, what):
    recorder.checkpoint(3, WEIGHTS)
    damaged(what, tmp_path / "checkpoints" / "00000003.npy")
    with pytest.raises(RunError, match=r"00000003\.npy (holds|is damaged|is no checkpoint)"):
        record.read_checkpoint(tmp_path, 3, 17)


def test_a_missing_checkpoint_names_those_that_are_kept(recorder, tmp_path):
    recorder.checkpoint(3, WEIGHTS)
    with pytest.raises(RunError, match=r"00000004\.npy is missing\. Kept versions: \[3\]"):
        record.read_checkpoint(tmp_path, 4, 17)


def test_the_environment_says_with_what_a_run_was_made():
    found = record.environment()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"] and found["versions"]["labkit"] and found["cpus"] >= 1
