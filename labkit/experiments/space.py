"""The space of a search: which values each parameter may have, in plain Python, checked before anything begins.

    (1e-4, 0.5, "log")    a real number, drawn evenly in its logarithm        (0.0, 0.95)       evenly
    (4, 32, "int")        a whole number, both ends included                   (4, 512, "int", "log")
    range(8, 65, 8)       a whole number in steps
    [32, 64], ["sgd", a]  one of these, of any kind
    {"sgd": {"momentum": (0.0, 0.95)}, "adam": {}}     one of the keys, each with parameters that only it has

A *point* is a dict from names to values as JSON holds them: numbers and texts are themselves, any other choice goes by its name.

Used by `labkit.experiments.search`, `labkit.experiments.study` and the figures of a search.
"""

import inspect
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
    json_to_distribution,
)

from labkit.errors import MOST, LabError, did_you_mean, known, plain_scalar
from labkit.imports import rule_title, short
from labkit.names import called_here
from labkit.sources import held

WORDS = ("log", "int")
PLAIN = bool | int | float | str | None  # what JSON holds
FORMS = '(low, high), (low, high, "log"), (low, high, "int"), a range, a list of choices or a dict of them'


@dataclass(frozen=True)
class Parameter:
    """One parameter: `key` is its name for Optuna, `values` are the choices that JSON cannot hold, by their names, and `spaces` the
    parameters that come with a choice."""

    key: str
    distribution: BaseDistribution
    values: Mapping[str, Any] = field(default_factory=dict)
    spaces: Mapping[Any, "Space"] = field(default_factory=dict)

    def options(self, name: str) -> Iterable[Any]:
        """All its values, for a grid; ValueError where there is no end of them."""
        if isinstance(self.distribution, CategoricalDistribution):
            return self.distribution.choices
        if isinstance(self.distribution, IntDistribution) and not self.distribution.log:
            return range(self.distribution.low, self.distribution.high + 1, self.distribution.step)
        raise ValueError(f"space {name!r} is {self.described()}, and a grid needs single values: give a list or a range.")

    @property
    def is_constant(self) -> bool:
        """Has it but one value, with no parameters of its own?"""
        return self.distribution.single() and not any(space.parameters for space in self.spaces.values())

    def described(self) -> str:
        about = self.distribution
        if isinstance(about, CategoricalDistribution):
            return f"one of {', '.join(map(str, about.choices))}"
        kind = "a whole number" if isinstance(about, IntDistribution) else "a real number"
        return f"{kind} from {about.low:g} to {about.high:g}{' (log)' * about.log}"


