"""Another pretext: a small transformer that learns from itself, without bins of anything. Its embedding is clustered as ABCNet's is.

Two views of a jet, each rotated about its axis and without some of its constituents; a student says of one what a teacher says of the
other, and the teacher follows the student:

    L = mean over both orders of  - sum_p softmax((t - c) / T_t)_p log softmax(s / T_s)_p
    teacher <- 0.99 teacher + 0.01 student        c <- 0.9 c + 0.1 mean t

The size of jBOT (arXiv:2601.11719): the 30 hardest constituents, 32 numbers each, 4 heads, 2 layers; the loss of DINO (Caron et al.,
arXiv:2104.14294).

Used by `labkit.jets.problem`.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from labkit.jets.networks import FEATURES, Jet, Norm

HARDEST, WIDTH, HEADS, LAYERS, PROTOTYPES = 30, 32, 4, 2, 64
DROPPED = 0.2  # of the constituents of a view, but for the hardest
STUDENT_T, TEACHER_T, FOLLOWS, CENTRE = 0.1, 0.04, 0.99, 0.9


class Block(nn.Module):
    """Attention among the constituents of a jet, then a layer for each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])
        x = x + self.out(seen.transpose(1, 2).flatten(-2))
        return x + self.layers(self.between(x))


class Encoder(nn.Module):
    """x (B, N, 8) -> embedding (B, d) and what it says of PROTOTYPES (B, P)."""

    def __init__(self, embedding: int) -> None:
        super().__init__()
        self.norm, self.first = Norm(len(FEATURES)), nn.Linear(len(FEATURES), WIDTH)
        self.jet = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(LAYERS))
        self.last, self.embedding = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, embedding)
        self.says = nn.Sequential(nn.Linear(embedding, 64), nn.GELU(), nn.Linear(64, PROTOTYPES))

    def forward(self, x: torch.Tensor, momentum: float) -> tuple[torch.Tensor, torch.Tensor]:
        real = x[..., 2] != 0
        rows = self.norm(x[real], momentum)
        x = self.first(torch.zeros_like(x).masked_scatter(real[..., None], rows))
        x = torch.cat([self.jet.expand(len(x), -1, -1), x], 1)
        real = F.pad(real, (1, 0), value=True)
        for block in self.blocks:
            x = block(x, real)
        z = self.embedding(self.last(x[:, 0]))
        return z, self.says(z)


class Distilled(nn.Module):
    """Student and teacher, and the centres of the clusters; `settled` is 1 once these are those of k-means."""

    def __init__(self, embedding: int = 3, clusters: int = 3) -> None:
        super().__init__()
        self.student = Encoder(embedding)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.centres = nn.Parameter(torch.zeros(clusters, embedding))
        self.register_buffer("settled", torch.zeros((), dtype=torch.int64))
        self.register_buffer("centre", torch.zeros(PROTOTYPES))

    def forward(self, x: torch.Tensor, momentum: float = 0.1, noise: torch.Generator | None = None) -> Jet:
        """`logits` (B, 4, P): what the student says of both views, then the teacher; in evaluation the views are the jet as it is."""
        x = x[:, :HARDEST]
        views = torch.cat([view(x, noise), view(x, noise)]) if self.training else x
        z, said = self.student(views, momentum)
        with torch.no_grad():
            taught = self.teacher(views, momentum)[1]
        if self.training:
            z = torch.stack(z.chunk(2)).mean(0)
            logits = torch.stack([*said.chunk(2), *taught.chunk(2)], 1)
        else:
            logits = torch.stack([said, said, taught, taught], 1)
        return Jet(z, logits, (z.float()[:, None] - self.centres).square().sum(-1))

    def embed(self, x: torch.Tensor, momentum: float = 0.1) -> torch.Tensor:
        return self.student(x[:, :HARDEST], momentum)[0]

    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        said, taught = (logits[:, :2] / STUDENT_T).log_softmax(-1), ((logits[:, 2:] - self.centre) / TEACHER_T).softmax(-1)
        return -(taught.flip(1) * said).sum(-1).mean()

    def agree(self, logits: torch.Tensor) -> torch.Tensor:
        """The share of jets of which student and teacher say the same."""
        return (logits[:, 0].argmax(-1) == (logits[:, 2] - self.centre).argmax(-1)).float().mean()

    @torch.no_grad()
    def follow(self, logits: torch.Tensor) -> None:
        """After a step: the teacher and its centre move on."""
        for teacher, student in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            teacher.lerp_(student, 1 - FOLLOWS)
        self.centre.lerp_(logits[:, 2:].detach().float().mean((0, 1)), 1 - CENTRE)


def view(x: torch.Tensor, noise: torch.Generator | None) -> torch.Tensor:
    """Jets (B, N, 8) turned about their axes, without some constituents."""
    kept = torch.rand(x.shape[:2], generator=noise, device=x.device) > DROPPED
    kept[:, 0] = True
    angle = 2 * math.pi * torch.rand(len(x), 1, generator=noise, device=x.device)
    eta, phi = x[..., 0], x[..., 1]
    turned = [eta * angle.cos() - phi * angle.sin(), eta * angle.sin() + phi * angle.cos()]
    return torch.cat([torch.stack(turned, -1), x[..., 2:]], -1) * kept[..., None]
