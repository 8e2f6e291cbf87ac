"""`labkit.inner.hooks`: hooks on parameters are called once a step, with the gradient of the batch, whatever it was split into."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import labkit
from labkit.inner import hooks
from labkit.inner.engine import Engine
from tests.inner.test_samples import batch, far, shares

SHAPE = (2, 6, 6)
WAYS = [
    {"split": "samples", "block": 3},
    {"split": "rows", "block": 3},
    {"split": "samples", "whole": ["4"]},
    {"split": "rows", "whole": ["4"]},
]


def net(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), norm(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 10)]
    return nn.Sequential(*layers)


def stepped(module, inner=None, n=12, steps=2):
    """Steps of plain torch, or of the inner layer, by whatever hooks do."""
    engine = Engine(inner) if inner else None
    for seed in range(steps):
        x, y = batch(SHAPE, n, seed)
        if engine:
            engine.gradients(module, x, lambda network, parts, x=x, y=y: shares(network, x, y, parts))
        else:
            F.cross_entropy(module(x), y).backward()
    if engine:
        engine.close()
    return module


def hooked(module, calls):
    """Hooks that make another gradient of each, which is none of the sum of parts, and note who calls when."""
    for name, parameter in module.named_parameters():
        note = lambda what, name=name: calls.append((what, name, threading.get_ident()))  # noqa: E731
        parameter.register_hook(lambda g, note=note: note("tensor") or g.clamp(-0.01, 0.02))
        parameter.register_post_accumulate_grad_hook(lambda p, note=note: note("after"))
    return module


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_hooks_see_the_gradient_of_the_batch_once_on_the_thread_of_the_caller(how):
    calls, expected = [], []
    plain = stepped(hooked(net(), expected))
    split = stepped(hooked(net(), calls), labkit.Inner(threads=2, **how))
    assert sorted(calls) == sorted(expected)
    for p, q in zip(plain.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6)
        assert q.grad.abs().max() <= 0.04  # two steps of at most 0.02


@pytest.mark.parametrize(("how", "norm"), [*((way, nn.BatchNorm2d) for way in WAYS[:2]), ({"split": "samples"}, nn.Identity)])
def test_an_optimiser_in_the_backward_pass(how, norm):
    """Steps that are tried out, to find the best block, are none of its."""

    def trained(inner):
        module = net(norm)
        for parameter in module.parameters():
            own = torch.optim.SGD([parameter], lr=0.1)
            parameter.register_post_accumulate_grad_hook(lambda p, own=own: own.step() or setattr(p, "grad", None))
        return stepped(module, inner, 40, 3)

    assert far(trained(labkit.Inner(threads=2, **how)), trained(None)) < 1e-5


def test_hooks_come_back_and_can_be_removed_also_after_an_error():
    module, called = net(), []
    handle = module[0].weight.register_hook(lambda g: called.append(1))
    with pytest.raises(ZeroDivisionError), hooks.taken_off(list(module.parameters())):
        assert not hooks.has_hooks(module[0].weight)
        stepped(module, steps=1)
        raise ZeroDivisionError
    assert not called and hooks.has_hooks(module[0].weight)
    stepped(module, steps=1)
    assert called == [1]
    handle.remove()
    assert not hooks.has_hooks(module[0].weight)
    stepped(module, labkit.Inner(threads=2, split="samples", block=3), steps=1)
    assert called == [1]
