"""Replay, exact and counterfactual: the same bits or the first difference, and another rule on the same arrivals.

Tests `labkit/simulation/exact.py`, `counterfactual.py`, `replay.py` and `offline.py`, on runs that they share.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import labkit
from labkit import chaos
from labkit.errors import LabError, ProblemError, RunError
from labkit.plots import style
from labkit.runs import checkpoints
from labkit.runs.events import read_rows
from labkit.runs.files import read_json, write_json
from labkit.training import supervisor
from labkit.training import train as training
from labkit.training.server.coordinator import NO_ROOM
from labkit.updates import make_update
from tests.helpers import Settling, ended, net, net_with_statistics, problem, shortened, until
from tests.simulation.own_rules import Backwards, Cautious, Short, ShortOfBuffers

pytestmark = pytest.mark.usefixtures("cache")
# Beginning with declared speeds: on a busy machine a probe may leave a worker a single sample, which BatchNorm cannot train on.
PARTITIONS = {"udpa": labkit.UDPA(), "idpa": labkit.IDPA(batches=3, speeds=[2, 1])}


def net_with_chance(shape, n_classes):
    return nn.Sequential(*net_with_statistics(shape, n_classes), nn.Dropout(0.2))


class Slow(labkit.Classifier):
    """A step takes 20 ms, so that something can happen in between."""

    pause = 0.02

    def step(self, module, batch, optimisers, clock):
        time.sleep(self.pause)
        return super().step(module, batch, optimisers, clock)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(supervisor, "POLL_S", 0.02)


def two_threads():
    return labkit.connect("threads", 2, slowdown=[1, 3])


@pytest.fixture(scope="module", autouse=True)
def _opened():
    """One lab for the file, opened before its tests, so that it is not taken for something that a test has left behind."""
    two_threads()
    yield
    two_threads().close()


@pytest.fixture
def lab():
    """The lab of the file; a new one where a test has connected another in between."""
    return two_threads()


@pytest.fixture(scope="module")
def made():
    """The runs of this file by their settings: what each test gets is a copy."""
    return {}


@pytest.fixture
def train(lab, made, tmp_path, tmp_path_factory):
    """A run on two threads, the second three times as slow; ended, and the test's own to be changed."""

    def get(a_problem=None, *, name="r", **options):
        a_problem = a_problem or problem(net_with_statistics, schedule="cosine")
        options = {"seed": 5, "passes": 4, "partition": "idpa", "update": "agwu", **options}
        if isinstance(options["partition"], str):
            options["partition"] = PARTITIONS[options["partition"]]
        configs = [a_problem.config(), make_update(options["update"]).config(), options["partition"].config()]
        settings = repr([*configs, options["passes"], options.get("local_steps")])
        if settings not in made:
            folder = tmp_path_factory.mktemp("made")
            made[settings] = ended(labkit.train(a_problem, lab, runs=folder, name="made", **options)).path
        shutil.copytree(made[settings], tmp_path / name)
        write_json(tmp_path / name / "config.json", read_json(made[settings] / "config.json") | {"name": name})
        return labkit.load_run(tmp_path / name, problem=a_problem)

    return get


def same(run, again):
    """The same bits, from the first to the last version, and the same story."""
    assert again.origin == "replay" and again.path != run.path and again.state == run.state
    np.testing.assert_array_equal(run.flat().view(np.uint32), again.flat().view(np.uint32))
    assert checkpoints.versions(again.path) == checkpoints.versions(run.path)
    for version in checkpoints.versions(run.path):
        np.testing.assert_array_equal(run.flat(version), again.flat(version))
    assert read_rows(again.path) == read_rows(run.path)
    return True


