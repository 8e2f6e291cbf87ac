"""Steps by tasks: the gradients are those of plain torch, the bits the same each time, and what is measured is a schedule.

Used by pytest.
"""

from __future__ import annotations

import copy
import gc
import weakref
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from labkit.errors import ProblemError
from labkit.inner.executor import TaskEngine
from labkit.inner.pool import ThreadPool
from labkit.models import cnn

NETWORKS = {"lenet": (1, 28, 28), "vgg9": (3, 32, 32), "resnet20": (3, 32, 32), "vgg3": (1, 13, 11, 10)}
CUTS = {"samples": {"block": 3}, "rows": {"rows": 3}, "both": {"block": 2, "rows": 2}}


@pytest.fixture(scope="module")
def pools():
    made = {threads: ThreadPool(threads) for threads in (1, 2, 4)}
    yield made
    for pool in made.values():
        pool.close()


def batch(shape, n=6, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=draw, dtype=dtype), torch.randint(10, (n,), generator=draw)


def network(name, width=0.1, dtype=torch.float64):
    torch.manual_seed(0)
    return getattr(cnn, name)(NETWORKS[name], 10, width).to(dtype)


def small(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    ).to(dtype)  # fmt: skip


def difference(net, other):
    """Relative, of all gradients and buffers, parameter by parameter: the greatest."""
    assert [p.grad is None for p in net.parameters()] == [p.grad is None for p in other.parameters()]
    pairs = [(p.grad, q.grad) for p, q in zip(net.parameters(), other.parameters(), strict=True) if p.grad is not None]
    pairs += list(zip(net.buffers(), other.buffers(), strict=True))
    return max((float((a.double() - b.double()).norm() / (a.double().norm() + 1e-4)) for a, b in pairs), default=0.0)


def compare(net, x, loss_of, pool, **options):
    """Of plain torch and of tasks, after the same step."""
    plain, tasks = copy.deepcopy(net), copy.deepcopy(net)
    torch.manual_seed(1)
    loss = loss_of(plain(x))
    loss.backward()
    torch.manual_seed(1)
    engine = TaskEngine(tasks, pool, **options)
    other = engine.gradients(x, loss_of)
    assert not other.requires_grad and float(other) == pytest.approx(float(loss.detach()), rel=1e-9)
    return difference(plain, tasks), engine


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "how", [pytest.param("samples", marks=pytest.mark.slow), pytest.param("rows", marks=pytest.mark.slow), "both"]
)
def test_the_gradients_are_those_of_plain_torch(name, how, pools):
    x, y = batch(NETWORKS[name])
    found, _ = compare(network(name), x, lambda outputs: F.cross_entropy(outputs, y), pools[2], **CUTS[how])
    assert found < 1e-10  # in float64: whatever is computed twice, left out or raced for is far above


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_twenty_steps_of_sgd_end_where_plain_torch_does(name, pools):
    """In float32, by 1e-5; two runs of one number of threads by no bit."""
    ends = []
    for threads in (None, 1, 2, 2, 4):
        net = network(name, 0.25, torch.float32)
        optimiser, engine = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9), threads and TaskEngine(net, pools[threads])
        for step in range(20):
            x, y = batch(NETWORKS[name], 12, torch.float32, step)
            loss_of = lambda outputs, y=y: F.cross_entropy(outputs, y)  # noqa: E731
            optimiser.zero_grad()
            engine.gradients(x, loss_of) if threads else loss_of(net(x)).backward()
            optimiser.step()
        ends.append(torch.cat([tensor.detach().double().flatten() for tensor in net.state_dict().values()]))
    assert all(float((ends[0] - end).norm() / ends[0].norm()) < 1e-5 for end in ends[1:]) and torch.equal(ends[2], ends[3])


def test_blocks_that_nobody_asked_for(pools):
    """Two samples in a block at least, and rows where that leaves a thread without one."""
    engine = TaskEngine(net := small(), pools[4])
    for n, blocks, rows in ((1, 1, 4), (3, 1, 4), (5, 2, 2), (8, 4, 1), (127, 4, 1), (128, 8, 1)):
        graph = engine.plan(torch.zeros(n, 3, 16, 16, dtype=torch.float64)).graph
        assert (len(graph.samples), len(graph.rows[1])) == (blocks, rows) and net.training


