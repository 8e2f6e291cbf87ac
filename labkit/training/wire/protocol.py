"""The messages between the server of a run, its workers and its kernel: which there are, and what each field must be.

    worker                                  server
      join (probed speed)        ------->     is everyone here?
      grant: weights and indices <-------     release
      heartbeat (samples, loss)  ------->     progress; a worker that is silent for too long is taken to be gone
      push (weights, Q, times)   ------->     merge
      grant, or stop             <-------     release; while the worker is held: hold, hold, ...
      (score)                    ------->     recorded: that of its push, where it was measured meanwhile
      (late heartbeat or push)   ------->     refused and recorded
      join again                 <-------     rejoin
                                 <-------     regroup: one of this group of the all-reduce is gone
      regroup                    ------->     begins anew with those who are left
      leave, fail                ------->

                                 <-------     inspect: what does it do? slow: all its work is to last so many times as long
      inspected (stacks, ...)  ------->     passed on to the kernel that asked

    kernel: watch, and then status, stop, expect, drop, lost, checkpoint, inspect, slow ------->  <------- status

Who has the secret of the run may still be mistaken: another version, a bug, a damaged value. A message is checked as a whole
before anything is done with it, so that half a push never changes a run, and half a grant no replica. Fields that are not named
here pass, as do unknown requests: those are for the server to refuse.

Used by `labkit.training.server`, `labkit.training.worker.worker` and `labkit.training.attach`, which have
`labkit.training.wire.transport` apply the checks to each message that comes; by replays and simulations, which work on grants as
workers do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from labkit.cluster.emulation import SLOWEST
from labkit.errors import WireError
from labkit.training.wire.compression import SHIFTS

HEARTBEAT_S = 0.5  # how often a worker sends a sign of life, and the server to a worker that it holds
SCORE_EVERY_S = 1.0  # how often a worker measures its score where the rule does not ask for it
SERVER_TIMEOUT_S = 60.0  # a server that sends nothing for longer to a waiting worker, or to the kernel, is taken to be gone
MAX_WORKERS = 1 << 16
MAX_STACKS = 8  # of a worker that is inspected
MAX_STACK = 8192  # characters of each: its innermost frames
MAX_METRICS = 256  # beside the loss, of a local pass; `labkit.problems.metrics.MOST` refuses more before a run
LARGEST = 2**53  # whole numbers beyond it are not the same in every JSON reader
LONGEST = 1e10  # seconds, 300 years: no duration is longer, and a sum of some is finite
QUICKEST = 1e-12  # seconds per sample
ASIDE = ("inspect", "slow")  # messages to a worker that it answers, or obeys, without leaving what it does


class Refused(WireError):
    """A message that cannot be meant. The link is in order: the same would come again."""


@dataclass(frozen=True, kw_only=True)
class Grant:
    """What a worker may train on from here to its next push; the weights of `version` and its new indices come with it."""

    incarnation: int = 0  # of the worker
    version: int = 0
    wait_s: float = 0.0  # how long the server has held the worker
    retain: int = 0  # of its shard, the first so many samples stay
    n_indices: int = 0  # samples that are new in its shard
    samples: int = 0  # of the budget, for this local pass
    ahead: int = 0  # of these, those to train on while the push is under way: they count for the next one
    carry: int = 0  # samples that it has trained on ahead already: they count for this push
    ranks: tuple[int, ...] = ()  # the workers of the group of an all-reduce
    rank_samples: tuple[int, ...] = ()  # what each of them trains on
    group: int = 0  # number of that group
    done: int = 0  # samples that all workers had pushed
    settle: int = 0  # 1: no samples, but what a milestone asks for (`Problem.settle`)
    pace: float = 0.0  # samples of all workers while this one trains on one: the clock of learning-rate schedules

    def header(self) -> dict:
        """The message that carries it."""
        return {"op": "grant", **self.__dict__}

    @classmethod
    def read(cls, header: dict, *, worker: int, budget: int, n_bytes: int) -> Grant:
        """The grant of a message to this worker, whose body holds `n_bytes` of indices, in a run over `budget` samples.

        Raises `WireError`, by the name of the field, where one is missing or cannot be meant. No memory is taken before.
        """
        _check(header, GRANT)
        grant = cls(**{name: header[name] for name in GRANT} | {name: tuple(header[name]) for name in ("ranks", "rank_samples")})
        ranks, shares, done, granted = grant.ranks, grant.rank_samples, grant.done, grant.samples
        own = shares[ranks.index(worker)] if worker in ranks[: len(shares)] else granted
        left = f"at most what is left of {budget} samples"
        for name, fits, wanted in (  # fields that do not fit together, with what they must be
            ("n_indices", 8 * grant.n_indices == n_bytes, "the number of indices in the message"),
            ("done", done <= budget, f"at most the budget of {budget} samples"),
            ("carry", done + grant.carry <= budget, left),
            ("samples", done + grant.carry + granted <= budget, left),
            ("ahead", grant.ahead <= granted, f"at most the {granted} samples of the grant"),
            ("settle", grant.settle <= 1 and not (grant.settle and granted), "0, or 1 with no samples"),
            ("ranks", not ranks or worker in ranks, f"a list with worker {worker}"),
            ("ranks", len(set(ranks)) == len(ranks), "a list that names each worker once"),
            ("rank_samples", len(shares) == len(ranks), f"a list of {len(ranks)} numbers"),
            ("rank_samples", done + sum(shares) <= budget, left),
            ("rank_samples", own <= granted <= own + 1, f"a list with the {granted} samples of worker {worker}"),
        ):
            if not fits:
                raise _refused(header, name, wanted)
        return grant


@dataclass(frozen=True)
class Answer:
    """What a worker is sent when it is released: a grant with weights (n,) float32 and new indices; without one, it must stop."""

    grant: Grant | None
    weights: np.ndarray | None = None
    indices: np.ndarray | None = None
    reason: str = ""  # why it must stop
    wait_s: float = 0.0  # how long it was held before

    def header(self) -> dict:
        return self.grant.header() if self.grant else {"op": "stop", "reason": self.reason, "wait_s": self.wait_s}


def check_request(header: dict) -> None:
    """Refuse, by `WireError`, a known message to the server with a field that is missing or cannot be meant."""
    _check(header, REQUESTS.get(header["op"], {}))


def check_reply(header: dict) -> None:
    """Refuse, by `WireError`, a message from the server that is unknown, or such a field of it."""
    if header["op"] not in REPLIES:
        raise Refused(f"a {header['op']!r} message was refused: a server sends {', '.join(REPLIES)}.")
    _check(header, REPLIES[header["op"]])


def _check(header: dict, rules: dict) -> None:
    for field, (wanted, fits) in rules.items():
        if not fits(header.get(field)):
            raise _refused(header, field, wanted)


def _refused(header: dict, field: str, wanted: str) -> Refused:
    got = repr(header[field])[:60] if field in header else "missing"
    return Refused(f"a {header['op']!r} message was refused: {field!r} is {got}, but must be {wanted}.")


def _whole(value: Any, least: int = 0, most: int = LARGEST - 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _number(value: Any) -> bool:  # NaN and infinity too: what they mean for a score or a loss is the update's to say
    return isinstance(value, float) or _whole(value, 1 - LARGEST)


def _seconds(value: Any, least: float = -LONGEST) -> bool:
    return _number(value) and least <= value <= LONGEST


def _pace(value: Any) -> bool:
    return _seconds(value, 0) and (value == 0 or value >= QUICKEST)


def _text(value: Any) -> bool:  # without half of a surrogate pair, which no file and no terminal takes
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def _numbers(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= MAX_METRICS and all(_text(k) and _number(x) for k, x in value.items())


def _stacks(value: Any) -> bool:
    fits = isinstance(value, dict) and len(value) <= MAX_STACKS
    return fits and all(_text(part) and len(part) <= MAX_STACK for pair in value.items() for part in pair)


def _precision(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"dtype", "channels_last", "float32", "why", "host"}:
        return False
    layers = value["float32"]
    known = value["dtype"] in ("float32", "bfloat16") and isinstance(value["channels_last"], bool) and isinstance(layers, dict)
    return known and all(map(_text, (value["why"], value["host"], *layers, *layers.values())))


def _list_of(fits: Any) -> Any:
    return lambda value: isinstance(value, list) and len(value) <= MAX_WORKERS and all(map(fits, value))


def _or_nothing(rule: tuple) -> tuple:
    wanted, fits = rule
    return f"{wanted}, or nothing", lambda value: value is None or fits(value)


COUNT = ("a whole number of at least 0", _whole)
COUNTS = ("a list of whole numbers", _list_of(_whole))
INDEX = (f"a whole number from 0 to {MAX_WORKERS - 1}", lambda value: _whole(value, most=MAX_WORKERS - 1))
INDICES = ("a list of workers", _list_of(INDEX[1]))
NUMBER = ("a number", _number)
RATE = ("a finite number of at least 0", lambda value: _number(value) and 0 <= value < math.inf)
SECONDS = (f"a number of seconds, at most {LONGEST:g}", _seconds)
SPEED = (f"a time from 0 to {LONGEST:g} seconds", lambda value: _seconds(value, 0))
PACE = (f"0, or a time from {QUICKEST:g} to {LONGEST:g} seconds", _pace)
SHARE = ("a number from 0 to 1", lambda value: _number(value) and 0 <= value <= 1)
SHIFT = (f"a whole number from -{SHIFTS} to {SHIFTS}", lambda value: _whole(value, -SHIFTS, SHIFTS))
TEXT = ("text", _text)
STACKS = (f"a table of at most {MAX_STACKS} texts of at most {MAX_STACK} characters by name", _stacks)
SLOWDOWN = (f"a number from 1 to {SLOWEST:g}", lambda value: _number(value) and 1 <= value <= SLOWEST)
FLAG = ("true or false", lambda value: isinstance(value, bool))
TABLE = ("a table", lambda value: isinstance(value, dict))
NUMBERS = (f"a table of at most {MAX_METRICS} numbers by name", _numbers)
ENDING = ("'stopped' or 'failed'", lambda value: value is None or value in ("stopped", "failed"))
PRECISION = ("a dtype, with the layers that stay in float32", _precision)  # `labkit.inner.precision.Precision`
GENERATOR = ("'own' or 'shared'", lambda value: value in ("own", "shared"))

GRANT = {field.name: COUNT for field in fields(Grant)}
GRANT |= {"wait_s": SPEED, "ranks": INDICES, "rank_samples": COUNTS, "pace": RATE}

REQUESTS = {
    # of a worker
    "join": {
        "worker": INDEX,
        **dict.fromkeys(("generation", "threads"), _or_nothing(COUNT)),
        **dict.fromkeys(("device", "about"), _or_nothing(TEXT)),
        "seconds_per_sample": _or_nothing(PACE),
        "generator": _or_nothing(GENERATOR),
        "precision": _or_nothing(PRECISION),
        "pid": _or_nothing(COUNT),
        "host": _or_nothing(TEXT),
    },
    "heartbeat": {"samples": _or_nothing(COUNT), "loss": _or_nothing(NUMBER)},
    "push": {
        **dict.fromkeys(("version", "samples"), COUNT),
        **{"score": _or_nothing(NUMBER), "loss": _or_nothing(NUMBER)},
        **dict.fromkeys(("compute_s", "score_s", "wait_s", "send_s"), SECONDS),
        **dict.fromkeys(("load_s", "hidden_s"), _or_nothing(SECONDS)),
        "shift": _or_nothing(SHIFT),
        "inner": _or_nothing(TEXT),
        "metrics": _or_nothing(NUMBERS),
    },
    "score": {"score": SHARE, "score_s": SECONDS},
    "regroup": {"reason": _or_nothing(TEXT)},
    "fail": {"reason": TEXT},
    "inspected": {
        **dict.fromkeys(("number", "version", "threads"), COUNT),
        **dict.fromkeys(("doing", "device"), TEXT),
        "stacks": STACKS,
        **dict.fromkeys(("memory", "exchange"), NUMBERS),
        "error": _or_nothing(TEXT),  # why the rest is empty
    },
    # of the kernel
    "stop": {"state": ENDING, "reason": _or_nothing(TEXT)},
    "expect": {"workers": INDICES},
    "drop": {"workers": INDICES},
    "lost": {"worker": INDEX, "generation": COUNT, "reason": TEXT},
    "checkpoint": {"within": SPEED},
    "inspect": {"worker": INDEX, "within": SPEED},
    "slow": {"worker": INDEX, "factor": SLOWDOWN},
}

REPLIES = {
    # to a worker
    "grant": {},  # `Grant.read` checks it, which knows to whom it goes
    "hold": {},
    "regroup": {"group": COUNT},
    "rejoin": {},
    "inspect": {"number": COUNT},
    "slow": {"factor": SLOWDOWN},
    "stop": {"reason": TEXT, "wait_s": SPEED},
    # to the kernel
    "status": {
        **{"state": TEXT, "reason": TEXT, "started": FLAG, "workers": TABLE, "seconds": SECONDS},
        **dict.fromkeys(("version", "samples", "budget"), COUNT),
    },
}
