"""What all update rules share: pushes, replies and merges, versions, members, and the check of every push.

    start -> [ push | join | leave | expire -> replies ] ... -> finish

A rule is a subclass of `Update` that writes `_merge(push) -> replies`. It does no I/O, never sleeps and reads no clock. Time
comes from its driver: `deadline` is for how many seconds the rule waits for others, `expire` is called when they are over.

Used by the other files of `labkit.updates`, and by `labkit.training.server.coordinator`, which drives a rule.
"""

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from labkit.cards import Card, Carded, rule_card, rule_text
from labkit.errors import UpdateError, known, real, whole
from labkit.imports import rule_config


@dataclass(frozen=True)
class Push:
    """What a worker hands in after a local pass: its weights, and where it started from.

    Examples
    --------
    >>> rule = labkit.updates.make_update("agwu")
    >>> rule.start(np.zeros(3, np.float32), workers=[0, 1])
    >>> replies = rule.push(labkit.updates.Push(worker=0, base_version=0, weights=np.ones(3, np.float32), score=0.5, samples=64))
    >>> [(reply.worker, reply.version) for reply in replies]
    [(0, 1)]
    """

    worker: int
    base_version: int
    weights: np.ndarray  # float32, shape (n,): [parameters | buffers]; only read, and not after its worker has its reply
    score: float | None  # Q in [0, 1] on the shared score set; None: it is measured later, for a rule that does not ask for it
    samples: int  # samples trained on in this local pass
    own: bool = False  # nobody else needs the array: the rule may write into it and make a version of it


@dataclass(frozen=True)
class Reply:
    """Releases a worker with a version and the weights to go on from; the array is never written again.

    They are the weights of that version, unless each worker has weights of its own under the rule (EASGD).

    Examples
    --------
    >>> rule = labkit.updates.LocalSGD()
    >>> rule.start(np.zeros(3, np.float32), workers=[0])
    >>> (reply,) = rule.push(labkit.updates.Push(0, 0, np.ones(3, np.float32), None, 64))
    >>> reply.version, reply.weights
    (1, array([1., 1., 1.], dtype=float32))
    """

    worker: int
    version: int
    weights: np.ndarray


@dataclass(frozen=True)
class Merge:
    """One worker's share in a new version: the effective coefficient of its push.

    Examples
    --------
    >>> rule = labkit.updates.LocalSGD()
    >>> rule.start(np.zeros(3, np.float32), workers=[0])
    >>> _ = rule.push(labkit.updates.Push(0, 0, np.ones(3, np.float32), None, 64))
    >>> rule.merges
    [Merge(worker=0, version=1, coefficient=1.0, staleness=0, samples=64)]
    """

    worker: int
    version: int
    coefficient: float
    staleness: int
    samples: int


CHUNK = 1 << 16  # weights
SAFE = 1e15  # of larger weights a product, or a sum of squares, may leave the range of float32
ROOM = (
    float(np.finfo(np.float32).max) / 2
)  # no push may bring the weights beyond it, at once or by a momentum: the rest is for the others


class BadPush(UpdateError):
    """A push that cannot be merged; the rule is as it was before. Its worker is at fault, not the rule.

    Examples
    --------
    >>> rule = labkit.updates.LocalSGD()
    >>> rule.start(np.zeros(3, np.float32), workers=[0])
    >>> rule.push(labkit.updates.Push(0, 0, np.ones(4, np.float32), None, 64))
    Traceback (most recent call last):
        ...
    labkit.updates.base.BadPush: push of worker 0 (from version 0) refused: float32 of shape (4,), but float32 of (3,) is needed.
    """


class Diverged(BadPush):
    """Its weights are no numbers any more.

    Examples
    --------
    >>> rule = labkit.updates.LocalSGD()
    >>> rule.start(np.zeros(3, np.float32), workers=[0])
    >>> rule.push(labkit.updates.Push(0, 0, np.full(3, np.nan, np.float32), None, 64))
    Traceback (most recent call last):
        ...
    labkit.updates.base.Diverged: push of worker 0 (from version 0) refused: its weights hold NaN or infinity. Lower the learning rate.
    """


