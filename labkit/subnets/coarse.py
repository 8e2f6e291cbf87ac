"""The coarse level: from the outputs of N subnets for K classes to one decision.

    average probability   argmax_c  1/N sum_i p_i[c]                         p_i = softmax of the logits of subnet i
    majority vote         the class that is argmax_c p_i[c] for most i; of equal ones that with the larger sum_i p_i[c]
    coarse network        argmax_c  F(p_1, ..., p_N)[c]                      F: dense layers with ReLU and dropout

Instead of the probabilities p_i of the paper F may see the logits, or the features: what the last dense layer of a subnet sees,
which for networks that end in a pooling layer are pooled features. F learns from outputs on samples that the subnets were not
trained on ("held-out", "out-of-fold"), or, as in CNN-DNN, on those that they were trained on ("same-split"), where they are surer
than they should be. `Joined` is all of it as one torch module, which can be trained on as a whole.

Used by `labkit.subnets.train` and `labkit.subnets.result`.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from labkit.errors import ProblemError
from labkit.problems import Classifier, Problem
from labkit.subnets.decomposition import Window

INPUTS = ("probabilities", "logits", "features")
STACKING = ("held-out", "out-of-fold", "same-split")
VOTES = ("coarse", "average", "majority")


class Scaled(nn.Module):
    """(x - centre) * rate, a number each for every input; leaves x as it is until it is `fitted` to samples."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(n))
        self.register_buffer("rate", torch.ones(n))

    def fitted(self, x: torch.Tensor) -> None:
        """Give the samples x (m, n) mean 0 and spread 1; an input that never changes stays unscaled."""
        spread, self.centre[:] = x.std(0, unbiased=False), x.mean(0)
        self.rate[:] = torch.where(spread > 1e-6, 1 / spread, 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.centre) * self.rate


def coarse_net(
    shape: tuple[int, ...], n_classes: int, hidden: Sequence[int] = (64, 32), dropout: float = 0.3, scaled: bool = False
) -> nn.Module:
    """Dense layers over the outputs of the subnets, (N, K) or (features,): `hidden`, each with ReLU and dropout, then n_classes."""
    layers, inputs = [nn.Flatten()], math.prod(shape)
    if scaled:
        layers.append(Scaled(inputs))
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout)]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, n_classes))


def subnet_outputs(net: nn.Module, x: torch.Tensor, inputs: str) -> torch.Tensor:
    """The logits (n, K) of a subnet, and beside them its F features, (n, K + F), where they are wanted."""
    if inputs != "features":
        return net(x)
    features: list[torch.Tensor] = []
    dense = [layer for layer in net.modules() if isinstance(layer, nn.Linear)]
    if not dense:
        raise ProblemError('the model has no dense layer (torch.nn.Linear) to read features before. Give inputs="logits".')
    hook = dense[-1].register_forward_pre_hook(lambda _, given: features.append(given[0]))
    try:
        logits = net(x)
    finally:
        hook.remove()
    if not features:
        raise ProblemError('the last dense layer of the model is not used when it is called. Give inputs="logits".')
    return torch.cat([logits, features[-1].flatten(1)], 1)


def gather(outputs: Sequence[torch.Tensor], n_classes: int, inputs: str) -> tuple[torch.Tensor, torch.Tensor]:
    """From the outputs of each subnet, (n, K) or (n, K + F): their logits (n, N, K), and the inputs of the coarse network."""
    logits = torch.stack([one[:, :n_classes] for one in outputs], 1)
    if inputs == "features":
        return logits, torch.cat([one[:, n_classes:] for one in outputs], 1)
    return logits, logits.softmax(-1) if inputs == "probabilities" else logits


def average(logits: torch.Tensor) -> torch.Tensor:
    """The mean probabilities (n, K) of logits (n, N, K)."""
    return logits.softmax(-1).mean(1)


def majority(logits: torch.Tensor) -> torch.Tensor:
    """The share of votes (n, K) of logits (n, N, K), and in it a trace of the mean probability that decides between equals."""
    votes = F.one_hot(logits.argmax(-1), logits.shape[-1]).float().mean(1)
    # Shares differ by 1/N at least, mean probabilities by 1 at most.
    return votes + average(logits) / (2 * logits.shape[1])


class CoarseProblem(Classifier):
    """The coarse network on outputs that were computed before: sample i is row i of `seen`, (n, N, K) or (n, features)."""

    def __init__(self, base: Problem, seen: torch.Tensor, labels: torch.Tensor, lr: float) -> None:
        super().__init__(coarse_net, base.data, optimiser="adam", lr=lr)
        self.seen, self.labelled = seen, labels

    def load(self, indices: np.ndarray, split: str = "train", device: str | torch.device = "cpu") -> tuple:
        at = torch.from_numpy(indices)
        return self.seen[at].to(device), self.labelled[at].to(device)


class Joined(nn.Module):
    """Windows, subnets and coarse network as one graph: samples (n, C, H, W) to logits (n, K)."""

    def __init__(self, windows: Sequence[Window], subnets: Sequence[nn.Module], coarse: nn.Module, inputs: str) -> None:
        super().__init__()
        self.windows, self.inputs, self.n_classes = list(windows), inputs, coarse[-1].out_features
        self.subnets, self.coarse = nn.ModuleList(subnets), coarse

    def outputs(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits (n, N, K) of the subnets, and the inputs of the coarse network."""
        cut = zip(self.subnets, self.windows, strict=True)
        return gather([subnet_outputs(net, x[(..., *window)], self.inputs) for net, window in cut], self.n_classes, self.inputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.coarse(self.outputs(x)[1])

    def decide(self, logits: torch.Tensor, seen: torch.Tensor, by: str) -> torch.Tensor:
        """The score of each class (n, K) by one of `VOTES`."""
        if by == "coarse":
            return self.coarse(seen).softmax(-1)
        return average(logits) if by == "average" else majority(logits)