class Space:
    """Parameters by name.

    Raises
    ------
    ValueError, TypeError
        A range is empty or has no logarithm, choices are missing or named twice, or it is of no known form; by its name.
    """

    def __init__(self, given: Mapping[str, Any], within: str = "", taken: Iterable[str] = ()) -> None:
        if not isinstance(given, Mapping) or not (given or within):
            raise TypeError(f"space={short(given)}: give a dict from names of parameters to {FORMS}.")
        self.parameters: dict[str, Parameter] = {}
        taken = [*taken, *given]
        for name, form in given.items():
            if not isinstance(name, str) or not name.isidentifier():
                plain = name.replace("-", "_") if isinstance(name, str) else ""
                meant = f" Did you mean {plain!r}?" if plain.isidentifier() else ""
                raise TypeError(f"space has the name {name!r}; parameters are named by texts, as arguments are.{meant}")
            if taken.count(name) > 1:
                raise ValueError(f"space {name!r} stands within {within} and outside of it. Leave out one of them.")
            key = name + f" [{within}]" * bool(within)
            self.parameters[name] = (
                _chosen(name, key, form, within, taken) if _is_choice(form) else Parameter(key, _ranged(name, form))
            )

    @property
    def names(self) -> list[str]:
        """All parameters, with those that come with a choice."""
        found = dict.fromkeys(self.parameters)
        for parameter in self.parameters.values():
            for space in parameter.spaces.values():
                found |= dict.fromkeys(space.names)
        return list(found)

    @property
    def conditional(self) -> bool:
        """Are there parameters that only some points have?"""
        return any(space.parameters for parameter in self.parameters.values() for space in parameter.spaces.values())

    def is_numeric(self, constants: bool = False) -> bool:
        """Are all parameters numbers, several of them, and in every point? `constants` count as parameters only where that is said."""
        of = [parameter for parameter in self.parameters.values() if constants or not parameter.is_constant]
        return len(of) > 1 and not any(isinstance(parameter.distribution, CategoricalDistribution) for parameter in of)

    def walk(self, choose: Callable[[str, Parameter], Any]) -> dict[str, Any]:
        """The point whose values are `choose(name, parameter)`, in the order of the space."""
        point = {}
        for name, parameter in self.parameters.items():
            point[name] = choose(name, parameter)
            if point[name] in parameter.spaces:
                point |= parameter.spaces[point[name]].walk(choose)
        return point

    def corners(self, most: int) -> list[dict[str, Any]]:
        """So many points at most: that of the low ends and first choices, and those that differ from it in one choice."""
        first = self.walk(lambda _, parameter: _first(parameter))
        found = [first]

        def choose(name: str, other: Any, at: str, parameter: Parameter) -> Any:
            return other if at == name else _first(parameter)

        for name, parameter in self.parameters.items():
            if isinstance(parameter.distribution, CategoricalDistribution):
                found += [self.walk(partial(choose, name, other)) for other in parameter.distribution.choices[1:]]
        return found[:most]

    def values(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a point as they were given: objects for their names."""
        values: dict[str, Any] = {}

        def choose(name: str, parameter: Parameter) -> Any:
            values[name] = parameter.values.get(point[name], point[name]) if parameter.values else point[name]
            return point[name]

        self.walk(choose)
        return values

    def objects(self) -> dict[str, Any]:
        """The choices that JSON cannot hold, by "parameter=name"."""
        found: dict[str, Any] = {}
        for parameter in self.parameters.values():
            found |= {f"{parameter.key}={label}": value for label, value in parameter.values.items()}
            for space in parameter.spaces.values():
                found |= space.objects()
        return found

    def grid(self) -> list[dict[str, Any]]:
        """All points, the last parameter varying fastest; ValueError where a parameter has no end of values."""
        points: list[dict[str, Any]] = [{}]
        for name, parameter in self.parameters.items():
            options = parameter.options(name)
            if len(points) * len(options) > 10**5:
                raise ValueError(f"the grid of this space has more than {10**5:,} points. Give fewer values, or another method.")
            below = {value: parameter.spaces[value].grid() if value in parameter.spaces else [{}] for value in options}
            points = [point | {name: value} | more for point in points for value in options for more in below[value]]
        return points

    def config(self) -> dict[str, Any]:
        """As JSON; choices by their names."""
        return {
            name: json.loads(distribution_to_json(parameter.distribution))
            | ({"spaces": [[value, space.config()] for value, space in parameter.spaces.items()]} if parameter.spaces else {})
            for name, parameter in self.parameters.items()
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], within: str = "") -> "Space":
        """The space whose `config()` this is; its choices are but their names."""
        space = cls.__new__(cls)
        space.parameters = {}
        for name, about in config.items():
            inside = f"{within}, {name}=".removeprefix(", ")
            spaces = {value: cls.from_config(below, f"{inside}{value}") for value, below in about.get("spaces", ())}
            distribution = json_to_distribution(json.dumps({key: about[key] for key in ("name", "attributes")}))
            space.parameters[name] = Parameter(name + f" [{within}]" * bool(within), distribution, {}, spaces)
        return space


def _first(parameter: Parameter) -> Any:
    about = parameter.distribution
    return about.choices[0] if isinstance(about, CategoricalDistribution) else about.low


def suggest(trial: Any, parameter: Parameter) -> Any:
    """What Optuna's trial suggests for a parameter."""
    key, about = parameter.key, parameter.distribution
    if isinstance(about, CategoricalDistribution):
        return trial.suggest_categorical(key, about.choices)
    make = trial.suggest_int if isinstance(about, IntDistribution) else trial.suggest_float
    return make(key, about.low, about.high, step=about.step, log=about.log)


def check_names(space: Space, accepted: Mapping[str, Sequence[str]] | None, needed: Iterable[str] = ()) -> None:
    """ValueError for a name that none of those who take parameters has (`accepted`: names by who it is), or one that is missing."""
    if accepted is not None:
        options = [name for names in accepted.values() for name in names]
        for name in space.names:
            if name not in options:
                listed = "; ".join(f"{who}: {', '.join(names)}" for who, names in accepted.items() if names)
                meant = called_here(name, options) or did_you_mean(name, options)
                raise ValueError(f"space {name!r} is nothing that is set here.{meant} There are, of {listed}.")
    for name in needed:
        if name not in space.parameters:
            raise ValueError(f"the problem needs {name!r}, and the space has no such parameter for every point.")


def _is_choice(form: Any) -> bool:
    return isinstance(form, list | Mapping)


def _chosen(name: str, key: str, form: Any, within: str, taken: list[str]) -> Parameter:
    if not form:
        raise ValueError(f"space {name!r} has no choice. Give one at least.")
    labels, values, spaces = _labels(name, list(form)), {}, {}
    for value, label in zip(form, labels, strict=True):
        if label is not value:
            values[label] = value
        if isinstance(form, Mapping):
            if not isinstance(form[value], Mapping):
                raise TypeError(
                    f"space {name!r}: what comes with {value!r} is {short(form[value])}; give a dict of parameters, or {{}}."
                )
            spaces[label] = Space(form[value], f"{within}, {name}={label}".removeprefix(", "), taken)
    return Parameter(key, CategoricalDistribution(labels), values, spaces)


def _labels(name: str, values: list[Any]) -> list[Any]:
    """What stands for each choice in a point. Objects of one name are told apart by what they hold, else by numbers."""
    labels = [_label(value) for value in values]
    for at, (label, value) in enumerate(zip(labels, values, strict=True)):
        for earlier, other in zip(labels[:at], values, strict=False):
            if label == earlier and isinstance(label, bool) != isinstance(earlier, bool):
                raise ValueError(f"space {name!r} has the choices {label!r} and {earlier!r}, which are equal.")
            if label == earlier and (isinstance(plain_scalar(value), PLAIN) or isinstance(other, PLAIN) or _is_same(value, other)):
                raise ValueError(f"space {name!r} has the choice {label!r} twice.")
    if len(set(labels)) < len(labels):
        labels = [label + _held_by(value) * (labels.count(label) > 1) for label, value in zip(labels, values, strict=True)]
    found: list[Any] = []
    for label in labels:
        found.append(
            label if label not in found else next(f"{label} {n}" for n in count(2) if f"{label} {n}" not in [*labels, *found])
        )
    return found


def _is_same(value: Any, other: Any) -> bool:
    try:
        return value is other or (type(value) is type(other) and bool(value == other))
    except Exception:  # arrays, say
        return False


def _held_by(value: Any) -> str:
    """What a function closes over and its defaults: "(depth=2)"."""
    code, cells = getattr(value, "__code__", None), getattr(value, "__closure__", None) or ()
    found = {} if code is None else dict(zip(code.co_freevars, map(held, cells), strict=True))
    if code is not None:
        found |= {one.name: one.default for one in inspect.signature(value).parameters.values() if one.default is not one.empty}
    return f"({', '.join(f'{name}={short(one)}' for name, one in found.items())})" if found else ""


def _label(value: Any) -> Any:
    """What stands for a choice in a point: itself where JSON holds it, else a name."""
    value = plain_scalar(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"space: {value} cannot be a choice.")
    if isinstance(value, PLAIN):
        return value
    if hasattr(value, "config") and isinstance(about := value.config(), Mapping) and "name" in about:
        settings = ", ".join(f"{key}={short(setting)}" for key, setting in about.items() if key != "name")
        return rule_title(about) + f"({settings})" * bool(settings)
    return short(value)


def _ranged(name: str, form: Any) -> BaseDistribution:
    if isinstance(form, range):
        if not form:
            raise ValueError(f"space {name!r} is {form}, which is empty.")
        _check_size(name, form, form[0], form[-1])
        return IntDistribution(min(form), max(form), step=abs(form.step))
    if not isinstance(form, tuple) or len(form) < 2:
        raise TypeError(f"space {name!r} is {short(form)}; give {FORMS}. What does not vary is set outside of the space.")
    (low, high), words = (plain_scalar(end) for end in form[:2]), [known(f"space {name!r}", word, WORDS) for word in form[2:]]
    for end in (low, high):
        if isinstance(end, bool) or not isinstance(end, int | float) or (isinstance(end, float) and not math.isfinite(end)):
            raise TypeError(f"space {name!r} = {short(form)}: {end!r} is no end of a range. Give numbers, or a list of choices.")
    if low >= high:
        raise ValueError(f"space {name!r} = {short(form)}: the range is empty. Give low < high.")
    if "int" in words:
        _check_size(name, form, low, high)
    elif max(abs(low), abs(high)) > sys.float_info.max or not math.isfinite(high - low):
        raise ValueError(f"space {name!r} = {short(form)}: the range is too wide for a float.")
    if "log" in words and low <= 0:
        raise ValueError(f'space {name!r} = {short(form)}: {low} has no logarithm. Give low above 0, or leave out "log".')
    if "int" not in words:
        if isinstance(low, int) and isinstance(high, int) and "log" not in words:
            advice = f'Write ({low}, {high}, "int") or ({float(low)}, {float(high)}).'
            raise ValueError(f"space {name!r} = {short(form)}: whole or real numbers? {advice}")
        return FloatDistribution(float(low), float(high), log="log" in words)
    if low != int(low) or high != int(high):
        raise ValueError(f'space {name!r} = {short(form)}: with "int" both ends are whole numbers.')
    return IntDistribution(int(low), int(high), log="log" in words)


def _check_size(name: str, form: Any, *ends: float) -> None:
    """ValueError for whole numbers that a float, and so a sampler, does not tell apart."""
    if any(abs(end) > MOST for end in ends):
        raise ValueError(f"space {name!r} = {short(form)}: whole numbers beyond 2**53 cannot be told apart. Give smaller ones.")


def arguments(make: Callable, beside: Iterable[str] = ()) -> tuple[list[str], list[str], bool]:
    """Names of the arguments of a function, those of them that are needed, and whether it takes any other."""
    parameters = [p for p in inspect.signature(make).parameters.values() if p.name not in beside]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters):
        raise LabError(f"{short(make)} has arguments without a name, which no space can give.")
    needed = [p.name for p in named if p.default is p.empty]
    return [p.name for p in named], needed, any(p.kind is p.VAR_KEYWORD for p in parameters)
