"""The process group of an all-reduce: gradients counted by samples, and an end that the others notice."""

from __future__ import annotations

import copy
import datetime
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import labkit
from labkit.errors import ProblemError
from labkit.problems import Classifier, Clock
from labkit.training.worker import allreduce
from labkit.training.worker.allreduce import Broken, ProcessGroup, backend
from labkit.training.worker.heartbeat import Heartbeat
from labkit.training.worker.sampler import steps
from tests.helpers import ended, problem, until
from tests.models.zoo import BY_BATCH, ZOO, Zoo
from tests.problems.test_problem import Gan, TinyGan

# -- groups between threads --------------------------------------------------------------------------------------------


def ranks(n, work, folder, limit=90, **how):
    """Run `work(group, rank)` in n threads, each with its own membership; returns results and errors by rank."""
    results, errors = [None] * n, [None] * n

    def run(rank):
        group = ProcessGroup(rank, range(n), 1, Heartbeat(), meeting=str(folder), one_process=True, **how)
        try:
            results[rank] = work(group, rank)
        except Exception as error:
            errors[rank] = str(error)
        finally:
            group.close()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(n)]
    [thread.start() for thread in threads]
    end = time.monotonic() + limit
    [thread.join(max(0.0, end - time.monotonic())) for thread in threads]
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return results, errors


def network():
    made = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in made.parameters():  # the ranks are threads: no seed of torch's generator would hold
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).sin().view(parameter.shape))
    return made


def loop(module, parts, x, y, begin=lambda step: None):
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for step, part in enumerate(parts):
        begin(step)
        optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(module(x[part]), y[part]).backward()
        optimiser.step()


@pytest.mark.parametrize("grants", [[20, 20], [31, 9], [40, 2, 11]])
def test_unequal_batches_give_the_gradient_of_the_joint_batch(grants, tmp_path):
    generator = np.random.default_rng(0)
    x = torch.from_numpy(generator.normal(size=(sum(grants), 5)).astype(np.float32))
    y = torch.from_numpy(generator.integers(0, 3, sum(grants)))
    shards = np.split(generator.permutation(sum(grants)), np.cumsum(grants)[:-1])
    plans = [steps(grants, rank, 4) for rank in range(len(grants))]
    parts = [np.split(shard, np.cumsum(plan[0])[:-1]) for shard, plan in zip(shards, plans, strict=True)]

    def work(group, rank):
        module = network()
        loop(group.wrap(module), parts[rank], x, y, lambda step: group.begin(plans[rank][1][step]))
        assert group.waited >= 0
        return nn.utils.parameters_to_vector(module.parameters()).detach()

    results, errors = ranks(len(grants), work, tmp_path)
    assert not any(errors), errors
    joint = network()
    loop(joint, [np.concatenate(step) for step in zip(*parts, strict=True)], x, y)
    expected = nn.utils.parameters_to_vector(joint.parameters()).detach()
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


class Normalised(nn.Module):
    """Normalisations of all kinds that torch has for batches, one of them a function, on (n, 5)."""

    def __init__(self):
        super().__init__()
        self.flat, self.image = nn.BatchNorm1d(5, affine=False, momentum=None), nn.BatchNorm2d(4, eps=1e-2)
        self.before, self.after, self.unrecorded = nn.Linear(5, 24), nn.Linear(24, 3), nn.BatchNorm1d(4, track_running_stats=False)
        self.register_buffer("mean", torch.zeros(24))
        self.register_buffer("variance", torch.ones(24))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.linspace(-1, 2, parameter.numel()).sin().view(parameter.shape))

    def forward(self, x):
        h = torch.tanh(self.before(self.flat(x)))
        h = self.unrecorded(self.image(h.view(-1, 4, 3, 2)).flatten(2)).flatten(1)
        return self.after(F.batch_norm(h, self.mean, self.variance, training=self.training, momentum=0.3))


