"""Rules in which nobody waits: each push is answered at once.

    AGWU       W(i) = W(i-1) + gamma_j Q_j (W_j - W(k))                        at every push          BPT-CNN 2019
    Downpour   W(i) = Opt(W(i-1), u_j),   u_j = W(k) - W_j as a gradient       at every push          Dean et al. 2012
    FedAsync   W(i) = (1 - a s(tau)) W(i-1) + a s(tau) W_j                     at every push          Xie et al. 2019
    FedBuff    W(i) = W(i-1) + lr / K sum_j s(tau_j) (W_j - W(k_j))            at every K-th push     Nguyen et al. 2022

tau is the staleness of a push: the versions that were made since its worker was given its own. m is the number of workers.

Used through `labkit.updates`.
"""

import math

import numpy as np

from labkit.updates.base import Changes, Merge, Push, Reply, Update, chunks, count, magnitude, number, one_of, weighted_sum


class AGWU(Changes):
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

    Examples
    --------
    >>> labkit.train(problem, lab, update=labkit.AGWU(), passes=1).wait().state
    'done'
    """

    name = "agwu"
    scored = ahead = True
    fleeting = (*Changes.fleeting, "scores")

    def __init__(self, quality: str = "normalised") -> None:
        self.quality = one_of(self, "quality", quality, ("normalised", "raw"))

    def _begin(self) -> None:
        super()._begin()
        self.scores: dict[int, float] = {}

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
        self._move(push, self.attenuation(push.worker) * quality)
        return self._release([push.worker])


class Downpour(Changes):
    """Downpour (Dean et al. 2012; as in NNLO 2018): the server has an optimiser of its own, for which a push is a gradient.

    u_j = W(k) - W_j is the way that worker j has gone, whatever its own optimiser, and the server makes one step with it:

        sgd        W(i) = W(i-1) - lr u_j
        momentum   v = momentum v + u_j                               W(i) = W(i-1) - lr v
        adam       p = beta1 p + (1-beta1) u_j                        W(i) = W(i-1) - lr p' / (sqrt(q') + eps)
                   q = beta2 q + (1-beta2) u_j^2                      p' = p / (1-beta1^i),  q' = q / (1-beta2^i)

    Published with one batch a push, where u_j is the gradient times the worker's learning rate, all of it is added: lr=1. Buffers
    are averaged with the share lr (sgd) or 1/m.

    Parameters
    ----------
    optimiser
        "sgd" (default), "momentum" or "adam".
    lr
        Step of the server. None: 1/m for sgd and (1 - momentum)/m for momentum, with which m pushes move the weights by about
        one local pass however long that is; 0.001 for adam, whose steps are about lr in each weight.
    momentum, beta1, beta2, eps
        Of the formulas above: 0.9, 0.9, 0.999, 1e-8.

    Examples
    --------
    >>> labkit.train(problem, lab, update=labkit.updates.Downpour("adam", lr=0.001), passes=1).wait().state
    'done'
    """

    name = "downpour"
    ahead = True
    written = ("first", "second")

    def __init__(
        self,
        optimiser: str = "sgd",
        lr: float | None = None,
        *,
        momentum: float = 0.9,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
    ) -> None:
        self.optimiser = one_of(self, "optimiser", optimiser, ("sgd", "momentum", "adam"))
        self.lr = None if lr is None else number(self, "lr", lr, above=0)
        self.momentum = number(self, "momentum", momentum, least=0, most=0.999)
        self.beta1, self.beta2 = (number(self, *beta, least=0, most=0.99999) for beta in (("beta1", beta1), ("beta2", beta2)))
        self.eps = number(self, "eps", eps, above=0)

    def _begin(self) -> None:
        super()._begin()
        n = {"sgd": 0, "momentum": self.n_params, "adam": self.n_params}[self.optimiser]
        self.first = np.zeros(n, np.float32)  # v, or p
        self.second = np.zeros(n if self.optimiser == "adam" else 0, np.float32)  # q
        self.steps = 0

    def _reach(self) -> float:
        if self.optimiser != "momentum":
            return super()._reach()
        lr = self.lr or 1 - self.momentum  # of a worker that is left alone
        return super()._reach() + lr * self.momentum / (1 - self.momentum) * magnitude(self.first)

    def _merge(self, push: Push) -> list[Reply]:
        m = len(self.bases)
        if self.optimiser == "sgd":
            self._move(push, self.lr or 1 / m)
            return self._release([push.worker])
        self.steps += 1
        merged = self._change(push)
        step = merged[: self.n_params]  # -u, and then what is added to the weights
        if self.optimiser == "momentum":
            self.first *= np.float32(self.momentum)
            self.first += step
            np.multiply(self.first, np.float32(self.lr or (1 - self.momentum) / m), out=step)
        else:
            self._adam(step)
        step += self.weights[: self.n_params]
        self._mix_buffers(merged, 1 / m)
        self._publish(merged, [(push, 1 / m)])
        return self._release([push.worker])

    def _adam(self, step: np.ndarray) -> None:
        """-u in, the step out."""
        lr, i = self.lr or 0.001, self.steps
        for part in chunks(self.n_params):
            p, q, u = self.first[part], self.second[part], step[part]
            p += (1 - self.beta1) * (u - p)
            q += (1 - self.beta2) * (u * u - q)
            u[:] = lr / (1 - self.beta1**i) * p / (np.sqrt(q / (1 - self.beta2**i)) + self.eps)


class FedAsync(Update):
    """Asynchronous federated optimisation (Xie, Koyejo, Gupta 2019): the global weights move towards those of a worker.

    W(i) = (1 - a) W(i-1) + a W_j with a = alpha s(tau), which fades with absolute staleness:

        constant     s = 1
        polynomial   s = (1 + tau)^-power
        hinge        s = 1 up to tau = free, then 1 / (slope (tau - free) + 1)

    With one worker and alpha=1 this is plain local training, bit for bit.

    Parameters
    ----------
    alpha
        Share of a fresh push, in (0, 1]; 0.6.
    fading
        "polynomial" (default), "hinge" or "constant".
    power, slope, free
        Of the formulas above: 0.5, 10, 4.

    Examples
    --------
    >>> labkit.train(problem, lab, update=labkit.updates.FedAsync(alpha=0.6, fading="hinge"), passes=1).wait().state
    'done'
    """

    name = "fedasync"
    ahead = True

    def __init__(
        self, alpha: float = 0.6, fading: str = "polynomial", *, power: float = 0.5, slope: float = 10.0, free: float = 4.0
    ) -> None:
        self.alpha = number(self, "alpha", alpha, above=0, most=1)
        self.fading = one_of(self, "fading", fading, ("polynomial", "hinge", "constant"))
        self.power, self.slope = number(self, "power", power, least=0), number(self, "slope", slope, least=0)
        self.free = number(self, "free", free, least=0)

    def share(self, staleness: int) -> float:
        """alpha s(tau)."""
        if self.fading == "polynomial":
            return self.alpha * (1 + staleness) ** -self.power
        late = max(0.0, staleness - self.free) if self.fading == "hinge" else 0.0
        return self.alpha / (self.slope * late + 1)

    def _merge(self, push: Push) -> list[Reply]:
        share = self.share(self.version - push.base_version)
        merged = weighted_sum([self.weights, push.weights], [1 - share, share], self._into([push]))
        self._publish(merged, [(push, share)])
        return self._release([push.worker])


class FedBuff(Changes):
    """Buffered asynchronous aggregation (Nguyen et al. 2022): nobody waits, and every K pushes make one version.

    W(i) = W(i-1) + lr / K sum_j s(tau_j) (W_j - W(k_j)) over the K pushes, with s(tau) = (1 + tau)^-power. A worker is answered
    at once, with the latest version. Only the sum is stored, not the pushes. Buffers: the average of the K, weighted by
    s(tau_j), counts with the share lr / K sum_j s(tau_j) of at most 1.

    With size=1, lr=1 and one worker this is plain local training within rounding.

    Parameters
    ----------
    size
        K, the pushes of a version. None: as many as there are workers.
    lr
        Server step, 1.
    power
        0.5, so that a push counts 1 / sqrt(1 + tau); 0: all count alike.

    Examples
    --------
    >>> labkit.train(problem, lab, update=labkit.updates.FedBuff(size=2), passes=1).wait().state
    'done'
    """

    name = "fedbuff"
    ahead = True
    fleeting = (*Changes.fleeting, "total", "kept")
    written = ("total",)

    def __init__(self, size: int | None = None, lr: float = 1.0, *, power: float = 0.5) -> None:
        self.size = count(self, "size", size)
        self.lr = number(self, "lr", lr, above=0)
        self.power = number(self, "power", power, least=0)

    def _begin(self) -> None:
        super()._begin()
        self.total = np.zeros(0, np.float32)  # sum_j s_j [changes | buffers], from the first push of a version on
        self.kept: list[list] = []  # of each push in it: worker, s, staleness, samples

    def _reach(self) -> float:
        n, weight = self.n_params, sum(fading for _, fading, _, _ in self.kept) or 1.0
        buffers = max(magnitude(self.weights[n:]), magnitude(self.total[n:]) / weight) * (self.size or len(self.bases))  # summed up
        return max(buffers, super()._reach() + self.lr / max(1, len(self.kept)) * magnitude(self.total[:n]))

    def leave(self, worker: int) -> list[Reply]:
        replies = super().leave(worker)
        if self.bases and len(self.kept) >= (self.size or len(self.bases)):
            self._flush()
        return replies

    def finish(self) -> None:
        super().finish()
        if self.kept:
            self._flush()

    def _merge(self, push: Push) -> list[Reply]:
        staleness = self.version - push.base_version
        fading = (1 + staleness) ** -self.power
        if not len(self.total):
            self.total = np.zeros_like(self.weights)
        part = self._change(push)
        part *= np.float32(fading)
        self.total += part
        self.kept.append([push.worker, fading, staleness, push.samples])
        if len(self.kept) >= (self.size or len(self.bases)):
            self._flush()
        return self._release([push.worker])

    def _flush(self) -> None:
        """The pushes so far become a version, in the memory of their sum, which begins anew."""
        n, rate = self.n_params, self.lr / len(self.kept)
        weight = sum(fading for _, fading, _, _ in self.kept)
        merged, self.total = self.total, np.zeros(0, np.float32)
        mix = np.float32(min(1.0, rate * weight))
        buffers = (1 - mix) * self.weights[n:] + mix * (merged[n:] / np.float32(weight))
        merged *= np.float32(rate)
        merged[:n] += self.weights[:n]
        merged[n:] = buffers
        version = self.version + 1
        merges = [Merge(worker, version, rate * fading, late, samples) for worker, fading, late, samples in self.kept]
        self._publish_merged(merged, merges)
        self.kept = []
