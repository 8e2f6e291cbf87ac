"""ABCNet as UCluster has it: a graph network over the constituents of a jet, whose three numbers are what is clustered.

    x (B, N, 8) -> GAP over neighbours in (eta, phi) -> 64 -> 128 -> GAP over neighbours in these 128 -> 256 -> 256
    -> all of it, 848 numbers a constituent -> 3 -> mean over the jet: z (B, 3) -> 256 -> 128 -> logits of the pretext
    d_bk = ||z_b - mu_k||^2 to the K centres

GAP, graph attention pooling, with K neighbours j of constituent i, itself included:

    h_i = ReLU BN(W_h x_i)             e_ij = ReLU BN(W_e (x_i - x_j) + b_e)
    s_i = ReLU BN(w_s . h_i + b_s)     n_ij = ReLU BN(w_n . e_ij + b_n)
    a_ij = softmax_j LeakyReLU_0.2(s_i + n_ij)      v_i = ReLU(sum_j a_ij e_ij)      l_i = max_j e_ij

As published (`attention="faithful"`) s_i and n_ij are never negative, so that s_i cancels in the softmax and W_h, w_s have no effect: they
are among the parameters, and are not trained. With `attention="paper"` both are linear, c_ij = LeakyReLU(s_i + n_ij), and s_i counts.
`padding="faithful"` counts empty slots as constituents in neighbours, normalisation and mean; "masked" leaves them out; "summed" does, too,
but divides the sum over the constituents by the number of slots. The mass is such a sum, m^2 = pT sum_i pT_i r_i^2 to first order, which a
mean over n constituents knows only up to n.

As published that mean is what is clustered. It is additive in the constituents and grows as the squared mass does, so that k-means has more use
for a boundary among tops than for one between W and Z. With `cluster_by="bins"` a jet lies where the network says its bins are: the mean of the
softmax over bins numbered from 0 to 1, of each number of the pretext. Of bins with equal numbers of jets that is a rank. With "distribution" it lies at the
whole of that softmax, by the square roots of its probabilities: half a squared distance is the squared one of Hellinger, which knows where the network is uncertain.

Mikuni, Canelli: ABCNet (arXiv:2001.05311), UCluster (arXiv:2010.07106). 186,057 parameters without the centres.

Used by `labkit.jets.problem`.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from labkit.jets.edges import Edges
from labkit.models.batch_norm import ranks

FEATURES = ("eta_rel", "phi_rel", "log_pt_rel", "delta_r", "log_e", "log_e_rel", "log_pt", "cos_theta_rel")
ATTENTIONS, PADDINGS, CLUSTER_BY = ("faithful", "paper"), ("faithful", "masked", "summed"), ("embedding", "bins", "distribution")
EPS = 1e-3  # of all normalisations
FAR = 1000.0  # is added to the squared distance for each end that is an empty slot


def features(constituents: torch.Tensor, jet: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the network sees of each constituent: (B, N, 8), `FEATURES` in order, of four-momenta (B, N, 4) and the mass, pt, eta and phi of
    its jet, (B,), or (B, N) where a row has several jets. Empty slots are 0; phi is wrapped."""
    px, py, pz, energy = constituents.unbind(-1)
    pt, real = torch.hypot(px, py), energy > 0
    mass, jet_pt, jet_eta, jet_phi = (jet[name].to(constituents) for name in ("mass", "pt", "eta", "phi"))
    if mass.dim() == 1:
        mass, jet_pt, jet_eta, jet_phi = (values[:, None] for values in (mass, jet_pt, jet_eta, jet_phi))
    safe = pt.clamp_min(1e-9)
    eta = torch.asinh(pz / safe) - jet_eta
    turned = torch.atan2(py, px) - jet_phi
    phi = torch.remainder(turned + math.pi, 2 * math.pi) - math.pi
    momentum = jet_pt * torch.cosh(jet_eta)
    jet_energy = torch.hypot(mass, momentum)
    along = px * torch.cos(jet_phi) + py * torch.sin(jet_phi) + pz * torch.sinh(jet_eta)
    cosine = along / (torch.cosh(jet_eta) * torch.hypot(safe, pz))
    log_e = energy.clamp_min(1e-9).log()
    made = [eta, phi, (safe / jet_pt).log(), torch.hypot(eta, phi), log_e, log_e - jet_energy.log(), safe.log(), cosine]
    return torch.stack(made, -1) * real[..., None]


