"""Networks trained in parts: one part is plain training, no worker matters, nothing is lost, and what is saved comes back."""

from __future__ import annotations

import json
import re
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import labkit
from labkit import chaos
from labkit.errors import ClusterError, LabError, ProblemError, RunError
from labkit.models.cnn import resnet20
from labkit.models.costs import n_parameters
from labkit.plots import progress
from labkit.problems.splits import folds
from labkit.runs import checkpoints
from labkit.subnets import train as subnets
from labkit.subnets.coarse import INPUTS, STACKING, CoarseProblem, average, coarse_net, gather, majority, subnet_outputs
from labkit.subnets.decomposition import Decomposition
from labkit.subnets.problem import Subnet, narrowed, subnet_seed
from labkit.subnets.result import BASELINES, NAMES
from labkit.subnets.stacked import fit_together
from labkit.training.local import fit, outputs

pytestmark = pytest.mark.usefixtures("cache")
SEED = 5


def data(n=231, shape=(1, 8, 8), n_classes=3):
    """A bright pixel somewhere in each quarter: its column tells the class, noisily."""
    generator = np.random.default_rng(0)
    y = np.arange(n) % n_classes
    x = generator.normal(size=(n, *shape)).astype(np.float32)
    for quarter in range(0, shape[-1], 4):
        x[np.arange(n), 0, ..., quarter // 4, quarter + y % 4] += 2.5
    return x, y


def net(shape, n_classes, width=1.0):
    hidden = max(1, round(16 * width))
    return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), hidden), nn.ReLU(), nn.Linear(hidden, n_classes))


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


def problem(model=net, **settings):
    return labkit.Classifier(model, settings.pop("data", data()), **{"batch_size": 16, "lr": 0.05, "score_samples": 30} | settings)


def parts_of(a_problem, *stacking):
    return [Subnet.of(a_problem, Decomposition((2, 2)), part, "sqrt", *stacking) for part in range(4)]


@pytest.fixture(scope="module")
def lab():
    with labkit.connect("threads", 2) as lab:
        yield lab


@pytest.fixture
def train(lab, tmp_path):
    def train(a_problem=None, grid=(2, 2), **options):
        place = {"runs": tmp_path, "name": "joined", "progress": False, "epochs": 3, "seed": SEED}
        return labkit.train_subnets(a_problem or problem(), lab, grid, **place | options)

    return train


def weights(joined):
    return {name: value.numpy().copy() for name, value in joined.module.state_dict().items()}


def same(first, second):
    assert first.keys() == second.keys()
    return all(np.array_equal(value, second[name]) for name, value in first.items())


# -- what must hold ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["lenet", net])
def test_one_part_is_plain_training_bit_for_bit(model, train, lab, tmp_path):
    a_problem = problem(model, model_args={"width": 0.25})
    joined = train(a_problem, (1, 1), stacking="same-split")
    plain = {"update": "sgwu", "partition": "udpa", "passes": 3, "seed": SEED, "workers": [0]}
    run = labkit.train(a_problem, lab, **plain, name="plain", runs=tmp_path).wait(60)
    alone = {name: value.numpy() for name, value in joined.module.subnets[0].state_dict().items()}
    assert same(alone, run.weights())


def test_a_part_sees_its_window_bit_for_bit():
    decomposition = Decomposition((2, 3), 1)
    for options in ({}, {"channels_last": True}, {"data": data(shape=(2, 9, 8)), "channels_last": True}):
        whole = problem(**options)
        for indices, split in ((whole.train_indices()[:7], "train"), (whole.test_indices(), "test")):
            x, y = whole.load(indices, split)
            for number, expected in enumerate(decomposition.cut(x)):
                part = Subnet.of(whole, decomposition, number)
                seen, labels = part.load(indices, split)
                assert torch.equal(seen, expected) and torch.equal(labels, y)


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


