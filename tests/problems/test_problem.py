"""What every problem has: samples and seeds that are the same everywhere, a light reference, a record, one mean over a set."""

from __future__ import annotations

import json
import math
import pickle
import re
import types
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import labkit
from labkit.data import open_dataset
from labkit.errors import DataError, ProblemError, RunError
from labkit.models import evaluating, seeded
from labkit.problems import Classifier, Clock, Problem
from labkit.problems.problem import draws, problem_from_config

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
    volumes = tiny(data=images(shape=(2, 8, 6, 6)), channels_last=True)
    assert volumes.load(np.arange(3))[0].is_contiguous(memory_format=torch.channels_last_3d)
    volumes.check()


# Measuring.


def noisy(x):
    assert x.dtype == torch.float32
    return x + torch.rand(len(x), 1, 1, 1)


def mirrored(x, y):
    return (x.flip(-1), y) if np.random.rand() < 2 else None


def test_augmentation_is_drawn_from_the_generator_of_a_worker_and_measuring_goes_without():
    problem = tiny(augment=noisy)
    indices = problem.train_indices()[:5]
    before = torch.get_rng_state()
    batches = [
        [problem.draw(indices, generator=one)[0] for _ in range(2)] for one in (draws(0, 1, 2), draws(0, 1, 2), draws(0, 1, 3))
    ]
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(batches[0], batches[1], rtol=0, atol=0)
    assert not torch.equal(*batches[0]) and not torch.equal(batches[0][0], batches[2][0])
    x, y = problem.load(indices)
    assert (batches[0][0] - x).min() > 0 and (batches[0][0] - x).max() < 1
    both = tiny(augment=f"{__name__}:mirrored").draw(indices, generator=draws(0, 0))
    assert torch.equal(both[0], x.flip(-1)) and torch.equal(both[1], y)
    generator = draws(0, 0)
    state = generator.get_state()
    assert torch.equal(tiny().draw(indices, generator=generator)[0], x) and torch.equal(state, generator.get_state())


def test_augmentation_is_recorded_and_what_is_none_is_refused():
    assert tiny(augment=noisy).config()["augment"] == f"{__name__}:noisy" and "augment" not in tiny().config()
    again = problem_from_config(tiny(model="lenet", augment=noisy).config())
    assert torch.equal(again.draw([1])[0], tiny(augment=noisy).draw([1])[0])
    with pytest.raises(TypeError, match="augment=3"):
        tiny(augment=3)
    for wrong, words in ((lambda x: x[:1], "made"), (lambda x: x.double(), "float64"), (lambda x: None, "gave a NoneType")):
        with pytest.raises(ProblemError, match=words):
            tiny(augment=wrong).check()


