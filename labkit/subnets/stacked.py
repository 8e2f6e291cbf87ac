"""Several subnets of one shape trained at once on one device: one pass of torch.func through all of them.

    weight of a layer    W (M, *shape), row i of module i         convolutions of all become one in M groups
    logits               vmap(module)(W, x (M, n, C, h, w))       (M, n, K): each module sees its own samples only
    gradient             of sum_i mean_n loss[i, n]               row i is what module i alone would have got
    update               elementwise (SGD, Adam, AdamW), so one optimiser over the stacked tensors is M optimisers

Each subnet has its own order of samples, so it learns what it learns alone, up to rounding (one with dropout draws other
numbers). One that has stopped early goes on computing until all have.

A small network leaves a core idle between its many little layers; a stack of them has as many layers and more to do in each.
Measured on one thread of a CPU that others used too (batches of 64, 32x32 images, width rule "sqrt"), time one after the other /
time together, medians:

    windows   subnets at once    LeNet            VGG3             ResNet20
    8x8       4, 8, 16           1.1  1.4  1.5    1.5  1.9  2.0    1.6  2.0  2.3
    16x16     4                  0.8 to 1.3       1.0              1.2

So it pays where maps are small and layers many, and not where a layer fills a core. It was not measured on GPUs.

Used by `labkit.subnets.train`.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from labkit.errors import LabError, ProblemError
from labkit.problems import Clock, evaluating
from labkit.problems.problem import draws, noise
from labkit.subnets.problem import Subnet
from labkit.training.local import Fit, fit_epochs

CLOSE = {"rtol": 1e-3, "atol": 1e-4}  # of logits: rounding, and no more


class Stack(nn.Module):
    """M modules of one kind as one: (M, n, *shape) to logits (M n, K), module after module.

    The tensors of the modules become views of the stacked ones, so each of them can be measured by itself at any time.
    """

    def __init__(self, modules: Sequence[nn.Module], device: str = "cpu") -> None:
        super().__init__()
        modules = [module.to(device) for module in modules]
        # A copy: functional_call leaves its own tensors in a layer that occurs twice. In a tuple torch does not see it.
        self.skeleton = (copy.deepcopy(modules[0]),)
        self.stacked: dict[str, torch.Tensor] = {}
        for named in zip(*([*module.named_parameters(), *module.named_buffers()] for module in modules), strict=True):
            (name, first), own = named[0], [tensor for _, tensor in named]
            together = torch.stack([tensor.detach() for tensor in own])
            for tensor, row in zip(own, together, strict=True):
                tensor.data = row
            if isinstance(first, nn.Parameter):
                together = nn.Parameter(together, requires_grad=first.requires_grad)
                self.register_parameter(name.replace(".", "/"), together)
            self.stacked[name] = together
        self.logits: torch.Tensor | None = None  # of the latest samples, (M, n, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def call(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            return functional_call(self.skeleton[0], tensors, (x,))

        logits = vmap(call, randomness="different")(self.stacked, x)
        self.logits = logits.detach()
        if logits.requires_grad:  # the loss will be the mean over M n samples: each module is to get that over its n
            logits.register_hook(lambda gradient: gradient * len(x))
        return logits.flatten(0, 1)

    def losses(self, y: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of each module (M,) on the latest samples, whose classes are y (M, n)."""
        loss = F.cross_entropy(self.logits.flatten(0, 1).float(), y.flatten(), reduction="none")
        return loss.view(y.shape).mean(1)

    def row(self, number: int) -> "Row":
        """The state of one module."""
        return Row([tensor.data[number] for tensor in self.stacked.values()])


class Row:
    """The tensors of one module among those of all (`labkit.training.local.State`)."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = tensors

    def saved(self) -> list[torch.Tensor]:
        return [tensor.clone() for tensor in self.tensors]

    def load(self, saved: list[torch.Tensor]) -> None:
        for tensor, value in zip(self.tensors, saved, strict=True):
            tensor.copy_(value)


def fit_together(problems: Sequence[Subnet], modules: Sequence[nn.Module], *, device: str = "cpu", **settings: Any) -> list[Fit]:
    """As `labkit.training.local.fit` for each of the modules, in place, all in one pass: `settings` as of `fit_epochs`; `seconds`
    are those of all together."""
    problem, stack = problems[0], Stack(modules, device)
    optimisers, states = problem.optimisers(stack), [stack.row(number) for number in range(len(modules))]
    generators = [draws(seed, 0) for seed in settings["seeds"]]

    def step(drawn: list[np.ndarray], clock: Clock) -> torch.Tensor:
        loaded = [own.draw(batch, device, of) for own, batch, of in zip(problems, drawn, generators, strict=True)]
        x, y = (torch.stack(tensors) for tensors in zip(*loaded, strict=True))
        problem.step(stack, (x, y.flatten()), optimisers, clock)
        return stack.losses(y)

    samples = problem.train_indices(), problem.score_indices()
    return fit_epochs(problems, modules, states, step, *samples, device=device, **settings)


def check_batching(problem: Subnet, seed: int) -> None:
    """Try a step of two modules at once, and whether each still gives the logits that it gives alone; ProblemError if not."""
    modules = [problem.new_module(seed), problem.new_module(seed + 1)]
    title = f"part {problem.part} of {problem.decomposition!r}: {problem._title()} cannot be trained in a batch of subnets"
    alone = {name: value for name, value in problem.unwritten.items() if name in ("loss", "clip_norm", "accumulate", "inner")}
    if changed := [name for name, value in alone.items() if getattr(problem, name) != value]:
        raise ProblemError(f"{title}: {changed[0]} would be of all of them together. Leave out batched.")
    if problem.optimiser not in ("sgd", "adam", "adamw"):
        raise ProblemError(f"{title}: its optimiser may not work element by element, as sgd, adam and adamw do. Leave out batched.")
    x, y = problem.load(problem.train_indices()[:2])
    try:
        stack = Stack(modules)
        problem.step(stack, (torch.stack([x, x]), torch.cat([y, y])), problem.optimisers(stack), Clock(0, 1, 0.0, noise(seed, 0)))
        with evaluating(modules[0]), evaluating(modules[1]), evaluating(stack.skeleton[0]):
            together, apart = stack(torch.stack([x, x])), torch.cat([module(x) for module in modules])
    except LabError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise ProblemError(f"{title}: {reason} Leave out batched.") from error
    if not torch.allclose(together, apart, **CLOSE):
        raise ProblemError(f"{title}: its logits differ there by up to {(together - apart).abs().max():.2g}. Leave out batched.")
