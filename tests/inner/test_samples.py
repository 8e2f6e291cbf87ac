"""split="samples" against plain torch: the same network after some steps, whatever the threads and blocks."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from labkit.errors import ProblemError
from labkit.inner import samples
from labkit.inner.pool import ThreadPool
from labkit.models import MODELS, seeded

SHAPES = {"lenet": (1, 28, 28), "vgg3": (1, 8, 8, 8), "vgg9": (3, 16, 16), "resnet20": (3, 16, 16)}


def network(name, shape, width=0.25):
    with seeded(0):
        return MODELS[name](shape, 10, width)


def batch(shape, n=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=generator), torch.randint(10, (n,), generator=generator)


def shares(module, x, y, n, of=F.cross_entropy):
    total = len(y)
    return [lambda x=a, y=b: of(module(x), y) * (len(y) / total) for a, b in zip(x.tensor_split(n), y.tensor_split(n), strict=True)]


def trained(module, shape, steps, gradients, lr=0.02):
    """The module after some steps of SGD with momentum, from the gradients that `gradients(module, x, y)` leaves."""
    module = copy.deepcopy(module)
    optimiser = torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9)
    for step in range(steps):
        optimiser.zero_grad()
        gradients(module, *batch(shape, seed=step))
        optimiser.step()
    return module


def plain(module, x, y):
    F.cross_entropy(module(x), y).backward()


def flat(module):
    return torch.cat([tensor.detach().double().flatten() for tensor in module.state_dict().values()])


def far(one, other):
    one, other = flat(one), flat(other)
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(("name", "threads", "blocks"), [("lenet", 2, 6), ("vgg3", 4, 4), ("vgg9", 1, 3), ("resnet20", 2, 2)])
def test_training_is_that_of_plain_torch_and_repeats_bit_for_bit(name, threads, blocks):
    shape = SHAPES[name]
    module, pool = network(name, shape), ThreadPool(threads)

    def split(module, x, y):
        samples.gradients(module, pool, shares(module, x, y, blocks))

    one, again = (trained(module, shape, 4, split) for _ in range(2))
    pool.close()
    assert far(one, trained(module, shape, 4, plain)) < 1e-5
    assert torch.equal(flat(one), flat(again))


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_after_20_steps_each_model_is_that_of_plain_torch(name, threads):
    shape = SHAPES[name]
    module, pool = network(name, shape, 0.5), ThreadPool(threads)
    lr = 1e-3  # with a larger one rounding grows from step to step, as it does between two layouts of plain torch

    def split(module, x, y):
        samples.gradients(module, pool, shares(module, x, y, threads))

    def in_parts(module, x, y):
        for part, own in zip(x.chunk(threads), y.chunk(threads), strict=True):
            (F.cross_entropy(module(part), own) * (len(own) / len(y))).backward()

    one, again = (trained(module, shape, 20, split, lr) for _ in range(2))
    pool.close()
    assert torch.equal(flat(one), flat(again))
    # On some processors the rounding of a batch and of its parts is on two sides of a ReLU, in plain torch too, and they go apart from there.
    references = (plain, in_parts) if name == "vgg9" else (plain,)
    assert min(far(one, trained(module, shape, 20, reference, lr)) for reference in references) < 1e-5


class Norms(nn.Module):
    """Each kind of BatchNorm: without weights, with a mean over all batches, without running statistics, frozen, called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.bare = nn.BatchNorm2d(3, momentum=None), nn.BatchNorm2d(3, affine=False)
        self.here, self.frozen = nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3)
        self.last, self.out = nn.BatchNorm1d(3), nn.Linear(3, 10)

    def forward(self, x):
        self.frozen.eval()
        x = self.here(F.relu(self.bare(self.first(x))))
        x = self.first(self.frozen(x) + x)
        return self.out(self.last(x.mean((2, 3))))