class Items:
    """A set of the user's own that draws at random."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        return {"a": torch.full((4,), float(i)) + torch.rand(4), "b": np.float32([i + np.random.rand()]), "y": i % 2}


def test_items_of_the_users_own_are_read_by_the_generator_of_a_worker():
    problem = Classifier(lambda: nn.Linear(4, 2), Items(), batch_size=8)
    indices = problem.train_indices()[:3]
    draw = [problem.draw(indices, generator=draws(0, 1)) for _ in range(2)]
    (a, b), y = draw[0]
    assert a.shape == (3, 4) and b.shape == (3, 1) and y.dtype == torch.int64 and torch.equal(a, draw[1][0][0])
    (c, d), _ = problem.draw(indices, generator=draws(0, 2))
    assert not torch.equal(a, c) and not torch.equal(b, d) and torch.equal(a.floor(), c.floor())
    torch.testing.assert_close(
        problem.load(indices), problem.load(indices), rtol=0, atol=0
    )  # measured on the same samples each time
    assert problem.config()["data"] == {"by_value": "Items"}
    with pytest.raises(RunError, match="'Items' of this run"):
        problem_from_config({**problem.config(), "model": "lenet"})
    named = Classifier(lambda: nn.Linear(4, 2), f"{__name__}:Items", batch_size=8)
    assert named.config()["data"] == f"{__name__}:Items" and named.dataset.n_classes == 2
    assert pickle.loads(pickle.dumps(named.dataset)).fields == named.dataset.fields


def test_samples_without_classes_have_no_strata():
    problem = Classifier("lenet", open_dataset({"x": images()[0], "size": np.linspace(0, 1, 60)}, target="size"))
    x, size = problem.load(problem.train_indices()[:2])
    assert size.dtype == torch.float32 and x.shape == (2, 1, 8, 8) and len(problem.score_indices()) == 10
    with pytest.raises(DataError, match="no field with one label a sample"):
        problem.labels(problem.train_indices())
    assert Classifier("lenet", open_dataset({"x": images()[0]})).load(np.arange(2))[1] is None
    several = open_dataset({"x": images()[0], "u": np.arange(60) % 2, "v": np.arange(60.0)}, label="u", target="v")
    assert {name: part.dtype for name, part in Classifier("lenet", several).load(np.arange(2))[1].items()} == {
        "u": torch.int64,
        "v": torch.float32,
    }


class Counting(Problem):
    """A score that is known beforehand: the mean label; and the sizes of the batches that were measured."""

    def evaluate(self, module, batch):
        self.sizes.append(len(batch[1]))
        return {"loss": 1.0, "score": float(batch[1].float().mean()), "largest": int(batch[1].max()), "name": "counting"}


def counting(kind=Counting):
    problem = kind((np.zeros((600, 2)), (np.arange(600) % 7 == 0).astype(int)))
    problem.sizes = []
    return problem


def test_a_set_is_measured_in_batches_that_count_by_their_samples():
    problem, indices = counting(), np.arange(513)
    found = problem.measure(None, indices)
    assert problem.sizes == [256, 257]  # nobody is measured alone
    assert found == {"loss": 1.0, "score": pytest.approx(problem.labels(indices).mean()), "largest": 1.0}
    assert problem.measure(None, indices, batch_size=7)["score"] == pytest.approx(found["score"]) and problem.sizes[-1] == 2
    assert problem.measure(None, np.arange(60), "test", batch_size=50)["score"] == pytest.approx(
        problem.dataset.labels("test").mean()
    )
    assert problem.quality(None, indices) == found["score"] and problem.quality(None, indices[:0]) == 0
    with pytest.raises(ProblemError, match="measured on no samples"):
        problem.measure(None, indices[:0])


def test_quality_goes_by_what_a_subclass_replaces():
    class Whole(Counting):
        def measure(self, module, indices, split="train", device="cpu", batch_size=256):
            return {"loss": 0.0, "score": torch.tensor(len(indices) / 1024)}

    class Share(Counting):
        def score(self, module, batch):
            return float(len(batch[1]) > 256)

    quality = counting(Whole).quality(None, np.arange(512))
    assert quality == 0.5 and type(quality) is float
    assert counting(Share).quality(None, np.arange(513)) == 257 / 513
    assert counting(Share).measure(None, np.arange(513))["score"] < 0.2  # the curve is that of evaluate


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


def test_an_error_inside_the_model_is_explained():
    problem = tiny(model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(63, 3)), model_args=None)
    expected = r"model .*lambda.* does not fit data 'arrays' of shape \(1, 8, 8\): RuntimeError: mat1 and mat2"
    with pytest.raises(ProblemError, match=expected) as caught:
        problem.check()
    assert isinstance(caught.value.__cause__, RuntimeError) and "\n" not in str(caught.value)
    assert "in its layer '1', Linear(in_features=63, out_features=3, bias=True), which was given (2, 64)" in str(caught.value)
    assert "pictures of one channel" not in str(caught.value), "it has met those"


class Misspelt(nn.Module):
    """A line of its own for each kind of slip, and one that is a matter of shapes."""

    def __init__(self, slip):
        super().__init__()
        if slip == "constructor":
            self.fc = nn.Linaer(64, 3)
        self.fc, self.slip = nn.Linear(63 if slip == "shape" else 64, 3), slip

    def forward(self, x):
        x = x.flatten(1)
        if self.slip == "layer":
            return self.fcc(x)
        if self.slip == "tensor":
            return self.fc(x.flaten(1))
        if self.slip == "name":
            return self.fc(y)  # noqa: F821
        if self.slip == "call":
            return self.fc(x, 3)
        return self.fc(x)


@pytest.mark.parametrize(
    ("slip", "reason"),
    [
        ("layer", r"self\.fcc\(x\).*has no attribute 'fcc'.* Did you mean 'fc'\?$"),
        ("tensor", r"x\.flaten\(1\).*has no attribute 'flaten'"),
        ("name", r"self\.fc\(y\).*name 'y' is not defined"),
        ("call", r"self\.fc\(x, 3\).*takes 2 positional arguments"),
        ("constructor", r"nn\.Linaer\(64, 3\).*has no attribute 'Linaer'"),
    ],
)
def test_a_slip_in_a_network_is_its_own_error_by_its_line_and_no_matter_of_the_data(slip, reason):
    for shape in ((1, 8, 8), (3, 4, 4)):
        with pytest.raises(ProblemError) as caught:
            tiny(model=lambda: Misspelt(slip), model_args=None, data=images(shape=shape)).check()
        said = str(caught.value)
        (number,) = re.findall(r"has an error of its own, whatever the data, in .*test_problem\.py:(\d+), Misspelt\.", said)
        line = Path(__file__).read_text().splitlines()[int(number) - 1].strip()
        assert re.search(reason, f"{line} {said}") and "open_dataset" not in said and "does not fit" not in said
    with pytest.raises(ProblemError, match="does not fit data 'arrays'"):
        tiny(model=lambda: Misspelt("shape"), model_args=None).check()


def test_an_error_while_building_is_explained():
    def broken():
        raise KeyError("hidden")

    with pytest.raises(ProblemError, match=r"broken cannot be built for data 'arrays' .*: KeyError: 'hidden'"):
        tiny(model=broken, model_args=None).check()


# Arguments.


def test_an_unknown_name_of_data_is_refused_at_once():
    with pytest.raises(DataError, match=r"Did you mean 'fashion-mnist'\?"):
        Classifier(data="fashon-mnist")


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


class Gan(TinyGan):
    """Two networks that are called one after the other, each by its own optimiser, on noise of the worker's own."""

    def networks(self, module):
        return module["generator"], module["critic"]

    def step(self, module, batch, optimisers, clock):
        real, losses = batch[0].flatten(1), {}
        fake = module["generator"](torch.randn(len(real), 2, generator=clock.generator))
        for name, optimiser in zip(("critic", "loss"), reversed(optimisers), strict=True):
            loss = F.softplus(-module["critic"](fake)) if name == "loss" else F.softplus(module["critic"](fake.detach()))
            loss = (loss if name == "loss" else loss + F.softplus(-module["critic"](real))).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses[name] = loss.detach()
        return losses


