"""Losses: one of torch's by its name, with its settings, or a function of (outputs, targets) that returns a scalar.

    "huber"                                                   a name of `LOSSES`
    {"name": "cross-entropy", "weight": [1, 5]}               with settings: also label_smoothing, ignore_index, pos_weight, delta
    "my_module:focal", a function, nn.HuberLoss(delta=2.0)    called with (outputs, targets); a class is made without arguments

Used by `labkit.problems.supervised`.
"""

import contextlib
import copy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from labkit.errors import ProblemError, calling
from labkit.imports import check_settings, chosen, short

LOSSES: dict[str, type[nn.Module]] = {
    # of classes: outputs (n, K, ...) and targets (n, ...)
    "cross-entropy": nn.CrossEntropyLoss,
    "nll": nn.NLLLoss,
    "multi-margin": nn.MultiMarginLoss,
    # element by element: outputs of the shape of the targets
    "mse": nn.MSELoss,
    "mae": nn.L1Loss,
    "l1": nn.L1Loss,
    "smooth-l1": nn.SmoothL1Loss,
    "huber": nn.HuberLoss,
    "poisson-nll": nn.PoissonNLLLoss,
    "bce-with-logits": nn.BCEWithLogitsLoss,
    "bce": nn.BCELoss,
    "multi-label-soft-margin": nn.MultiLabelSoftMarginLoss,
    "soft-margin": nn.SoftMarginLoss,
}
# Torch's own functions are these, too: what is known of a loss is known by its class.
FUNCTIONS = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.nll_loss: nn.NLLLoss,
    F.multi_margin_loss: nn.MultiMarginLoss,
    F.mse_loss: nn.MSELoss,
    F.l1_loss: nn.L1Loss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    F.huber_loss: nn.HuberLoss,
    F.poisson_nll_loss: nn.PoissonNLLLoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    F.binary_cross_entropy: nn.BCELoss,
    F.multilabel_soft_margin_loss: nn.MultiLabelSoftMarginLoss,
    F.soft_margin_loss: nn.SoftMarginLoss,
}
OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss)
OF_NUMBERS = (nn.BCELoss, nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)  # outputs are near the targets, 0 and 1
REDUCTIONS = ("reduction", "reduce", "size_average")  # a loss is one number


