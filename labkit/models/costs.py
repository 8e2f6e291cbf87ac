"""What a network costs: its parameters, and the multiply-adds of one sample.

    convolution: values of its output x channels of one group x size of its kernel      dense layer: outputs x inputs

Activations, normalisations, pooling and biases are left out, as is usual.

Used by `labkit.subnets.train`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from labkit.models import evaluating

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def n_parameters(module: nn.Module) -> int:
    """Trained numbers; buffers such as running means are none."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def multiply_adds(module: nn.Module, shape: Sequence[int]) -> int:
    """Of one forward pass of one sample of `shape`; a layer that is used twice counts twice."""
    counted = []

    def convolved(layer: nn.Module, _: tuple, out: torch.Tensor) -> None:
        counted.append(out.numel() * layer.in_channels // layer.groups * math.prod(layer.kernel_size))

    def multiplied(layer: nn.Module, _: tuple, out: torch.Tensor) -> None:
        counted.append(out.numel() * layer.in_features)

    hooks = [layer.register_forward_hook(convolved) for layer in module.modules() if isinstance(layer, CONVOLUTIONS)]
    hooks += [layer.register_forward_hook(multiplied) for layer in module.modules() if isinstance(layer, nn.Linear)]
    device = next(module.parameters()).device
    try:
        with evaluating(module) as plain:
            plain(torch.zeros(1, *shape, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return sum(counted)