class Update(Carded):
    """The global weights, their version, the members, and what happens to them; a rule adds how they are merged.

    Versions are immutable arrays: a new version is a new array, so that a reply can be sent while the next push is merged.

    `merges` holds the contributions of the latest call and `drops` what it has thrown away (coefficient 0), for the record.

    The last `n_exact` buffers are bytes of counters, flags and the like, with which nobody can compute: whatever a rule makes of
    them, a version gets those of the push with the most samples in it (`_leading`), and a worker with weights of its own keeps its.

    A tensor that no push has changed yet is `still`: each version has its bits, whatever a rule makes of it by rounding. So frozen
    parameters and constant buffers stay what they are. A rule from elsewhere may mean to move what no push has changed (noise, decay), and
    does.

    Examples
    --------
    >>> rule = labkit.updates.make_update("agwu")
    >>> rule.start(np.zeros(3, np.float32), workers=[0, 1])
    >>> replies = rule.push(labkit.updates.Push(worker=0, base_version=0, weights=np.ones(3, np.float32), score=0.5, samples=64))
    >>> [(reply.worker, reply.version) for reply in replies]
    [(0, 1)]
    """

    name = ""
    n_exact = 0  # set before `start`
    tensors: tuple[int, ...] | None = (
        None  # so is this: sizes of those that may be still, in order. None: parameters, and buffers as one
    )
    collective = False  # True: workers exchange gradients among themselves at every step
    scored = False  # True: the rule asks for Q
    ahead = False  # True: a worker may train on while its push is under way, and its next push holds that too
    paced = False  # True: local passes in proportion to measured speed, whatever the partition
    fleeting: tuple[str, ...] = ("weights", "bases", "exact")  # what `lasting` leaves out; dicts among these are by worker
    written: tuple[str, ...] = ()  # arrays that the rule writes in place: a saved state holds copies of them
    largest = 0.0  # |w| of all pushes so far

    def start(self, weights: np.ndarray, workers: Iterable[int], n_buffers: int = 0, blocks: Iterable[int] = ()) -> None:
        """Begin at version 0 with `weights` (float32, shape (n,); the last `n_buffers` entries are buffers).

        `blocks` are the sizes of the tensors that make the parameters, in their order; without them they count as one.
        """
        weights = np.array(weights, dtype=np.float32)
        if weights.ndim != 1:
            raise UpdateError(f"weights have shape {weights.shape}; one flat vector is needed.")
        weights.flags.writeable = False
        self.weights, self.version, self.largest = weights, 0, 0.0
        self.n_params = len(weights) - n_buffers
        self.blocks = [int(size) for size in blocks] or [self.n_params]
        if sum(self.blocks) != self.n_params:
            raise UpdateError(f"blocks of {sum(self.blocks)} parameters in all, but there are {self.n_params}.")
        sizes = [*self.blocks, n_buffers - self.n_exact] if self.tensors is None else self.tensors
        sizes = sizes if type(self).__module__.startswith("labkit.") else ()
        self.still = [[end - size, end] for size, end in zip(sizes, itertools.accumulate(sizes), strict=True) if size]
        self.merges: list[Merge] = []
        self.drops: list[Merge] = []
        self.bases = {int(worker): 0 for worker in workers}  # worker -> version that it works from
        self.exact: dict[int, np.ndarray] = {}  # worker -> the bytes in its latest push
        self._begin()

    def join(self, worker: int) -> list[Reply]:
        """`worker` comes, comes back, or begins anew what it could not finish: it gets the current version."""
        self.merges, self.drops = [], []
        return self._release([worker])

    def leave(self, worker: int) -> list[Reply]:
        """`worker` is gone. Replies release whoever waited only for it."""
        self.merges, self.drops = [], []
        for name in self.fleeting:
            if isinstance(known := getattr(self, name), dict):
                known.pop(worker, None)
        return []

    def push(self, push: Push) -> list[Reply]:
        """Merge, hold or drop one push: `check` and `merge`."""
        self.check(push)
        return self.merge(push)

    def check(self, push: Push) -> float:
        """The largest magnitude among the weights of a push that can be merged.

        Raises
        ------
        BadPush
            The worker is no member, the vector has the wrong shape or type, or Q lies outside [0, 1].
        Diverged
            The vector holds NaN or infinity.
        UpdateError
            So does the version that its worker was given: the rule made it.
        """
        got, who = push.weights, f"push of worker {push.worker} (from version {push.base_version})"
        if push.worker not in self.bases:
            raise BadPush(f"{who} refused: it is not a member. Members: {sorted(self.bases)}. Join first.")
        if push.base_version != self.bases[push.worker]:
            raise BadPush(f"{who} refused: it was last given version {self.bases[push.worker]}.")
        if got.shape != self.weights.shape or got.dtype != np.float32:
            want = self.weights.shape
            raise BadPush(f"{who} refused: {got.dtype} of shape {got.shape}, but float32 of {want} is needed.")
        if not math.isfinite(most := magnitude(got)):
            if not math.isfinite(magnitude(self.weights)):
                raise UpdateError(f"version {self.version} holds NaN or infinity, which no push did: the rule made it.")
            raise Diverged(f"{who} refused: its weights hold NaN or infinity. Lower the learning rate.")
        if (push.score is None and self.scored) or not 0.0 <= (push.score or 0.0) <= 1.0:
            raise BadPush(f"{who} refused: its score is {push.score}, but Q lies in [0, 1].")
        self.largest = max(self.largest, most)
        return most

    def merge(self, push: Push) -> list[Reply]:
        """Merge, hold or drop one push that was checked.

        Raises
        ------
        BadPush
            Float32 cannot hold what comes out.
        MemoryError
            There is no room for what comes out. The rule is as it was before, but for what it had already written in place (`written`):
            so a rule takes the memory that it needs before it writes.
        """
        self.merges, self.drops = [], []
        if push.own and not type(self).__module__.startswith(
            "labkit."
        ):  # one from elsewhere may read it again, or have others merge it
            push = replace(push, own=False)
        if self.largest <= SAFE:
            with self._undone():
                return self._merge_exactly(push)
        before, reach = self.state_dict(), self._reach()
        try:
            with np.errstate(all="ignore"):
                replies = self._merge_exactly(push)
            self._check_range()
            if not self._reach() <= max(ROOM, 1.001 * reach):  # who has brought it there is refused, not who comes next
                raise self._beyond_range()
        except BadPush:
            self.load_state_dict(before)
            raise
        return replies

    def _merge_exactly(self, push: Push) -> list[Reply]:
        self.still = [[a, b] for a, b in self.still if _equal(push.weights[a:b], self.weights[a:b])]
        if not self.n_exact:
            return self._merge(push)
        self.exact[push.worker] = push.weights[-self.n_exact :].copy()
        return [self._exactly(reply) for reply in self._merge(push)]

    @contextlib.contextmanager
    def _undone(self) -> Iterator[None]:
        """A MemoryError in here leaves the rule with what it had; arrays are not copied for that."""
        before = {key: value.copy() if isinstance(value, dict | list) else value for key, value in vars(self).items()}
        try:
            yield
        except MemoryError:
            vars(self).update(before)
            raise

    def _into(self, pushes: Iterable[Push]) -> np.ndarray:
        """An array (n,) for what is made of these: the weights of one that may be written into, or a new one.

        Always a new one beyond `SAFE`, since what comes out may be refused, and the pushes that the rule holds stay.
        """
        if self.largest <= SAFE:
            for push in pushes:
                if push.own:
                    return push.weights
        return np.empty_like(self.weights)

    def _exactly(self, reply: Reply) -> Reply:
        """A reply with weights of the worker's own holds the bytes of its push."""
        if reply.weights is self.weights or reply.worker not in self.exact:
            return reply
        own = reply.weights.copy()
        own[-self.n_exact :] = self.exact[reply.worker]
        own.flags.writeable = False
        return replace(reply, weights=own)

    def _leading(self, merges: list[Merge]) -> int | None:
        """The worker whose bytes a version gets; None: they stay as they are."""
        known = [merge for merge in merges if merge.worker in self.exact]
        return max(known, key=lambda merge: merge.samples).worker if known else None

    @property
    def deadline(self) -> float | None:
        """Seconds that the rule waits for others, from the push with which it began to wait; None: as long as it takes."""
        return None

    def expire(self) -> list[Reply]:
        """The time of `deadline` is over."""
        self.merges, self.drops = [], []
        return []

    def finish(self) -> None:
        """No push comes any more: what was held back for later becomes the last version."""
        self.merges, self.drops = [], []

    def state_dict(self) -> dict:
        """Everything that the future of the rule depends on: numbers, lists, dicts and arrays; no objects."""
        return self._state({"merges", "drops", "largest"})

    def load_state_dict(self, state: dict) -> None:
        vars(self).update({key: _copied(value, key in self.written) for key, value in state.items()})
        self.merges, self.drops = [], []

    def lasting(self) -> dict:
        """What a checkpoint holds beside the weights: `state_dict` without what belongs to local passes under way."""
        return self._state({"merges", "drops", "largest", *self.fleeting})

    def _state(self, without: set[str]) -> dict:
        return {key: _copied(value, key in self.written) for key, value in vars(self).items() if key not in without}

    def go_on(self, weights: np.ndarray, workers: Iterable[int], n_buffers: int, lasting: dict) -> None:
        """Begin again from a checkpoint, with workers of which none has anything under way."""
        self.start(weights, workers, n_buffers)
        self.load_state_dict(lasting)
        self.bases = dict.fromkeys(self.bases, self.version)

    def restart(self, weights: np.ndarray, workers: Iterable[int]) -> list[Reply]:
        """A new version that no push has made: everybody begins anew from `weights`, and what the rule remembers is gone.

        Raises `UpdateError` where they are not those of this model, or hold NaN or infinity.
        """
        weights, version = np.asarray(weights), self.version + 1
        if weights.shape != self.weights.shape or not math.isfinite(magnitude(weights)):
            raise UpdateError(
                f"weights of shape {weights.shape} cannot be version {version}: they hold NaN, or are not of this model."
            )
        with self._undone():
            self.start(weights, workers, len(weights) - self.n_params, self.blocks)
        self.version = version
        return self._release(sorted(self.bases))

    def config(self) -> dict:
        """Name (a user's own class: its import path) and settings, stored as attributes, as JSON that `make_update` reads back."""
        return rule_config(self, UpdateError)

    def __repr__(self) -> str:
        return rule_text(self)

    def _card(self) -> Card:
        return rule_card(self, "update", "labkit.train(problem, lab, update=...)")

    def _begin(self) -> None:
        """Set up what the rule holds beside weights and members."""

    def _merge(self, push: Push) -> list[Reply]:
        raise NotImplementedError

    def _reach(self) -> float:
        """How large the weights become by what the rule holds, at most, when nobody adds to it: a momentum goes on moving them."""
        return magnitude(self.weights)

    def _check_range(self) -> None:
        """After weights beyond `SAFE`: is all that the rule holds within the range of float32?"""
        held = (
            value.values() if isinstance(value, dict) and name in self.written else [value] for name, value in vars(self).items()
        )
        arrays = (
            value for value in itertools.chain.from_iterable(held) if isinstance(value, np.ndarray) and value.dtype.kind == "f"
        )
        if not all(math.isfinite(magnitude(array.ravel())) for array in arrays):
            raise self._beyond_range()

    def _beyond_range(self) -> BadPush:
        text = f"with weights as large as {self.largest:.3g} what the rule makes of them is beyond the range of float32"
        return BadPush(f"{text} (3.4e38). Lower the learning rate.")

    def _publish(self, weights: np.ndarray, merges: Iterable[tuple[Push, float]]) -> None:
        self._publish_merged(weights, [self._merged(push, coefficient) for push, coefficient in merges])

    def _publish_merged(self, weights: np.ndarray, merges: list[Merge]) -> None:
        for start, end in self.still:
            weights[start:end] = self.weights[start:end]
        if self.n_exact:
            leading = self._leading(merges)
            weights[-self.n_exact :] = self.weights[-self.n_exact :] if leading is None else self.exact[leading]
        weights.flags.writeable = False
        self.weights, self.version, self.merges = weights, self.version + 1, merges
        if self.largest > SAFE:
            self._check_range()

    def _merged(self, push: Push, coefficient: float) -> Merge:
        """The share of a push in the next version."""
        return Merge(push.worker, self.version + 1, float(coefficient), self.version - push.base_version, push.samples)

    def _drop(self, push: Push) -> list[Reply]:
        """Throw a push away; its worker begins anew from the current version."""
        self.drops = [Merge(push.worker, self.version, 0.0, self.version - push.base_version, push.samples)]
        return self._release([push.worker])

    def _release(self, workers: Iterable[int]) -> list[Reply]:
        replies = [Reply(worker, self.version, self.weights) for worker in workers]
        self.bases.update({reply.worker: self.version for reply in replies})
        return replies