def test_batch_statistics_are_those_of_the_whole_batch():
    shape, pool = (3, 6, 6), ThreadPool(3)
    with seeded(0):
        module = Norms()
    one = trained(module, shape, 5, lambda module, x, y: samples.gradients(module, pool, shares(module, x, y, 3)))
    pool.close()
    other = trained(module, shape, 5, plain)
    assert far(one, other) < 1e-5
    for name, value in other.state_dict().items():
        torch.testing.assert_close(one.state_dict()[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layer", [nn.Dropout(0.4), nn.Dropout2d(0.4), nn.Dropout3d(0.4), nn.Dropout(1.0)])
def test_dropout_draws_for_each_block_and_repeats(layer):
    shape = (3, 4, 4, 4) if isinstance(layer, nn.Dropout3d) else (3, 4, 4)
    seen, pool = [], ThreadPool(2)
    module = nn.Sequential(layer, nn.Flatten(), nn.Linear(math.prod(shape), 10))
    module[1].register_forward_pre_hook(lambda _, x: seen.append(x[0].detach()))
    x, y = torch.ones(200, *shape), torch.zeros(200, dtype=torch.long)

    def step(seed):
        seen.clear()
        with seeded(seed):
            samples.gradients(module, pool, shares(module, x, y, 2))
        return torch.cat(sorted(seen, key=lambda part: part.flatten().tolist()))

    one, again, other = step(1), step(1), step(2)
    pool.close()
    assert torch.equal(one, again) and (layer.p == 1 or not torch.equal(one, other))
    assert set(one.unique().tolist()) <= {0.0, float(torch.tensor(1.0) / (1 - layer.p))}
    assert abs(float((one == 0).float().mean()) - layer.p) < 0.1
    if isinstance(layer, nn.Dropout2d | nn.Dropout3d):  # whole channels
        assert all(len(channel.unique()) == 1 for channel in one.flatten(2).flatten(0, 1))


class Centred(nn.Module):
    """Mixes samples."""

    def forward(self, x):
        return x - x.mean(0)


def odd():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Sequential(Centred(), nn.BatchNorm1d(16)), nn.Linear(16, 10))


def test_what_mixes_samples_is_named_and_computed_whole_where_that_is_asked():
    pool, shape = ThreadPool(2), (1, 8, 8)
    with pytest.raises(ProblemError, match=r"2\.0 \(Centred\).*whole=\['2\.0'\]"):
        samples.refuse(odd())
    with pytest.raises(ProblemError, match=r"no module 'conv9'"):
        samples.refuse(odd(), ["conv9"])
    with seeded(0):
        module = odd()
    for whole in (["2.0"], ["2"], True):
        samples.refuse(module, whole)
        one = trained(
            module, shape, 4, lambda module, x, y, whole=whole: samples.gradients(module, pool, shares(module, x, y, 2), whole)
        )
        assert far(one, trained(module, shape, 4, plain)) < 1e-5
    with pytest.raises(ProblemError, match="RNN"):
        samples.refuse(nn.Sequential(nn.RNN(4, 4)))
    rnn = nn.Sequential(nn.Flatten(1, 2), nn.RNN(8, 8, batch_first=True))
    with pytest.raises(ProblemError, match=r"RNN.*must give one tensor"):
        samples.gradients(rnn, pool, [lambda: rnn(torch.ones(3, 1, 8, 8))[0].sum()] * 2, ["1"])
    pool.close()


def test_an_error_in_one_block_is_raised_and_the_module_is_as_it_was():
    pool, module = ThreadPool(2), network("resnet20", (3, 8, 8))
    parts = dict(module.named_modules())

    def fails():
        raise ZeroDivisionError("of the loss")

    with pytest.raises(ZeroDivisionError, match="of the loss"):
        samples.gradients(module, pool, [lambda: module(torch.ones(4, 3, 8, 8)).sum(), fails])
    pool.close()
    assert dict(module.named_modules()) == parts and not any(p.grad is not None for p in module.parameters())


class Odd(nn.Module):
    """A forward pass that is `called(self, x)`."""

    def __init__(self, called):
        super().__init__()
        self.norm, self.drop, self.dense, self.called = nn.BatchNorm2d(1), nn.Dropout(0.5), nn.Linear(64, 10), called

    def forward(self, x):
        return self.dense(self.called(self, x).flatten(1))


@pytest.mark.parametrize(
    ("called", "error"),
    [
        (lambda self, x: self.norm(x) if x[0, 0, 0, 0] > 0 else x, "does not call for another"),
        (lambda self, x: checkpoint(self.drop, self.norm(x), use_reentrant=False), "computed again in the backward pass"),
    ],
)
def test_threads_that_part_and_layers_that_are_computed_again_are_refused(called, error):
    module, x, pool = Odd(called), torch.ones(4, 1, 8, 8), ThreadPool(2)
    x[2:] = -1
    x.requires_grad_()
    with pytest.raises(ProblemError, match=error):
        samples.gradients(module, pool, shares(module, x, torch.zeros(4, dtype=torch.long), 2))
    pool.close()


def test_stand_ins_have_what_their_layers_have():
    module, pool = Odd(lambda self, x: self.norm(x) * self.norm.weight.mean() * self.norm.eps), ThreadPool(2)
    shape = (1, 8, 8)
    one = trained(module, shape, 2, lambda module, x, y: samples.gradients(module, pool, shares(module, x, y, 2)))
    assert far(one, trained(module, shape, 2, plain)) < 1e-5
    half = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10)).bfloat16()
    x, y = batch(shape)
    samples.gradients(half, pool, shares(half, x.bfloat16(), y, 2))
    assert half[0].weight.grad.dtype == torch.bfloat16 and half[0].weight.grad.isfinite().all()
    module.norm.register_forward_hook(lambda *_: None)
    with pytest.raises(ProblemError, match=r"BatchNorm2d.*hooks"):
        samples.refuse(module)
    with pytest.raises(ProblemError, match=r"0 \(ParametrizedLinear\).*whole=\['0'\]"):
        samples.refuse(nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))))
    counted = nn.Linear(4, 4)
    counted.register_buffer("steps", torch.zeros(1))
    with pytest.raises(ProblemError, match=r"0 \(Linear\).*whole=\['0'\]"):
        samples.refuse(nn.Sequential(counted))
    pool.close()


