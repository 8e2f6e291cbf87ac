"""Domain decomposition: subnets trained without communication, each on its window of the input, and joined by a coarse network.

    subdomain i of the image -> subnet i, the global network made narrower -> K logits   i = 1..N, trained with the global label
    N x K outputs            -> coarse network -> decision                               trained when the subnets are done

(CNN-DNN: Klawonn, Lanser, Weber, SIAM J. Sci. Comput. 46(5), 2024, arXiv:2302.06564.) Weights of subnets do not pass the
scheduler: each worker leaves its own in the folder of the run, `parts/`, which all of them see.

    one subnet on one worker         plain training (`labkit.training.local`)
    several subnets on one worker    batches of one shape (`labkit.subnets.stacked`)
    one subnet on several workers    blocks of workers (`labkit.training.blocks`): a run of its own, `parts/<name>-part-3`, with any
                                     partition and update; with worker 0 alone, SGWU and UDPA it is plain training bit for bit

Used in notebooks; `labkit.subnets.result` is what comes out.
"""

import contextlib
import itertools
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
from labkit.errors import SEEDS, ClusterError, ProblemError, RunError, file_path, flag, instance, known, real, several, whole
from labkit.models import evaluating, seeded
from labkit.models.costs import multiply_adds, n_parameters
from labkit.models.flat import Flat
from labkit.names import named
from labkit.partition import make_partition
from labkit.plots.progress import following
from labkit.problems import Classifier
from labkit.problems.trial import Fingerprint
from labkit.runs import checkpoints
from labkit.runs.config import environment
from labkit.runs.files import write_json
from labkit.subnets.baselines import channel_groups, train_baselines
from labkit.subnets.coarse import INPUTS, STACKING, VOTES, CoarseProblem, Joined, Scaled, gather, subnet_outputs
from labkit.subnets.decomposition import Decomposition
from labkit.subnets.problem import WIDTH_RULES, Subnet, subnet_seed
from labkit.subnets.result import BASELINES, NAMES, Subnets, describe_problem, fill, make_joined, output_size
from labkit.subnets.stacked import check_batching, fit_together
from labkit.subnets.status import awaited, latest, report, stopped
from labkit.training.blocks import run_on_blocks
from labkit.training.local import Fit, fit, outputs
from labkit.training.run import Run
from labkit.training.train import check_shards, check_sources, choose, claim, configure, launch, leased, run_name, under_name
from labkit.training.worker.process import prepare_alone
from labkit.updates import make_update

LENGTH = {"epochs": 100, "patience": 15}  # of the training of a coarse network, which takes a second or two
LR = 1e-3  # of its Adam
MOST_WEIGHTS = 1 << 28  # of it: they, their gradients and the two means of Adam have 4 GB
TOTALS = {"parameters": sum, "multiply_adds": sum, "epochs": max, "seconds": max}  # of the subnets together
OUTPUTS = ("stack", "score", "test")  # the samples for which each subnet leaves its outputs
TEAM = {"n_workers": None, "partition": "idpa", "update": "agwu", "local_steps": None}  # the last three as in `train`


