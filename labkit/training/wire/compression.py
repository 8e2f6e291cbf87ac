"""Weights on the wire: as they are, or in 16 bits, with the master weights in float32 on the server.

    pull    the worker gets  R(W(k))                        each weight rounded to 16 bits
    push    the server gets  W(k) + R(W_j - R(W(k)))        the change rounded, not the weights; of buffers, R(W_j)

R rounds to the nearest, ties to even. `bfloat16` has the range of float32 and 8 bits of precision. `float16` has 11 bits, and
holds 6e-5 to 65,504 with all of them: a change is multiplied by the power of two that makes the most of that. A change is small
against its weight, so it keeps its precision where a rounded weight would lose it altogether; and since it is added to what the
server has, what a pull has rounded away never piles up (mixed precision: Micikevicius et al., ICLR 2018). Buffers are averages
already, and a variance must not fall below zero: they travel as they are, rounded; what comes back as it was sent is what it was.

Both ends use these functions, and so do replays: the same bits everywhere.

Used by `labkit.training.server.server`, `labkit.training.worker.worker` and `labkit.simulation`, and where bytes are counted or
settings checked. Numpy alone.
"""

import math
from collections.abc import Iterator

import numpy as np

from labkit.errors import UpdateError
from labkit.updates.base import chunks

DTYPES = ("float32", "bfloat16", "float16")
LARGEST = float(np.finfo(np.float16).max)
LARGEST_BFLOAT16 = float(np.uint32(0x7F7F7FFF).view(np.float32))  # what is larger would be rounded to infinity
HEADROOM, SHIFTS = 14, 64  # a scaled float16 change is below 2^15; and how far it is scaled at most


def n_bytes(dtype: str, n: int) -> int:
    """Bytes of n weights on the wire."""
    return n * (4 if dtype == "float32" else 2)


def buffer(dtype: str, n: int) -> np.ndarray:
    """An array that n weights on the wire fit into."""
    return np.empty(n, np.float32 if dtype == "float32" else np.uint16)


def largest(dtype: str) -> float:
    """The largest magnitude of a weight that can be sent to a worker."""
    return LARGEST if dtype == "float16" else math.inf


def pack(weights: np.ndarray, dtype: str) -> np.ndarray:
    """A version as it is sent; float32 (n,) -> a `buffer`, or the array itself.

    Raises
    ------
    UpdateError
        A weight is too large for float16.
    """
    if dtype == "float32":
        return weights
    wire = buffer(dtype, len(weights))
    for part in chunks(len(weights)):
        if dtype == "float16" and (most := float(np.abs(weights[part]).max(initial=0.0))) > LARGEST:
            raise UpdateError(f"a weight or buffer of {most:.3g} does not fit into float16 ({LARGEST:g}). Use exchange='bfloat16'.")
        wire[part] = _halves(weights[part], dtype)
    return wire


def unpack(wire: np.ndarray, dtype: str, weights: np.ndarray) -> None:
    """A version as it was received, into float32 `weights`."""
    for part in chunks(len(wire)):
        weights[part] = _floats(wire[part], dtype)


def pack_change(weights: np.ndarray, pulled: np.ndarray, dtype: str, wire: np.ndarray, n_params: int) -> int:
    """What a worker pushes, into `wire`; returns shift.

    Of the parameters their change since what was `pulled` (on the wire), times 2^shift; of the buffers behind them, their values.
    """
    shift = 0
    with np.errstate(invalid="ignore", over="ignore"):  # what is no number stays so, for the server to refuse
        if dtype == "float16":
            most = max((float(np.abs(w - g).max()) for w, g in _apart(weights, pulled, dtype, n_params)), default=0.0)
            if 0 < most < math.inf:
                shift = int(np.clip(HEADROOM - math.floor(math.log2(most)), -SHIFTS, SHIFTS))
        factor = np.float32(2.0**shift)
        for part, (w, g) in zip(chunks(n_params), _apart(weights, pulled, dtype, n_params), strict=True):
            change = w - g
            if shift:
                change *= factor
            wire[part] = _halves(change, dtype)
        wire[n_params:] = _halves(weights[n_params:], dtype)
    return shift


def add_change(
    base: np.ndarray, wire: np.ndarray, dtype: str, shift: int, weights: np.ndarray, n_params: int, still: bool = True
) -> None:
    """What the server makes of a push, into float32 `weights`: the version `base` that the worker has pulled, and its change.

    A buffer that has not changed is that of `base`; unless `still` (runs of format 4 and before) it is what rounding has left of it.
    """
    factor = np.float32(2.0**-shift)
    with np.errstate(invalid="ignore", over="ignore"):  # as above
        for part in chunks(n_params):
            change = _floats(wire[part], dtype)
            if shift:
                change *= factor
            np.add(base[part], change, out=weights[part])
    buffers, before = wire[n_params:], base[n_params:]
    now = _floats(buffers, dtype)
    weights[n_params:] = np.where(buffers == _halves(before, dtype), before, now) if still else now


def _apart(weights: np.ndarray, pulled: np.ndarray, dtype: str, n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return ((weights[part], _floats(pulled[part], dtype)) for part in chunks(n))


def _halves(part: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "float16":
        with np.errstate(over="ignore"):  # infinity: the server refuses it
            return part.astype(np.float16).view(np.uint16)
    bits = part.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += bits
    rounded += 0x7FFF
    rounded >>= 16
    halves = rounded.astype(np.uint16)
    if not (part.max(initial=0) <= LARGEST_BFLOAT16 and part.min(initial=0) >= -LARGEST_BFLOAT16):
        halves[np.isnan(part)] = 0x7FC0  # rounding up may have carried into the sign
        halves[np.isfinite(part) & (halves & 0x7FFF == 0x7F80)] -= 1  # or into infinity
    return halves


def _floats(part: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "float16":
        return part.view(np.float16).astype(np.float32)
    return (part.astype(np.uint32) << 16).view(np.float32)
