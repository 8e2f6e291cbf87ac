"""The normalisation of a data set as the first layer of a network, so that it takes samples as they were given.

    x raw  ->  (x - centre) * rate, for each channel  ->  network  ->  outputs

Plain modules with buffers, so that the whole can be saved, exported (`torch.export`, ONNX) and moved to a device.

Used by `labkit.training.run` and `labkit.subnets.result`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn


class Normalise(nn.Module):
    """(x - centre) * rate with a number for each channel (axis 1), and of x a window, if there is one (slices behind the channels)."""

    def __init__(self, centre: np.ndarray, rate: np.ndarray, n_axes: int, window: Sequence[slice] = ()) -> None:
        super().__init__()
        wide = (-1, *(1,) * (n_axes - 1))
        self.register_buffer("centre", torch.tensor(np.asarray(centre, np.float32).reshape(wide)))
        self.register_buffer("rate", torch.tensor(np.asarray(rate, np.float32).reshape(wide)))
        self.window = tuple(window)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[(..., *self.window)] if self.window else x
        return (x.to(self.centre.dtype) - self.centre) * self.rate


class Normalised(nn.Module):
    """A network that takes samples as they were given: `network(normalise(x))`; of several inputs x is a tuple, and the
    network is called with each of them.

    Attributes
    ----------
    network : the network alone, from normalised samples to outputs; `run.weights()` has the names of its tensors, so
        `other.load_state_dict(run.model().network.state_dict())` fills another network of the kind.
    normalise : the first layer, or one for each of several inputs.
    shapes : of one sample of each input, channels first; a single channel may be left out, (n, H, W) for (n, 1, H, W).
    """

    def __init__(self, network: nn.Module, layers: Sequence[nn.Module], shapes: Sequence[Sequence[int | None]] = ()) -> None:
        """`shapes`: of one sample of each input, as the network takes it; where they are given, inputs are held to them."""
        super().__init__()
        self.normalise = layers[0] if len(layers) == 1 else nn.ModuleList(layers)
        self.network, self.shapes = network, [tuple(shape) for shape in shapes]

    def forward(self, x: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
        parts = x if isinstance(self.normalise, nn.ModuleList) else (x,)
        if self.shapes:
            parts = tuple(_with_channel(part, shape) for part, shape in zip(parts, self.shapes, strict=True))
        layers = self.normalise if isinstance(self.normalise, nn.ModuleList) else (self.normalise,)
        return self.network(*(layer(part) for layer, part in zip(layers, parts, strict=True)))


def _with_channel(x: torch.Tensor, shape: tuple[int | None, ...]) -> torch.Tensor:
    """Samples (n, *shape); where the single channel of `shape` was left out it is put in. ValueError for another number of axes."""
    if x.dim() == len(shape) + 1:
        return x
    if x.dim() == len(shape) > 1 and shape[0] == 1:
        return x[:, None]
    takes = f"(n, {', '.join('any' if size is None else str(size) for size in shape)})"
    one = " For one sample give x[None]." if x.dim() == len(shape) else ""
    raise ValueError(f"x has shape {tuple(x.shape)}; this network takes {takes}, channels first.{one}")