@named
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
    baselines: Sequence[str] = (),
    seed: int = 0,
    name: str | None = None,
    runs: str | Path = "runs",
    workers: Sequence[int] | None = None,
    team: Mapping[str, Any] | None = None,
    batched: int = 1,
    timeout: float = 3600.0,
    progress: bool = True,
) -> Subnets:
    """Train a subnet for each subdomain, as many at a time as there are workers, then the coarse network; returns when all is done.

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
        Of each subnet and each baseline. With a `patience`, training ends when the accuracy on the score set of the problem has
        not grown for so many epochs, and the best weights stay; None trains all epochs, and the last weights stay.
    stacking
        What the coarse network learns from: "held-out", outputs on every fifth training sample, which no subnet is trained on;
        "out-of-fold", outputs on all of them, each by a copy of the subnet that was trained without that third of the samples,
        which costs three times the training; or "same-split", outputs on the samples that the subnets are trained on, as in
        the paper.
    inputs, hidden, dropout
        Of the coarse network: "probabilities" (the paper), "logits" or "features" (what the last dense layer of a subnet sees);
        the widths of its hidden layers.
    baselines
        What to train besides, with as many epochs: "global" (the network on whole images), "long" (the same, with twice the
        epochs, which is what both stages of "transfer" have), "small" (the same, narrowed as a subnet is), "coherent" (subnets
        and coarse network as one graph from random weights), "transfer" (that graph from the trained weights), "width" (the
        global network from as many channel groups trained apart, Gu et al.; for the named models; `labkit.subnets.baselines`).
        They train on all training samples, and predict: `joined.predict(images, by="transfer")`. Average probability and
        majority vote are always there.
    seed
        Initial weights and orders of subnet i derive from (seed, i) alone: which worker trains it does not matter.
    name, runs
        All is recorded in `runs/name`, as `labkit.train` does; `labkit.load_subnets` reads it.
    workers, timeout
        Indices of the workers to use, by default all that are free; seconds that subnets and baselines may take each.
    team
        For subnets that are more than one worker can do: a block of several workers trains each of them, as a run of its own in
        `parts/`. For instance {"n_workers": 2, "partition": "idpa", "update": "agwu"}; also "local_steps", all as in
        `labkit.train`, with the same defaults (without an `n_workers` all are one block). There are as many blocks at work as
        there are workers for.
    batched
        For subnets that are too small for a worker: it trains up to so many of one shape at once (where that is faster:
        `labkit.subnets.stacked`). They learn what they would alone, up to rounding; `seconds` of each are then those of its batch.

    Subnets that take longest start first. A subnet whose worker is lost is trained again by another one, from its beginning; a
    block that loses a worker goes on without it.

    Examples
    --------
    >>> joined = labkit.train_subnets(problem, lab, labkit.Decomposition((2, 2), overlap=2), epochs=1)
    >>> joined.predict(np.zeros((5, 1, 8, 8), np.uint8)).shape
    (5,)
    """
    if type(problem) is not Classifier:
        raise TypeError(f"problem is a {type(problem).__name__}; subnets are made of a labkit.Classifier(...).")
    instance("lab", lab, Lab, " of labkit.connect(...)")
    decomposition, team = Decomposition.of(decomposition), None if team is None else instance("team", team, Mapping)
    stacking, inputs = known("stacking", stacking, STACKING), known("inputs", inputs, INPUTS)
    width_rule = known("width_rule", width_rule, WIDTH_RULES)
    epochs, hidden = whole("epochs", epochs), several("hidden", hidden, whole)
    batched, timeout = whole("batched", batched), real("timeout", timeout, above=0)
    patience = None if patience is None else whole("patience", patience)
    dropout, progress = real("dropout", dropout, least=0, below=1), flag("progress", progress)
    seed = whole("seed", seed, 0, SEEDS, error=ValueError)
    baselines = list(dict.fromkeys(several("baselines", baselines, partial(known, options=BASELINES))))
    runs, name = file_path("runs", runs), None if name is None else run_name(name)
    decomposition.windows(problem.dataset.shape)  # before there are as many subnets
    subnets = [Subnet.of(problem, decomposition, part, width_rule, stacking) for part in range(decomposition.n_parts)]
    if problem.ema is not None:
        raise ValueError(f"ema={problem.ema:g}: subnets have no global weights to average. Leave out ema.")
    if team is not None and patience is not None:
        raise ValueError(f"patience={patience}: what a team trains is not stopped early. Leave out patience, or team.")
    if team is not None and batched > 1:
        raise ValueError(
            f"batched={batched}: a subnet has several workers, or a worker several subnets. Leave out batched, or team."
        )
    _check_coarse(hidden, decomposition.n_parts, problem.dataset.n_classes)
    costs = _check_subnets(problem, subnets, seed, inputs, batched)
    if "width" in baselines:
        channel_groups(problem, len(subnets))[-1].build(seed)  # refused now, not when all subnets are trained
    default = f"subnets-{'x'.join(map(str, decomposition.grid))}-{width_rule}-seed{seed}"
    id = secrets.token_hex(8)
    workers = choose(lab, workers, runs / (name or default))
    team = None if team is None else _complete(team, subnets[0], workers)
    sources = check_sources(lab, problem)

    def record_as(name: str) -> Subnets:
        with leased(lab, workers, id, runs / name):
            try:
                path, lock = claim(runs, name, id)
                try:
                    return train_in(path)
                finally:
                    lock.release()
            finally:
                lab.release(id)

    def train_in(path: Path) -> Subnets:
        config = {
            "id": id,
            "name": path.name,
            **describe_problem(problem),
            "decomposition": decomposition.config(),
            "seed": seed,
        }
        config |= {"width_rule": width_rule, "epochs": epochs, "patience": patience, "stacking": stacking, "inputs": inputs}
        config |= {"hidden": hidden, "dropout": dropout, "team": team, "batched": batched, **lab.settings(workers)}
        config |= {"sources": sources} if sources else {}
        write_json(path / "config.json", config, run=id)
        write_json(path / "environment.json", environment(), run=id)
        run = partial(_map, lab, workers=workers, timeout=timeout)
        way = partial(_on_blocks, lab, workers, timeout, run) if team else partial(_in_batches, run, len(workers))
        (folder := path / "parts").joinpath(checkpoints.FOLDER).mkdir(parents=True)
        with awaited(folder, config["id"]):
            apart = team is None and not all(worker.here for worker in lab.workers)
            joined = _train(problem, subnets, costs, folder, config, way, progress, apart)
            joined.save(path)
            if baselines:
                train_baselines(problem, joined, path, baselines, run)
                joined.save(path)
        return joined

    return under_name(name, default, record_as)


