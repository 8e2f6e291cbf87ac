"""Parquet files that stay where they are: the samples of a converted copy, a row group read once a pass, whole ones dealt out."""

from __future__ import annotations

import numpy as np
import pytest

import labkit
from labkit import chaos
from labkit.data import open_dataset, streamed
from labkit.errors import DataError, PartitionError, ProblemError
from labkit.runs import checkpoints
from labkit.training.worker.sampler import Shard
from tests.helpers import Slow, net, shortened, until

pa = pytest.importorskip("pyarrow")
pytestmark = pytest.mark.usefixtures("own_cache")
N, ROWS = 330, 30


def samples(n=N, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    x = rng.normal(4, 2, (n, 1, 6, 6)).astype(np.float32)
    x[np.arange(n), 0, y] += 3
    return x, y


def write(path, columns, rows=ROWS, metadata=None):
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    pq.write_table(table if metadata is None else table.replace_schema_metadata(metadata), path, row_group_size=rows)
    return path


def flat(x):
    return list(x.reshape(len(x), -1))


@pytest.fixture
def one_file(tmp_path):
    x, y = samples()
    return write(tmp_path / "one.parquet", {"x": flat(x), "y": y}, metadata={"shape": "[1, 6, 6]"}), x, y


def everything(data, split="train", field=None):
    return data.raw(np.arange(getattr(data, f"n_{split}")), split, field)


def test_samples_labels_and_statistics_are_those_of_the_file_and_whole_row_groups_are_held_out(one_file, own_cache):
    path, x, y = one_file
    data = open_dataset(path, stream=True)
    held = data.withheld
    assert data.held_out and (data.n_train, data.n_test) == (270, 60) and held.reshape(-1, ROWS).std(axis=1).max() == 0
    for split, of in (("train", ~held), ("test", held)):
        np.testing.assert_array_equal(everything(data, split), x[of])
        np.testing.assert_array_equal(data.labels(split), y[of])
        assert data.units_of(split).tolist() == list(range(0, of.sum() + 1, ROWS))
    at = np.array([29, 3, 30, 269, 3, 0])  # over several row groups, twice the same
    batch = data.batch(at)
    expected = (x[~held][at] - x[~held].mean()) / x[~held].std()
    np.testing.assert_allclose(batch["x"], expected, rtol=1e-5, atol=1e-5)
    assert batch["y"].tolist() == y[~held][at].tolist()
    np.testing.assert_array_equal(data.batch(at, window=(slice(1, 3), slice(2, 6)))["x"], batch["x"][:, :, 1:3, 2:6])
    assert data.batch([], fields=["x"])["x"].shape == (0, 1, 6, 6)
    assert data.n_classes == 3 and data.stored_type("x") == np.float32 and data.stored_type("y") == np.int64
    assert "11" not in data.note and "9 to train and 2 to test" in data.note
    copied = sum(file.stat().st_size for file in own_cache.rglob("*") if file.is_file())
    assert copied < x.nbytes / 4  # there is a note, and no copy


def test_a_folder_a_list_and_a_dict_are_read_as_one_file_is(one_file, tmp_path):
    path, x, y = one_file
    for number in range(3):
        part = slice(110 * number, 110 * (number + 1))
        for folder in ("parts", "both/train"):
            write(tmp_path / folder / f"{number}.parquet", {"x": flat(x[part]), "y": y[part]}, metadata={"shape": "[1, 6, 6]"})
    write(tmp_path / "both" / "test" / "0.parquet", {"x": flat(x[:17]), "y": y[:17]}, metadata={"shape": "[1, 6, 6]"})
    parts = open_dataset(tmp_path / "parts")
    whole = np.concatenate([everything(parts), everything(parts, "test")])
    assert sorted(whole.sum(axis=(1, 2, 3)).tolist()) == sorted(x.sum(axis=(1, 2, 3)).tolist())
    files = [str(file) for file in sorted((tmp_path / "parts").iterdir())]
    test = tmp_path / "both" / "test" / "0.parquet"
    for given in (tmp_path / "both", {"train": files, "test": test}):
        data = open_dataset(given)
        np.testing.assert_array_equal(everything(data), x)
        np.testing.assert_array_equal(everything(data, "test"), x[:17])
        assert not data.held_out and data.withheld is None and len(data.units) == 13
    assert open_dataset(files).n_train == parts.n_train
    assert open_dataset(open_dataset(path, stream=True).path).note == open_dataset(path, stream=True).note  # as a record names it


def test_named_columns_have_the_fields_of_a_converted_set(tmp_path, capsys):
    rng, n = np.random.default_rng(0), 200
    x = rng.integers(0, 200, (n, 4, 5, 3)).astype(np.uint8)
    ids = [rng.integers(0, 9, 1 + i % 7).tolist() for i in range(n)]
    columns = {
        "image": pa.array(x.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8())))),
        "age": rng.normal(40, 9, n),
        "mass": rng.integers(0, 5, n),
        "ids": ids,
        "kind": [["cat", "dog"][i % 2] for i in range(n)],
        "energy": rng.normal(size=(n, 2)).tolist(),
        "other": [b"bytes"] * n,
    }
    asked = {"inputs": ["image", "age", "mass", "ids"], "label": "kind", "target": "energy", "tokens": "ids", "pad": 0}
    path = write(tmp_path / "set.parquet", columns, rows=20)
    data, copy = open_dataset(path, stream=True, **asked), open_dataset(path, **asked)
    assert data.fields == copy.fields and list(data.fields) == ["x", "image", "ids", "kind", "energy"]
    assert data.classes == ["cat", "dog"] and data.columns_of("x") == ["age", "mass"]
    assert "other" in data.note and "text: 2 classes" in data.note
    held = data.withheld
    assert np.array_equal(everything(data, field="image"), np.moveaxis(x, -1, 1)[~held])
    assert data.stored_type("image") == copy.stored_type("image") == np.uint8
    for field in ("image", "x"):
        given = np.moveaxis(x, -1, 1) if field == "image" else np.stack([columns["age"], columns["mass"]], 1)
        axes = (0, 2, 3) if field == "image" else 0
        wide = given.astype(float)[~held]
        made = data.batch(np.arange(data.n_train))[field]
        np.testing.assert_allclose(made.mean(axis=axes), 0, atol=1e-5)
        np.testing.assert_allclose(made.std(axis=axes), 1, atol=1e-5)
        assert np.corrcoef(made.ravel()[:300], wide.ravel()[:300])[0, 1] > 0
    filled = np.array([row + [0] * (7 - len(row)) for row in ids])
    np.testing.assert_array_equal(data.batch(np.arange(data.n_train))["ids"], filled[~held])
    np.testing.assert_allclose(everything(data, "test", "energy"), np.array(columns["energy"], np.float32)[held])


