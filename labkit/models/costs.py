"""What a network costs: its parameters, and the multiply-adds of one sample.

    convolution: values of its output x channels of one group x size of its kernel      dense layer: outputs x inputs

By torch's own formulas (`torch.utils.flop_counter`), which cover attention and other products of matrices too. Activations,
normalisations, pooling and biases are left out, as is usual.

Used by `labkit.subnets`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from labkit.models import evaluating


def n_parameters(module: nn.Module) -> int:
    """Trained numbers; buffers such as running means are none."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def multiply_adds(module: nn.Module, shape: Sequence[int]) -> int:
    """Of one forward pass of one sample of `shape`; a layer that is used twice counts twice."""
    device = next(module.parameters()).device
    with evaluating(module) as plain, _Counter() as counter:
        plain(torch.zeros(1, *shape, device=device))
    return counter.operations // 2


class _Counter(TorchDispatchMode):
    """Counts the operations of this thread, a multiplication and an addition as two.

    torch's FlopCounterMode hooks every module of the process while it counts, those that other threads train too.
    """

    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func.overloadpacket):
            self.operations += formula(*args, **(kwargs or {}), out_val=out)
        return out
