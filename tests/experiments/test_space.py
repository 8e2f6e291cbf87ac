"""`labkit/experiments/space.py`: values in plain Python, refused by name where they make no sense."""

from __future__ import annotations

import json

import numpy as np
import pytest

from labkit.experiments.space import Space, check_names
from labkit.updates import AGWU
from tests.helpers import net

FULL = {
    "lr": (1e-4, 0.5, "log"),
    "momentum": (0, 0.95),
    "width": (4, 32, "int"),
    "units": (np.int64(4), 512, "log", "int"),
    "steps": range(8, 65, 8),
    "batch_size": [32, 64],
    "optimiser": {"sgd": {"nesterov": [True, False]}, "adam": {"beta": (0.8, 0.99), "lr_end": [1, 2]}, "rmsprop": {}},
}


def factory(depth):
    def made(shape, n_classes):
        return depth

    return made


FACTORY = factory(3)


def drawn(space, last=False):
    """The point of low ends and first choices, or of the others."""

    def choose(_, parameter):
        about = parameter.distribution
        return about.choices[-last] if hasattr(about, "choices") else about.high if last else about.low

    return space.walk(choose)


def test_each_form_is_what_it_says():
    space = Space(FULL)
    assert {name: parameter.described() for name, parameter in space.parameters.items()} == {
        "lr": "a real number from 0.0001 to 0.5 (log)",
        "momentum": "a real number from 0 to 0.95",
        "width": "a whole number from 4 to 32",
        "units": "a whole number from 4 to 512 (log)",
        "steps": "a whole number from 8 to 64",
        "batch_size": "one of 32, 64",
        "optimiser": "one of sgd, adam, rmsprop",
    }
    assert space.conditional and not Space({"a": {"x": {}, "y": {}}}).conditional
    assert space.names == [*list(FULL), "nesterov", "beta", "lr_end"]
    first = {"lr": 1e-4, "momentum": 0, "width": 4, "units": 4, "steps": 8, "batch_size": 32, "optimiser": "sgd"}
    assert drawn(space) == first | {"nesterov": True}
    assert "nesterov" not in drawn(space, last=True)


def test_constants_do_not_count_where_all_others_are_numbers():
    numbers = {"lr": (0.1, 0.2), "width": (1, 9, "int")}
    for constants in ({}, {"data": ["digits"]}, {"data": ["digits"], "steps": range(3, 4), "kind": {"a": {}}}):
        space = Space(constants | numbers)
        assert space.is_numeric() and space.is_numeric(constants=True) == (not constants)
    for more in ({"a": [1, 2]}, {"kind": {"a": {"x": (0.0, 1.0)}}}):
        assert not Space(numbers | more).is_numeric()
    assert not Space({"lr": (0.1, 0.2), "steps": range(3, 4)}).is_numeric(), "of one number there is no covariance"


def test_a_grid_has_each_point_once_and_parameters_only_where_they_belong():
    space = Space({"a": [1, 2], "kind": {"x": {}, "y": {"depth": (1, 2, "int")}}})
    points = space.grid()
    assert (
        points[:3] == [{"a": 1, "kind": "x"}, {"a": 1, "kind": "y", "depth": 1}, {"a": 1, "kind": "y", "depth": 2}]
        and len(points) == 6
    )
    with pytest.raises(ValueError, match=r"space 'lr' is a real number from 0\.1 to 0\.2, and a grid needs single values"):
        Space({"lr": (0.1, 0.2)}).grid()
    with pytest.raises(ValueError, match="more than 100,000 points"):
        Space({name: (0, 99, "int") for name in "abc"}).grid()


def test_what_no_json_holds_goes_by_a_name_and_comes_back_as_it_was():
    rule, other = AGWU(), AGWU(initial_quality=0.5) if "initial_quality" in AGWU().config() else None
    space = Space({"update": [rule, "sgwu"], "hidden": [(64, 32), (8,)], "model": {net: {}}, "n": [np.int64(3)], "none": [None]})
    point = drawn(space)
    assert json.loads(json.dumps(point)) == point
    assert point["update"].startswith("agwu") and point["hidden"] == "(64, 32)" and point["model"] == "net"
    assert space.values(point) == {"update": rule, "hidden": (64, 32), "model": net, "n": 3, "none": None} and other is None


def test_objects_of_one_name_are_told_apart():
    def other(n):
        return [(lambda x, n=n: n), (lambda x: n)][n % 2]

    long = [list(range(40)), [*range(39), 41]]
    space = Space(
        {"model": [FACTORY, factory(4), factory(4)], "of": [other(2), other(4)], "f": {(lambda: 1): {}, (lambda: 2): {}}, "l": long}
    )
    labels = [list(parameter.distribution.choices) for parameter in space.parameters.values()]
    made, of = "factory.<locals>.made", [name for name in labels[1]]
    assert labels[0] == [f"{made}(depth=3)", f"{made}(depth=4)", f"{made}(depth=4) 2"] and of[0].endswith("(n=2)") != of[
        1
    ].endswith("(n=2)")
    assert labels[2][1] == labels[2][0] + " 2" and labels[3][1] == labels[3][0] + " 2"
    assert [value(0, 0) for value in space.parameters["model"].values.values()] == [3, 4, 4]
    assert list(space.parameters["l"].values.values()) == long and len(space.objects()) == 9
    assert list(Space({"model": [FACTORY, net]}).parameters["model"].values) == [made, "net"], "names of before stay"