def rewrite(run, change):
    """The run, read again after `change(rows)`."""
    rows = read_rows(run.path)
    change(rows)
    (run.path / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return labkit.load_run(run.path, problem=run.problem())


# -- the same again ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("update", "partition"),
    [
        ("sgwu", "udpa"),
        ("agwu", "idpa"),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [("sgwu", "idpa"), ("agwu", "udpa")]),
    ],
)
def test_a_replay_has_the_same_bits(update, partition, train):
    local_steps = 3 if partition == "udpa" else None
    run = train(update=update, partition=partition, local_steps=local_steps)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    again = labkit.replay(str(run.path))
    assert same(run, again)
    assert torch.equal(state, torch.get_rng_state()) and torch.get_num_threads() == threads
    pushes = len(run.events.query("kind == 'push'"))
    assert f"{pushes} local passes and {len(checkpoints.versions(run.path))} kept versions" in again.status()["reason"]
    assert again.name == "r-replay" and "(replay of r), done" in repr(again)
    for key, value in again.summary().items():
        assert value == run.summary()[key] or key in ("name", "origin", "score", "loss"), key
    pick = ["seconds", "samples", "version", "score"]
    np.testing.assert_allclose(again.curve()[pick], run.curve()[pick])


class Drawn:
    """A set of the user's own, with something random in each of its items."""

    def __len__(self):
        return 90

    def __getitem__(self, i):
        return torch.randn(6) + i % 3, i % 3


def scaled(x):
    return x * (1 + torch.rand(len(x), 1))


def test_what_is_random_in_batches_is_drawn_again(lab, tmp_path):
    """Also by threads, which share the global generators."""
    drawing = labkit.Classifier(lambda: nn.Linear(6, 3), Drawn(), batch_size=8, augment=scaled)
    run = labkit.train(drawing, lab, update="agwu", partition="udpa", passes=3, seed=0, name="r", runs=tmp_path)
    run.wait(timeout=100)
    assert same(run, labkit.replay(run, problem=drawing)) and run.summary()["score"] > 0.5


RULES = [
    "delayed-nesterov",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("easgd", "heloco", "gem", "ssp", "diloco", "fedbuff")),
    pytest.param({"name": "fedbuff", "size": 5}, id="fedbuff-5", marks=pytest.mark.slow),
    pytest.param({"name": "ringmaster", "limit": 1}, id="ringmaster-1", marks=pytest.mark.slow),
    pytest.param({"name": "sgwu", "quorum": 0.5, "grace": 0.01}, id="sgwu-quorum"),
]


@pytest.mark.parametrize("update", RULES)
def test_every_kind_of_rule_is_replayed_with_the_same_bits(update, train, monkeypatch):
    """What was thrown away, whom the rule did not wait for any longer, and what it kept back for the end."""
    run = train(problem(net_with_statistics, kind=Slow), update=update, partition="udpa", local_steps=3, passes=3)
    monkeypatch.setattr(Slow, "pause", 0.0)  # nobody waits in a replay
    kinds = set(run.events.kind)
    assert same(run, labkit.replay(run))
    if "limit" in update or "quorum" in update:
        assert "drop" in kinds and ("quorum" in update) == ("expire" in kinds)
    if "size" in update:
        last = run.events.query("kind == 'merge'").groupby("version").size()
        assert (last.iloc[:-1] == 5).all() and last.iloc[-1] <= 5


@pytest.mark.parametrize("rule", [Short(), ShortOfBuffers(size=50)], ids=["merged", "received"])
def test_a_push_for_which_there_was_no_memory_is_replayed(rule, lab, tmp_path, monkeypatch):
    """The server had none for its third merge, or to receive a push after one that was kept for later; a replay has."""
    monkeypatch.setenv("LABKIT_TEST_SHORT", str(tmp_path / "short"))
    (tmp_path / "short").touch()
    run = ended(
        labkit.train(problem(), lab, update=rule, partition=PARTITIONS["udpa"], passes=3, name="short", runs=tmp_path / "runs")
    )
    events = run.events
    assert events.message.dropna().str.endswith(NO_ROOM).sum() == 1 and run.state == "done"
    assert same(run, labkit.replay(run))


def test_an_end_of_a_wait_that_is_not_in_the_record_is_missed(train):
    quorum = {"name": "sgwu", "quorum": 0.5, "grace": 0.01}
    run = train(problem(net_with_statistics, kind=Slow), update=quorum, partition="udpa", local_steps=3, passes=3)
    run = rewrite(run, lambda rows: nth(rows, "expire", 0).update(kind="hold"))
    with pytest.raises(RunError, match=r"differs at event \d+ \(hold\): 'hold' does not follow|by the record, and"):
        labkit.replay(run)