@pytest.mark.parametrize("grants", [[20, 20], [40, 2, 11]])
def test_synchronised_batch_normalisation_is_that_of_the_joint_batch(grants, tmp_path):
    """With it the ranks are one worker: the same weights, and in evaluation mode the same network."""
    generator = np.random.default_rng(0)
    x = torch.from_numpy(generator.normal(size=(sum(grants), 5)).astype(np.float32) + 3)
    y = torch.from_numpy(generator.integers(0, 3, sum(grants)))
    shards = np.split(generator.permutation(sum(grants)), np.cumsum(grants)[:-1])
    plans = [steps(grants, rank, 4) for rank in range(len(grants))]
    parts = [np.split(shard, np.cumsum(plan[0])[:-1]) for shard, plan in zip(shards, plans, strict=True)]

    def work(group, rank):
        module, optimiser = Normalised(), None
        wrapped = group.wrap(module)
        optimiser = torch.optim.SGD(module.parameters(), lr=0.05)
        for step, part in enumerate(parts[rank]):
            group.begin(plans[rank][1][step])
            with group.stepping():
                optimiser.zero_grad()
                F.cross_entropy(wrapped(x[part]), y[part]).backward()
                optimiser.step()
            assert group.waited > 0
        return module.state_dict()

    results, errors = ranks(len(grants), work, tmp_path, sync_batchnorm=True)
    assert not any(errors), errors
    joint = Normalised()
    optimiser = torch.optim.SGD(joint.parameters(), lr=0.05)
    for step in zip(*parts, strict=True):
        part = np.concatenate(step)
        optimiser.zero_grad()
        F.cross_entropy(joint(x[part]), y[part]).backward()
        optimiser.step()
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)
        torch.testing.assert_close(result, dict(joint.state_dict()), rtol=1e-4, atol=1e-5)


def test_a_synchronised_normalisation_notices_a_rank_that_is_gone(tmp_path):
    def work(group, rank):
        module = group.wrap(Normalised())
        group.begin(0.5)
        if rank:
            return None
        with group.stepping():
            module(torch.randn(4, 5))

    _, (error, other) = ranks(2, work, tmp_path, sync_batchnorm=True)
    assert error and other is None


@pytest.mark.usefixtures("cache")
def test_an_inner_layer_has_no_synchronised_normalisation(tmp_path):
    split = problem(model="resnet20", inner=labkit.Inner(threads=2, split="samples"))
    with labkit.connect("threads", 2) as lab, pytest.raises(ProblemError, match=r"has an inner layer, .*sync_batchnorm"):
        labkit.train(split, lab, update=labkit.AllReduce(sync_batchnorm=True), passes=1, runs=tmp_path)


def pair():
    """Two networks in a container that holds something else beside them."""
    return nn.ModuleDict({"both": nn.ModuleList([network(), nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))])})


def in_turn(module, parts, x, begin=lambda step: None):
    """The steps of a GAN, whose critic is called three times and trained with the generator's loss under way."""
    generator, critic = module["both"]
    optimisers = [torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9) for part in (critic, generator)]
    for step, part in enumerate(parts):
        begin(step)
        fake, real = generator(x[part]), x[part, :3]
        for optimiser in optimisers:
            optimiser.zero_grad()
            loss = critic(fake.detach()) - critic(real) if optimiser is optimisers[0] else -critic(fake)
            F.softplus(loss).mean().backward()
            optimiser.step()


def test_networks_that_are_used_one_after_the_other_have_the_gradients_of_the_joint_batch(tmp_path):
    """In evaluation mode, where BatchNorm does not depend on the batch."""
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    plans = [steps([20, 10], rank, 4) for rank in range(2)]
    parts = [
        np.split(shard, np.cumsum(plan[0])[:-1]) for shard, plan in zip((np.arange(20), np.arange(20, 30)), plans, strict=True)
    ]
    made = pair().eval()

    def work(group, rank):
        module = copy.deepcopy(made)
        wrapped = group.wrap(module, list(module["both"]))
        assert isinstance(wrapped, nn.ModuleDict) and isinstance(wrapped["both"], nn.ModuleList) and wrapped is not module
        in_turn(wrapped, parts[rank], x, lambda step: group.begin(plans[rank][1][step]))
        assert set(module.state_dict()) == set(made.state_dict())  # the replica's own is as it was
        return nn.utils.parameters_to_vector(module.parameters()).detach()

    results, errors = ranks(2, work, tmp_path)
    assert not any(errors), errors
    joint = copy.deepcopy(made)
    in_turn(joint, [np.concatenate(step) for step in zip(*parts, strict=True)], x)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.testing.assert_close(results[0], nn.utils.parameters_to_vector(joint.parameters()).detach(), rtol=1e-5, atol=1e-5)


