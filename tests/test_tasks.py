"""Tasks of many kinds as a user writes them, trained on a lab of two threads to a stated quality, replayed bit for bit.

Used by pytest; the parts are tested beside `supervised.py`, `classifier.py` and `regressor.py`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import labkit
from labkit.data import open_dataset
from labkit.errors import ProblemError

pytestmark = pytest.mark.usefixtures("cache")
R = np.random.default_rng(0)
N = 400
X = R.normal(size=(N, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def lab():
    with labkit.connect("threads", 2) as lab:
        yield lab


def trained(problem, lab, tmp_path, passes=6, **options):
    """The score at the end; a replay has the same weights."""
    run = labkit.train(problem, lab, passes=passes, checkpoints=3, runs=tmp_path, name="task", **options).wait(60)
    assert np.array_equal(labkit.replay(run, problem=problem).flat(), run.flat())
    assert labkit.load_run(run.path, problem=problem).summary()["score"] == run.curve().score.iloc[-1]
    return run


def mlp(shape, n):
    return nn.Sequential(nn.Linear(shape[0], 24), nn.ReLU(), nn.Linear(24, n))


def test_regression(lab, tmp_path):
    data = open_dataset({"x": X, "y": 2 * np.sin(X[:, 0]) + 3})
    settings = {
        "loss": {"name": "huber", "delta": 0.5},
        "optimiser": "rmsprop",
        "lr": 0.02,
        "schedule": "one-cycle",
        "clip_norm": 5.0,
    }
    run = trained(labkit.Regressor(mlp, data, batch_size=20, metrics=["mae", "r2"], **settings), lab, tmp_path, passes=12)
    end = run.curve().iloc[-1]
    assert end.mae < 1 and end.r2 > 0.6 and end.score == pytest.approx(1 / (2 - end.r2), rel=1e-4)
    raw = run.predict(X[:50])
    assert raw.shape == (50,) and abs(raw - 2 * np.sin(X[:50, 0]) - 3).mean() < 1


def test_several_labels_a_sample(lab, tmp_path):
    data = open_dataset({"x": X, "y": (X[:, :3] > 0.3).astype(np.int64)})
    problem = labkit.Classifier(mlp, data, loss="bce-with-logits", lr=0.5, batch_size=20, accumulate=2)
    run = trained(problem, lab, tmp_path)
    assert run.curve().score.iloc[-1] > 0.9
    said = run.predict(X)
    assert said.shape == (N, 3) and ((X[:, :3] > 0.3) == said).mean() > 0.9
    assert ((run.predict_proba(X) > 0.5) == said).all()


def test_a_class_for_each_pixel_but_for_those_that_are_ignored(lab, tmp_path):
    image = R.normal(size=(120, 1, 6, 6)).astype(np.float32)
    mask = (image[:, 0] > 0).astype(np.int64)
    mask[:, 0] = 2  # a row that nobody has labelled
    net = lambda: nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))  # noqa: E731
    problem = labkit.Classifier(
        net, open_dataset({"x": image, "y": mask}), lr=0.3, loss={"name": "cross-entropy", "ignore_index": 2}
    )
    run = trained(problem, lab, tmp_path, passes=20)
    assert run.curve().score.iloc[-1] > 0.9 and run.predict(image[:5]).shape == (5, 6, 6)


class Two(nn.Module):
    def __init__(self, shapes, n):
        super().__init__()
        (a,), (b,) = shapes
        self.left, self.right, self.out = nn.Linear(a, 8), nn.Linear(b, 8), nn.Linear(8, n)

    def forward(self, a, b):
        return self.out(torch.tanh(self.left(a)) * self.right(b))


def test_two_inputs_and_class_weights(lab, tmp_path):
    data = open_dataset({"a": X[:, :2], "b": X[:, 2:], "y": (X[:, 0] * X[:, 2] > 0).astype(int)})
    problem = labkit.Classifier(Two, data, lr=0.2, batch_size=20, loss={"name": "cross-entropy", "weight": [1, 2]})
    assert trained(problem, lab, tmp_path, passes=10).curve().score.iloc[-1] > 0.75


class Sentences(nn.Module):
    def __init__(self, shape, n_classes, kind="lstm"):
        super().__init__()
        self.embed, self.out = nn.Embedding(20, 16), nn.Linear(16, n_classes)
        self.body = (
            nn.LSTM(16, 16, batch_first=True) if kind == "lstm" else nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        )

    def forward(self, ids):
        seen = self.body(self.embed(ids))
        return self.out((seen[0] if isinstance(seen, tuple) else seen).mean(1))


@pytest.mark.parametrize("kind", ["lstm", pytest.param("transformer", marks=pytest.mark.slow)])
def test_token_ids(kind, lab, tmp_path):
    ids = R.integers(3, 20, size=(N, 7))
    y = np.arange(N) % 2
    ids[np.arange(N), R.integers(0, 7, N)] = y + 1  # one word decides
    data = open_dataset({"ids": ids, "y": y}, tokens="ids")
    problem = labkit.Classifier(Sentences, data, model_args={"kind": kind}, optimiser="adam", lr=0.02, batch_size=20)
    assert trained(problem, lab, tmp_path).curve().score.iloc[-1] > 0.9


def test_an_autoencoder_and_its_own_optimiser_and_schedule(lab, tmp_path):
    def own(parameters):
        return torch.optim.SGD(parameters, lr=0.5, momentum=0.9, nesterov=True)

    low = X[:, :2] @ R.normal(size=(2, 6)).astype(np.float32)
    net = lambda: nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 6))  # noqa: E731
    data = open_dataset({"x": low}, inputs="x")
    problem = labkit.Regressor(net, data, optimiser=own, schedule=lambda clock: 1 / (1 + clock.passes))
    run = trained(problem, lab, tmp_path, passes=20)
    assert run.curve().score.iloc[-1] > 0.9 and run.config["problem"]["optimiser"]["by_value"].endswith("own")


@pytest.mark.slow
def test_several_targets_with_a_loss_of_their_own(lab, tmp_path):
    def both(outputs, targets):
        return (outputs[:, 0] - targets["energy"]).square().mean() + nn.functional.cross_entropy(outputs[:, 1:], targets["kind"])

    def right(outputs, targets):
        return (outputs[:, 1:].argmax(1) == targets["kind"]).float().mean()

    data = open_dataset({"x": X, "energy": X[:, 0], "kind": (X[:, 1] > 0).astype(int)}, target="energy", label="kind")
    problem = labkit.Regressor(lambda: nn.Linear(6, 3), data, loss=both, metrics=[right], lr=0.1, batch_size=20)
    assert trained(problem, lab, tmp_path, passes=10).curve().right.iloc[-1] > 0.9
    with pytest.raises(
        ProblemError, match=r"gave shape \(2, 3\) for targets of a dict of kind, energy. Change the last layer; for several"
    ):
        labkit.Regressor(lambda: nn.Linear(6, 3), data).check()


def test_a_schedule_that_turns_negative_fails_the_run_with_the_moment(lab, tmp_path):
    problem = labkit.Regressor(mlp, open_dataset({"x": X, "y": X[:, 0]}), schedule=lambda clock: 1 - clock.passes)
    with pytest.raises(labkit.WorkerError, match=r"schedule .*gave -0.* after .* of .* samples \(pass 1"):
        labkit.train(problem, lab, passes=3, runs=tmp_path).wait(60)