def test_the_coarse_network_learns_from_what_the_subnets_have_not_seen(train):
    a_problem = problem()
    everything = sorted(a_problem.train_indices())
    part = parts_of(a_problem, "held-out")[3]
    fitted, stack = part.train_indices(), part.stack_indices()
    assert sorted([*fitted, *stack]) == everything and 0.15 < len(stack) / len(everything) < 0.25
    assert set(a_problem.labels(stack)) == {0, 1, 2} and not set(everything) & set(a_problem.score_indices())
    first = parts_of(a_problem, "held-out")[0]
    assert np.array_equal(first.train_indices(), fitted) and np.array_equal(first.stack_indices(), stack)  # all parts the same
    for way in ("same-split", "out-of-fold"):
        assert np.array_equal(parts_of(a_problem, way)[3].train_indices(), a_problem.train_indices())
    assert np.array_equal(parts_of(a_problem, "same-split")[3].stack_indices(), a_problem.train_indices())
    sent = {way: train(stacking=way).summary()["bytes_to_coarse"] for way in STACKING}
    assert sent["same-split"] - sent["held-out"] == len(fitted) * 4 * 3 * 4  # samples x parts x classes x float32
    assert sent["out-of-fold"] == sent["same-split"]


def test_folds_cover_everything_once_and_hold_every_class():
    labels = np.random.default_rng(0).integers(3, size=100)
    of = folds(labels, 3)
    assert set(of) == {0, 1, 2} and np.ptp(np.bincount(of)) <= 3
    for label in range(3):
        assert np.ptp(np.bincount(of[labels == label], minlength=3)) <= 1


@pytest.mark.parametrize("way", [{}, {"batched": 3}])
def test_out_of_fold_each_sample_is_judged_by_a_copy_that_has_not_seen_it(way, train, tmp_path):
    """Copies train on two thirds; the subnet itself on all, as with the same split; what the copies say is what is stacked."""
    a_problem = problem()
    joined, plain = train(a_problem, stacking="out-of-fold", **way), train(a_problem, stacking="same-split", name="plain", **way)
    for own, other in zip(joined.module.subnets.parameters(), plain.module.subnets.parameters(), strict=True):
        torch.testing.assert_close(own, other)
    everything = a_problem.train_indices()
    of = folds(a_problem.labels(everything), 3)
    part = Subnet.of(a_problem, joined.decomposition, 2, stacking="out-of-fold")
    copies = [part.without(fold) for fold in range(3)]
    assert sorted(np.concatenate([copy.stack_indices() for copy in copies])) == sorted(everything)
    assert all(not set(copy.stack_indices()) & set(copy.train_indices()) for copy in copies) and not len(part.stack_indices())
    module = part.build(subnet_seed(SEED, 2))
    fit(part, module, everything[of != 1], part.score_indices(), epochs=3, patience=None, seed=subnet_seed(SEED, 2))
    kept = checkpoints.read_state(tmp_path / "joined" / "parts", copies[1].number)[1]["outputs"]["stack"]
    np.testing.assert_allclose(kept, outputs(part, module, everything[of == 1]), rtol=1e-4, atol=1e-5)
    assert (joined.parts().folds_s > 0).all() and (plain.parts().folds_s == 0).all()


def test_features_are_what_the_last_dense_layer_sees():
    x, module = torch.randn(5, 1, 8, 8), net((1, 8, 8), 3).eval()
    said = subnet_outputs(module, x, "features")
    assert torch.equal(said[:, :3], module(x))
    torch.testing.assert_close(module[-1](said[:, 3:]), module(x))
    assert torch.equal(subnet_outputs(module, x, "logits"), module(x)) and not module[-1]._forward_pre_hooks
    logits, seen = gather([said, said + 1], 3, "features")
    assert logits.shape == (5, 2, 3) and torch.equal(seen[:, :16], said[:, 3:]) and seen.shape == (5, 32)


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