def test_a_space_is_recorded_and_read():
    space = Space(FULL)
    config = json.loads(json.dumps(space.config()))
    again = Space.from_config(config)
    assert again.config() == config and again.names == space.names and drawn(again, last=True) == drawn(space, last=True)
    keys = [[p.key for p in one.parameters["optimiser"].spaces["adam"].parameters.values()] for one in (space, again)]
    assert keys[0] == keys[1] == ["beta [optimiser=adam]", "lr_end [optimiser=adam]"]


def test_a_parameter_of_one_name_is_another_wherever_it_stands():
    below = {one: {"b": {"q": {"x": [one, 1]}}} for one in ("p", "r")}
    space = Space({"a": below})
    for one in (space, Space.from_config(json.loads(json.dumps(space.config())))):
        keys = [one.parameters["a"].spaces[at].parameters["b"].spaces["q"].parameters["x"].key for at in ("p", "r")]
        assert keys == ["x [a=p, b=q]", "x [a=r, b=q]"]


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ((0.5, 0.5), "range is empty"),
        ((2.0, 1.0), "range is empty"),
        ((0.0, 1.0, "log"), "0.0 has no logarithm"),
        ((-1, 10, "log", "int"), "-1 has no logarithm"),
        ((1, 8), r'whole or real numbers\? Write \(1, 8, "int"\) or \(1\.0, 8\.0\)'),
        ((0.5, 8, "int"), "both ends are whole numbers"),
        ((0.1, 0.2, "logg"), "Did you mean 'log'"),
        ((0.1, "0.2"), "no end of a range"),
        ((0.1, float("nan")), "no end of a range"),
        ((True, 2), "no end of a range"),
        ((1, 10**30, "int"), r"beyond 2\*\*53"),
        ((-(10**400), 1, "int"), r"beyond 2\*\*53"),
        (range(0, 10**30, 10**29), r"beyond 2\*\*53"),
        ((1, 10**400, "log"), "too wide for a float"),
        ((-1e308, 1e308), "too wide for a float"),
        ([FACTORY, FACTORY], "choice 'factory.<locals>.made' twice"),
        ([(64, 32), (64, 32)], r"choice '\(64, 32\)' twice"),
        ([net, "net"], "choice 'net' twice"),
        ((0.1,), "What does not vary is set outside"),
        (0.1, "What does not vary is set outside"),
        ("sgd", "What does not vary is set outside"),
        (range(3, 3), "empty"),
        ([], "no choice"),
        ({}, "no choice"),
        ([1, 1], "choice 1 twice"),
        ([1, True], "which are equal"),
        ([float("nan")], "cannot be a choice"),
        ({"sgd": 0.1}, "what comes with 'sgd'"),
        ({"sgd": {"y": (1.0, 0.5)}}, "space 'y'.*range is empty"),
        ({"sgd": {"x": [1]}}, "stands within x=sgd and outside of it"),
    ],
)
def test_a_form_that_makes_no_sense_is_refused_by_its_name(form, said):
    with pytest.raises((ValueError, TypeError), match=said):
        Space({"x": form})


@pytest.mark.parametrize("given", [{}, [("lr", 1)], None, {3: [1]}, {"a b": [1]}])
def test_a_space_that_is_no_dict_of_names_is_refused(given):
    with pytest.raises(TypeError, match="space"):
        Space(given)


def test_names_that_nobody_has_are_refused_with_the_nearest():
    space = Space({"widht": [1], "lr": [2]})
    with pytest.raises(ValueError, match=r"'widht' is nothing that is set here\. Did you mean 'width'\?.*net: width"):
        check_names(space, {"Classifier": ["lr"], "net": ["width"]})
    accepted = {"Classifier": ["lr", "batch_size"], "the training": ["passes"]}
    for name, said in {
        "learning_rate": "In labkit it is lr=",
        "batch": "In labkit it is batch_size=",
        "epochs": "In labkit it is passes=",
        "n_jobs": "n_workers= is an argument of labkit.connect",
        "device": "Each worker has its device",
    }.items():
        with pytest.raises(ValueError, match=f"{name!r} is nothing that is set here\\. {said}.* There are, of Classifier: lr"):
            check_names(Space({name: [1]}), accepted)
    with pytest.raises(TypeError, match=r"'batch-size'; .* Did you mean 'batch_size'\?"):
        Space({"batch-size": [1]})
    with pytest.raises(ValueError, match="the problem needs 'depth'"):
        check_names(space, None, ["lr", "depth"])
