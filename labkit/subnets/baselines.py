"""The baselines of joined subnets (`train_subnets` lists them): what else could have been trained with the same data.

Subnets are to be compared with "global", and what is trained in two stages, "transfer" and "width", with "long"; "small" shows
whether it is the subdomains that help, or fewer parameters; in "transfer" the subnets are a preconditioner. All train on all
training samples, also those that were held out for the coarse network. Their time and epochs are those of their own training; of
"transfer" also those of the subnets before it, of "width" also those of the longest of its channel groups. Weights do not pass
the scheduler: the workers leave them in the folder of the run, `baselines/` and `channel-groups/`.

The width decomposition cuts a network along its channels:

    group i of N     channels i, i + N, i + 2N, ... of every hidden layer; all layers, the whole image, the global label
    composed         a hidden layer: W[i::N, i::N] = W_i, zero between channels of two groups
                     the last layer: W[:, i::N] = W_i / N and b = mean b_i, so that its logits are the mean of those of the groups

(Gu, Zhang, Liu, Cai, Electron. Trans. Numer. Anal. 56, 2022, 157-186: sub-networks of the full depth and a share of the width are
trained without communication, and their weights start the global network, which is trained on: nonlinear preconditioning. They
prove that the start has the feature maps of the sub-networks, and bounds for its cost and accuracy by theirs.) This rests on the
abstract of the paper alone. There the sub-networks train on "decomposed samples"; that each sees the whole image here is our
choice, as are the zeros, the mean, and one seed for each group.

Every N-th channel, not N blocks: a zero-padded shortcut (`resnet20`) gives channel c of one stage to channel c of the next, and so
c belongs to the same group in both. The counts differ by one at most and sum to those of the whole, which therefore is exactly
the global architecture.

Used by `labkit.subnets.train`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labkit.cluster.lab import Worker
from labkit.errors import ProblemError
from labkit.imports import constructor_arguments
from labkit.models import MODELS, describe
from labkit.models.costs import multiply_adds, n_parameters
from labkit.models.flat import Flat
from labkit.problems import Classifier
from labkit.runs import checkpoints
from labkit.subnets.decomposition import Decomposition
from labkit.subnets.problem import subnet_seed
from labkit.subnets.result import BASELINES, Subnets, fill, make_baseline
from labkit.subnets.status import stopped
from labkit.training.local import fit, outputs
from labkit.training.worker.process import prepare_alone

FOLDER, GROUPS = "baselines", "channel-groups"  # in the folder of the run
CONVOLUTIONS, NORMS = (nn.Conv1d, nn.Conv2d, nn.Conv3d), (nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Job:
    """A baseline for a worker, or a channel group of "width"; its weights go to `folder` in that of the run, `path`, by number."""

    baseline: str
    problem: Classifier
    config: dict[str, Any]
    path: Path
    folder: str
    number: int

    def build(self) -> nn.Module:
        problem = self.problem
        module = make_baseline(self.baseline, self.config, problem.model, problem.model_args)
        if self.baseline == "transfer":
            fill(module, self.path, 0)
        if self.baseline == "width":
            n = Decomposition.of(self.config["decomposition"]).n_parts
            nets = [group.build(0) for group in channel_groups(problem, n)]
            for number, net in enumerate(nets):
                fill(net, self.path / GROUPS, number)
            compose(module, nets)
        return module


def train_baselines(problem: Classifier, joined: Subnets, path: Path, baselines: Sequence[str], run: Callable) -> None:
    """Train them on the lab by `run(function, jobs)`; `joined`, which is saved in `path`, gets the networks, and a row for each in
    its table."""
    config, own = joined.config, joined.summary()
    epochs = max(row["epochs"] for row in joined.part_rows)
    before = {"transfer": (own["t_par"], own["wall_s"], epochs)}
    if "width" in baselines:
        before["width"] = _train_groups(problem, joined, path, run)
    (path / FOLDER / checkpoints.FOLDER).mkdir(parents=True)
    longer = {"long": config | {"epochs": 2 * config["epochs"]}}
    jobs = [Job(name, problem, longer.get(name, config), path, FOLDER, number) for number, name in enumerate(baselines)]
    for job, row in zip(jobs, run(train_baseline, jobs), strict=True):
        for column, spent in zip(("seconds", "wall_s", "epochs"), before.get(job.baseline, (0.0, 0.0, 0)), strict=True):
            row[column] += spent
        joined.rows.append({"model": BASELINES[job.baseline], **row})
        module = joined.baselines[job.baseline] = make_baseline(job.baseline, config, problem.model, problem.model_args)
        fill(module, path / job.folder, job.number)


def _train_groups(problem: Classifier, joined: Subnets, path: Path, run: Callable) -> tuple[float, float, int]:
    """Train as many channel groups as there are subnets; seconds of the longest, wall time, and epochs."""
    (path / GROUPS / checkpoints.FOLDER).mkdir(parents=True)
    config, started = joined.config, time.perf_counter()
    jobs = [
        Job("global", group, config | {"seed": subnet_seed(config["seed"], number)}, path, GROUPS, number)
        for number, group in enumerate(channel_groups(problem, joined.decomposition.n_parts))
    ]
    rows = run(train_baseline, jobs)
    return max(row["seconds"] for row in rows), time.perf_counter() - started, max(row["epochs"] for row in rows)


def train_baseline(job: Job, worker: Worker) -> dict[str, Any]:
    """Runs on a worker: train a baseline, leave its weights in the folder of the run, and give its row, without its name."""
    problem, config, seed = job.problem, job.config, job.config["seed"]
    slowness, module = prepare_alone(worker, config, seed), job.build()
    settings = {"epochs": config["epochs"], "patience": config["patience"], "device": worker.device, "after": slowness.after}
    indices, training = (problem.train_indices(), problem.score_indices()), (job.path / "parts", config["id"])
    try:
        done = fit(problem, module, *indices, seed=seed, **settings, each=lambda *now: stopped(*training))
    except ProblemError as error:
        asked_for = "width" if job.folder == GROUPS else job.baseline  # a channel group is trained as a global network
        raise ProblemError(f"baseline {asked_for!r}: {error}") from error
    test = problem.test_indices()
    decided = outputs(problem, module, test, "test", worker.device).argmax(1)  # in float32, as `Subnets.predict` does
    if stopped(*training):  # asked when it is written: another training of this name may have begun
        return {}
    checkpoints.write(job.path / job.folder, job.number, Flat(module).vector.numpy())
    return {
        "accuracy": float((decided == problem.dataset.labels("test")[test]).mean()),
        "parameters": n_parameters(module),
        "multiply_adds": multiply_adds(module, problem.dataset.shape),
        "epochs": done.epochs,
        "seconds": done.seconds,
        "wall_s": done.seconds,
    }


# -- the width decomposition -------------------------------------------------------------------------------------------


def channel_groups(problem: Classifier, n: int) -> list[Classifier]:
    """The problem of each of n channel groups of the network of `problem`; ProblemError for a model that labkit cannot cut."""
    if not (isinstance(problem.model, str) and problem.model in MODELS):
        raise ProblemError(
            f"baseline 'width' cuts a network along its channels, which labkit can do for {', '.join(MODELS)} alone, not for "
            f"your model {describe(problem.model)}. Leave 'width' out of the baselines."
        )
    i, of = problem.model_args.get("piece", (0, 1))  # a group may be cut again
    return [
        Classifier(
            **{**constructor_arguments(problem), "model_args": {**problem.model_args, "piece": [i + of * group, of * n]}}
        )._folded(problem._fold)
        for group in range(n)
    ]


@torch.no_grad()
def compose(network: nn.Module, groups: Sequence[nn.Module]) -> None:
    """Give `network` the weights and the BatchNorm statistics of the channel groups that it was cut into, in order."""
    n, layers = len(groups), list(zip(*map(_layers, (network, *groups)), strict=True))
    every, own = [slice(None)] * n, [slice(i, None, n) for i in range(n)]
    channels = [layer.weight.shape[1] for layer in layers[0]]  # that come in: the image, and all groups see it whole
    for number, (whole, *shares) in enumerate(layers):
        if isinstance(whole, NORMS):
            for i, share in enumerate(shares):
                for name in ("weight", "bias", "running_mean", "running_var"):
                    getattr(whole, name)[own[i]] = getattr(share, name)
            continue
        last = number == len(layers) - 1
        rows, columns, factor = every if last else own, own if number else every, 1 / n if last else 1.0
        # A dense layer behind a map has a column for each pixel of each channel: (outputs, channels, pixels).
        weight, *weights = (layer.weight.unflatten(1, (c, -1)) for layer, c in zip((whole, *shares), channels, strict=True))
        weight.zero_()
        if whole.bias is not None:
            whole.bias.zero_()
        for i, share in enumerate(shares):
            weight[rows[i], columns[i]] += factor * weights[i]
            if whole.bias is not None:
                whole.bias[rows[i]] += factor * share.bias
        channels = [layer.weight.shape[0] for layer in (whole, *shares)]


def _layers(module: nn.Module) -> list[nn.Module]:
    """The layers with weights, in the order in which the named models use them."""
    return [layer for layer in module.modules() if isinstance(layer, (*CONVOLUTIONS, nn.Linear, *NORMS))]
