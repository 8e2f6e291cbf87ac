"""Rules with a barrier: all push, then all go on from one new version.

    SGWU       W(i) = sum_j W_j Q_j / sum_l Q_l              when all have pushed, or enough of them     BPT-CNN 2019
    LocalSGD   W(i) = sum_j n_j W_j / sum_l n_l              n_j = 1, or the samples of worker j         Stich 2019, FedAvg 2017
    AllReduce  gradients averaged at every optimiser step    torch DDP does the work                     baseline

Used through `labkit.updates`.
"""

import math

import numpy as np

from labkit.errors import UpdateError, flag
from labkit.updates.base import Merge, Push, Reply, Update, chunks, magnitude, number, one_of, weighted_sum


class Barrier(Update):
    """A rule that waits for every member, then merges all pushes in the order of worker indices.

    Who joins while a round is under way begins with the next one. Who leaves is not waited for any more. A rule may close a round
    before all have pushed (`_enough`): the push of who comes too late is thrown away, and its worker joins the round under way.

    Examples
    --------
    >>> rule = labkit.updates.LocalSGD()  # is one
    >>> rule.start(np.zeros(1, np.float32), workers=[0, 1])
    >>> rule.push(labkit.updates.Push(0, 0, np.ones(1, np.float32), None, 64))  # waits for worker 1
    []
    >>> [reply.worker for reply in rule.push(labkit.updates.Push(1, 0, np.ones(1, np.float32), None, 64))]
    [0, 1]
    """

    fleeting = (*Update.fleeting, "pending", "waiting")

    def _begin(self) -> None:
        self.pending: dict[int, Push] = {}
        self.waiting: dict[int, int] = {}  # who begins with the next round, and the version at which it came

    def join(self, worker: int) -> list[Reply]:
        self.merges, self.drops = [], []
        self.pending.pop(worker, None)  # a worker that comes back has forgotten what it pushed
        self.bases[worker] = self.waiting[worker] = self.version
        return self._close_round()

    def leave(self, worker: int) -> list[Reply]:
        super().leave(worker)
        return self._close_round()

    def finish(self) -> None:
        super().finish()
        pushes, self.pending = self._in_order(), {}
        if pushes:
            self._merge_all(pushes)

    def state_dict(self) -> dict:
        # Without `own`: the rule is not the only one that holds their weights any more.
        pending = {who: {key: value for key, value in vars(push).items() if key != "own"} for who, push in self.pending.items()}
        return {**super().state_dict(), "pending": pending}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        if "pending" in state:
            self.pending = {worker: Push(**push) for worker, push in state["pending"].items()}

    def _merge(self, push: Push) -> list[Reply]:
        if push.worker in self.waiting:
            raise UpdateError(f"push of worker {push.worker} refused: it begins with the next round.")
        if push.base_version < self.version:
            return self._drop(push)
        self.pending[push.worker] = push
        return self._close_round()

    def _close_round(self) -> list[Reply]:
        # Who begins with the next round, and who has pushed, is at this version too; counting is quick with a thousand workers.
        missing = list(self.bases.values()).count(self.version) - len(self.waiting) - len(self.pending)
        if missing and not self._enough():
            return []
        pushes, released = self._in_order(), sorted([*self.pending, *self.waiting])
        self.pending, self.waiting = {}, {}
        if pushes:
            self._merge_all(pushes)
        return self._release(released)

    def _reach(self) -> float:
        return max([super()._reach(), *(magnitude(push.weights) for push in self.pending.values())])

    def _in_order(self) -> list[Push]:
        return [self.pending[worker] for worker in sorted(self.pending)]

    def _enough(self) -> bool:
        """May the round close although somebody is missing?"""
        return False

    def _merge_all(self, pushes: list[Push]) -> None:
        """W(i) = sum_j f_j W_j with the `_factors` f_j, a convex average: buffers are averaged alike."""
        factors = self._factors(pushes)
        merged = weighted_sum([push.weights for push in pushes], factors, self._into(pushes))
        self._publish(merged, zip(pushes, factors, strict=True))

    def _factors(self, pushes: list[Push]) -> list[float]:
        """At least 0, with the sum 1."""
        raise NotImplementedError


