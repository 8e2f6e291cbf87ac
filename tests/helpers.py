"""What several test files lend each other.

Used by the tests.
"""

from __future__ import annotations

from labkit.runs.config import RunConfig


def settings(workers=(0, 1), **changes):
    """The settings of a small run, but for what a test wants otherwise."""
    about = [{"index": index, "name": str(index), "host": "here", "pid": 1, "threads": 1, "slowdown": 1.0} for index in workers]
    common = {"name": "r", "update": {"name": "agwu"}, "partition": {"name": "udpa"}, "workers": about, "n_workers": len(about)}
    common |= {"n_train": 17, "passes": 2.0, "budget": 34, "batch_size": 4, "checkpoints": 4, "join_timeout": 10.0}
    return RunConfig(**common | changes)
