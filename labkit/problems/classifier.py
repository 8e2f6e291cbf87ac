"""`Classifier`: a network trained with cross-entropy, which is what most people want.

A model that is a function travels to the workers by import path, or by value when it was written in a notebook cell.

Used by users through `labkit.Classifier`, and as the base class of the problems in `labkit.subnets`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from labkit.errors import ProblemError, known, real
from labkit.imports import import_path
from labkit.models import check_model, describe, evaluating, make_model
from labkit.problems.problem import Clock, Metrics, Optimisers, Problem


class Classifier(Problem):
    """A network trained with cross-entropy; its score is the share of samples that it classifies correctly.

    Parameters beside those of `Problem`
    ------------------------------------
    model : "lenet", "vgg3", "vgg9", "resnet20", an import path "my_module:make_model", or a function. It is called as
        `f()` or `f(shape, n_classes)`, by its number of required positional parameters, and with `model_args`.
    lr : learning rate; 0.05 suits "sgd", about 0.001 the others.
    momentum : of "sgd"; of "adam" and "adamw" it is the first beta.
    optimiser : "sgd", "adam" or "adamw" (these two in torch's fused form where the device has one).
    schedule : "constant", or "cosine": lr (1 + cos(pi samples / total)) / 2, with the samples of all workers.

    A bad argument is a ValueError or TypeError at once; a model that does not fit the data a ProblemError in `check`.
    """

    def __init__(
        self,
        model: str | Callable[..., nn.Module] = "lenet",
        data: Any = "fashion-mnist",
        *,
        batch_size: int = 64,
        lr: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        optimiser: str = "sgd",
        schedule: str = "constant",
        model_args: Mapping[str, Any] | None = None,
        train_samples: int | None = None,
        test_samples: int | None = None,
        score_samples: int = 256,
        precision: str = "float32",
        channels_last: bool = False,
        augment: str | Callable[..., Any] | None = None,
    ) -> None:
        check_model(model)
        if model_args is not None and not isinstance(model_args, Mapping):
            raise TypeError(f"model_args={model_args!r} must be a dict, not {type(model_args).__name__}.")
        self.model, self.model_args = model, dict(model_args or {})
        self.lr = real("lr", lr, above=0)
        self.momentum = real("momentum", momentum, least=0, below=1)
        self.weight_decay = real("weight_decay", weight_decay, least=0)
        self.optimiser = known("optimiser", optimiser, ("sgd", "adam", "adamw"))
        self.schedule = known("schedule", schedule, ("constant", "cosine"))
        super().__init__(
            data,
            batch_size=batch_size,
            train_samples=train_samples,
            test_samples=test_samples,
            score_samples=score_samples,
            precision=precision,
            channels_last=channels_last,
            augment=augment,
        )

    def build(self, seed: int) -> nn.Module:
        if self.dataset.n_classes is None:
            raise ProblemError(f"data {self.dataset.name!r} have no classes, and a Classifier needs them: give labels.")
        return make_model(self.model, self.dataset.shape, self.dataset.n_classes, self.model_args, seed)

    def optimisers(self, module: nn.Module) -> Optimisers:
        parameters = [p for p in module.parameters() if p.requires_grad]
        common = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.optimiser == "sgd":  # torch's default form: a loop written by hand gets the same bits
            return (torch.optim.SGD(parameters, momentum=self.momentum, **common),)
        kind = torch.optim.Adam if self.optimiser == "adam" else torch.optim.AdamW
        fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
        return (kind(parameters, betas=(self.momentum, 0.999), fused=fused, **common),)

    def step(self, module: nn.Module, batch: Any, optimisers: Optimisers, clock: Clock) -> Metrics:
        x, y = batch
        (optimiser,) = optimisers
        if self.schedule == "cosine":
            lr = self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, clock.samples / clock.total)))
            for group in optimiser.param_groups:
                group["lr"] = lr
        optimiser.zero_grad(set_to_none=True)
        with self.autocast(x.device):
            loss = F.cross_entropy(module(x).float(), y)
        loss.backward()
        optimiser.step()
        return {"loss": loss.detach()}

    def evaluate(self, module: nn.Module, batch: Any) -> dict[str, float]:
        x, y = batch
        with evaluating(module) as plain, self.autocast(x.device):
            logits = plain(x)
        expected = (len(y), self.dataset.n_classes)
        if not isinstance(logits, torch.Tensor) or logits.shape != expected:
            got = f"shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
            raise ProblemError(
                f"{self._title()} gave {got} for {len(y)} samples of shape {tuple(x.shape[1:])}; a Classifier needs "
                f"logits of shape {expected}, one for each class. Change the last layer."
            )
        loss = F.cross_entropy(logits.float(), y)
        return {"loss": loss.item(), "score": (logits.argmax(1) == y).float().mean().item()}

    def predicted(self, outputs: np.ndarray) -> np.ndarray:
        """Classes: int64 (n,), of logits (n, K); (n, *rest) of (n, K, *rest)."""
        return outputs.argmax(1).astype(np.int64)

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """Probabilities (n, K), float32, of logits (n, K)."""
        return torch.from_numpy(outputs).softmax(1).numpy()

    def config(self) -> dict[str, Any]:
        return {**super().config(), "model": self.model if isinstance(self.model, str) else import_path(self.model)}

    def _title(self) -> str:
        return f"model {describe(self.model)}"
