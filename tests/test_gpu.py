"""On a card: the same training as on the CPU, through pinned memory, in 16 bits, and several workers on one card.

Skipped, with the reason, where there is no CUDA device. Used by pytest.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import labkit
from labkit.partition import UDPA
from labkit.problems.splits import batches
from labkit.training.worker.sampler import pass_order
from labkit.training.worker.worker import WeightBuffers

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cache")]
SEED = 5


@pytest.fixture(autouse=True)
def _exact():
    """Products in full float32, and kernels that give the same bits twice."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = before


def problem(model="lenet", **options):
    settings = {"batch_size": 16, "lr": 0.05, "train_samples": 400, "test_samples": 200, "score_samples": 60}
    return labkit.Classifier(model, "digits", **(settings | options))


def trained(lab, a_problem, folder, **options):
    settings = {"update": "sgwu", "partition": "udpa", "passes": 3, "seed": SEED, "runs": folder} | options
    run = labkit.train(a_problem, lab, **settings).wait(timeout=100)
    assert run.state == "done"
    return run


def on_a_card(lab):
    n = torch.cuda.device_count()
    assert [worker.device for worker in lab.workers] == [f"cuda:{index % n}" for index in range(len(lab.workers))]


def by_hand(a_problem, passes, device="cuda:0"):
    """The same training as a plain loop on the card."""
    module = a_problem.build(SEED).to(device)
    optimiser = torch.optim.SGD(module.parameters(), lr=a_problem.lr, momentum=a_problem.momentum)
    indices, partition = a_problem.train_indices(), UDPA()
    partition.start(len(indices), [0], seed=SEED)
    shard = partition.allocate([0])[0]
    for epoch in range(passes):
        for part in batches(pass_order(shard, SEED, 0, epoch), a_problem.batch_size):
            x, y = a_problem.load(indices[part], device=device)
            optimiser.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimiser.step()
    return {name: t.detach().cpu().numpy() for name, t in module.state_dict().items() if t.is_floating_point()}


@pytest.mark.parametrize("model", ["lenet", "resnet20"])
def test_one_worker_is_a_plain_loop_on_the_card(model, tmp_path):
    """Within rounding: the views of the flat vector may be given other kernels than tensors of their own."""
    a_problem = problem(model, lr=0.01)
    with labkit.connect("threads", 1) as lab:
        on_a_card(lab)
        weights = trained(lab, a_problem, tmp_path, passes=2).weights()
    for name, value in by_hand(a_problem, 2).items():
        np.testing.assert_allclose(weights[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("update", ["sgwu", "agwu", "allreduce"])
@pytest.mark.parametrize("kind", ["threads", pytest.param("dask", marks=pytest.mark.cluster)])
def test_workers_train_on_cards(kind, update, tmp_path):
    """With one card all workers share it, and an all-reduce falls back to gloo; with one each it takes NCCL."""
    with labkit.connect(kind, 2) as lab:
        on_a_card(lab)
        run = trained(lab, problem(), tmp_path, update=update, passes=6)
    assert set(run.events[run.events.kind == "push"].worker) == {0, 1}
    assert run.summary()["score"] > 0.5
    assert all("cuda:" in message for message in run.events[run.events.kind == "join"].message)


def test_all_reduce_on_one_card_is_that_on_the_cpu(tmp_path, monkeypatch):
    with labkit.connect("threads", 2) as lab:
        card = trained(lab, problem(lr=0.01), tmp_path / "card", update="allreduce", passes=1).weights()
    monkeypatch.setattr("labkit.cluster.backend.glob.glob", lambda pattern: [])  # as if there were no driver
    with labkit.connect("threads", 2) as lab:
        assert {worker.device for worker in lab.workers} == {"cpu"}
        plain = trained(lab, problem(lr=0.01), tmp_path / "cpu", update="allreduce", passes=1).weights()
    for name, value in plain.items():
        np.testing.assert_allclose(card[name], value, rtol=1e-2, atol=1e-3, err_msg=name)


def test_sgwu_of_two_workers_on_one_card_repeats(tmp_path):
    with labkit.connect("threads", 2) as lab:
        first, second = (trained(lab, problem(), tmp_path / name).flat() for name in "ab")
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("precision", "channels_last"), [("bfloat16", False), ("bfloat16", True), ("auto", False)])
def test_bfloat16_trains_float32_weights(precision, channels_last, tmp_path):
    if not torch.cuda.is_bf16_supported():
        pytest.skip(f"{torch.cuda.get_device_name()} has no bfloat16")
    with labkit.connect("threads", 1) as lab:
        score = trained(lab, problem(), tmp_path / "32", passes=6).summary()["score"]
        run = trained(lab, problem(precision=precision, channels_last=channels_last), tmp_path / "16", passes=6)
    assert len(run.events.precision.dropna()) == 1  # what was decided, or that no layer is wrong
    assert all(value.dtype == np.float32 for value in run.weights().values())
    assert abs(run.summary()["score"] - score) < 0.1


def test_weights_go_through_pinned_memory_both_ways(tmp_path, monkeypatch):
    seen, pack, unpack = [], WeightBuffers.pack, WeightBuffers.unpack

    def watched(method):
        def call(self, *args):
            result = method(self, *args)
            flat = self.replica.flat
            same = torch.equal(self.host, flat.cpu())  # what is sent or was received is what is on the card
            seen.append((method is pack, self.host.is_pinned(), flat.is_cuda, same))
            assert flat.data_ptr() == next(self.replica.module.parameters()).data_ptr()
            return result

        return call

    monkeypatch.setattr(WeightBuffers, "pack", watched(pack))
    monkeypatch.setattr(WeightBuffers, "unpack", watched(unpack))
    with labkit.connect("threads", 1) as lab:
        trained(lab, problem(), tmp_path)
    pushes = [what for what in seen if what[0]]
    assert len(pushes) == 3 and all(what[1:] == (True, True, True) for what in seen)


@pytest.mark.parametrize("model", ["lenet", "resnet20"])
@pytest.mark.parametrize("split", ["samples", "rows", "auto"])
def test_threads_of_a_worker_share_a_step(split, model, tmp_path):
    with labkit.connect("threads", 1) as lab:
        run = trained(lab, problem(model), tmp_path / "whole")
        shared = trained(lab, problem(model, inner=labkit.Inner(threads=2, split=split)), tmp_path / "shared")
    np.testing.assert_allclose(shared.flat(), run.flat(), rtol=1e-2, atol=1e-3)
