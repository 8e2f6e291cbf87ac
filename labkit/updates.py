"""Update rules: how the weights that workers push become the next global weights.

An update is a pure state machine on flat float32 vectors. It opens nothing, sleeps never and reads no clock, so the same
object serves a live run, a replay and a simulation. Each of its calls returns *replies*; a reply releases one worker with
a version and the weights of that version. A barrier is nothing but "no replies yet".

    SGWU       W(i) = sum_j W_j Q_j / sum_l Q_l                      when all have pushed       BPT-CNN 2019
    AGWU       W(i) = W(i-1) + gamma_j Q_j (W_j - W(k))              at every push              BPT-CNN 2019
    AllReduce  gradients averaged at every optimiser step            torch DDP does the work    baseline

Every vector is [parameters | buffers]: SGWU and AGWU mix buffers (BatchNorm's running statistics) as convex averages, because a
variance must not be extrapolated below zero; AllReduce takes those of its first worker, as DDP does.

Used by `labkit.coordinator` (live) and by anybody who tests or invents a rule.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from labkit.errors import UpdateError


@dataclass(frozen=True)
class Push:
    """What a worker hands in after a local pass: its weights, and where it started from."""

    worker: int
    base_version: int
    weights: np.ndarray  # float32, shape (n,): [parameters | buffers]
    score: float  # Q in [0, 1] on the shared score set
    samples: int  # samples trained on in this local pass


@dataclass(frozen=True)
class Reply:
    """Releases a worker with the weights of a version; the array is never written again."""

    worker: int
    version: int
    weights: np.ndarray


@dataclass(frozen=True)
class Merge:
    """One worker's share in a new version: the effective coefficient of its push."""

    worker: int
    version: int
    coefficient: float
    staleness: int
    samples: int


class Update:
    """What all rules share: the global weights, their version, the members and the check of every push.

    A rule subclasses this and writes `_merge(push) -> replies`. Versions are immutable arrays: a new version is a new
    array, so that a reply can be sent while the next push is merged.

    `merges` holds the contributions of the latest call, for the record.
    """

    name = ""
    collective = False  # True: workers exchange gradients among themselves at every step
    fleeting: tuple[str, ...] = ("weights", "bases")  # what `lasting` leaves out

    def start(self, weights: np.ndarray, workers: Iterable[int], n_buffers: int = 0) -> None:
        """Begin at version 0 with `weights` (float32, shape (n,); the last `n_buffers` entries are buffers)."""
        weights = np.array(weights, dtype=np.float32)
        if weights.ndim != 1:
            raise UpdateError(f"weights have shape {weights.shape}; one flat vector is needed.")
        weights.flags.writeable = False
        self.weights, self.version = weights, 0
        self.n_params = len(weights) - n_buffers
        self.merges: list[Merge] = []
        self.bases = {int(worker): 0 for worker in workers}  # worker -> version that it works from

    def join(self, worker: int) -> list[Reply]:
        """`worker` comes, comes back, or begins anew what it could not finish: it gets the current version."""
        self.merges = []
        self.bases[worker] = self.version
        return [Reply(worker, self.version, self.weights)]

    def leave(self, worker: int) -> list[Reply]:
        """`worker` is gone. Replies release whoever waited only for it."""
        self.merges = []
        self.bases.pop(worker, None)
        return []

    def push(self, push: Push) -> list[Reply]:
        """Take one push in.

        Raises
        ------
        UpdateError
            The worker is no member, the vector has the wrong shape or type, or holds NaN or infinity, or Q lies outside
            [0, 1]. The state is then as it was.
        """
        self._check(push)
        self.merges = []
        return self._merge(push)

    def state_dict(self) -> dict:
        """Everything that the future of the rule depends on: numbers, dicts and arrays; no objects."""
        state = {key: value for key, value in vars(self).items() if key != "merges"}
        return {key: dict(value) if isinstance(value, dict) else value for key, value in state.items()}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update({key: dict(value) if isinstance(value, dict) else value for key, value in state.items()})
        self.merges = []

    def lasting(self) -> dict:
        """What a checkpoint keeps beside the weights: `state_dict` without what belongs to local passes under way."""
        return {key: value for key, value in self.state_dict().items() if key not in self.fleeting}

    def go_on(self, weights: np.ndarray, workers: Iterable[int], n_buffers: int, lasting: dict) -> None:
        """Begin again from a checkpoint, with workers of which none has anything under way."""
        self.start(weights, workers, n_buffers)
        self.load_state_dict(lasting)
        self.bases = dict.fromkeys(self.bases, self.version)

    def config(self) -> dict:
        """Name and settings, as JSON; `make_update` reads it back."""
        return {"name": self.name}

    def _merge(self, push: Push) -> list[Reply]:
        raise NotImplementedError

    def _check(self, push: Push) -> None:
        got, who = push.weights, f"push of worker {push.worker} (from version {push.base_version})"
        if push.worker not in self.bases:
            raise UpdateError(f"{who} refused: it is not a member. Members: {sorted(self.bases)}. Join first.")
        if push.base_version != self.bases[push.worker]:
            raise UpdateError(f"{who} refused: it was last given version {self.bases[push.worker]}.")
        if got.shape != self.weights.shape or got.dtype != np.float32:
            want = self.weights.shape
            raise UpdateError(f"{who} refused: {got.dtype} of shape {got.shape}, but float32 of {want} is needed.")
        if not np.isfinite(np.add.reduce(got)):  # one pass, no temporary: NaN and infinity survive a sum
            raise UpdateError(f"{who} refused: its weights hold NaN or infinity. Lower the learning rate.")
        if not 0.0 <= push.score <= 1.0:
            raise UpdateError(f"{who} refused: its score is {push.score}, but Q lies in [0, 1].")

    def _publish(self, weights: np.ndarray, merges: list[tuple[Push, float]]) -> None:
        weights.flags.writeable = False
        before = self.version
        self.weights, self.version = weights, before + 1
        self.merges = [Merge(p.worker, self.version, c, before - p.base_version, p.samples) for p, c in merges]

    def _release(self, workers: Iterable[int]) -> list[Reply]:
        replies = [Reply(worker, self.version, self.weights) for worker in workers]
        self.bases.update({reply.worker: self.version for reply in replies})
        return replies


