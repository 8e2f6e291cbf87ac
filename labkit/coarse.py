"""The coarse level: from what N subnets say about the K classes to one decision.

    average probability   argmax_c  1/N sum_i p_i[c]                         p_i = softmax of the logits of subnet i
    majority vote         the class that is argmax_c p_i[c] for most i; of equal ones that with the larger sum_i p_i[c]
    coarse network        argmax_c  F(p_1, ..., p_N)[c]                      F: dense layers with ReLU and dropout

F learns from the outputs on samples that the subnets were not trained on ("held-out"), or, as in CNN-DNN, on those that they
were trained on ("same-split"), where they are surer than they should be. `Joined` is all of it as one torch module, which can
be trained on as a whole.

Used by `labkit.subnets` and `labkit.joined`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from labkit.decomposition import Window
from labkit.models import make_model
from labkit.problems import Classifier, Problem

INPUTS = ("probabilities", "logits")
STACKING = ("held-out", "same-split")
VOTES = ("coarse", "average", "majority")


def coarse_net(shape: tuple[int, int], n_classes: int, hidden: Sequence[int] = (64, 32), dropout: float = 0.3) -> nn.Module:
    """Dense layers over N x K outputs (`shape`): `hidden`, each with ReLU and dropout, then n_classes."""
    layers, inputs = [nn.Flatten()], math.prod(shape)
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout)]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, n_classes))


def inputs_of(logits: torch.Tensor, inputs: str) -> torch.Tensor:
    """What the coarse network sees of the logits (n, N, K)."""
    return logits.softmax(-1) if inputs == "probabilities" else logits


def average(logits: torch.Tensor) -> torch.Tensor:
    """The mean probabilities (n, K) of logits (n, N, K)."""
    return logits.softmax(-1).mean(1)


def majority(logits: torch.Tensor) -> torch.Tensor:
    """The share of votes (n, K) of logits (n, N, K), and in it a trace of the mean probability that decides between equals."""
    votes = F.one_hot(logits.argmax(-1), logits.shape[-1]).float().mean(1)
    # Shares differ by 1/N at least, mean probabilities by 1 at most.
    return votes + average(logits) / (2 * logits.shape[1])


class CoarseProblem(Classifier):
    """The coarse network on outputs that were computed before: sample i is row i of `logits` (n, N, K)."""

    def __init__(
        self,
        base: Problem,
        logits: np.ndarray,
        labels: np.ndarray,
        *,
        inputs: str,
        hidden: Sequence[int],
        dropout: float,
        lr: float,
    ) -> None:
        super().__init__(coarse_net, base.data, optimiser="adam", lr=lr, model_args={"hidden": hidden, "dropout": dropout})
        self.values, self.answers = inputs_of(torch.from_numpy(logits), inputs), torch.from_numpy(labels)
        self.base = base

    def build(self, seed: int) -> nn.Module:
        return make_model(self.model, tuple(self.values.shape[1:]), self.base.dataset.n_classes, self.model_args, seed)

    def load(self, indices: np.ndarray, split: str = "train", device: str | torch.device = "cpu") -> tuple:
        at = torch.from_numpy(indices)
        return self.values[at].to(device), self.answers[at].to(device)


class Joined(nn.Module):
    """Windows, subnets and coarse network as one graph: samples (n, C, H, W) to logits (n, K)."""

    def __init__(self, windows: Sequence[Window], subnets: Sequence[nn.Module], coarse: nn.Module, inputs: str) -> None:
        super().__init__()
        self.windows, self.inputs = list(windows), inputs
        self.subnets, self.coarse = nn.ModuleList(subnets), coarse

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """The logits (n, N, K) of the subnets."""
        return torch.stack([net(x[(..., *window)]) for net, window in zip(self.subnets, self.windows, strict=True)], 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decide(self.outputs(x))

    def decide(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits (n, K) of the coarse network for those (n, N, K) of the subnets."""
        return self.coarse(inputs_of(logits, self.inputs))
