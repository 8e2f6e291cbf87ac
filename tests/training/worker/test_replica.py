"""What a worker does between pull and push, without a worker: the same in every process, and nothing left over for the next one."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from labkit.inner.precision import Precision
from labkit.training.wire.protocol import Grant
from labkit.training.worker.replica import Replica
from tests.helpers import net_with_statistics, problem

pytestmark = pytest.mark.usefixtures("cache")
GRANT = Grant(samples=40, pace=2.0)


def net_with_chance(shape, n_classes):
    return nn.Sequential(*net_with_statistics(shape, n_classes), nn.Dropout(0.5))


def replica(incarnation=0, worker=1, kind=net_with_chance, **options):
    made = Replica(problem(kind, schedule="cosine"), 5, worker, 400, **options)
    made.begin(incarnation)
    made.hold(0, np.arange(60))
    return made


def test_passes_depend_on_seed_worker_and_incarnation_alone():
    def made(*who):
        one = replica(*who)
        found = [one.local_pass(GRANT)["loss"], one.local_pass(replace(GRANT, done=80))["loss"], one.score()]
        return found, one.flat.clone()

    found, weights = made(0, 1)
    again, same = made(0, 1)
    assert found == again and torch.equal(weights, same)
    for other in ((1, 1), (0, 2)):
        assert made(*other)[0] != found


def test_a_pass_reports_step_by_step_and_can_be_halted():
    one, reported = replica(), []
    done = one.local_pass(GRANT, progress=lambda samples, loss: reported.append((samples, float(loss))))
    assert [samples for samples, _ in reported] == [16, 32, 40] and done["samples"] == 40
    assert done["loss"] == pytest.approx(reported[-1][1] / 40) and done["compute_s"] > 0 and done["wait_s"] == 0
    reported.clear()
    one.halted = lambda: len(reported) == 2
    assert one.local_pass(GRANT, progress=lambda *step: reported.append(step)) is None and len(reported) == 2


def test_the_time_that_steps_wait_for_data_is_reported_slowness_and_all(monkeypatch):
    one = replica(after=lambda started, waited=0.0: time.sleep(0.02))
    monkeypatch.setattr(one.problem, "draw", lambda *_: time.sleep(0.01))
    monkeypatch.setattr(one.problem, "step", lambda *_: {"loss": torch.zeros(())})
    done = one.local_pass(GRANT)  # three steps, which do nothing but wait for data, three times as long
    assert 0.5 * done["compute_s"] < done["load_s"] <= done["compute_s"] and done["load_s"] > 0.089
    monkeypatch.setattr(one.problem, "draw", lambda *_: None)
    monkeypatch.setattr(one.problem, "step", lambda *_: time.sleep(0.1) or {"loss": torch.zeros(())})
    done = one.local_pass(GRANT)
    assert done["load_s"] < 0.5 * done["compute_s"] and done["compute_s"] > 0.3


def test_every_piece_of_work_is_followed_by_its_slowness():
    pieces = []
    one = replica(after=lambda started, waited=0.0: pieces.append(waited))
    one.local_pass(GRANT)
    assert len(pieces) == 3
    one.score()
    assert len(pieces) == 4


def test_the_schedule_follows_the_samples_of_all_workers(monkeypatch):
    one, seen = replica(kind=net_with_statistics), []
    monkeypatch.setattr(one.problem, "step", lambda module, batch, optimisers, clock: seen.append(clock) or {"loss": 0.0})
    one.local_pass(Grant(samples=40, done=300, pace=4.0))
    n = len(one.train_indices)
    assert [clock[:3] for clock in seen] == [(300, 400, 300 / n), (364, 400, 364 / n), (400, 400, 400 / n)]


def test_noise_is_of_the_run_the_worker_and_its_incarnation():
    def drawn(one, n=3):
        return torch.randn(n, generator=one.clock(0).generator).tolist()

    made = {}
    for seed, worker, incarnation in ((5, 1, 0), (5, 1, 1), (5, 0, 0), (6, 1, 0)):
        one = Replica(problem(), seed, worker, 400)
        one.begin(incarnation)
        made[seed, worker, incarnation] = drawn(one)
    again, before = replica(), replica()
    assert drawn(again) == made[5, 1, 0] and len({tuple(numbers) for numbers in made.values()}) == 4
    assert again.clock(0).threads == torch.get_num_threads()
    ahead = torch.randn(6, generator=before.clock(0).generator).tolist()
    again = replica()
    drawn(again)
    before.go_on(again)  # as in a new group of an all-reduce: the numbers go on
    assert drawn(before) == ahead[3:]


def test_steps_ahead_are_added_to_what_comes_and_belong_to_the_next_push():
    """The change of the second push is that of the steps that were made since the first one."""
    one = Replica(problem(net_with_statistics), 5, 1, 400)
    one.begin(0)
    one.hold(0, np.arange(60))
    grant = Grant(samples=48, ahead=16, pace=1.0)
    first = one.local_pass(grant)
    pushed = one.flat.clone()
    one.ahead(grant)
    moved, n = one.flat - pushed, one.layout.n_params
    assert first["samples"] == 32 and moved[:n].abs().max() > 0
    news = torch.full_like(pushed, 0.5)
    one.pull(news, carry=16)
    assert torch.equal(one.flat[:n], moved[:n] + 0.5) and torch.equal(one.flat[n:], news[n:])
    last = one.local_pass(Grant(done=48, pace=1.0))
    assert last["samples"] == 16 and last["loss"] > 0 and last["compute_s"] > 0
    one.pull(news, carry=0)
    assert torch.equal(one.flat, news)


def test_it_computes_in_the_precision_that_is_given_and_in_no_other():
    def trained(precision):
        one = replica(kind=net_with_statistics, precision=precision)
        return one.local_pass(GRANT)["loss"], one.flat.clone(), one.problem.precision

    plain, half = trained(None), trained(Precision("bfloat16"))
    mixed, all_kept = (
        trained(Precision("bfloat16", float32={"0": ""})),
        trained(Precision("bfloat16", float32=dict.fromkeys("03", "") | {"6": ""})),
    )
    assert plain[2] == "float32" and half[2] == "bfloat16"
    assert len({plain[0], half[0], mixed[0]}) == 3 and all_kept[0] == plain[0] and torch.equal(all_kept[1], plain[1])
    assert torch.allclose(plain[1], half[1], atol=0.01) and trained(Precision("bfloat16", float32={"0": ""}))[0] == mixed[0]