class Loss:
    """What training lowers: `loss(outputs, targets)` is a scalar tensor, a mean over as many targets as `count` says.

    ValueError or TypeError for a name or a setting that does not exist.
    """

    def __init__(self, given: Any) -> None:
        made, settings = chosen("loss", given, LOSSES)
        made = next((cls for function, cls in FUNCTIONS.items() if function is made), made)
        self.title = f"loss {(given if isinstance(given, str) else short(made))!r}"
        named = made in LOSSES.values()
        check_settings(self.title, made, settings, beside=REDUCTIONS if named else ())
        if named:
            settings |= {name: _weights(name, settings[name]) for name in ("weight", "pos_weight") if name in settings}
        self.call = made(**settings) if isinstance(made, type) else partial(made, **settings) if settings else made
        if isinstance(self.call, nn.Module) and any(True for _ in self.call.parameters()):
            raise ValueError(f"{self.title} has parameters to train. Put them into the model, which the workers exchange.")
        if "sum" in (getattr(self.call, "reduction", ""), settings.get("reduction", "")):
            raise ValueError(f"{self.title} is a sum, which depends on the size of a batch. Give the mean, and a larger lr.")
        self.of_classes = isinstance(self.call, OF_CLASSES)
        self.is_own = not isinstance(self.call, tuple(LOSSES.values()))
        self.threshold = 0.5 if isinstance(self.call, OF_NUMBERS) else 0.0  # of an output that says yes
        self.ignored = getattr(self.call, "ignore_index", None)
        # Some targets count for less, or not at all; a class derived from these computes what it likes.
        self.masking = type(self.call) in (nn.CrossEntropyLoss, nn.NLLLoss)
        self.uneven = self.masking and (self.call.weight is not None or self.ignored != nn.CrossEntropyLoss().ignore_index)
        self.on: dict[torch.device, Any] = {}  # with its class weights on each device

    def __call__(self, outputs: Any, targets: Any) -> torch.Tensor:
        """ProblemError where it is no scalar."""
        call = self._on(outputs.device) if isinstance(outputs, torch.Tensor) else self.call
        if self._counts(targets):  # torch's mean over nothing is NaN: a batch may be ignored as a whole
            smoothing = {"label_smoothing": call.label_smoothing} if isinstance(call, nn.CrossEntropyLoss) else {}
            of = F.cross_entropy if smoothing else F.nll_loss
            loss = of(outputs, targets, call.weight, ignore_index=call.ignore_index, reduction="sum", **smoothing)
            return loss / self.count(targets).clamp(min=torch.finfo(torch.float32).tiny)
        with calling(self.title) if self.is_own else contextlib.nullcontext():
            loss = call(outputs, targets)
        if not isinstance(loss, torch.Tensor) or loss.dim():
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else f"a {type(loss).__name__}"
            raise ProblemError(f"{self.title} gave {got}. A loss is a tensor with one number, such as the mean over the batch.")
        follows = loss.requires_grad or not (torch.is_grad_enabled() and getattr(outputs, "requires_grad", False))
        if not loss.is_floating_point() or not follows:
            kind = str(loss.dtype).removeprefix("torch.")
            got = "a tensor that does not depend on the outputs" if loss.is_floating_point() else f"a tensor of type {kind}"
            raise ProblemError(f"{self.title} gave {got}. Compute it from the outputs, in torch, without detach() or item().")
        return loss

    def check(self, outputs: Any, targets: Any) -> None:
        """ProblemError for outputs and targets, of some samples, that it takes without a word and that are not meant for it."""
        own, why = type(self.call), ""
        if own is nn.NLLLoss and not torch.allclose(outputs.exp().sum(1), torch.ones(()), atol=1e-2):
            why = "takes logarithms of probabilities, and those of the outputs do not sum to 1. End the model with LogSoftmax(1), or use 'cross-entropy'."
        elif own is nn.CrossEntropyLoss and targets.is_floating_point() and not _sum_to_1(targets):
            why = "takes a probability for each class, and the targets of a sample do not sum to 1. For several labels a sample use 'bce-with-logits'."
        elif own is nn.SoftMarginLoss and not targets.abs().eq(1).all():
            why = "takes targets of -1 and 1: of those that are 0 it learns nothing. Use 'bce-with-logits' for 0 and 1."
        if why:
            raise ProblemError(f"{self.title} {why}")

    def count(self, targets: Any) -> torch.Tensor | int:
        """Of a batch with these targets: how many its loss is a mean over, in proportion; classes by their weights."""
        if not self._counts(targets):
            return len(next(iter(targets.values()))) if isinstance(targets, dict) else len(targets)
        counted = targets != self.ignored
        if self.call.weight is None:
            return counted.sum().float()
        return self._on(targets.device).weight[targets[counted]].sum()

    def _counts(self, targets: Any) -> bool:
        """Do some of these targets count for less than others? One label a sample is always there, unless it is said."""
        return self.masking and not targets.is_floating_point() and (self.uneven or targets.dim() > 1)

    def _on(self, device: torch.device) -> Any:
        if device.type == "cpu" or not isinstance(self.call, nn.Module):
            return self.call
        if device not in self.on:
            self.on[device] = copy.deepcopy(self.call).to(device)
        return self.on[device]


def _sum_to_1(targets: torch.Tensor) -> bool:
    return bool(torch.allclose(targets.sum(1), torch.ones((), dtype=targets.dtype), atol=1e-2))


def _weights(name: str, given: Any) -> torch.Tensor:
    weights = torch.as_tensor(np.asarray(given, dtype=np.float32))
    if not (torch.isfinite(weights) & (weights >= 0)).all() or not weights.any():
        raise ValueError(f"{name}={short(given)} must be a list of numbers of at least 0, one for each class, not all of them 0.")
    return weights
