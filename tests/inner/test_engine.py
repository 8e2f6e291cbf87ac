"""`labkit.inner.engine`: which way a step is computed, remembered and repeated; and what comes of it in a run."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import labkit
from labkit.errors import ProblemError
from labkit.inner.engine import Engine, Way
from labkit.problems.problem import Clock
from tests.inner.test_samples import far, network, shares

SHAPE = (1, 12, 12)


def stepped(engine, module, n, steps=1):
    x, y = torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 10
    for _ in range(steps):
        engine.gradients(module, x, lambda network, parts: shares(network, x, y, parts))
    return [parameter.grad.clone() for parameter in module.parameters()]


def test_a_block_is_searched_once_and_remembered(tmp_path, monkeypatch):
    file, module = tmp_path / "cache" / "inner.json", network("lenet", SHAPE)
    first = Engine(labkit.Inner(threads=2, split="samples"), file)
    one = stepped(first, module, 80)
    way = Way.of(first.done().partition(" *")[0])
    assert way.split == "samples" and way.threads == 2 and way.block in (40, 32, 16)
    assert list(json.loads(file.read_text()).values()) == [way.block]
    # Another process of the same machine does not search again, whatever would be quicker now: the same bits.
    monkeypatch.setattr(Engine, "_remember", lambda *_: pytest.fail("searched again"))
    again = Engine(labkit.Inner(threads=2, split="samples"), file)
    module.zero_grad()
    assert all(map(torch.equal, one, stepped(again, module, 80))) and Way.of(again.done().partition(" *")[0]) == way
    stepped(again, module, 20)  # the last batch of a pass: no search
    assert again.done() == f"samples 2x{min(10, way.block)} *1"
    monkeypatch.undo()
    file.write_text("{")
    stepped(Engine(labkit.Inner(threads=2, split="samples"), file), module, 80)
    assert len(json.loads(file.read_text())) == 1
    first.close(), again.close()


def test_steps_are_repeated_as_they_were():
    module = network("lenet", SHAPE)
    engine = Engine(labkit.Inner(threads=2))
    engine.repeat("samples 2x16 *2, none 1 *1, intra-op 2 *1")
    stepped(engine, module, 40, 4)
    assert engine.done() == "samples 2x16 *2, none 1 *1, intra-op 2 *1" and engine.done() == ""
    stepped(engine, module, 40, 1)  # and goes on by itself
    assert engine.done() == "none 1 *1"
    engine.close()


@pytest.mark.parametrize(
    "inner", [labkit.Inner(threads=1), labkit.Inner(threads=2, split="none"), labkit.Inner(threads=2, split="intra-op")]
)
def test_ways_without_a_pool_take_any_module(inner):
    before, module = torch.get_num_threads(), nn.Sequential(nn.Flatten(), nn.RNN(144, 10))
    engine = Engine(inner)
    x, y = torch.randn(6, *SHAPE), torch.arange(6)
    engine.gradients(module, x, lambda network, parts: shares(lambda x: network(x)[0], x, y, parts))
    assert module[1].weight_hh_l0.grad is not None and torch.get_num_threads() == before
    assert engine.done() == {"auto": "none 1 *1", "none": "none 1 *1", "intra-op": "intra-op 2 *1"}[inner.split]


def test_a_layer_that_is_computed_whole_sees_the_whole_batch():
    module = nn.Sequential(nn.Flatten(), nn.Linear(144, 8), Centre(), nn.Linear(8, 10))
    for n in (16, 5):
        module.zero_grad()
        one = stepped(Engine(labkit.Inner(threads=2, split="none")), module, n)
        module.zero_grad()
        other = stepped(Engine(labkit.Inner(threads=2, split="samples", block=1, whole=["2"])), module, n)
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


def test_what_is_remembered_is_of_a_shape(tmp_path):
    module, keys = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)), set()
    for x in (torch.ones(64, 1, 8, 8), torch.ones(64, 1, 9, 9), torch.ones(64, 1, 8, 8).double(), torch.ones(80, 1, 8, 8)):
        keys.add(Engine(labkit.Inner(threads=2, split="samples"))._key(module, x))
    assert len(keys) == 4


class Centre(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


# In a problem and a run.


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    y = np.arange(360) % 3
    return (rng.normal(size=(360, 1, 8, 8)) + y[:, None, None, None]).astype(np.float32), y


def net():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(288, 3))


def smooth():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(8, 3, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0][:, -1]


def recurrent():
    return nn.Sequential(nn.Flatten(1, 2), Last())


class Following(nn.Module):
    """Follows the mean of its batches."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(64, 3)
        self.register_buffer("mean", torch.zeros(64))

    def forward(self, x):
        x = x.flatten(1)
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.dense(x)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(72, 3)

    def forward(self, a, b):
        return self.dense(torch.cat([a.flatten(1), b], 1))


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(64, 3)

    def forward(self, x):
        return self.dense((x - x.mean(0)).flatten(1))


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("split", "more"),
    [
        ("samples", {"accumulate": 2, "loss": {"name": "cross-entropy", "weight": [1, 2, 5]}}),
        ("samples", {"clip_norm": 0.5}),
        ("rows", {}),
    ],
)
def test_a_step_of_a_problem_is_that_of_the_undivided_batch(pictures, split, more):
    made = []
    for inner in (None, labkit.Inner(threads=2, split=split, block=7)):
        problem = labkit.Classifier(smooth, pictures, inner=inner, batch_size=42, **more)
        problem.check()
        module = problem.new_module(0)
        optimisers, clock = problem.optimisers(module), Clock(0, 100, 0.0)
        train = problem.train_indices()
        losses = [
            float(problem.step(module, problem.load(train[at : at + 42]), optimisers, clock)["loss"]) for at in range(0, 210, 42)
        ]
        made.append((module, losses))
    (one, a), (other, b) = made
    assert a == pytest.approx(b, rel=1e-5) and (far(one, other) < 1e-5 or ("accumulate" in more and far(one, other) < 1e-4))


