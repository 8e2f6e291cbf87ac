"""Emulated slowness: what makes equal workers uneven.

It is honest: after each piece of work the worker sleeps in proportion to the time that piece took, so that its results are those of
a slow machine and only its speed is made up.

Used by `labkit.worker` and `labkit.fitting`.
"""

from __future__ import annotations

import time

import numpy as np
import torch


class Slowness:
    """Emulated speed: after work that took t seconds, sleep (factor - 1) t; factor = max(1, slowdown * exp(jitter z)), z normal."""

    def __init__(self, slowdown: float, jitter: float, seed: int, worker: int, device: str) -> None:
        self.slowdown, self.jitter, self.device = slowdown, jitter, device
        self.generator = np.random.default_rng(np.random.SeedSequence([seed, worker, 1 << 20]))

    @property
    def on(self) -> bool:
        return self.slowdown != 1.0 or self.jitter > 0

    def after(self, started: float, waited: float = 0.0) -> None:
        """Sleep for work that began at `started` (perf_counter), of which `waited` seconds were spent on others."""
        if not self.on:
            return
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)
        factor = self.slowdown
        if self.jitter:
            factor *= float(np.exp(self.jitter * self.generator.standard_normal()))
        time.sleep(max(0.0, factor - 1.0) * max(0.0, time.perf_counter() - started - waited))
