"""The networks: those of 3DGAN, layer by layer, a variant for any angle, and a pair that trains on two CPU cores.

A generator maps (noise (n, n_noise), condition (n, 1 or 2)) to cells (n, 1, X, Y, Z), a critic (cells, condition) to its `Verdict`. The
condition is the energy / 100 GeV, and the angle in rad where there is one; cells are in units of the network, MeV times `unit`.

    full      25 x 25 x 25, 872,808 and 73,402 parameters      3DGAN (Carminati et al. 2018; the source paper's network)
    angle     51 x 51 x 25, 1,364,983 and 87,354               3DGAN for angles (Khattak et al. 2019-22)
    reduced   25 x 25 x 25, on a CPU                           this package's own: `Reduced`, `ReducedCritic`

Those of 3DGAN behave as Keras's did: batch normalisation with momentum 0.99 (0.01 in torch's sense) and epsilon 0.001, LeakyReLU of slope
0.3, nearest-neighbour upsampling, an even kernel with "same" padding that has the odd one behind, flattening with channels last.

Used by `labkit.showers.gan`; `Profile` also by `labkit.showers.flow`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

SLOPE = 0.3
GRAIN = 8  # numbers of noise for each (x, y) of the reduced generator
FLOOR_MEV = 0.1  # below it the energy of a layer is counted linearly, above it by its logarithm
CELL_MEV = 0.05  # the same of a cell, for the critic
LEAST_MEV = 1e-3  # of a cell that is hit
HALF_NORMAL = 0.635  # -mean of ln|z|, z normal


class Verdict(NamedTuple):
    """What a critic says of n showers: how real (n, heads) as logits, and which energy / 100 GeV, angle and total they have, (n,) each; and what
    the `ReducedCritic` judges sums by, (n, 8 Z + 4)."""

    logits: torch.Tensor
    energy: torch.Tensor
    total: torch.Tensor
    angle: torch.Tensor | None = None
    sums: torch.Tensor | None = None


class SameConv3d(nn.Conv3d):
    """Keras's padding="same" for kernels of any size: of k - 1 zeros (k - 1) // 2 come before."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pads = [side for k in reversed(self.kernel_size) for side in ((k - 1) // 2, k // 2)]
        return super().forward(F.pad(x, pads))