def shares(pushes: list[Push], weighting: str) -> list[float]:
    """Factors that sum to 1: "equal", or by the "samples" of each push."""
    total = sum(push.samples for push in pushes)
    if weighting == "equal" or not total:
        return [1 / len(pushes)] * len(pushes)
    return [push.samples / total for push in pushes]


class SGWU(Barrier):
    """Synchronous global weight update (BPT-CNN 2019).

    When all m workers have pushed, W(i) = sum_j W_j Q_j / sum_l Q_l, with Q_j the score of worker j on the shared score set. If
    every Q is 0 the weights count equally. With one worker the factor is exactly 1: plain local training, bit for bit.

    Parameters
    ----------
    quorum
        The share of the workers, in (0, 1], that is enough: with less than 1 the others are backup workers (Chen et al. 2016). A
        push that comes after its round has closed is thrown away (and its samples are for somebody else to train on).
    grace
        Seconds from the first push of a round in which the others may still come, also when a quorum has pushed. 0: none.

    Examples
    --------
    >>> labkit.train(problem, lab, update=labkit.SGWU(quorum=0.5, grace=1.0), passes=1).wait().state
    'done'
    """

    name = "sgwu"
    scored = True
    fleeting = (*Barrier.fleeting, "expired")

    def __init__(self, quorum: float = 1.0, grace: float = 0.0) -> None:
        self.quorum = float(number(self, "quorum", quorum, above=0, most=1))
        self.grace = float(number(self, "grace", grace, least=0))

    def _begin(self) -> None:
        super()._begin()
        self.expired = False  # the grace time of the round under way is over

    @property
    def deadline(self) -> float | None:
        return self.grace if self.quorum < 1 and self.grace > 0 and self.pending and not self.expired else None

    def expire(self) -> list[Reply]:
        super().expire()
        self.expired = True
        return self._close_round()

    def _close_round(self) -> list[Reply]:
        self.expired = self.expired and bool(self.pending)
        return super()._close_round()

    def _enough(self) -> bool:
        members = len(self.bases) - len(self.waiting)
        return (self.expired or self.grace == 0) and len(self.pending) >= max(1, math.ceil(self.quorum * members - 1e-9))

    def _factors(self, pushes: list[Push]) -> list[float]:
        self.expired = False
        total = sum(push.score for push in pushes)
        return [push.score / total if total > 0 else 1 / len(pushes) for push in pushes]


class LocalSGD(Barrier):
    """Local SGD (Stich 2019), federated averaging (McMahan et al. 2017): the mean of the weights after every local pass.

    W(i) = sum_j n_j W_j / sum_l n_l. With one worker this is plain local training, bit for bit.

    Parameters
    ----------
    weighting
        "equal" (default): n_j = 1, local SGD. "samples": n_j = samples of the local pass, FedAvg.

    Examples
    --------
    >>> labkit.train(problem, lab, update=labkit.updates.LocalSGD(), passes=1).wait().state
    'done'
    """

    name = "localsgd"

    def __init__(self, weighting: str = "equal") -> None:
        self.weighting = one_of(self, "weighting", weighting, ("equal", "samples"))

    def _factors(self, pushes: list[Push]) -> list[float]:
        return shares(pushes, self.weighting)