def test_progress_is_a_line_for_each(train, capsys):
    train(progress=True, grid=(1, 3))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("subnet ")]
    assert [line.split(":")[0] for line in lines] == [f"subnet {i} of 3" for i in (1, 2, 3)]
    assert all(" score " in line and " s on worker " in line for line in lines)


@pytest.mark.parametrize("way", [{"patience": 30}, {"batched": 2}, {"team": {"n_workers": 1}}])
def test_long_subnets_tell_their_epochs_now_and_then(way, train, capsys, monkeypatch):
    monkeypatch.setattr(progress, "BAR_S", 0.01)
    monkeypatch.setattr(progress, "EVERY_S", 0.01)
    train(problem(data=data(300)), (1, 2), progress=True, epochs=30, **way)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  part ")]
    loss = r"(, loss \d+\.\d{3})?" if "team" in way else r", loss \d+\.\d{3}"  # a worker that has just begun has none to tell
    score = r", score [01]\.\d{3}" if "patience" in way else ""
    for part in (0, 1):
        told = [re.fullmatch(rf"  part {part}: epoch (\d+) of 30{loss}{score}.*", line) for line in lines]
        epochs = [int(match[1]) for match in told if match]
        assert epochs == sorted(set(epochs)) and 1 <= len(epochs) <= 30 and 1 <= epochs[0] <= epochs[-1] <= 30
        assert len(epochs) == sum(f"part {part}:" in line for line in lines), [x for x in lines if "loss" not in x]


def test_in_a_notebook_a_bar_tells_how_far_the_subnets_are(train, capsys, monkeypatch):
    shown = []
    monkeypatch.setenv("LABKIT_PLOTS", "interactive")
    monkeypatch.setattr("IPython.display.display", shown.append)
    train(progress=True)
    ((bar, text),) = [box.children for box in shown]
    assert (bar.value, bar.bar_style, text.value) == (1.0, "success", "4 of 4 subnets")
    shown.clear()
    with pytest.raises(ClusterError, match="tasks were not done within 2 s"):
        train(grid=(1, 2), progress=True, epochs=10_000, timeout=2, batched=2)
    bar, text = shown[0].children
    assert 0 < bar.value < 0.9 and not bar.bar_style
    assert re.fullmatch(r"0 of 2 subnets(; part \d: epoch \d+ of 10000, loss \d\.\d{3}){2}", text.value)


@pytest.mark.parametrize("batched", [1, 2])
def test_workers_do_not_go_on_with_what_nobody_waits_for(batched, train, lab):
    """Nor when it is begun again at once: the folder of the new training is not that of the old one."""
    with pytest.raises(ClusterError, match="tasks were not done within 1 s; they were cancelled"):
        train(grid=(1, 2), epochs=1_000_000, timeout=1, batched=batched)
    again = train(grid=(1, 2), batched=batched, timeout=20)
    assert (again.parts().epochs == 3).all() and lab.map(abs, [-1, -2], timeout=20) == [1, 2]


def test_nor_do_baselines(train, lab, tmp_path, monkeypatch):
    spread = type(lab).map

    def endless(self, fn, items, timeout, *rest, **more):  # of the baselines alone
        long = [replace(job, config=job.config | {"epochs": 1_000_000}) if hasattr(job, "baseline") else job for job in items]
        return spread(self, fn, long, 1 if long != items else timeout, *rest, **more)

    monkeypatch.setattr(type(lab), "map", endless)
    with pytest.raises(ClusterError, match="tasks were not done within 1 s"):
        train(grid=(1, 2), baselines=["global", "small"])
    assert lab.map(abs, [-1, -2], timeout=20) == [1, 2]
    assert labkit.load_subnets(tmp_path / "joined").summary()["n_parts"] == 2  # they were done before