class Lattice(nn.Module):
    """Keras's Reshape of (n, X * Y * Z * C), channels last, to torch's (n, C, X, Y, Z)."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), *self.shape).movedim(-1, 1)


def _pad(x: int, y: int, z: int) -> nn.ConstantPad3d:
    return nn.ConstantPad3d((z, z, y, y, x, x), 0.0)


def _norm(channels: int) -> nn.BatchNorm3d:
    return nn.BatchNorm3d(channels, eps=1e-3, momentum=0.01)


def _conv(into: int, out: int, kernel: Sequence[int], init: str, same: bool = False, bias: bool = True) -> nn.Conv3d:
    made = (SameConv3d if same else nn.Conv3d)(into, out, tuple(kernel), bias=bias)
    return _initialised(made, init)


def _initialised(layer: nn.Module, init: str) -> nn.Module:
    if init == "he_uniform":
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    else:
        (nn.init.xavier_normal_ if init == "glorot_normal" else nn.init.xavier_uniform_)(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Generator(nn.Module):
    """A generator of 3DGAN: `layers` on latent numbers, which the condition scales ("times") or is put before ("first")."""

    def __init__(self, layers: nn.Sequential, n_noise: int, condition: str) -> None:
        super().__init__()
        self.layers, self.n_noise, self.condition = layers, n_noise, condition

    def forward(self, noise: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return self.layers(noise * condition[:, :1] if self.condition == "times" else torch.cat([condition, noise], 1))


def full_generator(latent: int = 200) -> Generator:
    """25 x 25 x 25 of `latent` normal numbers times the energy; 872,808 parameters with 200."""
    layers = nn.Sequential(
        _initialised(nn.Linear(latent, 3136), "glorot_uniform"),
        Lattice(7, 7, 8, 8),
        _conv(8, 64, (6, 6, 8), "he_uniform", same=True),
        nn.LeakyReLU(SLOPE),
        _norm(64),
        nn.Upsample(scale_factor=(2, 2, 2)),
        _pad(2, 2, 0),
        _conv(64, 6, (6, 5, 8), "he_uniform"),
        nn.LeakyReLU(SLOPE),
        _norm(6),
        nn.Upsample(scale_factor=(2, 2, 3)),
        _pad(1, 0, 3),
        _conv(6, 6, (3, 3, 8), "he_uniform"),
        nn.LeakyReLU(SLOPE),
        _conv(6, 1, (2, 2, 2), "glorot_normal", bias=False),
        nn.ReLU(),
    )
    return Generator(layers, latent, "times")


def angle_generator(latent: int = 256) -> Generator:
    """51 x 51 x 25 of energy, angle and `latent` - 2 normal numbers; 1,364,983 parameters with 256."""
    layers = [_initialised(nn.Linear(latent, 5184), "glorot_uniform"), Lattice(9, 9, 8, 8), nn.Upsample(scale_factor=(6, 6, 6))]
    layers += [_conv(8, 8, (6, 6, 8), "he_uniform"), nn.ReLU(), _norm(8)]
    for into, kernel, pad in (
        (8, (4, 4, 6), (2, 2, 1)),
        (6, (4, 4, 6), (2, 2, 1)),
        (6, (4, 4, 6), (2, 2, 1)),
        (6, (3, 3, 5), (1, 1, 0)),
    ):
        layers += [_pad(*pad), _conv(into, 6, kernel, "he_uniform"), nn.ReLU(), _norm(6)]
    layers += [_pad(1, 1, 0), _conv(6, 6, (3, 3, 3), "he_uniform"), nn.ReLU()]
    layers += [_conv(6, 1, (2, 2, 2), "glorot_normal"), nn.ReLU()]
    return Generator(nn.Sequential(*layers), latent - 2, "first")


class Critic(nn.Module):
    """A discriminator of 3DGAN: heads for real or fake and for the energy on its features; the total and the angle of the image itself."""

    def __init__(self, features: nn.Sequential, n_features: int, measures_angle: bool = False, power: float = 1.0) -> None:
        super().__init__()
        self.features, self.measures_angle, self.power = features, measures_angle, power
        self.real = _initialised(nn.Linear(n_features, 1), "glorot_uniform")
        self.energy = _initialised(nn.Linear(n_features, 1), "glorot_uniform")

    def forward(self, cells: torch.Tensor, condition: torch.Tensor) -> Verdict:
        h = self.features(cells).movedim(1, -1).flatten(1)  # as Keras flattens
        linear = cells if self.power == 1 else cells.clamp_min(1e-12) ** (1 / self.power)
        angle = measured_angle(linear[:, 0]) if self.measures_angle else None
        return Verdict(self.real(h), self.energy(h)[:, 0], linear.sum((1, 2, 3, 4)), angle)


def full_critic(dropout: float = 0.2) -> Critic:
    """Of 25 x 25 x 25; 73,402 parameters."""
    layers = [_conv(1, 32, (5, 5, 5), "glorot_uniform", same=True), nn.LeakyReLU(SLOPE), nn.Dropout(dropout)]
    for into, pad in ((32, 2), (8, 2), (8, 1)):
        layers += [
            _pad(pad, pad, pad),
            _conv(into, 8, (5, 5, 5), "glorot_uniform"),
            nn.LeakyReLU(SLOPE),
            _norm(8),
            nn.Dropout(dropout),
        ]
    return Critic(nn.Sequential(*layers, nn.AvgPool3d(2)), 10648)


def angle_critic(dropout: float = 0.2, power: float = 0.85) -> Critic:
    """Of 51 x 51 x 25, whose cells were raised to `power`; 87,354 parameters."""
    kernel = (5, 6, 6)
    layers = [_conv(1, 16, kernel, "glorot_uniform", same=True), nn.LeakyReLU(SLOPE), nn.Dropout(dropout)]
    for into, pad in ((16, 1), (8, 1), (8, 0)):
        layers += [_pad(0, 0, pad), _conv(into, 8, kernel, "glorot_uniform"), nn.LeakyReLU(SLOPE), _norm(8), nn.Dropout(dropout)]
    return Critic(nn.Sequential(*layers, nn.AvgPool3d(2)), 19152, True, power)


def measured_angle(cells: torch.Tensor) -> torch.Tensor:
    """The angle to the front in rad, (n,), of cells (n, X, Y, Z): that of each layer's barycentre as seen from the shower's, weighted by depth.

    With (x, y, z) the barycentre of the shower and (x_k, y_k) that of layer k at depth z_k, the layer says pi / 2 - atan(m_k), where
    m_k = sign(z_k - z) (y_k - y) / sqrt((x_k - x)^2 + (z_k - z)^2). Of an empty shower it is 100, as in 3DGAN.
    """
    x, y, z = (torch.arange(side, device=cells.device, dtype=cells.dtype) + 0.5 for side in cells.shape[1:])
    layers = cells.sum((1, 2))
    total = layers.sum(1)
    safe, filled = torch.where(total > 0, total, 1.0), layers > 0
    by_layer = torch.where(filled, layers, 1.0)
    x_k, y_k = torch.einsum("nxyz,x->nz", cells, x) / by_layer, torch.einsum("nxyz,y->nz", cells, y) / by_layer
    mean_x, mean_y, mean_z = ((part * layers).sum(1, keepdim=True) / safe[:, None] for part in (x_k, y_k, z.expand_as(layers)))
    far = ((x_k - mean_x) ** 2 + (z - mean_z) ** 2).clamp_min(1e-7).sqrt()
    slope = torch.where(z < mean_z, -1.0, 1.0) * (y_k - mean_y) / far
    weights = z * filled
    angle = ((math.pi / 2 - torch.atan(slope)) * weights).sum(1) / weights.sum(1).clamp_min(1e-7)
    return torch.where(total > 0, angle, 100.0)


# The pair that trains on two cores.


class Profile(NamedTuple):
    """What showers (of the training split) are like on average: where a reduced network begins.

    Of s = ln(1 + e / 0.1 MeV), with e the energies of the layers and behind them their total, Z + 1 numbers: `typical` (Z + 1,) its mean; and with
    polynomials in ln(energy / 100 GeV), from the constant on: `by_energy` (3, Z + 1) its mean, `spread` (3, Z + 1) the logarithm of its standard
    deviation about that, `root` (Z + 1, Z + 1) with root @ root.T its correlations about it, most of them in the first columns. Of each cell
    (X * Y, Z): `image` its mean share in its layer, `hit` how often it is hit, `log_hit` the mean of ln(cell / keV) where it is. `sway`:
    the standard deviation of a shower's centre in x and y, cells.
    """

    typical: np.ndarray
    by_energy: np.ndarray
    spread: np.ndarray
    root: np.ndarray
    image: np.ndarray
    hit: np.ndarray
    log_hit: np.ndarray
    sway: np.ndarray

    @classmethod
    def of(cls, parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> Profile:
        """Of showers in parts, of which one is in memory at a time: cells (n, X, Y, Z) in MeV and their energies (n,) / 100 GeV."""
        sums, layers, centres, energies = 0.0, [], [], []
        for cells, energy in parts:
            some = cells.astype(np.float32)
            hit = some >= LEAST_MEV
            layers.append(some.sum((1, 2), dtype=np.float64))
            centres.append(centre(torch.from_numpy(some)).numpy())
            energies.append(energy)
            sums += np.stack([some.sum(0), hit.sum(0), np.log(some / LEAST_MEV, out=np.zeros_like(some), where=hit).sum(0)])
        energy = np.concatenate(energies)
        n, depth = len(energy), sums.shape[3]
        image, hits, logs = sums.reshape(3, -1, depth)
        layers = np.concatenate(layers)
        layers = np.column_stack([layers, layers.sum(1)])
        s, powers = np.log1p(layers / FLOOR_MEV), np.vander(np.log(energy), 3, increasing=True)

        def fitted(values: np.ndarray) -> np.ndarray:
            return np.linalg.lstsq(powers, values, rcond=None)[0] if n > 8 else np.stack([values.mean(0), *2 * [0 * values[0]]])

        by_energy = fitted(s)
        apart = s - powers @ by_energy
        spread = fitted(np.log(np.abs(apart) + 0.01) + HALF_NORMAL)
        apart = apart / np.exp(powers @ spread)
        size = np.maximum(apart.std(0), 0.1)
        spread[0] += np.log(size)
        correlation = (apart / size).T @ (apart / size) / n if n > depth else np.eye(depth + 1)
        np.fill_diagonal(correlation, 1.0)
        values, vectors = np.linalg.eigh(correlation)
        root = (vectors * np.sqrt(np.maximum(values, 1e-3)))[:, ::-1]
        image = image + 1e-9
        seen = (logs.sum(0) + 1e-9) / (hits.sum(0) + 1e-9)  # of a layer, for the cells that are hardly ever hit
        log_hit = (logs + 3 * seen) / (hits + 3)
        sway = np.maximum(np.concatenate(centres).std(), 0.01)
        made = s.mean(0), by_energy, spread, root, image / image.sum(0), hits / n, log_hit, sway
        return cls(*(one.astype(np.float32) for one in made))


def centre(cells: torch.Tensor) -> torch.Tensor:
    """Where showers (n, X, Y, Z) are, in x and y, in cells from the middle: (n, 2)."""
    planes = cells.sum(3)
    at = torch.arange(cells.shape[1], device=cells.device, dtype=cells.dtype) - (cells.shape[1] - 1) / 2
    return torch.stack([planes.sum(2) @ at, planes.sum(1) @ at], 1) / planes.sum((1, 2))[:, None].clamp_min(LEAST_MEV)


class Condition(nn.Module):
    """The energy as a network sees it, (n, 3), and mean and spread of s at it, (n, Z + 1) each (`Profile`)."""

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        self.register_buffer("by_energy", torch.tensor(np.stack([profile.by_energy, profile.spread])))

    def forward(self, condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        energy = condition[:, :1]
        log = energy.log()
        seen = torch.cat([log + 1.6, 4 * energy - 1, 0.3 / energy.sqrt() - 0.6], 1)  # about 0 +- 1 for 2 to 50 GeV
        mean, spread = torch.cat([torch.ones_like(log), log, log**2], 1) @ self.by_energy
        return seen, mean, spread.clamp(-6, 2).exp()


def standardised(layers: torch.Tensor, mean: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """Energies of layers (n, Z) in MeV, and behind them their total, as (s - mean) / spread, (n, Z + 1)."""
    return ((with_total(layers) / FLOOR_MEV).log1p() - mean) / spread


def with_total(layers: torch.Tensor) -> torch.Tensor:
    return torch.cat([layers, layers.sum(1, keepdim=True)], 1)


def in_mev(standard: torch.Tensor, mean: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """The inverse: what is below 0 is 0, and the layers are scaled to the total, which fluctuates much less than they do."""
    made = FLOOR_MEV * torch.expm1((mean + spread * standard).clamp(0, 12))
    layers, total = made[:, :-1], made[:, -1:]
    return layers * (total / layers.sum(1, keepdim=True).clamp_min(LEAST_MEV))


class Reduced(nn.Module):
    """A generator that costs about a million multiplications a shower: the energy of each layer, and its share in each cell.

        u, c = MLP(latent, energy)      layer z: in_mev(root @ latent + u)_z      share of a cell: softmax over its layer of
        basis_0 + sum_k c_k basis_k + amplitude * (mix @ grain), within +-30

    with learned `root`, `basis` (rank + 1, X * Y, Z) and `amplitude` (X * Y, Z), and GRAIN normal numbers for each (x, y). It begins at the mean
    shower of `profile` at the energy, with layers that vary, and together, as there. Cells below 1 keV are 0, as in the data, and count for no gradient.
    """

    def __init__(self, profile: Profile, latent: int = 32, width: int = 128, rank: int = 24, unit: float = 1.0) -> None:
        super().__init__()
        pixels, depth = profile.image.shape
        self.side, self.latent, self.unit, self.n_noise = math.isqrt(pixels), latent, unit, latent + GRAIN * pixels
        self.condition = Condition(profile)
        self.body = nn.Sequential(
            nn.Linear(latent + 3, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, width),
            nn.LeakyReLU(0.2),
        )
        self.layers, self.coefficients = nn.Linear(width, depth + 1), nn.Linear(width, rank)
        with torch.no_grad():
            self.layers.weight.mul_(0.1), self.layers.bias.zero_()
        self.root = nn.Parameter(torch.tensor(profile.root[:, :latent].T.copy()))
        mean = torch.tensor(profile.image).clamp_min(1e-7).log()
        self.basis = nn.Parameter(torch.cat([mean[None], 0.02 * torch.randn(rank, pixels, depth)]))
        self.amplitude = nn.Parameter(torch.full((pixels, depth), 1.0))
        self.mix = nn.Parameter(torch.randn(GRAIN, depth) / math.sqrt(GRAIN))

    def forward(self, noise: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        n, (pixels, depth) = len(noise), self.amplitude.shape
        seen, mean, spread = self.condition(condition)
        h = self.body(torch.cat([noise[:, : self.latent], seen], 1))
        layers = in_mev(torch.addmm(self.layers(h), noise[:, : len(self.root)], self.root), mean, spread)
        grain = (noise[:, self.latent :].reshape(n * pixels, GRAIN) @ self.mix).view(n, pixels, depth)
        coefficients = torch.cat([torch.ones_like(h[:, :1]), self.coefficients(h)], 1)
        logits = (coefficients @ self.basis.view(len(self.basis), -1)).view(n, pixels, depth)
        # A softmax, in few passes over memory; of a rare shower the logits grew to 90, beyond float32, and ended the training.
        weights = logits.addcmul_(grain, self.amplitude).clamp_(-30, 30).exp_()
        sums = torch.matmul(weights.new_ones(1, pixels), weights)
        cells = F.threshold(weights * (layers[:, None] / sums), LEAST_MEV, 0.0, inplace=True)
        return (cells if self.unit == 1 else cells * self.unit).view(n, 1, self.side, self.side, depth)


class Spectral(nn.Module):
    """A layer whose weights are divided by their largest singular value (Miyato et al., arXiv:1802.05957): a mixin before the class of the layer.

    `left` and `right`, its singular vectors, follow the weights by a step of power iteration for each forward pass in training. It is a class, and
    not torch's parametrisation of an ordinary layer, as modules with such can be neither pickled nor saved whole.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        rows, columns = self.weight.flatten(1).shape
        self.register_buffer("left", F.normalize(torch.randn(rows), dim=0))
        self.register_buffer("right", F.normalize(torch.randn(columns), dim=0))
        for _ in range(15):
            self._iterate()

    @torch.no_grad()
    def _iterate(self) -> None:
        matrix = self.weight.flatten(1)
        self.left.copy_(F.normalize(torch.mv(matrix, self.right), dim=0, eps=1e-12))
        self.right.copy_(F.normalize(torch.mv(matrix.T, self.left), dim=0, eps=1e-12))

    def divided(self) -> torch.Tensor:
        if self.training:
            self._iterate()
        # Copies, as the next step changes them and a backward pass may come after it.
        left, right = self.left.clone(), self.right.clone()
        return self.weight / torch.vdot(left, torch.mv(self.weight.flatten(1), right))


