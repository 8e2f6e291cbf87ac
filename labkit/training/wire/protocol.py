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

    kernel: watch, and then status, stop, expect, drop ------->  <------- status

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

from labkit.errors import WireError
from labkit.training.wire.compression import SHIFTS

HEARTBEAT_S = 0.5  # how often a worker sends a sign of life, and the server to a worker that it holds
SCORE_EVERY_S = 1.0  # how often a worker measures its score where the rule does not ask for it
SERVER_TIMEOUT_S = 60.0  # a server that sends nothing for longer to a waiting worker, or to the kernel, is taken to be gone
MAX_WORKERS = 1 << 16
LARGEST = 2**53  # whole numbers beyond it are not the same in every JSON reader


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
        given = {name: header[name] for name in GRANT}
        grant = cls(**given | {name: tuple(header[name]) for name in ("ranks", "rank_samples")})
        wrong = grant._wrong(worker, budget, n_bytes)
        for name, wanted in wrong:
            raise _refused(header, name, wanted)
        return grant

    def _wrong(self, worker: int, budget: int, n_bytes: int) -> list[tuple[str, str]]:
        """Fields that do not fit together, with what they must be."""
        own = self.rank_samples[self.ranks.index(worker)] if worker in self.ranks[: len(self.rank_samples)] else self.samples
        rules = [
            ("n_indices", 8 * self.n_indices == n_bytes, "the number of indices in the message"),
            ("done", self.done <= budget, f"at most the budget of {budget} samples"),
            ("carry", self.done + self.carry <= budget, f"at most what is left of {budget} samples"),
            ("samples", self.done + self.carry + self.samples <= budget, f"at most what is left of {budget} samples"),
            ("ahead", self.ahead <= self.samples, f"at most the {self.samples} samples of the grant"),
            ("ranks", not self.ranks or worker in self.ranks, f"a list with worker {worker}"),
            ("ranks", len(set(self.ranks)) == len(self.ranks), "a list that names each worker once"),
            ("rank_samples", len(self.rank_samples) == len(self.ranks), f"a list of {len(self.ranks)} numbers"),
            ("rank_samples", self.done + sum(self.rank_samples) <= budget, f"at most what is left of {budget} samples"),
            ("rank_samples", own <= self.samples <= own + 1, f"a list with the {self.samples} samples of worker {worker}"),
        ]
        return [(name, wanted) for name, fits, wanted in rules if not fits]


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


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST


def _number(value: Any) -> bool:  # NaN and infinity too: what they mean for a score or a loss is the update's to say
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST)


def _seconds(value: Any) -> bool:
    return _number(value) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _seconds(value) and value >= 0


def _text(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which no file and no terminal takes
        return False
    return True


def _index(value: Any) -> bool:
    return _count(value) and value < MAX_WORKERS


def _shift(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -SHIFTS <= value <= SHIFTS


def _list_of(fits: Any) -> Any:
    return lambda value: isinstance(value, list) and len(value) <= MAX_WORKERS and all(map(fits, value))


def _or_nothing(rule: tuple) -> tuple:
    wanted, fits = rule
    return f"{wanted}, or nothing", lambda value: value is None or fits(value)


COUNT = ("a whole number of at least 0", _count)
COUNTS = ("a list of whole numbers", _list_of(_count))
INDEX = (f"a whole number from 0 to {MAX_WORKERS - 1}", _index)
INDICES = ("a list of workers", _list_of(_index))
NUMBER = ("a number", _number)
RATE = ("a finite number of at least 0", _positive)
SECONDS = ("a finite number of seconds", _seconds)
SPEED = ("a time of at least 0 seconds", _positive)
SHARE = ("a number from 0 to 1", lambda value: _number(value) and 0 <= value <= 1)
SHIFT = (f"a whole number from -{SHIFTS} to {SHIFTS}", _shift)
TEXT = ("text", _text)
FLAG = ("true or false", lambda value: isinstance(value, bool))
TABLE = ("a table", lambda value: isinstance(value, dict))
ENDING = ("'stopped' or 'failed'", lambda value: value is None or value in ("stopped", "failed"))
GENERATOR = ("'own' or 'shared'", lambda value: value in ("own", "shared"))

GRANT = {field.name: COUNT for field in fields(Grant)}
GRANT |= {"wait_s": SPEED, "ranks": INDICES, "rank_samples": COUNTS, "pace": RATE}

REQUESTS = {
    # of a worker
    "join": {
        "worker": INDEX,
        "generation": _or_nothing(COUNT),
        "seconds_per_sample": _or_nothing(SPEED),
        "device": _or_nothing(TEXT),
        "threads": _or_nothing(COUNT),
        "generator": _or_nothing(GENERATOR),
        "about": _or_nothing(TEXT),
    },
    "heartbeat": {"samples": _or_nothing(COUNT), "loss": _or_nothing(NUMBER)},
    "push": {
        **dict.fromkeys(("version", "samples"), COUNT),
        **{"score": _or_nothing(NUMBER), "loss": _or_nothing(NUMBER)},
        **dict.fromkeys(("compute_s", "score_s", "wait_s", "send_s"), SECONDS),
        "hidden_s": _or_nothing(SECONDS),
        "shift": _or_nothing(SHIFT),
    },
    "score": {"score": SHARE, "score_s": SECONDS},
    "regroup": {"reason": _or_nothing(TEXT)},
    "fail": {"reason": TEXT},
    # of the kernel
    "stop": {"state": ENDING, "reason": _or_nothing(TEXT)},
    "expect": {"workers": INDICES},
    "drop": {"workers": INDICES},
}

REPLIES = {
    # to a worker
    "grant": {},  # `Grant.read` checks it, which knows to whom it goes
    "hold": {},
    "regroup": {"group": COUNT},
    "rejoin": {},
    "stop": {"reason": TEXT, "wait_s": SPEED},
    # to the kernel
    "status": {
        **{"state": TEXT, "reason": TEXT, "started": FLAG, "workers": TABLE, "seconds": SECONDS},
        **dict.fromkeys(("version", "samples", "budget"), COUNT),
    },
}