def counted(monkeypatch):
    read, unit = [], streamed.Streamed._unit

    def counting(self, key):
        read.append(key)
        return unit(self, key)

    monkeypatch.setattr(streamed.Streamed, "_unit", counting)
    return read


def test_each_row_group_is_read_once_a_pass_ahead_and_the_score_set_once(one_file, monkeypatch):
    path, x, _ = one_file
    read = counted(monkeypatch)
    problem = labkit.Classifier(net, open_dataset(path, stream=True), score_samples=20, batch_size=16)
    train, units, data = problem.train_indices(), problem.units(), problem.dataset
    assert units[-1] == len(train) == 250 and len(units) == 10
    data.hold(problem.score_indices())
    once = len(read)
    shard, seen = Shard(0, 0, units=units), []
    shard.add(np.arange(len(train)))
    for _ in range(2):
        at = train[shard.draw(len(train))]
        data.expect(at)
        for batch in np.array_split(at, 16):
            seen.append(data.batch(batch, fields=["x"])["x"])
            assert len(data._reader().in_use) <= streamed.IN_USE
        data.batch(problem.score_indices())
    passes = read[once:]
    assert 16 <= len(passes) <= 18 and len({*passes}) == 9  # what is in memory when a pass begins is not read again
    expected = x[~data.withheld][train]
    mean, rate = data.affine
    both = np.concatenate(seen) / rate + mean
    assert sorted(both.sum(axis=(1, 2, 3)).round(1)) == sorted(np.tile(expected, (2, 1, 1, 1)).sum(axis=(1, 2, 3)).round(1))


