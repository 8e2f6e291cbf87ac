"""Checkpoints come back bit for bit or are refused by name; what is kept is decided by number and age."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from labkit.errors import RunError
from labkit.runs import checkpoints
from labkit.runs.events import Recorder, read_events
from labkit.runs.files import write_json
from labkit.updates import AGWU, SGWU, Push

WEIGHTS = np.linspace(-1, 1, 17, dtype=np.float32)
STATE = {
    "version": 3,
    "done": 231,
    "seconds": 12.5,
    "update": {"bases": {0: 3, 1: 2}, "base_weights": {0: WEIGHTS, 1: WEIGHTS * 2}, "quality": "raw", "none": None},
    "partition": {"pool": np.arange(5, 40), "shards": {0: np.array([3, 1, 2]), 1: np.empty(0, np.int64)}, "workers": [0, 1]},
    "odd": {
        "__array__": "a1",
        "nested": [True, [1.5, "ä"], {}],
        "flags": np.array([True, False]),
        "negative": np.array([-1, 70000]),
    },
}


@pytest.fixture
def path(tmp_path):
    """A run directory with one checkpoint."""
    write_json(tmp_path / "config.json", {"id": "mine"})
    (tmp_path / "checkpoints").mkdir()
    checkpoints.write(tmp_path, 3, WEIGHTS, STATE)
    return tmp_path


def file(path, version=3):
    return path / "checkpoints" / f"{version:08d}.npz"


def same(a, b):
    if isinstance(b, np.ndarray):
        return isinstance(a, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(b, dict):
        return isinstance(a, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in b)
    if isinstance(b, (list, tuple)):
        return isinstance(a, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def assert_whole_or_refused(path):
    try:
        weights, state = checkpoints.read_state(path, 3)
    except RunError as error:
        assert "00000003.npz" in str(error)
        return False
    assert same(weights, WEIGHTS) and same(state, STATE)
    return True


# -- what is written comes back ----------------------------------------------------------------------------------------


def test_weights_and_state_come_back_bit_for_bit(path):
    assert same(checkpoints.read_weights(path, 3, 17), WEIGHTS)
    assert assert_whole_or_refused(path)
    assert not checkpoints.read_weights(path, 3, 17).flags.writeable


@pytest.mark.parametrize("seed", range(20))
def test_any_nested_state_comes_back(path, seed):
    rng = np.random.default_rng(seed)

    def value(depth):
        kinds = "number text none flag array" + " dict ints list" * (depth > 0) * 2
        match rng.choice(kinds.split()):
            case "number":
                return rng.choice([float(rng.normal()), int(rng.integers(-(2**62), 2**62))], 1).tolist()[0]
            case "text":
                return "".join(map(chr, rng.integers(1, 0x3000, 5)))
            case "none":
                return None
            case "flag":
                return bool(rng.integers(2))
            case "array":
                kind = rng.choice(["bool", "int8", "int64", "uint32", "float32", "float64"])
                shape = tuple(rng.integers(0, 4, rng.integers(0, 3)))
                return np.asarray(rng.integers(0, 2 ** rng.integers(1, 8), shape) - int(rng.integers(2))).astype(kind)
            case "dict":
                keys = rng.choice(["a", "b", checkpoints.ARRAY, checkpoints.ITEMS, ""], 2, replace=False)
                return {str(key): value(depth - 1) for key in keys}
            case "ints":
                return {int(key): value(depth - 1) for key in rng.integers(-5, 300, 3)}
            case "list":
                return [value(depth - 1) for _ in range(rng.integers(4))]

    state = {"it": value(4), "too": value(4)}
    checkpoints.write(path, 7, WEIGHTS, state)
    assert same(checkpoints.read_state(path, 7)[1], state)


def test_a_rule_continues_from_a_checkpoint_as_if_nothing_had_been(path):
    rng = np.random.default_rng(0)

    def pushes(rule, n):
        for i in range(n):
            weights = np.sin(np.arange(17, dtype=np.float32) * (rule.version + i + 1))
            rule.push(Push(i % 2, rule.bases[i % 2], weights, 0.25 + i / 10, 5))

    for make in (AGWU, SGWU, lambda: AGWU("raw")):
        rule, other = make(), make()
        rule.start(rng.normal(size=17).astype(np.float32), [0, 1])
        pushes(rule, 4)
        checkpoints.write(path, rule.version, rule.weights, rule.state_dict())
        other.load_state_dict(checkpoints.read_state(path, rule.version)[1])
        for each in (rule, other):
            pushes(each, 4)
        assert rule.version == other.version and rule.weights.tobytes() == other.weights.tobytes()


def test_a_version_is_not_damaged_because_another_thread_parses_at_that_moment(path, monkeypatch):
    """Which CPython 3.11 and 3.12 answer with a SystemError now and then; the heads of arrays are Python."""
    read, errors = np.lib.format.read_array_header_1_0, [SystemError("AST constructor recursion depth mismatch")]

    def disturbed(stream):
        head = read(stream)
        if errors:
            raise errors.pop()
        return head

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", disturbed)
    weights, _ = checkpoints.read_state(path, 3)
    np.testing.assert_array_equal(weights, WEIGHTS)
    assert not errors


def test_indices_are_small_and_equal_arrays_are_stored_once(path):
    shards = {worker: np.arange(worker, 60000, 4) for worker in range(4)}
    size = checkpoints.write(path, 4, WEIGHTS, {"shards": shards})
    assert size < 2 * 60000 + 4000 and size == file(path, 4).stat().st_size
    big = np.zeros(100_000, np.float32)
    assert checkpoints.write(path, 5, big, {"base_weights": {worker: big.copy() for worker in range(5)}}) < 400_000 + 4000


def test_the_same_version_gives_the_same_bytes(path):
    before = file(path).read_bytes()
    checkpoints.write(path, 3, WEIGHTS, STATE)
    assert file(path).read_bytes() == before


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": object()}}, r"state\['a'\]\['b'\] is a object"),
        ({"a": [1, {2}]}, r"state\['a'\]\[1\] is a set"),
        ({"a": {(1, 2): 3}}, r"has the key \(1, 2\)"),
        ({"a": {True: 3}}, "has the key True"),
        ({"a": np.array([object()])}, "numbers only"),
        ({"a": np.array(["text"])}, "numbers only"),
    ],
)
def test_what_cannot_be_stored_is_refused_where_it_is_written(path, state, message):
    with pytest.raises(TypeError, match=message):
        checkpoints.write(path, 9, WEIGHTS, state)
    assert checkpoints.versions(path) == [3]


# -- damage ------------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_found_wherever_it_is(path):
    whole = file(path).read_bytes()
    rng, refused = np.random.default_rng(1), 0
    places = [*range(0, len(whole), 3), *rng.integers(0, len(whole), 200)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        file(path).write_bytes(damaged)
        refused += not assert_whole_or_refused(path)
    assert refused > len(places) / 2  # the rest are dates and permissions, which nobody reads


def test_a_file_that_is_cut_short_is_refused_at_any_length(path):
    whole = file(path).read_bytes()
    for length in {*range(0, len(whole), 17), *range(0, 80), *range(len(whole) - 80, len(whole))}:
        file(path).write_bytes(whole[:length])
        assert not assert_whole_or_refused(path), length
    for length in (64, 512, 4096):
        file(path).write_bytes(whole[:-length] + bytes(length))  # as a power cut leaves it
        assert not assert_whole_or_refused(path)


def test_random_damage_never_gives_wrong_weights(path):
    whole, rng = file(path).read_bytes(), np.random.default_rng(2)
    for _ in range(300):
        damaged = bytearray(whole)
        first, second, n = (int(i) for i in rng.integers(0, len(whole), 3))
        match rng.integers(4):
            case 0:
                damaged[first : first + n] = rng.bytes(min(n, len(whole) - first))
            case 1:
                del damaged[first : first + n % 64]
            case 2:
                damaged[first:first] = whole[second : second + n]
            case 3:
                damaged[first : first + 4] = b"\xff\xff\xff\x7f"  # a length of gigabytes
        file(path).write_bytes(damaged)
        assert_whole_or_refused(path)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a checkpoint was unpickled",))


def exchanged(path, name, array):
    """A well-made archive in which one member is another one; the checksum stays."""
    with zipfile.ZipFile(file(path)) as archive:
        members = {info.filename[:-4]: np.load(archive.open(info)) for info in archive.infolist()}
    with open(file(path), "wb") as out:
        np.savez(out, **{**members, name: array})


def damaged(what, path):
    place = file(path)
    if what == "empty":
        place.write_bytes(b"")
    elif what == "text":
        place.write_text("weights\n" * 20)
    elif what == "pickle":
        place.write_bytes(pickle.dumps(Trap()))
    elif what == "npy":
        with open(place, "wb") as out:
            np.save(out, WEIGHTS)
    elif what in ("npz", "compressed", "objects"):
        with open(place, "wb") as out:
            array = np.array([Trap()] * 17) if what == "objects" else WEIGHTS
            (np.savez_compressed if what == "compressed" else np.savez)(out, weights=array)
    elif what == "zip":
        with zipfile.ZipFile(place, "w") as archive:
            archive.writestr("notes.txt", "hello")
    elif what == "no members":
        zipfile.ZipFile(place, "w").close()
    elif what == "swapped":
        exchanged(path, "weights", WEIGHTS + 1)
    elif what == "more":
        exchanged(path, "extra", WEIGHTS)
    elif what == "objects inside":
        exchanged(path, "a1", np.array([Trap()]))
    elif what == "mixed":
        checkpoints.write(path, 4, WEIGHTS + 1, STATE)
        with zipfile.ZipFile(file(path, 4)) as archive:
            exchanged(path, "weights", np.load(archive.open("weights.npy")))
    elif what == "NaN":
        checkpoints.write(path, 3, np.where(WEIGHTS > 0.9, np.nan, WEIGHTS).astype(np.float32), STATE)
    elif what == "infinity":
        checkpoints.write(path, 3, np.where(WEIGHTS > 0.9, np.inf, WEIGHTS).astype(np.float32), STATE)
    elif what == "float64":
        checkpoints.write(path, 3, WEIGHTS.astype(np.float64), STATE)
    elif what == "matrix":
        checkpoints.write(path, 3, WEIGHTS.reshape(1, -1), STATE)
    elif what == "size":
        checkpoints.write(path, 3, WEIGHTS[:-1], STATE)
    elif what == "renamed":
        checkpoints.write(path, 4, WEIGHTS, STATE)
        file(path, 4).replace(place)
    elif what == "another run":
        write_json(path / "config.json", {"id": "theirs"})
        checkpoints.write(path, 3, WEIGHTS, STATE)
        write_json(path / "config.json", {"id": "mine"})
    elif what == "folder":
        place.unlink()
        place.mkdir()


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("empty", "is damaged: it is empty"),
        ("text", "is no checkpoint of labkit: it begins with b'weight'"),
        ("pickle", "is no checkpoint of labkit"),
        ("npy", "is no checkpoint of labkit: a plain .npy file"),
        ("npz", "is no checkpoint of labkit: it holds weights"),
        ("compressed", "is no checkpoint of labkit: its member weights.npy is compressed"),
        ("objects", "is no checkpoint of labkit: it holds weights"),
        ("zip", "is no checkpoint of labkit: it holds notes.txt"),
        ("no members", "is no checkpoint of labkit: it holds nothing"),
        ("swapped", "is damaged: its contents do not fit its checksum"),
        ("more", "is no checkpoint of labkit: it holds"),
        ("objects inside", "is damaged: its contents do not fit its checksum"),
        ("mixed", "is damaged: its contents do not fit its checksum"),
        ("NaN", "holds NaN or infinity"),
        ("infinity", "holds NaN or infinity"),
        ("float64", r"holds weights of float64 \(17,\)"),
        ("matrix", r"holds weights of float32 \(1, 17\)"),
        ("size", "holds 16 weights, and the model of this run has 17"),
        ("renamed", "holds version 4: it was renamed"),
        ("another run", "belongs to another run: theirs, not mine"),
        ("folder", "is damaged"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_by_name_with_what_to_do(path, what, why):
    checkpoints.write(path, 2, WEIGHTS)
    damaged(what, path)
    with pytest.raises(RunError, match=rf"00000003\.npz {why}.* Delete it to continue without it; other versions: \[2"):
        checkpoints.read_weights(path, 3, 17)


@pytest.mark.parametrize("kind", ["<U20000", "|S20000", "|V20000", "<f8", "<c16", "|O"])
def test_a_type_that_makes_more_of_an_array_than_the_file_holds_is_refused(path, kind, monkeypatch):
    referring = checkpoints._referring

    def claiming(value, members, where):
        made = referring(value, members, where)
        return {**made, "dtype": kind} if where.endswith("['pool']") else made

    monkeypatch.setattr(checkpoints, "_referring", claiming)
    checkpoints.write(path, 3, WEIGHTS, STATE)
    with pytest.raises(RunError, match=r"00000003.npz is damaged: it holds a\d+ as uint8, and calls it"):
        checkpoints.read_state(path, 3)


@pytest.mark.parametrize(
    "average", [None, 3, [], {}, {"weights": 1}, {"weights": [1.0]}, {"weights": np.zeros((1, 2), np.float32)}]
)
def test_an_average_that_no_run_saves_is_refused(path, average):
    checkpoints.write(path, 4, np.zeros(2, np.float32), {"ema": average})
    with pytest.raises(RunError, match=r"00000004\.npz holds no average of the 2 weights"):
        checkpoints.read_average(path, 4, 2)


def test_an_array_is_made_once_however_often_it_is_referred_to(path):
    shard = np.arange(100)
    checkpoints.write(path, 3, WEIGHTS, {"shards": [shard] * 1000})
    shards = checkpoints.read_state(path, 3)[1]["shards"]
    assert len({id(shard) for shard in shards}) == 1 and same(shards[0], shard) and not shards[0].flags.writeable


def test_a_later_format_asks_for_a_later_labkit(path, monkeypatch):
    monkeypatch.setattr(checkpoints, "FORMAT", 2)
    checkpoints.write(path, 3, WEIGHTS, STATE)
    monkeypatch.undo()
    with pytest.raises(RunError, match=r"00000003\.npz was written by a later labkit \(checkpoint format 2.*Update labkit"):
        checkpoints.read_state(path, 3)


def test_a_missing_version_names_those_that_are_there(path):
    with pytest.raises(RunError, match=r"00000004\.npz is missing\. Versions there: \[3\]"):
        checkpoints.read_weights(path, 4, 17)


def test_the_newest_whole_version_is_found_and_the_newer_ones_are_named(path):
    for version in (5, 8, 9):
        checkpoints.write(path, version, WEIGHTS, STATE)
    assert checkpoints.newest(path) == (9, [])
    file(path, 9).write_bytes(b"")
    file(path, 8).write_bytes(file(path, 8).read_bytes()[:-9])
    version, refused = checkpoints.newest(path)
    assert version == 5 and len(refused) == 2 and "00000009.npz is damaged: it is empty" in refused[0] and "00000008" in refused[1]
    for version in (3, 5):
        file(path, version).write_bytes(b"PK")
    with pytest.raises(RunError, match=r"(?s)no whole checkpoint.*Train it again.*00000009.*00000008.*00000005.*00000003"):
        checkpoints.newest(path)


def test_without_any_version_the_run_cannot_go_on(tmp_path):
    with pytest.raises(RunError, match=r"no whole checkpoint.*\nNone was written"):
        checkpoints.newest(tmp_path)


def test_a_write_that_fails_leaves_what_was_there(path, monkeypatch):
    before = file(path).read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for version in (3, 4):
        with pytest.raises(OSError, match="No space"):
            checkpoints.write(path, version, WEIGHTS * 2, STATE)
    assert file(path).read_bytes() == before and [f.name for f in file(path).parent.iterdir()] == ["00000003.npz"]


def test_files_that_are_not_ours_are_no_versions(path):
    for name in (".00000004.npz.12.34", "5a.npz", "notes.txt", "backup.npz", "00000007.npy", "00000008.refused"):
        (path / "checkpoints" / name).write_bytes(b"")
    assert checkpoints.versions(path) == [3]


@pytest.mark.cluster
@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_only_whole_files(tmp_path):
    """Killed at random moments of writing, again and again: the newest version can always be read."""
    code = (
        "import sys, numpy as np; from labkit.runs import checkpoints; from labkit.runs.events import Recorder, read_events\n"
        "recorder = Recorder(sys.argv[1]); checkpoints.prepare(sys.argv[1])\n"
        "version = max([0, *checkpoints.versions(sys.argv[1])])\n"
        "while True:\n"
        "    version += 1\n"
        "    weights = np.full(100_000, version, np.float32)\n"
        "    checkpoints.save(recorder, version, weights, {'done': version, 'a': np.arange(version)})\n"
        "    checkpoints.prune(sys.argv[1], sorted(recorder.saved)[-3:]); print(version, flush=True)\n"
    )
    rng, last = np.random.default_rng(0), 0
    for _ in range(8):
        with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as writer:
            assert int(writer.stdout.readline()) == last + 1
            with pytest.raises(subprocess.TimeoutExpired):
                writer.wait(float(rng.uniform(0.02, 0.2)))
            writer.kill()
        version, refused = checkpoints.newest(tmp_path)
        weights, state = checkpoints.read_state(tmp_path, version)
        assert refused == [] and (weights == version).all() and state["done"] == version > last
        last = version
    assert 1 <= len(checkpoints.versions(tmp_path)) <= 4
    assert read_events(tmp_path).query("kind == 'checkpoint'").version.max() >= last - 1


def test_checkpoints_are_recorded_and_what_was_done_by_each_is_known_again(tmp_path):
    recorder = Recorder(tmp_path)
    checkpoints.prepare(tmp_path)
    for version, done in ((0, 0), (3, 30), (5, 50)):
        checkpoints.save(recorder, version, WEIGHTS, {"done": done})
    assert recorder.saved == {0: 0, 3: 30, 5: 50}
    recorder.close()
    table = read_events(tmp_path)
    assert list(table.version) == [0, 3, 5] and list(table.total) == [0, 30, 50] and (table.bytes > WEIGHTS.nbytes).all()
    other = Recorder(tmp_path)
    assert other.saved == {0: 0, 3: 30, 5: 50}
    other.event("resume", version=3, total=30)
    assert other.saved == {0: 0, 3: 30}
    other.close()
    again = Recorder(tmp_path)
    assert again.saved == {0: 0, 3: 30}
    again.close()


def test_half_a_checkpoint_of_a_writer_that_was_killed_is_deleted(path):
    (path / "checkpoints" / ".00000001.npz.7.7").write_bytes(b"half")
    checkpoints.prepare(path)
    assert [file.name for file in (path / "checkpoints").iterdir()] == ["00000003.npz"]


# -- which ones stay ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_snapshots_are_spread_over_the_run_and_the_newest_two_stay(seed):
    rng = np.random.default_rng(seed)
    done, kept, budget, first = {0: 0}, {0}, 10_000, {0: 0}
    while (samples := done[max(done)]) < budget:  # a version now and then, pruned each time
        version = max(done) + int(rng.integers(1, 4))
        done[version] = min(budget, samples + int(rng.integers(1, 120)))
        first.setdefault(done[version] * 8 // budget, version)
        kept = {v for v in kept | {version} if v in checkpoints.retained(done, budget, 8)}
        assert set(sorted(done)[-2:]) <= kept and len(kept) <= 8 + 1 + 2
    assert set(first.values()) <= kept  # pruning as the run goes loses none of those that the whole run wants
    assert kept == checkpoints.retained(done, budget, 8)


def test_pruning_deletes_all_but_what_is_retained(path):
    for version in (5, 8):
        checkpoints.write(path, version, WEIGHTS)
    assert checkpoints.prune(path, {5, 99}) == [3, 8] and checkpoints.versions(path) == [5]
    assert checkpoints.prune(path, {5}) == []


def test_going_back_sets_newer_versions_aside(path):
    for version in (5, 8):
        checkpoints.write(path, version, WEIGHTS)
    assert checkpoints.rewind(path, 3) == [5, 8] and checkpoints.versions(path) == [3]
    assert (path / "checkpoints" / "00000008.refused").exists()
    assert checkpoints.rewind(path, 3) == []


# -- what the weights are ----------------------------------------------------------------------------------------------


def test_a_layout_splits_scalars_and_empty_tensors():
    layout = checkpoints.Layout(("a", "b", "c"), ((), (0, 3), (2, 2)), 5, 0)
    parts = layout.split(np.arange(5, dtype=np.float32))
    assert [part.shape for part in parts.values()] == [(), (0, 3), (2, 2)]
    assert parts["a"] == 0 and parts["c"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("shape", ["ab", ["ab", 10**30], [-2, -2], [2.5], [True], 4])
def test_a_layout_with_a_shape_that_is_none_is_not_whole(shape, tmp_path):
    write_json(tmp_path / "layout.json", {"names": ["a"], "shapes": [shape], "n_params": 4, "n_buffers": 0}, run="mine")
    with pytest.raises(RunError, match=r"layout\.json is not whole"):
        checkpoints.Layout.load(tmp_path, "mine")


@pytest.mark.parametrize("kind", ["a", "object", "float8", "U20000", 3, ["int64"]])
def test_a_layout_with_a_type_that_no_buffer_has_is_not_whole(kind, tmp_path):
    stored = {"names": ["a"], "shapes": [[1]], "n_params": 0, "n_buffers": 8, "types": [kind]}
    write_json(tmp_path / "layout.json", stored, run="mine")
    with pytest.raises(RunError, match=r"layout\.json is not whole: a buffer of type"):
        checkpoints.Layout.load(tmp_path, "mine")


def test_versions_are_due_evenly_over_the_budget_and_when_the_newest_is_too_old():
    now = [0.0]
    policy = checkpoints.Policy(budget=100, snapshots=2, clock=lambda: now[0], age=30.0)
    assert policy.is_due(0) and policy.admits(0, 0) and not policy.is_due(24)  # four are due: 0, 25, 50, 75 samples
    assert not policy.admits(24, 0)  # each version once
    assert policy.is_due(25) and policy.admits(30, 3) and not policy.is_due(49)
    now[0] = 30.5
    assert policy.is_due(31) and policy.admits(31, 4) and not policy.is_due(32)


def test_a_resumed_run_has_saved_the_version_that_it_continues_from():
    policy = checkpoints.Policy(budget=100, snapshots=2, clock=lambda: 0.0)
    policy.resume(50, 7)
    assert not policy.is_due(50) and not policy.admits(50, 7) and policy.is_due(75) and policy.admits(75, 8)
