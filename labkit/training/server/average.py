"""The average of the global weights over the versions of a run, beside them: it is measured and kept, and nobody trains from it.

    E_v = (1 - r) E_{v-1} + r W_v,    r = (1 - d^n) / (1 - d^t)

with the decay d of an optimiser step, n the steps (of one batch each, of whichever worker) that are merged in version v and t all of
them so far. So version v counts with 1 - d^n, and less by d for each step since; the initial weights do not count, as the division
takes out their share (Kingma and Ba 2015, section 3). Float32 buffers are averaged too, others are those of the newest version.

Used by `labkit.training.server.coordinator`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from labkit.runs.config import RunConfig
from labkit.updates.base import chunks


class Average:
    """`weights` float32 (n,); the last `n_exact` entries are bytes. Counts are in samples, as those of the coordinator."""

    def __init__(self, config: RunConfig, weights: np.ndarray, n_exact: int) -> None:
        self.step = math.log(config.ema) / config.batch_size  # what a sample is worth: d = e^(step batch_size)
        self.n_exact = n_exact
        self.restart(weights, 0)

    def restart(self, weights: np.ndarray, merged: int) -> None:
        """What was before does not count any more."""
        self.weights, self.since, self.merged = np.array(weights), merged, merged

    def follow(self, weights: np.ndarray, merged: int, still: Iterable[Sequence[int]] = ()) -> None:
        """A new version, in which so many samples of the run are merged; what is `still` in it (`Update`) is the average."""
        n, total, self.merged = merged - self.merged, merged - self.since, merged
        if not n:
            return
        rate = math.expm1(self.step * n) / math.expm1(self.step * total)
        for part in chunks(len(weights)):
            self.weights[part] *= np.float32(1 - rate)
            self.weights[part] += np.float32(rate) * weights[part]
        for start, end in still:
            self.weights[start:end] = weights[start:end]
        if self.n_exact:
            self.weights[-self.n_exact :] = weights[-self.n_exact :]

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights.copy(), "since": self.since}

    def load_state_dict(self, state: dict[str, Any], merged: int) -> None:
        self.weights, self.since, self.merged = np.array(state["weights"]), int(state["since"]), merged