def test_a_subclass_gives_four_methods_and_has_the_rest():
    problem = TinyGan("digits", lr=0.02, batch_size=17)
    problem.check()
    assert problem.score(problem.build(0), problem.load(problem.score_indices())) > 0
    config = json.loads(json.dumps(problem.config()))
    assert config["kind"].endswith(":TinyGan") and config["lr"] == 0.02 and config["batch_size"] == 17
    assert problem_from_config(config).config() == config


def test_a_fold_is_the_score_set_and_is_in_the_record():
    problem = tiny(train_samples=30)
    parts = [problem.fold(k, 4) for k in range(4)]
    together = np.sort(np.concatenate([part.score_indices() for part in parts]))
    assert len(set(together)) == 30 and all(np.setdiff1d(together, p.score_indices()).size == len(p.train_indices()) for p in parts)
    for part in parts:
        train, held = part.train_indices(), part.score_indices()
        assert not set(train) & set(held) and set(train) | set(held) == set(together) and len(held) in (7, 8)
        assert np.ptp(np.bincount(part.labels(held))) <= 1
    one = parts[1]
    assert len(problem.train_indices()) == 30 and "cross_validation" not in problem.config()
    assert one.config()["cross_validation"] == {"fold": 1, "of": 4, "seed": 0}
    for same in (problem_from_config(json.loads(json.dumps(one.config()))), pickle.loads(pickle.dumps(one)), one.fold(1, 4)):
        assert np.array_equal(same.score_indices(), one.score_indices()) and same.config() == one.config()
        assert np.array_equal(same.train_indices(), one.train_indices())
    assert not np.array_equal(problem.fold(1, 4, seed=1).score_indices(), one.score_indices())
    one.check()


