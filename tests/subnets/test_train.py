"""Subnets: one subdomain is plain training, no worker matters, nothing is lost, and what is saved comes back."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

import labkit
from labkit import chaos
from labkit.errors import ClusterError, LabError, ProblemError
from labkit.models.costs import n_parameters
from labkit.problems.splits import folds
from labkit.runs import checkpoints
from labkit.subnets import train as subnets
from labkit.subnets.decomposition import Decomposition
from labkit.subnets.problem import Subnet, subnet_seed
from labkit.subnets.result import BASELINES
from labkit.training.local import fit, outputs
from tests.subnets.helpers import SEED, data, net, parts_of, problem, same, weights

pytestmark = pytest.mark.usefixtures("cache")
LENGTH = subnets.LENGTH


def stiff(shape, n_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), n_classes))


def convolved(shape, n_classes, width=1.0):
    return nn.Sequential(nn.Conv2d(shape[0], n_classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def leftover(shape, n_classes, width=1.0):
    class Leftover(nn.Conv2d):
        def __init__(self):
            super().__init__(shape[0], n_classes, 3)
            self.auxiliary = nn.Linear(2, n_classes)

        def forward(self, x):
            return super().forward(x).mean((2, 3))

    return Leftover()


# -- what must hold ----------------------------------------------------------------------------------------------------


def test_one_subdomain_is_plain_training_bit_for_bit(train, lab, tmp_path):
    a_problem = problem("lenet", model_args={"width": 0.25})
    joined = train(a_problem, (1, 1), stacking="same-split")
    plain = {"update": "sgwu", "partition": "udpa", "passes": 3, "seed": SEED, "workers": [0]}
    run = labkit.train(a_problem, lab, **plain, name="plain", runs=tmp_path).wait(60)
    alone = {name: value.numpy() for name, value in joined.module.subnets[0].state_dict().items()}
    assert same(alone, run.weights())


def test_numbers_of_numpy_will_do(train):
    wide = {"seed": np.int64(SEED), "batched": np.int32(2), "epochs": np.int64(2), "hidden": np.array([8])}
    assert same(weights(train(**wide)), weights(train(batched=2, epochs=2, hidden=[8])))


def test_workers_and_their_number_do_not_matter_and_the_seed_does(train):
    first, second = train(baselines=["transfer"]), train(workers=[1])
    assert same(weights(first), weights(second)) and set(second.parts().worker) == {1}
    assert not same(weights(first), weights(train(seed=SEED + 1)))
    states = [net.state_dict()["3.weight"] for net in first.module.subnets]
    assert not any(torch.equal(a, b) for i, a in enumerate(states) for b in states[:i])
    assert subnet_seed(SEED, 0) == SEED and len({subnet_seed(SEED, part) for part in range(64)}) == 64


def test_the_coarse_network_learns_from_what_the_subnets_have_not_seen():
    a_problem = problem()
    everything = sorted(a_problem.train_indices())
    part = parts_of(a_problem, "held-out")[3]
    fitted, stack = part.train_indices(), part.stack_indices()
    assert sorted([*fitted, *stack]) == everything and 0.15 < len(stack) / len(everything) < 0.25
    assert set(a_problem.labels(stack)) == {0, 1, 2} and not set(everything) & set(a_problem.score_indices())
    first = parts_of(a_problem, "held-out")[0]
    assert np.array_equal(first.train_indices(), fitted) and np.array_equal(first.stack_indices(), stack)  # the same for all
    for way in ("same-split", "out-of-fold"):
        assert np.array_equal(parts_of(a_problem, way)[3].train_indices(), a_problem.train_indices())
    assert np.array_equal(parts_of(a_problem, "same-split")[3].stack_indices(), a_problem.train_indices())


@pytest.mark.parametrize("way", [pytest.param({}, marks=pytest.mark.slow), {"batched": 3}])
def test_out_of_fold_each_sample_is_judged_by_a_copy_that_has_not_seen_it(way, train, tmp_path):
    """Copies train on two thirds; the subnet itself on all, as with the same split; the outputs of the copies are stacked."""
    a_problem = problem()
    joined, plain = train(a_problem, stacking="out-of-fold", **way), train(a_problem, stacking="same-split", name="plain", **way)
    for own, other in zip(joined.module.subnets.parameters(), plain.module.subnets.parameters(), strict=True):
        torch.testing.assert_close(own, other)
    everything = a_problem.train_indices()
    of = folds(a_problem.labels(everything), 3)
    part = Subnet.of(a_problem, joined.decomposition, 2, stacking="out-of-fold")
    copies = part.copies()
    assert sorted(np.concatenate([copy.stack_indices() for copy in copies])) == sorted(everything)
    assert all(not set(copy.stack_indices()) & set(copy.train_indices()) for copy in copies) and not len(part.stack_indices())
    module = part.build(subnet_seed(SEED, 2))
    fit(part, module, everything[of != 1], part.score_indices(), epochs=3, patience=None, seed=subnet_seed(SEED, 2))
    stored = checkpoints.read_state(tmp_path / "joined" / "parts", copies[1].number)[1]["outputs"]["stack"]
    np.testing.assert_allclose(stored, outputs(part, module, everything[of == 1]), rtol=1e-4, atol=1e-5)
    assert (joined.parts().folds_s > 0).all() and (plain.parts().folds_s == 0).all()
    held_out = train(name="held-out", **way)
    sent = {each.config["stacking"]: each.summary()["bytes_to_coarse"] for each in (joined, plain, held_out)}
    fitted = parts_of(a_problem, "held-out")[0].train_indices()
    assert sent["same-split"] - sent["held-out"] == len(fitted) * 4 * 3 * 4  # samples x subdomains x classes x float32
    assert sent["out-of-fold"] == sent["same-split"]


def test_the_longest_subnets_start_first(train, lab, monkeypatch):
    seen, spread = [], type(lab).map
    monkeypatch.setattr(
        type(lab), "map", lambda self, fn, items, *rest, **more: spread(self, fn, seen.extend(items) or items, *rest, **more)
    )
    joined = train(problem(data=data(shape=(1, 12, 12))), Decomposition((3, 3), 1, border="cut"))
    costs = joined.parts().multiply_adds
    order = [costs[job.problem.part] for (job,) in seen]
    assert order == sorted(order, reverse=True) and len(set(order)) == 3 and seen[0][0].problem.part == 4
    assert list(joined.parts().index) == list(range(9))


def test_all_is_in_one_table_and_the_time_goes_by_the_rule_of_the_paper(train):
    joined = train(baselines=["global", "small", "long", "coherent", "transfer"], epochs=2)
    table, parts, summary = joined.table(), joined.parts(), joined.summary()
    assert list(table.index[:3]) == ["CNN-DNN", "average probability", "majority vote"]
    assert list(table.index[3:]) == [BASELINES[name] for name in ("global", "small", "long", "coherent", "transfer")]
    assert table.accuracy.between(0, 1).all() and (table.seconds > 0).all()
    assert list(table.epochs) == [2] * 5 + [4, 2, 4]  # "long" trains twice as long, and "transfer" in two stages
    assert table.seconds["majority vote"] == parts.seconds.max() <= table.seconds["CNN-DNN"] == summary["t_par"]
    assert table.seconds["transfer, from the parts"] > summary["t_par"]  # what came before it counts
    assert summary["speedup"] == table.seconds["global CNN"] / summary["t_par"] and summary["bytes_between_subnets"] == 0
    assert summary["bytes_to_coarse"] % (4 * 3 * 4) == 0 and 0 < summary["busy"] < 1.1
    coherent = table.loc["coherent, from random weights"]
    assert (table.loc["CNN-DNN", ["parameters", "multiply_adds"]] == coherent[["parameters", "multiply_adds"]]).all()
    assert table.parameters["CNN-DNN"] == n_parameters(joined.module) > parts.parameters.sum()
    assert table.parameters["small global CNN"] < table.parameters["global CNN"]


def test_volumes_are_cut_too(train):
    volumes = problem("lenet", data=data(n=60, shape=(1, 8, 8, 8)), model_args={"width": 0.1})
    joined = train(volumes, Decomposition((2, 1, 2), 1), epochs=1)
    assert joined.module.subnets[3].conv1.weight.dim() == 5 and joined.parts().place[3] == [1, 0, 1]
    assert joined.predict(volumes.dataset.raw(np.arange(3), "test")).shape == (3,)


# -- blocks of workers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stacking", ["held-out", pytest.param("same-split", marks=pytest.mark.slow)])
def test_a_block_of_one_is_a_worker_alone_bit_for_bit(stacking, train, tmp_path):
    a_problem, options = problem("lenet", model_args={"width": 0.25}, schedule="cosine"), {"workers": [0], "stacking": stacking}
    team = {"n_workers": 1, "partition": "udpa", "update": "sgwu"}
    alone, together = train(a_problem, (1, 2), **options), train(a_problem, (1, 2), team=team, **options)
    assert same(weights(alone), weights(together)) and alone.table().accuracy.equals(together.table().accuracy)
    columns = ["accuracy", "parameters", "epochs", "best", "loss", "score", "multiply_adds", "place"]
    assert alone.parts()[columns].equals(together.parts()[columns])
    run = labkit.load_run(tmp_path / "joined" / "parts" / "joined-part-1")
    assert run.config["problem"]["stacking"] == stacking and run.config["n_train"] == len(run.problem().train_indices())
    assert same(run.weights(), {name: value.numpy() for name, value in together.module.subnets[1].state_dict().items()})


@pytest.mark.slow
def test_blocks_train_with_any_partition_and_update(train, lab, tmp_path, monkeypatch):
    monkeypatch.setattr(subnets, "LENGTH", LENGTH)  # the accuracy counts here
    a_problem, team = problem(data=data(600)), {"partition": "idpa", "update": "agwu", "local_steps": 4}
    joined = train(a_problem, (1, 2), epochs=8, team=team, baselines=["transfer"])
    parts, summary = joined.parts(), joined.summary()
    assert list(parts.index) == [0, 1] and set(parts.worker) == {"0, 1"} and (parts.epochs == 8).all()
    assert parts.score.between(0.5, 1).all() and summary["accuracy"] > 0.6  # of three classes
    assert joined.config["team"]["n_workers"] == 2 and 0 < summary["busy"] < 1.1 and lab.free() == [0, 1]
    for part in range(2):
        run = labkit.load_run(tmp_path / "joined" / "parts" / f"joined-part-{part}")
        assert run.state == "done" and run.summary()["n_workers"] == 2 and set(run.events.worker.dropna()) == {0, 1}
        assert run.summary()["samples"] == 8 * len(parts_of(a_problem, "held-out")[0].train_indices())
    again, images = labkit.load_subnets(tmp_path / "joined"), a_problem.dataset.raw(a_problem.test_indices(), "test")
    assert np.array_equal(again.scores(images), joined.scores(images)) and again.parts().equals(joined.parts())


def test_an_interrupt_stops_the_blocks(train, lab, tmp_path, monkeypatch):
    launch = subnets.launch

    def launch_once(*arguments, **options):
        if (tmp_path / "joined" / "parts" / "joined-part-0").exists():
            raise KeyboardInterrupt
        return launch(*arguments, **options)

    monkeypatch.setattr(subnets, "launch", launch_once)
    with pytest.raises(KeyboardInterrupt):
        train(epochs=10_000, team={"n_workers": 1})
    assert labkit.load_run(tmp_path / "joined" / "parts" / "joined-part-0").state == "stopped"
    assert not lab.runs and lab.free() == [0, 1]


def test_blocks_that_take_too_long_are_stopped(train, lab, tmp_path):
    with pytest.raises(ClusterError, match=r"4 of 4 runs were not done within 2 s; they were stopped"):
        train(epochs=10_000, team={}, timeout=2)
    assert labkit.load_run(tmp_path / "joined" / "parts" / "joined-part-0").state == "stopped" and not lab.runs


def test_why_a_block_failed_is_in_the_error(train, lab):
    with pytest.raises(LabError, match=r"run joined-part-\d failed: .* its weights hold NaN or infinity. Lower the learning rate"):
        train(problem(lr=1e30), team={}, epochs=5)
    assert not lab.runs and lab.free() == [0, 1]


def test_a_training_that_diverges_is_an_error(train):
    with pytest.raises(ProblemError, match=r"part \d of Decomposition.*: the loss is (nan|inf) after epoch .* Give a smaller lr"):
        train(problem("lenet", lr=1e6), (1, 2))


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grid": (9, 1)}, ProblemError, "9 subdomains along axis 0, which has 8 pixels"),
        ({"grid": (2, 2, 2)}, ProblemError, r"cuts volumes \(C, D, H, W\), and the data have shape \(1, 8, 8\)"),
        ({"width_rule": "sqr"}, ValueError, r"width_rule='sqr' is not known. Known: sqrt, linear, same. Did you mean 'sqrt'\?"),
        ({"stacking": "out"}, ValueError, "stacking='out' is not known. Known: held-out, out-of-fold, same-split"),
        ({"inputs": "votes"}, ValueError, "Known: probabilities, logits, features"),
        ({"baselines": ["globl"]}, ValueError, "Did you mean 'global'"),
        ({"epochs": 0}, ValueError, "epochs=0 must be at least 1"),
        ({"patience": 0}, ValueError, "patience=0"),
        ({"dropout": 1.0}, ValueError, "dropout=1 must be"),
        ({"hidden": [0]}, ValueError, "hidden=0"),
        ({"hidden": 8}, TypeError, "hidden=8 must be a list"),
        ({"baselines": "transfer"}, TypeError, "baselines='transfer' must be a list"),
        ({"seed": -1}, ValueError, "seed=-1 must be"),
        ({"seed": 2.5}, ValueError, "seed=2.5 must be"),
        ({"seed": "a"}, ValueError, "seed='a' must be"),
        ({"timeout": None}, TypeError, "timeout=None must be a number"),
        ({"timeout": 0}, ValueError, "timeout=0 must be above 0"),
        ({"team": {"workers": 2}}, ValueError, r"team='workers' is not known. Known: n_workers, .* Did you mean 'n_workers'\?"),
        ({"team": {"n_workers": 3}}, ClusterError, r"a team of 3 workers was asked for, and there are 2: \[0, 1\]"),
        ({"team": {"n_workers": 0}}, ValueError, "team n_workers=0 must be at least 1"),
        ({"team": {"update": "agvu"}}, ValueError, "Did you mean 'agwu'"),
        ({"team": {"local_steps": 0.5}}, TypeError, "team local_steps=0.5 must be a whole number"),
        ({"team": {}, "batched": 2}, ValueError, "batched=2: a subnet has several workers, or a worker several subnets"),
        ({"batched": 0}, ValueError, "batched=0 must be at least 1"),
        ({"team": {}, "patience": 2}, ValueError, "patience=2: what a team trains is not stopped early"),
    ],
)
def test_senseless_requests_start_nothing(change, error, message, train, tmp_path):
    with pytest.raises(error, match=message):
        train(**change)
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_an_error_that_names_it(train, tmp_path):
    with pytest.raises(
        ProblemError, match=r"part 0 of Decomposition\(\(2, 2\), overlap=0\): vgg9 does not fit .* layer pool3 would"
    ):
        train(problem("vgg9"))
    with pytest.raises(ProblemError, match=r"part 0 .* needs a keyword `width`, or width_rule='same'"):
        train(problem(stiff))
    with pytest.raises(ProblemError, match=r'no dense layer .* Give inputs="logits"'):
        train(problem(convolved), inputs="features")
    with pytest.raises(ProblemError, match=r"classes \[2\] of 4 have no sample among"):
        x, y = data(n_classes=4)
        train(problem(data=(x[y != 2], y[y != 2], x, y)))
    for wrong in ((x, np.eye(4, dtype=int)[y]), {"a": x, "b": x, "y": y}):
        with pytest.raises(ProblemError, match="subnets are of one input and of one label a sample; data 'arrays' have "):
            train(problem(data=wrong, loss="bce-with-logits"))
    with pytest.raises(ProblemError, match=r"the last dense layer .* is not used .* Give inputs=.logits"):
        train(problem(leftover), inputs="features")
    y[:], y[:1] = y % 2, 2  # one sample: the copy that is to judge it cannot know its class
    with pytest.raises(ProblemError, match=r"classes \[2\] of 3 have no sample .* with stacking='out-of-fold'"):
        train(problem(data=(x, y, x, y)), stacking="out-of-fold")
    with pytest.raises(TypeError, match=r"problem is a Subnet; subnets are made of a labkit.Classifier"):
        train(Subnet(net, data(), decomposition=Decomposition((2, 2)), part=0))
    assert not list(tmp_path.iterdir())
    assert train(problem(stiff), width_rule="same").summary()["n_parts"] == 4
    with pytest.raises(ValueError, match=r"part=4 is not known. Known: 0, 1, 2, 3"):
        Subnet(net, data(), decomposition=Decomposition((2, 2)), part=4)


# -- workers that die --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_the_subnets_of_a_killed_worker_are_trained_again_and_none_is_lost_or_counted_twice(tmp_path):
    a_problem = labkit.Classifier("lenet", "digits", batch_size=16, lr=0.02, train_samples=640)
    options = {"decomposition": Decomposition((2, 4), 1), "epochs": 3, "seed": SEED, "runs": tmp_path, "progress": False}
    with labkit.connect("dask", 2) as lab:
        quiet = labkit.train_subnets(a_problem, lab, name="quiet", **options)
        starts, start, found = [], lab.start, {}
        lab.start = lambda worker, fn, *args: starts.append((worker, args[0][0].problem.part)) or start(worker, fn, *args)
        stormy = {"name": "stormy", **options}
        thread = threading.Thread(target=lambda: found.update(joined=labkit.train_subnets(a_problem, lab, **stormy)))
        thread.start()
        limit, parts = time.monotonic() + 120, tmp_path / "stormy" / "parts"
        while len(done := checkpoints.versions(parts)) < 2 or [part for worker, part in starts if worker == 1][-1] in done:
            assert time.monotonic() < limit and thread.is_alive()
            time.sleep(0.02)
        chaos.kill(lab, 1)
        thread.join(120)
    joined = found["joined"]
    parts = [part for _, part in starts]
    assert sorted(set(parts)) == list(range(8)) and len(parts) == 9  # one of them twice
    again = next(part for part in parts if parts.count(part) == 2)
    assert joined.parts().worker[again] == 0 and (1, again) in starts
    assert list(joined.parts().index) == list(range(8))
    assert same(weights(joined), weights(quiet)) and joined.table().accuracy.equals(quiet.table().accuracy)


def test_a_worker_that_builds_another_subnet_than_the_kernel_refuses_it(monkeypatch, tmp_path):
    subnet = parts_of(problem())[0]
    monkeypatch.setattr(subnets, "prepare_alone", lambda *_: None)
    config = {"seed": SEED, "epochs": 1, "patience": None}
    job = subnets.Job(subnet, 1, str(tmp_path), config)
    of_kernel = subnet.fingerprint(job.seed)._replace(loss=0.0)
    with pytest.raises(ProblemError, match="another network in this process than in the kernel"):
        subnets.train_jobs([subnets.replace(job, fingerprint=of_kernel)], None)
