"""Events: nothing half-written is read, a record that was cut off is continued, and what a resume has undone does not count."""

from __future__ import annotations

import contextlib
import re
import threading
import zlib

import numpy as np
import pandas as pd
import pytest

from labkit.errors import RunError
from labkit.runs import events
from labkit.runs.events import COLUMNS, CRC, Recorder, Table, Tail, effective, read_events


@pytest.fixture
def recorder(tmp_path):
    made = Recorder(tmp_path)
    yield made
    made.close()


def test_events_come_back_in_order_with_all_columns(recorder, tmp_path):
    recorder.event("join", worker=0, incarnation=0, message='a "quoted"\nline, ä')
    recorder.event("start")
    recorder.event("push", worker=0, samples=7, loss=float("nan"), score=0.5, compute_s=0.25, **{"pass": 1})
    table = read_events(tmp_path)  # while it is still written
    assert list(table.columns) == COLUMNS and list(table.kind) == ["join", "start", "push"] and list(table.seq) == [0, 1, 2]
    assert table.message[0] == 'a "quoted"\nline, ä'
    assert np.isnan(table.seconds[0]) and table.seconds[1] == 0 and table.seconds[2] >= 0
    assert table["pass"][2] == 1 and np.isnan(table.loss[2]) and table.samples.dtype == np.float64
    assert (table.time.diff().dropna() >= 0).all()


def test_a_run_without_events_is_an_empty_table(tmp_path):
    table = read_events(tmp_path)
    assert len(table) == 0 and list(table.columns) == COLUMNS


def test_columns_are_checked_where_they_are_written(recorder):
    with pytest.raises(AssertionError, match="staleniss"):
        recorder.event("push", staleniss=1)


