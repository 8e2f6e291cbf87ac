"""Subnets: a network trained in parts that never talk, each on its window of the input, and joined by a coarse network.

    part i of the image -> subnet i, the global architecture made narrower -> K logits    i = 1..N, trained with the global label
    N x K outputs       -> coarse network -> decision                                     trained when the subnets are done

(CNN-DNN: Klawonn, Lanser, Weber, SIAM J. Sci. Comput. 46(5), 2024, arXiv:2302.06564.) Weights of subnets do not pass the
scheduler: each worker leaves its own in the folder of the run, `parts/`, which all of them see.

A subnet that is more than one worker can do is trained by a team of them (`labkit.training.blocks`).

Used in notebooks; what comes out is in labkit/joined.py.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from labkit.cluster.lab import Lab, Worker
from labkit.errors import ProblemError, RunError, known, real, whole
from labkit.models.costs import multiply_adds, n_parameters
from labkit.models.flat import flatten
from labkit.plots.progress import awaited, following, stopped, tell
from labkit.problems import Classifier
from labkit.runs import checkpoints
from labkit.runs import events as record
from labkit.subnets.baselines import train_rivals
from labkit.subnets.channels import pieces
from labkit.subnets.coarse import INPUTS, STACKING, speak
from labkit.subnets.decomposition import Decomposition
from labkit.subnets.problem import FOLDS, WIDTH_RULES, Subnet, number_of, part_seed
from labkit.subnets.result import RIVALS, Subnets, describe_problem, make_joined, n_said, train_coarse
from labkit.subnets.stacked import check_batching, fit_together
from labkit.training.blocks import make_team, train_in_teams
from labkit.training.local import Fit, fit, outputs
from labkit.training.run import Run
from labkit.training.train import choose, claim, describe_lab, leased
from labkit.training.worker.process import prepare_alone


def train_subnets(
    problem: Classifier,
    lab: Lab,
    decomposition: Decomposition | Sequence[int] | Mapping[str, Any],
    *,
    width_rule: str = "sqrt",
    epochs: int = 10,
    patience: int | None = None,
    stacking: str = "held-out",
    inputs: str = "probabilities",
    hidden: Sequence[int] = (64, 32),
    dropout: float = 0.3,
    rivals: Sequence[str] = (),
    seed: int = 0,
    name: str | None = None,
    runs: str | Path = "runs",
    workers: Sequence[int] | None = None,
    team: Mapping[str, Any] | None = None,
    batched: int = 1,
    timeout: float = 3600.0,
    progress: bool = True,
) -> Subnets:
    """Train a subnet for each part, as many at a time as there are workers, then the coarse network; returns when all is done.

    Parameters
    ----------
    problem
        The global network: its model, data, batch size and optimiser are those of the subnets. A model of your own needs a
        keyword `width` that scales its layers, unless the width rule is "same".
    decomposition
        A `Decomposition`, or the grid of one without overlap.
    width_rule
        "sqrt", "linear" or "same": how much narrower a subnet is than the global network; see `labkit.subnets.problem`.
    epochs, patience
        Of each subnet and each rival. With a `patience`, training ends when the accuracy on the score set of the problem has
        not grown for so many epochs, and the best weights stay; None trains all epochs and keeps the last weights.
    stacking
        What the coarse network learns from: "held-out", outputs on every fifth training sample, which no subnet is trained on;
        "out-of-fold", outputs on all of them, each by a copy of the subnet that was trained without that third of the samples,
        which costs three times the training; or "same-split", outputs on the samples that the subnets are trained on, as in
        the paper.
    inputs, hidden, dropout
        Of the coarse network: "probabilities" (the paper), "logits" or "features" (what the last dense layer of a subnet sees);
        the widths of its hidden layers.
    rivals
        What to train besides, with as many epochs: "global" (the network on whole images), "long" (the same, with twice the
        epochs, which is what both stages of "transfer" have), "small" (the same, narrowed as a subnet is), "coherent" (subnets
        and coarse network as one graph from random weights), "transfer" (that graph from the trained weights), "width" (the
        global network from as many pieces cut along its channels and trained apart, Gu et al.; `labkit.subnets.channels`; for the
        named models). They train on all training samples, and predict: `joined.predict(images, by="transfer")`. Average probability
        and majority vote are always there.
    seed
        Initial weights and orders of part i derive from (seed, i) alone: which worker trains it does not matter.
    name, runs
        All is kept in `runs/name`, as `labkit.train` does; `labkit.load_subnets` reads it.
    workers, timeout
        Indices of the workers to use, by default all that are free; seconds that subnets and rivals may take each.

    team
        For subnets that are more than one worker can do: several train each of them together, as a run of its own in `parts/`.
        For instance {"n_workers": 2, "partition": "idpa", "update": "agwu"}; also "local_steps", all as in `labkit.train`, which
        has the same defaults (`n_workers`: all are one team). As many teams as there are workers for are at work at a time.
    batched
        For subnets that are too small for a worker: it trains up to so many of one shape at once (`labkit.subnets.stacked` says
        where that is faster). They learn what they would alone, up to rounding; `seconds` of each are then those of its batch.

    Subnets that take longest start first. A subnet whose worker is lost is trained again by another one, from its beginning; a
    team that loses a worker goes on without it.
    """
    problem, decomposition = _checked(problem, known("stacking", stacking, STACKING)), Decomposition.of(decomposition)
    known("width_rule", width_rule, WIDTH_RULES)
    known("inputs", inputs, INPUTS)
    if isinstance(rivals, str) or not hasattr(hidden, "__len__"):
        raise TypeError(f"rivals={rivals!r} and hidden={hidden!r} must be lists, such as ['transfer'] and [64, 32].")
    epochs, hidden = whole("epochs", epochs), [whole("hidden", width) for width in hidden]
    batched, timeout = whole("batched", batched), real("timeout", timeout, above=0)
    patience = None if patience is None else whole("patience", patience)
    real("dropout", dropout, least=0, below=1)
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or (seed := operator.index(seed)) < 0:
        raise ValueError(f"seed={seed!r} must be a whole number of at least 0.")
    rivals = list(dict.fromkeys(known("rivals", rival, RIVALS) for rival in rivals))
    parts = [Subnet.of(problem, decomposition, part, width_rule, stacking) for part in range(decomposition.n_parts)]
    if team is not None and patience is not None:
        raise ValueError(f"patience={patience}: what a team trains is not stopped early. Leave out patience, or team.")
    if team is not None and batched > 1:
        raise ValueError(
            f"batched={batched}: a subnet has several workers, or a worker several subnets. Leave out batched, or team."
        )
    costs = _check_parts(problem, parts, seed, inputs, batched)
    if "width" in rivals:
        pieces(problem, len(parts))[-1].build(seed)  # refused now, not when all subnets are trained
    name = name or f"subnets-{'x'.join(map(str, decomposition.grid))}-{width_rule}-seed{seed}"
    workers = choose(lab, workers, name)
    team = None if team is None else make_team(team, parts[0], workers)
    with leased(lab, workers, name):
        try:
            path = claim(Path(runs), name)
            config = {
                "id": secrets.token_hex(8),
                "name": name,
                **describe_problem(problem),
                "decomposition": decomposition.config(),
                "seed": seed,
            }
            config |= {"width_rule": width_rule, "epochs": epochs, "patience": patience, "stacking": stacking, "inputs": inputs}
            config |= {"hidden": hidden, "dropout": float(dropout), "team": team, "batched": batched, **describe_lab(lab, workers)}
            record.write_json(path / "config.json", config)
            record.write_json(path / "environment.json", record.environment())
            run = partial(_map, lab, workers=workers, timeout=timeout)
            way = partial(_in_teams, lab, workers, timeout, run) if team else partial(_in_batches, run, len(workers))
            (folder := path / "parts").joinpath(checkpoints.FOLDER).mkdir(parents=True)
            with awaited(folder, config["id"]):
                joined = _train(problem, parts, costs, folder, config, way, progress)
                joined.save(path)
                if rivals:
                    train_rivals(problem, joined, path, rivals, run)
                    joined.save(path)
            return joined
        finally:
            lab.release(name)


def _map(lab: Lab, fn: Callable, items: Sequence[Any], *, workers: list[int], timeout: float, each: Any = None) -> list[Any]:
    found = lab.map(fn, items, timeout, workers, placed=True, each=each)
    if not all(found):
        raise RunError("the folder of these subnets was taken by another training of the same name. Give each its own: name=...")
    return found


def _checked(problem: Any, stacking: str) -> Classifier:
    if type(problem) is not Classifier:
        raise TypeError(f"problem is a {type(problem).__name__}; subnets are made of a labkit.Classifier(...).")
    if problem.dataset.n_classes is not None:
        one = Subnet.of(problem, Decomposition((1, 1)), 0, stacking=stacking)
        copies = [one.without(fold) for fold in range(FOLDS)] if stacking == "out-of-fold" else [one]
        for indices in (problem.train_indices(), *(copy.train_indices() for copy in copies)):
            if missing := sorted(set(range(problem.dataset.n_classes)) - set(problem.labels(indices).tolist())):
                raise ProblemError(
                    f"classes {missing} of {problem.dataset.n_classes} have no sample among the {len(indices)} to train on with "
                    f"stacking={stacking!r}, so nothing can learn them. Give more train_samples, or data with more of them."
                )
    return problem


def _check_parts(problem: Classifier, parts: list[Subnet], seed: int, inputs: str, batched: int) -> list[int]:
    """Try one part of each shape; the multiply-adds of each part."""
    problem.check(seed)
    shapes, costs = parts[0].decomposition.shapes(problem.dataset.shape), {}
    for part, shape in zip(parts, shapes, strict=True):
        if shape not in costs:
            part.check(seed)
            n_said(part.build(seed), shape, inputs)
            if batched > 1:
                check_batching(part, seed)
            costs[shape] = multiply_adds(part.build(seed), shape)
    return [costs[shape] for shape in shapes]


# -- on the workers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One subnet for a worker, or its copy without a fold; `cost` are its multiply-adds, `run` is that of the team that has trained
    it, if one has."""

    problem: Subnet
    cost: int
    path: str
    config: Mapping[str, Any]
    run: str = ""

    @property
    def seed(self) -> int:
        return part_seed(self.config["seed"], self.problem.part)