class Chosen(Classifier):
    def train_indices(self):
        return super().train_indices()[::2]


@pytest.mark.parametrize(
    ("fold", "error", "words"),
    [
        ((4, 4), ValueError, "k=4 must be at most 3"),
        ((-1, 4), ValueError, "k=-1"),
        ((0, 1), ValueError, "n=1"),
        ((0, 55), ValueError, "n=55: 54 samples cannot fill so many folds"),
        ((0.5, 4), ValueError, "0.5"),
        (("first", 4), ValueError, "first"),
    ],
)
def test_a_fold_that_is_none_is_refused(fold, error, words):
    with pytest.raises(error, match=words):
        tiny().fold(*fold)
    with pytest.raises(ProblemError, match=r"has train_indices\(\) of its own"):
        Chosen("lenet", images()).fold(0, 4)


def test_the_example_of_contributing_is_a_problem():
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "Autoencoder" in block)
    names = {"labkit": labkit, "seeded": seeded, "evaluating": evaluating, "math": math, "torch": torch, "nn": nn, "F": F}
    exec(code, names)
    problem = names["Autoencoder"]("digits", lr=0.2, batch_size=50)
    problem.check()
    module = problem.build(0)
    before = problem.measure(module, problem.score_indices())
    steps(problem, module, 20)
    assert problem.measure(module, problem.score_indices())["score"] > before["score"] > 0
    assert problem.config()["lr"] == 0.2


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


@pytest.mark.parametrize(("method", "got"), [("step", "a Tensor"), ("evaluate", "nothing")])
def test_what_returns_no_numbers_by_name_is_named(method, got):
    class Returns(TinyGan):
        pass

    setattr(Returns, method, lambda self, *args: torch.tensor(1.0) if method == "step" else None)
    with pytest.raises(ProblemError, match=rf"Returns: {method}\(\) returned {got}.* numbers by name"):
        Returns("digits").check()


@pytest.mark.parametrize(
    ("stepped", "measured", "message"),
    [
        ({3: 1.0}, {}, r"step\(\): a number cannot be called 3"),
        ({"\ud800": 1.0}, {}, r"step\(\): a number cannot be called"),
        ({f"m{i}": 1.0 for i in range(300)}, {}, "301 numbers; 256 at most"),
        ({"a": 10**400}, {}, "'a' of step"),
        ({}, {"version": 1}, r"evaluate\(\): a number cannot be called 'version'"),
        ({}, {"train_loss": 1}, "cannot be called 'train_loss'"),
        ({}, {"q": [1, 2]}, r"'q' of evaluate\(\) is \[1, 2\]"),
        ({}, {"loss": None}, r"'loss' of evaluate\(\) is None"),
    ],
)
def test_numbers_that_cannot_be_in_the_record_are_refused_before_a_run(stepped, measured, message):
    class Mine(Classifier):
        def step(self, *args):
            return super().step(*args) | stepped

        def evaluate(self, *args):
            return super().evaluate(*args) | measured

    with pytest.raises(ProblemError, match=message):
        Mine(features, (np.random.default_rng(0).normal(size=(40, 4)), np.arange(40) % 3)).check()


def test_what_some_batches_give_alone_is_the_mean_of_those():
    class Sometimes(Classifier):
        def evaluate(self, module, batch):
            found = super().evaluate(module, batch)
            return found | ({"rare": torch.tensor(2.0)} if len(batch[0]) < 5 else {})

    problem = Sometimes(features, (np.random.default_rng(0).normal(size=(40, 4)), np.arange(40) % 3))
    measured = problem.measure(problem.new_module(0), np.arange(12), batch_size=5)
    assert list(measured) == ["loss", "score", "rare"] and measured["rare"] == 2.0