class Norm(nn.Module):
    """Batch normalisation of rows (M, F); the share of a batch in the running statistics is an argument of each call.

    A single row leaves them, and is normalised by them, unless other workers have more of the batch.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: torch.Tensor, momentum: float) -> torch.Tensor:
        by_batch = self.training and (len(x) > 1 or ranks() is not None)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, by_batch, momentum, EPS)

    @torch.no_grad()
    def record(self, mean: torch.Tensor, variance: torch.Tensor, n: int, momentum: float) -> None:
        """Take in mean and variance of n rows that were normalised elsewhere."""
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * (n / (n - 1)), momentum)


class Layer(nn.Module):
    """Linear, normalised, ReLU, for each row."""

    def __init__(self, n_in: int, width: int, bias: bool = True) -> None:
        super().__init__()
        self.linear, self.norm = linear(n_in, width, bias), Norm(width)

    def forward(self, x: torch.Tensor, momentum: float) -> torch.Tensor:
        return F.relu(self.norm(self.linear(x), momentum))


def linear(n_in: int, width: int, bias: bool = True) -> nn.Linear:
    """With Glorot's weights and a bias of 0."""
    layer = nn.Linear(n_in, width, bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class GAP(nn.Module):
    """Graph attention pooling of rows (M, F_in) over their neighbours (K, M): v and l, (M, width) each."""

    def __init__(self, n_in: int, width: int, attention: str) -> None:
        super().__init__()
        self.attention = attention
        self.own, self.edge = Layer(n_in, width, bias=False), Layer(n_in, width)
        self.of_own, self.of_edge = Layer(width, 1), Layer(width, 1)
        if attention == "faithful":  # they cancel in the softmax
            for part in (self.own, self.of_own):
                part.requires_grad_(False)
        else:  # linear heads
            for part in (self.of_own, self.of_edge):
                part.norm.requires_grad_(False)

    def forward(self, x: torch.Tensor, neighbours: torch.Tensor, momentum: float) -> tuple[torch.Tensor, torch.Tensor]:
        edges, layer, norm = Edges(neighbours), self.edge.linear, self.edge.norm
        running = None if self.training else (norm.running_mean, norm.running_var)
        head = self.of_edge.linear
        scores, largest, mean, variance = edges.scores(
            F.linear(x, layer.weight), layer.bias, norm.weight, norm.bias, head.weight[0], running, EPS
        )
        if self.training:
            norm.record(mean, variance, edges.n, momentum)
        scores = scores + head.bias
        if self.attention == "faithful":
            scores = F.relu(self.of_edge.norm(scores.reshape(-1, 1), momentum).reshape(scores.shape))
        else:
            scores = F.leaky_relu(scores + self.of_own.linear(self.own(x, momentum)).t(), 0.2)
        return F.relu(edges.weighted(scores.softmax(0))), largest


class Jet(NamedTuple):
    """What the network gives of a batch: embedding (B, d), logits (B, P, bins) and squared distances to the centres (B, K)."""

    embedding: torch.Tensor
    logits: torch.Tensor
    distances: torch.Tensor


class Known(NamedTuple):
    """What the trunk gives: `parts` of the rows (M, ...), which slots (B, N) are `real`, and the slots of the rows, None where of all."""

    parts: list[torch.Tensor]
    real: torch.Tensor
    at: torch.Tensor | None

    def of_jets(self, values: torch.Tensor) -> torch.Tensor:
        """Values (B, F) of the jets for each row, (M, F)."""
        n = self.real.shape[1]
        return values.repeat_interleave(n, 0) if self.at is None else values[self.at // n]

    def slots(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (M, F) as (B, N, F), 0 in slots that are none."""
        if self.at is not None:
            rows = rows.new_zeros(self.real.numel(), rows.shape[1]).index_copy(0, self.at, rows)
        return rows.view(*self.real.shape, -1)


class Trunk(nn.Module):
    """Two blocks of graph attention, `n` features of a constituent -> 848 numbers, and with `more` others of the event -> the embedding.

    `settled` is 1 once the centres of the clusters are those of k-means.
    """

    def __init__(
        self,
        n: int,
        embedding: int,
        clusters: int,
        neighbours: int,
        attention: str,
        padding: str,
        more: int = 0,
        pooled: int | None = None,
    ) -> None:
        super().__init__()
        self.neighbours, self.padding = neighbours, padding
        self.gap_0, self.gap_1 = GAP(n, 16, attention), GAP(128, 128, attention)
        self.a, self.b = Layer(n + 16, 64), Layer(64, 128)
        self.c, self.d = Layer(n + 128, 256), Layer(256, 256)
        self.together = Layer(64 + 128 + 256 + 256 + 16 + 128 + more, embedding)
        self.centres = nn.Parameter(torch.zeros(clusters, embedding))
        self.register_buffer("settled", torch.zeros((), dtype=torch.int64))

    def known(self, x: torch.Tensor, momentum: float) -> Known:
        """Of each constituent of x (B, N, n)."""
        real = x[..., 2] != 0
        masked = self.padding != "faithful"
        at = real.flatten().nonzero().squeeze(1) if masked else None
        x_0 = x.flatten(0, 1) if at is None else x.flatten(0, 1)[at]
        v_0, l_0 = self.gap_0(x_0, _rows(self._near(x, real), real if masked else None), momentum)
        a = self.a(torch.cat([x_0, v_0], 1), momentum)
        b = self.b(a, momentum)
        points = Known([], real, at).slots(b.detach() if b.dtype == torch.float64 else b.detach().float())
        v_1, l_1 = self.gap_1(b, _rows(self._alike(points, real), real if masked else None), momentum)
        c = self.c(torch.cat([x_0, v_1], 1), momentum)
        return Known([a, b, c, self.d(c, momentum), l_0, l_1], real, at)

    def distances(self, z: torch.Tensor) -> torch.Tensor:
        """Squared, of z (B, d) from the centres: (B, K)."""
        return (z[:, None] - self.centres).square().sum(-1)

    def join(self, parts: list[torch.Tensor], momentum: float) -> torch.Tensor:
        """The layer over all that is known of a constituent, without putting it side by side; in float32 at least."""
        layer, made, start = self.together, None, 0
        for part in parts:
            weight = layer.linear.weight[:, start : start + part.shape[1]]
            made = F.linear(part, weight, layer.linear.bias) if made is None else made + F.linear(part, weight)
            start += part.shape[1]
        rows = F.relu(layer.norm(made, momentum))
        return rows if rows.dtype == torch.float64 else rows.float()  # a mean in bfloat16 would lose what tells jets apart

    @torch.no_grad()
    def _near(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """The nearest in eta and phi, which is a circle: (B, N, K)."""
        eta, phi = x[..., 0], x[..., 1]
        turn = torch.remainder(phi[:, :, None] - phi[:, None] + math.pi, 2 * math.pi) - math.pi
        squared = (eta[:, :, None] - eta[:, None]).square_().add_(turn.square_())
        if self.padding == "faithful":
            empty = FAR * (~real).to(x.dtype)
            squared += empty[:, :, None] + empty[:, None]
        return self._nearest(squared, real)

    @torch.no_grad()
    def _alike(self, points: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """The nearest of points (B, N, C): (B, N, K)."""
        norms = points.square().sum(-1)
        with torch.autocast(points.device.type, enabled=False):
            squared = torch.baddbmm(norms[:, None], points, points.transpose(1, 2), alpha=-2).add_(norms[..., None])
        return self._nearest(squared, real)

    def _nearest(self, squared: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        if self.padding != "faithful":
            squared = squared.masked_fill(~real[:, None], math.inf)
        return squared.topk(min(self.neighbours, squared.shape[-1]), largest=False, sorted=False).indices


class ABCNet(Trunk):
    """x (B, N, 8) -> z (B, embedding), the head of the pretext, and the centres of the clusters; `pretexts` numbers are sorted into `bins`
    each."""

    def __init__(
        self,
        embedding: int = 3,
        clusters: int = 3,
        bins: int = 20,
        pretexts: int = 1,
        neighbours: int = 10,
        attention: str = "faithful",
        padding: str = "faithful",
        cluster_by: str = "embedding",
    ) -> None:
        super().__init__(len(FEATURES), embedding, clusters, neighbours, attention, padding)
        self.cluster_by = cluster_by
        if cluster_by != "embedding":
            self.centres = nn.Parameter(torch.zeros(clusters, pretexts * (1 if cluster_by == "bins" else bins)))
        self.bins = bins
        self.head_0, self.head_1, self.logits = Layer(embedding, 256), Layer(256, 128), linear(128, pretexts * bins)

    def forward(self, x: torch.Tensor, momentum: float = 0.1, noise: torch.Generator | None = None) -> Jet:
        """`noise` is for networks that draw from it."""
        z = self.pooled(x, momentum)
        logits = self.logits(self.head_1(self.head_0(z, momentum), momentum)).reshape(len(z), -1, self.bins)
        if self.cluster_by != "embedding":
            z = self.place(logits.float())
        return Jet(z, logits, self.distances(z))

    def place(self, logits: torch.Tensor) -> torch.Tensor:
        """Where jets lie by what is said of their bins (B, P, bins): (B, P), or (B, P bins) by the whole distributions."""
        if self.cluster_by == "bins":
            return logits.softmax(-1) @ torch.linspace(0, 1, self.bins, device=logits.device)
        return (logits.log_softmax(-1) / 2).exp().flatten(1)  # the root of a probability of 0 would have no gradient

    def embed(self, x: torch.Tensor, momentum: float = 0.1) -> torch.Tensor:
        """(B, N, 8) -> (B, d)."""
        return self.pooled(x, momentum) if self.cluster_by == "embedding" else self(x, momentum).embedding

    def pooled(self, x: torch.Tensor, momentum: float) -> torch.Tensor:
        """(B, N, 8) -> (B, embedding)."""
        known = self.known(x, momentum)
        rows = known.slots(self.join(known.parts, momentum))
        return rows.mean(1) if self.padding != "masked" else rows.sum(1) / known.real.sum(1, keepdim=True).clamp_min(1)


def _rows(nearest: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Neighbours (B, N, K) within their jets as numbers of rows, (K, M); with `real` (B, N) the rows are those slots alone, and a jet with
    fewer than K of them has the constituent itself in the others' places."""
    n_jets, n, k = nearest.shape
    own = torch.arange(n_jets * n, device=nearest.device).view(n_jets, n, 1)
    rows = nearest + own[:, :1]
    if real is not None:
        rows = torch.where(real.flatten()[rows], rows, own)
        number = real.flatten().cumsum(0) - 1
        rows = number[rows.view(-1, k)[real.flatten()]]
    return rows.view(-1, k).t().contiguous()


def count(module: nn.Module) -> int:
    """The parameters of a network without its centres."""
    return sum(p.numel() for name, p in module.named_parameters() if name.rpartition(".")[2] != "centres")