def test_a_folder_taken_by_another_training_is_no_more_one_s_own(train, lab, tmp_path, monkeypatch):
    def taken(*given, **options):
        (tmp_path / "joined").rename(tmp_path / "other")
        (tmp_path / "joined" / "parts" / "checkpoints").mkdir(parents=True)
        return report(*given, **options)

    report = subnets.report
    monkeypatch.setattr(subnets, "report", taken)
    with pytest.raises(RunError, match=r"taken by another training of the same name\. Give each its own: name="):
        train(grid=(1, 1))
    assert not list((tmp_path / "joined" / "parts" / "checkpoints").iterdir()) and lab.free() == [0, 1]


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


def test_a_subnet_is_a_problem_that_many_workers_can_train(lab, tmp_path):
    part = Subnet.of(problem("lenet"), Decomposition((2, 2), 1), 2, "linear")
    run = labkit.train(part, lab, update="agwu", partition="idpa", passes=3, seed=SEED, name="part", runs=tmp_path).wait(60)
    again = labkit.load_run(run.path).model()
    assert run.weights()["conv1.weight"].shape == (8, 1, 5, 5) and again.dense1.in_features == part.build(0).dense1.in_features
    assert run.summary()["score"] > 0.2


# -- teams -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stacking", ["held-out", "same-split"])
def test_a_team_of_one_is_a_worker_alone_bit_for_bit(stacking, train, tmp_path):
    a_problem, options = problem("lenet", model_args={"width": 0.25}, schedule="cosine"), {"workers": [0], "stacking": stacking}
    team = {"n_workers": 1, "partition": "udpa", "update": "sgwu"}
    alone, together = train(a_problem, (1, 2), **options), train(a_problem, (1, 2), team=team, **options)
    assert same(weights(alone), weights(together)) and alone.table().accuracy.equals(together.table().accuracy)
    columns = ["accuracy", "parameters", "epochs", "best", "loss", "score", "multiply_adds", "place"]
    assert alone.parts()[columns].equals(together.parts()[columns])
    run = labkit.load_run(tmp_path / "joined" / "parts" / "joined-part-1")
    assert run.config["problem"]["stacking"] == stacking and run.config["n_train"] == len(run.problem().train_indices())
    assert same(run.weights(), {name: value.numpy() for name, value in together.module.subnets[1].state_dict().items()})


def test_teams_train_with_any_partition_and_update(train, lab, tmp_path):
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


def test_teams_are_disjoint_and_work_at_the_same_time(train, lab):
    joined = train(grid=(1, 3), team={"n_workers": 1})
    assert set(joined.parts().worker) == {"0", "1"} and list(joined.parts().index) == [0, 1, 2]


def test_an_interrupt_stops_the_teams(train, lab, tmp_path, monkeypatch):
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


def test_teams_that_take_too_long_are_stopped(train, lab, tmp_path):
    with pytest.raises(ClusterError, match=r"4 of 4 runs were not done within 2 s; they were stopped"):
        train(epochs=10_000, team={}, timeout=2)
    assert labkit.load_run(tmp_path / "joined" / "parts" / "joined-part-0").state == "stopped" and not lab.runs


def test_a_team_that_fails_says_why(train, lab):
    with pytest.raises(LabError, match=r"run joined-part-\d failed: .* its weights hold NaN or infinity. Lower the learning rate"):
        train(problem(lr=1e30), team={}, epochs=5)
    assert not lab.runs and lab.free() == [0, 1]


@pytest.mark.parametrize("lost", [[1], [0, 1]])
def test_lost_workers_are_in_no_team(lost, train, lab, monkeypatch):
    def losing(*arguments, begin=subnets.run_on_blocks, **options):  # just before the first run
        monkeypatch.setattr(lab, "lost", lambda: lost)
        return begin(*arguments, **options)

    monkeypatch.setattr(subnets, "run_on_blocks", losing)
    if lost == [1]:
        assert list(train(grid=(1, 2), team={"n_workers": 1}).parts().worker) == ["0", "0"]
    else:
        with pytest.raises(ClusterError, match="every worker of this lab is lost"):
            train(team={"n_workers": 1})


