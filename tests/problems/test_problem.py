"""Problems: deterministic, light to send, honest about what does not fit, and one step that learns."""

from __future__ import annotations

import json
import math
import pickle
import types

import cloudpickle
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from labkit.data import open_dataset
from labkit.errors import DataError, ProblemError, RunError
from labkit.models import evaluating, seeded
from labkit.problems import Classifier, Clock, Problem
from labkit.problems.problem import problem_from_config

pytestmark = pytest.mark.usefixtures("cache")
START = Clock(0, 100, 0.0)


def images(n=60, shape=(1, 8, 8), n_classes=3):
    """Noise with a class-dependent bright row, so that a few steps learn something."""
    generator = np.random.default_rng(0)
    y = np.arange(n) % n_classes
    x = generator.normal(size=(n, *shape)).astype(np.float32)
    x[np.arange(n), 0, y] += 3
    return x, y


def tiny(**options):
    options = {"model": "lenet", "model_args": {"width": 0.25}, "data": images(), "batch_size": 10, **options}
    return Classifier(options.pop("model"), options.pop("data"), **options)


def features(shape, n_classes):
    return nn.Linear(shape[0], n_classes)


def in_notebook(function):
    """The function as if a notebook cell had defined it."""
    made = types.FunctionType(function.__code__, {"__name__": "__main__", "nn": nn}, function.__name__)
    assert made.__module__ == "__main__"
    made.__qualname__ = function.__name__
    return made


def weights(module):
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def steps(problem, module, n=1, clock=START, indices=None):
    optimisers = problem.optimisers(module)
    batch = problem.load(problem.train_indices()[: problem.batch_size] if indices is None else indices)
    return [float(problem.step(module, batch, optimisers, clock)["loss"]) for _ in range(n)], optimisers


# Building and stepping.


def test_the_same_seed_gives_the_same_weights_and_the_global_generator_stays():
    problem, before = tiny(), torch.get_rng_state()
    a, b, c = (weights(problem.build(seed)) for seed in (5, 5, 6))
    problem.check()
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(before, torch.get_rng_state())


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


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("model", ["lenet", "resnet20"])
def test_channels_last_changes_the_memory_and_not_the_result(channels, model):
    data = images(shape=(channels, 9, 8))
    plain, last = (tiny(model=model, data=data, channels_last=flag) for flag in (False, True))
    a, b = (problem.load(np.arange(5)) for problem in (plain, last))
    assert torch.equal(a[0], b[0]) and b[0].stride() == (72 * channels, 1, 8 * channels, channels)
    modules = [problem.build(0) for problem in (plain, last)]
    losses = [steps(problem, module, 3)[0] for problem, module in zip((plain, last), modules, strict=True)]
    assert np.allclose(*losses, rtol=1e-4)
    assert torch.allclose(*(weights(module) for module in modules), atol=1e-4)


def test_channels_last_leaves_features_and_takes_volumes():
    x, y = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32), np.arange(20) % 2
    assert tiny(model=features, model_args=None, data=(x, y), channels_last=True).load(np.arange(3))[0].shape == (3, 5)
    volumes = tiny(data=images(shape=(2, 8, 4, 4)), channels_last=True)
    assert volumes.load(np.arange(3))[0].is_contiguous(memory_format=torch.channels_last_3d)
    volumes.check()


# Measuring.


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


def test_evaluate_restores_after_an_error():
    problem = tiny()
    module = problem.build(0)
    with pytest.raises(RuntimeError), evaluating(module):
        assert not module.training and not torch.is_grad_enabled()
        raise RuntimeError("stop")
    assert module.training and torch.is_grad_enabled()


def test_training_reaches_a_good_score_on_digits():
    problem = Classifier("lenet", "digits", batch_size=50, model_args={"width": 0.5}, train_samples=600)
    module, order = problem.build(0), problem.train_indices()
    optimisers = problem.optimisers(module)
    for at in range(0, 8 * 600, 50):
        problem.step(module, problem.load(order[(at + np.arange(50)) % 600]), optimisers, START)
    assert problem.score(module, problem.load(problem.score_indices())) > 0.9


# The samples.


def test_train_and_score_samples_are_disjoint_and_the_same_everywhere():
    problem = Classifier(data="digits")
    train, score, test = problem.train_indices(), problem.score_indices(), problem.test_indices()
    assert score.size == 256 and not np.isin(train, score).any()
    assert train.size + score.size == problem.dataset.n_train and test.size == problem.dataset.n_test
    assert train.dtype == score.dtype == test.dtype == np.int64
    counts = np.bincount(problem.labels(score), minlength=10)
    assert counts.min() >= 24 and counts.max() <= 27
    again = pickle.loads(pickle.dumps(problem))
    assert np.array_equal(train, again.train_indices()) and np.array_equal(score, again.score_indices())
    train[:] = 0
    assert problem.train_indices().any(), "a caller may do with its indices what it likes"


