"""Losses: those of torch to the bit, means over what counts, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from labkit.errors import ProblemError
from labkit.problems.losses import LOSSES, Loss

Y = torch.arange(12) % 3
LOGITS = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))


def test_a_name_is_the_loss_of_torch_to_the_bit():
    x, y = LOGITS, LOGITS.flip(0)
    assert torch.equal(Loss("cross-entropy")(x, Y), F.cross_entropy(x, Y))
    assert torch.equal(Loss({"name": "huber", "delta": 0.3})(x, y), F.huber_loss(x, y, delta=0.3))
    assert torch.equal(Loss("MSELoss".replace("Loss", ""))(x, y), F.mse_loss(x, y)) and Loss("CrossEntropy").of_classes
    assert torch.equal(Loss({"name": "bce_with_logits", "pos_weight": [1, 2, 3]})(x, (y > 0).float()), F.binary_cross_entropy_with_logits(
        x, (y > 0).float(), pos_weight=torch.tensor([1.0, 2, 3])))  # fmt: skip
    assert all(Loss(name) for name in LOSSES)


@pytest.mark.parametrize("options", [{"weight": [1, 5, 0.5]}, {"ignore_index": 2}, {"weight": [1, 5.0, 2], "label_smoothing": 0.1}])
def test_means_of_batches_make_the_mean_of_the_set(options):
    loss = Loss({"name": "cross-entropy", **options})
    kwargs = {**options, **({"weight": torch.tensor(options["weight"])} if "weight" in options else {})}
    assert loss(LOGITS, Y).item() == pytest.approx(F.cross_entropy(LOGITS, Y, **kwargs).item())
    parts = [(loss(x, y).item(), float(loss.count(y))) for x, y in zip(LOGITS.split(5), Y.split(5), strict=True)]
    assert sum(v * n for v, n in parts) / sum(n for _, n in parts) == pytest.approx(loss(LOGITS, Y).item())


def test_a_batch_that_is_ignored_as_a_whole_gives_no_nan():
    x = LOGITS.clone().requires_grad_()
    loss = Loss({"name": "cross-entropy", "ignore_index": 2})(x, torch.full((12,), 2))
    loss.backward()
    assert loss.item() == 0 and not x.grad.any()


def test_what_nobody_has_labelled_counts_neither_in_loss_nor_in_means():
    x, y = LOGITS.reshape(2, 6, 3).movedim(2, 1), Y.reshape(2, 6).clone()
    y[0, :5] = -100
    loss = Loss("cross-entropy")
    assert loss(x, y).item() == pytest.approx(F.cross_entropy(x, y).item()) and float(loss.count(y)) == 7
    assert loss(x, torch.full_like(y, -100)).item() == 0
    margin = {"name": "multi-margin", "weight": [1.0, 2.0, 3.0]}
    assert torch.equal(Loss(margin)(LOGITS, Y), F.multi_margin_loss(LOGITS, Y, weight=torch.tensor([1.0, 2, 3])))


def focal(outputs, targets, gamma=2.0):
    p = F.log_softmax(outputs, 1).gather(1, targets[:, None])
    return (-((1 - p.exp()) ** gamma) * p).mean()


def test_functions_modules_and_import_paths():
    assert torch.equal(Loss(focal)(LOGITS, Y), focal(LOGITS, Y))
    assert torch.equal(Loss({"name": "tests.problems.test_losses:focal", "gamma": 1.0})(LOGITS, Y), focal(LOGITS, Y, 1.0))
    assert torch.equal(Loss(nn.SmoothL1Loss(beta=0.2))(LOGITS, LOGITS + 1), F.smooth_l1_loss(LOGITS, LOGITS + 1, beta=0.2))
    assert Loss(nn.CrossEntropyLoss).of_classes and Loss(nn.CrossEntropyLoss(ignore_index=2)).ignored == 2


class Tenfold(nn.CrossEntropyLoss):
    def forward(self, outputs, targets):
        return 10 * super().forward(outputs, targets)


def test_a_class_derived_from_one_of_torch_is_called():
    y = Y.reshape(2, 6)
    x = LOGITS.reshape(2, 6, 3).movedim(2, 1)
    assert torch.equal(Loss(Tenfold())(x, y), 10 * F.cross_entropy(x, y))


def test_however_a_loss_of_torch_is_given_the_same_targets_count():
    ways = ({"name": "cross-entropy", "ignore_index": 2}, nn.CrossEntropyLoss(ignore_index=2))
    ways += ({"name": "torch.nn.functional:cross_entropy", "ignore_index": 2},)
    found = [(float(Loss(way)(LOGITS, Y)), float(Loss(way).count(Y)), Loss(way).uneven) for way in ways]
    assert found == [(pytest.approx(F.cross_entropy(LOGITS, Y, ignore_index=2).item()), 8.0, True)] * 3
    assert Loss(F.binary_cross_entropy).threshold == Loss("mse").threshold == 0.5 and Loss("bce-with-logits").threshold == 0


@pytest.mark.parametrize(
    ("given", "outputs", "targets", "message"),
    [
        ("nll", LOGITS, Y, "End the model with LogSoftmax"),
        ("cross-entropy", LOGITS, (LOGITS > -1).float(), "For several labels a sample use 'bce-with-logits'"),
        (F.soft_margin_loss, LOGITS, (LOGITS > 0).float(), "of those that are 0 it learns nothing"),
    ],
)
def test_what_a_loss_takes_without_a_word_is_refused(given, outputs, targets, message):
    with pytest.raises(ProblemError, match=message):
        Loss(given).check(outputs, targets)
    Loss("nll").check(LOGITS.log_softmax(1), Y), Loss("cross-entropy").check(LOGITS, LOGITS.softmax(1))


@pytest.mark.parametrize(
    "given", [lambda x, y: F.cross_entropy(x, y, reduction="none"), lambda x, y: 3.0, nn.MSELoss(reduction="none")]
)
def test_a_loss_that_is_no_scalar(given):
    with pytest.raises(
        ProblemError, match=r"loss .* gave (a tensor of shape \(12.*\)|a float). A loss is a tensor with one number"
    ):
        Loss(given)(LOGITS, LOGITS if isinstance(given, nn.Module) else Y)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda x, y: F.cross_entropy(x, y).detach(), "a tensor that does not depend on the outputs"),
        (lambda x, y: torch.tensor(3), "a tensor of type int64"),
        (lambda x, y: x.sum() > 0, "a tensor of type bool"),
        (lambda x, y: F.cross_entropy(x, y) * 1j, "a tensor of type complex64"),
    ],
)
def test_a_loss_that_nothing_can_be_learnt_from(given, words):
    with pytest.raises(ProblemError, match=rf"gave {words}\. Compute it from the outputs"):
        Loss(given)(LOGITS.clone().requires_grad_(), Y)
    with torch.no_grad():  # as it is measured
        assert Loss(lambda x, y: F.cross_entropy(x, y).detach())(LOGITS, Y) > 0


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("cross_entrpy", ValueError, r"Did you mean 'cross-entropy'\?"),
        ({"name": "huber", "beta": 1}, ValueError, r"loss 'HuberLoss' has no setting 'beta'. It has: delta"),
        ({"name": "mse", "reduction": "sum"}, ValueError, "no setting 'reduction'"),
        (
            {"name": "cross-entropy", "weight": [1, -1, 1]},
            ValueError,
            r"weight=\[1, -1, 1\] must be a list of numbers of at least 0",
        ),
        ({"name": "cross-entropy", "weight": [0, 0]}, ValueError, "not all of them 0"),
        (nn.CrossEntropyLoss(reduction="sum"), ValueError, "is a sum, which depends on the size of a batch"),
        (nn.Linear(2, 2), ValueError, "has parameters to train. Put them into the model"),
        ({"name": "tests.problems.test_losses:focal", "gama": 1}, ValueError, r"Did you mean 'gamma'\?"),
        (None, TypeError, "loss=None must be a name"),
    ],
)
def test_what_is_no_loss_is_refused_at_once(given, error, message):
    with pytest.raises(error, match=message):
        Loss(given)