def test_the_bits_depend_on_the_blocks_alone(pools):
    x, y = batch((3, 16, 16), dtype=torch.float32)
    found = []
    for threads in (1, 4, 2):
        net = small(torch.float32)
        engine = TaskEngine(net, pools[threads], block=3, rows=2)
        for _ in range(3):  # of which the last is in chains by measured times
            net.zero_grad()
            engine.gradients(x, lambda outputs: F.cross_entropy(outputs, y))
        found.append([tensor.clone() for tensor in (*(p.grad for p in net.parameters()), *net.buffers())])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_uneven_maps_strides_and_dilation_by_rows(pools):
    """Whatever a window leaves over at the end, reaches over the rim, or skips."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, (3, 5), stride=(2, 1), padding=(1, 2)), nn.Tanh(), nn.Conv2d(4, 6, 3, dilation=2, padding=3, groups=2),
        nn.BatchNorm2d(6, momentum=None), nn.MaxPool2d(2), nn.Conv2d(6, 4, 1, stride=2, bias=False), nn.Conv2d(4, 4, (5, 1), padding="same"),
        nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, ceil_mode=True), nn.Flatten(), nn.LazyLinear(10),
    ).double()  # fmt: skip
    x, y = batch((2, 71, 14), 3)
    net(x)
    for options in ({"rows": 5}, {"rows": 3, "block": 1}, {}):
        found, engine = compare(net, x, lambda outputs: F.cross_entropy(outputs, y), pools[2], **options)
        assert found < 1e-10
        assert options.get("rows") != 5 or max(len(rows) for rows in engine.plan(x).graph.rows) == 5


class Branches(nn.Module):
    """A value that is read three times, a module that is called twice, two that are joined, dropout, and a part that is whole."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.again = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.drop, self.whole, self.dense = nn.Dropout(0.4), nn.GroupNorm(2, 16), nn.Linear(16, 16)
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        y = self.norm(self.again(x)) + self.again(self.drop(x))
        z = self.whole(torch.cat([x, y], 1))
        return self.dense(F.relu(self.dense(F.relu(z).mean((2, 3)))))


def test_branches(pools):
    x, y = batch((2, 12, 9))
    net = Branches().double()

    def loss_of(outputs):
        return F.cross_entropy(outputs, y)

    for options in ({"block": 2}, {"rows": 2}, {"block": 4, "rows": 3}):
        found, _ = compare(net, x, loss_of, pools[2], whole=["whole"], **options)
        assert found < 1e-10
    with pytest.raises(ProblemError, match=r"whole \(GroupNorm\).*Inner\(whole=\['whole'\]\)"):
        TaskEngine(net, pools[2]).gradients(x, loss_of)


def test_what_is_not_trained_has_no_gradient(pools):
    x, y = batch(NETWORKS["resnet20"])
    net = network("resnet20")
    net.conv1.requires_grad_(False)
    net.norm1.eval().requires_grad_(False)
    net.stage1[0].norm1.bias.requires_grad_(False)
    net.stage1[1].norm1.eval()
    found, _ = compare(net, x, lambda outputs: F.cross_entropy(outputs, y), pools[2], block=3)
    assert found < 1e-10


def test_gradients_are_added_and_a_loss_may_read_weights(pools):
    x, y = batch(NETWORKS["lenet"])
    net = network("lenet")

    def loss_of(module):
        return lambda outputs: F.cross_entropy(outputs, y) + 0.01 * module.dense1.weight.square().sum()

    plain, tasks = copy.deepcopy(net), copy.deepcopy(net)
    engine = TaskEngine(tasks, pools[2], block=2)
    for _ in range(2):
        loss_of(plain)(plain(x)).backward()
        engine.gradients(x, loss_of(tasks))
    assert difference(plain, tasks) < 1e-10


def test_layers_can_be_updated_while_others_still_compute(pools):
    x, y = batch(NETWORKS["vgg9"])
    plain, tasks = network("vgg9"), network("vgg9")
    optimiser = torch.optim.SGD(plain.parameters(), lr=0.1)

    def update(parameters):
        for parameter in parameters:
            parameter.sub_(0.1 * parameter.grad)
            parameter.grad = None

    engine = TaskEngine(tasks, pools[2], block=2)
    for _ in range(3):
        optimiser.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimiser.step()
        engine.gradients(x, lambda outputs: F.cross_entropy(outputs, y), update)
    optimiser.zero_grad()
    assert difference(plain, tasks) < 1e-10
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(plain.parameters(), tasks.parameters(), strict=True))


def test_channels_last_stays_and_shapes_may_change(pools):
    x, y = batch((3, 16, 16))
    net = small().to(memory_format=torch.channels_last)
    tasks, engine = copy.deepcopy(net), None
    engine = TaskEngine(tasks, pools[2], rows=2, block=3)
    for n in (6, 2):
        part, labels = x[:n].contiguous(memory_format=torch.channels_last), y[:n]
        net.zero_grad(), tasks.zero_grad()
        F.cross_entropy(net(part), labels).backward()
        engine.gradients(part, lambda outputs, labels=labels: F.cross_entropy(outputs, labels))
        assert difference(net, tasks) < 1e-10
        assert all(held.is_contiguous(memory_format=torch.channels_last) for held in engine.plan(part).buffers["value", 1])