def train_parts(jobs: list[Job], worker: Worker) -> list[dict[str, Any]]:
    """Runs on a worker: train a subnet, or several of one shape at once; leave weights and outputs in `path`, and tell how it went.

    A part that is trained twice, since its first worker was lost, takes the place of the first: same seed, same weights.
    """
    config, seeds, problems = jobs[0].config, [job.seed for job in jobs], [job.problem for job in jobs]
    slowness = prepare_alone(worker, config, seeds[0])
    modules = [problem.build(seed) for problem, seed in zip(problems, seeds, strict=True)]
    numbers = [problem.number for problem in problems]
    settings = {"epochs": config["epochs"], "patience": config["patience"], "device": worker.device, "after": slowness.after}
    place = jobs[0].path, config["id"]
    if len(jobs) > 1:
        each = lambda at, *now: tell(*place, numbers[at], *now)  # noqa: E731
        fits = fit_together(problems, modules, seeds=seeds, **settings, each=each)
    else:
        indices = problems[0].train_indices(), problems[0].score_indices()
        fits = [fit(problems[0], modules[0], *indices, seed=seeds[0], **settings, each=partial(tell, *place, numbers[0]))]
    if stopped(*place):
        return []
    return [_keep(*one, worker, worker.index, len(jobs)) for one in zip(jobs, modules, fits, strict=True)]


