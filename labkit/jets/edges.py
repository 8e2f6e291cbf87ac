"""The edges of a GAP block, computed a few rows at a time: e_ij = ReLU(BN(u_i - u_j + b)) for all i and their neighbours j.

A batch of 128 jets has 128 x 100 x 10 edges of 128 numbers, 65 MB, and a step of plain tensors goes over them some thirty times. Here
no tensor of all edges is ever made. As the layer before the normalisation is linear, W (x_i - x_j) = u_i - u_j with u = W x of the
nodes; normalised it is s (u_i - u_j) + t = (s u_i + t) - s u_j. So an edge costs a gather, a difference and a ReLU, and is computed again
wherever it is needed, in blocks that fit into the cache:

    forward     mean and variance of u_i - u_j, from sums over neighbours alone;  n_ij = w . e_ij and l_i = max_j e_ij;  v_i = sum_j a_ij e_ij
    backward    dL/da_ij = g_i . e_ij;  then all that e_ij is used for at once, summed to its two nodes

The sums through the mean and the variance need no edges: sum_j (u_i - u_j) of each node is all of it. Of a batch that several workers
share (`labkit.models.batch_norm`) both are those of all its edges.

Used by `labkit.jets.networks`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from labkit.models.batch_norm import ranks

ROWS = 2048  # nodes at once on a processor: a block of (2048, 128) is 1 MB


class Edges:
    """The edges of one batch, from every one of M nodes to its K neighbours; `neighbours` is (K, M), int64.

    `scores` comes before `weighted`, and both are differentiable once. `n` is the number of edges that `scores` has normalised by.
    """

    def __init__(self, neighbours: torch.Tensor) -> None:
        self.neighbours = neighbours
        self.k, self.m = neighbours.shape
        self.n = neighbours.numel()
        self.begins = self.ends = None  # s u + t and s u of the nodes, (M, F)
        self.attention = self.gradient = None

    def scores(
        self,
        u: torch.Tensor,
        bias: torch.Tensor,
        gamma: torch.Tensor,
        beta: torch.Tensor,
        w: torch.Tensor,
        running: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """w . e_ij (K, M), max_j e_ij (M, F), and mean and variance (F,) of u_i - u_j + b in this batch.

        u is (M, F), the vectors are (F,); with `running` = (mean, variance) those are used instead of the batch's.
        """
        with torch.autocast(u.device.type, enabled=False):
            return _Scores.apply(_full(u), bias, gamma, beta, w, self, running, eps, torch.is_grad_enabled())

    def weighted(self, attention: torch.Tensor) -> torch.Tensor:
        """sum_j a_ij e_ij (M, F), of `attention` (K, M), which was made of the scores."""
        with torch.autocast(attention.device.type, enabled=False):
            return _Weighted.apply(_full(attention), self)

    def counts(self) -> torch.Tensor:
        """How many edges end in each node, (M,)."""
        return torch.bincount(self.neighbours.flatten(), minlength=self.m)

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """sum_j of values (M, F) over the neighbours of each node."""
        return F.embedding_bag(self.neighbours.t().contiguous(), values, mode="sum")

    def blocks(self, nodes: torch.Tensor) -> list[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Rows, the `nodes` (M, F) in these, and memory for an edge of each."""
        rows = self.m if nodes.is_cuda else ROWS
        memory = nodes.new_empty(min(rows, self.m), nodes.shape[1])
        parts = (slice(start, min(start + rows, self.m)) for start in range(0, self.m, rows))
        return [(part, nodes[part], memory[: part.stop - part.start]) for part in parts]

    def differences(self, k: int, part: slice, begins: torch.Tensor, ends: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """What nodes have less what their k-th neighbours have of `ends` (M, F), in `out`."""
        torch.index_select(ends, 0, self.neighbours[k, part], out=out)
        return torch.sub(begins, out, out=out)

    def edge(self, k: int, part: slice, begins: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """e_ij to the k-th neighbour, in `out`."""
        return self.differences(k, part, begins, self.ends, out).clamp_min_(0)


def _full(x: torch.Tensor) -> torch.Tensor:
    """In float32, where autocast has made it less."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, bias, gamma, beta, w, edges, running, eps, trained):
        u = u.contiguous()
        others, sums = ranks(), None
        if running is None:
            # sum (u_i - u_j)^2 without an edge: u less its mean, so that what cancels is no larger than what stays
            centred = u - u.mean(0)
            around = edges.sums(centred)
            sums = edges.k * centred - around
            n = max(1, edges.n)
            mean = sums.sum(0, dtype=torch.float64) / n
            square = (centred.square() * (edges.k + edges.counts()[:, None])).sum(0, dtype=torch.float64)
            square -= 2 * (centred * around).sum(0, dtype=torch.float64)
            variance = (square / n - mean**2).clamp_min(0)
            if others:
                edges.n, mean, variance = others.statistics(edges.n, mean, variance)
            mean, variance = mean.to(u.dtype), variance.to(u.dtype)
        else:
            mean, variance = running[0] - bias, running[1]
        inverse = torch.rsqrt(variance + eps)
        scale = gamma * inverse
        edges.ends = u * scale
        edges.begins = edges.ends + (beta - scale * mean)
        scores, largest = u.new_empty(edges.k, edges.m), torch.empty_like(u)
        which = torch.zeros(u.shape, dtype=torch.uint8, device=u.device) if trained else None
        for part, own, out in edges.blocks(edges.begins):
            most, at = largest[part], which[part] if trained else None
            for k in range(edges.k):
                edge = edges.edge(k, part, own, out)
                torch.mv(edge, w, out=scores[k, part])
                if k:
                    if trained:
                        torch.maximum(at, (edge > most).view(torch.uint8).mul_(k), out=at)  # where k is larger, the latest such k
                    torch.maximum(most, edge, out=most)
                else:
                    most.copy_(edge)
        ctx.edges, ctx.by_batch, ctx.others = edges, running is None, others
        ctx.save_for_backward(u, gamma, w, mean, inverse, sums, which)
        mean = mean + bias
        ctx.mark_non_differentiable(mean, variance)
        return scores, largest, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, of_scores, of_largest, *_):
        edges, (u, gamma, w, mean, inverse, sums, which) = ctx.edges, ctx.saved_tensors
        scale = gamma * inverse
        of_scores = of_scores.contiguous()
        of_rows, of_columns, of_w = torch.zeros_like(u), torch.zeros_like(u), torch.zeros_like(w)
        gradient, zero = None, u.new_zeros(())
        for part, own, out in edges.blocks(edges.begins):
            gradient = torch.empty_like(out) if gradient is None or gradient.shape != out.shape else gradient
            largest, at = of_largest[part], which[part]
            for k in range(edges.k):
                ends = edges.neighbours[k, part]
                edge = edges.edge(k, part, own, out)
                of_w += torch.mv(edge.t(), of_scores[k, part])
                torch.mul(of_scores[k, part, None], w, out=gradient)
                gradient.add_(torch.where(at == k, largest, zero))
                if edges.gradient is not None:
                    gradient.addcmul_(edges.attention[k, part, None], edges.gradient[part])
                gradient = torch.ops.aten.threshold_backward(gradient, edge, 0)  # that of the ReLU
                of_rows[part].add_(gradient)
                of_columns.index_add_(0, ends, gradient)
        of_beta = of_rows.sum(0)
        of_gamma = inverse * ((u * of_rows).sum(0) - (u * of_columns).sum(0) - mean * of_beta)
        of_u, of_bias = of_rows - of_columns, scale * of_beta
        if ctx.by_batch:
            all_gamma, all_beta = ctx.others.sums(of_gamma, of_beta) if ctx.others else (of_gamma, of_beta)
            n, ends = edges.n, edges.neighbours.flatten()
            count = edges.counts()
            begins = torch.argsort(ends, stable=True) % edges.m  # of the edges that end in node 0, in node 1, ...
            onto = F.embedding_bag(begins, u, count.cumsum(0) - count, mode="sum")  # sum of u_i over the edges that end in a node
            count = count[:, None]
            # of an edge: g - mean(g) - z mean(g z), with z = (u_i - u_j - mean) / deviation
            z = inverse * ((sums - edges.k * mean) - (onto - count * u - count * mean))
            of_u = of_u - (edges.k - count) * (all_beta / n) - z * (all_gamma / n)
            of_bias = torch.zeros_like(of_bias)
        edges.attention = edges.gradient = None
        return scale * of_u, of_bias, of_gamma, of_beta, of_w, None, None, None, None


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attention, edges):
        ctx.edges = edges
        ctx.save_for_backward(attention)
        made = torch.zeros_like(edges.begins)
        for part, own, out in edges.blocks(edges.begins):
            for k in range(edges.k):
                made[part].addcmul_(attention[k, part, None], edges.edge(k, part, own, out))
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        """What a_ij gets; what e_ij gets is left to the backward pass of the scores, which comes after this one."""
        edges, (attention,) = ctx.edges, ctx.saved_tensors
        edges.attention, edges.gradient = attention, gradient
        of_attention = torch.empty_like(attention)
        for part, own, out in edges.blocks(edges.begins):
            for k in range(edges.k):
                torch.sum(edges.edge(k, part, own, out).mul_(gradient[part]), 1, out=of_attention[k, part])
        return of_attention, None