def test_train_samples_keeps_the_first_of_the_same_order():
    few, more = (Classifier(data="digits", train_samples=k, test_samples=k) for k in (7, 19))
    assert np.array_equal(few.train_indices(), more.train_indices()[:7])
    assert np.array_equal(few.test_indices(), more.test_indices()[:7])


def test_few_samples_give_a_smaller_score_set():
    problem = tiny(score_samples=256)
    assert problem.score_indices().size == problem.dataset.n_train // 5


def test_more_samples_than_there_are():
    n_train, n_test = open_dataset("digits").n_train, open_dataset("digits").n_test
    message = f"train_samples=5000, but the data have {n_train - 256} beside the 256 of the score set"
    with pytest.raises(ProblemError, match=message):
        Classifier(data="digits", train_samples=5000).check()
    with pytest.raises(ProblemError, match=f"test_samples=5000, but the data have {n_test} in the test split"):
        Classifier(data="digits", test_samples=5000).check()


# check().


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["lenet", "resnet20", "vgg3"])
def test_check_passes_where_all_fits(model, precision):
    tiny(model=model, precision=precision, train_samples=17).check()


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


def test_a_model_that_returns_no_tensor():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1)), x

    with pytest.raises(ProblemError, match="gave a tuple for 2 samples"):
        tiny(model=lambda: Pair(64, 3), model_args=None).check()


def test_an_error_inside_the_model_is_explained():
    problem = tiny(model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(63, 3)), model_args=None)
    expected = r"model .*lambda.* does not fit data 'arrays' of shape \(1, 8, 8\): RuntimeError: mat1 and mat2"
    with pytest.raises(ProblemError, match=expected) as caught:
        problem.check()
    assert isinstance(caught.value.__cause__, RuntimeError) and "\n" not in str(caught.value)


def test_an_error_while_building_is_explained():
    def broken():
        raise KeyError("hidden")

    with pytest.raises(ProblemError, match=r"broken cannot be built for data 'arrays' .*: KeyError: 'hidden'"):
        tiny(model=broken, model_args=None).check()


# Arguments.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size=0 must be at least 1"),
        ({"batch_size": 2.5}, TypeError, "batch_size=2.5 must be a whole number"),
        ({"lr": 0}, ValueError, "lr=0 must be above 0"),
        ({"lr": math.nan}, ValueError, "lr=nan must be"),
        ({"momentum": 1.0}, ValueError, "momentum=1 must be at least 0 and below 1"),
        ({"weight_decay": -1}, ValueError, "weight_decay=-1 must be at least 0"),
        ({"optimiser": "sdg"}, ValueError, r"optimiser='sdg' .* Known: sgd, adam, adamw. Did you mean 'sgd'\?"),
        ({"schedule": "cosin"}, ValueError, r"Known: constant, cosine. Did you mean 'cosine'\?"),
        ({"precision": "float16"}, ValueError, r"Known: float32, bfloat16. Did you mean 'b?float\d+'\?"),
        ({"channels_last": "no"}, ValueError, "channels_last='no' is not known"),
        ({"score_samples": 0}, ValueError, "score_samples=0"),
        ({"train_samples": -3}, ValueError, "train_samples=-3"),
        ({"test_samples": "all"}, TypeError, "test_samples='all'"),
        ({"model": "lenett"}, ValueError, r"model='lenett' .* Did you mean 'lenet'\?"),
        ({"model": nn.Linear(1, 1)}, TypeError, "a function that makes a module"),
        ({"data": 17}, DataError, "data is a int"),
    ],
)
def test_bad_arguments_are_refused_at_once(options, error, message):
    with pytest.raises(error, match=message):
        tiny(**options)


def test_an_unknown_name_of_data_is_refused_on_first_use():
    with pytest.raises(DataError, match=r"Did you mean 'fashion-mnist'\?"):
        Classifier(data="fashon-mnist").check()


# Travelling.


def test_arrays_travel_by_reference():
    x, y = images(n=3000, shape=(1, 16, 16))
    problem = tiny(data=(x, y))
    problem.check()
    sent = cloudpickle.dumps(problem)
    assert len(sent) < 5_000
    again = pickle.loads(sent)
    assert torch.equal(weights(again.build(1)), weights(problem.build(1)))
    a, b = again.load(np.arange(5)), problem.load(np.arange(5))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_a_function_of_a_notebook_travels_by_value():
    def net(shape, n_classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, n_classes))

    problem = tiny(model=in_notebook(net), model_args=None)
    again = pickle.loads(cloudpickle.dumps(problem))
    assert again.model is not problem.model
    again.check()
    assert torch.equal(weights(again.build(2)), weights(problem.build(2)))