def keep_part(job: Job, worker: Worker) -> list[dict[str, Any]]:
    """Runs on a worker: what a team has trained is kept in `path` as if this worker had done it alone."""
    prepare_alone(worker, job.config, job.seed)
    problem, run, epochs = job.problem, Run(job.run), job.config["epochs"]
    module = problem.build(job.seed)
    flatten(module, worker.device)[0].copy_(torch.from_numpy(run.flat().copy()))
    measured = problem.measure(module, problem.score_indices(), device=worker.device)
    done = Fit(epochs, epochs, measured["loss"], measured["score"], run.summary()["seconds"])
    return [_keep(job, module, done, worker, ", ".join(str(member["index"]) for member in run.config["workers"]), 1)]


def _keep(job: Job, module: nn.Module, done: Fit, worker: Worker, trained_on: int | str, batched: int) -> dict[str, Any]:
    """Weights and what the subnet says of samples to disk; its row."""
    problem = job.problem
    asked = {"stack": (problem.stack_indices(), "train")}
    if problem.fold is None:
        asked |= {"score": (problem.score_indices(), "train"), "test": (problem.test_indices(), "test")}
    how = {"device": worker.device, "speak": partial(speak, inputs=job.config["inputs"])}
    said = {name: outputs(problem, module, *where, **how) for name, where in asked.items() if len(where[0])}
    checkpoints.write(Path(job.path), problem.number, flatten(module, "cpu")[0].numpy(), {"said": said})
    about = {"part": problem.part, "fold": problem.fold, "worker": trained_on, "batched": batched}
    return about | {"parameters": n_parameters(module), **asdict(done), "multiply_adds": job.cost}