class AllReduce(Barrier):
    """Synchronous baseline: torch DistributedDataParallel averages gradients at every optimiser step (gloo, or NCCL on GPUs).

    The workers hold equal weights by construction; at the end of a local pass they meet here only to be recorded, to get
    new samples and to stop together. Gradients count by samples, and each worker's batches are in proportion to its shard,
    so unequal shards need the same number of steps everywhere and nobody waits for a missing batch.

    When a worker is lost or one comes, those who are there form a new group from the latest version, with fresh optimisers (their
    momenta would differ); the local pass that was under way is made again. A replay has ranks of its own that meet in the same order
    (`labkit.simulation.joint`), so its gradients are averaged to the same bits, on CPUs.

    Gradients are averaged at every step, so that NaN in those of one rank is in all replicas one step later: the run then fails for
    that, and nobody can tell whose it was. A push that is wrong in itself (its size, score or version) costs its worker alone, as
    under every rule. Raises `UpdateError`, which ends the run, when the replicas no longer agree; parameters that the samples of a
    batch change otherwise than by gradients are refused before it starts.

    Gradients go from worker to worker by gloo or NCCL, not by labkit's wire: on loopback where all are on one host, else in the clear and
    without authentication, so use a private network or a VPN between hosts, or another rule, whose weights go by TLS. The wheel of torch 2.13
    has gloo without TLS; a torch built with USE_GLOO_WITH_OPENSSL=ON uses it when the workers' environment has
    GLOO_DEVICE_TRANSPORT=TCP_TLS and GLOO_DEVICE_TRANSPORT_TCP_TLS_PKEY, _CERT and _CA_FILE.

    Parameters
    ----------
    buffers
        "mean" (default): running statistics of normalisations are reduced at the end of each local pass, to their mean by samples.
        "first": they are those of the first worker, as DDP has them; so they are in records without this setting. Counters and flags are
        the first worker's anyway.
    tolerance
        By how much replicas may differ, of their largest weight if that is above 1: processors of several kinds round otherwise. With 0
        they must be equal to the last bit.
    sync_batchnorm
        True: in a step batch normalisations are by mean and variance of the batches of all workers, forward and backward, as one worker
        with the joint batch has them (`labkit.models.batch_norm`); two small exchanges for each normalisation and step. It matters where a
        worker's batch is small. False (default): by each worker's own batch, as DDP has them. Not with an inner layer that splits.

    Examples
    --------
    >>> labkit.train(problem, lab, update=labkit.AllReduce(), passes=1).wait().state
    'done'
    """

    name = "allreduce"
    collective = True

    def __init__(self, buffers: str = "mean", tolerance: float = 1e-4, sync_batchnorm: bool = False) -> None:
        self.buffers = one_of(self, "buffers", buffers, ("mean", "first"))
        self.sync_batchnorm = flag("AllReduce: sync_batchnorm", sync_batchnorm)
        self.tolerance = float(number(self, "tolerance", tolerance, least=0))

    def _leading(self, merges: list[Merge]) -> int | None:
        return merges[0].worker

    def _merge_all(self, pushes: list[Push]) -> None:
        first = pushes[0].weights[: self.n_params]
        for push in pushes[1:]:
            other, parts = push.weights[: self.n_params], list(chunks(self.n_params))
            apart = max((float(np.max(np.abs(other[part] - first[part]))) for part in parts), default=0.0)
            most = self.tolerance * max(1.0, float(first.max(initial=0.0)), -float(first.min(initial=0.0)))
            if apart > most or (self.tolerance == 0 and not _same_bits(other, first)):
                raise UpdateError(
                    f"replicas of workers {pushes[0].worker} and {push.worker} differ by {apart:.3g}; all-reduce keeps them "
                    "equal. Is a parameter changed outside the optimiser step?"
                )
        weights, factors = self._into(pushes[:1]), shares(pushes, "samples")
        if weights is not pushes[0].weights:
            weights[:] = pushes[0].weights
        floats = slice(self.n_params, len(weights) - self.n_exact)
        if self.buffers == "mean" and floats.start < floats.stop and len(pushes) > 1:
            weights[floats] = weighted_sum([push.weights[floats] for push in pushes], factors)
        self._publish(weights, zip(pushes, factors, strict=True))


def _same_bits(some: np.ndarray, others: np.ndarray) -> bool:
    return all(np.array_equal(some[part].view(np.uint32), others[part].view(np.uint32)) for part in chunks(len(some)))
