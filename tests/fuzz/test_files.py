"""Files that nobody meant: those of a run, of data sets and of the cache, with other bytes, and with other contents under digests and
checksums that fit. Each is read, or refused by an error of labkit; nothing is unpickled, and no memory taken that it does not hold."""

from __future__ import annotations

import copy
import json
import pickle
import random
import shutil
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import labkit
from labkit.errors import LabError
from labkit.runs import checkpoints, metrics, server_file, summary
from labkit.runs import status as how_it_ended
from labkit.runs.checkpoints import Layout
from labkit.runs.events import CRC, Recorder, read_rows
from labkit.runs.files import read_json, write_json
from labkit.runs.record import RunRecord
from labkit.training.server.coordinator import Coordinator
from labkit.updates import AGWU
from tests.fuzz.helpers import LIMIT, few_or_many, fuzzed
from tests.helpers import SAMPLES, WORKERS, settings
from tests.test_security import VALUES, flipped

pytestmark = LIMIT

MOST = 64 << 20  # bytes that a file of some kB may take
SIZE = 7


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of a run that is done, as a server writes it."""
    path = tmp_path_factory.mktemp("whole") / "r"
    path.mkdir()
    config = settings(WORKERS, n_train=SAMPLES, budget=51, id="mine", name="r", ema=0.9, created="2026-01-01T00:00:00")
    config.save(path)
    write_json(path / "environment.json", {"python": "3"}, run="mine")
    layout = Layout(("w", "b"), ((5,), (2,)), 5, 2)
    layout.save(path, "mine")
    recorder, answers, members = Recorder(path), [], {}
    checkpoints.prepare(path)
    course = Coordinator.begin(
        config,
        AGWU(),
        labkit.UDPA(),
        np.zeros(SIZE, np.float32),
        layout,
        deliver=lambda worker, answer: answers.append((worker, answer)),
        record=recorder.event,
        save=lambda *version: checkpoints.save(recorder, *version, run="mine"),
        clock=lambda: 0.0,
    )
    for worker in WORKERS:
        members[worker] = course.join(worker, "here", 1.0)
    while answers:
        worker, answer = answers.pop(0)
        if answer.grant is None:
            course.leave(members[worker])
            continue
        recorder.event("release", worker=worker, bytes=28, version=answer.grant.version, wait_s=0.0)
        header = {
            "samples": answer.grant.samples,
            "version": answer.grant.version,
            "loss": 1.0,
            "score": 0.5,
            "metrics": {"mine": 2.0},
        }
        header |= {"compute_s": 1.0, "score_s": 0.1, "wait_s": 0.0, "send_s": 0.1}
        course.push(members[worker], header, answer.weights + np.float32(1), 28)
    status = {key: course.status()[key] for key in ("state", "reason", "version", "samples")}
    how_it_ended.write(path, "mine", status, recorder.events)
    recorder.close()
    versions = checkpoints.versions(path)
    curve = pd.DataFrame({"seconds": range(len(versions)), "samples": range(len(versions)), "version": versions})
    metrics.write(path, "mine", curve.astype({"seconds": float}).assign(loss=1.0, score=np.linspace(0, 1, len(versions))))
    summary.write(RunRecord(path))
    wrong = {name: answer for name, answer in read(path).items() if isinstance(answer, LabError)}
    assert not wrong and (path / "summary.json").exists(), wrong
    return path


READERS = {
    "state": lambda run: run.state,
    "summary": lambda run: run.summary(),
    "curve": lambda run: run.curve(),
    "events": lambda run: run.events,
    "allocations": lambda run: run.allocations(),
    "balance": lambda run: run.balance(),
    "time_to": lambda run: run.time_to(0.4),
    "weights": lambda run: run.weights(),
    "average": lambda run: run.flat("ema"),
    "first": lambda run: run.flat(0),
    "label": lambda run: (run.label, repr(run)),
    "compare": lambda run: labkit.compare(run),
    "json": lambda run: json.dumps(summary.plain({key: value for key, value in run.config.items()})),
    "resume": lambda run: checkpoints.newest(run.path),
    "server": lambda run: server_file.find(run.path),
}


class Unpickled(BaseException):
    """Nothing catches it."""


@contextmanager
def guarded():
    """Nothing may be unpickled, and no more memory be taken than a small file can hold."""

    def never(*_, **__):
        raise Unpickled

    with pytest.MonkeyPatch.context() as patch:
        for name in ("load", "loads", "Unpickler"):
            patch.setattr(pickle, name, never)
        before = peak(anew=True)
        yield
        assert peak() - before < MOST, f"{peak() - before} bytes were taken"


def peak(anew=False):
    """The most bytes that this process has held in memory, from now on if `anew`; 0 where the system does not say it."""
    try:
        if anew:
            Path("/proc/self/clear_refs").write_text("5")
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    except OSError:
        return 0
    return 1024 * int(line.split()[1])


def read(path):
    """What each reader says, or the error of labkit; any other one is raised."""
    answers = {}
    try:
        run = labkit.load_run(path)
    except LabError as error:
        return {"load": error}
    for name, reader in READERS.items():
        try:
            answers[name] = reader(run)
        except LabError as error:
            answers[name] = error
    return answers


# -- other bytes -------------------------------------------------------------------------------------------------------

KINDS = ("flip", "cut", "insert", "repeat", "swap", "zeros")


def mangled(content, seed):
    """The bytes with some of them changed."""
    chance = random.Random(seed)
    for _ in range(chance.choice((1, 1, 3))):
        kind, at = chance.choice(KINDS), chance.randrange(max(1, len(content)))
        end = min(len(content), at + chance.choice((1, 4, 8, 64)))
        if kind == "flip" and content:
            content = flipped(content, chance)
        elif kind == "cut":
            content = content[:at] if chance.random() < 0.5 else content[:at] + content[end:]
        elif kind == "insert":
            content = (
                content[:at] + chance.choice((chance.randbytes(5), b"\xff" * 8, b"\0" * 8, b"9" * 30, b"[" * 2000)) + content[at:]
            )
        elif kind == "repeat":
            content = content[:end] + content[at:]
        elif kind == "swap":
            content = content[:at] + content[end:] + content[at:end]
        elif kind == "zeros":
            content = content[:at] + bytes(end - at) + content[end:]
    return content


@contextmanager
def damaged(whole, name, folder):
    """A copy of a run, and its file of this name."""
    path = Path(shutil.copytree(whole, folder / "r", dirs_exist_ok=True))
    try:
        yield path, checkpoints.file_of(path, checkpoints.versions(path)[-1]) if name == "newest" else path / name
    finally:
        shutil.rmtree(path)


FILES = (
    "config.json",
    "environment.json",
    "layout.json",
    "status.json",
    "events.jsonl",
    "metrics.parquet",
    "newest",
    "server.json",
)


@few_or_many(4, 60)
def test_whatever_the_bytes_of_a_run_are_it_is_read_or_refused(whole, tmp_path, examples):
    @fuzzed(examples)
    @given(st.sampled_from(FILES), st.integers(0, 2**32))
    def read_or_refused(name, seed):
        with damaged(whole, name, tmp_path) as (path, file), guarded():
            if name == "server.json":
                server_file.announce(path, ("127.0.0.1", 1), b"s" * 32)
            file.write_bytes(mangled(file.read_bytes(), seed))
            read(path)

    read_or_refused()


# -- other contents, under digests and checksums that fit ----------------------------------------------------------------

NUMBERS = [0, -1, 1, 7, 0.5, 1e300, -1e300, 1e-320, 2**31, 2**53, 2**63, -(2**63), 2**70, float("nan"), float("inf"), 10**400]
HOSTILE = [
    *VALUES,
    *NUMBERS,
    "\x1b[2J",
    "../../x",
    "a" * 5000,
    [[]],
    [None],
    {"": None},
    {"kind": 1},
    [1, 2, 3],
    "done",
    "ema",
    True,
]


def places(value, at=()):
    """The paths of all parts of a JSON value."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*at, key))


