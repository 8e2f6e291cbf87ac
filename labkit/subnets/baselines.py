"""The rivals of joined subnets: what else could have been trained with the same data and as many epochs.

    global     the network on whole images                             what parts are to be measured by
    long       the same with twice the epochs                          what "transfer" and "width" are to be measured by
    small      the same, as narrow as a subnet                         is it the parts that help, or fewer parameters?
    coherent   subnets and coarse network as one graph, from random weights
    transfer   the same graph from the trained subnets and coarse network, trained on: the parts as a preconditioner
    width      the global network from as many pieces of it, cut along the channels and trained apart (`labkit.subnets.channels`)

They train on all training samples, also those that were held out for the coarse network. Their time and epochs are those of
their own training; of "transfer" also those of the parts before it, of "width" also those of the longest of its pieces. Weights
do not pass the scheduler: the workers leave them in the folder of the run, `rivals/` and `pieces/`.

Used by `labkit.subnets.train`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from labkit.cluster.lab import Worker
from labkit.errors import ProblemError
from labkit.models.costs import multiply_adds, n_parameters
from labkit.models.flat import flatten
from labkit.plots.progress import stopped
from labkit.problems import Classifier
from labkit.runs import checkpoints
from labkit.subnets.channels import compose, pieces
from labkit.subnets.decomposition import Decomposition
from labkit.subnets.problem import part_seed
from labkit.subnets.result import RIVALS, Subnets, fill, make_rival
from labkit.training.local import fit, outputs
from labkit.training.worker.process import prepare_alone


@dataclass(frozen=True)
class Job:
    """A rival for a worker, or a piece of "width"; `path` is that of the run, the weights go to its folder `place`, by number."""

    rival: str
    problem: Classifier
    config: dict[str, Any]
    path: Path
    place: str
    number: int

    @property
    def title(self) -> str:
        """The rival as it was asked for: a piece is trained as a global network, for "width"."""
        return "width" if self.place == "pieces" else self.rival

    def build(self) -> nn.Module:
        problem = self.problem
        module = make_rival(self.rival, self.config, problem.model, problem.model_args)
        if self.rival == "transfer":
            fill(module, self.path, 0)
        if self.rival == "width":
            nets = [piece.build(0) for piece in pieces(problem, Decomposition.of(self.config["decomposition"]).n_parts)]
            for number, net in enumerate(nets):
                fill(net, self.path / "pieces", number)
            compose(module, nets)
        return module


def train_rivals(problem: Classifier, joined: Subnets, path: Path, rivals: Sequence[str], run: Callable) -> None:
    """Train them on the lab; `joined`, which is saved in `path`, gets the networks, and a row for each in its table."""
    config, own = joined.config, joined.summary()
    epochs = max(row["epochs"] for row in joined.part_rows)
    before = {"transfer": (own["t_par"], own["wall_s"], epochs)}
    if "width" in rivals:
        before["width"] = _train_pieces(problem, joined, path, run)
    (path / "rivals" / checkpoints.FOLDER).mkdir(parents=True)
    longer = {"long": config | {"epochs": 2 * config["epochs"]}}
    jobs = [Job(rival, problem, longer.get(rival, config), path, "rivals", number) for number, rival in enumerate(rivals)]
    for job, row in zip(jobs, run(train_rival, jobs), strict=True):
        for name, spent in zip(("seconds", "wall_s", "epochs"), before.get(job.rival, (0.0, 0.0, 0)), strict=True):
            row[name] += spent
        joined.rows.append({"model": RIVALS[job.rival], **row})
        module = joined.rivals[job.rival] = make_rival(job.rival, config, problem.model, problem.model_args)
        fill(module, path / job.place, job.number)


def _train_pieces(problem: Classifier, joined: Subnets, path: Path, run: Callable) -> tuple[float, float, int]:
    """Train as many pieces of the global network as there are parts; seconds of the longest, what passed here, and epochs."""
    (path / "pieces" / checkpoints.FOLDER).mkdir(parents=True)
    nets, config = pieces(problem, joined.decomposition.n_parts), joined.config
    started = time.perf_counter()
    jobs = [
        Job("global", net, config | {"seed": part_seed(config["seed"], number)}, path, "pieces", number)
        for number, net in enumerate(nets)
    ]
    rows = run(train_rival, jobs)
    wall = time.perf_counter() - started
    return max(row["seconds"] for row in rows), wall, max(row["epochs"] for row in rows)


def train_rival(job: Job, worker: Worker) -> dict[str, Any]:
    """Runs on a worker: train a rival, leave its weights in the folder of the run, and give its row, without its name."""
    problem, config, seed = job.problem, job.config, job.config["seed"]
    slowness, module = prepare_alone(worker, config, seed), job.build()
    settings = {"epochs": config["epochs"], "patience": config["patience"], "seed": seed}
    train, held = problem.train_indices(), problem.score_indices()
    awaited = job.path / "parts", config["id"]
    settings |= {"device": worker.device, "after": slowness.after, "each": lambda *now: stopped(*awaited)}
    try:
        done = fit(problem, module, train, held, **settings)
    except ProblemError as error:
        raise ProblemError(f"rival {job.title!r}: {error}") from error
    if stopped(*awaited):
        return {}
    test = problem.test_indices()
    decided = outputs(problem, module, test, "test", worker.device).argmax(1)  # in float32, as `Subnets.predict` does
    checkpoints.write(job.path / job.place, job.number, flatten(module, "cpu")[0].numpy())
    return {
        "accuracy": float((decided == problem.dataset.labels("test")[test]).mean()),
        "parameters": n_parameters(module),
        "multiply_adds": multiply_adds(module, problem.dataset.shape),
        "epochs": done.epochs,
        "seconds": done.seconds,
        "wall_s": done.seconds,
    }
