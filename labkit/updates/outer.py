"""Rules with an outer optimiser: what the workers have moved is a gradient for a momentum on the server.

    DiLoCo            Nesterov step with the mean change of all workers               Douillard et al. 2023
    DelayedNesterov   plain step at every push, the momentum at every n-th            Liu et al. 2024
    HeLoCo            each push is turned towards the momentum before it counts       Al Asif et al. 2026

All is written here in the direction of the change, D_j = W_j - W(k), the negative of the papers' outer gradient. Buffers have no
momentum: they are averaged. The coefficients that are recorded are those of the plain step, without what comes later through the
momentum.

Used through `labkit.updates`.
"""

import itertools
import math

import numpy as np

from labkit.errors import flag
from labkit.updates.base import Changes, Push, Reply, chunks, count, magnitude, number, one_of, weighted_sum
from labkit.updates.synchronous import Barrier, shares

TINY = 1e-12


def carried(momentum: float) -> float:
    """How far a velocity of 1 goes on moving what it moves, when it gets no more: momentum + momentum^2 + ..."""
    return momentum / (1 - momentum)


class DiLoCo(Barrier):
    """Distributed low-communication training (Douillard et al. 2023): local SGD with Nesterov momentum on top.

    When all have pushed, with D = sum_j n_j W_j / sum_l n_l - W(i-1):

        v = momentum v + D
        W(i) = W(i-1) + lr (D + momentum v)

    With lr=1 and momentum=0 this is `LocalSGD` within rounding.

    Parameters
    ----------
    lr, momentum
        0.7 and 0.9, as published for many local steps of AdamW. Where workers have a momentum of their own, less is often better.
    weighting
        "equal" (default): n_j = 1. "samples": n_j = samples of the local pass.

    Examples
    --------
    >>> labkit.train(problem, lab, update=labkit.updates.DiLoCo(lr=0.7, momentum=0.9), passes=1).wait().state
    'done'
    """

    name = "diloco"
    written = ("velocity",)

    def __init__(self, lr: float = 0.7, momentum: float = 0.9, *, weighting: str = "equal") -> None:
        self.lr, self.momentum = number(self, "lr", lr, above=0), number(self, "momentum", momentum, least=0, most=0.999)
        self.weighting = one_of(self, "weighting", weighting, ("equal", "samples"))

    def _begin(self) -> None:
        super()._begin()
        self.velocity = np.zeros(self.n_params, np.float32)

    def _merge_all(self, pushes: list[Push]) -> None:
        factors, before = shares(pushes, self.weighting), self.weights[: self.n_params]
        merged = weighted_sum([push.weights for push in pushes], factors, self._into(pushes))
        step = merged[: self.n_params]
        step -= before
        self.velocity *= np.float32(self.momentum)
        self.velocity += step
        for part in chunks(len(step)):
            step[part] = before[part] + np.float32(self.lr) * (step[part] + np.float32(self.momentum) * self.velocity[part])
        self._publish(merged, [(push, self.lr * factor) for push, factor in zip(pushes, factors, strict=True)])

    def _reach(self) -> float:
        step = max((magnitude(push.weights - self.weights) for push in self.pending.values()), default=0.0)
        velocity = self.momentum * magnitude(self.velocity) + step
        return max(super()._reach(), magnitude(self.weights) + self.lr * (step + carried(self.momentum) * velocity))


class DelayedNesterov(Changes):
    """Asynchronous local SGD with delayed Nesterov momentum and dynamic local updates (Liu et al. 2024).

    Momentum at every late push is what makes the naive way fail; so each push makes a plain step, and every n-th the momentum's:

        W(i) = W(i-1) + lr D_j / n                                                at every push
        v = momentum v + mean of the last n D;    W(i) += lr momentum v           at every n-th

    Dynamic local updates: local passes in proportion to speed, so that quick and slow workers come equally often. (The paper gives
    the quickest H steps and the others fewer; here H, the `local_steps` of a run, is the mean, as everywhere.)

    With one worker this is `DiLoCo` with one worker, within rounding.

    Parameters
    ----------
    lr, momentum
        0.7 and 0.9, as published for workers whose own optimiser has no momentum (AdamW). On top of SGD with a momentum of its own
        that overshoots: give less, 0.5 and 0.5 say.
    period
        n, pushes between two steps of the momentum. None: as many as there are workers.
    dynamic
        Local passes in proportion to speed, True.

    Examples
    --------
    >>> labkit.train(problem, lab, update=labkit.updates.DelayedNesterov(), passes=1).wait().state
    'done'
    """

    name = "delayed-nesterov"
    ahead = True
    written = ("velocity", "total")

    def __init__(self, lr: float = 0.7, momentum: float = 0.9, *, period: int | None = None, dynamic: bool = True) -> None:
        self.lr, self.momentum = number(self, "lr", lr, above=0), number(self, "momentum", momentum, least=0, most=0.999)
        self.period, self.dynamic = count(self, "period", period), flag("DelayedNesterov: dynamic", dynamic)

    @property
    def paced(self) -> bool:
        return self.dynamic

    def _begin(self) -> None:
        super()._begin()
        self.velocity, self.total = (np.zeros(self.n_params, np.float32) for _ in range(2))
        self.count = 0  # pushes in the total

    def _reach(self) -> float:
        velocity = self.momentum * magnitude(self.velocity) + magnitude(self.total) / max(1, self.count)
        return super()._reach() + self.lr * carried(self.momentum) * velocity

    def _merge(self, push: Push) -> list[Reply]:
        m, n = len(self.bases), self.period or len(self.bases)
        merged = self._change(push)
        step = merged[: self.n_params]
        self.total += step
        self.count += 1
        step *= np.float32(self.lr / n)
        if self.count >= n:
            self.total *= np.float32(1 / self.count)
            self.velocity *= np.float32(self.momentum)
            self.velocity += self.total
            step += np.multiply(self.velocity, np.float32(self.lr * self.momentum), out=self.total)
            self.total[:], self.count = 0, 0
        step += self.weights[: self.n_params]
        self._mix_buffers(merged, 1 / m)
        self._publish(merged, [(push, self.lr / n)])
        return self._release([push.worker])


