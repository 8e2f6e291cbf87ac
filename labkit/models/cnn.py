"""Four convolutional networks for images and volumes: LeNet, VGG3, VGG9 and ResNet20.

Each is a function `f(shape, n_classes, width=1.0, piece=(0, 1))`; `shape` is (channels, height, width) or (channels, depth,
height, width) and `width` scales every hidden layer. With `piece=(i, n)` it is the i-th of n networks that share the channels of
every hidden layer, a channel group each: channels i, i + n, i + 2n, ..., so that the n together have exactly those of the whole.
Pooling stands before the ReLU where a network has both: max and ReLU commute, value and gradient, and the ReLU then touches 4
times fewer numbers (8 times in volumes).

Used through the table in `labkit.models`; `piece` by `labkit.subnets`.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from itertools import count

import torch
from torch import nn
from torch.nn import functional as F

from labkit.errors import ProblemError

_KITS = {
    2: (nn.Conv2d, nn.MaxPool2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d),
    3: (nn.Conv3d, nn.MaxPool3d, nn.BatchNorm3d, nn.AdaptiveAvgPool3d),
}
Layer = tuple[str, int, int, int]  # name, kernel, stride, padding


def lenet(shape: tuple[int, ...], n_classes: int, width: float = 1.0, piece: Sequence[int] = (0, 1)) -> nn.Module:
    """LeNet as it is used today: two 5x5 convolutions (32, 64), each with a 2x2 max-pool, dense 256, dense n_classes.

    The convolutions are unpadded, as LeCun et al. (1998) have them; where a side is shorter than 16 pixels all are
    padded by 2, so that 8x8 digits work. The dense layer sees the whole last map (4x4x64 at 28x28), at any size.

    Parameters: 317,066 at (1, 28, 28) and 10 classes. Raises ProblemError below 4 pixels a side.

    Examples
    --------
    >>> net = labkit.models.lenet((1, 28, 28), 10)
    >>> net(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    conv, pool, _, _ = _kit("lenet", shape, n_classes, width)
    padding = 2 if min(shape[1:]) < 16 else 0
    layers = [("conv1", 5, 1, padding), ("pool1", 2, 2, 0), ("conv2", 5, 1, padding), ("pool2", 2, 2, 0)]
    size = _fit("lenet", shape, layers)
    scaled = partial(_scaled, "lenet", width, piece)
    first, second, hidden = scaled("conv1", 32), scaled("conv2", 64), scaled("dense1", 256)
    return _named(
        conv1=conv(shape[0], first, 5, padding=padding),
        pool1=pool(2),
        relu1=nn.ReLU(),
        conv2=conv(first, second, 5, padding=padding),
        pool2=pool(2),
        relu2=nn.ReLU(),
        flatten=nn.Flatten(),
        dense1=nn.Linear(second * math.prod(size), hidden),
        relu3=nn.ReLU(),
        dense2=nn.Linear(hidden, n_classes),
    )


def vgg3(shape: tuple[int, ...], n_classes: int, width: float = 1.0, piece: Sequence[int] = (0, 1)) -> nn.Module:
    """Three VGG blocks (two 3x3 convolutions and a max-pool) of 32, 64 and 128 channels, dense 128, dense n_classes.

    Parameters: 550,570 at (3, 32, 32) and 10 classes. See `vgg9` for what both have in common.

    Examples
    --------
    >>> net = labkit.models.vgg3((3, 32, 32), 10)
    >>> net(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    return _vgg("vgg3", shape, n_classes, width, piece, blocks=((32, 32), (64, 64), (128, 128)), dense=(128,))


def vgg9(shape: tuple[int, ...], n_classes: int, width: float = 1.0, piece: Sequence[int] = (0, 1)) -> nn.Module:
    """Six convolutions (32, 64, pool, 128, 128, pool, 256, 256, pool) and three dense layers (512, 512, n_classes).

    The VGG of Simonyan & Zisserman (2015) cut to 32x32 images: 3x3 convolutions with padding 1, no BatchNorm, so that
    all its weights are parameters, and no dropout. Weights start as in He et al. (2015); torch's default start is too
    small for nine layers. A last map of more than 4x4 is averaged down to 4x4, so large images do not blow up the
    dense layers.

    Parameters: 3,491,530 at (3, 32, 32) and 10 classes. Raises ProblemError below 8 pixels a side.

    Examples
    --------
    >>> net = labkit.models.vgg9((3, 32, 32), 10, width=0.5)
    >>> net(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    return _vgg("vgg9", shape, n_classes, width, piece, blocks=((32, 64), (128, 128), (256, 256)), dense=(512, 512))


def resnet20(shape: tuple[int, ...], n_classes: int, width: float = 1.0, piece: Sequence[int] = (0, 1)) -> nn.Module:
    """The 20-layer residual network of He et al. (2016) for CIFAR: three stages of three blocks, 16, 32, 64 channels.

    Shortcuts are the paper's option A: where a stage halves the map, the identity is subsampled and filled up with
    zero channels, without parameters. BatchNorm after each convolution, a global average before the dense layer.

    Parameters: 269,722 at (3, 32, 32) and 10 classes. Raises ProblemError below 5 pixels a side.

    Examples
    --------
    >>> net = labkit.models.resnet20((3, 32, 32), 10)
    >>> sum(parameter.numel() for parameter in net.parameters())
    269722
    """
    conv, _, norm, average = _kit("resnet20", shape, n_classes, width)
    # Below two pixels a side, BatchNorm could not train on a last batch of one sample.
    _fit("resnet20", shape, [("conv1", 3, 1, 1), ("stage2", 3, 2, 1), ("stage3", 3, 2, 1)], least=2)
    stages = ("conv1", 16), ("stage1", 16), ("stage2", 32), ("stage3", 64)
    channels = [_scaled("resnet20", width, piece, name, c) for name, c in stages]
    layers: dict[str, nn.Module] = {
        "conv1": conv(shape[0], channels[0], 3, padding=1, bias=False),
        "norm1": norm(channels[0]),
        "relu1": nn.ReLU(),
    }
    for stage in (1, 2, 3):
        inputs, outputs = channels[stage - 1], channels[stage]
        strides = (1 if stage == 1 else 2, 1, 1)
        blocks = [_Residual(inputs if i == 0 else outputs, outputs, s, conv, norm) for i, s in enumerate(strides)]
        layers[f"stage{stage}"] = nn.Sequential(*blocks)
    net = _named(**layers, pool=average(1), flatten=nn.Flatten(), dense=nn.Linear(channels[3], n_classes))
    for module in net.modules():
        if isinstance(module, conv):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


class _Residual(nn.Module):
    """relu(x + conv(relu(conv(x)))), each convolution with BatchNorm; the shortcut is option A."""

    def __init__(self, inputs: int, outputs: int, stride: int, conv: type[nn.Module], norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = conv(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = norm(outputs)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.stride > 1:
            x = x[(..., *[slice(None, None, self.stride)] * (x.dim() - 2))]
        if self.extra:
            x = F.pad(x, [0, 0] * (x.dim() - 2) + [0, self.extra])
        return F.relu(inner + x)


def _vgg(
    model: str,
    shape: tuple[int, ...],
    n_classes: int,
    width: float,
    piece: Sequence[int],
    blocks: tuple[tuple[int, ...], ...],
    dense: tuple[int, ...],
) -> nn.Module:
    conv, pool, _, average = _kit(model, shape, n_classes, width)
    size = _fit(model, shape, [(f"pool{block}", 2, 2, 0) for block in range(1, len(blocks) + 1)])
    layers: dict[str, nn.Module] = {}
    scaled, inputs = partial(_scaled, model, width, piece), shape[0]
    for block, widths in enumerate(blocks, start=1):
        for i, channels in enumerate(widths, start=1):
            outputs = scaled(name := f"conv{block}_{i}", channels)
            layers[name] = conv(inputs, outputs, 3, padding=1)
            if i == len(widths):
                layers[f"pool{block}"] = pool(2)
            layers[f"relu{block}_{i}"] = nn.ReLU()
            inputs = outputs
    if max(size) > 4:
        size = [min(side, 4) for side in size]
        layers["average"] = average(tuple(size))
    layers["flatten"] = nn.Flatten()
    inputs *= math.prod(size)
    for i, channels in enumerate(dense, start=1):
        outputs = scaled(name := f"dense{i}", channels)
        layers[name], layers[f"relu{i}"] = nn.Linear(inputs, outputs), nn.ReLU()
        inputs = outputs
    for layer in layers.values():
        if isinstance(layer, conv | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    layers[f"dense{len(dense) + 1}"] = nn.Linear(inputs, n_classes)
    return _named(**layers)


def _named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _scaled(model: str, width: float, piece: Sequence[int], layer: str, channels: int) -> int:
    """How many channels of a layer a channel group has: every n-th, from the i-th on, of `width` times as many (one at least)."""
    i, n = piece
    if not 0 <= i < n:
        raise ValueError(f"piece={tuple(piece)} must be (i, n), the i-th of n with 0 <= i < n.")
    channels = max(1, round(channels * width))
    if channels < n:
        raise ProblemError(
            f"{model} cannot be cut into {n} channel groups: its layer {layer} has {channels}, and each group needs one at least. "
            "Cut it into fewer, or give it a greater width."
        )
    return len(range(i, channels, n))


def _kit(model: str, shape: tuple[int, ...], n_classes: int, width: float) -> tuple[type[nn.Module], ...]:
    """The layer types for images or volumes; refuses other shapes and senseless sizes."""
    shape = tuple(shape)
    if len(shape) - 1 not in _KITS:
        raise ProblemError(
            f"{model} needs images (channels, height, width) or volumes (channels, depth, height, width); "
            f"the data have shape {shape}. Reshape the arrays, for instance to (n, 1, 8, 8), or give a model of your "
            "own, a function f(shape, n_classes)."
        )
    if min(shape) < 1 or n_classes < 1:
        raise ProblemError(f"{model} needs sizes and n_classes of at least 1, not shape {shape}, n_classes={n_classes}.")
    if not width > 0 or math.isinf(width):
        raise ValueError(f"width={width!r} must be a positive number: it scales the channels of {model}.")
    return _KITS[len(shape) - 1]


def _fit(model: str, shape: tuple[int, ...], layers: list[Layer], least: int = 1) -> list[int]:
    """The size of the last map after `layers`; each of them must leave at least `least` pixels a side."""

    def walk(size: list[int]) -> tuple[list[int], str]:
        for name, kernel, stride, padding in layers:
            size = [(side + 2 * padding - kernel) // stride + 1 for side in size]
            if min(size) < least:
                return size, name
        return size, ""

    size, failing = walk(list(shape[1:]))
    if failing:
        smallest = next(side for side in count(1) if not walk([side])[1])
        raise ProblemError(
            f"{model} does not fit data of shape {tuple(shape)}: its layer {failing} would leave maps of "
            f"{' x '.join(str(max(side, 0)) for side in size)} pixels. Each side needs at least {smallest} pixels; "
            "resize the data, or give a smaller model of your own."
        )
    return size
