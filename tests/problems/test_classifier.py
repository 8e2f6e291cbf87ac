"""The classifier: its step is the plain loop, its settings are checked, and what does not fit is named."""

from __future__ import annotations

import json
import math
import pickle
import re

import cloudpickle
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import labkit
from labkit.errors import DataError, ProblemError, RunError
from labkit.problems import Classifier, Clock
from labkit.problems.problem import problem_from_config
from tests.problems.test_problem import START, features, in_notebook, steps, tiny, weights

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize("optimiser", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_lower_the_loss(optimiser, precision):
    problem = tiny(optimiser=optimiser, lr=0.05 if optimiser == "sgd" else 0.005, precision=precision)
    module = problem.build(0)
    losses, _ = steps(problem, module, 5)
    assert losses[1] < losses[0] and losses[-1] < losses[1]
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())


def test_step_is_the_plain_loop():
    problem = tiny(momentum=0.9, weight_decay=0.01)
    ours, theirs = problem.build(0), problem.build(0)
    steps(problem, ours, 4)
    optimiser = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    x, y = problem.load(problem.train_indices()[:10])
    for _ in range(4):
        optimiser.zero_grad()
        F.cross_entropy(theirs(x), y).backward()
        optimiser.step()
    assert torch.equal(weights(ours), weights(theirs))


def test_step_trains_parameters_that_are_views_of_one_buffer():
    problem = tiny()
    module, copy = problem.build(0), problem.build(0)
    flat = weights(module)
    nn.utils.vector_to_parameters(flat, module.parameters())
    assert next(module.parameters()).data_ptr() == flat.data_ptr()
    steps(problem, module, 2)
    steps(problem, copy, 2)
    assert torch.equal(flat, weights(copy))


def test_step_returns_a_tensor_without_gradient():
    problem = tiny()
    module = problem.build(0)
    loss = problem.step(module, problem.load(problem.train_indices()[:4]), problem.optimisers(module), START)["loss"]
    assert loss.shape == () and not loss.requires_grad


def test_cosine_follows_the_clock_and_constant_leaves_lr_alone():
    problem = tiny(schedule="cosine", lr=0.2)
    for samples, lr in ((0, 0.2), (25, 0.1 * (1 + math.cos(math.pi / 4))), (50, 0.1), (100, 0.0), (130, 0.0)):
        _, (optimiser,) = steps(problem, problem.build(0), clock=Clock(samples, 100, 1.0))
        assert optimiser.param_groups[0]["lr"] == pytest.approx(lr)
    problem = tiny(lr=0.2)
    module = problem.build(0)
    (optimiser,) = problem.optimisers(module)
    optimiser.param_groups[0]["lr"] = 0.1
    problem.step(module, problem.load(problem.train_indices()[:4]), (optimiser,), Clock(50, 100, 1.0))
    assert optimiser.param_groups[0]["lr"] == 0.1


def test_momentum_is_the_first_beta_of_adam():
    (optimiser,) = tiny(optimiser="adamw", momentum=0.7, weight_decay=0.1).optimisers(nn.Linear(2, 2))
    assert optimiser.param_groups[0]["betas"] == (0.7, 0.999) and optimiser.param_groups[0]["weight_decay"] == 0.1


def test_frozen_parameters_are_not_trained():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    assert len(tiny().optimisers(module)[0].param_groups[0]["params"]) == 2


def test_evaluate_measures_in_evaluation_mode_and_restores_what_was():
    def dropping(shape, n_classes):
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.BatchNorm1d(64), nn.Linear(64, n_classes))

    problem = tiny(model=dropping, model_args=None)
    module, batch = problem.build(0), problem.load(problem.score_indices())
    module[2].eval()  # somebody's frozen layer
    first, second = problem.evaluate(module, batch), problem.evaluate(module, batch)
    assert first == second and set(first) == {"loss", "score"}
    assert all(isinstance(value, float) for value in first.values())
    assert module.training and module[1].training and not module[2].training
    assert module[2].num_batches_tracked == 0
    assert problem.score(module, batch) == first["score"] and 0 <= first["score"] <= 1


def test_training_reaches_a_good_score_on_digits():
    problem = Classifier("lenet", "digits", batch_size=50, model_args={"width": 0.5}, train_samples=600)
    module, order = problem.build(0), problem.train_indices()
    optimisers = problem.optimisers(module)
    for at in range(0, 8 * 600, 50):
        problem.step(module, problem.load(order[(at + np.arange(50)) % 600]), optimisers, START)
    assert problem.score(module, problem.load(problem.score_indices())) > 0.9


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["lenet", "resnet20", "vgg3"])
def test_check_passes_where_all_fits(model, precision):
    before = torch.get_rng_state()
    tiny(model=model, precision=precision, train_samples=17).check()
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_of_the_users_own_on_features():
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    problem = Classifier(features, (x, (x[:, 0] > 0).astype(int)), lr=0.5, batch_size=20)
    problem.check()
    losses, _ = steps(problem, problem.build(0), 5)
    assert losses[-1] < losses[0]