def test_ranks_with_batches_in_other_numbers_of_parts_meet_once_a_step_in_each_network(cache, tmp_path):
    x = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    options = {"clip_norm": 0.1, "lr": 0.5, "batch_size": 8}
    joint, parted = (Classifier(network, (x, np.arange(60) % 3), accumulate=n, **options) for n in (1, 4))
    shards, clock = np.split(joint.train_indices()[:12], [8]), Clock(0, 1, 0.0)

    def work(group, rank):
        module = network()
        wrapped, optimisers = group.wrap(module, [module[0], module[2]]), parted.optimisers(module)
        for _ in range(2):
            group.begin(len(shards[rank]) / 12)
            with group.exchanging():
                parted.step(wrapped, parted.load(shards[rank]), optimisers, clock)
        return nn.utils.parameters_to_vector(module.parameters()).detach()

    results, errors = ranks(2, work, tmp_path)
    assert not any(errors), errors
    module = network()
    optimisers = joint.optimisers(module)
    for _ in range(2):
        joint.step(module, joint.load(np.concatenate(shards)), optimisers, clock)
    expected = nn.utils.parameters_to_vector(module.parameters()).detach()
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slow", [0, 1])
def test_waiting_for_a_slow_rank_is_measured(slow, tmp_path):
    """All of it, also with running statistics in the module: what is left is the rank's own speed."""
    x, y, waits = torch.randn(8, 5), torch.arange(8) % 3, {}

    def work(group, rank):
        module = group.wrap(nn.Sequential(nn.BatchNorm1d(5), network()))
        for _ in range(4):  # DDP meets once more at the beginning of its second step
            if rank == slow:
                time.sleep(0.5)
            group.begin(0.5)
            F.cross_entropy(module(x), y).backward()
            waits[rank] = group.waited

    _, errors = ranks(2, work, tmp_path)
    assert not any(errors) and waits[1 - slow] > 0.4 and waits[slow] < 0.7 * waits[1 - slow]


def test_ranks_in_threads_leave_nothing_that_is_compiled_later_to_torch(tmp_path):
    """torch has one active module for all threads; of two that cross each other the first is left behind."""
    first, second, left = threading.Event(), threading.Event(), threading.Event()

    def work(group, rank):
        module = group.wrap(network())
        if rank == 1:
            assert first.wait(60)
        with module._inside_ddp_forward():
            (second if rank else first).set()
            assert (left if rank else second).wait(60)
        left.set()

    _, errors = ranks(2, work, tmp_path)
    assert not any(errors) and DistributedDataParallel._active_ddp_module is None


def test_nccl_needs_a_card_for_each_rank():
    assert backend([("a", "cuda:0"), ("a", "cuda:1"), ("b", "cuda:0")]) == "nccl"
    assert backend([("a", "cuda:0"), ("a", "cuda:1"), ("a", "cuda:0")]) == "gloo"  # a newcomer shares a card
    assert backend([("a", "cuda:0"), ("b", "cpu")]) == backend([("a", "cpu"), ("b", "cpu")]) == "gloo"


def test_when_a_rank_is_gone_the_others_notice_and_nothing_is_left(tmp_path):
    """Many times: the end of a group must neither hang nor bring the process down, whichever thread is the last to know it."""
    x, y, counts = torch.randn(8, 5), torch.arange(8) % 3, []

    def work(group, rank):
        module = group.wrap(network())
        for step in range(1000):
            if rank == 1 and step == 3:
                raise ValueError("gone")
            group.begin(0.5)
            F.cross_entropy(module(x), y).backward()

    for number in range(10):
        folder = tmp_path / str(number)
        folder.mkdir()
        begun = time.monotonic()
        _, errors = ranks(2, work, folder)
        assert errors[1] == "gone" and errors[0] and time.monotonic() - begun < 40  # TIMEOUT is a minute
        counts.append(psutil.Process().num_threads())
    until(lambda: psutil.Process().num_threads() <= counts[1] + 1)


