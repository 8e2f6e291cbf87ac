"""What may be said to a server: whole messages pass, damaged ones are refused with the field and its value."""

from __future__ import annotations

import pytest

from labkit.errors import WireError
from labkit.training.wire.protocol import WORDS, checked

PUSH = {"op": "push", "version": 3, "samples": 17, "score": 0.5, "loss": 1.25}
PUSH |= {"compute_s": 0.1, "score_s": 0.01, "wait_s": 0.0, "send_s": 0}
GOOD = [
    {"op": "join", "worker": 0, "seconds_per_sample": 1e-5, "about": "pid 7, ä"},
    {"op": "join", "worker": 2},
    {"op": "join", "worker": 2, "device": "cuda:0", "threads": 2, "generator": "shared"},
    {"op": "heartbeat", "samples": 3, "loss": float("nan")},
    {"op": "heartbeat"},
    {"op": "drop", "workers": [0, 5]},
    PUSH,
    PUSH | {"loss": None, "score": float("nan")},  # what NaN means is for the update to say
    PUSH | {"score": None, "hidden_s": 0.2, "shift": -3},
    {"op": "score", "score": 0.5, "score_s": 0.01},
    {"op": "fail", "reason": ""},
    {"op": "stop"},
    {"op": "stop", "state": "failed", "reason": "no luck"},
    {"op": "status", "whatever": [1]},
    {"op": "a word of tomorrow", "worker": "x"},
]


@pytest.mark.parametrize("header", GOOD)
def test_what_is_meant_passes(header):
    before = dict(header)
    checked(header)
    assert repr(header) == repr(before)


@pytest.mark.parametrize("op", WORDS)
def test_a_word_alone_is_refused_where_it_needs_fields(op):
    needed = [field for field, (_, fits) in WORDS[op].items() if not fits(None)]
    if not needed:
        return checked({"op": op})
    with pytest.raises(WireError, match=f"a '{op}' message was refused: '{needed[0]}' is missing, but must be "):
        checked({"op": op})


BAD = {
    "worker": (GOOD[0], ["x", -1, 1.0, None, True, [0], {}, 2**16, float("nan")]),
    "generation": (GOOD[0], ["x", -1, [1]]),
    "workers": ({"op": "drop"}, [None, 1, ["x"], [-1], {}]),
    "seconds_per_sample": (GOOD[0], ["x", float("nan"), float("inf"), -1.0, [], 10**400]),
    "device": (GOOD[0], [0, ["cpu"]]),
    "threads": (GOOD[0], ["1", -1, 1.5]),
    "generator": (GOOD[0], ["mine", 1, ["own"]]),
    "about": (GOOD[0], [1, ["x"], "\ud800"]),
    "samples": (PUSH, [None, "17", -1, 1.5, False]),
    "version": (PUSH, [None, [3], -1, 1e3]),
    "score": (PUSH, ["1", True, {}]),
    "hidden_s": (PUSH, ["x", float("nan")]),
    "shift": (PUSH, ["1", 1.0, True, 65, -65, 2**70]),
    "loss": (PUSH, ["1", [], True]),
    "compute_s": (PUSH, [None, "x", float("inf"), float("nan"), 10**400]),
    "state": ({"op": "stop"}, ["running", 1, {"x": 1}, ["failed"]]),
    "reason": ({"op": "fail"}, [None, 3, "\udfff"]),
}


def _late(value):
    return {"op": "score", "score": value, "score_s": 0.1}


def test_a_late_score_is_a_share():
    for value in (0, 0.5, 1.0):
        checked(_late(value))
    for value in (None, 93.0, -0.1, float("nan"), True):
        with pytest.raises(WireError, match=r"'score' is .*, but must be a number from 0 to 1"):
            checked(_late(value))


@pytest.mark.parametrize("field", BAD)
def test_what_cannot_be_meant_is_refused_by_name(field):
    header, values = BAD[field]
    for value in values:
        with pytest.raises(WireError, match=f"'{field}' is .*, but must be") as caught:
            checked(header | {field: value})
        assert len(str(caught.value)) < 200