def test_a_replay_of_a_run_read_back_from_its_directory_goes_where_one_says(train, tmp_path):
    run = labkit.load_run(train(labkit.Classifier("lenet", "digits", train_samples=120, score_samples=20), passes=1).path)
    again = labkit.replay(run, name="again", runs=tmp_path / "elsewhere")
    assert same(run, again) and again.path == tmp_path / "elsewhere" / "again"
    assert same(run, labkit.replay(run, name="again", runs=tmp_path / "elsewhere")), "the earlier one is kept under a number"


def test_a_run_that_was_stopped_and_one_that_failed_are_replayed_to_their_ends(lab, tmp_path):
    run = labkit.train(problem(kind=Slow), lab, runs=tmp_path, passes=1000, local_steps=2, name="stopped")
    until(lambda: run.status()["version"] >= 3)
    assert same(run.stop(), labkit.replay(run))
    run = labkit.train(problem(lr=1e18), lab, runs=tmp_path, passes=1000, local_steps=2, name="failed", update="sgwu")
    with pytest.raises(LabError, match="NaN or infinity"):
        run.wait(100)
    again = labkit.replay(run)
    assert same(run, again) and "NaN or infinity" in again.status()["reason"]


def test_a_run_that_began_without_a_worker_is_replayed(lab, tmp_path, monkeypatch):
    start = supervisor.Supervisor._start_worker
    monkeypatch.setattr(supervisor.Supervisor, "_start_worker", lambda self, index: index == 1 or start(self, index))
    run = ended(labkit.train(problem(), lab, runs=tmp_path, passes=2, name="r", workers=[0, 1]))
    assert run.events.query("kind == 'missing'").worker.tolist() == [1]
    assert same(run, labkit.replay(run))


def test_another_rule_of_a_resumed_run_is_refused_before_anything_is_written_with_what_can_be_done(lab, tmp_path):
    run = labkit.train(problem(kind=Slow), lab, runs=tmp_path, passes=100, local_steps=2, name="r", checkpoints=5)
    for _ in range(2):
        version = run.status().get("version", 0)
        until(lambda: run.status().get("version", 0) > version)  # noqa: B023
        run = run.stop() if run.config.resumed else labkit.resume(run.stop().path, lab, problem=run.problem())
    with pytest.raises(RunError, match=r"r was resumed.* labkit\.replay\(run\) .*labkit\.simulate\(run, update="):
        labkit.replay(run, update="sgwu")
    assert os.listdir(tmp_path) == ["r"]
    assert same(run, labkit.replay(run)) and labkit.simulate(run, update="sgwu").origin == "simulated"


@pytest.mark.slow
def test_a_run_that_was_cut_off_and_resumed_is_replayed(lab, tmp_path, capsys):
    run = labkit.train(problem(kind=Slow), lab, runs=tmp_path, passes=8, local_steps=2, name="r", checkpoints=5)
    until(lambda: run.status()["version"] >= 9)
    chaos.kill_server(run)
    with pytest.raises(LabError):
        run.wait(100)
    cut = labkit.replay(labkit.load_run(run.path, problem=run.problem()), name="cut")
    assert cut.state == "failed" and checkpoints.versions(cut.path)[-1] >= checkpoints.versions(run.path)[-1]
    again = ended(labkit.resume(run.path, lab, problem=run.problem()))
    [version] = again.events.query("kind == 'resume'").version
    assert version in checkpoints.versions(again.path)
    assert same(again, labkit.replay(again))
    with pytest.raises(RunError, match="run r was resumed"):
        labkit.replay(again, update="sgwu")


def in_a_notebook(base):
    """A class such as `base`, as a notebook cell defines it."""
    cell = {"__name__": "__main__", "base": base}
    exec(f"class {base.__name__}(base):\n    pass", cell)
    return cell[base.__name__]


@pytest.fixture(params=[lambda base: base, in_a_notebook], ids=["module", "notebook"])
def own(request):
    """Update and partition of the user's own, and how they are given again where the record holds no import path."""

    def rules():
        return {"update": request.param(Cautious)(0.3, quality="raw"), "partition": request.param(Backwards)(step=2.0)}

    return rules, rules if request.param is in_a_notebook else dict


