"""Rules with weights of each worker's own, tied to a centre.

    EASGD   W_j and the centre W move towards each other at every push                      Zhang, Choromanska, LeCun 2015
    GEM     the step of a push is scaled, weight by weight, to the speed of a momentum      Hermans, Louppe 2018

Both as in NNLO (2018). Used through `labkit.updates`.
"""

import numpy as np

from labkit.updates.base import CHUNK, Changes, Push, Reply, Update, chunks, number


class EASGD(Update):
    """Elastic averaging SGD: each worker has weights of its own, coupled elastically to the centre, which is the global weights.

    At a push of worker j, with alpha = beta/m of m workers:

        W_j <- W_j - alpha (W_j - W(i-1))      goes back to the worker
        W(i) = W(i-1) + alpha (W_j - W(i-1))

    W_j + W stays what it was, and where both are equal nothing moves. Who joins, or goes on after a resume, begins at the centre.
    The period tau of the paper is the length of a local pass (`local_steps`). Both lines are convex averages: buffers move alike.

    Parameters
    ----------
    beta
        In (0, 1]; 0.9 as published. 0.5 with one worker, which then meets the centre half-way.

    Examples
    --------
    >>> labkit.train(problem, lab, update=labkit.updates.EASGD(beta=0.9), passes=1).wait().state
    'done'
    """

    name = "easgd"
    ahead = True

    def __init__(self, beta: float = 0.9) -> None:
        self.beta = number(self, "beta", beta, above=0, most=1)

    def _merge(self, push: Push) -> list[Reply]:
        alpha = self.beta / len(self.bases)
        centre, own, pull = np.empty_like(self.weights), self._into([push]), np.empty(CHUNK, np.float32)
        for part in chunks(len(centre)):
            force = np.subtract(push.weights[part], self.weights[part], out=pull[: len(centre[part])])
            force *= np.float32(alpha)
            np.add(self.weights[part], force, out=centre[part])
            np.subtract(push.weights[part], force, out=own[part])
        own.flags.writeable = False
        self._publish(centre, [(push, alpha)])
        self.bases[push.worker] = self.version
        return [Reply(push.worker, self.version, own)]


class GEM(Changes):
    """Gradient energy matching: all workers together move no faster than one process with momentum would.

    At a push of worker j, with d = lr (W_j - W(k)), and c = W(i-1) - s_j what the centre has moved since the worker last came:

        v_j <- momentum v_j + d                                        the momentum that it stands for
        pi = clip((kappa |v_j| - |c|) / |d|, 0, 5)                     in each weight; 0 where d is 0
        W(i) = W(i-1) + pi d;    s_j <- W(i-1)

    Buffers are averaged with the mean of lr pi as their share. Who joins, or goes on after a resume, has no momentum yet.

    Parameters
    ----------
    lr
        None: 1/(5 m), so that a push counts for at most 1/m in each weight. NNLO: 0.01.
    momentum, kappa
        0.9 and 2, as in NNLO.

    Examples
    --------
    >>> labkit.train(problem, lab, update=labkit.updates.GEM(momentum=0.9), passes=1).wait().state
    'done'
    """

    name = "gem"
    ahead = True
    fleeting = (*Changes.fleeting, "speeds", "seen")
    written = ("speeds",)
    most = 5.0  # pi at most

    def __init__(self, lr: float | None = None, *, momentum: float = 0.9, kappa: float = 2.0) -> None:
        self.lr = None if lr is None else number(self, "lr", lr, above=0)
        self.momentum = number(self, "momentum", momentum, least=0, most=0.999)
        self.kappa = number(self, "kappa", kappa, above=0)

    def _begin(self) -> None:
        super()._begin()
        self.speeds: dict[int, np.ndarray] = {}  # v_j, of who has pushed
        self.seen: dict[int, np.ndarray] = {}  # s_j

    def join(self, worker: int) -> list[Reply]:
        self.speeds.pop(worker, None)
        self.seen.pop(worker, None)
        return super().join(worker)

    def _merge(self, push: Push) -> list[Reply]:
        lr, n, worker = self.lr or 1 / (self.most * len(self.bases)), self.n_params, push.worker
        if worker not in self.speeds:
            self.speeds[worker] = np.zeros(n, np.float32)
        merged, speed, sums = self._change(push), self.speeds[worker], 0.0
        seen = self.seen.get(worker, self.base_weights[worker])
        for part in chunks(n):
            d, v = merged[part], speed[part]
            d *= np.float32(lr)
            v *= np.float32(self.momentum)
            v += d
            pi = np.float32(self.kappa) * np.abs(v) - np.abs(self.weights[part] - seen[part])
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                pi = np.where(d == 0, 0, np.clip(pi / np.abs(d), 0, self.most))
            d *= pi
            sums += float(pi.sum(dtype=np.float64))
        coefficient = lr * sums / n if n else lr
        merged[:n] += self.weights[:n]
        self._mix_buffers(merged, coefficient)
        self.seen[worker] = self.weights
        self._publish(merged, [(push, coefficient)])
        return self._release([worker])
