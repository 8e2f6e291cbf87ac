"""What the trials of a search are measured by: objectives, of which more or less is better, and constraints, by name.

    "score"    on the score set, where less is better if the problem says so; a problem without one has its loss
    "loss"     on the score set                                     "time"    seconds of a run, from its start to its end
    "size"     parameters of the network                            others    what the problem measures besides, or a notebook reports

Of loss, time and size less is better, of others more, unless it is said: {"error": "min"}.

Used by `labkit.experiments.search` and `labkit.experiments.coordinator`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from labkit.errors import RunError, calling, did_you_mean, instance, known, real
from labkit.imports import short

LESS = ("loss", "time", "size")  # of these less is better
SENSES = {"max": 1, "min": -1}


class Goals:
    """Objectives and constraints as `labkit.search` is given them; ValueError or TypeError where they make no sense.

    `names` are all that is measured of a run, the objectives first; `n` how many of them are objectives.
    """

    def __init__(self, objective: Any = None, constraints: Mapping[str, Any] | None = None) -> None:
        self.functions: dict[str, Callable] = {}
        self.senses: dict[str, int | None] = {}  # of the objectives; None: as the problem's score
        given = "score" if objective is None else objective
        if isinstance(given, str) or not isinstance(given, Iterable):
            given = [given]
        for one in given:
            self._add(one, given[one] if isinstance(given, Mapping) else None)
        if not self.senses:
            raise ValueError("objective is empty. Leave it out for the score.")
        constraints = instance("constraints", {} if constraints is None else constraints, Mapping, ' such as {"time": 60}')
        self.bounds = {name: _bounds(name, bound) for name, bound in constraints.items()}
        self.n, self.names = len(self.senses), list(dict.fromkeys([*self.senses, *self.bounds]))

    def _add(self, one: Any, sense: Any) -> None:
        name = getattr(one, "__name__", type(one).__name__) if callable(one) else one
        if callable(one):
            self.functions[name] = one
        elif not isinstance(name, str):
            raise TypeError(
                f"objective={short(one)}: give a name, a function of a run, a list of these, or a dict of names to max and min."
            )
        if name in self.senses:
            raise ValueError(f"objective has {name!r} twice.")
        default = -1 if name in LESS else None if name == "score" or callable(one) else 1
        self.senses[name] = default if sense is None else SENSES[known(f"objective {name!r}", sense, SENSES)]

    @property
    def plain(self) -> bool:
        """Is it one objective, without constraints, by which trials under way can be compared?"""
        return list(self.senses) == ["score"] and not self.functions and not self.bounds

    def config(self) -> dict[str, Any]:
        """For the record: objectives (None where there is the score, or one function, alone), constraints, and the sense of each objective,
        "as of the score" where the problem says it."""
        objectives = [[name, sense] for name, sense in self.senses.items()]
        single = self.n == 1 and (self.names[0] == "score" or self.functions)
        found = {"objectives": None if single else objectives, "constraints": {n: list(b) for n, b in self.bounds.items()} or None}
        words = {sense: word for word, sense in SENSES.items()}
        return found | {"sense": ", ".join(words.get(sense, "as of the score") for sense in self.senses.values())}

    def missing(self, there: Iterable[str]) -> list[str]:
        """The names of which nothing is known where these are measured; of a score a loss will do."""
        return [
            name
            for name in self.names
            if name not in self.functions and name not in there and not (name == "score" and "loss" in there)
        ]

    def measure(self, run: Any, values: Mapping[str, float]) -> dict[str, float]:
        """By name what a run that is done is worth, `values` being what was measured on the score set, or reported; RunError where
        something is missing or no number."""
        found = {name: self._measured(name, run, values) for name in self.names}
        for name, value in found.items():
            if not math.isfinite(value):
                raise RunError(f"its {'score' if name == self.names[0] else name} is {value}")
        return found

    def _measured(self, name: str, run: Any, values: Mapping[str, float]) -> float:
        if make := self.functions.get(name):
            with calling(f"objective={short(make)}", RunError):
                return float(make(run))
        if name == "score" and "score" not in values and "loss" in values:
            return merit(values, sign_of(run)) * sign_of(run)
        if name in values:
            return float(values[name])
        if name == "time":
            return float(run.events.seconds.max())
        if name == "size" and hasattr(run, "layout"):
            return float(run.layout.n_params)
        there = [*values, *[one for one in ("time", "size") if hasattr(run, "layout")]]
        raise RunError(f"{name!r} is nothing that was measured.{did_you_mean(name, there)} There are {', '.join(there) or 'none'}")

    def signs(self, run: Any) -> list[int]:
        """Of each objective: 1 where more is better, -1 where less is."""
        return [sign_of(run) if sense is None else sense for sense in self.senses.values()]

    def violations(self, measured: Mapping[str, float]) -> dict[str, float]:
        """By constraint how much is missing; it holds at 0 and below."""
        found = {}
        for name, (low, high) in self.bounds.items():
            if high is not None:
                found[f"{name} <= {high:g}"] = measured[name] - high
            if low is not None:
                found[f"{name} >= {low:g}"] = low - measured[name]
        return found


def merit(values: Mapping[str, float], sign: int) -> float:
    """What trials under way are compared by, the more the better: the score, or where there is none less the loss; NaN without either."""
    return values["score"] * sign if "score" in values else -values.get("loss", math.nan)


def sign_of(run: Any) -> int:
    return -1 if run.config.lower_is_better else 1


def _bounds(name: str, bound: Any) -> tuple[float | None, float | None]:
    """(low, high) of a constraint, of which one may be None; a number is the highest."""
    if not isinstance(name, str):
        raise TypeError(f"constraints has the name {short(name)}; give names such as 'time' or 'size'.")
    low, high = bound if isinstance(bound, tuple) and len(bound) == 2 else (None, bound)
    low, high = (None if end is None else real(f"constraints[{name!r}]", end) for end in (low, high))
    if low is None and high is None:
        raise ValueError(
            f"constraints[{name!r}] bounds nothing. Give the highest value, or (lowest, highest), None where there is none."
        )
    if low is not None and high is not None and low > high:
        raise ValueError(f"constraints[{name!r}] = ({low:g}, {high:g}) cannot be kept.")
    return low, high