# -- batches -----------------------------------------------------------------------------------------------------------


def deep(shape, n_classes, width=1.0):
    """BatchNorm, a tied pair of layers, and a bias that is not trained."""
    size = round(8 * width)
    net = nn.Sequential(
        nn.Conv2d(shape[0], size, 3, padding=1), nn.BatchNorm2d(size), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), tied := nn.Linear(size, size), nn.ReLU(), tied, nn.Linear(size, n_classes),
    )  # fmt: skip
    net[0].bias.requires_grad = False
    return net


def branching(shape, n_classes, width=1.0):
    class Branching(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1) if x.mean() > 0 else -x.flatten(1))

    return Branching(int(np.prod(shape)), n_classes)


def remembering(shape, n_classes, width=1.0):
    """Keeps a number outside of its tensors, so no pass through several of these can be right."""

    class Remembering(nn.Linear):
        def __init__(self):
            super().__init__(int(np.prod(shape)), n_classes)
            self.factor = float(self.weight[0, 0].detach())

        def forward(self, x):
            return super().forward(x.flatten(1)) * self.factor

    return Remembering()


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("lenet", {"weight_decay": 0.01, "schedule": "cosine"}),
        ("resnet20", {"optimiser": "adam", "lr": 1e-3, "channels_last": True}),
        (deep, {"optimiser": "adamw", "lr": 1e-2}),
    ],
)
def test_a_batch_of_subnets_learns_what_each_learns_alone(model, settings):
    a_problem = problem(model, data=data(100, shape=(1, 16, 16)), model_args={"width": 0.5}, **settings)
    problems, seeds = parts_of(a_problem, "held-out")[:3], [3, 4, 5]
    build = [[one.build(seed) for one, seed in zip(problems, seeds, strict=True)] for _ in range(2)]
    together = fit_together(problems, build[0], seeds=seeds, epochs=2, patience=None)
    for one, seed, stacked, module, found in zip(problems, seeds, *build, together, strict=True):
        start = {name: value.clone() for name, value in module.state_dict().items()}
        done = fit(one, module, one.train_indices(), one.score_indices(), epochs=2, patience=None, seed=seed)
        assert (found.epochs, found.best, found.score) == (2, 2, done.score) and found.loss == pytest.approx(done.loss, rel=1e-3)
        for name, value in module.state_dict().items():
            moved = (value - start[name]).abs().max() if value.is_floating_point() else 0
            assert (stacked.state_dict()[name] - value).abs().max() <= 1e-2 * moved, name


def test_each_of_a_batch_stops_at_its_own_time_and_keeps_its_best(train):
    options = {"epochs": 30, "patience": 2, "stacking": "same-split"}
    alone, batch = train(**options).parts(), train(batched=3, **options)
    parts = batch.parts()
    assert parts.epochs.equals(alone.epochs) and parts.best.equals(alone.best) and parts.epochs.nunique() > 1
    assert (parts.epochs == np.minimum(parts.best + 2, 30)).all() and (parts.best < parts.epochs).any()
    for part, module in enumerate(batch.module.subnets):
        one = parts_of(problem())[part]
        measured = {"loss": parts.loss[part], "score": parts.score[part]}
        assert one.measure(module, one.score_indices()) == measured