class Changes(Update):
    """A rule on changes: it needs how far a worker has come from the weights W(k) that it was given, W_j - W(k).

    Those are retained here (`base_weights`), not sent twice; workers that were given the same version share one array.

    Examples
    --------
    >>> class Half(labkit.updates.Changes):
    ...     def _merge(self, push):
    ...         self._publish(self.weights + 0.5 * self._change(push), [(push, 0.5)])
    ...         return self._release([push.worker])
    >>> rule = Half()
    >>> rule.start(np.zeros(1, np.float32), workers=[0])
    >>> rule.push(labkit.updates.Push(0, 0, np.ones(1, np.float32), None, 64))[0].weights
    array([0.5], dtype=float32)
    """

    fleeting = (*Update.fleeting, "base_weights")

    def _begin(self) -> None:
        self.base_weights = dict.fromkeys(self.bases, self.weights)

    def _release(self, workers: Iterable[int]) -> list[Reply]:
        replies = super()._release(workers)
        self.base_weights.update({reply.worker: reply.weights for reply in replies})
        return replies

    def _change(self, push: Push) -> np.ndarray:
        """W_j - W(k) of the parameters, and the buffers of W_j behind them: an array to go on with (`_into`)."""
        into, n = self._into([push]), self.n_params
        np.subtract(push.weights[:n], self.base_weights[push.worker][:n], out=into[:n])
        if into is not push.weights:
            into[n:] = push.weights[n:]
        return into

    def _move(self, push: Push, coefficient: float) -> None:
        """A new version: W + coefficient (W_j - W(k)); buffers between old and pushed value."""
        merged, base, factor = self._into([push]), self.base_weights[push.worker], np.float32(coefficient)
        for part in chunks(self.n_params):
            change = np.subtract(push.weights[part], base[part], out=merged[part])
            change *= factor
            change += self.weights[part]
        merged[self.n_params :] = push.weights[self.n_params :]
        self._mix_buffers(merged, coefficient)
        self._publish(merged, [(push, coefficient)])

    def _mix_buffers(self, merged: np.ndarray, coefficient: float) -> None:
        """Of those pushed, which `merged` holds. Buffers are averaged and never extrapolated: a variance must not fall below zero."""
        n, mix = self.n_params, np.float32(min(1.0, coefficient))
        merged[n:] = (1 - mix) * self.weights[n:] + mix * merged[n:]


