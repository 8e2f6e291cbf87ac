"""Metrics: functions see the whole set, objects its batches; names of columns; NaN stays, what is no number is refused."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from labkit.errors import ProblemError
from labkit.problems.losses import Loss
from labkit.problems.metrics import check_metrics, make_meters, number
from tests.problems.test_problem import tiny

X = torch.linspace(-1, 1, 17)
Y = X**2


class Largest:
    """As those of torchmetrics are: a state that grows with the batches."""

    def __init__(self, power=1):
        self.power, self.found = power, -math.inf

    def reset(self):
        self.found = -math.inf

    def update(self, outputs, targets):
        self.found = max(self.found, float((outputs - targets).max() ** self.power))

    def compute(self):
        return torch.tensor(self.found)

    def to(self, device):
        self.device = device
        return self


def span(outputs, targets, by=1.0):
    return float(outputs.max() - outputs.min()) / by


def measured(given, size=5):
    meters = make_meters(check_metrics(given), "cpu", Loss("mse"))
    for x, y in zip(X.split(size), Y.split(size), strict=True):
        for meter in meters.values():
            meter.update(x, y)
    found = {name: meter.compute() for name, meter in meters.items()}
    return {column: value for name, given in found.items() for column, value in number(name, given).items()}


def test_a_function_sees_the_whole_set_once():
    assert measured([span]) == measured(span) == {"span": 2.0}
    r2 = 1 - float(((X - Y) ** 2).sum() / ((Y - Y.mean()) ** 2).sum())
    assert measured(["mae", "rmse", "r2"]) == pytest.approx({"mae": float((X - Y).abs().mean()), "rmse": float((X - Y).square().mean().sqrt()), "r2": r2})  # fmt: skip
    assert measured({"name": "tests.problems.test_metrics:span", "by": 2}) == {"span": 1.0}
    assert measured(partial(span, by=4)) == {"span": 0.5}


def test_objects_are_updated_batch_by_batch_and_never_changed():
    own, worst = Largest(), float((X - Y).max())
    assert measured([own]) == measured(["tests.problems.test_metrics:Largest"]) == {"Largest": pytest.approx(worst)}
    assert own.found == -math.inf and measured([own]) == measured([own])
    path = {"name": "tests.problems.test_metrics:Largest", "power": 3}
    assert measured({"largest": path, "again": own}) == pytest.approx({"largest": worst**3, "again": worst})


def test_several_numbers_and_nan():
    assert measured({"of": lambda x, y: {"min": x.min(), "n": len(x)}}) == {"of_min": -1.0, "of_n": 17.0}
    assert math.isnan(measured({"none": lambda x, y: math.nan})["none"])


@pytest.mark.parametrize("given", [torch.zeros(3), "0.5", None, [1.0]])
def test_what_is_no_number_is_refused(given):
    with pytest.raises(ProblemError, match=r"metric 'bad' gave (shape|a ).*one number, or a dict"):
        measured({"bad": lambda x, y: given})


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (["acuracy"], ValueError, r"Did you mean 'accuracy'\?"),
        ([span, span], ValueError, "two metrics are called 'span'. Name them"),
        ([lambda x, y: 0], ValueError, "a metric cannot be called '<lambda>'. Name it"),
        ({"score": span}, ValueError, "cannot be called 'score'"),
        ({"train_f1": span}, ValueError, "cannot be called 'train_f1'"),
        ([3], TypeError, "metrics=3 must be a name"),
        (
            {"name": "tests.problems.test_metrics:span", "bye": 2},
            ValueError,
            r"metric 'span' has no setting 'bye'.*Did you mean 'by'",
        ),
        (["torchmetrix:F1Score"], ValueError, "no module 'torchmetrix'"),
    ],
)
def test_what_is_no_metric_is_refused_at_once(given, error, message):
    with pytest.raises(error, match=message):
        check_metrics(given)


@pytest.mark.parametrize(
    ("loss", "labels", "expected"),
    [
        ("cross-entropy", [0, 1, 0, -1], 2 / 3),
        ({"name": "cross-entropy", "ignore_index": 2}, [0, 2, 2, 1], 1 / 2),
        ({"name": "cross-entropy", "ignore_index": 255}, [[0], [255], [0], [255]], 1 / 2),
        ({"name": "cross-entropy", "ignore_index": 255}, [[255]] * 4, math.nan),
        (lambda outputs, targets: outputs.sum(), [[0], [1], [0], [255]], 2 / 3),
        ("bce-with-logits", [[1.0, 0, 0], [1, 1, 0], [0, 0, 1], [0, 1, 1]], 8 / 12),
    ],
)
def test_accuracy_is_that_of_what_counts(loss, labels, expected):
    logits, labels = torch.eye(3)[[0, 1, 2, 0]], torch.tensor(labels)
    meters = make_meters(check_metrics("accuracy"), "cpu", Loss(loss))
    shape = (4, 3, 1) if labels.shape == (4, 1) else (4, 3)
    for at in (slice(3), slice(3, 4)):
        meters["accuracy"].update(logits.reshape(shape)[at], labels[at])
    assert float(meters["accuracy"].compute()) == pytest.approx(expected, nan_ok=True)


def test_a_metric_that_raises_is_named():
    class Broken(Largest):
        def update(self, outputs, targets):
            pass

        def compute(self):
            return {}["total"]

    for metric, words in ((lambda x, y: 1 // 0, "ZeroDivisionError: integer"), (Broken(), "KeyError: 'total'")):
        with pytest.raises(ProblemError, match=f"metric 'mine' raised {words}"):
            tiny(metrics={"mine": metric}).check()


def test_those_of_torchmetrics_are_measured_over_the_whole_set():
    """What they are where they are installed: `pip install labkit[metrics]`."""
    torchmetrics = pytest.importorskip("torchmetrics", reason="needs torchmetrics, the extra `metrics`")
    of = {"task": "multiclass", "num_classes": 3}
    given = {
        "f1": torchmetrics.F1Score(**of, average="macro"),
        "auroc": {"name": "torchmetrics:AUROC", **of},
        "both": torchmetrics.MetricCollection([torchmetrics.Precision(**of), torchmetrics.Recall(**of)]),
    }
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(17, 3, generator=generator), torch.arange(17) % 3
    meters = make_meters(check_metrics(given), "cpu", Loss("cross-entropy"))
    for x, y in zip(logits.split(5), labels.split(5), strict=True):
        for meter in meters.values():
            meter.update(x, y)
    found = {column: x for name, meter in meters.items() for column, x in number(name, meter.compute()).items()}
    whole = {"f1": given["f1"].clone(), "auroc": torchmetrics.AUROC(**of), "both_MulticlassPrecision": torchmetrics.Precision(**of)}
    for name, metric in whole.items():
        assert found[name] == pytest.approx(float(metric(logits, labels)))
    assert set(found) == {*whole, "both_MulticlassRecall"}
    with pytest.raises(ProblemError, match=r"gave shape \(3, 3\)\. A metric is one number"):
        measured({"confusion": lambda x, y: torchmetrics.ConfusionMatrix(**of)(logits, labels)})
