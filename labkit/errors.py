"""The errors of labkit: one family, so that `except labkit.LabError` catches every one of them; and the checks of arguments.

A message states what happened, with the values, and then what to do. Errors travel between processes, so each of them
survives pickling. Plain bad arguments stay `ValueError` and `TypeError`.

Used by every module; imports nothing of labkit.
"""

import difflib
import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any


class LabError(Exception):
    """Something in the lab went wrong; the message states what, and what to do."""


class DataError(LabError):
    """A data set is missing, damaged, or of the wrong shape, type or range."""


class ProblemError(LabError):
    """The model, the data and the settings of a problem do not fit each other."""


class ClusterError(LabError):
    """Workers did not arrive, were lost, or cannot do what was asked."""


class PartitionError(LabError):
    """Samples cannot be shared out among the workers as asked."""


class UpdateError(LabError):
    """An update rule was given weights that it cannot merge."""


class WireError(LabError):
    """Two processes of a run could not communicate: refused, silent, or of another protocol."""


class RunError(LabError):
    """A run directory cannot be written, read or understood."""


class SweepError(LabError):
    """A sweep was asked for something that its notebook does not have."""


class WorkerError(LabError):
    """A worker failed; `worker` is its index and `remote_traceback` the traceback from there."""

    def __init__(self, message: str, worker: int | None = None, remote_traceback: str = "") -> None:
        super().__init__(message, worker, remote_traceback)
        self.worker = worker
        self.remote_traceback = remote_traceback

    def __str__(self) -> str:
        message = str(self.args[0])
        return f"{message}\n\n{self.remote_traceback}" if self.remote_traceback else message


def did_you_mean(given: Any, options: Iterable[Any]) -> str:
    """ " Did you mean 'agwu'?" for the option nearest to `given`; empty where none is near."""
    near = difflib.get_close_matches(str(given), [str(option) for option in options], n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def known(name: str, value: Any, options: Iterable[Any], advice: str = "", error: type[Exception] = ValueError) -> Any:
    """`value`, if it is one of `options`; otherwise an `error` with all of them and the nearest."""
    options = list(options)
    if value in options:
        return value
    listed = ", ".join(str(option) for option in options) or "(none)"
    raise error(f"{name}={value!r} is not known. Known: {listed}.{did_you_mean(value, options)}{advice}")


def whole(name: str, value: Any, least: int = 1, error: type[Exception] = TypeError) -> int:
    """`value` as an int of at least `least`, ValueError otherwise; `error` where it is no whole number."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise error(f"{name}={value!r} must be a whole number, not {type(value).__name__}.")
    value = operator.index(value)
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}.")
    return value


def real(
    name: str,
    value: Any,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
    error: type[Exception] = TypeError,
) -> float:
    """`value` as a float with above < value < below, least <= value <= most, else ValueError; `error` where it is no number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise error(f"{name}={value!r} must be a number, not {type(value).__name__}.")
    value = float(value)
    if not (above < value < below and least <= value <= most):
        low = f"above {above:g}" if math.isfinite(above) else f"at least {least:g}"
        high = f"below {below:g}" if below < math.inf else f"at most {most:g}" if most < math.inf else "finite"
        raise ValueError(f"{name}={value:g} must be {low} and {high}.")
    return value
