"""`labkit/experiments/study.py`: points depend on the log alone; it is read whole, and replayed."""

from __future__ import annotations

import json

import optuna
import pytest

from labkit.errors import RunError
from labkit.experiments.space import Space
from labkit.experiments.study import FILE, METHODS, STORAGE, Study

SPACE = Space({"x": (-2.0, 2.0), "n": (1, 9, "int"), "kind": ["a", "b"]})
NUMBERS = Space({"x": (-2.0, 2.0), "n": (1, 9, "int")})
CONDITIONAL = Space({"x": (1e-3, 1.0, "log"), "kind": {"a": {}, "b": {"y": (0.0, 1.0)}}})


def value(point):
    return -((point["x"] - 0.7) ** 2) - (point.get("kind") == "b") - 0.01 * point.get("n", 0)


def drive(study, n, ahead=1):
    """Trials up to number n, so many under way at once, which end out of order; each third fails."""
    going = [number for number, trial in enumerate(study.trials) if trial["told"] is None]
    while len(study.trials) < n or going:
        while len(going) < ahead and len(study.trials) < n:
            going.append(study.ask())
        number = going.pop(len(study.lines) % len(going))
        study.begin(number, None, [0])
        study.end(number, None, value(study.trials[number]["point"]))
        if number % 3:
            study.tell(number, "done", value(study.trials[number]["point"]))
        else:
            study.tell(number, "failed", error="no")
    return study


@pytest.mark.parametrize(
    ("method", "space"),
    [*((method, SPACE) for method in METHODS[:4]), ("tpe", CONDITIONAL), ("evolution", CONDITIONAL), ("evolution", NUMBERS)],
)
def test_a_search_that_is_cut_off_goes_on_as_if_it_had_not_been_and_is_replayed(method, space, tmp_path):
    n, n_random = (6, 2) if method == "gp" else (24, 4)
    whole = drive(Study(space, method, 3, n_random), n, ahead=3)
    assert whole.replay().points == whole.points and len({json.dumps(point) for point in whole.points}) > n // 2
    (tmp_path / FILE).write_text("".join(json.dumps(line) + "\n" for line in whole.lines[: 2 * n]) + '{"ask": 1')
    resumed = Study(space, method, 3, n_random, tmp_path)
    assert resumed.lines == whole.lines[: 2 * n] and (tmp_path / FILE).read_text().endswith("}\n")
    for line in whole.lines[2 * n :]:  # from here on the same happens
        number = next(iter(line.values()))
        if "ask" in line:
            assert resumed.ask() == number
        elif "begin" in line:
            resumed.begin(number, None, line["workers"])
        elif "end" in line:
            resumed.end(number, None, line["score"])
        else:
            resumed.tell(number, line["state"], line["value"], line["error"])
    assert resumed.points == whole.points
    assert Study(space, method, 3, n_random, tmp_path, readonly=True).trials == resumed.trials


@pytest.mark.parametrize(
    ("method", "space"), [("gp", NUMBERS), ("tpe", SPACE), ("evolution", SPACE), ("evolution", NUMBERS), ("evolution", CONDITIONAL)]
)
def test_on_another_kind_of_cpu_whose_last_digits_differ_a_search_goes_on_and_is_replayed(method, space, tmp_path, monkeypatch):
    n, n_random = (6, 2) if method == "gp" else (24, 4)
    sample = Study._sample

    def rounded(study):  # what another one makes, where each real number is another in its last digits, for whoever comes after too
        point = sample(study)
        params, about = study._params(point)
        id = study._study.trials[-1]._trial_id
        for name, key in zip(point, params, strict=True):
            if isinstance(point[name], float):
                point[name] = min(max(point[name] * (1 + 1e-14), about[key].low), about[key].high)
                study._storage.set_trial_param(id, key, point[name], about[key])
        return point

    whole = drive(Study(space, method, 3, n_random), n, ahead=3)
    half = whole.lines[: 2 * n]
    (tmp_path / FILE).write_text("".join(json.dumps(line) + "\n" for line in half))
    monkeypatch.setattr(Study, "_sample", rounded)
    assert Study(space, method, 3, n_random).ask() == 0 and rounded is Study._sample
    resumed = Study(space, method, 3, n_random, tmp_path)
    assert resumed.points == whole.points[: len(resumed.points)] and resumed.lines == half
    known = [{trial.number: trial.params for trial in study._study.trials} for study in (resumed, whole)]
    assert all(known[1][number] == params for number, params in known[0].items()), "of what the sampler makes its next points"
    assert whole.replay().points == whole.points
    drive(resumed, n, ahead=3)
    assert Study(space, method, 3, n_random, tmp_path).points == resumed.points