def test_batches_have_one_shape_and_leave_no_worker_without(train, lab, monkeypatch, tmp_path):
    seen, spread = [], type(lab).map
    monkeypatch.setattr(
        type(lab), "map", lambda self, fn, items, *rest, **more: spread(self, fn, seen.extend(items) or items, *rest, **more)
    )
    cut = problem(data=data(shape=(1, 12, 12)))
    joined = train(cut, Decomposition((3, 3), 1, border="cut"), batched=8, baselines=["transfer"])
    groups = [sorted(job.problem.part for job in group) for group in seen[:-1]]
    assert sorted(map(tuple, groups)) == [(0, 2, 6, 8), (1, 7), (3, 5), (4,)]  # corners, edges, and the middle
    parts, summary = joined.parts(), joined.summary()
    assert list(parts.batched) == [4, 2, 4, 2, 1, 2, 4, 2, 4] and 0 < summary["busy"] < 1.1
    assert parts.seconds[0] == parts.seconds[2]  # of all four together
    again, images = labkit.load_subnets(tmp_path / "joined"), cut.dataset.raw(cut.test_indices(), "test")
    assert np.array_equal(again.scores(images), joined.scores(images))
    seen.clear()
    train(grid=(1, 8), batched=8)
    assert [len(group) for group in seen] == [4, 4]


@pytest.mark.parametrize(
    ("model", "reason"),
    [(branching, "RuntimeError: .*data-dependent control flow.*"), (remembering, r"its logits differ there by up to [\d.]+\.")],
)
def test_a_model_that_cannot_be_batched_says_so(model, reason, train, tmp_path):
    with pytest.raises(
        ProblemError, match=f"part 0 of .*{model.__name__}.* cannot be .* a batch of subnets: {reason} Leave out batched"
    ):
        train(problem(model), batched=2)
    assert not list(tmp_path.iterdir())


def test_one_of_a_batch_that_diverges_says_so(train):
    with pytest.raises(ProblemError, match=r"part \d of Decomposition.*: the loss is (nan|inf) after epoch .* Give a smaller lr"):
        train(problem("lenet", lr=1e6), batched=4)


# -- the coarse level --------------------------------------------------------------------------------------------------


def test_equal_votes_go_to_the_larger_summed_probability():
    p = torch.tensor([[[0.9, 0.1, 0.0], [0.4, 0.6, 0.0]], [[0.55, 0.45, 0.0], [0.0, 0.9, 0.1]], [[0.2, 0.5, 0.3], [0.1, 0.2, 0.7]]])
    assert majority(p.log()).argmax(1).tolist() == [0, 1, 2]
    sure = torch.tensor([[[0.34, 0.33, 0.33], [0.34, 0.33, 0.33], [0.0, 1.0, 0.0]]]).log()
    assert majority(sure).argmax(1).tolist() == [0] and average(sure).argmax(1).tolist() == [1]  # two votes beat one, however sure


def test_the_coarse_network_learns_what_no_vote_can_say():
    """The class is whether the two parts agree."""
    generator = np.random.default_rng(0)
    bits = generator.integers(2, size=(1200, 2))
    logits = np.eye(2, dtype=np.float32)[bits] * 4 + generator.normal(size=(1200, 2, 2)).astype(np.float32)
    labels = (bits[:, 0] == bits[:, 1]).astype(np.int64)
    for inputs in ("probabilities", "logits"):
        seen = gather(list(torch.from_numpy(logits).unbind(1)), 2, inputs)[1]
        two = problem(data=data(n_classes=2))
        task = CoarseProblem(two, seen, torch.from_numpy(labels), hidden=[16], dropout=0.1, lr=0.01)
        module = task.build(0)
        fit(task, module, np.arange(900), np.arange(900, 1200), epochs=40, patience=None, seed=0)
        assert task.measure(module, np.arange(900, 1200))["score"] > 0.95
    votes = average(torch.from_numpy(logits)).argmax(1).numpy()
    assert abs((votes == labels).mean() - 0.5) < 0.06
    assert [layer.out_features for layer in coarse_net((2, 2), 5, [7, 4]) if isinstance(layer, nn.Linear)] == [7, 4, 5]


# -- training alone ----------------------------------------------------------------------------------------------------


