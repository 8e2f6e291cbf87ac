"""UCluster: jets are clustered without labels, in the embedding that a network has learnt from the jets' own mass.

    pretext      L_f = mean_b 10 (1 - p_y)^gamma (-log p_y), y the bin of the jet's mass (or of another number of it)
    k-means      once, on the embeddings of training jets of all workers, after `pretrain` passes: a milestone
    clustering   L = L_f + lambda L_c,   L_c = mean_b sum_k d_bk softmax_k(-alpha d_bk),   d_bk = ||z_b - mu_k||^2

The classes of the jets are read for evaluation alone, never by a loss. One clock, the jets that all workers have seen, drives learning
rate, the momentum of the normalisations and alpha, on whichever worker a step is made. The weights of k-means are one version, from
which everybody goes on: no replica has centres of its own.

Mikuni, Canelli: arXiv:2010.07106; L_c: Moradi Fard et al., arXiv:1806.10069; focal loss: Lin et al., arXiv:1708.02002.

Used by users as `labkit.jets.UCluster`, by notebooks 12 and 13, and by `labkit.jets.evaluation`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from labkit.errors import ProblemError, known, real, several, text, whole
from labkit.jets.clustering import accuracy, k_means, nearest
from labkit.jets.defects import DEFECTS, Replicas
from labkit.jets.distillation import Distilled
from labkit.jets.files import OF_JET, SUBSTRUCTURE, dataset, momenta
from labkit.jets.networks import ATTENTIONS, CLUSTER_BY, PADDINGS, ABCNet, Jet, features
from labkit.names import named
from labkit.problems import Clock, Problem, evaluating
from labkit.problems.problem import MEASURED, Metrics, Optimisers
from labkit.problems.splits import batches

# Of the published script, and of the run whose log is published with it, which reached 0.81: their script differed.
PRESETS: dict[str, dict[str, float]] = {
    "release": {"pretrain": 11.0, "slope": 2.0, "cluster_weight": 1.0},
    "logged": {"pretrain": 21.0, "slope": 5.0, "cluster_weight": 10.0},
}
MASS_BINS = np.linspace(0, 200, 20)[1:]  # GeV: 19 bins of 10.5, and one above
LEAST_LR, LEAST_MOMENTUM = 1e-5, 0.01
FITTED = 20_000  # training jets that k-means is fitted to: the first ones of their random order
UNITS = ("absolute", "relative")
MASS_BINNING = ("width", "share")
DISTILL = "distill"


class Batch(NamedTuple):
    """`x` (B, N, 8) as the network sees it, `bins` (B, P) of the pretext, `label` (B,) for evaluation."""

    x: torch.Tensor
    bins: torch.Tensor
    label: torch.Tensor


class UCluster(Problem):
    """Cluster jets by an embedding learnt from their mass; a network of ABCNet's blocks, `labkit.jets.networks`.

    `score` is the share of jets whose bin is said rightly, on which rules that weigh pushes go. Of a whole set `measure` has also
    "accuracy", of the best assignment of clusters to classes over all its jets, which nothing in training sees.

    Parameters beside those of `Problem`
    ------------------------------------
    data : "jets" (the sample that labkit has), or files that `labkit.jets.generate` or `labkit.jets.convert` wrote.
    preset : "release" or "logged": `pretrain`, `slope` and `cluster_weight` where these are not given.
    clusters : K.
    embedding : numbers that are pooled from the constituents of a jet, by which it is clustered.
    pretext : which number of a jet is to be said, as its bin: "mass", or one of `labkit.jets.files.SUBSTRUCTURE`, or several. The mass
        has 19 equal bins up to 200 GeV and one above, other numbers `bins` with equal numbers of training jets. Or "distill", a small
        transformer that learns from itself (`labkit.jets.distillation`); then `score` is how often its two halves agree.
    bins : of other numbers than the mass; that has 20.
    mass_bins : "width", as published, or "share": `bins` with equal numbers of jets for the mass, too. Then they are narrow where most
        jets are, which the embedding has to tell apart.
    gamma : of the focal loss, 0 or at least 1; 4.
    pretrain : passes before k-means; 11 or 21.
    slope : alpha is slope (e - pretrain + 2) in epoch e; 2 or 5.
    cluster_weight : lambda; 1 or 10.
    alpha_units : "absolute", or "relative": alpha in units of 1 / mean d, for any scale of the embedding.
    lr, halve_every : the learning rate, halved after each so many jets, down to 1e-5; so is the momentum of the normalisations, from
        0.5 down to 0.01.
    neighbours, attention, padding : of the network (`labkit.jets.networks`).
    cluster_by : "embedding", as published, or "bins": not by these, but by what the network says of a jet, the mean of its bins between 0
        and 1 (of each number of the pretext). With mass_bins="share" that is the rank of its mass, in which the jets lie evenly. Or
        "distribution": by the whole of what it says, the square roots of the bins' probabilities, which hold how sure it is, too.
    defects : what the published distributed notebooks do, by name (`labkit.jets.defects`): for ablations.

    Examples
    --------
    >>> problem = labkit.jets.UCluster("jets", pretrain=1, batch_size=32, neighbours=4, train_samples=96, test_samples=64)
    >>> labkit.train(problem, lab, update="allreduce", passes=2).wait().state
    'done'
    """

    @named
    def __init__(
        self,
        data: Any = "jets",
        *,
        preset: str = "release",
        clusters: int = 3,
        embedding: int = 3,
        pretext: str | Sequence[str] = "mass",
        bins: int = 20,
        mass_bins: str = "width",
        gamma: float = 4.0,
        pretrain: float | None = None,
        slope: float | None = None,
        cluster_weight: float | None = None,
        alpha_units: str = "absolute",
        lr: float = 1e-3,
        halve_every: int = 500_000,
        neighbours: int = 10,
        attention: str = "faithful",
        padding: str = "faithful",
        cluster_by: str = "embedding",
        defects: Sequence[str] = (),
        batch_size: int = 512,
        train_samples: int | None = None,
        test_samples: int | None = None,
        score_samples: int = 256,
        precision: str = "float32",
        ema: float | None = None,
    ) -> None:
        of = PRESETS[known("preset", preset, PRESETS)]
        self.preset = preset
        self.clusters, self.embedding = whole("clusters", clusters, 2), whole("embedding", embedding)
        self.pretext = [known("pretext", name, (*SUBSTRUCTURE, DISTILL)) for name in _names(pretext)]
        if not self.pretext or len(set(self.pretext)) < len(self.pretext):
            raise ValueError(f"pretext={self.pretext}: give one number of a jet, or several, each once.")
        if DISTILL in self.pretext and len(self.pretext) > 1:
            raise ValueError(f"pretext={self.pretext}: {DISTILL!r} has no bins, and goes alone.")
        self.bins, self.gamma = whole("bins", bins, 2, 256), real("gamma", gamma, least=0)
        self.mass_bins = known("mass_bins", mass_bins, MASS_BINNING)
        if 0 < self.gamma < 1:
            raise ValueError(f"gamma={self.gamma:g} must be 0 or at least 1: between, a bin that is certain has no gradient.")
        self.pretrain = real("pretrain", of["pretrain"] if pretrain is None else pretrain, above=0)
        self.slope = real("slope", of["slope"] if slope is None else slope, above=0)
        self.cluster_weight = real("cluster_weight", of["cluster_weight"] if cluster_weight is None else cluster_weight, least=0)
        self.alpha_units = known("alpha_units", alpha_units, UNITS)
        self.lr, self.halve_every = real("lr", lr, above=0), whole("halve_every", halve_every)
        self.neighbours = whole("neighbours", neighbours)
        self.attention, self.padding = known("attention", attention, ATTENTIONS), known("padding", padding, PADDINGS)
        self.cluster_by = known("cluster_by", cluster_by, CLUSTER_BY)
        if self.cluster_by != "embedding" and self.pretext == [DISTILL]:
            raise ValueError(f'cluster_by={self.cluster_by!r}: pretext={DISTILL!r} has no bins. Leave it at "embedding".')
        self.defects = [known("defects", name, DEFECTS) for name in several("defects", list(defects), text)]
        super().__init__(
            data if isinstance(data, str) and data == "jets" else dataset(data),  # the sample goes by its name
            batch_size=batch_size,
            train_samples=train_samples,
            test_samples=test_samples,
            score_samples=score_samples,
            precision=precision,
            ema=ema,
        )

    # What a worker drives.

    def build(self, seed: int) -> nn.Module:
        def network() -> nn.Module:
            if self.pretext == [DISTILL]:
                return Distilled(self.embedding, self.clusters)
            by_width = self.mass_bins == "width"
            n_bins = max(len(MASS_BINS) + 1 if name == "mass" and by_width else self.bins for name in self.pretext)
            how = (self.neighbours, self.attention, self.padding, self.cluster_by)
            return ABCNet(self.embedding, self.clusters, n_bins, len(self.pretext), *how)

        return Replicas.of(network, self.defects, seed)

    def optimisers(self, module: nn.Module) -> Optimisers:
        return (torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=self.lr, fused=True),)

    def step(self, module: nn.Module, batch: Batch, optimisers: Optimisers, clock: Clock) -> Metrics:
        (optimiser,) = optimisers
        for group in optimiser.param_groups:
            group["lr"] = self.rate(clock)
        optimiser.zero_grad(set_to_none=True)
        after: list[Callable[[], None]] = []
        if isinstance(module, Replicas):
            alone = "uneven-batches" in self.defects and self._ends_pass(batch, clock)
            metrics = module.backward(batch, lambda network, part: self.losses(network, part, clock, after), alone)
        else:
            metrics = self.losses(module, batch, clock, after)
            metrics["loss"].backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        for follow in after:
            follow()
        return {name: value.detach() for name, value in metrics.items()}

    def losses(
        self, network: nn.Module, batch: Batch, clock: Clock, after: list[Callable[[], None]] | None = None
    ) -> dict[str, torch.Tensor]:
        """ "loss", and of it "pretext" and "cluster", of a batch at this moment; `after` gets what is to follow the step."""
        with self.autocast(batch.x.device):
            made = self.call(network, batch, self.momentum(clock), clock.generator)
        plain = network.module if isinstance(network, DistributedDataParallel) else network
        pretext = self.pretext_loss(plain, made.logits.float(), batch.bins)
        d, alpha = made.distances, self.alpha(clock)
        if self.alpha_units == "relative":
            alpha = alpha / d.detach().mean().clamp_min(1e-12)
        cluster = (d * torch.softmax(-alpha * d, 1)).sum(1).mean()
        # times 0 until k-means, so that the centres have a gradient, of 0, on all ranks of an all-reduce
        loss = pretext + self.cluster_weight * plain.settled * cluster
        if isinstance(plain, Distilled) and after is not None:
            after.append(partial(plain.follow, made.logits.detach()))
        return {"loss": loss, "pretext": pretext, "cluster": cluster}

    def call(self, network: nn.Module, batch: Any, momentum: float = 0.1, noise: torch.Generator | None = None) -> Jet:
        return network(batch.x, momentum, noise)

    def embed(self, network: nn.Module, batch: Any) -> torch.Tensor:
        return network.embed(batch.x)

    def pretext_loss(self, network: nn.Module, logits: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
        return network.loss(logits) if isinstance(network, Distilled) else self.focal(logits, bins)

    def focal(self, logits: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
        """10 (1 - p)^gamma (-log p), the mean over jets and numbers; logits (B, P, bins), bins (B, P), -1 where there is none."""
        said = bins >= 0
        log_p = logits[said].log_softmax(-1).gather(-1, bins[said][:, None])[:, 0]
        return (-10 * (1 - log_p.exp()) ** self.gamma * log_p).mean()

    def evaluate(self, module: nn.Module, batch: Batch) -> dict[str, float]:
        """Of a batch: "loss" = L_f + lambda min_k d, once there are clusters, "pretext" = L_f, and "score", the share of right bins."""
        return self._numbers(module, *self._said(module, [batch]))

    def measure(
        self, module: nn.Module, indices: np.ndarray, split: str = "train", device: str = "cpu", batch_size: int = MEASURED
    ) -> dict[str, float]:
        """Of a whole set, beside what `evaluate` has: "spread", the mean min_k d over the mean squared distance from the mean, and, by
        the labels, "accuracy" of the best assignment of clusters to classes."""
        loaded = (self.load(part, split, device) for part in batches(indices, batch_size))
        said, settled = self._said(module, loaded)
        z, distances, label = said["z"].numpy(), said["d"].numpy(), said["label"].numpy()
        variance = float(((z - z.mean(0)) ** 2).sum(1).mean())
        spread = float(distances.min(1).mean()) / variance if variance > 0 else math.inf
        found = accuracy(distances.argmin(1), label) if settled else 0.0
        return {**self._numbers(module, said, settled), "spread": min(spread, 1e6) if settled else 1.0, "accuracy": found}

    def networks(self, module: nn.Module) -> Sequence[nn.Module]:
        return tuple(module) if isinstance(module, Replicas) else (module,)

    def milestones(self) -> tuple[float, ...]:
        return (self.pretrain,)

    def settle(self, module: nn.Module, clock: Clock) -> None:
        """k-means on the embeddings of training jets, as the network gives them now: 20 restarts in float64.

        Replicas have the centres of the first one, unless each has its own by a defect: then in a random order.
        """
        networks = list(module) if isinstance(module, Replicas) else [module]
        per_rank = "kmeans-per-rank" in self.defects
        shares, found = np.array_split(self.train_indices()[:FITTED], len(networks) if per_rank else 1), []
        for number, (network, indices) in enumerate(zip(networks, shares, strict=False)):
            z = self.embeddings(network, indices, device=str(network.centres.device))
            centres = torch.from_numpy(k_means(z, self.clusters, seed=number))
            if per_rank:  # k_means has sorted them
                noise = clock.generator
                centres = centres[torch.randperm(len(centres), generator=noise, device=noise.device if noise else "cpu").cpu()]
            found.append(centres)
        with torch.no_grad():
            for number, network in enumerate(networks):
                network.centres.copy_(found[number % len(found)])
                network.settled.fill_(1)

    # The clock.

    def epoch(self, clock: Clock) -> int:
        return 0 if "frozen-alpha" in self.defects else math.floor(clock.passes)

    def alpha(self, clock: Clock) -> float:
        """2 slopes in the first epoch after k-means, one more in each; before, what counts for nothing."""
        alpha = self.slope * (self.epoch(clock) - math.floor(self.pretrain) + 2)
        return alpha if "frozen-alpha" in self.defects else max(alpha, 0.0)

    def halved(self, clock: Clock) -> float:
        return 1.0 if "frozen-schedules" in self.defects else 0.5 ** (clock.samples // self.halve_every)

    def rate(self, clock: Clock) -> float:
        most = self.lr * (2 if "scaled-rate" in self.defects else 1)
        return max(most * self.halved(clock), min(LEAST_LR, self.lr))

    def momentum(self, clock: Clock) -> float:
        """The share of a batch in the running statistics of normalisations."""
        return max(0.5 * self.halved(clock), LEAST_MOMENTUM)

    def _ends_pass(self, batch: Batch, clock: Clock) -> bool:
        n = len(self.train_indices())
        return (clock.samples + len(batch.label)) // n > clock.samples // n

    # The data.

    def load(self, indices: np.ndarray, split: str = "train", device: str | torch.device = "cpu") -> Batch:
        read = self.dataset.batch(indices, split)
        jet = {name: torch.from_numpy(read[name]) for name in OF_JET}
        constituents = torch.from_numpy(momenta(read, indices, split))
        bins = [np.searchsorted(edges, _number(read, name), "right") for name, edges in self.edges.items()]
        bins = bins or [np.zeros(len(indices), np.int64)]  # a pretext without any
        label = torch.from_numpy(read["label"].astype(np.int64))
        made = features(constituents, jet), torch.from_numpy(np.stack(bins, 1)).long(), label
        return Batch(*(part.to(device) for part in made))

    @cached_property
    def edges(self) -> dict[str, np.ndarray]:
        """The inner edges of the bins of each number of the pretext, ascending."""
        named = [name for name in self.pretext if name != DISTILL]
        others = [name for name in named if name != "mass"]
        if others and "substructure" not in self.dataset.fields:
            raise ProblemError(
                f"pretext={self.pretext}: these jets have no substructure. Make them with labkit.jets.generate(..., substructure=True), "
                'or take pretext="mass".'
            )
        shares = np.linspace(0, 1, self.bins + 1)[1:-1]
        at = np.arange(0, self.dataset.n_train, max(1, self.dataset.n_train // 20_000))
        columns = self.dataset.raw(at, "train", "substructure") if others else None
        found = {name: np.quantile(columns[:, SUBSTRUCTURE.index(name)], shares) for name in others}
        if "mass" in named:
            found["mass"] = MASS_BINS if self.mass_bins == "width" else np.quantile(self.dataset.raw(at, "train", "mass"), shares)
        return {name: found[name] for name in named}

    def embeddings(self, module: nn.Module, indices: np.ndarray, split: str = "train", device: str = "cpu") -> np.ndarray:
        """z of these jets, (n, d) float64, in evaluation mode."""
        with evaluating(module) as plain:
            network = first(plain)
            parts = [self.embed(network, self.load(part, split, device)).float().cpu() for part in batches(indices, MEASURED)]
        return torch.cat(parts).double().numpy()

    def predicted(self, outputs: np.ndarray) -> np.ndarray:
        """Clusters of distances (n, K)."""
        return nearest(outputs)

    # How.

    def _said(self, module: nn.Module, loaded: Any) -> tuple[dict[str, torch.Tensor], bool]:
        """What the network gives of all these batches, and whether there are clusters."""
        found: dict[str, list[torch.Tensor]] = {}
        with evaluating(module) as plain:
            network = first(plain)
            for batch in loaded:
                made = self.call(network, batch)
                of = {"z": made.embedding, "d": made.distances, "logits": made.logits, "bins": batch.bins, "label": batch.label}
                for name, value in of.items():
                    found.setdefault(name, []).append(value.cpu())
            settled = bool(network.settled)
        if not found:
            raise ProblemError(f"{self._title()} is measured on no jets. Give some to its score set and its test split.")
        return {name: torch.cat(parts) for name, parts in found.items()}, settled

    def _numbers(self, module: nn.Module, said: Mapping[str, torch.Tensor], settled: bool) -> dict[str, float]:
        network, logits = first(module), said["logits"].float().to(next(module.parameters()).device)
        with torch.no_grad():
            pretext = float(self.pretext_loss(network, logits, said["bins"].to(logits.device)))
            if isinstance(network, Distilled):
                right = network.agree(logits)
            else:
                right = (said["logits"].argmax(-1) == said["bins"])[said["bins"] >= 0].float().mean()
        cluster = float(said["d"].min(1).values.mean()) if settled else 0.0
        return {"loss": pretext + self.cluster_weight * cluster, "score": float(right), "pretext": pretext}


def first(module: nn.Module) -> nn.Module:
    """The network that is measured."""
    plain = module.module if isinstance(module, DistributedDataParallel) else module
    return plain[0] if isinstance(plain, Replicas) else plain


def _names(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else several("pretext", value, text)


def _number(read: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """A number of each jet, by its name."""
    return read["mass"] if name == "mass" else read["substructure"][:, SUBSTRUCTURE.index(name)]
