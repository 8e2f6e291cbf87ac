"""The problem "train a GAN to make showers": 3DGAN's networks, losses and steps, critics of today as presets, on any lab under any update.

    critic    real showers x, showers of the generator G(z, E) for the energies E of the batch; then
    generator  so many steps on fresh noise, against the critic as it is now

Each loss is weight_0 * (real or fake) + weight_1 * (energy) + weight_2 * (total) [+ weight_3 * (angle)], with Keras's percentage error
100 mean(|true - said| / max(|true|, 1e-7)) for energy and total, and the presets of `LOSSES`; "hinge-sums" adds the sliced Wasserstein
distance of the sums that the reduced critic sees of a batch (energies of the layers, cores, centres, widths, total, at its energies). Both
networks are in one module, so one flat vector is exchanged, both at the same period (`local_steps`); all-reduce averages the gradients of each
(`networks`).

The score of a problem that makes showers (`Showers`) is Q = exp(-W), where W, the "loss" of curves, is the distance of `features.compared`
between the real showers of a set and as many that are made for the same energies with the same noise each time: the mean Wasserstein
distance, in standard deviations, of 30 sums that physics looks at. It costs a forward pass and a sort.

Used by users through `labkit.showers.ShowerGAN`; `labkit.showers.flow` shares `Showers`.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from labkit.errors import DataError, ProblemError, flag, known, real, whole
from labkit.models import evaluating, seeded
from labkit.problems.optimisers import check_optimiser, make_optimiser
from labkit.problems.problem import Clock, Metrics, Optimisers, Problem
from labkit.problems.splits import batches
from labkit.showers import networks
from labkit.showers.features import compared, distance
from labkit.showers.networks import LEAST_MEV, Profile, Verdict

GEV = 100.0  # the unit of energies in the networks
PROFILED = 4000  # showers of the training split that a reduced network begins from
NOISE_SEED = 1  # of what is made to be measured
MEASURED = 128  # showers that are made at once there
BLOCK = 256  # that are read at once to be looked at
LOOK_EVERY = 16  # steps of a worker; to look at each waits for a GPU
EMPTY = 0.01  # of the mean total of real showers
ALIKE = 0.002  # of the spread of real layers' shares: a reduced generator begins at 0.02 to 0.04, and without its latent numbers it is below 0.001


class Objective(NamedTuple):
    """A preset: what the networks are trained with. Weights are those of 3DGAN's output: real or fake, energy, total, angle.

    Those called "3dgan" have its weights, optimiser, flipped labels and steps: the critic on a real and on a fake batch, then the generator twice on
    fresh noise. They depart from its script in three points. Fakes have the energies of the real batch; there they are uniform, 10 to 500 GeV. The
    total that is asked of a fake is that of the real shower beside it; there it is a polynomial of the energy, fitted to its detector. (The script
    for angles takes the labels of the batch, as here.) And the fakes of the critic's step come from the generator in training mode, with
    normalisations by the batch; there from its prediction, with running statistics.
    """

    kind: str  # "bce", "hinge" or "wgan-gp"
    validity: float = 1.0
    energy: float = 0.0
    total: float = 0.0
    angle: float = 0.0
    sums: float = 0.0  # of the sliced Wasserstein distance of the sums that a reduced critic sees
    flips: float = 0.0  # share of labels that the critic is told wrongly
    critic_steps: int = 1
    generator_steps: int = 1
    optimiser: Any = "adam"
    lr: float = 2e-4
    penalty: float = 10.0


_RMSPROP = {"name": "rmsprop", "alpha": 0.9, "eps": 1e-7}
_ADAM = {"name": "adam", "betas": [0.0, 0.9]}
LOSSES = {
    "3dgan": Objective("bce", 2, 0.1, 0.1, flips=0.05, generator_steps=2, optimiser=_RMSPROP, lr=1e-3),
    "3dgan-master": Objective("bce", 6, 0.2, 0.1, flips=0.05, generator_steps=2, optimiser=_RMSPROP, lr=1e-3),
    "3dgan-horovod": Objective("bce", 8, 0.2, 0.1, flips=0.05, generator_steps=2, optimiser=_RMSPROP, lr=1e-3),
    "3dgan-angle": Objective("bce", 3, 0.1, 0.1, 25, flips=0.05, generator_steps=2, optimiser=_RMSPROP, lr=1e-3),
    "hinge": Objective("hinge", optimiser=_ADAM, lr=5e-4),
    # With a weight of 2 the critic moves layers 3 to 5 % off the mean profile that the generator begins at, and the shower maximum with them.
    "hinge-sums": Objective("hinge", sums=20.0, optimiser=_ADAM, lr=5e-4),
    "wgan-gp": Objective("wgan-gp", critic_steps=3, optimiser=_ADAM, lr=5e-4),
}


class Network(NamedTuple):
    """A pair of networks by name: the cells it is for (None: what the data have), and cells in it: (MeV * unit) ** power."""

    shape: tuple[int, int, int] | None
    latent: int
    unit: float = 1.0
    power: float = 1.0


NETWORKS = {
    "reduced": Network(None, 32),
    "full": Network((25, 25, 25), 200, unit=0.1),
    "angle": Network((51, 51, 25), 256, power=0.85),
}


class Showers(Problem):
    """A problem whose module makes showers: `make(module, energies, noise)`; measured by how alike they are to the real ones."""

    def n_noise(self, module: nn.Module) -> int:
        """How many normal numbers a shower is made of."""
        raise NotImplementedError(f"{type(self).__name__} must define n_noise(module).")

    def make(
        self, module: nn.Module, energies: torch.Tensor, noise: torch.Tensor, theta: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Showers (n, X, Y, Z) in MeV of energies (n,) in GeV, noise (n, n_noise) and, where the data have them, angles (n,) in rad."""
        raise NotImplementedError(f"{type(self).__name__} must define make(module, energies, noise).")

    @property
    def has_angle(self) -> bool:
        """Have the data angles?"""
        return "theta" in self.dataset.answers

    def conditions(self, y: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Energies and angles of a batch."""
        return (y["energy"], y.get("theta")) if isinstance(y, Mapping) else (y, None)

    def evaluate(self, module: nn.Module, batch: Any) -> dict[str, float]:
        return self._apart(*self._pair(module, batch, torch.Generator().manual_seed(NOISE_SEED)))

    def measure(
        self, module: nn.Module, indices: np.ndarray, split: str = "train", device: str = "cpu", batch_size: int = MEASURED
    ) -> dict[str, float]:
        """The distance of the whole set: "loss" W and "score" Q = exp(-W)."""
        if not len(indices):
            raise ProblemError(f"{self._title()} is measured on no samples. Give some to its score set and its test split.")
        noise = torch.Generator().manual_seed(NOISE_SEED)
        pairs = [self._pair(module, self.load(part, split, device), noise) for part in batches(indices, min(batch_size, MEASURED))]
        return self._apart(*(np.concatenate(part) for part in zip(*pairs, strict=True)))

    def _pair(self, module: nn.Module, batch: Any, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
        """`compared` of a batch and of showers of the same energies."""
        x, (energies, theta) = batch[0], self.conditions(batch[1])
        with evaluating(module):
            noise = torch.randn(len(x), self.n_noise(module), generator=generator).to(x.device)
            made = self.make(module, energies, noise, theta)
        seen = energies.cpu().numpy()
        return compared(x[:, 0].float().cpu().numpy(), seen), compared(made.float().cpu().numpy(), seen)

    def _apart(self, real: np.ndarray, made: np.ndarray) -> dict[str, float]:
        apart = distance(real, np.nan_to_num(made, nan=1e9, posinf=1e9))
        return {"loss": apart, "score": math.exp(-apart)}

    @cached_property
    def _own_steps(self) -> weakref.WeakKeyDictionary[nn.Module, int]:
        return self.__dict__.setdefault("_own_steps", weakref.WeakKeyDictionary())  # the same for threads that come at once

    def _is_due(self, module: nn.Module) -> bool:
        """Is this step on `module`, a worker's own, the first one or a 16th after it? Asked once a step."""
        number = self._own_steps[module] = self._own_steps.get(module, -1) + 1
        return number % LOOK_EVERY == 0

    def _refuse_collapse(self, fine: Mapping[str, torch.Tensor], clock: Clock) -> None:
        """ProblemError by the first of these that does not hold, each one bool; they are read from the device together."""
        held = torch.stack([one.reshape(()) for one in fine.values()]).tolist()
        if not all(held):
            raise ProblemError(
                f"the generator has collapsed after {clock.passes:.2f} passes: {list(fine)[held.index(False)]}. The checkpoints up to here "
                f"remain (run.model(), labkit.resume with another problem). {self._remedy}"
            )

    _remedy = "Lower lr."

    @cached_property
    def profile(self) -> Profile:
        """Of the first showers of the training split; DataError where these cannot be showers."""
        return Profile.of((cells, energies / GEV) for cells, energies in self._first(PROFILED))

    def _first(self, n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Cells (n, X, Y, Z) and energies of the first showers of the training split, BLOCK of them at a time, looked at."""
        first, name, seen = np.sort(self.train_indices()[:n]), self.dataset.inputs[0], False
        for at in range(0, len(first), BLOCK):
            indices = first[at : at + BLOCK]
            cells, energies = self.dataset.batch(indices, fields=[name, "energy"]).values()
            cells = cells[:, 0]
            if (wrong := np.flatnonzero(~(energies > 0))).size:
                raise DataError(
                    f"data {self.dataset.name!r}: energy {indices[wrong[0]]} of the training split is {energies[wrong[0]]:g} GeV. Each is above "
                    "0: leave out what is not."
                )
            least = np.array([one.min() for one in cells])
            if (wrong := np.flatnonzero(~(least >= 0))).size:
                raise DataError(
                    f"data {self.dataset.name!r}: {name} {indices[wrong[0]]} of the training split has cells of {least[wrong[0]]:g} MeV. None is "
                    "below 0: set those that are, such as noise, to 0."
                )
            seen = seen or bool(cells.any())
            yield cells, energies
        if not seen:
            raise DataError(
                f"data {self.dataset.name!r}: all showers are empty ({len(first)} of the training split were looked at)."
            )

    def check_cells(self, name: str, shape: tuple[int, int, int] | None) -> None:
        """ProblemError where the data are no showers, or not of the cells that the network `name` is for."""
        data = self.dataset
        if len(data.shape) != 4 or data.shape[0] != 1 or "energy" not in data.answers or data.affine_of(data.inputs[0]):
            raise ProblemError(
                f"data {data.name!r} are no showers: they have {data.described()}. Needed are cells (1, X, Y, Z) as they are, and "
                'energies as a target: "showers-wsi", "parametrised-showers" or labkit.showers.open_showers(...).'
            )
        cells = data.shape[1:]
        if shape not in (None, cells) or (shape is None and cells[0] != cells[1]):
            fits = [one for one, of in NETWORKS.items() if of.shape in (None, cells) and cells[0] == cells[1]]
            raise ProblemError(
                f"network={name!r} is for {'x'.join(map(str, shape or ('n', 'n', 'layers')))} cells, and data {data.name!r} have "
                f"{'x'.join(map(str, cells))}. {'Take ' + ' or '.join(map(repr, fits)) + '.' if fits else 'No network here fits them.'}"
            )
        if shape is not None:  # else `profile` looks at them
            for _ in self._first(MEASURED):
                pass


class ShowerGAN(Showers):
    """A generator of showers and its critic.

    Parameters beside those of `Problem`
    ------------------------------------
    data : showers: "showers-wsi" (Geant4's, in the package), "parametrised-showers", or what `labkit.showers.open_showers` returns.
    network : "reduced", "full" or "angle" (`labkit.showers.networks`). The defaults below, called "as published" of the other two, are recipes
        that were trained.
    batch_size : by default 128 as published, or 64.
    loss : a preset of `labkit.showers.gan.LOSSES`: "3dgan" (2 / 0.1 / 0.1), "3dgan-master" (6 / 0.2 / 0.1), "3dgan-horovod"
        (8 / 0.2 / 0.1), "3dgan-angle" (3 / 0.1 / 0.1 / 25), whose three departures from 3DGAN's script are in `gan.Objective`; "hinge",
        "wgan-gp", or, of the reduced network alone, "hinge-sums". By default that of the network.
    validity, energy, total : weights of real or fake, of the energy and of the total, instead of those of the preset.
    latent : numbers of noise that the shape of a shower is made of; by default as published, or 32.
    dropout : of the critic; by default 0.2 as published, or 0.
    lr, critic_lr : learning rates; by default that of the preset, and lr.
    optimiser : of both networks, instead of that of the preset: as of `Classifier`.
    decay : the learning rates end, by a half cosine over the run, at this share of what they began with; by default 1 as published, or 0.1.
    mirror : real showers are mirrored and transposed at random, batch by batch: eight times as many for the critic to know, where electrons come
        head on. By default so of the reduced network.

    A generator whose showers of a batch are empty or no numbers, or the same for two noises at the same energies (their layers differ by less than
    0.2 % of the spread of real ones), has collapsed: `step` raises a ProblemError that says which, the run fails with it, and the checkpoints up
    to then remain. On a GPU each worker looks at every 16th of its steps. Cells below 1 keV of the showers that are made are 0.

    Examples
    --------
    >>> problem = labkit.showers.ShowerGAN("showers-wsi", train_samples=128, test_samples=32, score_samples=32)
    >>> labkit.train(problem, lab, update="sgwu", passes=1).wait().state
    'done'
    """

    def __init__(
        self,
        data: Any = "showers-wsi",
        network: str = "reduced",
        loss: str | None = None,
        *,
        batch_size: int | None = None,
        latent: int | None = None,
        dropout: float | None = None,
        validity: float | None = None,
        energy: float | None = None,
        total: float | None = None,
        lr: float | None = None,
        critic_lr: float | None = None,
        optimiser: Any = None,
        decay: float | None = None,
        mirror: bool | None = None,
        **common: Any,
    ) -> None:
        self.network = known("network", network, NETWORKS)
        default = {"reduced": "hinge-sums", "full": "3dgan", "angle": "3dgan-angle"}[self.network]
        self.loss = default if loss is None else known("loss", loss, LOSSES)
        if LOSSES[self.loss].sums and self.network != "reduced":
            raise ValueError(f"loss={self.loss!r} is of network='reduced', whose critic sums layers. Take {default!r}.")
        self.latent = None if latent is None else whole("latent", latent, 3)
        self.dropout = None if dropout is None else real("dropout", dropout, least=0, below=1)
        self.validity, self.energy, self.total = (
            None if value is None else real(name, value, least=0)
            for name, value in (("validity", validity), ("energy", energy), ("total", total))
        )
        self.lr, self.critic_lr = (
            None if value is None else real(name, value, above=0) for name, value in (("lr", lr), ("critic_lr", critic_lr))
        )
        small = self.network == "reduced"
        self.decay = (0.1 if small else 1.0) if decay is None else real("decay", decay, least=0, most=1)
        self.mirror = None if mirror is None else flag("mirror", mirror)
        self.optimiser = optimiser
        if optimiser is not None:
            check_optimiser(optimiser, lr=1e-3, momentum=0.9, weight_decay=0.0)
        super().__init__(data, batch_size=(64 if small else 128) if batch_size is None else batch_size, **common)

    @property
    def _mirrors(self) -> bool:
        return self.network == "reduced" and not self.has_angle if self.mirror is None else self.mirror

    @property
    def objective(self) -> Objective:
        """The preset, with what was given instead."""
        given = {name: getattr(self, name) for name in ("validity", "energy", "total", "lr", "optimiser")}
        return LOSSES[self.loss]._replace(**{name: value for name, value in given.items() if value is not None})

    # -- the problem ---------------------------------------------------------------------------------------------

    def build(self, seed: int) -> nn.Module:
        of = NETWORKS[self.network]
        self.check_cells(self.network, of.shape)
        if self.network == "angle" and not self.has_angle:
            raise ProblemError(f"network='angle' needs angles, and data {self.dataset.name!r} have {self.dataset.described()}.")
        latent, dropout = self.latent or of.latent, 0.0 if self.network == "reduced" else 0.2
        dropout = dropout if self.dropout is None else self.dropout
        with seeded(seed):
            if self.network == "reduced":
                parts = networks.Reduced(self.profile, latent), networks.ReducedCritic(self.profile, dropout=dropout)
            elif self.network == "full":
                parts = networks.full_generator(latent), networks.full_critic(dropout)
            else:
                parts = networks.angle_generator(latent), networks.angle_critic(dropout, of.power)
        return nn.ModuleDict({"generator": parts[0], "critic": parts[1]})

    def optimisers(self, module: nn.Module) -> Optimisers:
        how, rates = self.objective, (self.objective.lr, self.critic_lr or self.objective.lr)
        common = {"momentum": 0.9, "weight_decay": 0.0}
        parts = zip(("generator", "critic"), rates, strict=True)
        return tuple(make_optimiser(how.optimiser, list(module[part].parameters()), lr=lr, **common) for part, lr in parts)

    def networks(self, module: nn.Module) -> Sequence[nn.Module]:
        return module["generator"], module["critic"]

    def n_noise(self, module: nn.Module) -> int:
        return _plain(module["generator"]).n_noise

    def step(self, module: nn.Module, batch: Any, optimisers: Optimisers, clock: Clock) -> Metrics:
        how, generator, critic = self.objective, module["generator"], module["critic"]
        self._schedule(optimisers, clock)
        x, (energies, theta) = batch[0], self.conditions(batch[1])
        x = x.float()
        cells = self._cells(mirrored(x, clock.generator) if self._mirrors else x)
        condition = self._condition(energies, theta)
        noise = _Noise(clock.generator, (len(x), self.n_noise(module)), x.device)
        truth = Verdict(None, condition[:, 0], self._linear(cells).sum((1, 2, 3, 4)), theta)
        with self.autocast(x.device):
            for _ in range(how.critic_steps):
                with torch.no_grad():
                    fake = other = _plain(generator)(noise(), condition)
                of_critic, sums = self._critic_step(critic, optimisers[1], cells, fake, condition, truth, clock)
            for number in range(how.generator_steps):
                with _frozen(_plain(critic)) as judge:
                    fake = generator(noise(), condition)
                    if number == 0:
                        pair = other, fake.detach()  # of one generator
                    said = judge(fake, condition)
                    losses = self._losses(said, truth, 1.0)
                    if how.sums:
                        losses["sums"] = sliced(sums, said.sums, clock.generator)
                        losses["loss"] = losses["loss"] + how.sums * losses["sums"]
                    _descend(optimisers[0], losses["loss"])
        if self._is_due(module) or x.device.type == "cpu":
            self._check_collapse(fake.detach(), pair, cells, clock)
        with torch.no_grad():
            return {**{name: value.detach() for name, value in losses.items()}, "critic": of_critic.detach()}

    def _critic_step(
        self,
        critic: nn.Module,
        optimiser: torch.optim.Optimizer,
        cells: Any,
        fake: Any,
        condition: Any,
        truth: Verdict,
        clock: Clock,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The loss, and what it judges the sums of the real ones by."""
        how, n = self.objective, len(cells)
        if how.kind == "bce":  # as 3DGAN: a step on the real batch, a step on the other
            of = []
            for batch, label in ((cells, 1.0), (fake, 0.0)):
                flipped = torch.rand(n, 1, generator=clock.generator, device=cells.device) < how.flips
                said = critic(batch, condition)
                labels = torch.where(flipped, 1 - label, label)
                losses = self._losses(said, truth, labels)
                _descend(optimiser, losses["loss"])
                of.append(losses["loss"].detach())
            return (of[0] + of[1]) / 2, None
        said = critic(torch.cat([cells, fake]), torch.cat([condition, condition]))
        real_ones, fakes = said.logits.split(n)
        if how.kind == "hinge":
            loss = F.relu(1 - real_ones).mean() + F.relu(1 + fakes).mean()
        else:
            share = torch.rand(n, 1, 1, 1, 1, generator=clock.generator, device=cells.device)
            loss = (
                fakes.mean() - real_ones.mean() + how.penalty * _penalty(_plain(critic), torch.lerp(cells, fake, share), condition)
            )
        loss = how.validity * loss + how.energy * percentage(condition[:, 0], said.energy[:n]) + 0 * said.energy.sum()
        _descend(optimiser, loss)
        return loss, None if said.sums is None else said.sums[:n]

    def _losses(self, said: Verdict, truth: Verdict, labels: torch.Tensor | float) -> dict[str, torch.Tensor]:
        """The loss and, by name, its terms before they are weighted."""
        how = self.objective
        if how.kind == "bce":
            targets = torch.as_tensor(labels, device=said.logits.device, dtype=said.logits.dtype).expand_as(said.logits)
            validity = F.binary_cross_entropy_with_logits(said.logits, targets)
        else:
            validity = -said.logits.mean()
        terms = {
            "validity": validity,
            "energy": percentage(truth.energy, said.energy),
            "total": percentage(truth.total, said.total),
        }
        if said.angle is not None:
            terms["angle"] = (truth.angle - said.angle).abs().mean()
        return {"loss": sum(getattr(how, name) * value for name, value in terms.items()), **terms}

    def make(
        self, module: nn.Module, energies: torch.Tensor, noise: torch.Tensor, theta: torch.Tensor | None = None
    ) -> torch.Tensor:
        made = self._linear(_plain(module["generator"])(noise, self._condition(energies, theta)))[:, 0]
        return made if self.network == "reduced" else F.threshold(made / NETWORKS[self.network].unit, LEAST_MEV, 0.0)

    # -- units, and what can go wrong ----------------------------------------------------------------------------

    def _cells(self, mev: torch.Tensor) -> torch.Tensor:
        of = NETWORKS[self.network]
        cells = mev if of.unit == 1 else mev * of.unit
        return cells if of.power == 1 else cells**of.power

    def _linear(self, cells: torch.Tensor) -> torch.Tensor:
        power = NETWORKS[self.network].power
        return cells if power == 1 else cells.clamp_min(0) ** (1 / power)

    def _condition(self, energies: torch.Tensor, theta: torch.Tensor | None) -> torch.Tensor:
        given = [energies / GEV] + ([] if self.network != "angle" else [theta])
        return torch.stack(given, 1)

    def _schedule(self, optimisers: Optimisers, clock: Clock) -> None:
        if self.decay == 1:
            return
        share = self.decay + (1 - self.decay) * (1 + math.cos(math.pi * clock.samples / max(1, clock.total))) / 2
        rates = self.objective.lr, self.critic_lr or self.objective.lr
        for optimiser, lr in zip(optimisers, rates, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = lr * share

    def _check_collapse(
        self, fake: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor], cells: torch.Tensor, clock: Clock
    ) -> None:
        """ProblemError where `fake`, beside the real `cells`, has collapsed, or the generator makes the same of the two noises of `pair`."""
        totals, of_real = fake.float().sum((1, 2, 3, 4)), cells.float().sum((1, 2, 3))
        one, other, real_ones = (
            layers / layers.sum(1, keepdim=True).clamp_min(1e-9)
            for layers in (*(made.float().sum((1, 2, 3)) for made in pair), of_real)
        )
        spread = (one - other).square().mean(0).div(2).sqrt().mean()  # at equal energies: that of one, if both were drawn alike
        fine = {
            "the showers of a batch hold cells that are no numbers": (totals.sum() + one.sum() + other.sum()).isfinite(),
            "the showers of a batch are empty": (totals > EMPTY * of_real.sum(1).mean()).float().mean() >= 0.1,
            "the showers of an energy are all alike, whatever the noise": spread >= ALIKE * real_ones.std(0, correction=0).mean(),
        }
        self._refuse_collapse(fine, clock)

    @property
    def _remedy(self) -> str:
        return f"Lower lr, or take another loss than {self.loss!r}: {', '.join(LOSSES)}."


def mirrored(cells: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Showers (n, 1, X, Y, Z) with X = Y in one of the eight positions of a square, drawn for all of them together."""
    x, y, swap = (torch.randint(2, (3,), generator=generator, device=cells.device) > 0).tolist()
    cells = cells.flip([axis for axis, turned in ((2, x), (3, y)) if turned]) if x or y else cells
    return cells.transpose(2, 3).contiguous() if swap else cells


def percentage(true: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
    """Keras's mean absolute percentage error: relative to the true value, in per cent."""
    return 100 * ((true - said).abs() / true.abs().clamp_min(1e-7)).mean()


def sliced(real: torch.Tensor, made: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """The sliced Wasserstein distance of two samples (n, d): the mean of |sorted - sorted| along the axes and d directions drawn at random
    (Deshpande et al., arXiv:1803.11188)."""
    d = real.shape[1]
    drawn = F.normalize(torch.randn(d, d, generator=generator, device=real.device), dim=0)
    along = torch.cat([torch.eye(d, device=real.device), drawn], 1)
    one, other = ((sample.float() @ along).T.sort(dim=1).values for sample in (real, made))
    return (one - other).abs().mean()


class _Noise:
    """Normal numbers for a batch, fresh at each call, from the generator of the worker."""

    def __init__(self, generator: torch.Generator | None, shape: tuple[int, int], device: torch.device) -> None:
        self.generator, self.shape, self.device = generator, shape, device

    def __call__(self) -> torch.Tensor:
        return torch.randn(*self.shape, generator=self.generator, device=self.device)


def _descend(optimiser: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def _penalty(critic: nn.Module, cells: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """(|gradient of the critic by the cells| - 1)^2, its mean (Gulrajani et al. 2017, equation 3)."""
    cells = cells.detach().requires_grad_()
    logits = critic(cells, condition).logits
    (slope,) = torch.autograd.grad(logits.mean(1).sum(), cells, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


def _plain(network: nn.Module) -> nn.Module:
    """The network itself, without DistributedDataParallel: where no gradient of it is to be averaged."""
    return network.module if isinstance(network, DistributedDataParallel) else network


@contextlib.contextmanager
def _frozen(network: nn.Module) -> Iterator[nn.Module]:
    """The network, whose own parameters get no gradient meanwhile."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield network
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
