"""The average of the global weights: what its formula says, whatever made the versions, and the same in every driver of a run."""

from __future__ import annotations

import numpy as np
import pytest

import labkit
from labkit.errors import RunError
from labkit.runs import checkpoints
from labkit.training.server.average import Average
from labkit.updates import AGWU, SGWU, AllReduce, FedBuff
from tests.helpers import WORKERS, Course, ended, net_with_statistics, problem, settings, shortened, until

DECAY = 0.8


def by_hand(versions, batch_size, since=0):
    """Of [(weights, samples merged by then)] the mean, weighted as the docstring of the module says."""
    done, factors = since, []
    for _, merged in versions:
        factors.append((1 - DECAY ** ((merged - done) / batch_size)) * DECAY ** ((versions[-1][1] - merged) / batch_size))
        done = merged
    return sum(w.astype(float) * f for (w, _), f in zip(versions, factors, strict=True)) / sum(factors)


@pytest.mark.parametrize("rule", [AGWU, SGWU, AllReduce, lambda: FedBuff(size=2)], ids=["agwu", "sgwu", "allreduce", "fedbuff"])
def test_every_version_counts_by_its_steps_and_their_age(rule):
    course, made = Course(rule(), budget=90, ema=DECAY, milestones=(40,), local_steps=2, checkpoints=90), []
    course.it.save = lambda version, weights, state: made.append((weights, state["done"], state["ema"]))
    course.join(*WORKERS).finish()
    settled = course.of("settle")[0]
    cut = next(i for i, (_, done, _) in enumerate(made) if made[i + 1 :] and done == settled["total"] == made[i + 1][1]) + 1
    for first, part in ((0, made[:cut]), (settled["total"], made[cut + 1 :])):
        versions = []
        for weights, done, ema in part:
            versions.append((weights, done))
            assert ema["since"] == first
            np.testing.assert_allclose(ema["weights"], by_hand(versions, 2, first), rtol=1e-5)
    np.testing.assert_array_equal(made[cut][2]["weights"], made[cut][0])  # a milestone begins it anew
    course = Course(rule(), ema=DECAY, state={**course.it.state_dict(), "ema": made[cut - 1][2]})
    np.testing.assert_array_equal(course.it.average.weights, made[cut - 1][2]["weights"])


def test_bytes_are_those_of_the_newest_version_and_large_weights_stay_finite():
    average = Average(settings(ema=0.999), np.array([0, 0, 7], np.float32), 1)
    average.follow(np.array([-3e38, 1, 8], np.float32), 4)
    average.follow(np.array([3e38, 3, 9], np.float32), 8)
    assert average.weights[2] == 9 and average.weights[1] == pytest.approx(2.0, abs=1e-3) and abs(average.weights[0]) < 1e36
    saved = average.state_dict()
    average.follow(np.array([0, 3, 1], np.float32), 12)
    assert saved["weights"][2] == 9  # what is being saved does not change


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("update", ["agwu", "allreduce"])
@pytest.mark.slow
def test_a_run_measures_keeps_and_goes_on_with_its_average(update, train, lab):
    a_problem = problem(net_with_statistics, ema=0.9)
    run = train(a_problem, update=update, passes=1000, local_steps=4, checkpoints=30_000)
    until(lambda: run.status()["version"] > 1)
    run = ended(labkit.resume(shortened(run.stop()), lab))
    assert run.config.ema == run.config.problem["ema"] == 0.9
    curve = run.curve()
    assert np.abs(run.flat("ema") - run.flat()).max() > 1e-4 and curve.ema_loss[0] == pytest.approx(curve.loss[0])
    again = labkit.load_run(run.path)
    for version in (None, "ema"):
        measured = again.evaluate(version=version)
        row = curve.iloc[-1]
        name = "ema_score" if version else "score"
        assert measured["score"] == pytest.approx(row[name]) and again.summary()["score"] == row.score
    assert again.model("ema").network[1].num_batches_tracked == again.model().network[1].num_batches_tracked
    if update == "agwu":
        replayed = labkit.replay(again)
        np.testing.assert_array_equal(replayed.flat("ema"), run.flat("ema"))
        assert replayed.curve().ema_score.tolist()[-1] == curve.ema_score.tolist()[-1]
        assert "ema_score" in labkit.simulate(run, numerics=True, update="sgwu").curve()
        weights, state = checkpoints.read_state(run.path, int(curve.version.iloc[-2]))
        state["ema"]["weights"] = state["ema"]["weights"] + np.float32(1)
        checkpoints.write(run.path, int(curve.version.iloc[-2]), weights, state)
        with pytest.raises(RunError, match="weights of the average up to version"):
            labkit.replay(again)


@pytest.mark.usefixtures("cache")
def test_without_an_average_there_is_none(train, tmp_path, lab):
    run = ended(train(problem(), passes=1))
    assert "ema" not in run.config and "ema" not in run.config.problem and "ema_score" not in run.curve()
    with pytest.raises(RunError, match=r"makes no average of its weights\. Give its problem ema=0\.999"):
        run.model("ema")
    with pytest.raises(ValueError, match=r"ema=1 must be"):
        problem(ema=1.0)
    with pytest.raises(ValueError, match=r"ema=0\.9: subnets have no global weights"):
        labkit.train_subnets(problem(ema=0.9), lab, (2, 2), runs=tmp_path)
