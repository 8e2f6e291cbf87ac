"""What may be said to a server: the words that it knows and what each of their fields must be.

Who has the secret of the run may still be mistaken: another version, a bug, a damaged value. A message is looked at as a whole
before anything is done with it, so that half a push never changes a run. Fields that are not named here pass, as do unknown words:
what to make of those is for the server.

Used by `labkit.training.server.server`, which has `labkit.training.wire.transport` apply it to each message that comes.
"""

from __future__ import annotations

import math
from typing import Any

from labkit.errors import WireError
from labkit.training.wire.compression import SHIFTS

HEARTBEAT_S = 0.5  # how often a worker sends a sign of life, and the server to a worker that it holds
SCORE_EVERY_S = 1.0  # how often a worker measures its score where the rule does not ask for it
SERVER_TIMEOUT_S = 60.0  # a server that sends nothing for longer to a waiting worker, or to the kernel, is taken to be gone
MAX_WORKERS = 1 << 16
LARGEST = 2**53  # whole numbers beyond it are not the same in every JSON reader


def checked(header: dict) -> None:
    """Refuse, by `WireError`, a known word with a field that is missing or cannot be meant."""
    for field, (wanted, fits) in WORDS.get(header["op"], {}).items():
        if not fits(header.get(field)):
            got = repr(header[field])[:60] if field in header else "missing"
            raise WireError(f"a {header['op']!r} message was refused: {field!r} is {got}, but must be {wanted}.")


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST


def _number(value: Any) -> bool:  # NaN and infinity too: what they mean for a score or a loss is the update's to say
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST)


def _seconds(value: Any) -> bool:
    return _number(value) and math.isfinite(value)


def _speed(value: Any) -> bool:
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


def _or_nothing(rule: tuple) -> tuple:
    wanted, fits = rule
    return f"{wanted}, or nothing", lambda value: value is None or fits(value)


COUNT = ("a whole number of at least 0", _count)
INDEX = (f"a whole number from 0 to {MAX_WORKERS - 1}", _index)
INDICES = ("a list of workers", lambda value: isinstance(value, list) and all(map(_index, value)))
NUMBER = ("a number", _number)
SECONDS = ("a finite number of seconds", _seconds)
SPEED = ("a time of at least 0 seconds", _speed)
SHARE = ("a number from 0 to 1", lambda value: _number(value) and 0 <= value <= 1)
SHIFT = (f"a whole number from -{SHIFTS} to {SHIFTS}", _shift)
TEXT = ("text", _text)
ENDING = ("'stopped' or 'failed'", lambda value: value is None or value in ("stopped", "failed"))
GENERATOR = ("'own' or 'shared'", lambda value: value in ("own", "shared"))

WORDS = {
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
