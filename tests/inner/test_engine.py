"""`labkit.inner.engine`: which way a step is computed, remembered and repeated; and what comes of it in a run."""

import contextlib
import json
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import labkit
from labkit.errors import ProblemError
from labkit.inner.engine import Engine, Way
from labkit.models import seeded
from labkit.problems import supervised
from labkit.problems.problem import Clock
from labkit.training.worker.allreduce import ProcessGroup, check_problem
from labkit.training.worker.heartbeat import Heartbeat
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


def test_what_workers_find_at_once_is_all_remembered(tmp_path, monkeypatch):
    """Threads of one process, say: one has read what is remembered, and is about to write."""
    file, n, dump = tmp_path / "inner.json", 6, json.dump
    engine, at_once = Engine(labkit.Inner(threads=2), file), threading.Barrier(n)

    def late(found, to):
        with contextlib.suppress(threading.BrokenBarrierError):
            at_once.wait(0.2)  # the others have read as much, if they could
        dump(found, to)

    monkeypatch.setattr("labkit.inner.engine.json.dump", late)
    with ThreadPoolExecutor(n) as pool:
        list(pool.map(engine._remember, [f"key {at}" for at in range(n)], [16] * n))
    assert json.loads(file.read_text()) == {f"key {at}": 16 for at in range(n)} and [*tmp_path.iterdir()] == [file]


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
    labkit.Classifier(Mixing, pictures, inner=labkit.Inner(threads=2, split="none")).check()


class Called(nn.Module):
    """A dense layer behind whatever is given."""

    def __init__(self, called, **parts):
        super().__init__()
        self.dense, self.called = nn.Linear(64, 3), called
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.called(self, x)


def kept(self, x):
    self.mask = torch.ones_like(x)
    return self.dense((x * self.mask).flatten(1))


def remembered(self, x):
    if not hasattr(self, "table"):
        self.table = torch.ones(64)
    return self.dense(x.flatten(1) * self.table)


def noisy(self, x):
    return self.dense(x.flatten(1) + 1e-6 * torch.randn(64))


def of_two(self, x):
    if 2 < len(x) < 40:
        raise ZeroDivisionError("too few")
    return self.dense(x.flatten(1))


def squeezed(self, x):
    return self.dense(x.squeeze().flatten(-2))