def _map(lab: Lab, fn: Callable, items: Sequence[Any], *, workers: list[int], timeout: float, each: Any = None) -> list[Any]:
    """`fn(item, worker)` for each item on the lab; RunError where a worker stopped since no kernel waits for this training."""
    found = lab.map(fn, items, timeout, workers, placed=True, each=each)
    if not all(found):
        raise RunError("the folder of these subnets was replaced by another training of the same name. Give each its own: name=...")
    return found


def _check_coarse(hidden: list[int], n_parts: int, n_classes: int | None) -> None:
    """ValueError for a coarse network that no memory holds; refused now, and not when all subnets are trained."""
    widths = [n_parts * (n_classes or 1), *hidden, n_classes or 1]
    if (n := sum(one * next for one, next in itertools.pairwise(widths))) > MOST_WEIGHTS:
        raise ValueError(f"hidden={hidden}: the coarse network would have {n:.3g} weights. Use fewer, {MOST_WEIGHTS:,} at most.")


def _check_subnets(problem: Classifier, subnets: list[Subnet], seed: int, inputs: str, batched: int) -> list[int]:
    """Look for samples of all classes, and try one subnet of each shape; the multiply-adds of each subnet."""
    if problem.dataset.units is not None:
        raise ProblemError(
            f"subnets pick single samples, and data {problem.dataset.name!r} are read row group by row group. Use one file with stream=False."
        )
    if len(problem.dataset.inputs) > 1 or problem.dataset.label is None:
        raise ProblemError(
            f"subnets are of one input and of one label a sample; data {problem.dataset.name!r} have {problem.dataset.described()}."
        )
    problem.check(seed)
    one = subnets[0]
    for indices in (each.train_indices() for each in (problem, one, *one.copies())):
        if missing := sorted(set(range(problem.dataset.n_classes)) - set(problem.labels(indices).tolist())):
            raise ProblemError(
                f"classes {missing} of {problem.dataset.n_classes} have no sample among the {len(indices)} to train on with "
                f"stacking={one.stacking!r}, so nothing can learn them. Give more train_samples, or data with more of them."
            )
    shapes, costs = one.decomposition.shapes(problem.dataset.shape), {}
    for subnet, shape in zip(subnets, shapes, strict=True):
        if shape not in costs:
            subnet.check(seed)
            output_size(subnet.new_module(seed), shape, inputs)
            if batched > 1:
                check_batching(subnet, seed)
            costs[shape] = multiply_adds(subnet.new_module(seed), shape)
    return [costs[shape] for shape in shapes]