class _Barrier(Update):
    """A rule that waits for every member, then merges all pushes in the order of worker indices.

    Who joins while a round is under way begins with the next one. Who leaves is not waited for any more.
    """

    fleeting = ("weights", "bases", "pending", "waiting")

    def start(self, weights: np.ndarray, workers: Iterable[int], n_buffers: int = 0) -> None:
        super().start(weights, workers, n_buffers)
        self.pending: dict[int, Push] = {}
        self.waiting: dict[int, int] = {}  # who begins with the next round, and the version at which it came

    def join(self, worker: int) -> list[Reply]:
        self.merges = []
        self.pending.pop(worker, None)  # a worker that comes back has forgotten what it pushed
        self.bases[worker] = self.waiting[worker] = self.version
        return self._close_round()

    def leave(self, worker: int) -> list[Reply]:
        super().leave(worker)
        self.pending.pop(worker, None)
        self.waiting.pop(worker, None)
        return self._close_round()

    def _merge(self, push: Push) -> list[Reply]:
        if push.worker in self.waiting:
            raise UpdateError(f"push of worker {push.worker} refused: it begins with the next round.")
        self.pending[push.worker] = push
        return self._close_round()

    def _close_round(self) -> list[Reply]:
        if set(self.pending) != set(self.bases) - set(self.waiting):
            return []
        pushes = [self.pending[worker] for worker in sorted(self.pending)]
        released = sorted([*self.pending, *self.waiting])
        self.pending, self.waiting = {}, {}
        if pushes:
            self._merge_all(pushes)
        return self._release(released)

    def _merge_all(self, pushes: list[Push]) -> None:
        raise NotImplementedError


class SGWU(_Barrier):
    """Synchronous global weight update (BPT-CNN 2019).

    When all m workers have pushed, W(i) = sum_j W_j Q_j / sum_l Q_l, with Q_j the score of worker j on the shared score set. If
    every Q is 0 the weights count equally. With one worker the factor is exactly 1: plain local training, bit for bit.
    """

    name = "sgwu"

    def _merge_all(self, pushes: list[Push]) -> None:
        total = sum(push.score for push in pushes)
        factors = [push.score / total if total > 0 else 1 / len(pushes) for push in pushes]
        merged = pushes[0].weights * np.float32(factors[0])
        for push, factor in zip(pushes[1:], factors[1:], strict=True):
            merged += push.weights * np.float32(factor)
        self._publish(merged, list(zip(pushes, factors, strict=True)))