def test_early_stopping_keeps_the_best_weights():
    a_problem = problem()
    module, held = a_problem.build(0), a_problem.score_indices()
    done = fit(a_problem, module, a_problem.train_indices(), held, epochs=60, patience=2, seed=0)
    assert done.epochs == done.best + 2 < 60
    assert a_problem.measure(module, held) == {"loss": done.loss, "score": done.score}
    longer = a_problem.build(0)
    fit(a_problem, longer, a_problem.train_indices(), held, epochs=done.best, patience=None, seed=0)
    assert same({k: v.numpy() for k, v in module.state_dict().items()}, {k: v.numpy() for k, v in longer.state_dict().items()})


def test_a_training_that_diverges_says_so(train):
    with pytest.raises(ProblemError, match=r"part \d of Decomposition.*: the loss is (nan|inf) after epoch .* Give a smaller lr"):
        train(problem("lenet", lr=1e6), (1, 2))


def test_width_rules():
    whole = n_parameters(resnet20((1, 32, 32), 10))
    for rule, share in (("sqrt", 1 / 16), ("linear", 1 / 256), ("same", 1)):
        part = n_parameters(resnet20((1, 8, 8), 10, **narrowed({}, 16, rule)))
        assert part / whole == pytest.approx(share, rel=0.25)
    assert narrowed({"width": 0.5, "a": 1}, 4, "sqrt") == {"width": 0.25, "a": 1} and narrowed({}, 1, "linear") == {}


# -- to disk and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", INPUTS)
def test_predictions_are_the_same_after_the_way_to_disk(inputs, train, tmp_path):
    a_problem = problem("resnet20", model_args={"width": 0.2}, data=data(shape=(1, 12, 12)), precision="bfloat16")
    joined = train(a_problem, Decomposition((2, 2), 1), inputs=inputs, baselines=["transfer", "small"], epochs=1)
    test = a_problem.test_indices()
    images, answers = a_problem.dataset.raw(test, "test"), a_problem.dataset.labels("test")[test]
    for again in (labkit.load_subnets(tmp_path / "joined"), labkit.load_subnets(joined.save(tmp_path / "new" / "place"))):
        for by, model in (NAMES | {baseline: BASELINES[baseline] for baseline in ("small", "transfer")}).items():
            assert np.array_equal(joined.scores(images, by), again.scores(images, by))
            assert (again.predict(images, by) == answers).mean() == pytest.approx(again.table().accuracy[model])
        assert again.summary() == joined.summary() and again.parts().equals(joined.parts())
        assert same(weights(joined), weights(again))
    np.testing.assert_allclose([joined.scores(images, by).sum(1) for by in ("coarse", "transfer", "small")], 1, rtol=1e-5)
    assert not np.array_equal(joined.scores(images), joined.scores(images, "transfer"))
    assert joined.predict(images[:0]).shape == (0,)