def test_what_changes_its_weights_or_is_compiled_is_refused_by_name():
    for embedding in (nn.Embedding(5, 4, max_norm=1.0), nn.Embedding(5, 4, scale_grad_by_freq=True)):
        with pytest.raises(ProblemError, match=r"0 \(Embedding\).*whole=\['0'\]"):
            samples.refuse(nn.Sequential(embedding, nn.Flatten(), nn.Linear(8, 10)))
    compiled = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    compiled[1]._compiled_call_impl = compiled[1].forward  # what compile() sets, without the compiler
    with pytest.raises(ProblemError, match=r"split 1, which is compiled"):
        samples.refuse(compiled)
    samples.refuse(compiled, ["1"])


def test_sparse_and_complex_gradients_and_tied_weights():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.turn = nn.Embedding(7, 4, sparse=True), nn.Parameter(torch.randn(4, dtype=torch.complex64))
            self.dense, self.again = nn.Linear(4, 4), nn.Linear(4, 4)
            self.again.weight = self.dense.weight

        def forward(self, x):
            return self.again(self.dense(torch.view_as_real(self.words(x).mean(1) * self.turn)[..., 0]))

    with seeded(0):
        module, pool = Words(), ThreadPool(2)
    x, y = torch.arange(24).view(8, 3) % 7, torch.arange(8) % 4
    plain(module, x, y)
    right = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    samples.gradients(module, pool, shares(module, x, y, 4))
    pool.close()
    for parameter, own in zip(module.parameters(), right, strict=True):
        assert parameter.grad.layout == own.layout and parameter.grad.dtype == own.dtype
        torch.testing.assert_close(parameter.grad.to_dense(), own.to_dense(), rtol=1e-4, atol=1e-6)


def test_gradients_within_a_step():
    """One that is used as a number is right; one that is differentiated again would leave out what the other threads have a part in."""

    def forward(self, x, again):
        x = x.detach().requires_grad_()
        y = self.norm(x)
        (slope,) = torch.autograd.grad(y.tanh().square().sum(), x, retain_graph=True, create_graph=again)
        return y + (slope if again else slope.detach())

    shape, pool = (1, 8, 8), ThreadPool(2)
    module = Odd(lambda self, x: forward(self, x, False))
    one = trained(module, shape, 2, lambda module, x, y: samples.gradients(module, pool, shares(module, x, y, 2)))
    assert far(one, trained(module, shape, 2, plain)) < 1e-5
    module.called = lambda self, x: forward(self, x, True)
    with pytest.raises(ProblemError, match=r"differentiated again \(create_graph=True\)"):
        samples.gradients(module, pool, shares(module, *batch(shape), 2))
    pool.close()
