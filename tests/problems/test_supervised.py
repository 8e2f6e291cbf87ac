"""What classifiers and regressors share: settings of a step, several inputs, whole-set metrics, the record."""

from __future__ import annotations

import json
import pickle

import cloudpickle
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from labkit.data import open_dataset
from labkit.errors import ProblemError, RunError
from labkit.problems import Classifier, Clock, Regressor, supervised
from labkit.problems.problem import problem_from_config
from tests.problems.test_problem import START, features, in_notebook, steps, tiny, weights

pytestmark = pytest.mark.usefixtures("cache")


# The settings of a step.


def test_parts_of_a_batch_add_up_to_its_gradient():
    whole, parts = (tiny(accumulate=n, loss={"name": "cross-entropy", "weight": [1, 2, 5]}) for n in (1, 3))
    a, b = whole.build(0), parts.build(0)
    losses = [steps(problem, module, 3)[0] for problem, module in ((whole, a), (parts, b))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and torch.allclose(weights(a), weights(b), atol=1e-6)
    few = tiny(accumulate=50)  # no part of a single sample: BatchNorm cannot train on it
    sizes, module = [], few.build(0)
    module.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    steps(few, module)
    assert sizes == [2] * 5


def test_a_batch_that_is_ignored_as_a_whole_changes_nothing_also_in_parts():
    x = np.random.default_rng(0).normal(size=(40, 1, 4, 4)).astype(np.float32)
    y = np.where(np.arange(40)[:, None, None] < 30, 255, x[:, 0] > 0)
    loss = {"name": "cross-entropy", "ignore_index": 255}
    for n in (1, 2):
        problem = Classifier(lambda: nn.Conv2d(1, 2, 1), (x, y), loss=loss, accumulate=n)
        module, train = problem.new_module(0), problem.train_indices()
        ignored = train[(problem.load(train)[1] == 255).flatten(1).all(1).numpy()][:8]
        before = weights(module)
        assert steps(problem, module, indices=ignored)[0] == [0] and torch.equal(weights(module), before)


def test_long_gradients_are_shortened_and_reported():
    problem = tiny(clip_norm=0.01, momentum=0.0, lr=1.0)
    module = problem.build(0)
    before, batch = weights(module), problem.load(problem.train_indices()[:10])
    made = problem.step(module, batch, problem.optimisers(module), START)
    assert (weights(module) - before).norm().item() == pytest.approx(0.01, rel=1e-3)
    loose = tiny(clip_norm=1e9).build(0)
    F.cross_entropy(loose(batch[0]), batch[1]).backward()
    norm = torch.cat([p.grad.flatten() for p in loose.parameters()]).norm()
    assert made["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-4)


def test_schedules_multiply_the_rate_of_each_group():
    def two_rates(parameters):
        return torch.optim.SGD([{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:], "lr": 0.01}])

    problem = tiny(optimiser=two_rates, schedule={"name": "step", "at": [0.5]})
    for samples, factor in ((0, 1), (60, 0.1), (20, 1)):
        _, (optimiser,) = steps(problem, problem.build(0), 2, clock=Clock(samples, 100, 1.0))
        assert [group["lr"] for group in optimiser.param_groups] == pytest.approx([0.1 * factor, 0.01 * factor])
    problem = tiny(schedule=lambda clock: 0.5 - clock.passes)
    with pytest.raises(ProblemError, match=r"gave -0.5 after 70 of 100 samples \(pass 1\)"):
        steps(problem, problem.build(0), clock=Clock(70, 100, 1.0))


def broken(*given):
    return 1 / 0


class Broken(torch.optim.SGD):
    def step(self, closure=None):
        raise KeyError("momentum")


@pytest.mark.parametrize(
    ("setting", "given", "words"),
    [
        ("loss", broken, "loss 'broken' raised ZeroDivisionError: division by zero"),
        ("loss", {"name": "tests.problems.test_supervised:broken"}, "loss 'broken' raised ZeroDivisionError"),
        ("schedule", broken, r"schedule broken at 0 of 1 samples \(pass 0\) raised ZeroDivisionError: division by zero"),
        ("schedule", lambda clock: 1 / clock.passes, "schedule .*lambda.* raised ZeroDivisionError"),
        ("augment", broken, "augment=broken raised ZeroDivisionError"),
        ("metrics", [broken], "metric 'broken' raised ZeroDivisionError"),
        ("optimiser", broken, "optimiser broken raised ZeroDivisionError"),
        ("optimiser", Broken, "optimiser Broken raised KeyError: 'momentum'"),
    ],
)
def test_what_a_function_of_the_users_raises_names_it(setting, given, words):
    with pytest.raises(ProblemError, match=words) as caught:
        tiny(**{setting: given}).check()
    assert isinstance(caught.value.__cause__, ZeroDivisionError | KeyError) and "does not fit" not in str(caught.value)


# What is measured.


def test_metrics_are_of_the_whole_set():
    def n_classes(outputs, targets):
        return len(targets.unique())

    problem = tiny(metrics=["accuracy", n_classes])
    problem.check()
    found = problem.measure(problem.build(0), problem.train_indices(), batch_size=7)
    assert found["n_classes"] == 3 and found["accuracy"] == pytest.approx(found["score"])
    assert list(found) == ["loss", "score", "accuracy", "n_classes"]
    assert (
        problem.quality(problem.build(0), problem.train_indices())
        == problem.measure(problem.build(0), problem.train_indices())["score"]
    )


def test_samples_of_many_lengths_are_measured_and_listed_over_several_batches(monkeypatch):
    class Tags(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 3)

        def forward(self, ids):
            return self.embed(ids).movedim(-1, 1)

    def right(outputs, targets):
        return (outputs.argmax(1) == targets)[targets >= 0].float().mean()

    rows = [{"ids": [i % 9] * (1 + i % 7), "labels": [i % 3] * (1 + i % 7)} for i in range(40)]
    problem = Classifier(Tags, open_dataset(rows, pad=0), metrics=[right])
    module, indices = problem.new_module(0), np.arange(30)
    found = [problem.measure(module, indices, batch_size=n) for n in (3, 30)]
    assert found[0] == pytest.approx(found[1]) and found[0]["right"] == pytest.approx(found[0]["score"])
    whole = problem.each(module, indices)
    monkeypatch.setattr(supervised, "MEASURED", 3)
    cut = problem.each(module, indices)
    assert cut["label"].shape == cut["predicted"].shape == (30, 7)
    counted = cut["label"] >= 0
    assert all(np.array_equal(cut[name][counted], whole[name][counted]) for name in ("label", "predicted"))


def test_two_metrics_of_one_name_are_refused():
    metrics = {"bad": lambda outputs, targets: {"a": 1}, "bad_a": lambda outputs, targets: 2}
    with pytest.raises(ProblemError, match="two metrics give 'bad_a'"):
        tiny(metrics=metrics).check()


def test_a_subclass_that_evaluates_itself_is_measured_by_that():
    class Own(Classifier):
        def evaluate(self, module, batch):
            return {"loss": 2.0, "score": 0.25, "n": float(len(batch[1]))}

    problem = Own("lenet", tiny().data)
    assert problem.measure(None, np.arange(12), batch_size=6) == {"loss": 2.0, "score": 0.25, "n": 6.0}
    with pytest.raises(ProblemError, match=r"has an evaluate\(\) of its own: have it return the metrics"):
        Own("lenet", tiny().data, metrics=["accuracy"]).check()


def test_a_metric_may_not_have_the_name_of_a_column_of_the_average():
    one, several = {"ema_score": lambda outputs, targets: 7.0}, {"ema": lambda outputs, targets: {"loss": 7.0}}
    tiny(metrics=one).check()
    for metrics in (one, several):
        with pytest.raises(ProblemError, match="metrics: a number cannot be called 'ema_"):
            tiny(metrics=metrics, ema=0.9).check()


# The record.


def half(clock):
    return 0.5


def own_loss(outputs, targets):
    return F.cross_entropy(outputs, targets)


SETTINGS = {
    "loss": {"name": "cross-entropy", "label_smoothing": 0.1},
    "metrics": {"acc": "accuracy"},
    "optimiser": {"name": "rmsprop", "alpha": 0.9},
    "schedule": half,
    "clip_norm": 1.0,
    "accumulate": 2,
}


def test_each_setting_is_in_the_record_and_found_again():
    config = json.loads(json.dumps(tiny(**SETTINGS).config()))
    assert config["schedule"] == "tests.problems.test_supervised:half" and config["loss"]["label_smoothing"] == 0.1
    again = problem_from_config(config)
    assert again.config() == config
    problem = tiny(**SETTINGS)
    modules = problem.build(0), again.build(0)
    assert [steps(p, m, 3)[0] for p, m in zip((problem, again), modules, strict=True)]
    assert torch.equal(*map(weights, modules))


def test_what_was_not_set_is_not_in_the_record():
    assert not {"loss", "metrics", "clip_norm", "accumulate"} & set(tiny().config())
    assert tiny(metrics=["accuracy"]).config()["metrics"] == ["accuracy"]
    assert "loss" in Regressor(features, tiny().data).config()


@pytest.mark.parametrize("name", ["loss", "metrics", "optimiser", "schedule"])
def test_a_function_of_a_notebook_travels_by_value_and_the_record_names_it(name):
    def cell(*given):
        return nn.functional.cross_entropy(*given) if len(given) == 2 else 0.5

    function = in_notebook(cell)
    if name == "optimiser":
        function = in_notebook(lambda parameters: nn.Module and __import__("torch").optim.SGD(parameters, lr=0.1))
    problem = tiny(**{name: [function] if name == "metrics" else function})
    again = pickle.loads(cloudpickle.dumps(problem))
    again.check()
    config = json.loads(json.dumps(again.config()))
    recorded = config[name][0] if name == "metrics" else config[name]
    assert recorded == {"by_value": function.__qualname__} and config == json.loads(json.dumps(problem.config()))
    with pytest.raises(RunError, match=f"{name} .* of this run was written in a notebook"):
        problem_from_config(config)
