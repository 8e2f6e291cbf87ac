"""The learning curve: every retained version on the test set, after the run, on a lab or here."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import labkit
from labkit import locks
from labkit.runs import checkpoints
from labkit.training import evaluation, supervisor
from labkit.training.evaluation import measure
from labkit.training.run import Run
from tests.helpers import ended, net_with_statistics, problem, until
from tests.models.zoo import BY_BATCH, Zoo

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.slow
def test_here_and_on_a_lab_the_curve_is_the_same_and_it_is_that_of_the_weights(train, lab):
    a_problem = problem(net_with_statistics)
    run = ended(train(a_problem, passes=2, checkpoints=4))
    curve = run.curve()
    assert curve.version.tolist() == checkpoints.versions(run.path) and curve.samples.iloc[-1] == run.config.budget
    assert measure(run, a_problem).equals(curve) and measure(run, a_problem, lab, [1]).equals(curve)
    last = a_problem.measure(run.model().network, a_problem.test_indices(), "test")
    np.testing.assert_allclose(curve[["loss", "score"]].iloc[-1], [last["loss"], last["score"]], rtol=1e-6)


def test_a_curve_that_was_not_measured_is_measured_when_it_is_asked_for(train):
    a_problem = problem()
    run = ended(train(a_problem, passes=1))
    curve = run.curve()
    (run.path / "metrics.parquet").unlink()
    assert labkit.load_run(run.path, problem=a_problem).curve().equals(curve) and (run.path / "metrics.parquet").exists()


def test_a_curve_that_two_threads_ask_for_at_once_is_measured_once(train, monkeypatch):
    """By one handle, and by another one of the same run."""
    run = ended(train(problem(), passes=1))
    (run.path / "metrics.parquet").unlink()
    again, measured, asked = labkit.load_run(run.path, problem=problem()), [], evaluation.as_recorded
    at_once = threading.Barrier(3)

    def ask(*given):  # the last thing before it is measured
        at_once.wait(20)
        return asked(*given)

    monkeypatch.setattr(evaluation, "as_recorded", ask)
    monkeypatch.setattr(evaluation, "measure", lambda *given: measured.append(1) or measure(*given))
    with ThreadPoolExecutor(3) as pool:
        one, *others = [curve.result(60) for curve in [pool.submit(handle.curve) for handle in (run, run, again)]]
    assert all(one.equals(other) for other in others) and len(measured) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_who_asks_for_a_curve_that_is_being_measured_waits_for_it(fails, train, monkeypatch):
    """As by another handle of the kernel that trains the run."""
    begun, goes_on, waits, measured, alone = threading.Event(), threading.Event(), threading.Event(), [], locks.alone

    def count(*given):
        measured.append(1)
        begun.set()
        assert goes_on.wait(20)
        if fails and len(measured) == 1:
            raise RuntimeError("no curve")
        return measure(*given)

    def wait(folder):
        waits.set()
        return alone(folder)

    monkeypatch.setattr(evaluation, "measure", count)
    monkeypatch.setattr(supervisor, "measure", count)
    monkeypatch.setattr(locks, "alone", wait)
    run = train(problem(), passes=1)
    with ThreadPoolExecutor(1) as pool:
        try:
            assert begun.wait(60)
            curve = pool.submit(labkit.load_run(run.path, problem=problem()).curve)
            assert waits.wait(20)
        finally:
            goes_on.set()
        assert len(curve.result(20)) and len(measured) == 1 + fails
    run.wait(60)


@pytest.fixture
def told(monkeypatch):
    """What a notebook shows while something is measured, from the first moment on."""
    told = []
    monkeypatch.setattr("labkit.cluster.notice.front_end", lambda: "jupyter")
    monkeypatch.setattr("labkit.cluster.notice.EVERY_S", 0.01)
    monkeypatch.setattr("labkit.training.evaluation.TOLD_S", 0.01)
    monkeypatch.setattr("IPython.display.display", lambda what, **how: told.append(what.get("text/plain", "")))
    return told


def test_what_takes_long_to_measure_is_told_with_how_far_it_is_and_what_makes_it_shorter(train, told, monkeypatch):
    run = ended(train(problem(test_samples=20), passes=2, checkpoints=4))
    n = len(checkpoints.versions(run.path))
    a_problem, counted = problem(test_samples=20), []

    def measure_when_told(*given, **options):
        until(lambda: any(f" {len(counted)} of {n} versions, on 20 test samples; " in text for text in told))
        counted.append(1)
        return {"loss": 0.5, "score": 0.5}

    monkeypatch.setattr(a_problem, "measure", measure_when_told)
    assert len(measure(run, a_problem)) == n == len(counted)
    assert all("test_samples=" in text for text in told[-n - 1 : -1]) and told[-1] == "", "the line is gone afterwards"


@pytest.mark.parametrize("ask", [Run.evaluate, Run.predictions])
def test_measuring_one_version_is_told_too(ask, train, told, monkeypatch):
    run, of_set = ended(train(problem(), passes=1)), "measure" if ask is Run.evaluate else "each"
    measured, tested = getattr(run.problem(), of_set), len(run.problem().test_indices())

    def when_told(*given, **options):
        until(lambda: any(f"is being measured on {tested} samples" in text for text in told))
        return measured(*given, **options)

    monkeypatch.setattr(run.problem(), of_set, when_told)
    assert len(ask(run)) and told[-1] == ""


RULES = {"sgwu": [0], "agwu": [0, 1], "ssp": [0, 1], "fedbuff": [0, 1], "diloco": [0, 1], "easgd": [0, 1], "allreduce": [0, 1]}
rare = (pytest.mark.slow, pytest.mark.filterwarnings("ignore"))  # torch warns of itself when it compiles
LABS = [
    ("threads", ["sgwu"], ()),
    pytest.param("threads", ["agwu", "easgd", "allreduce"], ("compiled_as_a_whole", "compiled_in_part"), marks=rare),
    pytest.param("dask", ["agwu", "easgd", "allreduce"], (), marks=(pytest.mark.cluster, *rare)),
]


@pytest.mark.parametrize(("kind", "rules", "more"), LABS)
@pytest.mark.slow
def test_what_a_worker_trains_is_what_is_measured_and_what_is_given(kind, rules, more, tmp_path):
    """Modules of every kind in one network, and the last version under each rule: for the worker, on the curve, as a model."""
    with labkit.connect(kind, 2) as lab:
        for rule in rules:
            but = BY_BATCH if rule == "allreduce" else []
            a_problem = problem(Zoo, train_samples=64, lr=0.01, model_args={"but": but, "more": list(more)})
            run = ended(
                labkit.train(a_problem, lab, update=rule, passes=2, checkpoints=2, runs=tmp_path, workers=RULES[rule]), timeout=100
            )
            last = a_problem.measure(run.model().network, a_problem.test_indices(), "test", batch_size=250)
            np.testing.assert_allclose(run.curve()[["loss", "score"]].iloc[-1], [last["loss"], last["score"]], rtol=1e-6)
            if rule == "sgwu":
                scored = a_problem.measure(run.model().network, a_problem.score_indices())
                assert run.events.query("kind == 'push'").score.iloc[-1] == pytest.approx(scored["score"], rel=1e-6)
            weights = run.weights()
            assert but or weights["cages.activation_norm.initialised"]
            assert weights["cages.batch_norm.1.num_batches_tracked"] >= 1
            for name, tensor in run.model().network.state_dict().items():
                if name in weights:  # tied ones come once
                    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
                    np.testing.assert_array_equal(tensor.numpy(), weights[name], err_msg=name)


class Reports(labkit.Classifier):
    """More than a loss in each step, and a number of its own in each measure."""

    def step(self, module, batch, optimisers, clock):
        made = super().step(module, batch, optimisers, clock)
        return {**made, "size": len(batch[1]), "twice": 2 * made["loss"]}


@pytest.mark.slow
def test_every_entry_of_step_and_measure_is_in_the_record_and_in_the_curve(train, capsys):
    def never(outputs, targets):
        return float("nan")

    a_problem = problem(kind=Reports, metrics={"top2": top2, "never": never, "acc": "accuracy"}, clip_norm=1.0)
    run = ended(train(a_problem, passes=2, checkpoints=4))
    pushes = run.events.query("kind == 'push'")
    assert all(set(given) == {"grad_norm", "size", "twice"} for given in pushes.metrics)
    assert [given["twice"] for given in pushes.metrics] == pytest.approx(2 * pushes.loss)
    curve = run.curve()
    measured = ["seconds", "samples", "version", "loss", "score", "top2", "never", "acc"]
    assert list(curve.columns) == [*measured, "train_loss", "train_grad_norm", "train_size", "train_twice"]
    np.testing.assert_allclose(curve.acc, curve.score, rtol=1e-6)
    assert (curve.top2 >= curve.score).all() and curve.train_loss.isna().tolist() == [True] + [False] * (len(curve) - 1)
    assert (curve.train_size[1:] <= a_problem.batch_size).all() and curve.never.isna().all()
    assert f"Run {run.name!r}: never is NaN for versions 0, " in capsys.readouterr().out
    assert labkit.plots.curves(run, y="train_twice") and labkit.plots.curves(run, y="top2")
    again = labkit.replay(run, problem=a_problem)
    assert again.events.metrics.dropna().tolist() == pushes.metrics.tolist()


def top2(outputs, targets):
    return (outputs.topk(2, 1).indices == targets[:, None]).any(1).float().mean()


def test_a_problem_without_a_score_is_for_rules_that_do_not_weigh_by_it(train):
    class NoScore(labkit.Classifier):
        def evaluate(self, module, batch):
            return {"loss": super().evaluate(module, batch)["loss"]}

    a_problem = problem(kind=NoScore)
    with pytest.raises(labkit.ProblemError, match="Without a score go rules that do not weigh pushes by it"):
        train(a_problem, passes=1)  # AGWU
    run = ended(train(a_problem, passes=1, update="fedasync"))
    assert run.curve().score.isna().all() and run.summary()["score"] is None and run.summary()["loss"] > 0
    assert run.events.score.isna().all()