def normed():
    """With weights that each forward pass computes anew into an attribute."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, for its newer form
        return nn.Sequential(nn.Flatten(), nn.utils.weight_norm(nn.Linear(64, 3)))


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: Called(kept), r"the model itself \(Called\).*leaves 'mask'"),
        (normed, r"1 \(Linear\).*leaves 'weight'.*whole=\['1'\]"),
        (lambda: Called(noisy), "draws random numbers itself"),
        (lambda: Called(of_two), "in parts of a batch it fails with ZeroDivisionError: too few"),
    ],
)
def test_what_threads_would_do_to_each_other_is_refused_by_name(pictures, model, words):
    with pytest.raises(ProblemError, match=words):
        labkit.Classifier(model, pictures, inner=labkit.Inner(threads=2, split="samples", block=16)).check()
    labkit.Classifier(model, pictures, inner=labkit.Inner(threads=2, split="none")).check()


@pytest.mark.usefixtures("cache")
def test_what_is_made_once_or_computed_whole_is_not(pictures):
    labkit.Classifier(lambda: Called(remembered), pictures, inner=2).check()
    inside = lambda: nn.Sequential(Called(kept), nn.ReLU(), nn.Linear(3, 3))  # noqa: E731
    labkit.Classifier(inside, pictures, inner=labkit.Inner(threads=2, split="samples", whole=["0"])).check()
    labkit.Classifier(
        normed, pictures, inner=labkit.Inner(threads=2, split="samples", whole=["1"])
    ).check()  # by a hook of the layer
    functional = lambda: Called(lambda self, x: self.dense(F.dropout(x.flatten(1), 0.3, self.training)))  # noqa: E731
    labkit.Classifier(functional, pictures, inner=labkit.Inner(threads=2, split="rows")).check()


def test_a_part_of_a_batch_has_two_samples_at_least():
    """squeeze() would take the axis of a single one off."""
    module = Called(squeezed)
    for n in (2, 3, 5, 6):
        x, y, sizes = torch.randn(n, 1, 8, 8), torch.arange(n) % 3, []
        right = torch.autograd.grad(F.cross_entropy(module(x), y), list(module.parameters()))
        for block in (2, 3):
            module.zero_grad()
            of = lambda network, parts, x=x, y=y, sizes=sizes: sizes.append(parts) or shares(network, x, y, parts)  # noqa: E731
            Engine(labkit.Inner(threads=2, split="samples", block=block)).gradients(module, x, of)
            for parameter, gradient in zip(module.parameters(), right, strict=True):
                torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
        assert all(n // parts >= 2 for parts in sizes)
    one = Engine(labkit.Inner(threads=2, split="samples", block=1))  # asked for
    one.gradients(
        module, x, lambda network, parts: sizes.append(parts) or shares(lambda x: network.dense(x.flatten(1)), x, y, parts)
    )
    assert sizes[-1] == 6


@pytest.mark.usefixtures("cache")
def test_a_batch_that_a_network_changes_in_place_is_changed_once(pictures):
    """Though blocks are tried out on it, and threads change their parts at once."""
    changing, made = lambda: Called(lambda self, x: self.dense(x.add_(1).flatten(1))), []
    for inner in (None, labkit.Inner(threads=2, split="samples"), labkit.Inner(threads=2, split="rows")):
        problem = labkit.Classifier(changing, pictures, inner=inner, batch_size=40)
        problem.check()
        module, (x, y) = problem.new_module(0), problem.load(problem.train_indices()[:40])
        before = x.clone()
        problem.step(module, (x, y), problem.optimisers(module), Clock(0, 100, 0.0))
        assert torch.allclose(x, before + (inner is None or inner.split != "rows"))
        made.append(module)
    assert far(made[1], made[0]) < 1e-5 and far(made[2], made[0]) < 1e-5


def test_complex_weights_and_buffers_are_compared_as_they_are():
    class Turning(nn.Module):
        def __init__(self):
            super().__init__()
            self.turn, self.dense = nn.Parameter(torch.randn(64, dtype=torch.complex64)), nn.Linear(64, 3)
            self.register_buffer("by", torch.ones(64, dtype=torch.complex128))

        def forward(self, x):
            return self.dense((x.flatten(1) * self.turn * self.by).imag.float())

    x, y = torch.randn(12, 1, 8, 8), torch.arange(12) % 3
    engine = Engine(labkit.Inner(threads=2, split="samples", block=3, whole=True))
    assert engine.check(nn.Sequential(Turning()), x, lambda network, parts: shares(network, x, y, parts)) < 1e-5
    module, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 3, dtype=torch.complex64)), x.to(torch.complex64)
    spread = lambda out, _: out.imag.std()  # noqa: E731  no mean over samples
    assert engine.check(module, x, lambda network, parts: shares(network, x, y, parts, spread)) > 1e-3
    engine.close()


class OwnStep(labkit.Classifier):
    def step(self, module, batch, optimisers, clock):
        optimisers[0].zero_grad()
        loss = self.loss_of(module, *batch)
        loss.backward()
        optimisers[0].step()
        return {"loss": loss.detach()}


class Reached(OwnStep):
    def step(self, module, batch, optimisers, clock):
        optimisers[0].zero_grad()
        loss = self.backward(module, *batch)
        optimisers[0].step()
        return {"loss": loss}


class Parts(labkit.Classifier):
    def networks(self, module):
        return [module[1], module[3]]


def dense():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.usefixtures("cache")
def test_two_threads_may_check_one_problem_with_a_step_of_its_own_at_once(pictures, monkeypatch):
    problem, both = Reached(smooth, pictures, inner=labkit.Inner(threads=2, split="none")), threading.Barrier(2)
    module = problem.new_module(0)

    @contextlib.contextmanager
    def at_once(seed):
        both.wait(20)
        with seeded(seed):
            yield

    monkeypatch.setattr(supervised, "seeded", at_once)
    with ThreadPoolExecutor(2) as pool:
        assert [one.result(60) for one in [pool.submit(problem._check_step, module, 0) for _ in range(2)]] == [None, None]
    assert "backward" not in vars(problem)


@pytest.mark.usefixtures("cache")
def test_a_step_of_ones_own_reaches_the_inner_layer_or_is_refused(pictures):
    for split in ("samples", "none"):
        with pytest.raises(ProblemError, match=r"OwnStep has a step\(\) of its own.*self\.backward\(module, x, y\)"):
            OwnStep(smooth, pictures, inner=labkit.Inner(threads=2, split=split)).check()
    OwnStep(smooth, pictures).check()
    made = []
    for kind in (labkit.Classifier, Reached):
        problem = kind(smooth, pictures, inner=labkit.Inner(threads=2, split="samples", block=7), batch_size=42)
        problem.check()
        module, batch = problem.new_module(0), problem.load(problem.train_indices()[:42])
        problem.step(module, batch, problem.optimisers(module), Clock(0, 100, 0.0))
        assert problem.computed(module) == "samples 2x21 *1"
        made.append(module)
    assert all(map(torch.equal, made[0].state_dict().values(), made[1].state_dict().values()))
    check_problem(Parts(dense, pictures), 0)
    with pytest.raises(ProblemError, match=r"inner= computes the gradients of one network"):
        check_problem(Parts(dense, pictures, inner=2), 0)


@pytest.mark.usefixtures("cache")
def test_an_all_reduce_calls_hooks_once(pictures, tmp_path):
    made = []
    for inner in (None, labkit.Inner(threads=2, split="samples", block=7)):
        problem = labkit.Classifier(smooth, pictures, inner=inner, batch_size=14)
        module, calls = problem.new_module(0), []
        module[0].weight.register_hook(lambda g, calls=calls: calls.append(1) or 0.5 * g)
        module[0].weight.register_post_accumulate_grad_hook(lambda p, calls=calls: calls.append(2))
        x, y = problem.load(problem.train_indices()[:14])
        group = ProcessGroup(0, [0], 0, Heartbeat(), meeting=str(tmp_path / f"group{len(made)}"), one_process=True)
        try:
            wrapped = group.wrap(module, [module])
            group.begin(1.0)
            with group.exchanging():
                problem.backward(wrapped, x, y)
        finally:
            group.close()
        assert calls == [1, 2]
        made.append(module[0].weight.grad.clone())
    torch.testing.assert_close(made[1], made[0], rtol=1e-4, atol=1e-6)


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