def chunks(n: int) -> Iterator[slice]:
    """`n` weights in slices that fit into the cache of a processor: a formula of many steps then goes through memory once."""
    return (slice(start, min(n, start + CHUNK)) for start in range(0, n, CHUNK))


def magnitude(vector: np.ndarray) -> float:
    """The largest |w|, or a little more where it is below 30,000; NaN or infinity if the vector holds any.

    A sum would call finite weights of 1e38 infinite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        squares = sum(float(np.dot(vector[part], vector[part])) for part in chunks(len(vector)))
    if squares < 1e9:
        return math.sqrt(squares)  # quicker than two passes for the extremes
    low, high = float(vector.min()), float(vector.max())
    return max(high, -low) if high == high else high


def weighted_sum(vectors: list[np.ndarray], factors: list[float], out: np.ndarray | None = None) -> np.ndarray:
    """sum_j factors_j vectors_j of float32 vectors of one length; each goes through memory once.

    In `out`, which may be one of them, or a new array.
    """
    sums, products = np.empty((2, CHUNK), np.float32)
    out = np.empty_like(vectors[0]) if out is None else out
    for part in chunks(len(out)):
        n = len(out[part])
        total = np.multiply(vectors[0][part], np.float32(factors[0]), out=sums[:n])
        for vector, factor in zip(vectors[1:], factors[1:], strict=True):
            total += np.multiply(vector[part], np.float32(factor), out=products[:n])
        out[part] = total
    return out


def _equal(some: np.ndarray, others: np.ndarray) -> bool:
    return all(np.array_equal(some[part], others[part]) for part in chunks(len(some)))


def number(rule: Update, name: str, value: float, **bounds: float) -> float:
    """A setting that is a finite number within `bounds` (`labkit.errors.real`); otherwise `ValueError`."""
    return real(f"{type(rule).__name__}: {name}", value, error=ValueError, **bounds)


def count(rule: Update, name: str, value: int | None, least: int = 1) -> int | None:
    """A setting that is a whole number of at least `least`, or None: the rule decides by the number of workers."""
    return None if value is None else whole(f"{type(rule).__name__}: {name}", value, least, error=ValueError)


def one_of(rule: Update, name: str, value: str, options: Iterable[str]) -> str:
    """A setting that is one of a few words."""
    return known(f"{type(rule).__name__}: {name}", value, options)


def _copied(value: Any, written: bool) -> Any:
    """A value of a state that can be retained. Arrays are shared, since nobody writes them, except the `written` ones."""
    if isinstance(value, dict):
        return {key: _copied(part, written) for key, part in value.items()}
    if isinstance(value, list):
        return [_copied(part, written) for part in value]
    return value.copy() if written and isinstance(value, np.ndarray) else value
