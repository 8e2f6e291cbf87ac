"""Batches of subnets: each learns what it learns alone and stops at its own time; what cannot be batched is refused."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

import labkit
from labkit.errors import ProblemError
from labkit.subnets.decomposition import Decomposition
from labkit.subnets.stacked import fit_together
from labkit.training.local import fit
from tests.subnets.helpers import data, parts_of, problem

pytestmark = pytest.mark.usefixtures("cache")


def deep(shape, n_classes, width=1.0):
    """BatchNorm, a tied pair of layers, and a bias that is not trained."""
    size = round(8 * width)
    net = nn.Sequential(
        nn.Conv2d(shape[0], size, 3, padding=1), nn.BatchNorm2d(size), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), tied := nn.Linear(size, size), nn.ReLU(), tied, nn.Linear(size, n_classes),
    )  # fmt: skip
    net[0].bias.requires_grad = False
    return net


def branching(shape, n_classes, width=1.0):
    class Branching(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1) if x.mean() > 0 else -x.flatten(1))

    return Branching(int(np.prod(shape)), n_classes)


def remembering(shape, n_classes, width=1.0):
    """Keeps a number outside of its tensors, so no pass through several of these can be right."""

    class Remembering(nn.Linear):
        def __init__(self):
            super().__init__(int(np.prod(shape)), n_classes)
            self.factor = float(self.weight[0, 0].detach())

        def forward(self, x):
            return super().forward(x.flatten(1)) * self.factor

    return Remembering()


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("lenet", {"weight_decay": 0.01, "schedule": "cosine"}),
        ("resnet20", {"optimiser": "adam", "lr": 1e-3, "channels_last": True}),
        (deep, {"optimiser": "adamw", "lr": 1e-2}),
    ],
)
def test_a_batch_of_subnets_learns_what_each_learns_alone(model, settings):
    a_problem = problem(model, data=data(100, shape=(1, 16, 16)), model_args={"width": 0.5}, **settings)
    problems, seeds = parts_of(a_problem, "held-out")[:3], [3, 4, 5]
    build = [[one.build(seed) for one, seed in zip(problems, seeds, strict=True)] for _ in range(2)]
    together = fit_together(problems, build[0], seeds=seeds, epochs=2, patience=None, each=[lambda *now: False] * 3)
    for one, seed, stacked, module, found in zip(problems, seeds, *build, together, strict=True):
        start = {name: value.clone() for name, value in module.state_dict().items()}
        done = fit(one, module, one.train_indices(), one.score_indices(), epochs=2, patience=None, seed=seed)
        assert (found.epochs, found.best, found.score) == (2, 2, done.score) and found.loss == pytest.approx(done.loss, rel=1e-3)
        for name, value in module.state_dict().items():
            moved = (value - start[name]).abs().max() if value.is_floating_point() else 0
            assert (stacked.state_dict()[name] - value).abs().max() <= 1e-2 * moved, name


def test_each_of_a_batch_stops_at_its_own_time_and_keeps_its_best(train):
    options = {"epochs": 30, "patience": 2, "stacking": "same-split"}
    alone, batch = train(**options).parts(), train(batched=3, **options)
    parts = batch.parts()
    assert parts.epochs.equals(alone.epochs) and parts.best.equals(alone.best) and parts.epochs.nunique() > 1
    assert (parts.epochs == np.minimum(parts.best + 2, 30)).all() and (parts.best < parts.epochs).any()
    for part, module in enumerate(batch.module.subnets):
        one = parts_of(problem())[part]
        assert one.measure(module, one.score_indices()) == {"loss": parts.loss[part], "score": parts.score[part]}


@pytest.mark.slow
def test_batches_have_one_shape_and_leave_no_worker_without(train, lab, monkeypatch, tmp_path):
    seen, spread = [], type(lab).map
    monkeypatch.setattr(
        type(lab), "map", lambda self, fn, items, *rest, **more: spread(self, fn, seen.extend(items) or items, *rest, **more)
    )
    cut = problem(data=data(shape=(1, 12, 12)))
    joined = train(cut, Decomposition((3, 3), 1, border="cut"), batched=8, baselines=["transfer"])
    groups = [sorted(job.problem.part for job in group) for group in seen[:-1]]
    assert sorted(map(tuple, groups)) == [(0, 2, 6, 8), (1, 7), (3, 5), (4,)]  # corners, edges, and the middle
    parts, summary = joined.parts(), joined.summary()
    assert list(parts.batched) == [4, 2, 4, 2, 1, 2, 4, 2, 4] and 0 < summary["busy"] < 1.1
    assert parts.seconds[0] == parts.seconds[2]  # of all four together
    again, images = labkit.load_subnets(tmp_path / "joined"), cut.dataset.raw(cut.test_indices(), "test")
    assert np.array_equal(again.scores(images), joined.scores(images))
    seen.clear()
    train(grid=(1, 8), batched=8)
    assert [len(group) for group in seen] == [4, 4]


@pytest.mark.parametrize(
    ("model", "reason"),
    [(branching, "RuntimeError: .*data-dependent control flow.*"), (remembering, r"its logits differ there by up to [\d.]+\.")],
)
def test_a_model_that_cannot_be_batched_is_refused(model, reason, train, tmp_path):
    with pytest.raises(
        ProblemError, match=f"part 0 of .*{model.__name__}.* cannot be .* a batch of subnets: {reason} Leave out batched"
    ):
        train(problem(model), batched=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"clip_norm": 1.0}, "clip_norm would be of all"),
        ({"optimiser": "adafactor"}, "its optimiser may not work element by element"),
    ],
)
def test_what_would_be_of_all_together_is_refused(options, reason, train):
    with pytest.raises(ProblemError, match=f"cannot be trained in a batch of subnets: {reason}"):
        train(problem("lenet", **options), batched=2)


def test_one_of_a_batch_that_diverges_is_an_error(train):
    with pytest.raises(ProblemError, match=r"part \d of Decomposition.*: the loss is (nan|inf) after epoch .* Give a smaller lr"):
        train(problem("lenet", lr=1e6), batched=4)
