"""The cost card of a run that has ended, for programs other than labkit: `summary.json`, `run.summary()` as one JSON object.

It is made of the rest of the directory, so nothing in labkit reads it: `Run.summary` reads events and curve, and checks them. It is
written when the run has ended, and again when its curve was measured later. Numbers that JSON does not have are null.

Written by `labkit.training.supervisor`, `labkit.training.run` and `labkit.simulation.offline`.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

from labkit.runs import metrics
from labkit.runs.files import check_owner, write_json

if TYPE_CHECKING:
    from labkit.runs.record import RunRecord

FILE = "summary.json"


def write(run: RunRecord) -> None:
    """Write the file. A run that is running has none, and so has one of which something cannot be read, or on a full disk."""
    with contextlib.suppress(Exception):  # a run ends as it does, with this or without
        ended = run.recorded()
        if ended["state"] == "running":
            return
        check_owner(run.path, run.config.id)
        curve = run.kept_curve() if (run.path / metrics.FILE).exists() else None
        write_json(run.path / FILE, plain({**run.card(ended["state"], curve), "reason": ended["reason"]}), run=run.config.id)


def plain(value: Any) -> Any:
    """A value of a summary or of a table as JSON has it: null for what is no number."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