def _complete(team: Mapping[str, Any], problem: Subnet, workers: Sequence[int]) -> dict[str, Any]:
    """The settings of a block of workers, in full, for one of the subnets; ValueError, ClusterError or PartitionError where they
    make no sense."""
    for key in team:
        known("team", key, TEAM)
    team = TEAM | dict(team)
    n_workers = len(workers) if team["n_workers"] is None else whole("team n_workers", team["n_workers"])
    if n_workers > len(workers):
        raise ClusterError(f"a team of {n_workers} workers was asked for, and there are {len(workers)}: {list(workers)}.")
    steps = None if team["local_steps"] is None else whole("team local_steps", team["local_steps"])
    update, partition = make_update(team["update"]), make_partition(team["partition"])
    check_shards(problem, list(workers)[:n_workers], partition)
    return {"n_workers": n_workers, "partition": partition.config(), "update": update.config(), "local_steps": steps}


# -- on the workers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One subnet for a worker, or its copy without a fold; `cost` are its multiply-adds, `run` is the path of the run in which a
    block of workers has trained it, if one has."""

    problem: Subnet
    cost: int
    path: str
    config: Mapping[str, Any]
    run: str = ""
    fingerprint: Fingerprint | None = None  # of what the kernel builds; None where the workers are in its process

    @property
    def seed(self) -> int:
        return subnet_seed(self.config["seed"], self.problem.part)


def train_jobs(jobs: list[Job], worker: Worker) -> list[dict[str, Any]]:
    """Runs on a worker: train a subnet, or several of one shape at once; leave weights and outputs in `path`; a row for each.

    A subnet that is trained twice, since its first worker was lost, replaces the first: same seed, same weights.
    """
    config, seeds, problems = jobs[0].config, [job.seed for job in jobs], [job.problem for job in jobs]
    slowness = prepare_alone(worker, config, seeds[0])
    for job in jobs:
        if job.fingerprint:
            job.problem.check_same(job.seed, job.fingerprint)
    modules = [problem.new_module(seed) for problem, seed in zip(problems, seeds, strict=True)]
    settings = {"epochs": config["epochs"], "patience": config["patience"], "device": worker.device, "after": slowness.after}
    training = jobs[0].path, config["id"]
    each = [partial(report, *training, problem.number) for problem in problems]
    if len(jobs) > 1:
        fits = fit_together(problems, modules, seeds=seeds, **settings, each=each)
    else:
        indices = problems[0].train_indices(), problems[0].score_indices()
        fits = [fit(problems[0], modules[0], *indices, seed=seeds[0], **settings, each=each[0])]
    rows = [_store(*one, worker, worker.index, len(jobs)) for one in zip(jobs, modules, fits, strict=True)]
    return rows if all(rows) else []


def store_run(job: Job, worker: Worker) -> list[dict[str, Any]]:
    """Runs on a worker: what a block of workers has trained is left in `path` as if this worker had trained it alone."""
    prepare_alone(worker, job.config, job.seed)
    problem, run, epochs = job.problem, Run(job.run), job.config["epochs"]
    module = problem.new_module(job.seed)
    Flat(module, worker.device, run.config.exact_buffers).load(torch.from_numpy(run.flat().copy()))
    measured = problem.measure(module, problem.score_indices(), device=worker.device)
    done = Fit(epochs, epochs, measured["loss"], measured["score"], run.summary()["seconds"])
    row = _store(job, module, done, worker, ", ".join(str(member["index"]) for member in run.config["workers"]), 1)
    return [row] if row else []


def _store(job: Job, module: nn.Module, done: Fit, worker: Worker, trained_on: int | str, batched: int) -> dict[str, Any]:
    """Write the weights of a subnet and its outputs to disk; its row, or none where the folder is not this training's any more."""
    problem = job.problem
    wanted = {"stack": (problem.stack_indices(), "train")}
    if problem.fold is None:
        wanted |= {"score": (problem.score_indices(), "train"), "test": (problem.test_indices(), "test")}
    how = {"device": worker.device, "forward": partial(subnet_outputs, inputs=job.config["inputs"])}
    found = {name: outputs(problem, module, *samples, **how) for name, samples in wanted.items() if len(samples[0])}
    if stopped(job.path, job.config["id"]):
        return {}
    checkpoints.write(Path(job.path), problem.number, Flat(module).vector.numpy(), {"outputs": found})
    about = {"number": problem.number, "part": problem.part, "fold": problem.fold, "worker": trained_on, "batched": batched}
    return about | {"parameters": n_parameters(module), **asdict(done), "multiply_adds": job.cost}