def test_events_of_several_threads_are_whole_lines(recorder, tmp_path):
    threads = [
        threading.Thread(target=lambda w=w: [recorder.event("hold", worker=w, message="x" * 500) for _ in range(50)])
        for w in range(4)
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    table = read_events(tmp_path)
    assert list(table.seq) == list(range(200)) and (table.groupby("worker").size() == 50).all()


def test_a_recorder_continues_where_another_one_ended_and_closes_twice(recorder, tmp_path):
    recorder.event("start")
    recorder.close()
    recorder.close()
    other = Recorder(tmp_path)
    other.event("join")
    other.close()
    table = read_events(tmp_path)
    assert list(table.kind) == ["start", "join"] and list(table.seq) == [0, 1]


def test_a_last_line_that_is_being_written_is_left_out(recorder, tmp_path):
    recorder.event("start")
    for half in ('{"seq": 1', ', "kind": "pu', 'sh"}'):
        with open(tmp_path / "events.jsonl", "a") as file:
            file.write(half)
        assert list(read_events(tmp_path).kind) == ["start"]


@pytest.mark.parametrize("line", ['{"seq": 1, "ki', "17", "[]", "null", ""])
def test_a_damaged_line_is_named(recorder, tmp_path, line):
    recorder.event("start")
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write(line + "\n")
    recorder.event("join")
    with pytest.raises(RunError, match=r"events\.jsonl, line 2 is damaged: .* Put a copy of the file back"):
        read_events(tmp_path)


def test_events_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "events.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(RunError, match=r"events\.jsonl, line 1 is damaged"):
        read_events(tmp_path)


def test_a_tail_gives_each_event_once_and_whole(recorder, tmp_path):
    tail = Tail(tmp_path)
    assert tail.read() == []  # there is nothing yet
    recorder.event("join", worker=0)
    recorder.event("start")
    assert [row["kind"] for row in tail.read()] == ["join", "start"] and tail.read() == []
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"seq": 2, "kind":')
    assert tail.read() == []
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write(' "ä"}\n17\n')
    with pytest.raises(RunError, match=r"line 3 is damaged: it does not fit its checksum"):
        tail.read()


def test_threads_that_read_one_table_at_once_get_each_event_once(recorder, tmp_path, monkeypatch):
    """As a live figure and a cell do, of one run."""
    for _ in range(20):
        recorder.event("hold", worker=0)
    both, read = threading.Barrier(2), events.read_lines_since

    def at_once(*arguments):
        lines = read(*arguments)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.2)  # the other one has read the same lines, if it could
        return lines

    monkeypatch.setattr(events, "read_lines_since", at_once)
    table, tables = Table(tmp_path), []
    threads = [threading.Thread(target=lambda: tables.append(table.read())) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert [list(read.seq) for read in tables] == [list(range(20))] * 2 and list(table.read().seq) == list(range(20))


def test_another_clock_sets_the_time_and_a_copy_retains_its_time(tmp_path):
    moments = iter([(7.0, None), (8.5, 0.5)])
    recorder = Recorder(tmp_path, clock=lambda: next(moments))
    recorder.event("join", worker=1)
    recorder.event("start")
    recorder.copy({"time": 3.0, "seconds": 2.0, "seq": 99, "kind": "push", "worker": 1})
    recorder.close()
    assert (tmp_path / "events.jsonl").read_text().splitlines() == [
        '{"seq":0,"time":7.0,"seconds":null,"kind":"join","worker":1,"crc":"67de624a"}',
        '{"seq":1,"time":8.5,"seconds":0.5,"kind":"start","crc":"20ad755e"}',
        '{"seq":2,"time":3.0,"seconds":2.0,"kind":"push","worker":1,"crc":"0d9b8b5a"}',
    ]


# -- a record that is continued -----------------------------------------------------------------------------------------


def test_seq_and_clock_continue(recorder, tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr("labkit.runs.events.time.time", lambda: now)
    recorder.event("join", worker=0)
    recorder.event("start")
    now = 1007.5
    recorder.event("hold", worker=0)
    recorder.close()
    now = 5000.0  # cut off, and resumed an hour later
    other = Recorder(tmp_path)
    assert other.started is None
    other.event("resume", version=0, total=0)
    now = 5001.0
    other.event("start")
    now = 5003.0
    other.event("hold", worker=0)
    other.close()
    table = read_events(tmp_path)
    assert list(table.seq) == list(range(6)) and list(table.seconds)[1:] == [0.0, 7.5, 7.5, 7.5, 9.5]


HALVES = ["", "{", '{"seq": 2, "kind": "pu', '{"seq": 2}', '\n\n{"a"', "\0" * 50, "\0" * 9 + "\n", "\ufffd\n17\n"]


@pytest.mark.parametrize("half", HALVES)
def test_what_a_crash_left_half_written_is_cut_off(recorder, tmp_path, half):
    recorder.event("join", worker=0)
    recorder.event("start")
    recorder.close()
    whole = (tmp_path / "events.jsonl").read_bytes()
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write(half)
    other = Recorder(tmp_path)
    assert (tmp_path / "events.jsonl").read_bytes() == whole
    other.event("resume", version=0)
    other.close()
    assert list(read_events(tmp_path).seq) == [0, 1, 2]


def test_a_record_of_nothing_but_half_a_line_begins_at_0(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"seq": 0, "ki')
    recorder = Recorder(tmp_path)
    recorder.event("join")
    recorder.close()
    assert list(read_events(tmp_path).seq) == [0]


def test_a_record_has_one_writer(recorder, tmp_path):
    with pytest.raises(RunError, match=r"events\.jsonl is being written by another process.*stop it first"):
        Recorder(tmp_path)
    recorder.event("join")  # undisturbed
    assert list(read_events(tmp_path).kind) == ["join"]


def table(*rows):
    return pd.DataFrame([{"kind": kind, "version": version, "samples": n} for kind, version, n in rows], columns=COLUMNS)


def test_what_a_resume_undoes_does_not_count():
    rows = [("join", None, None), ("checkpoint", 0, None)]
    rows += [("push", None, 10), ("merge", 1, 10), ("push", None, 10), ("merge", 2, 10), ("push", None, 10), ("merge", 3, 10)]
    rows += [("checkpoint", 2, None), ("checkpoint", 3, None), ("push", None, 10), ("drop", 3, 10), ("leave", None, None)]
    events = table(*rows)
    assert effective(events) is events
    events = table(*rows, ("resume", 2, None), ("push", None, 7), ("merge", 3, 7))
    counts = effective(events)
    assert list(counts.query("kind == 'merge'").version) == [1, 2, 3] and list(counts.query("kind == 'push'").samples) == [
        10,
        10,
        7,
    ]
    assert list(counts.query("kind == 'checkpoint'").version) == [0, 2]
    assert set(events.kind) == {*counts.kind, "drop"}  # joins, leaves and the resume itself stay


@pytest.mark.parametrize("seed", range(10))
def test_however_often_a_run_is_cut_off_each_version_counts_once(seed):
    """Against a bookkeeper who rolls back by hand; a barrier merges the pushes of a round into one version."""
    rng, rows, version, kept = np.random.default_rng(seed), [], 0, []
    for _ in range(6):
        for _ in range(int(rng.integers(0, 6))):
            samples = [int(n) for n in rng.integers(1, 9, int(rng.integers(1, 4)))]
            rows += [("push", None, n) for n in samples]
            version += 1
            rows += [("merge", version, n) for n in samples]
            kept += [(version, n) for n in samples]
        if rng.integers(2):
            rows.append(("push", None, 99))  # waits for others, and is lost
        version = int(rng.integers(0, version + 1))
        rows.append(("resume", version, None))
        kept = [(v, n) for v, n in kept if v <= version]
    counts = effective(table(*rows))
    merges, pushes = counts.query("kind == 'merge'"), counts.query("kind == 'push'")
    assert list(zip(merges.version, merges.samples, strict=True)) == kept
    assert list(pushes.samples) == [n for _, n in kept]


UNMEANT = {
    "a text for a number": ({"samples": "x"}, "the samples of 'merge' is 'nan'"),
    "a table for a number": ({"worker": {}}, "the worker of 'merge' is 'nan'"),
    "a number that nothing holds": ({"total": 10**400}, "the total of 'merge' is 'nan'"),
    "less than nothing": ({"version": -1}, "the version of 'merge' is '-1"),
    "half a sample": ({"samples": 0.5}, "the samples of 'merge' is '0.5'"),
    "more than JSON has": ({"samples": 2**60}, "the samples of 'merge' is"),
    "seconds without end": ({"seconds": float("inf")}, "the seconds of 'merge' is 'inf'"),
    "nothing": ({"coefficient": None}, "the coefficient of 'merge' is 'nan'"),
    "a number for a kind": ({"kind": 3}, "the kind of '3' is '3'"),
    "a list for a text": ({"message": ["x"]}, "the message of 'merge' is"),
    "a text for a table": ({"metrics": "x"}, "the metrics of 'merge' is 'x'"),
    "a table of tables": ({"metrics": {"mine": {}}}, "the metrics of 'merge' is"),
}


@pytest.mark.parametrize("what", UNMEANT)
def test_what_no_run_writes_is_refused_by_its_line_though_its_checksum_fits(what, recorder, tmp_path):
    """Seen as errors of pandas before: whoever made the file has made its checksums, too."""
    merge = {"worker": 0, "version": 1, "samples": 4, "total": 4, "staleness": 0, "coefficient": 1.0}
    change, words = UNMEANT[what]
    recorder.event("start")
    recorder.event("merge", **merge)
    table = Table(tmp_path)
    assert len(table.read()) == 2
    recorder.copy({"time": 1.0, "seconds": 1.0, "kind": "merge", **merge, **change})
    recorder.close()
    for reading in (table.read, lambda: read_events(tmp_path)):
        with pytest.raises(RunError, match=rf"events.jsonl, line 3 holds what no run writes: {re.escape(words)}"):
            reading()


def test_half_a_surrogate_pair_in_a_text_is_read_as_a_question_mark(recorder, tmp_path):
    """A message of a worker's error may hold one; a table cannot."""
    recorder.copy({"time": 1.0, "seconds": 1.0, "kind": "leave", "worker": 0, "message": "no such caf\u00e9: \ud800"})
    recorder.close()
    assert read_events(tmp_path).message.tolist() == ["no such caf\u00e9: ?"]


@pytest.mark.parametrize("body", [b'{"seq":0,"kind"', b"[" * 5000, b'1,{"seq":0', b'"x",{'])
def test_a_line_that_is_no_event_is_refused_though_its_checksum_fits(body, tmp_path):
    (tmp_path / "events.jsonl").write_bytes(body + CRC % zlib.crc32(body, zlib.crc32(b"")) + b"\n")
    with pytest.raises(RunError, match=r"events.jsonl(, line 1)?( is damaged|: event 0 is missing or out of place)"):
        Tail(tmp_path).read()
