"""The rivals of joined subnets: what else could have been trained with the same data and as many epochs.

    global     the network on whole images                             what parts are to be measured by
    small      the same, as narrow as a subnet                         is it the parts that help, or fewer parameters?
    coherent   subnets and coarse network as one graph, from random weights
    transfer   the same graph from the trained subnets and coarse network, trained on: the parts as a preconditioner

They train on all training samples, also those that were held out for the coarse network. Their time is their own training; of
"transfer" also that of the parts before it.

Used by `labkit.subnets`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from labkit.costs import multiply_adds, n_parameters
from labkit.fitting import fit, measure, ready
from labkit.joined import Subnets, fill, make_joined
from labkit.lab import Worker
from labkit.parts import narrowed
from labkit.problems import Classifier
from labkit.settings import kept_arguments

RIVALS = {
    "global": "global CNN",
    "small": "small global CNN",
    "coherent": "coherent, from random weights",
    "transfer": "transfer, from the parts",
}


@dataclass(frozen=True)
class Job:
    """One rival for a worker; `path` is where the trained subnets are."""

    rival: str
    problem: Classifier
    path: str
    config: dict[str, Any]

    def build(self) -> nn.Module:
        problem = self.problem
        if self.rival in ("global", "small"):
            return problem.build(self.config["seed"])
        module = make_joined(self.config, problem.model, problem.model_args)
        if self.rival == "transfer":
            fill(module, Path(self.path), 0)
        return module


def train_rivals(problem: Classifier, joined: Subnets, path: Path, rivals: Sequence[str], run: Callable) -> None:
    """Train them on the lab, and put a row for each into the table of `joined`, which is saved in `path`."""
    narrow = narrowed(problem.model_args, joined.decomposition.n_parts, joined.config["width_rule"])
    small = Classifier(**{**kept_arguments(problem), "model_args": narrow})
    jobs = [Job(rival, small if rival == "small" else problem, str(path), joined.config) for rival in rivals]
    before = joined.summary()
    for rival, row in zip(rivals, run(train_rival, jobs), strict=True):
        if rival == "transfer":
            row |= {"seconds": before["t_par"] + row["seconds"], "wall_s": before["wall_s"] + row["wall_s"]}
        joined.rows.append({"model": RIVALS[rival], **row})


def train_rival(job: Job, worker: Worker) -> dict[str, Any]:
    """Runs on a worker: the row of a rival, without its name."""
    problem, config, seed = job.problem, job.config, job.config["seed"]
    slowness, module = ready(worker, config["jitter"], seed, config["kind"]), job.build()
    settings = {"epochs": config["epochs"], "patience": config["patience"], "seed": seed}
    train, held = problem.train_indices(), problem.score_indices()
    done = fit(problem, module, train, held, **settings, device=worker.device, after=slowness.after)
    accuracy, _ = measure(problem, module, problem.test_indices(), "test", worker.device)
    return {
        "accuracy": accuracy,
        "parameters": n_parameters(module),
        "multiply_adds": multiply_adds(module, problem.dataset.shape),
        "epochs": done.epochs,
        "seconds": done.seconds,
        "wall_s": done.seconds,
    }
