"""`Classifier`: a network that gives a number for each class; by default it is trained with cross-entropy.

A model that is a function travels to the workers by import path, or by value when it was written in a notebook cell.

Used by users through `labkit.Classifier`, and as the base class of the problems in `labkit.subnets`.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from labkit.errors import ProblemError
from labkit.names import named
from labkit.problems.losses import Loss
from labkit.problems.metrics import Meter, Right
from labkit.problems.supervised import Supervised


class Classifier(Supervised):
    """A network that gives a number for each class; its score is the share of what it classifies correctly.

    Outputs are (n, K) for labels (n,), and (n, K, ...) for a class for each pixel or token, labels (n, ...), whose share of right
    ones is then counted over all of them but those that the loss ignores. With several labels a sample (data whose targets are
    multi-hot, of the shape of the outputs) the loss is "bce-with-logits", say, and the score the share of single labels that are
    right, where an output above 0 says yes. With such a loss two classes need but one output, (n,) or (n, 1, ...): yes for class 1.

    Parameters beside those of `Problem`
    ------------------------------------
    model : "lenet", "vgg3", "vgg9", "resnet20", an import path "my_module:make_model", or a function. It is called as
        `f()`, `f(shape)` or `f(shape, n_classes)`, by its number of required positional parameters, and with `model_args`; `shape`
        is that of one sample, of several inputs a tuple of them. Or a module, of which each worker trains a copy, as it is when the
        run begins, whatever the seed.
    data : as of `Problem`, with a label for each sample, pixel or token, or several yes and no a sample (`open_dataset`, `label=`).
    lr : learning rate; 0.05 suits "sgd", about 0.001 the others.
    momentum : of "sgd"; of "adam" and "adamw" it is the first beta.
    optimiser : "sgd", "adam" or "adamw" (these two in torch's fused form where the device has one), any other of torch's by its
        name, with settings {"name": "rmsprop", "alpha": 0.9}, or a function of the parameters, f(parameters) or f(parameters, lr).
    schedule : what lr is multiplied by: "constant", "cosine", (1 + cos(pi samples / total)) / 2 with the samples of all workers,
        "one-cycle", "warm-up", "step" (`labkit.problems.schedules` has their settings), or a function of the `Clock`.
    loss : "cross-entropy" or another of torch's by its name, with settings such as class weights
        {"name": "cross-entropy", "weight": [1, 5], "label_smoothing": 0.1, "ignore_index": 255}, or a function (outputs, targets).
    metrics : further numbers that are measured with loss and score: a list of names, of functions (outputs, targets) of a whole
        set, of objects as torchmetrics has them or their import paths, or a dict of these by name (`labkit.problems.metrics`). Those of
            your own get also the outputs and targets that the loss ignores.
    clip_norm : the largest norm of the gradient; longer ones are shortened. `step` then returns it as "grad_norm".
    accumulate : the gradient of a batch is computed in so many parts, one after the other, for less memory; BatchNorm sees parts.
    inner : how the threads of a worker share a step, a `labkit.Inner`: by default torch cuts each operator among them.

    A bad argument is a ValueError or TypeError at once; a model that does not fit the data a ProblemError in `check`.

    Examples
    --------
    >>> def net(shape, n_classes):
    ...     return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(32), torch.nn.ReLU(), torch.nn.Linear(32, n_classes))
    >>> x, y = np.random.rand(200, 12).astype("float32"), np.arange(200) % 2
    >>> own = labkit.Classifier(net, (x, y), batch_size=32, lr=0.1, optimiser="adam")
    >>> labkit.train(own, lab, passes=1).wait().state
    'done'
    """

    unwritten: ClassVar = {**Supervised.unwritten, "loss": "cross-entropy"}

    @named
    def __init__(
        self,
        model: str | Callable[..., nn.Module] = "lenet",
        data: Any = "fashion-mnist",
        *,
        batch_size: int = 64,
        lr: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        optimiser: Any = "sgd",
        schedule: Any = "constant",
        model_args: Mapping[str, Any] | None = None,
        train_samples: int | None = None,
        test_samples: int | None = None,
        score_samples: int = 256,
        precision: str = "float32",
        channels_last: bool = False,
        augment: str | Callable[..., Any] | None = None,
        ema: float | None = None,
        inner: Any = None,
        loss: Any = "cross-entropy",
        metrics: Any = (),
        clip_norm: float | None = None,
        accumulate: int = 1,
    ) -> None:
        super().__init__(
            model,
            data,
            batch_size=batch_size,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            optimiser=optimiser,
            schedule=schedule,
            model_args=model_args,
            train_samples=train_samples,
            test_samples=test_samples,
            score_samples=score_samples,
            precision=precision,
            channels_last=channels_last,
            augment=augment,
            ema=ema,
            inner=inner,
            loss=loss,
            metrics=metrics,
            clip_norm=clip_norm,
            accumulate=accumulate,
        )

    @property
    def n_outputs(self) -> int:
        data = self.dataset
        if data.n_classes is not None:
            return 1 if data.n_classes == 2 and not self._loss.of_classes and not self._loss.is_own else data.n_classes
        targets = [data.fields[name] for name in data.answers]
        if len(targets) == 1 and targets[0].shape == () and not self._loss.of_classes:
            return 1  # numbers from 0 to 1: yes or no
        if len(targets) != 1 or len(targets[0].shape) != 1:
            columns = [column for name in data.inputs for column in data.columns_of(name)]
            how = (
                f" Say which column is the label, as by labkit.open_dataset(data, label={columns[-1]!r})."
                if len(columns) > 1
                else ""
            )
            raise ProblemError(
                f"data {data.name!r} have no classes, and a Classifier needs them: one field of labels, or one of multi-hot targets of "
                f"shape (K,). They have {data.described()}.{how} Numbers are predicted by labkit.Regressor."
            )
        return targets[0].shape[0]

    def fitted(self, outputs: Any, targets: Any) -> tuple[torch.Tensor, torch.Tensor]:
        n = len(targets)
        by_class = self.dataset.n_classes is None  # a number for each class: yes or no, or its probability
        if isinstance(outputs, torch.Tensor) and self._is_one_output(outputs.shape, targets.shape):
            return (outputs, targets) if self._loss.is_own else (outputs.reshape(targets.shape), targets.float())
        expected = tuple(targets.shape) if by_class else (n, self.n_outputs, *targets.shape[1:])
        if not isinstance(outputs, torch.Tensor) or outputs.shape != expected:
            got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, torch.Tensor) else f"a {type(outputs).__name__}"
            has_logits = hasattr(outputs, "logits") or (isinstance(outputs, Mapping) and "logits" in outputs)
            advice = "Have its forward() return the logits of that." if has_logits else "Change the last layer."
            advice = (
                "Give labels of one number a sample: (n,), not (n, 1)." if targets.shape[1:] == (1,) and not by_class else advice
            )
            if self.n_outputs == 1:
                advice += f" {self._loss.title} takes one output for two classes; 'cross-entropy' takes one for each."
            raise ProblemError(
                f"{self._title()} gave {got} for {n} samples of shape {self.dataset.shape}; a Classifier needs "
                f"logits of shape {expected}, one for each class. {advice}"
            )
        return outputs, targets.float() if by_class else targets

    def scorer(self) -> Meter:
        return Right(self._loss)

    def _is_one_output(self, outputs: tuple[int, ...], labels: tuple[int, ...]) -> bool:
        """Is there one output for each label 0 or 1: yes, or no?"""
        fits = outputs in (labels, (labels[0], 1, *labels[1:]))
        of_two = self.dataset.n_classes == 2 or (self.dataset.n_classes is None and len(labels) == 1)
        return of_two and not self._loss.of_classes and fits

    def check(self, seed: int = 0, scored: bool = True) -> None:
        data, loss = self.dataset, Loss(self.loss)
        for name in data.answers if loss.masking else ():
            if counted := [value for value in data.fields[name].no_class if value != loss.ignored]:
                how = {"name": self.loss if isinstance(self.loss, str) else "cross-entropy", "ignore_index": counted[0]}
                raise ProblemError(
                    f"data {data.name!r}: {name} is {', '.join(map(str, counted))} in places, which is no class of 0..{self.n_outputs - 1}. "
                    + (f"Have the loss ignore it: loss={how}." if len(counted) == 1 else "Give one value to what a loss ignores.")
                )
        one_label = (data.n_classes or 0) > 2 and type(self).fitted is Classifier.fitted
        if one_label and not loss.of_classes and not loss.is_own:
            raise ProblemError(
                f"{loss.title} takes a number for each output, and data {data.name!r} have labels of {data.n_classes} classes. Use "
                "loss='cross-entropy'; numbers are predicted by labkit.Regressor(model, data, loss=...)."
            )
        super().check(seed, scored)

    def predicted(self, outputs: np.ndarray) -> np.ndarray:
        """Classes: int64 (n,), of logits (n, K); (n, *rest) of (n, K, *rest); of several labels a sample 0 or 1 for each, (n, K)."""
        if (single := self._one_output(outputs)) is not None:
            outputs = single
        if self._several or single is not None:
            return (outputs > self._loss.threshold).astype(np.int64)
        return outputs.argmax(1).astype(np.int64)

    def said(self, outputs: np.ndarray) -> dict[str, np.ndarray]:
        said, shares = self.predicted(outputs), self.probabilities(outputs)
        if self._several:
            return {"predicted": said, "probability": np.full(len(said), np.nan)}
        return {"predicted": said, "probability": np.take_along_axis(shares, np.expand_dims(said, 1), 1)[:, 0]}

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """Probabilities, float32, of logits: (n, K, *rest); they sum to 1 over classes, unless a sample has several labels."""
        single = self._one_output(outputs)
        logits = torch.from_numpy(outputs if single is None else single)
        if self._several or single is not None:
            yes = logits.numpy() if self._loss.threshold else logits.sigmoid().numpy()
            return yes if single is None else np.stack([1 - yes, yes], 1)
        return logits.softmax(1).numpy()

    def _one_output(self, outputs: np.ndarray) -> np.ndarray | None:
        """The outputs in the shape of the labels, where there is one for each."""
        labels = (len(outputs), *(self.dataset.fields[self.dataset.answers[0]].shape if self.dataset.answers else ()))
        return outputs.reshape(labels) if self._is_one_output(outputs.shape, labels) else None

    @property
    def _several(self) -> bool:
        """Has a sample several labels?"""
        return self.dataset.n_classes is None and not self._loss.of_classes
