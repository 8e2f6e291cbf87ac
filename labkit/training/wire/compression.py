"""Weights on the wire: as they are, or in 16 bits, with the master weights in float32 on the server.

    pull    the worker gets  R(W(k))                        each weight rounded to 16 bits
    push    the server gets  W(k) + R(W_j - R(W(k)))        the change rounded, not the weights; of buffers, R(W_j)

R rounds to the nearest, ties to even. `bfloat16` has the range of float32 and 8 bits of precision. `float16` has 11 bits, and
holds 6e-5 to 65,504 with all of them: a change is multiplied by the power of two that makes the most of that. A change is small
against its weight, so it keeps its precision where a rounded weight would lose it altogether; and since it is added to what the
server has, what a pull has rounded away never piles up (mixed precision: Micikevicius et al., ICLR 2018). Buffers are averages
already, and a variance must not fall below zero: they travel as they are, rounded.

Both ends use these functions, and so do replays: the same bits everywhere.

Used by `labkit.training.server.connection` and `labkit.training.server.server`, `labkit.training.worker.buffers` (worker), `labkit.simulation.offline`, and by whoever counts bytes or checks
what was asked for. Numpy alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from labkit.errors import UpdateError, known
from labkit.updates.base import chunks

EXCHANGES = ("float32", "bfloat16", "float16")
LARGEST = float(np.finfo(np.float16).max)
ROOM, SHIFTS = 14, 64  # a scaled float16 change is below 2^15; and how far it is scaled at most


def check_exchange(kind: str) -> str:
    """The name of an exchange; ValueError with the known ones."""
    known("exchange", kind, EXCHANGES)
    return kind


def n_bytes(kind: str, n: int) -> int:
    """Bytes of n weights on the wire."""
    return n * (4 if kind == "float32" else 2)


def place(kind: str, n: int) -> np.ndarray:
    """An array that n weights on the wire fit into."""
    return np.empty(n, np.float32 if kind == "float32" else np.uint16)


def pack(weights: np.ndarray, kind: str) -> np.ndarray:
    """A version as it is sent; float32 (n,) -> what `place` makes, or the array itself.

    Raises
    ------
    UpdateError
        A weight is too large for float16.
    """
    if kind == "float32":
        return weights
    wire = place(kind, len(weights))
    for part in chunks(len(weights)):
        if kind == "float16" and (most := float(np.abs(weights[part]).max(initial=0.0))) > LARGEST:
            raise UpdateError(f"a weight or buffer of {most:.3g} does not fit into float16 ({LARGEST:g}). Use exchange='bfloat16'.")
        wire[part] = _halves(weights[part], kind)
    return wire


def unpack(wire: np.ndarray, kind: str, weights: np.ndarray) -> None:
    """A version as it was received, into float32 `weights`."""
    for part in chunks(len(wire)):
        weights[part] = _floats(wire[part], kind)


def pack_change(weights: np.ndarray, given: np.ndarray, kind: str, wire: np.ndarray, n_params: int) -> int:
    """What a worker pushes, into `wire`; returns shift.

    Of the parameters their change since what was `given` (on the wire), times 2^shift; of the buffers behind them, their values.
    """
    shift = 0
    with np.errstate(invalid="ignore"):  # what is no number stays so, for the server to refuse
        if kind == "float16":
            most = max((float(np.abs(w - g).max()) for w, g in _apart(weights, given, kind, n_params)), default=0.0)
            if 0 < most < math.inf:
                shift = int(np.clip(ROOM - math.floor(math.log2(most)), -SHIFTS, SHIFTS))
        factor = np.float32(2.0**shift)
        for part, (w, g) in zip(chunks(n_params), _apart(weights, given, kind, n_params), strict=True):
            change = w - g
            if shift:
                change *= factor
            wire[part] = _halves(change, kind)
        wire[n_params:] = _halves(weights[n_params:], kind)
    return shift


def add_change(base: np.ndarray, wire: np.ndarray, kind: str, shift: int, weights: np.ndarray, n_params: int) -> None:
    """What the server makes of a push, into float32 `weights`: the version `base` that the worker was given, and its change."""
    factor = np.float32(2.0**-shift)
    for part in chunks(n_params):
        change = _floats(wire[part], kind)
        if shift:
            change *= factor
        np.add(base[part], change, out=weights[part])
    weights[n_params:] = _floats(wire[n_params:], kind)


def _apart(weights: np.ndarray, given: np.ndarray, kind: str, n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return ((weights[part], _floats(given[part], kind)) for part in chunks(n))


def _halves(part: np.ndarray, kind: str) -> np.ndarray:
    if kind == "float16":
        with np.errstate(over="ignore"):  # infinity: the server refuses it
            return part.astype(np.float16).view(np.uint16)
    bits = part.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += bits
    rounded += 0x7FFF
    rounded >>= 16
    halves = rounded.astype(np.uint16)
    if (lost := np.isnan(part)).any():  # rounding up may have carried into the sign
        halves[lost] = 0x7FC0
    return halves


def _floats(part: np.ndarray, kind: str) -> np.ndarray:
    if kind == "float16":
        return part.view(np.float16).astype(np.float32)
    return (part.astype(np.uint32) << 16).view(np.float32)