@pytest.mark.usefixtures("cache")
def test_what_cannot_be_split_is_found_before_the_run(pictures):
    with pytest.raises(ProblemError, match=r"differ by .* depends on the others"):
        labkit.Classifier(Mixing, pictures, inner=2).check()
    with pytest.raises(ProblemError, match=r"1\.rnn \(RNN\)"):
        labkit.Classifier(recurrent, pictures, inner=2).check()
    labkit.Classifier(recurrent, pictures, inner=labkit.Inner(threads=2, whole=["1"])).check()

    with pytest.raises(ProblemError, match=r"the buffer 'mean'"):
        labkit.Classifier(Following, pictures, inner=2).check()

    def spread(outputs, targets):  # no mean over samples
        return F.cross_entropy(outputs, targets) + outputs.std()

    with pytest.raises(ProblemError, match="no mean over samples"):
        labkit.Classifier(smooth, pictures, loss=spread, inner=2).check()
    labkit.Classifier(net, pictures, inner=2).check()
    rows, two = labkit.Inner(threads=2, split="rows"), {"a": pictures[0], "b": pictures[0][:, 0, 0], "y": pictures[1]}
    with pytest.raises(ProblemError, match=r"rows.*float32"):
        labkit.Classifier(smooth, pictures, precision="bfloat16", inner=rows).check()
    with pytest.raises(ProblemError, match=r"1\.rnn"):
        labkit.Classifier(recurrent, pictures, inner=rows).check()
    with pytest.raises(ProblemError, match=r"one input, and this one has 2"):
        labkit.Classifier(Two, two, inner=rows).check()
    labkit.Classifier(Two, two, inner=2).check()
    with pytest.raises(ValueError, match=r"threadz.*threads"):
        labkit.Classifier(Two, two, inner={"threadz": 2})
    with pytest.raises(ProblemError, match=r"rows.*float32"):
        labkit.Classifier(smooth, pictures, precision="bfloat16", inner=labkit.Inner(threads=2, split="rows")).check()
    with pytest.raises(ProblemError, match=r"1\.rnn"):
        labkit.Classifier(recurrent, pictures, inner=labkit.Inner(threads=2, split="rows")).check()
    two = {"a": pictures[0], "b": pictures[0][:, 0, 0], "y": pictures[1]}
    with pytest.raises(ProblemError, match=r"one input, and this one has 2"):
        labkit.Classifier(Two, two, inner=labkit.Inner(threads=2, split="rows")).check()
    labkit.Classifier(Mixing, pictures, inner=labkit.Inner(threads=2, split="none")).check()


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("update", "split"), [("agwu", "auto"), *(pytest.param("sgwu", split, marks=pytest.mark.slow) for split in ("samples", "rows"))]
)
def test_a_run_with_it_can_be_replayed_bit_for_bit(tmp_path, pictures, update, split):
    problem = labkit.Classifier(smooth, pictures, inner=labkit.Inner(threads=2, split=split), batch_size=24)
    with labkit.connect("threads", 2) as lab:
        run = labkit.train(problem, lab, update=update, passes=4, runs=tmp_path).wait()
    pushes = run.events[run.events.kind == "push"]
    assert pushes.inner.str.contains(r"\*").all()
    if split == "auto":
        assert pushes.inner.str.contains("samples").any() and pushes.inner.str.contains("intra-op|none").any()
    again = labkit.replay(run, problem=problem)
    np.testing.assert_array_equal(again.flat(), run.flat())


@pytest.mark.usefixtures("cache")
@pytest.mark.slow
def test_an_all_reduce_averages_what_the_threads_computed(tmp_path, pictures):
    flats = []
    with labkit.connect("threads", 2) as lab:
        for number, inner in enumerate((None, labkit.Inner(threads=2, split="samples"))):
            problem = labkit.Classifier(smooth, pictures, inner=inner, batch_size=24, accumulate=2)
            run = labkit.train(
                problem, lab, update="allreduce", partition="udpa", passes=2, runs=tmp_path, name=f"r{number}"
            ).wait()
            flats.append(run.flat())
    np.testing.assert_allclose(flats[1], flats[0], rtol=1e-3, atol=1e-5)
