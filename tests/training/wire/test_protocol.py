"""The messages of a run: whole ones pass, damaged ones are refused with the field and its value."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from labkit.errors import WireError
from labkit.training.wire.protocol import GRANT, REPLIES, REQUESTS, Answer, Grant, check_reply, check_request

PUSH = {"op": "push", "version": 3, "samples": 17, "score": 0.5, "loss": 1.25}
PUSH |= {"compute_s": 0.1, "score_s": 0.01, "wait_s": 0.0, "send_s": 0}
PRECISION = {"dtype": "bfloat16", "channels_last": True, "float32": {"conv1": "Conv2d: why"}, "why": "", "host": "AMX"}
INSPECTED = {"op": "inspected", "number": 3, "version": 2, "threads": 1, "doing": "a local pass", "device": "cpu"}
INSPECTED |= {"stacks": {"worker": "File ..."}, "memory": {"rss": 1e9}, "exchange": {}}
GOOD = [
    {"op": "join", "worker": 0, "seconds_per_sample": 1e-5, "about": "pid 7, ä"},
    {"op": "join", "worker": 2},
    {"op": "join", "worker": 2, "device": "cuda:0", "threads": 2, "generator": "shared"},
    {"op": "join", "worker": 2, "precision": PRECISION},
    {"op": "heartbeat", "samples": 3, "loss": float("nan")},
    {"op": "heartbeat"},
    INSPECTED,
    INSPECTED | {"stacks": {}, "memory": {}, "error": "ValueError: x"},
    {"op": "inspect", "worker": 1, "within": 5.0},
    {"op": "checkpoint", "within": 1},
    {"op": "slow", "worker": 1, "factor": 4},
    {"op": "drop", "workers": [0, 5]},
    PUSH,
    PUSH | {"loss": None, "score": float("nan")},  # what NaN means is for the update to say
    PUSH | {"score": None, "hidden_s": 0.2, "shift": -3},
    {"op": "score", "score": 0.5, "score_s": 0.01},
    {"op": "fail", "reason": ""},
    {"op": "stop"},
    {"op": "stop", "state": "failed", "reason": "no luck"},
    {"op": "status", "whatever": [1]},
    {"op": "an op of tomorrow", "worker": "x"},
]


@pytest.mark.parametrize("header", GOOD)
def test_what_is_meant_passes(header):
    before = dict(header)
    check_request(header)
    assert repr(header) == repr(before)


@pytest.mark.parametrize("op", REQUESTS)
def test_an_op_alone_is_refused_where_it_needs_fields(op):
    needed = [field for field, (_, fits) in REQUESTS[op].items() if not fits(None)]
    if not needed:
        return check_request({"op": op})
    with pytest.raises(WireError, match=f"a '{op}' message was refused: '{needed[0]}' is missing, but must be "):
        check_request({"op": op})


BAD = {
    "worker": (GOOD[0], ["x", -1, 1.0, None, True, [0], {}, 2**16, float("nan")]),
    "generation": (GOOD[0], ["x", -1, [1]]),
    "stacks": (INSPECTED, [None, "x", ["x"], {"a": 1}, {"a": "x" * 10_000}, {str(i): "" for i in range(9)}, {"a": "\ud800"}]),
    "memory": (INSPECTED, [None, 1, {"rss": "much"}]),
    "error": (INSPECTED, [1, ["x"], "\ud800"]),
    "factor": ({"op": "slow", "worker": 1}, [None, 0.5, "4", float("nan"), float("inf"), 1e7]),
    "within": ({"op": "checkpoint"}, [None, -1.0, "x", float("nan")]),
    "workers": ({"op": "drop"}, [None, 1, ["x"], [-1], {}]),
    "seconds_per_sample": (GOOD[0], ["x", float("nan"), float("inf"), -1.0, [], 10**400, 5e-324, 1e300]),
    "device": (GOOD[0], [0, ["cpu"]]),
    "threads": (GOOD[0], ["1", -1, 1.5]),
    "generator": (GOOD[0], ["mine", 1, ["own"]]),
    "precision": (
        GOOD[0],
        ["bfloat16", {}, PRECISION | {"x": 1}, *(PRECISION | {key: 1} for key in PRECISION), PRECISION | {"float32": {"a": 1}}],
    ),
    "about": (GOOD[0], [1, ["x"], "\ud800"]),
    "samples": (PUSH, [None, "17", -1, 1.5, False]),
    "version": (PUSH, [None, [3], -1, 1e3]),
    "score": (PUSH, ["1", True, {}]),
    "hidden_s": (PUSH, ["x", float("nan")]),
    "shift": (PUSH, ["1", 1.0, True, 65, -65, 2**70]),
    "loss": (PUSH, ["1", [], True]),
    "compute_s": (PUSH, [None, "x", float("inf"), float("nan"), 10**400, 1e308, -1e308]),  # two of 1e308 are infinite together
    "state": ({"op": "stop"}, ["running", 1, {"x": 1}, ["failed"]]),
    "reason": ({"op": "fail"}, [None, 3, "\udfff"]),
}


def _late(value):
    return {"op": "score", "score": value, "score_s": 0.1}


def test_a_late_score_is_a_share():
    for value in (0, 0.5, 1.0):
        check_request(_late(value))
    for value in (None, 93.0, -0.1, float("nan"), True):
        with pytest.raises(WireError, match=r"'score' is .*, but must be a number from 0 to 1"):
            check_request(_late(value))


@pytest.mark.parametrize("field", BAD)
def test_what_cannot_be_meant_is_refused_by_name(field):
    header, values = BAD[field]
    for value in values:
        with pytest.raises(WireError, match=f"'{field}' is .*, but must be") as caught:
            check_request(header | {field: value})
        assert len(str(caught.value)) < 200


def granted(chance, worker, budget):
    """A grant as a server makes them, with its bytes of indices: random counts within the budget, alone or in a group of three."""
    done = int(chance.integers(budget + 1))
    carry = int(chance.integers(budget - done + 1))
    samples = int(chance.integers(budget - done - carry + 1))
    ranks = (5, worker, 0) if chance.integers(2) else ()
    each = min(samples, (budget - done) // 3)
    samples = each if ranks else samples
    grant = Grant(
        **{name: int(chance.integers(1 << 20)) for name in ("incarnation", "version", "retain", "n_indices", "group")},
        **{"done": done, "carry": carry, "samples": samples, "ahead": int(chance.integers(samples + 1))},
        **{"ranks": ranks, "rank_samples": (each,) * 3 if ranks else ()},
        **{"wait_s": float(chance.random()), "pace": float(chance.exponential(100))},
    )
    return grant, 8 * grant.n_indices


@pytest.mark.parametrize("seed", range(50))
def test_a_grant_is_read_back_as_it_was_sent(seed):
    grant, n_bytes = granted(np.random.default_rng(seed), worker=3, budget=1000)
    header = json.loads(json.dumps(Answer(grant).header()))
    check_reply(header)
    assert header["op"] == "grant" and Grant.read(header, worker=3, budget=1000, n_bytes=n_bytes) == grant


@pytest.mark.parametrize("field", GRANT)
def test_a_grant_that_cannot_be_meant_is_refused_by_the_name_of_its_field(field):
    grant = Grant(samples=20, ahead=4, carry=4, done=60, n_indices=9, ranks=(3, 1), rank_samples=(20, 20), version=2, pace=2.5)
    header = json.loads(json.dumps(grant.header()))
    wrong = [None, "x", "17", -1, True, {}, [-1], ["x"], float("nan"), float("inf"), 10**400]
    wrong += {"samples": [99, 3], "ahead": [21], "carry": [21], "done": [61, 101], "n_indices": [8, 10]}.get(field, [])
    wrong += {"ranks": [[], [1], [3, 3], [0, 1], [3, 2**16], 3], "rank_samples": [[], [20], [17, 20], [20, 99], 20]}.get(field, [])
    for value in wrong:
        with pytest.raises(WireError, match=r"a 'grant' message was refused: '.*' is .*, but must be"):
            Grant.read(header | {field: value}, worker=3, budget=100, n_bytes=72)
    del header[field]
    with pytest.raises(WireError, match=f"a 'grant' message was refused: '{field}' is missing"):
        Grant.read(header, worker=3, budget=100, n_bytes=72)


def test_a_grant_is_frozen_and_nothing_but_its_fields_travels():
    assert set(Grant().header()) == {"op", *GRANT} and set(GRANT) == {field.name for field in dataclasses.fields(Grant)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        Grant().samples = 3


REPLY = {
    "hold": {},
    "rejoin": {},
    "inspect": {"number": 3},
    "slow": {"factor": 4.0},
    "regroup": {"group": 2},
    "stop": Answer(None, reason="the run has ended.", wait_s=0.5).header(),
    "status": {"state": "running", "reason": "", "started": True, "workers": {"0": {"loss": None}}, "seconds": 1.5}
    | {"version": 3, "samples": 17, "budget": 34},
}


@pytest.mark.parametrize("op", REPLY)
def test_what_a_server_sends_is_checked_too(op):
    check_reply(REPLY[op] | {"op": op})
    for field in REPLIES[op]:
        for value in (None, [1], object()):
            with pytest.raises(WireError, match=f"a '{op}' message was refused: '{field}' is .*, but must be"):
                check_reply(REPLY[op] | {"op": op, field: value})


def test_a_message_that_no_server_sends_is_refused():
    assert set(REPLY) | {"grant"} == set(REPLIES)
    with pytest.raises(WireError, match="a 'go' message was refused: a server sends grant, hold, "):
        check_reply({"op": "go"})
