"""The errors of labkit: one family, so that `except labkit.LabError` catches every one of them.

A message says what happened, with the values, and then what to do. Errors travel between processes, so each of them
survives pickling. Plain bad arguments stay `ValueError` and `TypeError`.

Used by every module; imports nothing.
"""

from __future__ import annotations


class LabError(Exception):
    """Something in the lab went wrong; the message says what and what to do."""


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
    """Two processes of a run could not talk: refused, silent, or not speaking labkit."""


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