def test_a_run_with_an_update_and_a_partition_of_the_users_own_is_resumed_and_replayed(own, lab, tmp_path, monkeypatch):
    rules, given = own
    run = labkit.train(problem(kind=Slow), lab, runs=tmp_path, passes=1000, local_steps=2, checkpoints=20_000, **rules())
    until(lambda: run.status()["version"] >= 4)
    shortened(run.stop(), 400)
    assert run.name == "Cautious-Backwards-seed0" and run.label == "Cautious + Backwards"
    if given is rules:
        for what in ("update", "partition"):
            with pytest.raises(
                RunError, match=rf"the {what} of run .* Give the object itself.* labkit.resume\(.*, {what}={what}.*\)"
            ):
                labkit.resume(run.path, lab, problem=run.problem(), **{key: rule for key, rule in rules().items() if key != what})
    with pytest.raises(RunError, match=r"this update is not the one of run .*'share': 0\.4"):
        labkit.resume(run.path, lab, problem=run.problem(), update=type(rules()["update"])(0.4, quality="raw"))
    run = ended(labkit.resume(run.path, lab, problem=run.problem(), **given()))
    events = run.events
    assert events.query("kind == 'merge'").version.max() > 10 and chaos.audit(run) == []
    held = events.query("kind == 'allocate'").groupby("worker").total.max()
    assert held[1] > 2 * held[0], "the partition of the user's own was forgotten"
    monkeypatch.setattr(Slow, "pause", 0.0)
    run = labkit.load_run(run.path, problem=run.problem())
    assert same(run, labkit.replay(run, **given()))
    assert run.summary()["update"] == "Cautious" and labkit.compare([run]).index.tolist() == ["Cautious + Backwards"]
    assert "Cautious + Backwards" in repr(run)


def test_what_else_would_have_been_and_what_would_be_with_rules_of_a_notebook(train, capsys):
    run = train(update=in_a_notebook(Cautious)(0.3), partition=in_a_notebook(Backwards)())
    rules = {"update": in_a_notebook(Cautious)(0.3), "partition": in_a_notebook(Backwards)()}
    for what in rules:
        for again in ("replay", "simulate"):
            with pytest.raises(
                RunError, match=rf"the {what} of run r is not known here.* labkit.{again}\(run, .*{what}={what}.*\)"
            ):
                getattr(labkit, again)(run, **{key: rule for key, rule in rules.items() if key != what})
    other = labkit.replay(run, update="sgwu", partition=rules["partition"])
    assert other.origin == "counterfactual" and other.label == "SGWU + Backwards (counterfactual)"
    assert labkit.replay(train(name="other"), update=rules["update"]).name == "other-replay-Cautious"
    again = labkit.simulate(run, **rules, n_workers=3)
    assert again.config["origin"]["error"] is not None and again.label == "Cautious + Backwards (simulated)"
    capsys.readouterr()
    run = labkit.load_run(run.path)
    assert labkit.simulate(run, update="sgwu", partition="idpa").config["origin"]["error"] is None
    assert "There is no comparison with the run as it was: the update of run r is not known here" in capsys.readouterr().out


class Named(labkit.AGWU):
    name = "named"


def test_a_rule_that_was_recorded_by_its_own_name_is_replayed_with_its_object(train):
    """As labkit did before format 3."""
    run = train()
    config = read_json(run.path / "config.json")
    write_json(run.path / "config.json", {**config, "format": 2, "update": {"name": "named", "quality": "normalised"}})
    run = labkit.load_run(run.path, problem=run.problem())
    assert run.label == "named + IDPA" and same(run, labkit.replay(run, update=Named()))
    with pytest.raises(RunError, match="update='named' is not known"):
        labkit.replay(run)


def net_in_part_frozen(shape, n_classes):
    made = net(shape, n_classes)
    made[1].requires_grad_(False)
    made.register_buffer("scale", torch.full((3,), 0.1))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("still", [True, False])
