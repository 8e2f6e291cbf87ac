"""Twelve tasks as a user writes them, each in 15 lines at most, trained to a stated quality on threads and on Dask's processes.

Everything that a task needs stands in its function, as in the cells of a notebook: it travels to the workers by value. What the parts
do with other arguments is tested beside them: `problems/test_supervised.py`, `data/test_items.py` and so on.

Used by pytest.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import labkit
from labkit.errors import ProblemError

pytestmark = pytest.mark.usefixtures("cache")
N = 400
X = np.random.default_rng(0).normal(size=(N, 6)).astype(np.float32)


class Task(NamedTuple):
    make: Callable[..., labkit.Problem]  # the user's code
    quality: dict[str, float]  # what columns of the curve reach
    passes: float


TASKS: dict[str, Task] = {}


def task(passes=6, **quality):
    return lambda make: TASKS.setdefault(make.__name__, Task(make, quality, passes)).make


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with a folder of pictures for each of two classes: what is bright is above, or below."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(1)
    for number, name in enumerate(["above", "below"]):
        (folder / name).mkdir()
        for i in range(60):
            picture = random.integers(0, 120, (12, 12, 3), dtype=np.uint8)
            picture[6 * number : 6 * number + 6] += 100
            Image.fromarray(picture).save(folder / name / f"{i}.png")
    return folder


@task(passes=6, score=0.85)
def resnet_on_a_folder_of_pictures_with_augmentation(pictures):
    class ResNet(nn.Module):
        def __init__(self, shape, n_classes):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
            self.head = nn.Sequential(nn.ReLU(), nn.AvgPool2d(6), nn.Flatten(), nn.Linear(32, n_classes))

        def forward(self, x):
            x = self.stem(x)
            return self.head(x + self.block(x))

    return labkit.Classifier(ResNet, pictures, batch_size=16, lr=0.05, augment=lambda x: x.flip(3) if torch.rand(()) < 0.5 else x)


@task(passes=12, score=0.7, r2=0.6)
def regression_on_a_table(pictures):
    frame = pd.DataFrame(X, columns=list("abcdef")).assign(price=2 * np.sin(X[:, 0]) + 3, note="read by nobody")
    data = labkit.open_dataset(frame, target="price", inputs=list("abcdef"))
    net = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 1))
    loss = {"name": "huber", "delta": 0.5}
    settings = {"optimiser": "rmsprop", "lr": 0.02, "schedule": "one-cycle", "clip_norm": 5.0, "batch_size": 20}
    return labkit.Regressor(net, data, loss=loss, metrics=["mae", "r2"], **settings)


@task(passes=6, score=0.85)
def several_labels_a_sample(pictures):
    def mlp(shape, n_labels):
        return nn.Sequential(nn.Linear(*shape, 24), nn.ReLU(), nn.Linear(24, n_labels))

    y = (X[:, :3] > 0.3).astype(int)
    return labkit.Classifier(mlp, (X, y), loss="bce-with-logits", lr=0.5, batch_size=20, accumulate=2)


@task(passes=20, score=0.9)
def a_class_for_each_pixel(pictures):
    image = np.random.default_rng(2).normal(size=(120, 1, 6, 6)).astype(np.float32)
    mask = (image[:, 0] > 0).astype(int)
    mask[:, 0] = 255  # a row that nobody has labelled
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    loss = {"name": "cross-entropy", "ignore_index": 255}
    return labkit.Classifier(net, (image, mask), lr=0.3, loss=loss)


@task(passes=6, score=0.85)
def texts_as_token_ids(pictures):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body, self.out = nn.Embedding(20, 16), nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 2)

        def forward(self, ids):
            return self.out(self.body(self.embed(ids))[0].mean(1))

    random, y = np.random.default_rng(3), np.arange(N) % 2
    ids = random.integers(3, 20, size=(N, 7))
    ids[np.arange(N), random.integers(0, 7, N)] = y + 1  # one word decides
    return labkit.Classifier(Reader, {"input_ids": ids, "label": y}, optimiser="adam", lr=0.02, batch_size=20)


@task(passes=20, score=0.9)
def an_autoencoder(pictures):
    low = X[:, :2] @ np.random.default_rng(4).normal(size=(2, 6)).astype(np.float32)
    data = labkit.open_dataset({"x": low}, inputs="x")
    return labkit.Regressor(nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 6)), data, optimiser="adam", lr=0.02, batch_size=20)


@task(passes=12, score=0.75)
def two_inputs(pictures):
    class Two(nn.Module):
        def __init__(self, shapes, n_classes):
            super().__init__()
            (a,), (b,) = shapes
            self.left, self.right, self.out = nn.Linear(a, 8), nn.Linear(b, 8), nn.Linear(8, n_classes)

        def forward(self, a, b):
            return self.out(torch.tanh(self.left(a)) * self.right(b))

    data = {"a": X[:, :2], "b": X[:, 2:], "y": (X[:, 0] * X[:, 2] > 0).astype(int)}
    return labkit.Classifier(Two, data, lr=0.2, batch_size=20)


@task(passes=5, score=0.85)
def a_torch_dataset_with_transforms(pictures):
    class Noisy(Dataset):
        def __len__(self):
            return N

        def __getitem__(self, i):
            x = torch.from_numpy(X[i])
            return x + 0.1 * torch.randn(6), int(X[i, 0] > 0)

    return labkit.Classifier(lambda shape, n: nn.Linear(*shape, n), Noisy(), lr=0.3, batch_size=20)


@task(passes=6, score=0.85)
def a_data_set_of_dicts_like_those_of_hugging_face(pictures):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(20, 16), nn.Linear(16, 2)

        def forward(self, input_ids, attention_mask):
            seen = self.embed(input_ids) * attention_mask[..., None]
            return self.out(seen.sum(1) / attention_mask.sum(1, keepdim=True))

    words = [[*np.random.default_rng(i).integers(3, 20, 3 + i % 4).tolist(), 1 + i % 2] for i in range(N)]
    rows = [{"text": "...", "input_ids": w, "attention_mask": [1] * len(w), "label": i % 2} for i, w in enumerate(words)]
    return labkit.Classifier(Bag, labkit.open_dataset(rows, pad=0), optimiser="adam", lr=0.05, batch_size=20)


@task(passes=6, score=0.8, found=0.8)
def class_weights_where_one_class_is_rare(pictures):
    def found(outputs, targets):
        return (outputs.argmax(1) == targets)[targets == 1].float().mean()

    y = (X[:, 0] + 0.3 * X[:, 1] > 1.2).astype(int)
    loss = {"name": "cross-entropy", "weight": [1, 8]}
    return labkit.Classifier(lambda: nn.Linear(6, 2), (X, y), loss=loss, metrics=[found], lr=0.1, batch_size=20)


@task(passes=6, score=0.85)
def functions_as_optimiser_and_schedule(pictures):
    def nesterov(parameters):
        return torch.optim.SGD(parameters, lr=0.2, momentum=0.9, nesterov=True)

    def slower_and_slower(clock):
        return 1 / (1 + clock.passes)

    data = {"x": X, "y": (X[:, 0] > X[:, 1]).astype(int)}
    return labkit.Classifier(lambda: nn.Linear(6, 2), data, optimiser=nesterov, schedule=slower_and_slower, batch_size=20)


@task(passes=10, right=0.85)
def a_loss_and_a_metric_over_several_targets(pictures):
    def both(outputs, targets):
        return F.mse_loss(outputs[:, 0], targets["energy"]) + F.cross_entropy(outputs[:, 1:], targets["kind"])

    def right(outputs, targets):
        return (outputs[:, 1:].argmax(1) == targets["kind"]).float().mean()

    data = {"x": X, "energy": X[:, 0], "kind": (X[:, 1] > 0).astype(int)}
    data = labkit.open_dataset(data, target="energy", label="kind")
    return labkit.Regressor(lambda: nn.Linear(6, 3), data, loss=both, metrics=[right], lr=0.1, batch_size=20)


SLOW = {
    "resnet_on_a_folder_of_pictures_with_augmentation",
    "several_labels_a_sample",
    "an_autoencoder",
    "class_weights_where_one_class_is_rare",
    "functions_as_optimiser_and_schedule",
    "a_loss_and_a_metric_over_several_targets",
}
SAID = {  # of raw samples, as they were given
    "regression_on_a_table": lambda run: (
        abs(run.predict(pd.DataFrame(X, columns=list("abcdef"))) - 2 * np.sin(X[:, 0]) - 3).mean() < 1
    ),
    "several_labels_a_sample": lambda run: (
        ((run.predict_proba(X) > 0.5) == run.predict(X)).all() and ((X[:, :3] > 0.3) == run.predict(X)).mean() > 0.9
    ),
    "a_class_for_each_pixel": lambda run: run.predict(np.zeros((5, 1, 6, 6), np.float32)).shape == (5, 6, 6),
    "functions_as_optimiser_and_schedule": lambda run: run.config["problem"]["optimiser"]["by_value"].endswith("nesterov"),
}


@pytest.fixture(scope="module")
def lab():
    with labkit.connect("threads", 2) as lab:
        yield lab


def trained(problem, lab, runs, passes=6, name="task", **options):
    """The run; what is read back of it is what it was."""
    run = labkit.train(problem, lab, passes=passes, checkpoints=3, runs=runs, name=name, **options).wait(60)
    assert labkit.load_run(run.path, problem=problem).summary()["score"] == run.curve().score.iloc[-1]
    return run


def reached(run, quality):
    end = run.curve().iloc[-1]
    assert {name: end[name] for name, least in quality.items() if not end[name] >= least} == {}, end.to_dict()


def test_there_are_twelve_of_15_lines():
    assert len(TASKS) == 12
    for name, (make, quality, _) in TASKS.items():
        lines = [line for line in inspect.getsource(make).splitlines() if line.strip()]
        assert len(lines) - 2 <= 15 and quality, name  # without the line that states the quality, and `def`


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in TASKS])
def test_on_threads_and_replayed(name, lab, tmp_path, pictures):
    make, quality, passes = TASKS[name]
    problem = make(pictures)
    run = trained(problem, lab, tmp_path, passes)
    reached(run, quality)
    assert np.array_equal(labkit.replay(run, problem=problem).flat(), run.flat())
    assert SAID.get(name, bool)(run)


@pytest.mark.slow
def test_a_transformer_reads_token_ids(lab, tmp_path):
    class Reader(nn.Module):
        def __init__(self, shape, n_classes):
            super().__init__()
            self.embed, self.out = nn.Embedding(20, 16), nn.Linear(16, n_classes)
            self.body = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)

        def forward(self, ids):
            return self.out(self.body(self.embed(ids)).mean(1))

    problem = texts_as_token_ids(None)
    problem = labkit.Classifier(Reader, problem.data, optimiser="adam", lr=0.02, batch_size=20)
    reached(trained(problem, lab, tmp_path), {"score": 0.9})


def test_several_targets_need_a_loss_of_their_own():
    data = a_loss_and_a_metric_over_several_targets(None).data
    with pytest.raises(
        ProblemError, match=r"gave shape \(2, 3\) for targets of a dict of kind, energy. Change the last layer; for several"
    ):
        labkit.Regressor(lambda: nn.Linear(6, 3), data).check()


def test_a_schedule_that_turns_negative_fails_the_run_with_the_moment(lab, tmp_path):
    problem = labkit.Regressor(lambda: nn.Linear(6, 1), (X, X[:, 0]), schedule=lambda clock: 1 - clock.passes)
    with pytest.raises(labkit.WorkerError, match=r"schedule .*gave -0.* after .* of .* samples \(pass 1"):
        labkit.train(problem, lab, passes=3, runs=tmp_path).wait(60)


@pytest.mark.slow
@pytest.mark.cluster
def test_on_dask(tmp_path, pictures):  # the last one: its lab takes the place of that of threads
    with labkit.connect("dask", 2) as lab:
        for name, (make, quality, passes) in TASKS.items():
            reached(trained(make(pictures), lab, tmp_path, passes, name), quality)
