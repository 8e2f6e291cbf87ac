"""An update and a partition as a user writes them, in a module that the server can import, and as quickly as its own.

Used by `test_exact.py`.
"""

from __future__ import annotations

import dataclasses
import os

import numpy as np

from labkit.partition import UDPA
from labkit.training.wire import compression
from labkit.updates import AGWU, FedBuff


class Cautious(AGWU):
    """A rule of the user's own, with a setting and a memory, and without a name."""

    def __init__(self, share=0.5, **options):
        super().__init__(**options)
        self.share = share

    def _begin(self):
        super()._begin()
        self.steps = 0

    def _merge(self, push):
        self.steps += 1
        shrunk = push.weights * np.float32(self.share) + self.weights * np.float32(1 - self.share)
        return super()._merge(dataclasses.replace(push, weights=shrunk))


class Short(AGWU):
    """Has no memory for its third push, once: as long as there is a file."""

    def _merge(self, push):
        if self.version == 2 and (file := os.environ.get("LABKIT_TEST_SHORT")) and os.path.exists(file):
            os.remove(file)
            raise MemoryError
        return super()._merge(push)


class ShortOfBuffers(FedBuff):
    """Keeps what comes; once every worker has pushed, the server has no memory for the next push, once: as long as there is a file."""

    def _merge(self, push):
        replies, file = super()._merge(push), os.environ.get("LABKIT_TEST_SHORT")
        if file and os.path.exists(file) and {worker for worker, *_ in self.kept} >= set(self.bases):
            os.remove(file)
            whole = compression.buffer

            def short(*arguments):
                compression.buffer = whole
                raise MemoryError

            compression.buffer = short
        return replies


class Backwards(UDPA):
    """A partition of the user's own: the later workers are given more."""

    def __init__(self, step=1.0, *, stratified=False):
        super().__init__(stratified=stratified)
        self.step = step

    def _speeds(self):
        return 1 + self.step * np.arange(len(self.workers))