class AGWU(Update):
    """Asynchronous global weight update (BPT-CNN 2019): every push makes a version at once, nobody waits.

    Worker j started from version k and the server is at version i-1 when it pushes W_j:

        W(i) = W(i-1) + gamma_j q_j (W_j - W(k)),    gamma_j = exp(k / (i-1)) / sum_l exp(k_l / (i-1))

    with k_l the version that worker l works from, and i-1 replaced by 1 at the first update, where gamma_j = 1/m.

    Parameters
    ----------
    quality
        "normalised" (default): q_j = Q_j / mean_l Q_l over the latest score of every worker, so that m pushes move the weights
        by about one local pass also while scores are low. "raw": q_j = Q_j as in the paper, whose first steps are then smaller
        by a factor of the number of classes.
    """

    name = "agwu"
    fleeting = ("weights", "bases", "base_weights", "scores")

    def __init__(self, quality: str = "normalised") -> None:
        if quality not in ("normalised", "raw"):
            raise ValueError(f"AGWU has no quality {quality!r}. It has: 'normalised', 'raw'.")
        self.quality = quality

    def start(self, weights: np.ndarray, workers: Iterable[int], n_buffers: int = 0) -> None:
        super().start(weights, workers, n_buffers)
        self.base_weights = {worker: self.weights for worker in self.bases}  # W(k): kept here, not sent twice
        self.scores: dict[int, float] = {}

    def join(self, worker: int) -> list[Reply]:
        self.base_weights[worker] = self.weights
        return super().join(worker)

    def leave(self, worker: int) -> list[Reply]:
        self.base_weights.pop(worker, None)
        self.scores.pop(worker, None)
        return super().leave(worker)

    def attenuation(self, worker: int) -> float:
        """gamma_j of the paper: the softmax of base versions over the server's version; 1 for a single worker."""
        now = max(1, self.version)
        return math.exp(self.bases[worker] / now) / sum(math.exp(base / now) for base in self.bases.values())

    def _merge(self, push: Push) -> list[Reply]:
        self.scores[push.worker] = push.score
        quality = push.score
        if self.quality == "normalised":
            mean = sum(self.scores.values()) / len(self.scores)
            quality = push.score / mean if mean > 0 else 1.0
        coefficient = self.attenuation(push.worker) * quality
        n, step = self.n_params, np.float32(coefficient)
        merged = push.weights - self.base_weights[push.worker]
        merged *= step
        merged += self.weights
        mix = np.float32(min(1.0, coefficient))
        merged[n:] = (1 - mix) * self.weights[n:] + mix * push.weights[n:]
        self._publish(merged, [(push, coefficient)])
        self.base_weights[push.worker] = self.weights
        return self._release([push.worker])

    def config(self) -> dict:
        return {"name": self.name, "quality": self.quality}


class AllReduce(_Barrier):
    """Synchronous baseline: torch DistributedDataParallel averages gradients at every optimiser step (gloo, or NCCL on GPUs).

    The workers hold equal weights by construction; at the end of a local pass they meet here only to be recorded, to get
    new samples and to stop together. Gradients count by samples, and each worker's batches are in proportion to its shard,
    so unequal shards need the same number of steps everywhere and nobody waits for a missing batch.

    When a worker is lost or one comes, those who are there form a new group from the latest version, with fresh optimisers (their
    momenta would differ); the local pass that was under way is made again.

    Raises `UpdateError` when the replicas no longer agree.
    """

    name = "allreduce"
    collective = True

    def _merge_all(self, pushes: list[Push]) -> None:
        first = pushes[0].weights[: self.n_params]
        for push in pushes[1:]:
            apart = float(np.max(np.abs(push.weights[: self.n_params] - first), initial=0.0))
            if apart > 1e-4 * max(1.0, float(np.max(np.abs(first), initial=0.0))):
                raise UpdateError(
                    f"replicas of workers {pushes[0].worker} and {push.worker} differ by {apart:.3g}; all-reduce keeps them "
                    "equal. Is a parameter changed outside the optimiser step?"
                )
        total = sum(push.samples for push in pushes)
        factors = [push.samples / total if total else 1 / len(pushes) for push in pushes]
        merged = pushes[0].weights.copy()
        self._publish(merged, list(zip(pushes, factors, strict=True)))


UPDATES = {rule.name: rule for rule in (SGWU, AGWU, AllReduce)}


def make_update(update: str | dict | Update) -> Update:
    """An update from its name ("agwu"), its `config()`, or itself; an unknown name is a `ValueError` with the known ones."""
    if isinstance(update, Update):
        return update
    settings = dict(update) if isinstance(update, dict) else {"name": update}
    name = str(settings.pop("name", "")).lower()
    if name not in UPDATES:
        close = difflib.get_close_matches(name, UPDATES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown update {update!r}. Known: {', '.join(UPDATES)}.{hint}")
    return UPDATES[name](**settings)
