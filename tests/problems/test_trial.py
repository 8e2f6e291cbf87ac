"""What a problem builds is tried out before a run: two builds are one network, nobody's own module is touched, and all that a step
changes is in the vector, or it is said by name what is not."""

from __future__ import annotations

import copy
import itertools
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import labkit
from labkit.errors import ProblemError
from labkit.models.flat import Flat
from labkit.problems.trial import eagerly
from tests.helpers import problem

pytestmark = pytest.mark.usefixtures("cache")


class Net(nn.Module):
    """A small network for tests to change: 36 values to 3 classes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(36, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.second(torch.relu(self.first(x.flatten(1))))


def refused(model, match, **options):
    with warnings.catch_warnings(), pytest.raises(ProblemError, match=match):
        warnings.simplefilter("ignore")
        problem(model, **options).check(0)


# -- two builds are one network ----------------------------------------------------------------------------------------


class Drawing(Net):
    """Draws what it computes with from numpy and `random` in its constructor."""

    def __init__(self):
        super().__init__()
        self.order = torch.from_numpy(np.random.permutation(36))
        self.register_buffer("scale", torch.tensor(random.uniform(0.5, 2)))
        self.shift = np.random.normal()

    def forward(self, x):
        return super().forward(x.flatten(1)[:, self.order] * self.scale + self.shift)


def test_constructors_that_draw_from_numpy_and_random_are_seeded():
    a_problem = problem(Drawing)
    before = random.getstate(), np.random.get_state()[1].copy()
    a_problem.check(0)
    one, other, third = (a_problem.new_module(seed) for seed in (1, 1, 2))
    assert torch.equal(one.order, other.order) and one.scale == other.scale and one.shift == other.shift
    assert not torch.equal(one.order, third.order)
    assert random.getstate() == before[0] and (np.random.get_state()[1] == before[1]).all()


class OwnGenerator(Drawing):
    def __init__(self):
        super().__init__()
        self.order = torch.from_numpy(np.random.default_rng().permutation(36))


class OwnWeights(Net):
    def __init__(self):
        super().__init__()
        self.second.weight.data = torch.from_numpy(np.random.default_rng().normal(size=(3, 5)).astype("f4"))


def in_turn(makers=itertools.cycle([nn.ReLU, nn.Tanh, nn.Sigmoid])):  # noqa: B008
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 5), next(makers)(), nn.Linear(5, 3))


@pytest.mark.parametrize(
    ("model", "what"),
    [(OwnGenerator, "'order' differ"), (OwnWeights, r"'second\.weight' differ"), (in_turn, r"'2\.inplace' differ")],
)
def test_builds_that_differ_are_refused_by_the_name_of_what_differs(model, what):
    refused(model, f"two builds with one seed are different networks: {what}.*np.random")


def test_an_evaluation_that_draws_numbers_is_no_other_network():
    class Noisy(labkit.Classifier):
        def evaluate(self, module, batch):
            return {**super().evaluate(module, batch), "noise": np.random.default_rng().normal()}

    problem(kind=Noisy).check(0)


# -- nobody's own module is touched ------------------------------------------------------------------------------------


def test_a_module_that_exists_is_copied_and_is_version_0():
    pretrained = Net()
    before = copy.deepcopy(pretrained.state_dict())
    a_problem = problem(lambda: pretrained)
    a_problem.check(0)
    module = a_problem.new_module(0)
    assert module is not pretrained and all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    Flat(module).vector.zero_()
    assert all(torch.equal(t, before[name]) for name, t in pretrained.state_dict().items()) and not module.first.weight.any()


def test_a_part_or_a_constant_that_exists_is_copied_too():
    body, mean = nn.Linear(36, 5), torch.full((36,), 0.5)

    def model():
        head = nn.Sequential(nn.Flatten(), body, nn.Linear(5, 3))
        head.register_buffer("mean", mean)
        return head

    a_problem = problem(model)
    a_problem.check(0)
    one, other = a_problem.new_module(0), a_problem.new_module(0)
    assert one[1] is not body and one[1].weight.data_ptr() != other[1].weight.data_ptr() != body.weight.data_ptr()
    assert torch.equal(one[1].weight, body.weight) and one.mean is not mean


def test_what_exists_and_cannot_be_copied_is_refused():
    class Stubborn(Net):
        def __deepcopy__(self, memo):
            raise RuntimeError("only one of me")

    only = Stubborn()
    refused(lambda: only, "cannot be copied for each worker.*only one of me.*Make a new module")


def test_a_problem_of_ones_own_is_copied_from_as_well():
    class Mine(labkit.Classifier):
        def build(self, seed):
            return KEPT

    a_problem = problem(kind=Mine)
    a_problem.check(0)
    assert a_problem.new_module(0) is not KEPT and torch.equal(KEPT.first.weight, KEPT_WEIGHT)


KEPT = Net()
KEPT_WEIGHT = KEPT.first.weight.detach().clone()


def test_lazy_layers_have_their_sizes_and_are_equal_everywhere():
    def lazy():
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(3))

    a_problem = problem(lazy)
    a_problem.check(3)
    one, other = (Flat(a_problem.new_module(3)).vector for _ in range(2))
    assert torch.equal(one, other) and len(one) == 36 * 5 + 5 + 4 * 5 + 8 + 5 * 3 + 3

    class Unused(Net):
        def __init__(self):
            super().__init__()
            self.extra = nn.LazyLinear(2)

    refused(Unused, r"parameter 'extra\.weight' has no shape yet")


# -- what is in no vector ----------------------------------------------------------------------------------------------


class Counting(Net):
    """Its step counter is a plain number that its outputs do not depend on."""

    calls = 0

    def forward(self, x):
        if self.training:
            self.calls += 1
        return super().forward(x)


class Centred(Net):
    """A running mean in a plain attribute, by which it computes."""

    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(36)

    def forward(self, x):
        x = x.flatten(1)
        if self.training:
            self.mean = 0.9 * self.mean + x.mean(0).detach()
        return super().forward(x - self.mean)


class Listing(Centred):
    def __init__(self):
        super().__init__()
        self.means = [0.0, 0.0]

    def forward(self, x):
        if self.training:
            self.means[1] = 1.0 + self.means[1]
        return Net.forward(self, x + self.means[1])


class Caching(Net):
    """Holds what it has computed last, as attention maps are kept: that is no state."""

    last = None

    def forward(self, x):
        self.last = super().forward(x)
        return self.last


class Growing(Net):
    def forward(self, x):
        if self.training and not hasattr(self, "extra"):
            self.extra = nn.Linear(3, 3)
        return super().forward(x)


def test_state_in_plain_attributes_is_said_by_name():
    refused(Centred, "'mean' changes in a step, and is no parameter or buffer.*register_buffer")
    refused(Listing, "'means' changes in a step")
    refused(Growing, r"'extra\.weight', 'extra\.bias' in its first step only")
    with pytest.warns(UserWarning, match="'calls' changes in a step.*If it matters"):
        problem(Counting).check(0)
    problem(Caching).check(0)


class Memory:
    pass


class Remembering(Net):
    """Holds what its outputs do not depend on: in a list that grows, in an object, in what was None before."""

    def __init__(self):
        super().__init__()
        self.losses, self.memory, self.latest = [], Memory(), None
        self.memory.mean = torch.zeros(36)

    def forward(self, x):
        if self.training:
            self.losses.append(1.0)
            self.memory.mean = x.detach().flatten(1).mean(0)
            self.latest = x.detach().flatten(1).amax(0)
        return super().forward(x)


def test_what_grows_appears_or_lies_in_an_object_is_said():
    with pytest.warns(UserWarning, match=r"'latest', 'losses', 'memory\.mean'|'losses', .*'latest'"):
        problem(Remembering).check(0)


SEEN = torch.zeros(36)


class Outside(Net):
    """Computes with what is a global variable, or an attribute of its class."""

    n_seen = 0

    def __init__(self, where="global"):
        super().__init__()
        self.where = where

    def forward(self, x):
        x = x.flatten(1)
        if self.training:
            SEEN.add_(x.detach().mean(0))
            Outside.n_seen += 1
        return super().forward(x + SEEN if self.where == "global" else x * (1 + Outside.n_seen))


@pytest.mark.parametrize("where", ["global", "class"])
def test_state_outside_of_the_module_is_refused(where):
    refused(lambda: Outside(where), "something outside of the module changes in a step")


class Tensors(labkit.Classifier):
    def evaluate(self, module, batch):
        return {name: torch.tensor(value) for name, value in super().evaluate(module, batch).items()} | {"extra": torch.ones(())}


def test_what_an_evaluation_gives_as_tensors_counts_as_numbers_do():
    refused(in_turn, "two builds with one seed", kind=Tensors)
    a_problem = problem(Net, kind=Tensors)
    measured = a_problem.measure(a_problem.new_module(0), a_problem.test_indices())
    assert measured["extra"] == 1.0 and isinstance(measured["loss"], float)


# -- in other processes ------------------------------------------------------------------------------------------------


class OfTheProcess(Net):
    """As a constructor builds that reads the process, the machine or the order of a set; its last layer is zero at first."""

    process = 0

    def __init__(self):
        super().__init__()
        self.order = list(np.random.default_rng(OfTheProcess.process).permutation(36))
        nn.init.zeros_(self.second.weight)

    def forward(self, x):
        return super().forward(x.flatten(1)[:, self.order])


class OfASet(Net):
    def __init__(self):
        super().__init__()
        names = ["a", "b"] if OfTheProcess.process else ["b", "a"]
        self.heads = nn.ModuleDict({name: nn.Linear(3, 3) for name in names})

    def forward(self, x):
        return self.heads["b"](self.heads["a"](super().forward(x)))


@pytest.mark.parametrize(("model", "what"), [(OfTheProcess, "'order' differ"), (OfASet, r"'heads\.a\.weight', .* differ")])
def test_a_worker_that_builds_another_network_than_the_kernel_is_refused(monkeypatch, model, what):
    a_problem = problem(model)
    a_problem.check(0)
    of_kernel = a_problem.fingerprint(0)
    a_problem.check_same(0, of_kernel)
    monkeypatch.setattr(OfTheProcess, "process", 1)
    a_problem.check(0)
    with pytest.raises(ProblemError, match=f"another network in this process than in the kernel.*{what}"):
        a_problem.check_same(0, of_kernel)


def test_what_rounding_makes_of_a_loss_on_another_cpu_is_no_other_network():
    a_problem = problem(Net)
    mine = a_problem.fingerprint(0)
    a_problem.check_same(0, mine._replace(loss=mine.loss * 1.01))
    with pytest.raises(ProblemError, match="its loss is"):
        a_problem.check_same(0, mine._replace(loss=mine.loss * 1.1))


class Moving(Net):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        if self.training:
            self.how(self)
        return super().forward(x)


def new_parameter(net):
    net.second.weight = nn.Parameter(net.second.weight.detach().clone())


def gone(net):
    net.first.bias = None


def other_shape(net):
    net.second.weight.data = torch.zeros(4, 5)


@pytest.mark.parametrize(
    ("how", "match"),
    [
        (new_parameter, r"parameter 'second\.weight' was replaced by a new Parameter"),
        (gone, r"parameter 'first\.bias' has gone"),
        (other_shape, r"second\.weight.*|.*does not fit"),
    ],
)
def test_tensors_that_cannot_be_put_back_are_refused_by_name(how, match):
    refused(lambda: Moving(how), match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda net: net.to(torch.float16), r"parameter 'first\.weight' is float16"),
        (lambda net: setattr(net, "phase", nn.Parameter(torch.zeros(3, dtype=torch.complex64))), "'phase' is complex64.*real and"),
        (lambda net: setattr(net, "mask", nn.Parameter(torch.eye(3).to_sparse())), "'mask' is sparse"),
        (lambda net: net.second.to("meta"), r"'second\.weight' is on the device 'meta'"),
        (lambda net: net.register_buffer("table", torch.eye(3).to_sparse()), "buffer 'table' is sparse"),
        (
            lambda net: setattr(net, "view", nn.Parameter(net.first.weight.data[1:])),
            "'first.weight' and 'view' share a part of their memory",
        ),
    ],
)
def test_what_cannot_be_in_a_vector_is_refused_by_name(change, match):
    def model():
        change(net := Net())
        return net

    refused(model, match)


def test_a_batch_is_no_larger_than_batches_are():
    refused(lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)), "does not fit", batch_size=1)


# -- what is no number after one step ----------------------------------------------------------------------------------


class Root(Net):
    """The square root of 0 has no finite gradient."""

    def forward(self, x):
        return self.second(torch.sqrt(0 * self.first(x.flatten(1))))


class Steep(Net):
    def forward(self, x):
        return 1e20 * super().forward(x)


class Mean(Net):
    """A running mean that becomes infinite."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        if self.training:
            self.mean += torch.tensor(float("inf"))
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "options", "what"),
    [(Root, {}, r"'first\.weight', 'first\.bias'"), (Mean, {}, "'mean'"), (Steep, {"lr": 1e30}, r"'first\.weight', .* and 1 more")],
)
def test_what_is_no_number_after_the_first_step_is_said_before_the_run(model, options, what):
    refused(model, rf"after its first step, on two samples, {what}.* hold NaN or infinity.*Lower the learning rate", **options)