def changed(value, seed):
    """A JSON value with some of its parts replaced, removed, doubled or renamed."""
    chance, value = random.Random(seed), copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 2, 4))):
        where = [at for at in places(value) if at]
        if not where:
            return value
        *before, last = chance.choice(where)
        holder = value
        for key in before:
            holder = holder[key]
        way = chance.randrange(6)
        if way == 0:
            del holder[last]
        elif way == 1 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[last]))
        elif way == 1:
            holder[chance.choice(("name", "kind", "x", "", "worker", "version"))] = copy.deepcopy(holder[last])
        elif way == 2:
            holder[last] = [holder[last]] if chance.random() < 0.5 else str(holder[last])
        else:
            holder[last] = copy.deepcopy(chance.choice(HOSTILE))  # the next change may be inside it
    return value


def sign(path, file, name, seed):
    """The file of a run with other contents, signed as labkit signs it."""
    if name == "events.jsonl":
        rows = changed(read_rows(path), seed)
        rows = [row for row in rows if isinstance(row, dict)]
        for number, row in enumerate(rows):  # in order, at least
            row["seq"] = number if seed % 5 else row.get("seq")
        bodies = [json.dumps(row, separators=(",", ":"))[:-1].encode() for row in rows]
        run = zlib.crc32(b"mine")
        file.write_bytes(b"".join(body + CRC % zlib.crc32(body, run) + b"\n" for body in bodies))
    elif name == "newest":
        version = int(file.stem)
        weights, state = checkpoints.read_state(path, version)
        chance = random.Random(seed)
        if chance.random() < 0.5:
            weights = chance.choice(
                [weights[:-1], weights.reshape(1, -1), weights.astype(np.float64), np.zeros(0, np.float32), weights * np.nan]
            )
        state = {key: value for key, value in state.items() if chance.random() < 0.8}
        state["ema"] = chance.choice(
            [{}, 3, None, [], {"weights": 1}, {"weights": np.zeros((2, 3))}, {"weights": np.zeros(SIZE, bool)}]
        )
        checkpoints.write(path, version, weights, state)
    elif name == "metrics.parquet":
        chance, table = random.Random(seed), metrics.read(path, "mine", True)
        column = chance.choice(list(table))
        way = chance.randrange(4)
        if way == 0:
            table = table.drop(columns=column)
        elif way == 1:
            table[column] = chance.choice([np.nan, np.inf, -1.0, 1e300, 2**62, True, "x"])
        elif way == 2:
            table = table.iloc[::-1] if chance.random() < 0.5 else table.iloc[:0]
        else:
            table[chance.choice(("ema_score", "x\x1b[2J", "train_loss", "seconds.1"))] = table[column]
        metrics.write(path, "mine", table)
    else:
        stored = changed(read_json(file, None if name == "server.json" else "mine" if name != "config.json" else None), seed)
        write_json(file, stored, run=None if name == "server.json" else "mine")


@few_or_many(3, 40)
@pytest.mark.parametrize("name", [name for name in FILES if name != "environment.json"])
def test_whatever_a_file_of_a_run_says_under_its_digest_it_is_read_or_refused(name, whole, tmp_path, examples):
    @fuzzed(examples)
    @given(st.integers(0, 2**32))
    def read_or_refused(seed):
        with damaged(whole, name, tmp_path) as (path, file), guarded():
            if name == "server.json":
                server_file.announce(path, ("127.0.0.1", 1), b"s" * 32)
            sign(path, file, name, seed)
            read(path)

    read_or_refused()