def test_a_score_set_as_large_as_a_fold_of_a_large_set_is_not_held_in_memory(one_file, monkeypatch):
    problem = problem_on(open_dataset(one_file[0], stream=True)).fold(0, 3)
    data, at = problem.dataset, problem.score_indices()
    for most, is_held in ((streamed.LARGE_BYTES, True), (len(at), False)):
        monkeypatch.setattr(streamed, "LARGE_BYTES", most)
        monkeypatch.setattr(streamed, "_held", {})
        data.hold(at)
        assert bool(streamed._held) == is_held and len(at) == 90
        np.testing.assert_array_equal(data.labels()[at], data.batch(at)["y"])


def test_a_fault_of_what_is_read_ahead_is_raised_where_it_is_asked_for(one_file, monkeypatch):
    path, *_ = one_file
    data = open_dataset(path, stream=True)
    unit = streamed.Streamed._unit
    monkeypatch.setattr(streamed.Streamed, "_unit", lambda self, key: unit(self, key) if key[1] < 2 else 1 / 0)
    data.expect(np.arange(data.n_train))
    data.batch([0])
    data.batch([29, 30])  # from here on number 2 is read ahead
    with pytest.raises(ZeroDivisionError):
        data.batch([59, 60])


def problem_on(data):
    return labkit.Classifier(net, data, score_samples=20, batch_size=16, lr=0.1)


def test_a_run_on_row_groups_is_recorded_and_replayed(one_file, tmp_path):
    problem = problem_on(open_dataset(one_file[0], stream=True))
    with labkit.connect("threads", 2) as lab:
        options = {"partition": "idpa", "passes": 5, "local_steps": 8, "checkpoints": 2, "runs": tmp_path}
        run = labkit.train(problem, lab, update="agwu", **options).wait(100)
    assert run.state == "done" and run.test_score > 0.8
    assert run.config.units == problem.units().tolist()
    assert 0 < run.events[run.events.kind == "allocate"].samples.sum() <= run.config.n_train  # all, if both get to their last batch
    assert labkit.replay(run).state == "done"


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize(("kind", "update"), [("threads", "sgwu"), ("dask", "agwu")])
def test_what_a_lost_worker_held_is_dealt_out_again_by_whole_row_groups(kind, update, one_file, tmp_path):
    problem = Slow(net, open_dataset(one_file[0], stream=True), score_samples=20, batch_size=16, lr=0.05)
    units = problem.units()
    with labkit.connect(kind, 3) as lab:
        options = {"partition": "idpa", "passes": 10, "local_steps": 4, "checkpoints": 50, "runs": tmp_path}
        run = labkit.train(problem, lab, update=update, **options)
        until(lambda: run.status().get("version", 0) >= 6, 60)
        chaos.kill(lab, 1) if kind == "dask" else chaos.drop_link(run, 1)
        run.wait(200)
    assert run.state == "done" and chaos.audit(run) == [] and "leave" in {*run.events.kind}
    assert run.events[run.events.kind == "merge"].samples.sum() == run.config.budget
    for version in checkpoints.versions(run.path):
        state = checkpoints.read_state(run.path, version)[1]["partition"]
        for samples in (state["pool"], *state["shards"].values()):
            whole = [np.arange(units[u], units[u + 1]) for u in np.unique(np.searchsorted(units, samples, "right") - 1)]
            np.testing.assert_array_equal(np.sort(samples), np.concatenate([np.empty(0, np.int64), *whole]))
        everything = np.concatenate([state["pool"], *state["shards"].values()])
        np.testing.assert_array_equal(np.sort(everything), np.arange(run.config.n_train))
    np.testing.assert_array_equal(labkit.replay(run, problem=problem).flat(), run.flat())