def test_features_do_not_fit_a_convolutional_network():
    with pytest.raises(ProblemError, match=r"lenet needs images .* the data have shape \(4,\)"):
        tiny(data=(np.zeros((20, 4), np.float32), np.arange(20) % 2)).check()


def test_a_wrong_last_layer_is_named_with_both_shapes():
    problem = tiny(model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), model_args=None)
    with pytest.raises(ProblemError, match=r"gave shape \(2, 4\) for 2 samples of shape \(1, 8, 8\).*shape \(2, 3\)"):
        problem.check()


@pytest.mark.parametrize("loss", ["mse", "huber", "bce-with-logits", nn.L1Loss()])
def test_a_loss_of_numbers_for_labels_of_classes_is_named_with_what_takes_them(loss):
    with pytest.raises(ProblemError, match=r"^loss .* labels of 3 classes\. Use loss='cross-entropy'; .* labkit\.Regressor"):
        tiny(loss=loss).check()
    two = Classifier(nn.Linear(4, 2), (np.zeros((20, 4), np.float32), np.arange(20) % 2), loss="mse")
    with pytest.raises(ProblemError, match="loss 'mse' takes one output for two classes; 'cross-entropy' takes one for each"):
        two.check()


def test_a_model_that_returns_no_tensor():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1)), x

    with pytest.raises(ProblemError, match="gave a tuple for 2 samples"):
        tiny(model=lambda: Pair(64, 3), model_args=None).check()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size=0 must be at least 1"),
        ({"batch_size": 2.5}, TypeError, "batch_size=2.5 must be a whole number"),
        ({"lr": 0}, ValueError, "lr=0 must be above 0"),
        ({"lr": math.nan}, ValueError, "lr=nan must be"),
        ({"momentum": 1.0}, ValueError, "momentum=1 must be at least 0 and below 1"),
        ({"weight_decay": -1}, ValueError, "weight_decay=-1 must be at least 0"),
        ({"optimiser": "sdg"}, ValueError, r"optimiser='sdg' .* Known: sgd, adam, adamw, .*rprop. Did you mean 'sgd'\?"),
        ({"schedule": "cosin"}, ValueError, r"Known: constant, cosine, .*step. Did you mean 'cosine'\?"),
        ({"precision": "float16"}, ValueError, r"Known: float32, bfloat16, auto. Did you mean 'b?float\d+'\?"),
        ({"channels_last": "no"}, TypeError, "channels_last='no' must be True or False"),
        ({"score_samples": 0}, ValueError, "score_samples=0"),
        ({"train_samples": -3}, ValueError, "train_samples=-3"),
        ({"test_samples": "all"}, TypeError, "test_samples='all'"),
        ({"model": "lenett"}, ValueError, r"model='lenett' .* Did you mean 'lenet'\?"),
        ({"schedule": torch.optim.lr_scheduler.StepLR}, TypeError, "counts the steps of one process"),
        ({"data": 17}, DataError, "data is a int"),
    ],
)
def test_bad_arguments_are_refused_at_once(options, error, message):
    with pytest.raises(error, match=message):
        tiny(**options)


def test_a_function_of_a_notebook_travels_by_value():
    def net(shape, n_classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, n_classes))

    problem = tiny(model=in_notebook(net), model_args=None)
    again = pickle.loads(cloudpickle.dumps(problem))
    assert again.model is not problem.model
    again.check()
    assert torch.equal(weights(again.build(2)), weights(problem.build(2)))


def test_config_names_an_importable_model_by_its_path():
    config = tiny(model=nn.Flatten).config()
    assert config["model"] == "torch.nn.modules.flatten:Flatten"
    assert problem_from_config(tiny(model="labkit.models.cnn:lenet").config()).build(0)


def test_config_of_a_notebook_function_is_refused():
    config = tiny(model=in_notebook(features), model_args=None).config()
    assert json.loads(json.dumps(config))["model"] == {"by_value": "features"}
    with pytest.raises(RunError, match=r"model 'features' of this run was written in a notebook.*problem=problem"):
        problem_from_config(config)
    with pytest.raises(RunError, match="model_args 'ReLU' of this run"):
        problem_from_config(tiny(model_args={"act": nn.ReLU}).config())


def test_unlabelled_data_is_no_classification():
    problem = tiny()
    problem.dataset.n_classes = None
    with pytest.raises(ProblemError, match="have no classes"):
        problem.check()