def test_what_was_measured_is_a_schedule(pools):
    x, y = batch(NETWORKS["vgg9"], 16, torch.float32)
    engine = TaskEngine(network("vgg9", 0.5, torch.float32), pools[2], block=4)
    for _ in range(3):
        engine.gradients(x, lambda outputs: F.cross_entropy(outputs, y))
    for plan in (engine.measured, engine.tasks):
        assert all(plan.end[before] <= plan.start[task] for task, own in enumerate(plan.predecessors) for before in own)
        assert min(plan.start) == 0 and plan.makespan >= 0.999 * plan.bound and set(plan.thread) <= {0, 1}
        for thread in (0, 1):
            own = sorted((plan.start[i], plan.end[i]) for i in range(len(plan.start)) if plan.thread[i] == thread)
            assert all(a[1] <= b[0] for a, b in pairwise(own))
    assert len(engine.measured.start) < len(engine.tasks.start) == len(engine.plan(x).graph.tasks)


def test_the_error_of_a_task_ends_the_step_and_the_next_one_works(pools):
    x, y = batch(NETWORKS["lenet"])
    engine = TaskEngine(network("lenet"), pools[4], block=2)
    with pytest.raises(RuntimeError, match="no such loss"):
        engine.gradients(x, lambda outputs: (_ for _ in ()).throw(RuntimeError("no such loss")))
    assert float(engine.gradients(x, lambda outputs: F.cross_entropy(outputs, y))) > 0
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        TaskEngine(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), pools[1]).gradients(torch.zeros(1, 2), torch.sum)


def test_a_plan_keeps_no_network_alive(pools):
    x, y = batch((2, 8, 8), 3)
    net = Branches().double()
    engine, held = TaskEngine(net, pools[2], whole=True), weakref.ref(net)
    engine.gradients(x, lambda outputs: F.cross_entropy(outputs, y))
    engine.module = None
    del net
    gc.collect()
    assert held() is None


class Settings:
    p, slopes = 0.0, None


class Tunable(nn.Module):
    """A forward pass that reads each kind of setting."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act, self.drop = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.1), nn.Dropout(0.0)
        self.dense, self.scale, self.settings, self.function = nn.Linear(4, 10), 1.0, Settings(), F.relu
        self.settings.slopes = [0.1, {"of": 0.2}]

    def forward(self, x):
        x = self.function(self.act(self.norm(self.conv(x))) * self.scale)
        x = F.leaky_relu(x, self.settings.slopes[1]["of"])
        return self.dense(self.drop(F.dropout(x.mean((2, 3)), self.settings.p, self.training)))


def _other_activation(net):
    net.act = nn.Tanh()


CHANGES = {
    "p of a layer": lambda net: setattr(net.drop, "p", 0.4),
    "p of a function": lambda net: setattr(net.settings, "p", 0.4),
    "slope": lambda net: setattr(net.act, "negative_slope", 0.9),
    "deep": lambda net: net.settings.slopes[1].update(of=-1.0),
    "number": lambda net: setattr(net, "scale", -2.0),
    "function": lambda net: setattr(net, "function", torch.tanh),
    "layer": _other_activation,
    "mode": lambda net: net.norm.eval(),
    "momentum": lambda net: setattr(net.norm, "momentum", 0.5),
    "eps": lambda net: setattr(net.norm, "eps", 0.3),
    "padding": lambda net: setattr(net.conv, "padding", (1, 1)),
    "frozen": lambda net: net.conv.requires_grad_(False),
}


def test_plans_follow_whatever_changes(pools):
    """Settings of layers and of the user's own modules, the functions and the layers that they call; and a plan that is there is used."""
    x, y = batch((2, 7, 6), 6)
    torch.manual_seed(0)
    plain = Tunable().double()
    tasks = copy.deepcopy(plain)
    engine = TaskEngine(tasks, pools[2], block=3)

    def step():
        for net, gradients in ((plain, lambda of: of(plain(x)).backward()), (tasks, lambda of: engine.gradients(x, of))):
            net.zero_grad()
            torch.manual_seed(3)
            gradients(lambda outputs: F.cross_entropy(outputs, y))
        return difference(plain, tasks)

    assert step() < 1e-10 and step() < 1e-10 and len(engine._plans) == 1
    for name, change in CHANGES.items():
        change(plain), change(tasks)
        assert step() < 1e-10, name
    tasks.dense.register_forward_hook(lambda *_: None)
    with pytest.raises(ProblemError, match=r"dense \(Linear\).*hooks"):
        step()


def test_what_a_whole_module_does_to_itself_makes_no_new_plan(pools):
    class Counting(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x.roll(1, 1)

    net, (x, y) = nn.Sequential(nn.Linear(3, 4), Counting(), nn.Linear(4, 10)).double(), batch((3,), 6)
    for whole in (["1"], True):
        engine = TaskEngine(net, pools[2], whole=whole)
        plans = set()
        for _ in range(3):
            engine.gradients(x, lambda outputs: F.cross_entropy(outputs, y))
            plans.add(id(engine.plan(x)))
        assert len(plans) == 1 == len(engine._plans)
    assert net[1].calls == 6