class HeLoCo(Changes):
    """Direction-aware asynchronous low-communication training (HeLoCo; Al Asif et al. 2026).

    The momentum v is where training heads. Tensor by tensor, a push D_j = W_j - W(k) is compared with it, by the cosine c of the
    two and by conf = |D| / (|D| + kappa |v|):

        c >= keep        D as it is
        0 <= c < keep    D turned towards v, keeping its length: direction (1-l) D/|D| + l v/|v|,  l = min(1, turn (1-c) conf)
        c < 0            D without a part b = min(most, shrink (-c) conf) of what it has against v: D - b c |D| v/|v|

        G = D / m;    v = momentum v + (1 - momentum) G;    W(i) = W(i-1) + lr (G + momentum v)

    The 1/m (the papers' worker weight) makes m pushes move the weights by about one local pass.

    Parameters
    ----------
    lr, momentum
        0.7 and 0.9.
    keep, turn, shrink, most, kappa
        Of the formulas above: 0.2, 0.5, 1, 1, 1. The formulas are the paper's; these values are ours. keep=-1 corrects nothing.

    Examples
    --------
    >>> labkit.train(problem, lab, update=labkit.updates.HeLoCo(), passes=1).wait().state
    'done'
    """

    name = "heloco"
    ahead = True
    written = ("velocity",)

    def __init__(
        self,
        lr: float = 0.7,
        momentum: float = 0.9,
        *,
        keep: float = 0.2,
        turn: float = 0.5,
        shrink: float = 1.0,
        most: float = 1.0,
        kappa: float = 1.0,
    ) -> None:
        self.lr, self.momentum = number(self, "lr", lr, above=0), number(self, "momentum", momentum, least=0, most=0.999)
        self.keep, self.turn = number(self, "keep", keep, least=-1, most=1), number(self, "turn", turn, least=0)
        self.shrink, self.most = number(self, "shrink", shrink, least=0), number(self, "most", most, least=0, most=1)
        self.kappa = number(self, "kappa", kappa, least=0)

    def _begin(self) -> None:
        super()._begin()
        self.velocity = np.zeros(self.n_params, np.float32)

    def _reach(self) -> float:
        return super()._reach() + self.lr * self.momentum * carried(self.momentum) * magnitude(self.velocity)

    def correction(self, c: float, conf: float, ratio: float) -> tuple[float, float]:
        """(x, y) of the corrected push x D + y v, where `ratio` is |D| / |v|."""
        if c >= self.keep:
            return 1.0, 0.0
        if c < 0:
            return 1.0, -min(self.most, self.shrink * -c * conf) * c * ratio
        part = min(1.0, self.turn * (1 - c) * conf)
        length = max(TINY, math.sqrt((1 - part) ** 2 + part**2 + 2 * part * (1 - part) * c))
        return (1 - part) / length, part / length * ratio

    def _merge(self, push: Push) -> list[Reply]:
        m, n = len(self.bases), self.n_params
        merged = self._change(push)
        for start, stop in itertools.pairwise(itertools.accumulate(self.blocks, initial=0)):
            self._correct(merged[start:stop], self.velocity[start:stop])
        for part in chunks(n):
            g, v = merged[part] * np.float32(1 / m), self.velocity[part]
            v += np.float32(1 - self.momentum) * (g - v)
            merged[part] = self.weights[part] + np.float32(self.lr) * (g + np.float32(self.momentum) * v)
        self._mix_buffers(merged, 1 / m)
        self._publish(merged, [(push, self.lr / m)])
        return self._release([push.worker])

    def _correct(self, change: np.ndarray, velocity: np.ndarray) -> None:
        """One tensor, in place."""
        own, other = math.sqrt(_product(change, change)), math.sqrt(_product(velocity, velocity))
        if own < TINY or other < TINY:  # no direction
            return
        c = min(1.0, max(-1.0, _product(change, velocity) / (own * other)))
        x, y = self.correction(c, own / (own + self.kappa * other), own / other)
        if (x, y) != (1.0, 0.0):
            for part in chunks(len(change)):
                change[part] = np.float32(x) * change[part] + np.float32(y) * velocity[part]


def _product(a: np.ndarray, b: np.ndarray) -> float:
    """The scalar product, summed in a fixed order: BLAS goes by its number of threads, and a replay would not be bit for bit."""
    total = 0.0
    for part in chunks(len(a)):
        total += float(np.einsum("i,i->", a[part], b[part]))
    return total if math.isfinite(total) else float(np.einsum("i,i->", a, b, dtype=np.float64))  # of weights beyond 1e19
