"""What holds under every update rule: one worker, refusals, members that come and go, states that are saved and restored."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import labkit
from labkit.errors import UpdateError
from labkit.runs import checkpoints
from labkit.runs.files import write_json
from labkit.updates import AGWU, SGWU, UPDATES, BadPush, FedBuff, Push, Update, base, make_update, names

OTHERS = [{"name": "sgwu", "quorum": 0.5}, {"name": "sgwu", "quorum": 0.5, "grace": 3.0}, {"name": "ssp", "bound": 0}]
OTHERS += [{"name": "downpour", "optimiser": "momentum"}, {"name": "downpour", "optimiser": "adam"}]
OTHERS += [{"name": "ringmaster", "limit": 1}, {"name": "fedbuff", "size": 4}, {"name": "fedasync", "fading": "hinge"}]
OTHERS += [
    {"name": "downpour", "lr": 3.0},
    {"name": "rescaled", "most": 50.0},
    {"name": "delayed-nesterov", "period": 4},
    {"name": "localsgd", "weighting": "samples"},
    {"name": "easgd", "beta": 1.0},
]
ALL = [*UPDATES, *OTHERS]
PLAIN = {  # settings with which one worker is plain local training
    **{name: {} for name in ("sgwu", "localsgd", "allreduce", "agwu", "downpour", "fedbuff", "ssp", "ringmaster", "rescaled")},
    "fedasync": {"alpha": 1.0},
    "diloco": {"lr": 1.0, "momentum": 0.0},
    "delayed-nesterov": {"lr": 1.0, "momentum": 0.0},
    "heloco": {"lr": 1.0, "momentum": 0.0, "keep": -1.0},
}
EXACT = ("sgwu", "localsgd", "allreduce", "fedasync")  # these bit for bit


def called(rule):
    return "-".join(map(str, rule.values())) if isinstance(rule, dict) else rule


every_rule = pytest.mark.parametrize("rule", ALL, ids=called)


def vector(*values):
    return np.array(values, np.float32)


def started(rule, weights=(1.0, 2.0), workers=(0, 1), n_buffers=0):
    rule.start(vector(*weights), workers, n_buffers)
    return rule


def push(rule, worker, weights, score=0.5, samples=10):
    return rule.push(Push(worker, rule.bases[worker], vector(*weights), score, samples))


def bits(value):
    """A state as something that is equal only if each bit is."""
    if isinstance(value, dict):
        return {key: bits(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(part) for part in value]
    return (value.dtype.str, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value


class Life:
    """A rule through random pushes, joins, leaves and deadlines, and what has come of it.

    The last 2 of 7 weights are buffers in [0.1, 2], as variances are.
    """

    def __init__(self, rule, seed=0, workers=(0, 1, 2)):
        self.rule, self.chance = rule, np.random.default_rng(seed)
        self.rule.start(self.weights(), workers, 2, [3, 2])
        self.ready = dict.fromkeys(workers, self.rule.weights)  # who may push, from which weights
        self.pushed = self.merged = self.dropped = self.lost = 0  # samples
        self.held: dict[int, int] = {}  # worker -> samples of a push that is not merged yet

    def weights(self):
        return np.concatenate([self.chance.normal(size=5), self.chance.uniform(0.1, 2, 2)]).astype(np.float32)

    def copy(self):
        other = object.__new__(Life)
        vars(other).update(vars(self), ready=dict(self.ready), held=dict(self.held))
        other.chance = np.random.default_rng()
        other.chance.bit_generator.state = self.chance.bit_generator.state
        other.rule = make_update(self.rule.config())
        other.rule.load_state_dict(self.rule.state_dict())
        return other

    def act(self, push_only=False):
        """One thing at random."""
        rule, dice = self.rule, 1.0 if push_only else self.chance.random()
        before, version = rule.weights, rule.version
        if dice < 0.08 or not rule.bases:
            worker = int(self.chance.integers(5))
            self.forget(worker)
            replies = rule.join(worker)
        elif dice < 0.16:
            worker = int(self.chance.choice(sorted(rule.bases)))
            self.forget(worker)
            replies = rule.leave(worker)
        elif dice < 0.24 and rule.deadline is not None:
            replies = rule.expire()
        else:
            assert self.ready, "everybody waits"
            replies = self.push(int(self.chance.choice(sorted(self.ready))))
        assert rule.version - version in (0, 1) and (rule.version > version) == bool(rule.merges)
        assert rule.version > version or rule.weights is before
        self.take(replies)

    def push(self, worker):
        rule, base = self.rule, self.ready.pop(worker)
        weights = self.weights()
        weights[:5] = base[:5] + 0.1 * weights[:5]
        if rule.collective:  # replicas are equal
            weights = base + np.float32(0.1)
        samples = int(self.chance.integers(1, 9))
        self.pushed, self.held[worker] = self.pushed + samples, samples
        given = weights.copy()
        replies = rule.push(Push(worker, rule.bases[worker], weights, float(self.chance.random()), samples))
        assert (weights == given).all(), "a push is only read"
        if any(reply.worker == worker for reply in replies):
            del self.held[worker]  # taken in, whatever becomes of it
            weights[:] = np.nan  # its buffer belongs to the next push
        return replies

    def take(self, replies):
        rule = self.rule
        for reply in replies:
            assert reply.worker not in self.ready and reply.worker in rule.bases, "released, and not waiting"
            assert reply.version == rule.version == rule.bases[reply.worker]
            assert reply.weights is rule.weights or rule.name == "easgd"
            assert not reply.weights.flags.writeable
            assert rule.collective or (reply.weights[5:].min() >= 0.1 - 1e-5 and reply.weights[5:].max() <= 2 + 1e-5)
            self.ready[reply.worker] = reply.weights
        self.count()

    def count(self):
        self.merged += sum(merge.samples for merge in self.rule.merges)
        self.dropped += sum(merge.samples for merge in self.rule.drops)
        assert all(merge.version == self.rule.version and merge.staleness >= 0 for merge in self.rule.merges)
        for merge in self.rule.merges:
            self.held.pop(merge.worker, None)
        assert np.isfinite(self.rule.weights).all() and not self.rule.weights.flags.writeable

    def forget(self, worker):
        self.ready.pop(worker, None)
        self.lost += self.held.pop(worker, 0)


# -- properties of all -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
def test_with_one_worker_and_plain_settings_a_rule_is_plain_training(name):
    """EASGD and GEM are not here: their workers have weights, or a speed, of their own."""
    rule, rng = started(make_update({"name": name, **PLAIN[name]}), workers=[0], n_buffers=1), np.random.default_rng(0)
    for _ in range(20):
        values = np.abs(rng.standard_normal(2)).astype(np.float32)
        push(rule, 0, values, 1.0)
        assert rule.weights == pytest.approx(values, abs=1e-6)
        assert name not in EXACT or rule.weights.tobytes() == values.tobytes()


@every_rule
def test_whoever_comes_and_goes_every_push_is_merged_or_dropped_once_and_buffers_stay_in_their_range(rule):
    """And: versions grow by one, are never written, nobody who has its answer is answered again (all in `Life`)."""
    for seed in range(8):
        life = Life(make_update(rule), seed)
        for _ in range(120):
            life.act()
        life.rule.finish()
        life.count()
        assert life.pushed == life.merged + life.dropped + life.lost and not life.held
        assert life.rule.version > 5


@every_rule
def test_whoever_waits_is_released_as_long_as_somebody_pushes(rule):
    for seed in range(8):
        life = Life(make_update(rule), seed, workers=(0, 1, 2, 3))
        for _ in range(int(life.chance.integers(5, 60))):
            life.act()
        for _ in range(4):
            waiting = set(life.rule.bases)
            for _ in range(200):
                waiting -= set(life.ready)
                if not waiting:
                    break
                life.act(push_only=True)
            assert not waiting, f"workers {waiting} are never released (seed {seed})"


@every_rule
def test_a_state_that_is_saved_half_way_has_the_same_future_bit_for_bit(rule):
    for seed in range(8):
        life = Life(make_update(rule), seed)
        for _ in range(20 + 7 * seed):
            life.act()
        state = life.rule.state_dict()
        saved, other = bits(state), life.copy()
        for _ in range(60):
            life.act(), other.act()
            assert [vars(life.rule)[key] == vars(other.rule)[key] for key in ("version", "merges", "drops")] == [True] * 3
        assert bits(life.rule.state_dict()) == bits(other.rule.state_dict()) and life.ready.keys() == other.ready.keys()
        assert bits(state) == saved, "what was saved has been written into"


@every_rule
def test_a_run_that_goes_on_from_a_checkpoint_has_the_same_future_bit_for_bit(rule, tmp_path):
    """One worker, so that nothing is under way between two pushes; what EASGD and GEM keep of a worker is lost with it."""
    write_json(tmp_path / "config.json", {"id": "mine"})
    (tmp_path / "checkpoints").mkdir()
    life = Life(make_update(rule), 3, workers=[0])
    for _ in range(9):
        life.act(push_only=True)
    life.rule.finish()
    life.forget(0)
    life.take(life.rule.join(0))
    checkpoints.write(tmp_path, life.rule.version, life.rule.weights, life.rule.lasting())
    other, again = life.copy(), make_update(life.rule.config())
    weights, lasting = checkpoints.read_state(tmp_path, life.rule.version)
    again.go_on(weights, [0], 2, lasting)
    other.rule, other.ready = again, {0: again.weights}
    for _ in range(9):
        life.act(push_only=True), other.act(push_only=True)
        assert life.rule.version == other.rule.version and life.rule.weights.tobytes() == other.rule.weights.tobytes()


@every_rule
def test_a_restart_forgets_what_was_and_releases_everybody(rule):
    life = Life(make_update(rule))
    for _ in range(40):
        life.act()
    own, version, weights = life.rule, life.rule.version, life.weights()
    with pytest.raises(UpdateError, match="cannot be version"):
        own.restart(weights * np.float32(np.nan), [0, 4])
    with pytest.raises(UpdateError, match="cannot be version"):
        own.restart(weights[1:], [0, 4])
    assert own.version == version
    replies = own.restart(weights, [4, 0])
    assert [(reply.worker, reply.version) for reply in replies] == [(0, version + 1), (4, version + 1)]
    assert all((reply.weights == weights).all() for reply in replies) and not own.weights.flags.writeable
    fresh = make_update(rule)
    fresh.start(weights, [0, 4], 2, [3, 2])
    fresh._release([0, 4])
    kept = {"version", "bases"}
    assert bits({k: v for k, v in own.state_dict().items() if k not in kept}) == bits(
        {k: v for k, v in fresh.state_dict().items() if k not in kept}
    )
    life.ready, life.held = {reply.worker: reply.weights for reply in replies}, {}
    for _ in range(40):
        life.act()


@every_rule
def test_a_bad_push_is_refused_and_changes_nothing(rule):
    rule = started(make_update(rule), workers=(0, 1, 2))
    push(rule, 1, (3, 4))
    before = bits(rule.state_dict())
    for bad, message in [
        (Push(0, 0, vector(math.nan, 1), 0.5, 10), "NaN or infinity"),
        (Push(0, 0, vector(math.inf, 1), 0.5, 10), "NaN or infinity"),
        (Push(0, 0, vector(1, 2, 3), 0.5, 10), r"shape \(3,\)"),
        (Push(0, 0, np.zeros(2), 0.5, 10), "float64"),
        (Push(0, 0, vector(1, 2), 1.5, 10), "score is 1.5"),
        (Push(0, 0, vector(1, 2), math.nan, 10), "score is nan"),
        (Push(0, 3, vector(1, 2), 0.5, 10), "last given version 0"),
        (Push(7, 0, vector(1, 2), 0.5, 10), "not a member"),
    ]:
        with pytest.raises(UpdateError, match=message):
            rule.push(bad)
        assert bits(rule.state_dict()) == before


@every_rule
def test_only_who_pushes_large_weights_is_refused(rule):
    """Whatever a rule remembers of them: who pushes what it was given, a little changed, never is, now or later."""
    for large in (1e38, 3.4e38):
        made, chance = make_update(rule), np.random.default_rng(0)
        if made.collective:  # its replicas are equal
            continue
        made.start(chance.normal(size=7).astype(np.float32), [0, 1, 2], 2, [3, 2])
        own = dict.fromkeys(made.bases, made.weights)
        for turn in range(20):
            for worker in sorted(own):
                weights = own.pop(worker) + np.float32(0.01) if worker else np.full(7, large * (-1) ** (turn // 3), np.float32)
                before = bits(made.state_dict())
                try:
                    replies = made.push(Push(worker, made.bases[worker], weights, 0.5, 10))
                except BadPush:
                    assert worker == 0, f"turn {turn}: an innocent one"
                    assert bits(made.state_dict()) == before
                    replies = [*made.leave(0), *made.join(0)]
                own.update({reply.worker: reply.weights for reply in replies})
            assert np.isfinite(made.weights).all() and own


@pytest.mark.parametrize("rule", ["sgwu", "agwu", "fedasync"])
def test_a_merge_that_goes_through_memory_in_pieces_has_the_bits_of_the_formula(rule):
    rng = np.random.default_rng(0)
    old, new, other = rng.standard_normal((3, 2 * base.CHUNK + 3)).astype(np.float32)
    rule = started(make_update(rule), old)
    rule.push(Push(0, 0, new, 0.3, 10))
    before, share = rule.weights, np.float32
    rule.push(Push(1, 0, other, 0.6, 10))
    if rule.name == "sgwu":
        a, b = (merge.coefficient for merge in rule.merges)
        wanted = new * share(a) + other * share(b)
    elif rule.name == "agwu":
        wanted = (other - old) * share(rule.merges[0].coefficient) + before
    else:
        a = rule.share(1)
        wanted = before * share(1 - a) + other * share(a)
    assert np.array_equal(rule.weights, wanted) and not np.array_equal(before, wanted)


@every_rule
def test_who_joins_gets_the_current_version_and_may_push(rule):
    rule = started(make_update(rule), workers=[0])
    push(rule, 0, (5, 5))
    replies = rule.join(1)
    if rule.name in ("sgwu", "localsgd", "allreduce", "diloco"):  # with the next round, when the one under way is over
        assert replies == []
        with pytest.raises(UpdateError, match="it begins with the next round"):
            push(rule, 1, (5, 5))
        replies = push(rule, 0, (5, 5))
        assert [r.worker for r in replies] == [0, 1]
    assert replies[-1].version == rule.version and replies[-1].weights.tolist() == rule.weights.tolist()
    version = rule.version
    push(rule, 1, (5, 5)), push(rule, 0, (5, 5))
    rule.finish()
    assert rule.version > version


@every_rule
def test_settings_come_back_from_their_config(rule):
    made = make_update(rule)
    assert make_update(made.config()).config() == made.config()
    assert made.config().items() >= (rule if isinstance(rule, dict) else {"name": rule}).items()


# -- names and settings ------------------------------------------------------------------------------------------------


def test_names():
    assert names()[0] == "sgwu" and len(names()) == len(set(names())) == 15
    assert isinstance(make_update("AGWU"), AGWU) and make_update({"name": "agwu", "quality": "raw"}).quality == "raw"
    assert make_update(rule := FedBuff(size=4)) is rule
    with pytest.raises(ValueError, match=r"update='sgwo' is not known\. Known: sgwu, localsgd, .*heloco\. Did you mean 'sgwu'"):
        make_update("sgwo")
    with pytest.raises(ValueError, match=r"fedbuff has no setting 'sise'\. It has: size, lr, power\. Did you mean 'size'"):
        make_update({"name": "fedbuff", "sise": 4})
    with pytest.raises(ValueError, match=r"allreduce has no setting 'lr'\. It has: buffers, tolerance, sync_batchnorm\."):
        make_update({"name": "allreduce", "lr": 4})


def test_each_rule_is_in_labkit_updates_and_three_of_them_are_public_names_of_labkit():
    rules = {rule.__name__ for rule in UPDATES.values()}
    assert rules <= set(labkit.updates.__all__) and all(UPDATES[getattr(labkit.updates, rule).name] for rule in rules)
    assert rules & set(labkit.__all__) == {"SGWU", "AGWU", "AllReduce"}
    assert labkit.AGWU is labkit.updates.AGWU


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "agwu", "quality": "best"}, "AGWU: quality='best' is not known. Known: normalised, raw."),
        ({"name": "sgwu", "quorum": 0}, "SGWU: quorum=0 must be above 0 and at most 1."),
        ({"name": "sgwu", "grace": math.inf}, "SGWU: grace=inf must be at least 0 and finite."),
        ({"name": "fedasync", "alpha": "much"}, "FedAsync: alpha='much' must be a number, not str."),
        ({"name": "fedasync", "fading": "linear"}, "FedAsync: fading='linear' is not known."),
        ({"name": "fedbuff", "size": 0}, "FedBuff: size=0 must be at least 1."),
        ({"name": "fedbuff", "size": 2.5}, "FedBuff: size=2.5 must be a whole number, not float."),
        ({"name": "downpour", "optimiser": "rmsprop"}, "Downpour: optimiser='rmsprop' is not known. Known: sgd, momentum, adam."),
        ({"name": "downpour", "momentum": 1}, "Downpour: momentum=1 must be at least 0 and at most 0.999."),
        ({"name": "ssp", "bound": None}, "SSP needs a bound"),
        ({"name": "ssp", "bound": -1}, "SSP: bound=-1 must be at least 0."),
        ({"name": "localsgd", "weighting": "score"}, "LocalSGD: weighting='score' is not known. Known: equal, samples."),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError) as caught:
        make_update(settings)
    assert message in str(caught.value)


def test_no_rule_imports_torch_dask_or_a_clock():
    code = "import sys, labkit.updates; print({'torch', 'dask', 'distributed', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
    assert not [name for name, room in sys.modules.items() if name.startswith("labkit.updates") and hasattr(room, "time")]


def test_blocks_are_the_parameters():
    with pytest.raises(UpdateError, match="blocks of 3 parameters in all, but there are 1"):
        SGWU().start(vector(1, 2), [0], 1, [1, 2])
    with pytest.raises(UpdateError, match="one flat vector is needed"):
        SGWU().start(np.zeros((2, 2)), [0])


def test_a_rule_of_one_s_own_is_thirty_lines_and_keeps_all_promises(monkeypatch):
    """The example of CONTRIBUTING.md: the second push is one version late, so it counts 1/4 of its (0, 8), not 1/2."""
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n(# [^\n]*\nclass \w+\(Changes\).*?)```", text, re.DOTALL)
    assert len(code.splitlines()) <= 30
    namespace = dict(vars(base))
    exec("from __future__ import annotations\n" + code, namespace)
    monkeypatch.setitem(UPDATES, "staleness-aware", namespace["StalenessAware"])
    rule = started(make_update({"name": "staleness-aware", "rate": 1.0}))
    push(rule, 0, (5, 2)), push(rule, 1, (1, 10))
    assert rule.weights.tolist() == [3, 4] and rule.config() == {"name": "staleness-aware", "rate": 1.0}
    for promise in PROMISES:
        promise("staleness-aware")


PROMISES = [
    test_whoever_comes_and_goes_every_push_is_merged_or_dropped_once_and_buffers_stay_in_their_range,
    test_whoever_waits_is_released_as_long_as_somebody_pushes,
    test_a_state_that_is_saved_half_way_has_the_same_future_bit_for_bit,
    test_a_bad_push_is_refused_and_changes_nothing,
    test_who_joins_gets_the_current_version_and_may_push,
]


@every_rule
def test_what_no_push_has_changed_keeps_its_bits(rule):
    """Tensors of 2, 3, 1 and 2 weights, of which the first and a buffer are trained; the others are as they began, -0.0 too."""
    rule, chance = make_update(rule), np.random.default_rng(0)
    rule.tensors, first = (2, 3, 1, 2), vector(1, 2, 0.1, -0.0, 1 / 3, 0.5, 0.7, 1e-8)
    rule.start(first, (0, 1, 2), 3, (2, 3))
    frozen, ready = [2, 3, 4, 6, 7], dict.fromkeys((0, 1, 2), rule.weights)

    def pushed(moved):
        worker = int(chance.choice(sorted(ready)))
        weights = ready.pop(worker).copy()
        weights[moved] += np.float32(0.1) if rule.collective else chance.uniform(0.1, 0.3, len(moved)).astype(np.float32)
        for reply in rule.push(Push(worker, rule.bases[worker], weights, float(chance.random()), int(chance.integers(1, 9)))):
            ready[reply.worker] = reply.weights

    while rule.version < 6:
        pushed([0, 1, 5])
        assert (rule.weights[frozen].view(np.uint32) == first[frozen].view(np.uint32)).all()
        assert all((weights[frozen] == first[frozen]).all() for weights in ready.values())
    assert rule.still == [[2, 5], [6, 8]] and (rule.weights[[0, 1, 5]] != first[[0, 1, 5]]).all()
    for _ in range(12):
        pushed([0, 1, 2, 5])
    rule.finish()
    assert rule.weights[2] > first[2] and rule.still == [[6, 8]]  # what a push has changed is merged as ever


def course(rule, own):
    """Three workers push by turns, with a buffer; the weights of each version, and what each worker gets."""
    generator, versions = np.random.default_rng(3), []
    rule = make_update(rule)
    rule.start(generator.normal(size=9).astype(np.float32), (0, 1, 2), 2)
    for worker in (0, 1, 2) * 4:
        weights = generator.normal(size=9).astype(np.float32)
        if worker in getattr(rule, "held", ()):
            continue
        for reply in rule.push(Push(worker, rule.bases[worker], weights, 0.2 + 0.1 * worker, 7 + worker, own)):
            versions.append((reply.worker, reply.version, reply.weights.tobytes()))
        versions.append(rule.weights.tobytes())
    rule.finish()
    return [*versions, rule.weights.tobytes()]


@pytest.mark.parametrize("rule", [rule for rule in ALL if rule != "allreduce"], ids=called)  # whose pushes are equal
def test_a_push_that_the_rule_may_write_into_gives_the_same_bits(rule):
    assert course(rule, own=True) == course(rule, own=False)


@pytest.mark.parametrize(
    "rule", ["agwu", "sgwu", "localsgd", "fedasync", "ssp", "diloco", {"name": "downpour", "optimiser": "momentum"}]
)
def test_a_version_is_made_in_the_memory_of_a_push(rule):
    rule = started(make_update(rule), workers=(0,))
    weights = vector(3.0, 4.0)
    rule.push(Push(0, 0, weights, 0.5, 10, own=True))
    assert rule.version == 1 and np.shares_memory(rule.weights, weights) and not rule.weights.flags.writeable


def test_a_rule_of_one_s_own_may_hand_a_push_on_to_several():
    class Two(Update):
        """Goes on from the mean of what two rules make of each push."""

        def _begin(self):
            self.rules = [make_update("agwu"), make_update("fedasync")]
            for rule in self.rules:
                rule.start(self.weights.copy(), self.bases, len(self.weights) - self.n_params)

        def _merge(self, push):
            first, second = (rule.push(push)[0].weights for rule in self.rules)
            self._publish((first + second) / np.float32(2), [(push, 1.0)])
            return self._release([push.worker])

    made = []
    for own in (False, True):
        rule = Two()
        rule.start(vector(1.0, 2.0, 0.5), (0,), 1)
        rule.push(Push(0, 0, vector(3.0, 5.0, 0.25), 0.5, 10, own))
        made.append(rule.weights.tolist())
    assert made[0] == made[1]


@every_rule
def test_where_there_is_no_memory_for_a_merge_the_rule_is_as_it_was(rule, monkeypatch):
    """Whatever array it asks for first is refused; then everything comes as if nothing had happened."""
    rule = make_update(rule)
    rule.start(vector(1.0, 2.0, 0.5), (0,), 1)
    plain = make_update(rule.config())
    plain.start(vector(1.0, 2.0, 0.5), (0,), 1)

    def without(*_, **__):
        raise MemoryError

    for turn in range(1, 4):
        pushed = vector(1.0 + turn, 2.0, 0.25)
        before = repr(rule.state_dict())
        with monkeypatch.context() as patch:
            for name in ("empty", "empty_like", "zeros", "zeros_like", "subtract", "multiply"):
                patch.setattr(np, name, without)
            with pytest.raises(MemoryError):
                rule.push(Push(0, rule.bases[0], pushed, 0.5, 10))
        assert repr(rule.state_dict()) == before
        for other in (rule, plain):
            other.push(Push(0, other.bases[0], pushed, 0.5, 10))
        assert rule.weights.tobytes() == plain.weights.tobytes() and rule.version == plain.version
