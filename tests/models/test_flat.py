"""The flat vector of a module: values stay, tensors are views, and the layout states which entries are whose.

`zoo.py` holds modules of every kind; each is trained in a course without a cluster and compared with a plain loop.
"""

from __future__ import annotations

import shutil
import time
import warnings
from contextlib import closing
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from labkit.errors import ProblemError
from labkit.models import evaluating
from labkit.models.flat import Flat
from labkit.partition import UDPA
from labkit.problems import Clock
from labkit.problems.splits import batches
from labkit.runs.checkpoints import Layout
from labkit.simulation.offline import Replicas, begin_course
from labkit.training.local import alone
from labkit.training.wire import compression
from labkit.updates import make_update
from tests.helpers import SEED, problem, settings
from tests.models.zoo import COMPILED, PRETRAINED, ZOO, Zoo, compiled_as_a_whole


class Odd(nn.Module):
    """Two layers that share their weight, a frozen one, statistics, a counter and a tensor that is not contiguous."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(4, 3).requires_grad_(False)
        self.norm = nn.BatchNorm1d(3)
        self.turned = nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
        self.conv = nn.Conv2d(1, 2, 3).to(memory_format=torch.channels_last)
        self.scalar = nn.Parameter(torch.tensor(2.5))

    def forward(self, x):
        return self.norm(self.frozen(self.second(self.first(x)))) @ self.turned * self.scalar


def test_values_stay_and_tensors_become_views():
    torch.manual_seed(0)
    module = Odd()
    before = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    state = Flat(module)
    flat, layout = state.vector, Layout.of(*state.shapes)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    parts = layout.split(flat.numpy())
    assert layout.size == flat.numel() == layout.n_params + layout.n_buffers and (layout.n_buffers, layout.n_exact) == (6 + 8, 8)
    assert "second.weight" not in parts  # a weight that is there already
    for name, part in parts.items():
        np.testing.assert_array_equal(part, before[name].numpy())
    flat.fill_(7.0)
    for name, tensor in module.state_dict().items():
        assert name == "norm.num_batches_tracked" or (tensor == 7.0).all(), name
    assert module.first.weight is module.second.weight


def test_steps_change_the_flat_vector_and_a_pull_changes_the_module():
    module = Odd()
    state = Flat(module)
    flat, layout = state.vector, Layout.of(*state.shapes)
    optimiser = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    start = flat.clone()
    for _ in range(2):
        optimiser.zero_grad(set_to_none=True)
        module(torch.randn(5, 4)).square().sum().backward()
        optimiser.step()
    parts, first = layout.split(flat.numpy()), layout.split(start.numpy())
    assert np.array_equal(parts["first.weight"], module.first.weight.detach()) and not np.array_equal(
        parts["first.weight"], first["first.weight"]
    )
    assert np.array_equal(parts["norm.running_mean"], module.norm.running_mean) and parts["norm.running_mean"].any()
    assert np.array_equal(parts["frozen.weight"], first["frozen.weight"])
    memoryview(flat.numpy()).cast("B")[:] = memoryview(start.numpy()).cast("B")
    assert np.array_equal(module.first.weight.detach(), first["first.weight"])


def test_parameters_come_before_buffers():
    state = Flat(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), exact=False)
    flat, (params, buffers, exact) = state.vector, state.shapes
    assert exact == {}
    assert list(params.items()) == [("0.weight", (3,)), ("0.bias", (3,)), ("1.weight", (2, 3)), ("1.bias", (2,))]
    assert list(buffers.items()) == [("0.running_mean", (3,)), ("0.running_var", (3,))]
    layout = Layout.of(params, buffers)
    assert layout.names == ("0.weight", "0.bias", "1.weight", "1.bias", "0.running_mean", "0.running_var")
    assert (layout.n_params, layout.n_buffers) == (14, 6)
    assert (flat[-3:] == 1).all() and (flat[-6:-3] == 0).all()


def test_weights_that_are_not_float32_are_refused():
    with pytest.raises(ProblemError, match=r"parameter 'weight' is float64, not float32.*precision='bfloat16'"):
        Flat(nn.Linear(2, 2, dtype=torch.float64))


# -- the zoo: what is trained, sent and built again is one network -----------------------------------------------------

compiling = (pytest.mark.slow, pytest.mark.filterwarnings("ignore"))  # torch warns of itself there


def course(a_problem, update, workers=(0,), exchange="float32", overlap=0, late=()):
    """A run without a cluster: the last version, and the replicas of the workers once they have pulled it.

    Those who are `late` join when the others have pushed once.
    """
    n, answers, it = len(a_problem.train_indices()), {}, None
    config = settings(
        workers, n_train=n, budget=2 * n * len(workers), batch_size=a_problem.batch_size, seed=SEED, exchange=exchange
    )
    replicas, rule = Replicas(a_problem, config.replace(overlap=overlap)), make_update(update)
    it = begin_course(
        config,
        a_problem,
        rule,
        UDPA(),
        deliver=answers.__setitem__,
        record=lambda *args, **fields: None,
        save=lambda *version: None,
        clock=time.monotonic,
    )
    for worker in workers:
        replicas.join(worker)
        it.join(worker)
    late = list(late)
    with closing(replicas):
        while answers:
            if late and it.update.version:
                replicas.join(late[-1])
                it.join(late.pop())
            worker, answer = next(iter(answers.items()))
            del answers[worker]
            if answer.grant is None:
                it.leave(it.members[worker])
                continue
            done, weights = replicas.work(worker, answer)
            header = {**done, "op": "push", "version": answer.grant.version, "score": replicas.score(worker), "score_s": 0.0}
            it.push(it.members[worker], header, weights, weights.nbytes)
    assert it.state == "done" and not late, it.reason
    found = []
    for own in replicas.workers.values():
        np.copyto(own.buffers.pulled, compression.pack(rule.weights, exchange))
        own.buffers.unpack(0)
        found.append(own.replica)
    return rule.weights, found


def by_hand(a_problem, passes):
    """The same training as a plain loop, on a module that no vector holds."""
    module, indices = a_problem.new_module(SEED), a_problem.train_indices()
    optimisers, shard = a_problem.optimisers(module), alone(len(indices), SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.SeedSequence([SEED, 0, 0]).generate_state(1)[0]))
        for epoch in range(passes):
            for batch in batches(shard.draw(len(indices)), a_problem.batch_size):
                a_problem.step(module, a_problem.load(indices[batch]), optimisers, Clock(0, 1, epoch))
    return module


def logits(a_problem, module):
    with evaluating(module):
        return module(a_problem.load(a_problem.test_indices()[:20], "test")[0])


def state(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("kind", [*ZOO, *(pytest.param(kind, marks=compiling) for kind in COMPILED)])
def test_one_worker_is_a_plain_loop_and_its_last_version_is_what_it_trained(kind):
    a_problem = problem({**ZOO, **COMPILED}[kind], train_samples=36)
    weights, (replica,) = course(a_problem, "sgwu")
    plain, built = by_hand(a_problem, 2), a_problem.new_module(SEED)
    Flat(built).load(torch.tensor(weights))
    moved = 0
    for name, tensor in state(plain).items():
        own = state(built)[name]
        same = torch.allclose(own, tensor, rtol=1e-4, atol=1e-6) if kind in LAST_BIT else torch.equal(own, tensor)
        assert same and own.dtype == tensor.dtype, name
        moved += not torch.equal(tensor, state(a_problem.new_module(SEED))[name])
    assert moved
    assert torch.equal(logits(a_problem, built), logits(a_problem, replica.module))  # last: some change when they are evaluated
    assert all(torch.equal(a, b) for a, b in zip(PRETRAINED.parameters(), BEFORE, strict=True))


# Kernels that go by the place of a tensor in memory, or its strides: views of a vector have others.
LAST_BIT = ("orthogonal", "spectral_norm", "spectral_norm_by_hooks", "group_norm_channels_last")
BEFORE = [parameter.detach().clone() for parameter in PRETRAINED.parameters()]
FAMILIES = (
    "sgwu",
    "agwu",
    "downpour",
    "fedasync",
    "fedbuff",
    "easgd",
    "gem",
    "diloco",
    "delayed-nesterov",
    "heloco",
    "ssp",
    "rescaled",
)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("update", "exchange", "late", "more"),
    [
        ("easgd", "bfloat16", (), ()),
        *(pytest.param(*rule, (2,), (), marks=pytest.mark.slow) for rule in [*product(FAMILIES, ["float32"]), ("sgwu", "float16")]),
        *(pytest.param(rule, "float32", (2,), tuple(COMPILED), marks=compiling) for rule in ("sgwu", "fedasync", "diloco")),
    ],
)
def test_under_every_rule_a_new_module_is_the_network_of_every_replica(update, exchange, late, more):
    """Also of one that joins late, and is given what the others have pushed."""
    a_problem = problem(Zoo, train_samples=32, lr=0.01, model_args={"more": more})
    weights, replicas = course(a_problem, update, (0, 1), exchange, late=late)
    assert len(replicas) == 2 + len(late)
    built = a_problem.new_module(SEED)
    Flat(built).load(torch.tensor(compression_of(weights, exchange)))
    for replica in replicas:
        assert all(torch.equal(state(built)[name], tensor) for name, tensor in state(replica.module).items())
    expected = logits(a_problem, built)
    assert expected.isfinite().all() and not torch.equal(expected, logits(a_problem, a_problem.new_module(SEED)))
    for replica in replicas:
        assert torch.equal(expected, logits(a_problem, replica.module))
    assert built.cages["activation_norm"].initialised and built.cages["counter_assigned_anew"].steps >= 2


@pytest.mark.usefixtures("cache")
def test_the_zoo_passes_the_check():
    problem(Zoo, train_samples=32).check(SEED)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("cache")
def test_what_is_compiled_passes_the_check_or_is_refused_as_such():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        problem(Zoo, train_samples=32, model_args={"more": list(COMPILED)}).check(SEED)
    assert not [warning for warning in caught if "changes in a step" in str(warning.message)]
    from torch._inductor import config

    torch._dynamo.reset()  # it gives up compiling after some modules of one kind
    from torch._inductor.utils import fresh_cache

    with (
        fresh_cache(),  # also of what is held in memory: it needs no compiler
        config.patch({"cpp.cxx": (None, "/nowhere/g++"), "compile_threads": 1}),
        pytest.raises(ProblemError, match=r"cannot be compiled here: .*No working C.. compiler found.*Leave out torch.compile"),
    ):
        problem(compiled_as_a_whole, train_samples=44, model_args={"backend": "inductor"}).check(SEED)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("cache")
def test_what_the_default_backend_compiles_is_trained():
    from torch._inductor import config

    a_problem = problem(compiled_as_a_whole, train_samples=36, model_args={"backend": "inductor"})
    with config.patch(compile_threads=1):  # no processes of its own
        weights, (replica,) = course(a_problem, "sgwu")
    Flat(built := a_problem.new_module(SEED)).load(torch.tensor(weights))
    assert torch.equal(logits(a_problem, built), logits(a_problem, replica.module))
    assert not torch.equal(logits(a_problem, built), logits(a_problem, a_problem.new_module(SEED)))


def compression_of(weights, exchange):
    """What a worker gets of a version."""
    if exchange == "float32":
        return weights
    compression.unpack(compression.pack(weights, exchange), exchange, rounded := np.empty_like(weights))
    return rounded
