"""Which versions of a run are kept, and when: evenly over its budget, and in between when the newest has become too old.

Twice as many as the curve needs: a server that is killed while it writes one then loses one interval of the curve at most.

Used by `labkit.training.server.coordinator`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from labkit.training.server.grants import Allotment
from labkit.updates import Update

AGE_S = 30.0  # at least so often a version is kept, if there is a new one


class Keeper:
    """Hands versions to `save`, each once; `checkpoints` are those that the curve needs, `age` is in seconds of `clock`."""

    def __init__(
        self,
        update: Update,
        samples: Allotment,
        checkpoints: int,
        save: Callable[[int, np.ndarray, dict], None],
        clock: Callable[[], float],
        age: float,
    ) -> None:
        self.update, self.samples, self.checkpoints = update, samples, checkpoints
        self.save, self.clock, self.age = save, clock, age
        self.newest, self.at, self.number = -1, clock(), -1  # the newest version kept; when, and how many were due by then

    def begin(self) -> None:
        """The run goes on from a version that is kept already."""
        self.newest, self.number = self.update.version, self._due()

    def is_due(self) -> bool:
        return self._due() > self.number or self.clock() - self.at > self.age

    def keep(self, state: Callable[[], dict]) -> None:
        """Keep the newest version, if it is not kept yet, with all that is needed to go on from it."""
        self.number, self.at = self._due(), self.clock()
        if self.update.version != self.newest:
            self.newest = self.update.version
            self.save(self.update.version, self.update.weights, state())

    def _due(self) -> int:
        return 2 * self.samples.merged * self.checkpoints // self.samples.budget