class SpectralLinear(Spectral, nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.divided(), self.bias)


class SpectralConv2d(Spectral, nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.divided(), self.bias)


class ReducedCritic(nn.Module):
    """Two heads: convolutions over each layer's image (depth as channels), and a perceptron on sums over each layer.

    Both see the energy. The second head sees the total and of each layer s, standardised, its shares in the central cell and in the 3 x 3 and 7 x 7 around it, the
    means of x, y and of the distance from the middle, and the sum of ln(1 + cell / 0.05 MeV), which goes with the cells that are hit: so the
    sums that physics is judged by are judged on their own, whatever single cells look like.

    Weights are divided by their largest singular value (`Spectral`). Without it the critic wins after some ten passes, and the showers become worse
    than those that the generator begins with.
    """

    def __init__(self, profile: Profile, width: int = 128, channels: int = 48, dropout: float = 0.0, unit: float = 1.0) -> None:
        super().__init__()
        pixels, depth = profile.image.shape
        self.side, self.unit = math.isqrt(pixels), unit
        self.condition = Condition(profile)
        x = (torch.arange(self.side) - self.side // 2).float()
        x, y = (one.flatten() for one in torch.meshgrid(x, x, indexing="ij"))
        far = torch.maximum(x.abs(), y.abs())
        windows = [4 * (far <= reach).float() - 2 for reach in (0, 1, 3)]  # of about 0 +- 1
        self.register_buffer("windows", torch.stack([*windows, x, y, torch.hypot(x, y) - 1]))
        act, drop = nn.LeakyReLU(0.2), nn.Dropout(dropout)
        left = math.ceil(self.side / 8)
        self.image = nn.Sequential(
            SpectralConv2d(depth, channels, 3, 2, 1), act, drop, SpectralConv2d(channels, channels, 3, 2, 1), act, drop,
            SpectralConv2d(channels, channels, 3, 2, 1), act, nn.Flatten(), SpectralLinear(channels * left**2, width), act,
        )  # fmt: skip
        n_sums = (len(self.windows) + 2) * depth + 4
        self.sums = nn.Sequential(SpectralLinear(n_sums, width), act, drop, SpectralLinear(width, width), act)
        self.of_image, self.of_sums = SpectralLinear(width + 3, 1), SpectralLinear(width, 1)
        self.energy = nn.Linear(width, 1)

    def forward(self, cells: torch.Tensor, condition: torch.Tensor) -> Verdict:
        n = len(cells)
        mev = (cells if self.unit == 1 else cells / self.unit).view(n, self.side**2, -1)
        seen, mean, spread = self.condition(condition)
        layers = mev.sum(1)
        total = layers.sum(1)
        shares = (self.windows @ mev) / (layers[:, None] + FLOOR_MEV)  # (n, windows, Z)
        image = (mev / CELL_MEV).log1p()
        hits = 2 * image.sum(1).log1p() - 4
        sums = torch.cat([standardised(layers, mean, spread).clamp(-6, 6), shares.flatten(1), hits, seen], 1)
        h = self.sums(sums)
        image = image.view(n, self.side, self.side, -1).permute(0, 3, 1, 2)  # channels last in memory
        logits = torch.cat([self.of_image(torch.cat([self.image(image), seen], 1)), self.of_sums(h)], 1)
        return Verdict(logits, self.energy(h)[:, 0], total if self.unit == 1 else total * self.unit, sums=sums)