@pytest.mark.parametrize(
    "loss", ["bce-with-logits", lambda outputs, y: F.binary_cross_entropy_with_logits(outputs[:, 0], y.float())]
)
def test_one_output_says_yes_or_no_to_two_classes(loss):
    x = np.linspace(-1, 1, 60, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)
    problem = Classifier(lambda: nn.Linear(3, 1), (x, (x[:, 0] > 0).astype(int)), loss=loss, lr=0.5, batch_size=20)
    problem.check()
    module = problem.build(0)
    steps(problem, module, 20)
    assert problem.measure(module, problem.test_indices(), "test")["score"] == 1
    outputs = np.array([[-2.0], [3.0]], np.float32)
    assert problem.predicted(outputs).tolist() == [0, 1]
    assert problem.probabilities(outputs)[:, 1] == pytest.approx([0.1192, 0.9526], abs=1e-4)
    assert problem.probabilities(outputs).sum(1) == pytest.approx(1)
    if loss == "bce-with-logits":
        assert problem.n_outputs == 1


def test_labels_that_a_loss_would_count_wrongly_are_refused():
    x = np.random.default_rng(0).normal(size=(40, 1, 4, 4)).astype(np.float32)
    several, mask = (x[:, 0, 0] > 0).astype(int), (x[:, 0] > 0).astype(np.uint8)
    mask[:, 0] = 255
    with pytest.raises(ProblemError, match=r"do not sum to 1.*bce-with-logits"):
        Classifier(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), (x, several)).check()
    Classifier(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), (x, np.eye(4)[several.sum(1) % 4])).check()  # one-hot
    with pytest.raises(ProblemError, match=r"y is 255 in places, which is no class of 0..1. .*'ignore_index': 255"):
        Classifier(lambda: nn.Conv2d(1, 2, 1), (x, mask)).check()
    problem = Classifier(lambda: nn.Conv2d(1, 2, 1), (x, mask), loss={"name": "cross-entropy", "ignore_index": 255})
    problem.check()
    assert problem.dataset.fields["y"].no_class == (255,)


def test_a_module_is_what_every_run_begins_from_and_stays_as_it_is():
    net = nn.Linear(4, 3)
    before = weights(net)
    x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    problem = Classifier(net, (x, np.arange(40) % 3), batch_size=10)
    module = problem.new_module(1)
    steps(problem, module, 2)
    assert torch.equal(weights(problem.new_module(2)), before) and torch.equal(weights(net), before)
    assert not torch.equal(weights(module), before)


class Own(torch.utils.data.Dataset):
    """Items that a function makes of a number."""

    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 30

    def __getitem__(self, i):
        return self.item(i)


class Two(nn.Linear):
    def forward(self, a, b):
        return super().forward(a + b)


class Named(nn.Linear):
    def forward(self, x):
        return {"logits": super().forward(x)}


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        (nn.Conv2d(3, 2, 1), Own(lambda i: (np.zeros((4, 4, 3), np.uint8), i % 2)), "bytes of shape (4, 4, 3). Make them floats"),
        (Two(4, 2), Own(lambda i: (torch.ones(4), torch.ones(4))), "Which are inputs is said by open_dataset(data, inputs=[...])"),
        (nn.LSTM(1, 2), (np.random.default_rng(0).random((30, 5, 1)), np.arange(30) % 2), "with open_dataset(..., as_given='x')"),
        (Named(4, 2), Own(lambda i: (torch.ones(4), i % 2)), "Have its forward() return the logits of that"),
        (nn.Linear(4, 2), Own(lambda i: (torch.ones(4), torch.tensor([i % 2]))), "one number a sample: (n,), not (n, 1)"),
    ],
)
def test_what_does_not_fit_says_what_to_do(model, data, words):
    with pytest.raises(ProblemError, match=re.escape(words)):
        Classifier(model, data, loss="cross-entropy" if "inputs=" not in words else "bce-with-logits").check()


def test_labels_that_are_floats_of_0_and_1_are_yes_or_no():
    problem = Classifier(nn.Linear(4, 1), Own(lambda i: (torch.ones(4) * (i % 2), float(i % 2))), loss="bce-with-logits")
    problem.check()
    assert problem.n_outputs == 1 and problem.predicted(np.array([[-1.0], [1.0]], np.float32)).tolist() == [0, 1]
    assert problem.probabilities(np.zeros((2, 1), np.float32)).tolist() == [[0.5, 0.5]] * 2


@pytest.mark.parametrize("kind", [["a", "b", "c"], [0, 1, 2]])
def test_the_column_of_a_table_that_is_the_class_is_led_to_where_it_is_said(kind):
    """By the call that mends it, whether its values are texts or whole numbers."""
    table = pd.DataFrame({"wide": np.linspace(0, 1, 60), "age": np.linspace(1, 0, 60), "kind": kind * 20})
    net = lambda shape, n: nn.Linear(shape[0], n)  # noqa: E731
    with pytest.raises((DataError, ProblemError)) as caught:
        labkit.Classifier(net, table).check()
    (call,) = re.findall(r"labkit\.open_dataset\(data, label='kind'\)", str(caught.value))
    labkit.Classifier(net, eval(call, {"labkit": labkit, "data": table}), score_samples=6).check()