@pytest.mark.slow
def test_a_run_on_row_groups_is_resumed_simulated_and_evaluated(one_file, tmp_path):
    path, x, y = one_file
    test = write(tmp_path / "test.parquet", {"x": flat(x[:50]), "y": y[:50]}, metadata={"shape": "[1, 6, 6]"})
    problem = problem_on(open_dataset({"train": path, "test": test}))
    with labkit.connect("threads", 2) as lab:
        options = {"update": "sgwu", "passes": 1000, "name": "again", "runs": tmp_path, "on_version": lambda run, *_: run.stop()}
        run = labkit.train(problem, lab, **options).wait(100)
        other = write(tmp_path / "other.parquet", {"x": flat(x), "y": y}, rows=15, metadata={"shape": "[1, 6, 6]"})
        with pytest.raises(labkit.RunError, match="other row groups"):
            labkit.resume(run.path, lab, problem=problem_on(open_dataset({"train": other, "test": test})))
        run = labkit.resume(shortened(run, 9000), lab, problem=problem).wait(100)
    assert run.state == "done" and run.test_score > 0.9
    again = labkit.load_run(run.path, problem=problem)
    assert labkit.simulate(again, slowdown=[1, 2, 4], samples=1000).config.units[-1] == 1000
    lost = labkit.simulate(again, slowdown=[1, 2, 4], failures=[[0.02, 1, 0.05], [0.1, 0]], update="agwu", partition="idpa")
    assert lost.state == "done" and {"leave", "reclaim"} & {*lost.events.kind}
    assert again.evaluate({"train": str(path), "test": str(test)})["score"] == again.test_score
    assert again.evaluate(str(test))["score"] == again.test_score  # all samples of another set
    np.testing.assert_array_equal(again.predict(str(path)), again.predict(x))


def test_what_cannot_be_read_like_this_is_refused(one_file, tmp_path):
    path, x, y = one_file
    with pytest.raises(DataError, match=r"one row group of 330 rows.*row_group_size=4096"):
        open_dataset(write(tmp_path / "big.parquet", {"x": flat(x), "y": y}, rows=1000), stream=True)
    lists = [list(range(1 + i % 3)) for i in range(N)]
    for rows in (ROWS, 1):
        with pytest.raises(DataError, match=r"lengths|column x has shape.*pad=0"):
            open_dataset(write(tmp_path / f"r{rows}.parquet", {"x": lists, "y": y}, rows=rows), stream=True)
    wrong = x.copy()
    wrong[200] = np.nan
    with pytest.raises(DataError, match="nan"):
        open_dataset(write(tmp_path / "nan.parquet", {"x": flat(wrong), "y": y}), stream=True)
    write(tmp_path / "mixed" / "a.parquet", {"x": flat(x), "y": y})
    write(tmp_path / "mixed" / "b.parquet", {"x": flat(x), "y": y.astype(float)})
    with pytest.raises(DataError, match=r"b\.parquet: column y is double, and int64 in .*a\.parquet"):
        open_dataset(tmp_path / "mixed")
    with pytest.raises(ValueError, match="Several are read"):
        open_dataset(tmp_path / "mixed", stream=False)
    with pytest.raises(ValueError, match="no option stream"):
        open_dataset("digits", stream=True)
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(ValueError, match="stream=True is for Parquet files"):
        open_dataset(tmp_path / "x.npy", stream=True)
    data = open_dataset(path, stream=True)
    with labkit.connect("threads", 2) as lab:
        with pytest.raises(PartitionError, match="picks single samples"):
            labkit.train(labkit.Classifier(net, data), lab, partition=labkit.UDPA(stratified=True), runs=tmp_path)
        with pytest.raises(ProblemError, match="stream=False"):
            labkit.train_subnets(labkit.Classifier("lenet", data), lab, labkit.Decomposition((2, 2)), runs=tmp_path)
    write(path, {"x": flat(x[:100]), "y": y[:100]})
    with pytest.raises(DataError, match=r"bytes, and had \d+ when the data set was opened"):
        data.batch([0])


def test_rows_that_are_sorted_by_class_are_named(tmp_path):
    x, y = samples()
    order = np.argsort(y, kind="stable")
    assert "Shuffle the rows" in open_dataset(write(tmp_path / "s.parquet", {"x": flat(x[order]), "y": y[order]}), stream=True).note
    assert "Shuffle" not in open_dataset(write(tmp_path / "t.parquet", {"x": flat(x), "y": y}), stream=True).note


def test_streaming_is_mentioned_where_a_file_is_large_for_this_machine(one_file, monkeypatch, capsys):
    monkeypatch.setattr("labkit.data.parquet.LARGE", 0)
    open_dataset(one_file[0])
    assert "one.parquet has 0.0 GB and is converted into the cache; stream=True reads it where it is." in capsys.readouterr().out
