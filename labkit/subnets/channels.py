"""The width decomposition: a network cut along its channels, its pieces trained apart, then put together and trained on.

    piece i of N     channels i, i + N, i + 2N, ... of every hidden layer; all layers, the whole image, the global label
    composed         a hidden layer: W[i::N, i::N] = W_i, zero between channels of two pieces
                     the last layer: W[:, i::N] = W_i / N and b = mean b_i, so that its logits are the mean of those of the pieces

(Gu, Zhang, Liu, Cai, Electron. Trans. Numer. Anal. 56, 2022, 157-186: sub-networks of the full depth and a part of the width are
trained without communication, and their weights start the global network, which is trained on: nonlinear preconditioning. They
prove that the start has the feature maps of the sub-networks, and bounds for its cost and accuracy by theirs.) This rests on the
abstract of the paper alone. There the sub-networks train on "decomposed samples"; that each sees the whole image here is our
choice, as are the zeros, the mean, and one seed for each piece.

Every N-th channel, not N blocks: a zero-padded shortcut (`resnet20`) gives channel c of one stage to channel c of the next, and so
c belongs to the same piece in both. The counts differ by one at most and sum to those of the whole, which therefore is exactly
the global architecture.

Used by `labkit.subnets.baselines`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from labkit.errors import ProblemError
from labkit.models import MODELS, describe
from labkit.problems import Classifier
from labkit.problems.settings import kept_arguments

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm2d, nn.BatchNorm3d)


def pieces(problem: Classifier, n: int) -> list[Classifier]:
    """The problem of each of n pieces of the network of `problem`; ProblemError for a model whose channels labkit does not know."""
    if not (isinstance(problem.model, str) and problem.model in MODELS):
        raise ProblemError(
            f"rival 'width' cuts a network along its channels, and labkit knows those of {', '.join(MODELS)} alone, not those of "
            f"your model {describe(problem.model)}. Leave 'width' out of the rivals."
        )
    i, of = problem.model_args.get("piece", (0, 1))  # a piece may be cut again
    return [
        Classifier(**{**kept_arguments(problem), "model_args": {**problem.model_args, "piece": [i + of * part, of * n]}})
        for part in range(n)
    ]


@torch.no_grad()
def compose(network: nn.Module, subnets: Sequence[nn.Module]) -> None:
    """Give `network` the weights and the BatchNorm statistics of the pieces that it was cut into, in order."""
    n, layers = len(subnets), list(zip(*map(_layers, (network, *subnets)), strict=True))
    every, own = [slice(None)] * n, [slice(i, None, n) for i in range(n)]
    channels = [layer.weight.shape[1] for layer in layers[0]]  # that come in: the image, and all pieces see it whole
    for number, (whole, *parts) in enumerate(layers):
        if isinstance(whole, NORMS):
            for i, part in enumerate(parts):
                for name in ("weight", "bias", "running_mean", "running_var"):
                    getattr(whole, name)[own[i]] = getattr(part, name)
            continue
        last = number == len(layers) - 1
        rows, columns, share = every if last else own, own if number else every, 1 / n if last else 1.0
        # A dense layer behind a map has a column for each pixel of each channel: (outputs, channels, pixels).
        weight, *weights = (layer.weight.unflatten(1, (c, -1)) for layer, c in zip((whole, *parts), channels, strict=True))
        weight.zero_()
        if whole.bias is not None:
            whole.bias.zero_()
        for i, part in enumerate(parts):
            weight[rows[i], columns[i]] += share * weights[i]
            if whole.bias is not None:
                whole.bias[rows[i]] += share * part.bias
        channels = [layer.weight.shape[0] for layer in (whole, *parts)]


def _layers(module: nn.Module) -> list[nn.Module]:
    """The layers with weights, in the order in which the named models use them."""
    return [layer for layer in module.modules() if isinstance(layer, (*CONVOLUTIONS, nn.Linear, *NORMS))]