# -- in the kernel -----------------------------------------------------------------------------------------------------


def _train(
    problem: Classifier, parts: list[Subnet], costs: list[int], folder: Path, config: dict, way: Callable, progress: bool
) -> Subnets:
    """Subnets on the lab, by `way(jobs, each=...)`, then the coarse network here."""
    copies = [None, *range(FOLDS)] if config["stacking"] == "out-of-fold" else [None]
    everybody = [(part.without(fold), cost) for fold in copies for part, cost in zip(parts, costs, strict=True)]
    jobs = [Job(part, cost, str(folder), config) for part, cost in everybody]
    names, done = {job.problem.number: job.problem.called for job in jobs}, set()

    def told(_: int, rows: list[dict]) -> None:
        for row in rows:
            done.add(number := number_of(row["part"], len(parts), row["fold"]))
            if progress:
                print(
                    f"subnet {len(done)} of {len(jobs)}: {names[number]} {parts[0].decomposition.place(row['part'])}, epoch "
                    f"{row['best']} of {row['epochs']}, score {row['score']:.3f}, {row['seconds']:.1f} s on worker {row['worker']}",
                    flush=True,
                )

    started = time.perf_counter()
    with following(folder, names, config["epochs"], done) if progress else contextlib.nullcontext():
        found = list(itertools.chain.from_iterable(way(jobs, each=told)))
    wall = time.perf_counter() - started
    rows = sorted((row for row in found if row["fold"] is None), key=lambda row: row["part"])
    for row in rows:
        spent = [other["seconds"] / other["batched"] for other in found if other["part"] == row["part"] and other is not row]
        row |= {"folds_s": sum(spent)}
        del row["fold"]
    module = make_joined(config, problem.model, problem.model_args)
    return train_coarse(parts, module, rows, folder, config, wall)


def _in_batches(run: Callable, n_workers: int, jobs: list[Job], *, each: Callable) -> list[list[dict]]:
    """Train subnets on a worker each, or in batches of one shape and the same samples that leave no worker without; the rows of
    each batch."""
    most, kinds = min(jobs[0].config["batched"], -(-len(jobs) // n_workers)), {}
    for job in jobs:
        shape = tuple(cut.stop - cut.start for cut in job.problem.window)
        kinds.setdefault((shape, job.problem.fold), []).append(job)
    groups = []
    for alike in kinds.values():
        even = np.array_split(np.arange(len(alike)), -(-len(alike) // most))
        groups += [[alike[at] for at in part] for part in even]
    groups.sort(key=lambda group: -sum(job.cost for job in group))  # longest first
    return run(train_parts, groups, each=each)


def _in_teams(lab: Lab, workers: list[int], timeout: float, run: Callable, jobs: list[Job], *, each: Callable) -> list[list[dict]]:
    """Train subnets in teams; the row of each, in a list."""
    jobs = sorted(jobs, key=lambda job: -job.cost)
    folder, config = Path(jobs[0].path), jobs[0].config
    problems, seeds = [job.problem for job in jobs], [job.seed for job in jobs]
    names = [f"{config['name']}-{problem.called.replace(' ', '-')}" for problem in problems]
    length, epochs = {"passes": config["epochs"], "timeout": timeout}, [0] * len(jobs)

    def look(number: int, run: Run) -> None:
        status, n_train = run.status(), run.config["n_train"]
        if (epoch := status.get("samples", 0) // n_train) > epochs[number]:
            epochs[number], workers = epoch, status["workers"].values()
            told = [[worker[name] for worker in workers if worker[name] is not None] for name in ("loss", "score")]
            means = [sum(found) / len(found) if found else None for found in told]
            tell(folder, config["id"], problems[number].number, epoch, *means)

    runs = train_in_teams(problems, seeds, names, lab, workers, config["team"], folder=folder, each=look, **length)
    return run(keep_part, [replace(job, run=str(one.path)) for job, one in zip(jobs, runs, strict=True)], each=each)
