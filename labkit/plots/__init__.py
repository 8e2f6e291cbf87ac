"""Figures, from the record of runs: `labkit.plots.curves(run)` and the like, and what shows or saves them.

Runs are given as `labkit.train` and `labkit.load_run` return them, or by a path: the directory of a run, or a folder of runs.
"""

from labkit.names import face
from labkit.plots.inner import gantt, roofline
from labkit.plots.live import live
from labkit.plots.membership import membership
from labkit.plots.report import report
from labkit.plots.runs import balance, curves, speed, staleness, timeline, weights
from labkit.plots.samples import confusion, worst
from labkit.plots.scaling import errors, saturation, scaling
from labkit.plots.search import (
    search_front,
    search_history,
    search_importance,
    search_live,
    search_points,
    search_table,
    search_timeline,
)
from labkit.plots.steps import step_times
from labkit.plots.style import extension, interactive, save
from labkit.plots.subnets import decomposition, part_accuracy, part_scores, part_times

__all__ = ["balance", "confusion", "curves", "decomposition", "errors", "extension", "gantt", "interactive", "live"]
__all__ += [
    "membership",
    "part_accuracy",
    "part_scores",
    "part_times",
    "report",
    "roofline",
    "saturation",
    "save",
    "scaling",
    "search_front",
    "search_history",
    "search_importance",
    "search_live",
    "search_points",
    "search_table",
    "search_timeline",
    "speed",
    "step_times",
    "staleness",
]
__all__ += ["timeline", "weights", "worst"]
__getattr__, __dir__ = face(__name__)
