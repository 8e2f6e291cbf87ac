"""labkit.models itself: how a model is made from a name, an import path or a function; seeds and the mode of evaluation."""

from __future__ import annotations

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from labkit import models
from labkit.errors import ProblemError
from labkit.models import check_model, drawing, evaluating, make_model, seeded


def test_seeded_is_deterministic_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    draws = []
    for seed in (3, 3, 4):
        with seeded(seed), seeded(seed):
            draws.append(torch.rand(5))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_built_from_a_seed_is_the_same_while_other_threads_train_with_dropout():
    begun, over, dropout = threading.Event(), threading.Event(), nn.Dropout()

    def train():
        while not over.is_set():
            with drawing(), seeded(1):  # within a step nothing is waited for
                pass
            with drawing():
                dropout(torch.ones(2000))
            begun.set()

    def build():
        with seeded(0, alone=True), seeded(0, alone=True):
            return torch.stack([nn.Linear(300, 300).weight.detach() for _ in range(20)])

    expected, threads = build(), [threading.Thread(target=train) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        assert begun.wait(90)
        assert all(torch.equal(build(), expected) for _ in range(10))
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert not models._drawing and not models._building


def test_a_step_that_waits_for_that_of_another_worker_holds_a_build_up_for_a_while_only(monkeypatch):
    monkeypatch.setattr(models, "WAIT_S", 0.05)
    begun, built, ended = threading.Event(), threading.Event(), threading.Event()

    def step():
        with drawing():
            begun.set()
            ended.set() if built.wait(90) else None

    thread = threading.Thread(target=step)
    thread.start()
    assert begun.wait(90)
    with seeded(0, alone=True):
        built.set()
    thread.join()
    assert ended.is_set()


def test_what_one_thread_has_evaluated_another_one_still_evaluates_without_dropout():
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.9), nn.BatchNorm1d(3))
    net[0].eval()
    before, evaluates, leaves = copy.deepcopy(net.state_dict()), threading.Barrier(2), threading.Event()

    def other():
        with evaluating(net):
            evaluates.wait(20)
            assert leaves.wait(20)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(other)
        evaluates.wait(20)
        try:
            with evaluating(net) as plain:
                leaves.set()
                first.result(20)
                x = torch.ones(4, 3)
                assert torch.equal(plain(x), plain(x)) and not any(part.training for part in net.modules())
                with evaluating(net[1]):
                    pass
                assert not net[1].training
        finally:
            leaves.set()
    assert [part.training for part in net.modules()] == [True, False, True, True]
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items()), "statistics were moved"
    assert not models._evaluated


def test_evaluating_restores_after_an_error():
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(RuntimeError), evaluating(module):
        assert not module.training and not torch.is_grad_enabled()
        raise RuntimeError("stop")
    assert module.training and torch.is_grad_enabled()


def two(shape, n_classes, hidden=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), hidden), nn.Linear(hidden, n_classes))


def test_a_model_is_called_by_its_required_positional_parameters():
    assert make_model(two, (1, 3, 3), 2, {}, 0)[1].out_features == 4
    assert make_model(two, (1, 3, 3), 2, {"hidden": 5}, 0)[1].out_features == 5
    assert make_model(lambda: nn.Linear(2, 3), (9,), 7, {}, 0).out_features == 3
    assert make_model(lambda width: nn.Linear(2, width), (9,), 7, {"width": 6}, 0).out_features == 6
    assert make_model(nn.Linear, (9,), 7, {"in_features": 2, "out_features": 3}, 0).in_features == 2
    assert make_model("labkit.models.cnn:lenet", (1, 8, 8), 7, {}, 0).dense2.out_features == 7


def test_the_same_seed_gives_the_same_weights():
    nets = [make_model("lenet", (1, 8, 8), 3, {"width": 0.25}, seed) for seed in (0, 0, 1)]
    weights = [nn.utils.parameters_to_vector(net.parameters()) for net in nets]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (lambda a: nn.Linear(2, 2), {}, r"needs 1 positional argument\(s\): a\. .* f\(shape, n_outputs\)"),
        (lambda a, b, c: nn.Linear(2, 2), {}, r"needs 3 positional argument\(s\): a, b, c"),
        ("lenet", {"widht": 2}, r"model 'lenet': model_args='widht' is not known. Known: width, piece. Did you mean 'width'"),
        (lambda: {"net": 1}, {}, r"returned \{'net': 1\} \(dict\), not a torch.nn.Module"),
        (nn.ReLU, {}, "model ReLU has no parameter to train"),
        ("labkit.models.cnn:lenett", {}, r"has no 'lenett'. Did you mean 'lenet'\?"),
        ("no_such_module_here:f", {}, "no module 'no_such_module_here' can be imported .* PYTHONPATH"),
    ],
)
def test_a_model_that_cannot_be_made_says_why(model, arguments, message):
    with pytest.raises(ProblemError, match=message):
        make_model(model, (1, 8, 8), 10, arguments, 0)


def test_what_is_no_model_is_refused_at_once():
    with pytest.raises(ValueError, match=r"model='lennet' is not known. Known: lenet, .* Did you mean 'lenet'\?"):
        check_model("lennet")
    with pytest.raises(TypeError, match="not 17"):
        check_model(17)
    check_model("somewhere:make")  # looked up where it is used