@pytest.mark.parametrize(("space", "name"), [(SPACE, "x"), (NUMBERS, "n"), (CONDITIONAL, "kind")])
def test_a_point_that_the_sampler_does_not_make_is_no_rounding(space, name, tmp_path):
    whole = drive(Study(space, "evolution", 3, 4), 6)
    lines = [json.loads(json.dumps(line)) for line in whole.lines]
    point = next(line for line in lines if line.get("ask") == 3)["point"]
    other = {"x": point["x"] + 1e-4, "n": point.get("n", 1) % 9 + 1, "kind": "b" if point.get("kind") == "a" else "a"}
    if name == "kind":
        point.pop("y", None)
        other |= {"y": 0.5} if other["kind"] == "b" else {}
        point |= {key: other[key] for key in ("kind", "y") if key in other}
    else:
        point[name] = other[name]
    (tmp_path / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RunError, match=r"trial 3 of .* and the sampler makes .*fresh=True"):
        Study(space, "evolution", 3, 4, tmp_path)


def test_the_seed_makes_other_points_and_a_grid_has_its_own():
    assert Study(SPACE, "random", 1, 3).points == []
    one, other = (drive(Study(SPACE, "random", seed, 3), 3).points for seed in (1, 2))
    assert one != other and one == drive(Study(SPACE, "random", 1, 3), 3).points
    grid = Space({"x": [0.5, 1.0], "kind": {"a": {}, "b": {"y": [1, 2]}}})
    assert drive(Study(grid, "grid", 0, 3), 6, ahead=2).points == grid.grid()


@pytest.mark.parametrize(("method", "space"), [("tpe", SPACE), ("evolution", SPACE), ("evolution", NUMBERS)])
def test_later_points_are_better_than_the_first(method, space):
    values = [value(point) for point in drive(Study(space, method, 5, 8), 48, ahead=2).points]
    assert sum(values[-16:]) / 16 > sum(values[:8]) / 8 + 0.5


def test_a_constant_makes_no_other_method_and_earlier_records_go_on_as_they_began():
    constant = Space({"x": (-2.0, 2.0), "n": (1, 9, "int"), "kind": ["a"]})
    points = [
        [{**point, "kind": "a"} for point in drive(Study(space, "evolution", 3, 4, **about), 16).points]
        for space, about in ((NUMBERS, {}), (constant, {}), (constant, {"counts_constants": True}))
    ]
    assert points[0] == points[1] != points[2]
    assert drive(Study(constant, "evolution", 3, 4, counts_constants=True), 16).replay().points == points[2]


def test_optuna_opens_the_copy(tmp_path):
    study = drive(Study(SPACE, "random", 0, 3, tmp_path), 4, ahead=2)
    study.ask()

    def copied():
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / STORAGE)))
        return optuna.load_study(study_name=tmp_path.name, storage=storage)

    copy = copied()
    assert [trial.params for trial in copy.trials] == study.points
    assert [trial.state.name for trial in copy.trials] == ["FAIL", "COMPLETE", "COMPLETE", "FAIL", "RUNNING"]
    assert copy.best_value == max(trial["value"] for trial in study.trials if trial["state"] == "done")
    study.tell(4, "failed", error="its block was lost")
    assert Study(SPACE, "random", 0, 3, tmp_path).points == study.points
    assert copied().trials[-1].state.name == "FAIL"


def test_one_that_is_only_read_grows_with_its_log(tmp_path):
    study = Study(NUMBERS, "evolution", 0, 4, tmp_path)
    read = Study(NUMBERS, "evolution", 0, 4, tmp_path, readonly=True)
    drive(study, 6, ahead=2)
    assert not read.trials
    read.refresh()
    assert read.trials == study.trials and read.replay().points == study.points
    study.refresh()
    assert len(study.trials) == 6


@pytest.mark.parametrize("method", [pytest.param("gp", marks=pytest.mark.slow), "tpe", "evolution"])
def test_several_objectives_and_constraints_are_cut_off_and_replayed_too(method, tmp_path):
    def tell(study, number):
        x = study.trials[number]["point"]["x"]
        study.tell(number, "done", [x, -(x**2)], violations={"x <= 1": x - 1.0})

    about = {"n_objectives": 2, "constrained": True}
    whole = Study(NUMBERS, method, 3, 4, tmp_path, **about)
    for number in range(n := 7 if method == "gp" else 9):
        assert whole.ask() == number
        if number > 1:  # two are under way
            tell(whole, number - 2)
    again = Study(NUMBERS, method, 3, 4, tmp_path, **about)
    assert again.trials == whole.trials and again.trials[0]["violations"] and len(again.trials[0]["values"]) == 2
    assert again.ask() == whole.ask() == n and again.points == whole.points == whole.replay().points


def test_a_damaged_log_is_refused_by_its_line(tmp_path):
    study = drive(Study(SPACE, "random", 0, 3, tmp_path), 3)
    lines = (tmp_path / FILE).read_text().splitlines()
    lines[4] = lines[4].replace('"ask"', '"asked"')
    (tmp_path / FILE).write_text("\n".join(lines) + "\n")
    with pytest.raises(RunError, match=r"line 6 of .*log\.jsonl is damaged"):
        Study(SPACE, "random", 0, 3, tmp_path)
    assert len(study.points) == 3