@pytest.mark.parametrize("when", ["before the step", "in the step"])
def test_a_rank_leaves_at_once_when_a_frozen_one_is_gone(when, tmp_path):
    x, y, left, took = torch.randn(8, 5), torch.arange(8) % 3, threading.Event(), []
    before = psutil.Process().num_threads()

    def work(group, rank):
        module = group.wrap(network())
        for step in range(4):
            if step == 3 and rank == 1:  # frozen: it neither takes part nor closes the group
                assert left.wait(60)
                return
            if step == 3:
                begun = time.monotonic()
                threading.Timer(0.0 if when == "before the step" else 0.5, group.heartbeat.on_interrupt).start()
                time.sleep(0.2 if when == "before the step" else 0.0)
            try:
                with group.exchanging():
                    group.begin(0.5)
                    F.cross_entropy(module(x), y).backward()
            except Broken:
                module = None
                group.close()
                took.append(time.monotonic() - begun)
                left.set()
                raise

    _, errors = ranks(2, work, tmp_path)
    assert errors == ["the server says that a worker is gone", None] and took[0] < 40
    until(lambda: psutil.Process().num_threads() <= before + 1)  # a group has three: it goes when the other rank has let it end


RANK = """
import sys
from labkit.training.worker.allreduce import ProcessGroup
from labkit.training.worker.heartbeat import Heartbeat
print("here", flush=True)
group = ProcessGroup(1, [0, 1], 2, Heartbeat(), meeting=sys.argv[1])
sys.stdin.read()  # who leaves while the other still connects breaks the group
group.close()
"""


@pytest.mark.slow
def test_a_rank_whose_group_was_never_formed_finds_the_others_in_the_next_one(tmp_path, monkeypatch):
    folder = str(tmp_path / "ranks")
    with monkeypatch.context() as short:
        short.setattr(allreduce, "TIMEOUT", datetime.timedelta(seconds=1))
        dist.FileStore(f"{folder}-1-here", 2).set("1", f"{socket.gethostname()} cpu False")  # and then it is gone
        with pytest.raises(Broken, match="could not be formed"):
            ProcessGroup(0, [0, 1], 1, Heartbeat(), meeting=folder)
    with subprocess.Popen([sys.executable, "-c", RANK, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"here\n"
        begun = time.monotonic()
        group = ProcessGroup(0, [0, 1], 2, Heartbeat(), meeting=folder)
        assert time.monotonic() - begun < 30
        other.communicate()
        group.close()
    assert other.returncode == 0


@pytest.mark.parametrize("one_process", [True, False])
def test_a_rank_that_is_gone_while_the_group_is_formed_holds_nobody(one_process, tmp_path, monkeypatch):
    monkeypatch.setattr(allreduce, "TIMEOUT", datetime.timedelta(seconds=1))  # after which the thread that waits for it ends
    folder, heartbeat, before = str(tmp_path / "ranks"), Heartbeat(), set(threading.enumerate())
    here = dist.FileStore(f"{folder}-1-here", 2)
    here.set("1", f"{socket.gethostname()} cpu False")  # and then it is gone
    heartbeat.interrupt = {"op": "regroup", "group": 1}
    with pytest.raises(Broken, match=allreduce.GONE):
        ProcessGroup(0, [0, 1], 1, heartbeat, meeting=folder, one_process=one_process)
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive()


# -- problems that fit -------------------------------------------------------------------------------------------------


class Sly(TinyGan):
    """Reaches through the wrapper, so that its gradients would never be averaged."""

    def step(self, module, batch, optimisers, clock):
        return super().step(getattr(module, "module", module), batch, optimisers, clock)


class InTurn(TinyGan):
    """Calls the module as a whole, but one loss leaves the other network out."""

    def build(self, seed):
        class Both(nn.Module):
            def __init__(self, networks):
                super().__init__()
                self.networks = networks

            def forward(self, x, part):
                return self.networks[part](x)

        return Both(super().build(seed))

    def optimisers(self, module):
        return super().optimisers(module.networks)

    def step(self, module, batch, optimisers, clock):
        for optimiser, part, x in zip(optimisers, ("generator", "critic"), (torch.ones(2, 2), batch[0].flatten(1)), strict=True):
            optimiser.zero_grad()
            loss = module(x, part).mean()
            loss.backward()
            optimiser.step()
        return {"loss": loss.detach()}


class TwoRates(Classifier):
    """Two optimisers, but one module that is called as one."""

    def optimisers(self, module):
        last, *others = reversed(list(module.parameters()))
        return torch.optim.SGD(others, lr=0.1), torch.optim.SGD([last], lr=0.01)

    def step(self, module, batch, optimisers, clock):
        for optimiser in optimisers:
            optimiser.zero_grad()
        loss = F.cross_entropy(module(batch[0]), batch[1])
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
        return {"loss": loss.detach()}


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (TinyGan, "'DistributedDataParallel' object is not subscriptable"),
        (Sly, r"its step\(\) never calls the module"),
        (InTurn, "Expected to have finished reduction"),
    ],
)
def test_networks_that_are_used_one_after_the_other_are_refused(kind, reason):
    before = torch.get_rng_state()
    with pytest.raises(ProblemError, match=rf"problem {kind.__name__} cannot be trained with .*{reason}.*'sgwu', 'agwu'"):
        allreduce.check_problem(kind("digits"), 0)
    assert torch.equal(before, torch.get_rng_state())


