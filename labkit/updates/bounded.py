"""Asynchronous rules that bound or even out what late workers do.

    SSP          a worker is at most `bound` local passes ahead of the slowest                    Ho et al. 2013
    Ringmaster   a push that is too many versions late is thrown away                             Maranjyan et al. 2025
    Rescaled     a push counts in proportion to the time that its worker takes                    Mahran et al. 2026

Each merges at every push: W(i) = W(i-1) + c_j (W_j - W(k)), and with m workers c_j is about rate/m, so that m pushes move the
weights by about one local pass. With one worker and rate=1 each is plain local training within rounding.

Used through `labkit.updates`.
"""

from labkit.updates.base import Changes, Push, Reply, count, number


class SSP(Changes):
    """Stale synchronous parallel (Ho et al. 2013): asynchronous, but the quick wait when the slowest falls too far behind.

    Each worker counts its pushes, its clock; after a push it goes on only if its clock is at most `bound` above the lowest clock.
    Each push is merged at once, with c_j = rate/m. With bound=0 that is a barrier whose rounds end in the mean of all weights, as
    `LocalSGD` (or `SGWU` with equal scores), in m versions a round. Who comes begins with the lowest clock.

    Parameters
    ----------
    bound
        How many local passes a worker may be ahead of the slowest, 3.

    Examples
    --------
    >>> labkit.train(problem, lab, update=labkit.updates.SSP(bound=3), passes=1).wait().state
    'done'
    """

    name = "ssp"
    ahead = True
    fleeting = (*Changes.fleeting, "clocks", "held")

    def __init__(self, bound: int = 3, rate: float = 1.0) -> None:
        if bound is None:
            raise ValueError("SSP needs a bound: how many local passes a worker may be ahead of the slowest.")
        self.bound, self.rate = count(self, "bound", bound, least=0), number(self, "rate", rate, above=0)

    def _begin(self) -> None:
        super()._begin()
        self.clocks = dict.fromkeys(self.bases, 0)
        self.held: list[int] = []

    def join(self, worker: int) -> list[Reply]:
        self._forget(worker)
        self.clocks[worker] = min(self.clocks.values(), default=0)
        return super().join(worker) + self._free()

    def leave(self, worker: int) -> list[Reply]:
        super().leave(worker)
        self._forget(worker)
        return self._free()

    def _merge(self, push: Push) -> list[Reply]:
        self._move(push, self.rate / len(self.bases))
        self.clocks[push.worker] += 1
        self.held.append(push.worker)
        return self._free()

    def _free(self) -> list[Reply]:
        """Release those who are held and within the bound again."""
        limit = min(self.clocks.values(), default=0) + self.bound
        free = [worker for worker in self.held if self.clocks[worker] <= limit]
        self.held = [worker for worker in self.held if worker not in free]
        return self._release(free)

    def _forget(self, worker: int) -> None:
        self.clocks.pop(worker, None)
        self.held = [other for other in self.held if other != worker]


class Ringmaster(Changes):
    """Ringmaster ASGD (Maranjyan, Tyurin, Richtarik 2025): drop what comes too late.

    A push whose staleness is `limit` or more is thrown away, and its worker begins anew from the current version; all others count
    alike, c_j = rate/m. Samples that were trained on in vain are for somebody to train on again.

    Parameters
    ----------
    limit
        R of the paper, the staleness from which on pushes are dropped. None: 4 m, four rounds of all workers.

    Examples
    --------
    >>> labkit.train(problem, lab, update=labkit.updates.Ringmaster(limit=4), passes=1).wait().state
    'done'
    """

    name = "ringmaster"
    ahead = True

    def __init__(self, limit: int | None = None, rate: float = 1.0) -> None:
        self.limit, self.rate = count(self, "limit", limit), number(self, "rate", rate, above=0)

    def _merge(self, push: Push) -> list[Reply]:
        m = len(self.bases)
        if self.version - push.base_version >= (self.limit or 4 * m):
            return self._drop(push)
        self._move(push, self.rate / m)
        return self._release([push.worker])


class Rescaled(Changes):
    """Rescaled ASGD (Mahran, Maranjyan, Richtarik 2026): the push of a slow worker counts for more, as it comes more rarely.

    The step of worker j is in proportion to the time T_j of its local pass, so that all workers count alike over time, however
    fast they are. A rule has no clock; but while worker j makes one pass the others make sum_l T_j/T_l - 1 versions, so that its
    T_j follows from the staleness tau_j:

        c_j = rate/m * (tau_j + 1)/m

    The (tau_j + 1) of all pushes of one worker add up to the versions since it came: its whole weight is that of any other.

    Parameters
    ----------
    most
        The largest c_j, 1: one very late push of a whole local pass would carry the weights away. The paper has no such limit,
        but a small step.

    Examples
    --------
    >>> labkit.train(problem, lab, update=labkit.updates.Rescaled(), passes=1).wait().state
    'done'
    """

    name = "rescaled"
    ahead = True

    def __init__(self, rate: float = 1.0, most: float = 1.0) -> None:
        self.rate, self.most = number(self, "rate", rate, above=0), number(self, "most", most, above=0)

    def _merge(self, push: Push) -> list[Reply]:
        late, m = self.version - push.base_version, len(self.bases)
        self._move(push, min(self.most, self.rate * (late + 1) / m**2))
        return self._release([push.worker])
