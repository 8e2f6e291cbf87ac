"""The regressor: its score, the shapes of outputs and targets, and what does not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from labkit.errors import ProblemError
from labkit.problems import Regressor
from tests.problems.test_problem import steps

pytestmark = pytest.mark.usefixtures("cache")
R = np.random.default_rng(0)
X = R.normal(size=(60, 4)).astype(np.float32)
Y = np.arange(60) % 4


def linear(shape, n_outputs):
    return nn.Linear(shape[0], n_outputs)


def made(model=linear, data=(X, Y), **options):
    return Regressor(model, data, **{"lr": 0.1, "batch_size": 20, **options})


class Says(nn.Module):
    """The same numbers for whatever sample."""

    def __init__(self, *numbers):
        super().__init__()
        self.numbers = nn.Parameter(torch.tensor(numbers))

    def forward(self, x):
        return self.numbers.expand(len(x), -1)


def test_the_score_is_a_half_for_the_mean_and_one_for_the_truth():
    problem = made()
    indices = problem.train_indices()
    y = problem.dataset.raw(indices, field="y")
    scores = [problem.measure(Says(float(said)), indices, batch_size=7)["score"] for said in (y.mean(), y.mean() + y.std(), 1e6)]
    assert scores == pytest.approx([1 / 2, 1 / 3, 0.0], abs=1e-6)
    found = problem.measure(Says(0.5), indices, batch_size=7)
    assert found["loss"] == pytest.approx(((y - 0.5) ** 2).mean(), rel=1e-6)
    r2 = 1 - ((y - 0.5) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    assert made(metrics=["r2"]).measure(Says(0.5), indices)["r2"] == pytest.approx(r2) and found["score"] == pytest.approx(
        1 / (2 - r2)
    )


def test_a_column_of_outputs_is_not_spread_over_a_row_of_targets():
    problem, seen = (
        made(loss=lambda outputs, targets: seen.append((outputs.shape, targets.shape)) or F.mse_loss(outputs, targets)),
        [],
    )
    module = problem.build(0)
    x, y = problem.load(problem.train_indices()[:5])
    assert module(x).shape == (5, 1) and problem.evaluate(module, (x, y))["loss"] == pytest.approx(
        F.mse_loss(module(x)[:, 0], y.float()).item()
    )
    assert seen == [((5,), (5,))]
    assert problem.predicted(np.zeros((5, 1), np.float32)).shape == (5,)


def test_outputs_whose_axes_are_in_another_order_are_not_read_as_targets():
    images = R.normal(size=(30, 3, 4, 4)).astype(np.float32)
    conv = nn.Conv2d(3, 3, 1)

    class Last(nn.Module):  # (n, H, W, C)
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, x):
            return self.conv(x).movedim(1, -1)

    data = {"x": images}
    with pytest.raises(ProblemError, match=r"gave shape \(2, 4, 4, 3\) for targets of shape \(2, 3, 4, 4\)"):
        Regressor(Last, data, batch_size=5).check()
    flat = Regressor(lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 48)), data, batch_size=5)
    flat.check()
    assert flat.predicted(np.zeros((2, 48))).shape == (2, 3, 4, 4)
    assert flat.predicted(np.zeros((2, 4, 4, 3))).shape == (2, 4, 4, 3)


def test_outputs_of_another_kind_with_a_loss_of_their_own():
    def nll(outputs, targets):
        centre, log = outputs.unbind(1)
        return (0.5 * (targets - centre) ** 2 * torch.exp(-2 * log) + log).mean()

    problem = made(lambda shape: nn.Linear(shape[0], 2), loss=nll)
    problem.check()
    losses, _ = steps(problem, problem.build(0), 20)
    assert losses[-1] < losses[0]
    scores = [problem.measure(Says(1.5, log), problem.train_indices())["score"] for log in (0.1, 5.0, -5.0)]
    assert 1 > scores[0] > scores[1] > scores[2] > 0


@pytest.mark.parametrize("loss", ["mse", "mae", "huber", "smooth-l1", {"name": "huber", "delta": 0.5}, "poisson-nll"])
def test_losses_go_down(loss):
    problem = made(loss=loss, lr=0.05, metrics=["mae", "rmse"])
    problem.check()
    losses, _ = steps(problem, problem.build(0), 10)
    assert losses[-1] < losses[0]


def test_what_does_not_fit_is_named():
    with pytest.raises(ProblemError, match=r"gave shape \(2, 3\) for targets of shape \(2,\). Change the last layer"):
        made(lambda: nn.Linear(4, 3)).check()
    with pytest.raises(ProblemError, match=r"needs 1 positional argument\(s\): width"):
        made(lambda width: nn.Linear(4, width)).check()
    for loss in ("cross-entropy", "nll", nn.CrossEntropyLoss()):
        with pytest.raises(ProblemError, match=r"is of classes, and a Regressor predicts numbers\. .* labkit\.Classifier"):
            made(loss=loss).check()
    with pytest.raises(ProblemError, match=r"loss '.*lambda.*' gave a tensor of shape \(2,\)"):
        made(loss=lambda outputs, targets: (outputs - targets) ** 2).check()