def test_other_data_under_the_same_name_is_noticed(tmp_path, monkeypatch):
    x, y = images()
    np.save(tmp_path / "x_train.npy", x)
    np.save(tmp_path / "y_train.npy", y)
    monkeypatch.chdir(tmp_path.parent)
    problem = tiny(data=tmp_path.name)  # relative: a worker may run elsewhere
    monkeypatch.chdir("/")
    problem.check()
    sent = pickle.dumps(problem)
    assert pickle.loads(sent).dataset.n_train == problem.dataset.n_train
    np.save(tmp_path / "x_train.npy", x[:40])
    np.save(tmp_path / "y_train.npy", y[:40])
    with pytest.raises(DataError, match=r"here, but .* where the problem comes from. Point LABKIT_DATA"):
        pickle.loads(pickle.dumps(pickle.loads(sent))).check()


# The record.


def test_config_round_trip():
    problem = tiny(data="digits", lr=0.1, train_samples=17, schedule="cosine", channels_last=True)
    config = json.loads(json.dumps(problem.config()))
    assert config["kind"] == "labkit:Classifier" and config["model"] == "lenet" and config["data"] == "digits"
    again = problem_from_config(config)
    assert again.config() == config
    assert torch.equal(weights(again.build(0)), weights(problem.build(0)))


def test_config_names_arrays_by_their_shards():
    problem = tiny()
    config = json.loads(json.dumps(problem.config()))
    assert config["data"] == problem.dataset.path
    again = problem_from_config(config)
    assert torch.equal(again.load(np.arange(5))[0], problem.load(np.arange(5))[0])
    assert np.array_equal(again.train_indices(), problem.train_indices())
    assert again.config() == config


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "builtins:dict"}, "'builtins:dict' .* is not a Problem"),
        ({"kind": None}, "does not describe a problem"),
        ({"kind": "no_such_module:P"}, "no module 'no_such_module'"),
        ({"colour": 3}, "unexpected keyword argument 'colour'"),
        ({"optimiser": "sdg"}, "Did you mean 'sgd'"),
    ],
)
def test_a_record_that_describes_no_problem(change, message):
    with pytest.raises(RunError, match=message):
        problem_from_config({**tiny().config(), **change})


# A problem of the user's own: two networks, two optimisers, a weight that follows the clock.


class TinyGan(Problem):
    def __init__(self, data, *, lr=0.01, **common):
        super().__init__(data, **common)
        self.lr = lr

    def build(self, seed):
        with seeded(seed):
            return nn.ModuleDict({"generator": nn.Linear(2, 64), "critic": nn.Linear(64, 1)})

    def optimisers(self, module):
        return tuple(torch.optim.SGD(module[part].parameters(), self.lr) for part in ("generator", "critic"))

    def step(self, module, batch, optimisers, clock):
        real = batch[0].flatten(1)
        fake = module["generator"](torch.ones(len(real), 2))
        losses = []
        for optimiser, sign in zip(optimisers, (1, -1), strict=True):
            optimiser.zero_grad()
            loss = sign * (clock.passes + 1) * (module["critic"](real).mean() - module["critic"](fake).mean())
            loss.backward(inputs=optimiser.param_groups[0]["params"], retain_graph=True)
            losses.append(loss.detach())
        for optimiser in optimisers:
            optimiser.step()
        return {"loss": losses[0], "critic": losses[1]}

    def evaluate(self, module, batch):
        with evaluating(module):
            q = torch.sigmoid(module["critic"](batch[0].flatten(1))).mean().item()
        return {"loss": -q, "score": q}


def test_a_subclass_gives_four_methods_and_has_the_rest():
    problem = TinyGan("digits", lr=0.02, batch_size=17)
    problem.check()
    assert problem.score(problem.build(0), problem.load(problem.score_indices())) > 0
    config = json.loads(json.dumps(problem.config()))
    assert config["kind"].endswith(":TinyGan") and config["lr"] == 0.02 and config["batch_size"] == 17
    assert problem_from_config(config).config() == config


def test_a_subclass_that_forgets_a_method_or_a_value():
    class Empty(Problem):
        pass

    with pytest.raises(ProblemError, match=r"Empty cannot be built .* Empty must define build\(seed\)"):
        Empty("digits").check()

    class NoScore(TinyGan):
        def evaluate(self, module, batch):
            return {"loss": 1.0}

    with pytest.raises(ProblemError, match=r"NoScore: evaluate\(\) gave \{'loss': 1.0\}"):
        NoScore("digits").check()


def test_unlabelled_data_is_no_classification():
    problem = tiny()
    problem.dataset.n_classes = None
    with pytest.raises(ProblemError, match="have no classes"):
        problem.check()
