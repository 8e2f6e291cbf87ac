"""The problem "train a flow to make showers": conditional flow matching, a small network on the GAN's interface.

    x_t = (1 - t) x_0 + t x_1,   loss = |v(x_t, t, condition) - (x_1 - x_0)|^2        x_0 noise, x_1 a shower, t uniform (arXiv:2210.02747)
    a shower: x_0 -> x_1 by midpoint steps, 8 at most                                  condition: the energy; of cells the layers too

Two flows, trained in one step: of the energies of the layers (Z numbers, standardised at the energy), by a perceptron; and of the cells, given those,
by convolutions over a layer's plane with the depth as channels. A cell that is hit is 1/4 + ln(c / keV) / 4, one that is not -1/4 - |z| / 4 with z normal:
the sign says which. In the end the cells of a layer are scaled to its energy.

The loss of curves is the mean flow-matching loss with the same noise and times each time; the score is exp(-(W + L)), with W the distance of the
layers' energies that the first flow makes (as of a GAN, of these sums alone) and L the loss of the second: no shower of cells is made for it.

Used by users through `labkit.showers.ShowerFlow`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from labkit.errors import ProblemError, flag, real, whole
from labkit.models import evaluating, seeded
from labkit.problems.optimisers import make_optimiser
from labkit.problems.problem import Clock, Metrics, Optimisers
from labkit.showers.features import distance
from labkit.showers.gan import EMPTY, GEV, NOISE_SEED, Showers, mirrored
from labkit.showers.networks import LEAST_MEV, Condition, Profile, in_mev, standardised

TIMES = 8  # frequencies by which a network sees t
MAPS = 8  # learned planes that tell the convolutions where they are
SCALE = 4.0  # of the logarithm of a cell's energy
MOST_STEPS = 8
LOOKED_AT = 8  # showers of a batch whose layers are made to see whether they are empty


class ShowerFlow(Showers):
    """A flow-matching generator of 70,000 to 500,000 parameters.

    Parameters beside those of `Problem`
    ------------------------------------
    data : as of `ShowerGAN`, of 25 x 25 x 25 cells or any square layers.
    channels, blocks : of the convolutions; 48 and 3.
    width : of the perceptron; 192.
    steps : midpoint steps from noise to a shower, 8 at most; each evaluates the network twice.
    lr, decay : of Adam; the rate ends at decay * lr by a half cosine over the run.
    mirror : showers are mirrored and transposed at random, batch by batch: they come head on.

    A loss that is no number, or layers that are empty (looked at in every 16th step of a worker), end the run: `step` raises a ProblemError.
    """

    def __init__(
        self,
        data: Any = "showers-wsi",
        *,
        batch_size: int = 64,
        channels: int = 48,
        blocks: int = 3,
        width: int = 192,
        steps: int = 8,
        lr: float = 2e-3,
        decay: float = 0.02,
        mirror: bool = True,
        **common: Any,
    ) -> None:
        self.channels, self.blocks, self.width = (
            whole("channels", channels, 4),
            whole("blocks", blocks, 0),
            whole("width", width, 4),
        )
        self.steps = whole("steps", steps, 1, MOST_STEPS)
        self.lr, self.decay = real("lr", lr, above=0), real("decay", decay, least=0, most=1)
        self.mirror = flag("mirror", mirror)
        super().__init__(data, batch_size=batch_size, **common)

    def build(self, seed: int) -> nn.Module:
        self.check_cells("flow", None)
        if self.has_angle:
            raise ProblemError(
                f"a ShowerFlow knows of no angles, and data {self.dataset.name!r} have some. Take ShowerGAN(network='angle')."
            )
        with seeded(seed):
            return Flows(self.profile, self.channels, self.blocks, self.width)

    def optimisers(self, module: nn.Module) -> Optimisers:
        return (make_optimiser("adam", list(module.parameters()), lr=self.lr, momentum=0.9, weight_decay=0.0),)

    def n_noise(self, module: nn.Module) -> int:
        return module.n_noise

    def step(self, module: nn.Module, batch: Any, optimisers: Optimisers, clock: Clock) -> Metrics:
        share = self.decay + (1 - self.decay) * (1 + math.cos(math.pi * clock.samples / max(1, clock.total))) / 2
        warm = min(1.0, 0.1 + 0.9 * clock.samples / (0.02 * clock.total + 1))
        for group in optimisers[0].param_groups:
            group["lr"] = self.lr * share * warm
        cells = mirrored(batch[0].float(), clock.generator) if self.mirror else batch[0].float()
        with self.autocast(cells.device):
            losses = module(cells[:, 0], batch[1] / GEV, clock.generator)
        loss = losses.mean(0).sum()
        optimisers[0].zero_grad()
        loss.backward()
        optimisers[0].step()
        due = self._is_due(module)
        if due or cells.device.type == "cpu":
            self._check_collapse(module if due else None, loss.detach(), cells, batch[1], clock)
        of = losses.detach().mean(0)
        return {"loss": loss.detach(), "layers": of[0], "cells": of[1]}

    def _check_collapse(
        self, module: nn.Module | None, loss: torch.Tensor, cells: torch.Tensor, energies: torch.Tensor, clock: Clock
    ) -> None:
        """ProblemError where the loss is no number, or the layers that `module` makes, if it is given, are empty."""
        fine = {"its loss is no number": loss.isfinite()}
        if module is not None:
            condition = energies[:LOOKED_AT, None] / GEV
            noise = torch.randn(len(condition), cells.shape[4], generator=torch.Generator().manual_seed(NOISE_SEED))
            with evaluating(module) as plain:
                made = in_mev(*plain.layers_from(noise.to(cells.device), condition, self.steps)).sum(1)
            enough = made > EMPTY * cells.sum((1, 2, 3, 4)).mean()
            fine |= {"its layers are no numbers": made.isfinite().all(), "its layers are empty": enough.float().mean() >= 0.1}
        self._refuse_collapse(fine, clock)

    def _pair(self, module: nn.Module, batch: Any, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Roots of the layers' energies, of real and of made showers, (n, Z) each, and the two losses (n, 2)."""
        cells, condition = batch[0][:, 0].float(), (batch[1] / GEV)
        with evaluating(module) as plain:
            noise = torch.randn(len(cells), cells.shape[3], generator=generator).to(cells.device)
            layers = in_mev(*plain.layers_from(noise, condition[:, None], self.steps))
            here = generator if cells.device.type == "cpu" else torch.Generator(cells.device).manual_seed(NOISE_SEED)
            with self.autocast(cells.device):
                losses = plain(cells, condition, here)
        return tuple(one.float().cpu().numpy() for one in (cells.sum((1, 2)).sqrt(), layers.sqrt(), losses))

    def _apart(self, real: np.ndarray, made: np.ndarray, losses: np.ndarray) -> dict[str, float]:
        apart, (layers, cells) = distance(real, np.nan_to_num(made, nan=1e9)), np.nan_to_num(losses, nan=1e9).mean(0).tolist()
        return {"loss": layers + cells, "score": math.exp(-(apart + cells)), "layers": layers, "cells": cells, "distance": apart}

    def make(
        self, module: nn.Module, energies: torch.Tensor, noise: torch.Tensor, theta: torch.Tensor | None = None
    ) -> torch.Tensor:
        return module.showers(noise, (energies / GEV)[:, None], self.steps)