# -- in the kernel -----------------------------------------------------------------------------------------------------


def _train(
    problem: Classifier,
    subnets: list[Subnet],
    costs: list[int],
    folder: Path,
    config: dict,
    way: Callable,
    progress: bool,
    apart: bool,
) -> Subnets:
    """Subnets on the lab, by `way(jobs, each=...)`, in other processes if `apart`; then the coarse network here."""
    jobs = [
        Job(each, cost, str(folder), config)
        for subnet, cost in zip(subnets, costs, strict=True)
        for each in (subnet, *subnet.copies())
    ]
    if apart:
        jobs = [replace(job, fingerprint=job.problem.fingerprint(job.seed)) for job in jobs]
    names, done = {job.problem.number: job.problem.called for job in jobs}, set()

    def ended(_: int, rows: list[dict]) -> None:
        for row in rows:
            done.add(row["number"])
            title = f"subnet {len(done)} of {len(jobs)}: {names[row['number']]} {subnets[0].decomposition.place(row['part'])}"
            how = f"held-out score {row['score']:.3f}, {row['seconds']:.1f} s on worker {row['worker']}"
            if progress:
                print(f"{title}, epoch {row['best']} of {row['epochs']}, {how}", flush=True)

    started = time.perf_counter()
    shown = following(partial(latest, folder), names, config["epochs"], done) if progress else contextlib.nullcontext()
    with shown:
        found = list(itertools.chain.from_iterable(way(jobs, each=ended)))
    wall = time.perf_counter() - started
    rows = sorted((row for row in found if row["fold"] is None), key=lambda row: row["part"])
    for row in rows:
        spent = [other["seconds"] / other["batched"] for other in found if other["part"] == row["part"] and other is not row]
        row |= {"folds_s": sum(spent)}
        del row["number"], row["fold"]
    module = make_joined(config, problem.model, problem.model_args)
    return _train_coarse(subnets, module, rows, folder, config, wall)