def test_a_loss_that_is_no_number_though_the_weights_are_is_warned_of():
    class Silent(labkit.Classifier):
        def step(self, *given):
            return super().step(*given) | {"loss": torch.tensor(float("nan"))}

    with pytest.warns(UserWarning, match="the loss of the first step, on two samples, is nan"):
        problem(kind=Silent).check(0)


# -- generators of a module's own --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.Generator().manual_seed(3),
        lambda: np.random.default_rng(3),
        lambda: np.random.RandomState(3),
        lambda: random.Random(3),
    ],
)
def test_a_generator_in_a_module_is_state_that_stays_in_each_worker(make):
    class Noisy(Net):
        def __init__(self):
            super().__init__()
            self.chance = {"noise": make()}

        def forward(self, x):
            if self.training:
                one = self.chance["noise"]
                torch.rand(1, generator=one) if isinstance(one, torch.Generator) else one.random()
            return super().forward(x)

    with pytest.warns(UserWarning, match=r"\"chance\['noise'\]\" changes in a step, and is no parameter or buffer"):
        problem(Noisy).check(0)


def test_the_generators_that_are_seeded_for_each_step_are_no_state_of_a_module():
    class Noisy(Net):
        def __init__(self):
            super().__init__()
            self.generators = [torch.default_generator, np.random.mtrand._rand, random._inst]

        def forward(self, x):
            return super().forward(x + torch.rand(1) * np.random.random() * random.random() * self.training)

    problem(Noisy).check(0)


def test_when_two_threads_have_computed_without_compiling_the_next_one_compiles():
    compiled = []
    twice = torch.compile(lambda x: 2 * x, backend=lambda graph, _: compiled.append(graph) or graph.forward)
    first, second = eagerly(), eagerly()
    for step in (first.__enter__, second.__enter__, lambda: first.__exit__(None, None, None)):
        step()
        assert twice(torch.ones(1)) == 2 and not compiled
    second.__exit__(None, None, None)
    assert twice(torch.ones(1)) == 2 and len(compiled) == 1
