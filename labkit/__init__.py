"""labkit: a laboratory for training neural networks on uneven clusters, driven from notebooks.

Every public name is here and is looked up on first use, so that `import labkit` imports neither torch nor bokeh.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "connect": "cluster.connect",
    "Lab": "cluster.lab",
    "train": "training.train",
    "resume": "training.resume",
    "Run": "training.run",
    "load_run": "training.run",
    "compare": "training.run",
    "replay": "simulation.drivers",
    "simulate": "simulation.drivers",
    "train_subnets": "subnets.train",
    "load_subnets": "subnets.result",
    "Subnet": "subnets.problem",
    "Decomposition": "subnets.decomposition",
    "Problem": "problems",
    "Classifier": "problems",
    "UDPA": "partition",
    "IDPA": "partition",
    "SGWU": "updates",
    "AGWU": "updates",
    "AllReduce": "updates",
    "open_dataset": "data",
    "sweep": "experiments.sweep",
    "summary": "experiments.sweep",
    "report": "experiments.sweep",
    "parameters": "experiments.sweep",
    "plots": "",
    "chaos": "",
    "updates": "",
    "LabError": "errors",
    "DataError": "errors",
    "ProblemError": "errors",
    "ClusterError": "errors",
    "PartitionError": "errors",
    "UpdateError": "errors",
    "WireError": "errors",
    "RunError": "errors",
    "SweepError": "errors",
    "WorkerError": "errors",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("labkit")
    if name not in _HOMES:
        raise AttributeError(f"module 'labkit' has no attribute {name!r}. It has: {', '.join(_HOMES)}.")
    home = _HOMES[name]
    value = getattr(importlib.import_module(f"labkit.{home}"), name) if home else importlib.import_module(f"labkit.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