def _in_batches(run: Callable, n_workers: int, jobs: list[Job], *, each: Callable) -> list[list[dict]]:
    """Train subnets on a worker each, or in batches of one shape and the same samples that leave no worker idle; the rows of each
    batch."""
    most, kinds = min(jobs[0].config["batched"], -(-len(jobs) // n_workers)), {}
    for job in jobs:
        shape = tuple(cut.stop - cut.start for cut in job.problem.window)
        kinds.setdefault((shape, job.problem.fold), []).append(job)
    groups = []
    for alike in kinds.values():
        even = np.array_split(np.arange(len(alike)), -(-len(alike) // most))
        groups += [[alike[at] for at in group] for group in even]
    groups.sort(key=lambda group: -sum(job.cost for job in group))  # longest first
    return run(train_jobs, groups, each=each)


def _on_blocks(lab: Lab, workers: list[int], timeout: float, run: Callable, jobs: list[Job], *, each: Callable) -> list[list[dict]]:
    """Train subnets on blocks of workers, a run for each; the row of each, in a list."""
    jobs = sorted(jobs, key=lambda job: -job.cost)
    folder, config, epochs = Path(jobs[0].path), jobs[0].config, dict.fromkeys((job.problem.number for job in jobs), 0)
    team = config["team"]

    def start(job: Job, workers: list[int]) -> Run:
        name = f"{config['name']}-{job.problem.called.replace(' ', '-')}"
        update, partition = make_update(team["update"]), make_partition(team["partition"])
        length = {"passes": config["epochs"], "local_steps": team["local_steps"], "checkpoints": 1}
        settings = configure(job.problem, lab, workers, update, partition, name=name, seed=job.seed, **length)
        return launch(job.problem, lab, settings, update, partition, folder)

    def watch(job: Job, run: Run) -> None:
        number, status = job.problem.number, run.status()
        if (epoch := status.get("samples", 0) // run.config.n_train) > epochs[number]:
            epochs[number], members = epoch, status["workers"].values()
            latest = [[member[name] for member in members if member[name] is not None] for name in ("loss", "score")]
            means = [sum(found) / len(found) if found else None for found in latest]
            report(folder, config["id"], number, epoch, *means)
        if run.state != "running" and run.wait(10).state != "done":
            raise RunError(f"run {run.name} was {run.state}, so its subnet is not trained. Train the subnets again.")

    runs = run_on_blocks(lab, workers, team["n_workers"], jobs, start, watch, timeout=timeout)
    return run(store_run, [replace(job, run=str(one.path)) for job, one in zip(jobs, runs, strict=True)], each=each)


def _train_coarse(
    subnets: Sequence[Subnet], module: Joined, part_rows: list[dict], folder: Path, config: dict, wall: float
) -> Subnets:
    """Gather the subnets from `folder`, train the coarse network in `module` on their outputs, and measure."""
    problem, stored = subnets[0], [fill(net, folder, part)["outputs"] for part, net in enumerate(module.subnets)]
    for subnet, own in zip(subnets, stored, strict=True):
        if copies := subnet.copies():
            judged = [checkpoints.read_state(folder, copy.number)[1]["outputs"]["stack"] for copy in copies]
            own["stack"] = np.concatenate(judged)
    stack = np.concatenate([each.stack_indices() for each in problem.copies() or [problem]])
    held, test = problem.score_indices(), problem.test_indices()
    gathered = {
        name: gather([torch.tensor(own[name]) for own in stored], module.n_classes, module.inputs) for name in OUTPUTS
    }  # each: logits, inputs of the coarse network
    seen = torch.cat([gathered["stack"][1], gathered["score"][1]])
    task = CoarseProblem(problem, seen, torch.from_numpy(problem.labels(np.concatenate([stack, held]))), LR)
    if isinstance(scale := module.coarse[1], Scaled):
        scale.fitted(gathered["stack"][1])
    at = np.arange(len(seen))
    with seeded(config["seed"]):  # for dropout
        done = fit(task, module.coarse, at[: len(stack)], at[len(stack) :], **LENGTH, seed=config["seed"])
    answers, (logits, shown) = problem.dataset.labels("test")[test], gathered["test"]
    right = logits.numpy().argmax(-1) == answers[:, None]
    for row, own in zip(part_rows, right.T, strict=True):
        row |= {"accuracy": float(own.mean()), "place": list(subnets[0].decomposition.place(row["part"]))}
    with evaluating(module), torch.no_grad():
        decided = {by: module.decide(logits, shown, by).numpy().argmax(1) for by in VOTES}
    subnets_alone = {column: total(row[column] for row in part_rows) for column, total in TOTALS.items()} | {"wall_s": wall}
    rows = [{"model": NAMES[by], "accuracy": float((decided[by] == answers).mean())} | subnets_alone for by in VOTES]
    deep = {"parameters": n_parameters(module.coarse), "multiply_adds": multiply_adds(module.coarse, seen.shape[1:])}
    for column, more in (deep | {"seconds": done.seconds, "wall_s": done.seconds}).items():
        rows[VOTES.index("coarse")][column] += more
    sent = sum(own[name].nbytes for own in stored for name in ("stack", "score"))
    return Subnets(module, config | {"bytes_to_coarse": sent, "n_test": len(test)}, rows, part_rows)
