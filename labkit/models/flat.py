"""Flat weight vectors: all tensors of a module as views into one float32 vector, parameters first, then floating-point buffers.

    vector = [ weight of layer 1 | bias of layer 1 | ... | running mean | running variance | ... ]

So a pull is received straight into the model and a push is sent straight out of it. `layout.json` of a run holds the `Layout`.

Used by `labkit.training.worker.replica`, and by whoever turns a stored vector into a model (`labkit.training.run`, `labkit.training.evaluation`,
`labkit.training.train`, `labkit.training.resume`).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from labkit.errors import WorkerError


@dataclass(frozen=True)
class Layout:
    """Which entries of the flat vector belong to which tensor: parameters first, then floating-point buffers."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    n_params: int
    n_buffers: int

    @property
    def size(self) -> int:
        return self.n_params + self.n_buffers

    @property
    def blocks(self) -> tuple[int, ...]:
        """Sizes of the tensors that make the parameters, in their order."""
        sizes = [math.prod(shape) for shape in self.shapes]
        ends = itertools.accumulate(sizes)
        return tuple(size for size, end in zip(sizes, ends, strict=True) if end <= self.n_params)

    def split(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """Name -> array of its shape, as views into `flat`."""
        parts, start = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            n = int(np.prod(shape))
            parts[name], start = flat[start : start + n].reshape(shape), start + n
        return parts


def flatten(module: torch.nn.Module, device: str = "cpu") -> tuple[torch.Tensor, Layout]:
    """Move the module to `device` and make all its tensors views into one flat float32 vector, which is returned."""
    module.to(device)
    params = list(module.named_parameters())
    buffers = [(name, b) for name, b in module.named_buffers() if b.is_floating_point()]
    odd = [name for name, tensor in params + buffers if tensor.dtype != torch.float32]
    if odd:
        raise WorkerError(f"tensors {odd[:3]} are not float32. Keep float32 weights; use precision='bfloat16' for speed.")
    layout = Layout(
        tuple(name for name, _ in params + buffers),
        tuple(tuple(tensor.shape) for _, tensor in params + buffers),
        sum(tensor.numel() for _, tensor in params),
        sum(tensor.numel() for _, tensor in buffers),
    )
    flat, start = torch.empty(layout.size, device=device), 0
    for _, tensor in params + buffers:
        part = flat[start : start + tensor.numel()].view(tensor.shape)
        part.copy_(tensor.detach())
        tensor.data, start = part, start + tensor.numel()
    return flat, layout
