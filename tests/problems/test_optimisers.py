"""Optimisers: any of torch's by name with its settings, functions; what would silently not be used is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from labkit.errors import ProblemError
from labkit.problems.optimisers import DEFAULTS, OPTIMISERS, check_optimiser, make_optimiser


def made(given, **common):
    common = {**DEFAULTS, **common}
    check_optimiser(given, **common)
    return make_optimiser(given, list(nn.Linear(2, 3, bias=False).parameters()), **common)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_optimiser_of_torch_makes_a_step(name):
    weights = [nn.Parameter(torch.ones(3, 2))]
    optimiser = make_optimiser(name, weights, **{**DEFAULTS, "lr": 0.01})
    weights[0].square().sum().backward()
    optimiser.step()
    assert type(optimiser) is OPTIMISERS[name] and float(weights[0].detach().sum()) < 6


def test_settings_of_its_own_count_for_more():
    assert made({"name": "rmsprop", "alpha": 0.9}, lr=0.01).param_groups[0]["alpha"] == 0.9
    group = made({"name": "AdamW", "betas": [0.8, 0.95], "lr": 0.002}).param_groups[0]
    assert (group["betas"], group["lr"], group["fused"]) == ((0.8, 0.95), 0.002, True)
    assert made({"name": "adam", "foreach": True}).param_groups[0]["fused"] is None
    assert made({"name": "sgd", "nesterov": True}, momentum=0.5).param_groups[0]["momentum"] == 0.5
    assert (
        made("rmsprop").param_groups[0]["momentum"] == 0 and made("nadam", weight_decay=0.1).param_groups[0]["weight_decay"] == 0.1
    )
    assert type(made(torch.optim.Adagrad)) is torch.optim.Adagrad is type(made("torch.optim:Adagrad"))


def slow_sgd(parameters, lr, factor=0.5):
    return torch.optim.SGD(parameters, lr=lr * factor)


def test_a_function_of_the_parameters():
    assert made(lambda parameters: torch.optim.SGD(parameters, lr=3.0)).param_groups[0]["lr"] == 3
    assert made(slow_sgd, lr=2.0).param_groups[0]["lr"] == 1
    path = {"name": "tests.problems.test_optimisers:slow_sgd", "factor": 0.25}
    assert made(path, lr=2.0).param_groups[0]["lr"] == 0.5
    with pytest.raises(ProblemError, match=r"optimiser .*lambda.* returned None \(NoneType\)"):
        made(lambda parameters: None)


@pytest.mark.parametrize(
    ("given", "common", "error", "message"),
    [
        ("rmsprob", {}, ValueError, r"Did you mean 'rmsprop'\?"),
        ("lbfgs", {}, ValueError, "optimiser='lbfgs' is not known"),
        (
            {"name": "rmsprop", "alfa": 0.9},
            {},
            ValueError,
            r"RMSprop has no setting 'alfa'. It has: lr, alpha.*Did you mean 'alpha'",
        ),
        ({"name": "sgd", "params": []}, {}, ValueError, "no setting 'params'"),
        ("rmsprop", {"momentum": 0.5}, ValueError, r"momentum=0.5 is not used by optimiser RMSprop: it is for 'sgd', 'adam'"),
        ("rprop", {"weight_decay": 0.1}, ValueError, "weight_decay=0.1 is not used by optimiser Rprop"),
        (lambda parameters: None, {"lr": 0.1}, ValueError, r"lr=0.1 is not used by optimiser .*f\(parameters, lr\)"),
        (slow_sgd, {"weight_decay": 0.1}, ValueError, "weight_decay=0.1 is not used by optimiser slow_sgd"),
        (3, {}, TypeError, "optimiser=3 must be a name"),
    ],
)
def test_what_is_no_optimiser_is_refused_at_once(given, common, error, message):
    with pytest.raises(error, match=message):
        made(given, **common)