def test_what_is_frozen_keeps_its_bits_and_older_records_theirs(still, lab, tmp_path, monkeypatch):
    """Before format 5 the mean of equal weights was rounded, and a replay does that again."""
    configure = training.configure
    monkeypatch.setattr(training, "configure", lambda *given, **named: configure(*given, **named).replace(still=still))
    options = {"update": "sgwu", "partition": labkit.IDPA(batches=3, speeds=[2, 1]), "passes": 8, "seed": 5, "runs": tmp_path}
    run = ended(labkit.train(problem(net_in_part_frozen, ema=0.9), lab, name="r", **options))
    state, first = run.model("ema").network.state_dict(), run.weights(0)
    kept = [
        (np.array_equal(run.weights()[n], first[n]), np.array_equal(state[n], first[n])) for n in ("1.weight", "1.bias", "scale")
    ]
    assert not np.array_equal(run.weights()["3.weight"], first["3.weight"])
    assert same(run, labkit.replay(run)) and (kept == [(True, True)] * 3 if still else (True, True) not in kept)


# -- or where it differs -----------------------------------------------------------------------------------------------


def nth(rows, kind, n=2):
    return [row for row in rows if row["kind"] == kind][n]


TAMPERED = {
    "score": (
        lambda rows: nth(rows, "push").update(score=0.123),
        r"differs at event \d+ \(push of worker \d\): its score is 0.123",
    ),
    "coefficient": (
        lambda rows: nth(rows, "merge").update(coefficient=0.5),
        r"event \d+ \(merge .*coefficient is 0.5 by the record",
    ),
    "samples": (lambda rows: nth(rows, "push").update(samples=7), r"event \d+ \(push of worker \d\): its samples is 7"),
    "worker": (lambda rows: nth(rows, "push").update(worker=9), r"event \d+ \(push of worker 9\): worker 9 is not there"),
    "pace": (lambda rows: nth(rows, "push", 0).update(compute_s=50.0), r"differs at event \d+ "),
    "hole": (lambda rows: rows.remove(nth(rows, "push")), r"event \d+ is missing or out of place"),
    "end": (lambda rows: rows.__delitem__(slice(len(rows) // 2, None)), r"holds \d+ of \d+ events. The end of it is missing"),
    "nothing": (lambda rows: rows.clear(), r"holds 0 of \d+ events. The end of it is missing"),
    "alien": (lambda rows: nth(rows, "merge").update(kind="merger"), r"line \d+ is damaged: 'merger' is not known"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_record_that_was_tampered_with_is_told_from_a_true_one(what, train):
    change, words = TAMPERED[what]
    run = rewrite(train(), change)
    with pytest.raises(RunError, match=words):
        labkit.replay(run)


def test_a_version_that_the_run_did_not_make_is_found(train):
    run = train()
    version = checkpoints.versions(run.path)[2]
    weights, state = checkpoints.read_state(run.path, version)
    weights = np.array(weights)
    weights[3] = np.nextafter(weights[3], np.float32(9))
    checkpoints.write(run.path, version, weights, state)
    with pytest.raises(RunError, match=rf"1 of \d+ weights of version {version} differ, by .*e-"):
        labkit.replay(run)
    assert "differs" in labkit.load_run(run.path.with_name("r-replay"), problem=run.problem()).status()["reason"]


def test_another_machine_is_named_where_bits_differ(train):
    run = train()
    environment = read_json(run.path / "environment.json")
    environment["versions"]["torch"] = "0.4.1"
    write_json(run.path / "environment.json", environment)
    with pytest.raises(RunError, match=r"It was made with torch 0\.4\.1, which is not what is here"):
        labkit.replay(rewrite(run, lambda rows: nth(rows, "push").update(loss=0.1)))


def test_what_is_refused_before_a_first_push_leaves_no_run_behind(train, tmp_path):
    """Whether it shows in the settings, as the course begins, or in its first local pass."""
    run, chance = train(), train(problem(net_with_chance), name="chance")
    few = labkit.UDPA(stratified=True)
    few.start = lambda *_, **__: 1 / 0
    calls = (
        lambda: labkit.replay(chance),
        lambda: labkit.replay(run, update="allreduce"),
        lambda: labkit.simulate(run, n_workers=1000),
        lambda: labkit.simulate(run, partition=few, numerics=True),
    )
    there = sorted(os.listdir(tmp_path))
    for call in calls:
        with pytest.raises((LabError, ValueError, ZeroDivisionError)):
            call()
        assert sorted(os.listdir(tmp_path)) == there
    assert labkit.compare(tmp_path).index.size == 2


@pytest.mark.slow
def test_what_cannot_be_replayed_says_why(train, lab, tmp_path):
    with pytest.raises(RunError, match="threads that shared one generator"):
        labkit.replay(train(problem(net_with_chance), name="chance"))
    run = train()
    with pytest.raises(RunError, match="exchange gradients within every step"):
        labkit.replay(run, update="allreduce")
    with pytest.raises(RunError, match="run r-replay is a replay itself"):
        labkit.replay(labkit.replay(run))
    with pytest.raises(RunError, match="this problem is not the one of run r: lr"):
        labkit.replay(run, problem=problem(net_with_statistics, schedule="cosine", lr=0.1))
    with pytest.raises(RunError, match=r"computed on cuda:0, .*cannot be replayed bit for bit"):
        labkit.replay(rewrite(run, lambda rows: nth(rows, "join", 1).update(device="cuda:0")))
    unscored = rewrite(run, lambda rows: [row.update(score=None) for row in rows if row["kind"] == "push"])
    for again in (labkit.replay, partial(labkit.simulate, numerics=True)):
        with pytest.raises(ProblemError, match=r"has no score, as no push of run r has one, and sgwu weighs pushes by it"):
            again(unscored, update={"name": "sgwu", "quorum": 0.5})
    write_json(run.path / "config.json", {**run.config, "format": 1})
    with pytest.raises(RunError, match=r"before there were replays \(format 1\): .* Train it again"):
        labkit.replay(labkit.load_run(run.path, problem=run.problem()))
    goes = labkit.train(problem(kind=Slow), lab, runs=tmp_path, passes=1000, name="goes")
    with pytest.raises(RunError, match="run goes is still running"):
        labkit.replay(goes)
    goes.stop()


def test_progress_is_shown(train, capsys, monkeypatch):
    monkeypatch.setattr("labkit.plots.progress.EVERY_S", 0.0)
    labkit.replay(train())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("replay of r: ")]
    assert len(lines) > 2 and "100%, 748 of 748 samples" in lines[-1]


# -- another rule on the same arrivals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["sgwu", "agwu"])
def test_a_counterfactual_says_so_and_trains_on_the_whole_budget(update, train):
    run = train(update=update)
    other = labkit.replay(run, update={"sgwu": "agwu", "agwu": "sgwu"}[update])
    assert other.state == "done" and other.origin == other.summary()["origin"] == "counterfactual"
    assert other.label.endswith("+ IDPA (counterfactual)") and f"(counterfactual of {run.name}), done" in repr(other)
    assert "counterfactual" in style.caption([other]) and other.name == f"r-replay-{other.config['update']['name']}"
    assert other.summary()["samples"] == run.summary()["samples"] == run.config["budget"]
    assert not np.array_equal(run.flat(), other.flat()) and len(other.curve()) > 2
    merges = other.events.query("kind == 'merge'")
    assert list(other.events.seq) == list(range(len(other.events))) and other.events.seconds.dropna().is_monotonic_increasing
    assert merges.version.drop_duplicates().tolist() == list(range(1, int(merges.version.max()) + 1))
    if update == "agwu":  # now with a barrier: all workers in each version, until only one has anything left
        assert (merges.staleness == 0).all() and (merges.groupby("version").worker.count().iloc[:-1] == 2).all()
    else:
        assert merges.version.is_unique and merges.staleness.max() >= 1


def test_without_barriers_another_rule_has_the_very_same_arrivals(train):
    """Who pushes when, how much and from which version: only the weights differ."""
    run = train(update="agwu")
    other = labkit.replay(run, update=labkit.AGWU("raw"))
    columns = ["worker", "incarnation", "pass", "base_version", "staleness", "samples", "total", "compute_s"]
    for kind in ("push", "allocate", "merge"):
        then, now = (r.events[r.events.kind == kind][columns].reset_index(drop=True) for r in (run, other))
        assert then.equals(now), kind
    assert not np.array_equal(run.flat(), other.flat())
    assert same(run, labkit.replay(run, update=run.config["update"])), "its own rule is no other rule"


@pytest.mark.parametrize(
    "update", ["fedbuff", "delayed-nesterov", {"name": "ringmaster", "limit": 1}, {"name": "sgwu", "quorum": 0.5, "grace": 0.01}]
)
def test_what_another_rule_throws_away_is_trained_on_again(update, train):
    run = train(update="agwu", partition="udpa", local_steps=3)
    other = labkit.replay(run, update=update)
    merges, drops = other.events.query("kind == 'merge'"), other.events.query("kind == 'drop'")
    assert other.state == "done" and merges.samples.sum() == run.config["budget"] == other.summary()["samples"]
    assert len(other.events.query("kind == 'push'")) == len(merges) + len(drops) and (drops.staleness > 0).all()
    assert bool(len(drops)) == isinstance(update, dict)


def test_a_counterfactual_can_be_made_again(train):
    run = train(problem(net_with_chance))
    first, second = (labkit.replay(run, update="sgwu", name=name) for name in "ab")
    np.testing.assert_array_equal(first.flat(), second.flat())


# -- processes: these close the lab of the file -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_rules_with_and_without_a_barrier_are_replayed_from_two_processes_of_two_threads(tmp_path):
    """With chance, statistics, momentum and a schedule."""
    with labkit.connect("dask", 2, threads_per_worker=2, slowdown=[1, 2]) as lab:
        for update, partition, steps in [("sgwu", "idpa", None), ("delayed-nesterov", "udpa", 3)]:
            settings = {"update": update, "partition": PARTITIONS[partition], "local_steps": steps, "passes": 4, "name": update}
            a_problem = problem(net_with_chance, schedule="cosine", weight_decay=0.01)
            run = ended(labkit.train(a_problem, lab, runs=tmp_path, **settings), timeout=200)  # new processes import torch first
            assert same(run, labkit.replay(run)), update


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(400)
def test_kills_joins_and_refusals_are_replayed(tmp_path, monkeypatch):
    with labkit.connect("dask", 2) as lab:
        a_problem = problem(net_with_chance, kind=Slow)
        run = labkit.train(
            a_problem, lab, runs=tmp_path, passes=400, local_steps=4, name="r", partition=PARTITIONS["idpa"], heartbeat_timeout=1.0
        )
        until(lambda: run.status()["version"] >= 3, 90)
        chaos.drop_link(run, 0)
        chaos.freeze(lab, 1)
        until(lambda: "1" not in run.status()["workers"])
        chaos.thaw(lab, 1)
        until(lambda: "refuse" in set(run.events.kind))
        until(lambda: "1" in run.status()["workers"])
        lab.add(1)
        until(lambda: "2" in run.status()["workers"])
        chaos.kill(lab, 0)
        until(lambda: run.events.query("kind == 'join' and worker == 0").incarnation.max() >= 2)
        version = run.status()["version"]
        until(lambda: run.status()["version"] > version + 20)
        run.stop()
    monkeypatch.setattr(Slow, "pause", 0.0)  # here: nobody waits in a replay
    kinds = run.events.groupby(["kind", "worker"]).size()
    assert kinds["join", 0] >= 3 and kinds["join", 1] >= 2 and kinds["join", 2] >= 1 and kinds["refuse", 1] >= 1
    assert same(run, labkit.replay(run))
    other = labkit.replay(run, update="sgwu")
    assert other.origin == "counterfactual" and other.summary()["samples"] > 0


# -- milestones --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "update", ["agwu", pytest.param("sgwu", marks=pytest.mark.slow), pytest.param("fedbuff", marks=pytest.mark.slow)]
)
def test_milestones_are_replayed_and_simulated(update, train):
    run = train(problem(net_with_statistics, kind=Settling), update=update, passes=3)
    events = run.events
    assert len(events[events.kind == "settle"]) == 2 and same(run, labkit.replay(run))
    for other in (labkit.replay(run, update="easgd"), labkit.simulate(run, update="sgwu"), labkit.simulate(run, numerics=True)):
        rows = other.events
        assert other.state == "done" and (rows.kind == "settle").sum() == 2
        assert rows.total[rows.kind == "settle"].tolist() == list(run.config.milestones)
    longer = labkit.simulate(run, samples=2 * run.config.n_train)
    assert list(longer.config.milestones) == [2 * samples for samples in run.config.milestones]
