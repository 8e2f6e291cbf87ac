"""Labels: they say what differs between runs, tell all of them apart, and two runs share a line only if their seeds differ."""

from __future__ import annotations

import pytest

from labkit.runs import labels
from tests.plots.helpers import Recorded


def recorded(folder, name="r", problem=(), changes=(), **how):
    run = Recorded(folder, name, passes=0, **how)
    run.config = run.config.replace(
        problem={"kind": "labkit:Classifier", "model": "lenet", "lr": 0.05, **dict(problem)}, **dict(changes)
    )
    return run


def pair(tmp_path, *both):
    return [recorded(tmp_path / folder, **how) for folder, how in zip("ab", both, strict=True)]


def of_problem(name, *values):
    return [{"problem": {name: value}} for value in values]


def of_run(name, *values):
    return [{"changes": {name: value}} for value in values]


@pytest.mark.parametrize(
    ("both", "said"),
    [
        (of_problem("lr", 0.01, 0.1), ("lr 0.01", "lr 0.1")),
        (of_problem("lr", 0.1234567, 0.1234568), ("lr 0.1234567", "lr 0.1234568")),
        (of_problem("lr", 2**53, 2**53 + 1), ("lr 9007199254740992", "lr 9007199254740993")),
        (of_problem("lr", 1, 10**400), ("lr 1", f"lr {10**400}")),  # beyond any float
        (of_problem("model", "vgg3", "my.module:net"), ("model vgg3", "model net")),
        (of_problem("model", "one:net", "two:net"), ("model one/net", "model two/net")),
        (of_problem("data", "/d/one/train", "/d/two/train"), ("data one/train", "data two/train")),
        (of_problem("data", "/c/arrays-0123456789abcdef0123", "digits"), ("data arrays-012345", "data digits")),
        (of_problem("channels_last", True, False), ("channels_last", "not channels_last")),
        (of_problem("model_args", {"width": 0.5}, {"width": 0.5, "depth": 3}), ("", "depth 3")),
        (of_problem("loss", {"name": "huber", "delta": 2.0}, {"name": "mse"}), ("loss huber, delta 2", "loss mse")),
        (of_problem("loss", {"name": "huber", "delta": 2.0}, "mse"), ("loss huber, delta 2", "loss mse")),
        ([{"problem": {"batch_size": n}, "changes": {"batch_size": n}} for n in (32, 64)], ("batch_size 32", "batch_size 64")),
        (of_run("passes", 3, 4.5), ("passes 3", "passes 4.5")),
        (of_run("local_steps", None, 8), ("no local_steps", "local_steps 8")),
        (of_run("kind", "dask", "threads"), ("kind dask", "kind threads")),
        (of_run("update", {"name": "agwu", "q": "raw"}, {"name": "agwu", "q": "normalised"}), ("q raw", "q normalised")),
        (of_run("origin", None, {"kind": "replay", "run": "a"}), ("origin live", "origin replay")),
        (of_run("target", None, 0.9), ("no target", "target 0.9")),
        ([{}, {"problem": {"clip_norm": 1.0}}], ("", "clip_norm 1")),  # at its default it is not in the record
        ([{"problem": {"metrics": {"q": {"by_value": "<lambda>"}}}}, {}], ("q <lambda>", "")),
        (of_run("sources", {}, {"m": "1"}), ("code 44136f", "code 41b15a")),
        (of_run("checkpoints", 3, 30), ("checkpoints 3", "checkpoints 30")),  # said only because nothing else differs
        ([{"seed": 0}, {"seed": 1}], ("seed 0", "seed 1")),
        ([{"slowdown": (1, 1)}, {"slowdown": (1, 4)}], ("no slowdown", "slowdown 1:4")),
        ([{"update": "AGWU"}, {"update": "SGWU"}], ("", "")),
    ],
)  # fmt: skip
def test_what_differs_is_said(both, said, tmp_path):
    runs = pair(tmp_path, *both)
    assert labels.labels(runs) == [", ".join(filter(None, (run.label, what))) for run, what in zip(runs, said, strict=True)]


def test_one_directory_is_one_line_by_whatever_path(tmp_path, monkeypatch):
    (tmp_path / "beside").mkdir()
    run = recorded(tmp_path / "a")
    other = recorded(tmp_path / "a")
    other.path = tmp_path / "beside" / ".." / "a" / run.path.name
    assert labels.labels([run, other]) == [run.label, run.label] and len(labels.lines([run, other])) == 1


def test_where_nothing_differs_it_is_the_directory_and_one_directory_is_one_line(tmp_path):
    both = pair(tmp_path, {}, {})
    assert labels.labels([*both, both[0]]) == ["AGWU + IDPA (a/r)", "AGWU + IDPA (b/r)", "AGWU + IDPA (a/r)"]
    assert list(labels.lines([*both, both[0]])) == ["AGWU + IDPA (a/r)", "AGWU + IDPA (b/r)"]
    assert list(labels.lines([both[0]] * 2)) == ["AGWU + IDPA"]
    shared = pair(tmp_path, *of_problem("model", {"by_value": "net"}, {"by_value": "net"}))  # two cells of one name
    assert labels.labels(shared) == ["AGWU + IDPA (a/r)", "AGWU + IDPA (b/r)"]


def test_seeds_share_a_line_and_are_said_where_they_differ_between_lines(tmp_path):
    rates = [recorded(tmp_path, f"{lr}-{seed}", {"lr": lr}, seed=seed) for lr in (0.01, 0.1) for seed in range(3)]
    assert {label: len(group) for label, group in labels.lines(rates).items()} == {
        "AGWU + IDPA, lr 0.01": 3,
        "AGWU + IDPA, lr 0.1": 3,
    }
    assert list(labels.lines([rates[0], rates[4]])) == ["AGWU + IDPA, lr 0.01, seed 0", "AGWU + IDPA, lr 0.1, seed 1"]
    assert len(set(labels.labels(rates))) == 6 and labels.labels(rates)[5] == "AGWU + IDPA, lr 0.1, seed 2"


def test_labels_of_many_settings_stay_short_and_unique_and_the_table_has_them_all(tmp_path):
    names = ["lr", "momentum", "batch_size", "weight_decay", "train_samples", "score_samples"]
    runs = [recorded(tmp_path, f"r{i}", {name: i + 1 for name in names}) for i in range(3)]
    assert labels.labels(runs)[1] == "AGWU + IDPA, lr 2, batch_size 2, ..."
    assert labels.differing(runs) == {name: [1, 2, 3] for name in names}
    grid = [recorded(tmp_path, f"{n:b}", {name: n >> bit & 1 for bit, name in enumerate(names)}) for n in range(64)]
    assert len(set(labels.labels(grid))) == 64


def test_the_loss_that_was_trained_with_is_no_result(tmp_path):
    both = pair(tmp_path, *of_problem("loss", "huber", "mse"))
    assert labels.labels(both) == ["AGWU + IDPA, loss huber", "AGWU + IDPA, loss mse"]
    assert labels.differing(both) == {"loss function": ["huber", "mse"]}


def test_two_settings_of_one_name_are_told_apart(tmp_path):
    both = [{"problem": {"lr": lr}, "changes": {"update": {"name": "agwu", "lr": 10 * lr}}} for lr in (0.1, 0.2)]
    assert labels.labels(pair(tmp_path, *both))[0] == "AGWU + IDPA, problem lr 0.1, update lr 1"
