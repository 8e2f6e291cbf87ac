"""Batch normalisation by the samples of several workers: mean and variance of a step are those of all their batches.

    N = sum_j n_j    m = sum_j n_j m_j / N    v = sum_j n_j (v_j + m_j^2) / N - m^2    y = (x - m) / sqrt(v + eps) * weight + bias

over ranks j, which have n_j values of a channel, of mean m_j and variance v_j. In the backward pass the sums of dL/dy, and of it times the
normalised x, are over all ranks too, each counted by its share w_j of the joint batch: gradients that are averaged by these shares are those
of one worker with that batch. Ioffe, Szegedy: arXiv:1502.03167. torch.nn.SyncBatchNorm is for GPUs, and for ranks of equal batches.

Within `together` whatever calls `torch.nn.functional.batch_norm` in training is normalised like this, torch's own layers among it; a layer that
computes its statistics itself asks for `ranks`.

Used by `labkit.training.worker.allreduce` and `labkit.jets`.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode


class Ranks(NamedTuple):
    """The workers whose batches are normalised together in a step, as one of them sees them.

    `add_up` returns the sum over all ranks of a vector; each of them calls it as often as the others, with vectors of the same length.
    """

    add_up: Callable[[torch.Tensor], torch.Tensor]
    weight: float  # this rank's share of the samples of the joint batch

    def statistics(self, n: int, mean: torch.Tensor, variance: torch.Tensor) -> tuple[int, torch.Tensor, torch.Tensor]:
        """Number of values, mean and variance (C,) of the joint batch, of those of this rank's."""
        own = mean.double(), variance.double()
        number = own[0].new_full((1,), n)
        total, sums, squares = self.add_up(torch.cat([number, n * own[0], n * (own[1] + own[0] ** 2)])).split(
            [1, len(mean), len(mean)]
        )
        joint = sums / total
        return int(total), joint.to(mean.dtype), (squares / total - joint**2).clamp_min(0).to(mean.dtype)

    def sums(self, *own: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of sums over this rank's batch in a backward pass: those over the joint one, in units of this rank's gradients."""
        joint = self.add_up(torch.cat(own).double() * self.weight) / self.weight
        return tuple(part.to(of.dtype) for part, of in zip(joint.split([len(of) for of in own]), own, strict=True))


_ranks: ContextVar[Ranks | None] = ContextVar("ranks", default=None)


def ranks() -> Ranks | None:
    """Those that this thread's step is normalised with; None: its batch alone."""
    return _ranks.get()


@contextlib.contextmanager
def together(others: Ranks) -> Iterator[None]:
    """A step in this thread, forward and backward, in which batch normalisations are those of the joint batch."""
    before = _ranks.set(others)
    try:
        with _Normalising():
            yield
    finally:
        _ranks.reset(before)


class _Normalising(TorchFunctionMode):
    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return (_batch_norm if func is F.batch_norm else func)(*args, **kwargs or {})


def _batch_norm(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    """`torch.nn.functional.batch_norm` of this rank's part of the joint batch."""
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    others, n = _ranks.get(), x.numel() // x.shape[1]
    with torch.no_grad():
        n, mean, variance = others.statistics(n, *_statistics(x.detach(), n))
        if n < 2:
            raise ValueError(f"Expected more than 1 value per channel when training, got {n} of all ranks.")
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * (n / (n - 1))).to(running_var.dtype), momentum)
    return _Normalise.apply(x, weight, bias, mean, variance, eps, n, others)


def _statistics(x: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance (biased) of each channel; 0 of no values."""
    if n == 0:
        return x.new_zeros(2, x.shape[1], dtype=torch.float32).unbind()
    x = x if x.dtype == torch.float64 else x.float()
    return torch.var_mean(x, [axis for axis in range(x.dim()) if axis != 1], correction=0)[::-1]


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, mean, variance, eps, n, others):
        scale = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
        shift = None if bias is None else bias.to(mean.dtype)
        ctx.save_for_backward(x, scale, mean, variance)
        ctx.given = weight, bias, eps, n, others
        return torch.native_batch_norm(x, scale, shift, mean, variance, False, 0.0, eps)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        x, scale, mean, variance = ctx.saved_tensors
        weight, bias, eps, n, others = ctx.given
        inverse = (variance + eps).rsqrt()
        # Mean and variance taken as constants; then what x does through them.
        dx, of_scale, of_shift = torch.ops.aten.native_batch_norm_backward(
            slope, x, scale, mean, variance, mean, inverse, False, eps, [True, True, True]
        )
        all_scale, all_shift = others.sums(of_scale, of_shift)
        by_x = -scale * inverse * inverse * all_scale / n
        constant = -scale * inverse * all_shift / n - by_x * mean
        shape = (1, -1, *[1] * (x.dim() - 2))
        dx = dx + (x * by_x.view(shape) + constant.view(shape)).to(dx.dtype)
        gradients = (dx, None if weight is None else of_scale.to(weight.dtype), None if bias is None else of_shift.to(bias.dtype))
        return *gradients, None, None, None, None, None
