"""The problem "train a flow to make showers": conditional flow matching, a small network on the GAN's interface.

    x_t = (1 - t) x_0 + t x_1,   loss = |v(x_t, t, condition) - (x_1 - x_0)|^2        x_0 noise, x_1 a shower, t uniform (arXiv:2210.02747)
    a shower: x_0 -> x_1 by midpoint steps, 8 at most                                  condition: the energy; of cells the layers too

Two flows, trained in one step: of the energies of the layers, their total and the centre in x and y (Z + 3 numbers, standardised at the energy and decorrelated), by a perceptron; and
of the cells, given those, by convolutions over a layer's plane with the depth as channels. A cell that is hit is 1/4 + ln(c / keV) / 4, one that is not
normal about -1/2; an empty layer likewise. In the end the cells of a layer are scaled to its energy.

Neither network says the velocity itself. That of a normal x_1 of mean m and deviation s is known,

    v = m + (t s^2 - (1 - t)) / w (x_t - t m)        w = t^2 s^2 + (1 - t)^2

so the perceptron says by how much that of a standard normal is wrong; and the convolutions say of each cell how likely it is hit, and m if it is, from
which follows v of the mixture (with what x_t says of it). So both begin at what `Profile` knows, and a cell decides in a step or two.

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
from labkit.showers.networks import FLOOR_MEV, LEAST_MEV, Condition, Profile, centre, in_mev, standardised, with_total

TIMES = 8  # frequencies by which a network sees t
AGAIN = 8  # times and noises for the layers of a shower in a step: their network costs little
NOT_HIT = -0.5, 0.1  # mean and deviation of a cell that is not
SCALE = 4.0  # of the logarithm of a cell's energy
MOST_STEPS = 8
LOOKED_AT = 8  # showers of a batch whose layers are made to see whether they are empty


class ShowerFlow(Showers):
    """A flow-matching generator of 70,000 to 500,000 parameters.

    Parameters beside those of `Problem`
    ------------------------------------
    data : as of `ShowerGAN`, of 25 x 25 x 25 cells or any square layers.
    channels, blocks : of the convolutions; 48 and 2.
    width : of the perceptron; 192.
    steps : midpoint steps from noise to a shower, 8 at most; each evaluates the network twice.
    lr, decay : of Adam; the rate ends at decay * lr by a half cosine over the run.
    mirror : showers are mirrored and transposed at random, batch by batch: they come head on.

    A loss that is no number, or layers that are empty (looked at in every 16th step of a worker), end the run: `step` raises a ProblemError.

    Examples
    --------
    >>> problem = labkit.showers.ShowerFlow("showers-wsi", train_samples=128, test_samples=32, score_samples=32)
    >>> labkit.train(problem, lab, passes=1).wait().state
    'done'
    """

    def __init__(
        self,
        data: Any = "showers-wsi",
        *,
        batch_size: int = 32,
        channels: int = 48,
        blocks: int = 2,
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
            noise = torch.randn(len(condition), cells.shape[4] + 3, generator=torch.Generator().manual_seed(NOISE_SEED))
            with evaluating(module) as plain:
                made = plain.layers_from(noise.to(cells.device), condition, self.steps)[0].sum(1)
            enough = made > EMPTY * cells.sum((1, 2, 3, 4)).mean()
            fine |= {"its layers are no numbers": made.isfinite().all(), "its layers are empty": enough.float().mean() >= 0.1}
        self._refuse_collapse(fine, clock)

    def _pair(self, module: nn.Module, batch: Any, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Roots of the layers' energies, of real and of made showers, (n, Z) each, and the two losses (n, 2)."""
        cells, condition = batch[0][:, 0].float(), (batch[1] / GEV)
        with evaluating(module) as plain:
            noise = torch.randn(len(cells), cells.shape[3] + 3, generator=generator).to(cells.device)
            layers = plain.layers_from(noise, condition[:, None], self.steps)[0]
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
        self.n_sums = self.depth + 3  # layers, total, centre
        self.n_noise = self.n_sums + pixels * self.depth
        self.condition = Condition(profile)
        self.register_buffer("root", torch.tensor(profile.root.T.copy()))
        self.register_buffer("inverse", torch.linalg.inv(self.root))
        self.register_buffer("sway", torch.tensor(profile.sway))
        self.of_layers = nn.Sequential(
            nn.Linear(self.n_sums + 3 + 2 * TIMES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, self.n_sums),
        )  # fmt: skip
        _zero(self.of_layers[-1])
        self.of_cells = Planes(profile, channels, blocks)

    def forward(self, cells: torch.Tensor, energy: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        n = len(cells)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=cells.device)

        seen, mean, spread = self.condition(energy[:, None])
        layers = cells.sum((1, 2))
        sums = with_total(layers)
        s = torch.where(sums >= LEAST_MEV, (sums / FLOOR_MEV).log1p(), NOT_HIT[0] + NOT_HIT[1] * normal(n, self.depth + 1))
        centres = centre(cells) / self.sway
        one = torch.cat([((s - mean) / spread) @ self.inverse, centres], 1).repeat(AGAIN, 1)
        zero, t = normal(AGAIN * n, self.n_sums), torch.rand(AGAIN * n, 1, generator=generator, device=cells.device)
        wrong = (self._speed(torch.lerp(zero, one, t), t, seen.repeat(AGAIN, 1)) - (one - zero)).square()
        losses = [wrong.view(AGAIN, n, self.n_sums).mean((0, 2))]
        one = encoded(cells, normal(n, self.side, self.side, self.depth)).permute(0, 3, 1, 2)
        zero = normal(n, self.side, self.side, self.depth).permute(0, 3, 1, 2)
        t = torch.rand(n, 1, generator=generator, device=cells.device)
        way = one - zero
        about = layers, torch.cat([standardised(layers, mean, spread), centres], 1)
        speed = self.of_cells(zero + t[:, :, None, None] * way, t, seen, *about)
        return torch.stack([losses[0], (speed - way).square().mean((1, 2, 3))], 1)

    def layers_from(self, noise: torch.Tensor, condition: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Energies of layers (n, Z) in MeV of noise (n, Z + 3), and the same, their total and the centre standardised."""
        seen, mean, spread = self.condition(condition)
        made = midpoint(lambda x, t: self._speed(x, t, seen), noise, steps)
        layers = in_mev(made[:, :-2] @ self.root, mean, spread)
        return layers, torch.cat([standardised(layers, mean, spread), made[:, -2:]], 1)

    def showers(self, noise: torch.Tensor, condition: torch.Tensor, steps: int) -> torch.Tensor:
        """(n, X, Y, Z) in MeV."""
        n = len(noise)
        layers, standard = self.layers_from(noise[:, : self.n_sums], condition, steps)
        seen = self.condition(condition)[0]
        start = noise[:, self.n_sums :].reshape(n, self.side, self.side, self.depth).permute(0, 3, 1, 2)
        x = midpoint(lambda x, t: self.of_cells(x, t, seen, layers, standard), start, steps)
        x = torch.where(x == x.amax((2, 3), keepdim=True), x.clamp_min(0.25), x)  # a layer with energy has a cell that is hit
        cells = decoded(x.permute(0, 2, 3, 1))
        cells = cells * (layers / cells.sum((1, 2)).clamp_min(LEAST_MEV))[:, None, None]
        return F.threshold(cells, LEAST_MEV, 0.0)

    def _speed(self, x: torch.Tensor, t: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        return velocity(x, t, torch.zeros_like(t), 1.0)[0] + self.of_layers(torch.cat([x, seen, waves(t)], 1)).float()


class Planes(nn.Module):
    """A velocity for each cell, of (n, Z, X, Y): residual blocks of convolutions over (x, y), layers as channels, modulated by time and condition.

    They say of each cell how likely it is hit, as a logit, the mean if it is, and a rest; beside what is learned of each cell and its layer's energy.
    """

    def __init__(self, profile: Profile, channels: int, blocks: int) -> None:
        super().__init__()
        pixels, depth = profile.image.shape
        side = math.isqrt(pixels)
        self.place = nn.Parameter(torch.zeros(side, side, channels))  # tells the convolutions where they are
        self.embed = nn.Sequential(nn.Linear(2 * TIMES + 6 + depth, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU())
        self.first = nn.Conv2d(depth, channels, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2 * blocks))
        self.modulate = nn.ModuleList(nn.Linear(96, 2 * channels) for _ in range(blocks))
        self.last = nn.Conv2d(channels, 3 * depth, 1)
        self.direct = nn.Linear(96, 2 * depth)
        for layer in (self.last, self.direct, *self.modulate):
            _zero(layer)
        for layer in list(self.blocks)[1::2]:
            nn.init.normal_(layer.weight, std=1e-3)
        hit, log_hit = (_symmetric(torch.tensor(one).view(side, side, depth)) for one in (profile.hit, profile.log_hit))
        hit = hit.clamp(1e-5, 1 - 1e-3)
        self.logit = nn.Parameter(
            torch.stack([hit.logit(), torch.ones_like(hit)])
        )  # at the mean layer, and by how much it grows with it
        self.mean = nn.Parameter(torch.stack([0.25 + log_hit / SCALE, hit]))
        moved = [
            -slope * float(profile.sway)
            for of in (self.logit[0], self.mean[0])
            for slope in torch.gradient(of.detach(), dim=(0, 1))
        ]
        self.moved = nn.Parameter(torch.stack(moved))  # by how much logit and mean grow with the centre in x and in y
        self.log_spread = nn.Parameter(torch.full((depth, 1, 1), math.log(0.3)))  # of a cell that is hit
        self.register_buffer("typical", torch.tensor(profile.typical[:-1]) + math.log(FLOOR_MEV))

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, seen: torch.Tensor, layers: torch.Tensor, standard: torch.Tensor
    ) -> torch.Tensor:
        """Of x at times t (n, 1), energies as `seen` (n, 3), and those of layers (n, Z) in MeV, and standardised with total and centre."""
        about = self.embed(torch.cat([waves(t), seen, standard.clamp(-6, 6)], 1))
        h = self.first(x) + self.place.permute(2, 0, 1)
        for number, modulate in enumerate(self.modulate):
            scale, shift = modulate(about)[:, :, None, None].chunk(2, 1)
            inner = self.blocks[2 * number](F.silu(h))
            h = h + self.blocks[2 * number + 1](F.silu(inner * (1 + scale) + shift))
        logit, mean, rest = self.last(F.silu(h)).float().chunk(3, 1)
        of_layer = self.direct(about).float()[:, :, None, None].chunk(2, 1)
        more = ((layers + FLOOR_MEV).log() - self.typical)[:, :, None, None]
        of_logit, of_mean, moved = (one.permute(0, 3, 1, 2) for one in (self.logit, self.mean, self.moved))
        x_y = standard[:, -2:, None, None, None].unbind(1)
        logit = logit + of_layer[0] + torch.addcmul(of_logit[0], of_logit[1], more)
        mean = mean + of_layer[1] + torch.addcmul(of_mean[0], of_mean[1], more / SCALE)
        logit, mean = logit + x_y[0] * moved[0] + x_y[1] * moved[1], mean + x_y[0] * moved[2] + x_y[1] * moved[3]
        t = t[:, :, None, None]
        (none, log_none), (hit, log_hit) = velocity(x, t, *NOT_HIT), velocity(x, t, mean, self.log_spread.exp())
        return torch.lerp(none, hit, (logit + log_hit - log_none).sigmoid()) + rest


def velocity(x: torch.Tensor, t: torch.Tensor, mean: Any, spread: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """E[x_1 - x_0 | x_t] where x_1 is normal with `mean` and `spread`, and the logarithm of x_t's density there, but for a constant."""
    variance = (t * spread) ** 2 + (1 - t) ** 2
    apart = x - t * mean
    return mean + (t * spread**2 - (1 - t)) / variance * apart, -(apart**2 / variance + torch.log(variance)) / 2


def _symmetric(planes: torch.Tensor) -> torch.Tensor:
    """The mean of planes (X, X, Z) in the eight positions of a square."""
    planes = (planes + planes.transpose(0, 1)) / 2
    return (planes + planes.flip(0) + planes.flip(1) + planes.flip((0, 1))) / 4


def _zero(layer: nn.Module) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


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
    return torch.where(hit, 0.25 + (cells.clamp_min(LEAST_MEV) / LEAST_MEV).log() / SCALE, NOT_HIT[0] + NOT_HIT[1] * noise)


def decoded(x: torch.Tensor) -> torch.Tensor:
    """The inverse."""
    return torch.where(x > 0, LEAST_MEV * ((x - 0.25).clamp(0, 4) * SCALE).exp(), 0.0)
