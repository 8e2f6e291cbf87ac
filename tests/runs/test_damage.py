"""The damage matrix: each file of a run is cut, changed, swapped, deleted, permuted, filled with other types; every reader then
refuses it by name, or says what it said before.

Used by pytest. It covers `labkit.runs.files`, `status` and `metrics` together with the readers of a run.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

import labkit
from labkit.errors import RunError
from labkit.runs import checkpoints
from tests.helpers import problem
from tests.runs.test_old_records import plain, rows

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


@pytest.mark.parametrize("name", FILES)
def test_no_damage_gives_another_number(name, made, tmp_path, capsys):
    folder, expected = made
    for how in HOWS:
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
    flipped(name, 12, 0, made, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_none_of_many_flipped_bits_gives_another_number(name, made, tmp_path):
    flipped(name, 120 if name == "metrics.parquet" else 200, 1, made, tmp_path)