class Forgetful(Gan):
    def networks(self, module):
        return (module["critic"],)


class Twice(Gan):
    def networks(self, module):
        return (module, module["critic"])


class Stranger(Gan):
    def networks(self, module):
        return (nn.Linear(2, 2),)


class Reaching(Gan):
    """Calls one of its two networks behind the wrapper."""

    def step(self, module, batch, optimisers, clock):
        critic = module["critic"]
        return super().step(
            {"generator": module["generator"], "critic": getattr(critic, "module", critic)}, batch, optimisers, clock
        )


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Forgetful, r"has parameter 'generator.weight' in no network, so that its gradients would not be averaged"),
        (Twice, r"has parameter 'critic.weight' in 2 networks"),
        (Stranger, "returned a Linear that is no part of the module"),
        (Reaching, r"its step\(\) never calls network 1 of networks\(\)"),
    ],
)
def test_networks_that_cannot_be_wrapped_are_refused_by_name(kind, reason):
    with pytest.raises(ProblemError, match=rf"problem {kind.__name__}.*{reason}"):
        allreduce.check_problem(kind("digits"), 0)


@pytest.mark.usefixtures("cache")
def test_a_module_that_is_called_as_one_is_not_refused():
    allreduce.check_problem(Classifier("resnet20", "digits", precision="bfloat16", channels_last=True), 0)
    allreduce.check_problem(TwoRates("lenet", "digits"), 0)


class Partly(nn.Module):
    """An auxiliary layer that takes part in no loss, and a head that takes part in those of every other step."""

    def __init__(self, alternating):
        super().__init__()
        self.body, self.head, self.other = nn.Linear(36, 5), nn.Linear(5, 3), nn.Linear(5, 3)
        self.auxiliary = None if alternating else nn.Linear(5, 2)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        h = self.body(x.flatten(1)).relu()
        self.calls += self.training
        return self.other(h) if self.auxiliary is None and self.training and self.calls % 2 else self.head(h)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("alternating", [False, True])
def test_parameters_without_a_gradient_are_trained_around(alternating, tmp_path):
    """Known from the start, and found out in the middle: the group is formed again, and the pass is made again."""
    a_problem = problem(lambda: Partly(alternating))
    with labkit.connect("threads", 2) as lab:
        run = ended(labkit.train(a_problem, lab, update="allreduce", partition="udpa", passes=2, runs=tmp_path))
    first, last = run.weights(0), run.weights()
    moved = {name for name in first if not np.array_equal(first[name], last[name])}
    assert {"body.weight", "head.weight"} <= moved and ("other.weight" in moved) == alternating
    assert not any(name.startswith("auxiliary") for name in moved)


@pytest.mark.usefixtures("cache")
def test_buffers_of_any_type_are_no_hindrance():
    allreduce.check_problem(problem(Zoo, train_samples=32, model_args={"but": BY_BATCH}), 0)


@pytest.mark.usefixtures("cache")
def test_parameters_that_the_samples_of_a_rank_change_are_refused_by_name():
    named = ["'shift', 'rate'", "'net.1.bias'", "'net.1.weight'", "'table.weight'"]
    for kind, names in zip(BY_BATCH, named, strict=True):
        with pytest.raises(ProblemError, match=rf"model {kind} cannot be trained with .*: {names} change by the samples .*'sgwu'"):
            allreduce.check_problem(problem(ZOO[kind], train_samples=32), 0)

    class Noisy(Partly):
        def forward(self, x):
            self.head.weight.data += 0.01 * torch.randn(3, 5)
            return super().forward(x)

    with pytest.raises(ProblemError, match=r": 'head.weight' change by the samples of a batch, or at random"):
        allreduce.check_problem(problem(lambda: Noisy(False)), 0)