def test_what_was_damaged_mixed_or_is_something_else_is_refused(train, tmp_path):
    joined = train(baselines=["global"])
    joined.save(tmp_path / "copy")
    for number in (0, 1):  # the subnets, and their baseline
        file = checkpoints._file(tmp_path / "copy", number)
        whole = file.read_bytes()
        for content, message in (
            (checkpoints._file(tmp_path / "joined", number).read_bytes(), "belongs to another run"),
            (whole[:-40], "is damaged"),
            (b"\x80\x04pickle", "is no checkpoint of labkit"),
        ):
            file.write_bytes(content)
            with pytest.raises(RunError, match=message):
                labkit.load_subnets(tmp_path / "copy")
        file.write_bytes(whole)
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    for change, message in (
        ({"what": "run"}, "does not hold subnets"),
        ({"format": 99}, "by a later labkit"),
        ({"rows": None}, ""),
        ({"problem": None}, "lacks problem"),
        ({"centre": None}, "lacks centre: it is damaged"),
        ({"baselines": ["globl"]}, "Did you mean 'global'"),
        ({"baselines": ["small"]}, "weights for a model of"),
        ({"decomposition": {"grid": [20, 2]}}, "does not describe subnets"),
        ({"problem": config["problem"] | {"model": {"by_value": "net"}}}, r"'net' was written in a notebook.*model="),
    ):
        changed = {key: value for key, value in (config | change).items() if value is not None}
        (tmp_path / "copy" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(RunError, match=message or "did not end"):
            labkit.load_subnets(tmp_path / "copy")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(RunError, match="holds something else"):
        joined.save(tmp_path / "run")


def test_subnets_of_before_the_word_was_changed_are_read(train, tmp_path):
    joined = train(baselines=["small"], epochs=1)
    config = json.loads((tmp_path / "joined" / "config.json").read_text())
    assert config["format"] == 3 and "rivals" not in config
    config |= {"format": 2, "rivals": config.pop("baselines")}
    (tmp_path / "joined" / "config.json").write_text(json.dumps(config))
    again, images = labkit.load_subnets(tmp_path / "joined"), data(5)[0]
    assert np.array_equal(again.scores(images, "small"), joined.scores(images, "small")) and again.table().equals(joined.table())
    again.save(tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["format"] == 3 and config["baselines"] == ["small"] and "rivals" not in config
    assert list(labkit.load_subnets(tmp_path / "new").baselines) == ["small"]


def test_a_model_of_a_notebook_is_given_again(train, tmp_path):
    joined = train(problem(lambda shape, n_classes, width=1.0: net(shape, n_classes, width)))
    with pytest.raises(RunError, match="was written in a notebook"):
        labkit.load_subnets(tmp_path / "joined")
    images = data(5)[0]
    assert np.array_equal(labkit.load_subnets(tmp_path / "joined", model=net).scores(images), joined.scores(images))


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grid": (9, 1)}, ProblemError, "9 parts along axis 0, which has 8 pixels"),
        ({"grid": (2, 2, 2)}, ProblemError, r"cuts volumes \(C, D, H, W\), and the data have shape \(1, 8, 8\)"),
        ({"width_rule": "sqr"}, ValueError, r"width_rule='sqr' is not known. Known: sqrt, linear, same. Did you mean 'sqrt'\?"),
        ({"stacking": "out"}, ValueError, "stacking='out' is not known. Known: held-out, out-of-fold, same-split"),
        ({"inputs": "votes"}, ValueError, "Known: probabilities, logits, features"),
        ({"baselines": ["globl"]}, ValueError, "Did you mean 'global'"),
        ({"epochs": 0}, ValueError, "epochs=0 must be at least 1"),
        ({"patience": 0}, ValueError, "patience=0"),
        ({"dropout": 1.0}, ValueError, "dropout=1 must be"),
        ({"hidden": [0]}, ValueError, "hidden=0"),
        ({"hidden": 8}, TypeError, r"hidden=8 must be lists, such as \['transfer'\] and \[64, 32\]"),
        ({"baselines": "transfer"}, TypeError, "baselines='transfer' and hidden=.* must be lists"),
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


def test_what_does_not_fit_says_why(train, tmp_path):
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


def test_images_of_another_shape_are_refused(train):
    joined = train(epochs=1, baselines=["small"])
    with pytest.raises(ProblemError, match=r"images of shape \(3, 8, 8\) were given; these subnets take \(n, 1, 8, 8\)"):
        joined.predict(np.zeros((3, 8, 8)))
    for wrong in (np.full((3, 1, 8, 8), np.nan), np.full((3, 1, 8, 8), "a"), np.full((3, 1, 8, 8), None)):
        with pytest.raises(ProblemError, match=r"images of .* were given that are not all finite numbers"):
            joined.predict(wrong)
    for by in ("vote", "transfer"):
        with pytest.raises(ValueError, match=rf"by='{by}' is not known. Known: coarse, average, majority, small. .* be trained"):
            joined.predict(np.zeros((3, 1, 8, 8)), by=by)


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
