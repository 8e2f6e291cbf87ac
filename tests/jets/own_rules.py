"""An all-reduce that wants its replicas equal to the last bit, in a module that the server can import.

Used by `test_problem.py`.
"""

from __future__ import annotations

import numpy as np

from labkit.errors import UpdateError
from labkit.updates import AllReduce


class Exact(AllReduce):
    def _merge_all(self, pushes):
        first, *others = (push.weights[: self.n_params].view(np.uint32) for push in pushes)
        if apart := sum(int((first != other).sum()) for other in others):
            raise UpdateError(f"{apart} of {first.size} parameters differ in their bits.")
        super()._merge_all(pushes)
