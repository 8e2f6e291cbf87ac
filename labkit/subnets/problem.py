"""The problem of one subnet: the window of its subdomain of every sample, and the global architecture made narrower.

The widths of all hidden layers are multiplied by the factor of a width rule and rounded to whole channels, at least one:

    "sqrt"     1/sqrt(N)  the N subnets together have about as many parameters as the global network
    "linear"   1/N        a subnet has about 1/N^2 of them
    "same"     1          a subnet has about as many as the global network

A `Subnet` is a `Problem`, so `labkit.train` can also train a single one on many workers. It derives which samples are its own, and
which are left to the coarse network, so that no index travels.

Used by `labkit.subnets.train`, `labkit.subnets.baselines` and `labkit.subnets.result`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from labkit.errors import ProblemError, known
from labkit.imports import constructor_arguments
from labkit.models import describe, make_model
from labkit.problems import Classifier
from labkit.problems.splits import folds, hold_out
from labkit.subnets.coarse import STACKING
from labkit.subnets.decomposition import Decomposition

FOLDS = 3  # copies of each subnet for "out-of-fold", each trained without one of them
HELD_OUT = 5  # every fifth training sample is held out from the subnets, for the coarse network
WIDTH_RULES = {"sqrt": -0.5, "linear": -1, "same": 0}  # the power of N in the factor


class Subnet(Classifier):
    """The problem of one subnet: a `Classifier` whose samples are its window and whose model is narrower by the width rule.

    Parameters beside those of `Classifier`: decomposition (also as `Decomposition.config()` gives it), part (number of its
    subdomain, 0..N-1), width_rule, stacking ("held-out": it is not trained on the samples held out for the coarse network;
    otherwise on all training samples), fold (with "out-of-fold": that of a copy that is trained without these samples, so that
    it can judge them).

    Examples
    --------
    >>> part = labkit.Subnet("lenet", "digits", decomposition=labkit.Decomposition((2, 2)), part=0, train_samples=200)
    >>> labkit.train(part, lab, passes=1).wait().state
    'done'
    """

    def __init__(
        self,
        model: str | Callable[..., nn.Module] = "lenet",
        data: Any = "fashion-mnist",
        *,
        decomposition: Decomposition | Mapping[str, Any],
        part: int,
        width_rule: str = "sqrt",
        stacking: str = "same-split",
        fold: int | None = None,
        **common: Any,
    ) -> None:
        self.decomposition = Decomposition.of(decomposition)
        self.part = known("part", part, range(self.decomposition.n_parts))
        self.width_rule = known("width_rule", width_rule, WIDTH_RULES)
        self.stacking = known("stacking", stacking, STACKING)
        self.fold = known("fold", fold, [None, *range(FOLDS)] if stacking == "out-of-fold" else [None])
        super().__init__(model, data, **common)

    @classmethod
    def of(
        cls, problem: Classifier, decomposition: Decomposition, part: int, width_rule: str = "sqrt", stacking: str = "same-split"
    ) -> Subnet:
        """The problem of one subdomain of `problem`, with its settings."""
        own = {"decomposition": decomposition, "part": part, "width_rule": width_rule, "stacking": stacking}
        return cls(**constructor_arguments(problem), **own)._folded(problem._fold)

    def copies(self) -> list[Subnet]:
        """With "out-of-fold" its copies, each trained without one fold; otherwise none."""
        numbers = range(FOLDS) if self.stacking == "out-of-fold" else ()
        return [type(self)(**constructor_arguments(self) | {"fold": fold})._folded(self._fold) for fold in numbers]

    @property
    def number(self) -> int:
        """The number of this subnet among all and their copies: that of its files."""
        return self.part + (0 if self.fold is None else self.decomposition.n_parts * (self.fold + 1))

    @property
    def called(self) -> str:
        return f"part {self.part}" + ("" if self.fold is None else f" without fold {self.fold}")

    def train_indices(self) -> np.ndarray:
        return self._stacked[0]

    def stack_indices(self) -> np.ndarray:
        """Indices (split "train") of the samples that it judges for the coarse network to learn from; int64."""
        return self._stacked[1]

    @property
    def _stacked(self) -> tuple[np.ndarray, np.ndarray]:
        train = super().train_indices()
        if self.stacking == "same-split":
            return train, train
        if self.stacking == "held-out":
            left, held = hold_out(self.labels(train), len(train), len(train) // HELD_OUT)
            return train[left], train[held]
        left_out = folds(self.labels(train), FOLDS) == (-1 if self.fold is None else self.fold)
        return train[~left_out], train[left_out]

    @property
    def window(self) -> tuple[slice, ...]:
        return self.decomposition.windows(self.dataset.shape)[self.part]

    def build(self, seed: int) -> nn.Module:
        about = self.dataset.shape, self.dataset.n_classes
        return make_subnet(self.model, self.model_args, self.decomposition, self.part, self.width_rule, *about, seed)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "decomposition": self.decomposition.config()}

    def _title(self) -> str:
        return f"part {self.part} of {self.decomposition!r}, model {describe(self.model)}"


def make_subnet(
    model: str | Callable[..., nn.Module],
    model_args: Mapping[str, Any],
    decomposition: Decomposition,
    part: int,
    width_rule: str,
    shape: Sequence[int],
    n_classes: int,
    seed: int,
) -> nn.Module:
    """The subnet of a subdomain, for whole samples of `shape`."""
    arguments = narrowed(model_args, decomposition.n_parts, width_rule)
    try:
        return make_model(model, decomposition.shapes(shape)[part], n_classes, arguments, seed)
    except ProblemError as error:
        advice = " A model of your own needs a keyword `width`, or width_rule='same'." if "'width'" in str(error) else ""
        raise ProblemError(f"part {part} of {decomposition!r}: {error}{advice}") from error


def narrowed(model_args: Mapping[str, Any], n_parts: int, width_rule: str) -> dict[str, Any]:
    """The arguments of a model with the `width` that a rule gives each of `n_parts` subnets."""
    factor = n_parts ** WIDTH_RULES[width_rule]
    return dict(model_args) if factor == 1 else {**model_args, "width": model_args.get("width", 1.0) * factor}


def subnet_seed(seed: int, part: int) -> int:
    """The seed of a subnet; part 0 has the seed itself, so that one subnet is plain training."""
    return int(np.random.SeedSequence([seed, part]).generate_state(1)[0]) if part else seed