class Flows(nn.Module):
    """Both velocity fields; called with real showers (n, X, Y, Z) in MeV it returns their losses (n, 2)."""

    def __init__(self, profile: Profile, channels: int, blocks: int, width: int) -> None:
        super().__init__()
        pixels, self.depth = profile.image.shape
        self.side = math.isqrt(pixels)
        self.n_noise = self.depth + pixels * self.depth
        self.condition = Condition(profile)
        self.of_layers = nn.Sequential(
            nn.Linear(self.depth + 3 + 2 * TIMES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, self.depth),
        )  # fmt: skip
        self.of_cells = Planes(self.side, self.depth, channels, blocks)

    def forward(self, cells: torch.Tensor, energy: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        n = len(cells)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=cells.device)

        seen, mean = self.condition(energy[:, None])
        layers = standardised(cells.sum((1, 2)), mean, self.condition.spread)
        t = torch.rand(n, 1, generator=generator, device=cells.device)
        one, zero = layers, normal(n, self.depth)
        losses = [(self._speed(zero + t * (one - zero), t, seen) - (one - zero)).square().mean(1)]
        one = encoded(cells, normal(n, self.side, self.side, self.depth)).permute(0, 3, 1, 2)
        zero = normal(n, self.side, self.side, self.depth).permute(0, 3, 1, 2)
        t = torch.rand(n, 1, generator=generator, device=cells.device)
        way = one - zero
        speed = self.of_cells(zero + t[:, :, None, None] * way, t, torch.cat([seen, layers], 1))
        return torch.stack([losses[0], (speed.float() - way).square().mean((1, 2, 3))], 1)

    def layers_from(
        self, noise: torch.Tensor, condition: torch.Tensor, steps: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Layers of noise (n, Z), standardised, with their mean and spread: what `in_mev` takes."""
        seen, mean = self.condition(condition)
        return midpoint(lambda x, t: self._speed(x, t, seen), noise, steps), mean, self.condition.spread

    def showers(self, noise: torch.Tensor, condition: torch.Tensor, steps: int) -> torch.Tensor:
        """(n, X, Y, Z) in MeV."""
        n = len(noise)
        layers, mean, spread = self.layers_from(noise[:, : self.depth], condition, steps)
        seen = torch.cat([self.condition(condition)[0], layers], 1)
        start = noise[:, self.depth :].reshape(n, self.side, self.side, self.depth).permute(0, 3, 1, 2)
        cells = decoded(midpoint(lambda x, t: self.of_cells(x, t, seen).float(), start, steps).permute(0, 2, 3, 1))
        of_layers = in_mev(layers, mean, spread)
        cells = cells * (of_layers / cells.sum((1, 2)).clamp_min(LEAST_MEV))[:, None, None]
        return F.threshold(cells, LEAST_MEV, 0.0)

    def _speed(self, x: torch.Tensor, t: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        return self.of_layers(torch.cat([x, seen, waves(t)], 1)).float()


class Planes(nn.Module):
    """A velocity for each cell: residual blocks of convolutions over (x, y), layers as channels, modulated by time and condition."""

    def __init__(self, side: int, depth: int, channels: int, blocks: int) -> None:
        super().__init__()
        self.maps = nn.Parameter(0.1 * torch.randn(1, MAPS, side, side))
        self.embed = nn.Sequential(nn.Linear(2 * TIMES + 3 + depth, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU())
        self.first = nn.Conv2d(depth + MAPS, channels, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2 * blocks))
        self.modulate = nn.ModuleList(nn.Linear(96, 2 * channels) for _ in range(blocks))
        self.last = nn.Conv2d(channels, depth, 3, padding=1)
        self.direct = nn.Linear(96, 2 * depth)  # of x itself: most cells are noise that only has to shrink
        for layer in (self.last, self.direct, *self.modulate):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in list(self.blocks)[1::2]:
            nn.init.normal_(layer.weight, std=1e-3)

    def forward(self, x: torch.Tensor, t: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        about = self.embed(torch.cat([waves(t), seen], 1))
        h = self.first(torch.cat([x, self.maps.expand(len(x), -1, -1, -1)], 1))
        for number, modulate in enumerate(self.modulate):
            scale, shift = modulate(about)[:, :, None, None].chunk(2, 1)
            inner = self.blocks[2 * number](F.silu(h))
            h = h + self.blocks[2 * number + 1](F.silu(inner * (1 + scale) + shift))
        scale, shift = self.direct(about)[:, :, None, None].chunk(2, 1)
        return self.last(F.silu(h)) + scale * x + shift


def waves(t: torch.Tensor) -> torch.Tensor:
    """Times (n, 1) as (n, 2 TIMES)."""
    at = t * (torch.pi * torch.arange(1, TIMES + 1, device=t.device))
    return torch.cat([at.sin(), at.cos()], 1)


def midpoint(speed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor, steps: int) -> torch.Tensor:
    """x at t = 1 of dx/dt = speed(x, t) from t = 0, by the explicit midpoint rule."""
    h = 1 / steps
    for number in range(steps):
        t = torch.full((len(x), 1), number * h, device=x.device)
        half = x + h / 2 * speed(x, t)
        x = x + h * speed(half, t + h / 2)
    return x


def encoded(cells: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Energies of cells in MeV as numbers of about 1, those of cells that are not hit below 0."""
    hit = cells >= LEAST_MEV
    return torch.where(hit, 0.25 + (cells.clamp_min(LEAST_MEV) / LEAST_MEV).log() / SCALE, -0.25 - noise.abs() / 4)


def decoded(x: torch.Tensor) -> torch.Tensor:
    """The inverse."""
    return torch.where(x > 0, LEAST_MEV * ((x - 0.25).clamp(0, 4) * SCALE).exp(), 0.0)
