"""`generate`: showers of a trained model for any energies, in memory or streamed to files, here or over the workers of a lab.

    blocks of 256 showers  ->  noise from (seed, number of the block)  ->  the network, `batch_size` showers at once  ->  array or HDF5

Shower i is the same whatever computes it and beside whatever it is computed, but for rounding; and no more than a batch is in memory.

Used by users through `labkit.showers.generate`, and by `labkit.showers.validation`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from labkit.cluster.lab import Lab, Worker
from labkit.errors import SEEDS, DataError, ProblemError, file_path, instance, known, whole
from labkit.models import evaluating
from labkit.showers.files import Writer
from labkit.showers.gan import Showers
from labkit.training.run import Run, load_run
from labkit.training.worker.process import prepare

BLOCK = 256  # showers whose noise comes from one generator
FIRST = 64  # numbers of the noise of a shower that numpy draws
BATCH = 32  # of which the tensors of the reduced network fit into a cache
WRITABLE = ("lcd", "lcd-angle", "calochallenge", "showerdata")


def generate(
    model: Any,
    energies: Any,
    seed: int = 0,
    *,
    theta: Any = None,
    batch_size: int = BATCH,
    device: str = "cpu",
    out: str | os.PathLike[str] | None = None,
    layout: str = "lcd",
    lab: Lab | None = None,
    version: int | str | None = None,
) -> np.ndarray | Path | list[Path]:
    """A shower for each of `energies`: (n, X, Y, Z) float32 in MeV, or with `out` the file, or files, that hold them.

    Parameters
    ----------
    model
        A run of a problem that makes showers, or the pair (problem, module).
    energies
        In GeV, (n,), each above 0.
    seed
        The same seed, energies and model give the same showers.
    theta
        Angles in rad, (n,), for a model that was trained with them.
    batch_size
        Showers that the network makes at once.
    out, layout
        An HDF5 file in a layout of `labkit.showers.open_showers`, "lcd" unless said otherwise, that is written batch by batch.
    lab
        Its free workers make a part each, and write it into a file of their own, `<out>-00.h5` and so on; `model` is a run, which they
        read by its path.
    version
        Of the run, as in `Run.model`.

    Raises
    ------
    DataError
        Energies that are no numbers above 0, no energies, or angles that do not fit them, are no numbers, or are none of the model's.
    ProblemError, ValueError, TypeError
        The model makes no showers, or an argument makes no sense.

    Examples
    --------
    >>> made = labkit.showers.generate(gan, np.array([10.0, 100.0]), seed=0)
    >>> made.shape, made.dtype
    ((2, 25, 25, 25), dtype('float32'))
    """
    seed, batch_size = whole("seed", seed, 0, SEEDS, error=ValueError), whole("batch_size", batch_size)
    layout = known("layout", layout, WRITABLE)
    energies = _checked_energies(energies)
    if lab is not None:
        instance("lab", lab, Lab, " of labkit.connect(...)")
        if out is None or not isinstance(model, Run):
            raise ValueError("with lab= give a run and out=: the workers read its weights by its path, and write a file each.")
    problem, module = model_of(model, version)
    theta = _checked_angles(problem, energies, theta)
    if lab is not None:
        return _by_workers(problem, model, energies, seed, theta, batch_size, file_path("out", out), layout, lab, version)
    made = _stream(problem, module.to(device), energies, theta, seed, batch_size, device)
    shape = tuple(problem.dataset.shape[1:])
    if out is None:
        cells = np.empty((len(energies), *shape), np.float32)
        for at, part in made:
            cells[at : at + len(part)] = part
        return cells
    return _write(file_path("out", out), layout, shape, made, energies, theta)


def model_of(model: Any, version: int | str | None = None) -> tuple[Showers, nn.Module]:
    """The problem and its trained module; ProblemError where it makes no showers."""
    if isinstance(model, tuple) and len(model) == 2:
        problem, module = model
    elif isinstance(model, Run):
        problem = model.problem()
        module = model.model(version).network if isinstance(problem, Showers) else None
    else:
        raise TypeError(
            f"model is a {type(model).__name__}. Give a run, as labkit.train and labkit.load_run do, or (problem, module)."
        )
    if not isinstance(problem, Showers):
        raise ProblemError(f"{type(problem).__name__} makes no showers. Train a labkit.showers.ShowerGAN or ShowerFlow.")
    return problem, module


def _checked_energies(energies: Any) -> np.ndarray:
    energies = np.asarray(energies, np.float32)
    if energies.ndim != 1 or not energies.size:
        raise DataError(f"energies have shape {energies.shape}. Give one GeV a shower, (n,), n > 0.")
    if (wrong := np.flatnonzero(~(np.isfinite(energies) & (energies > 0)))).size:
        raise DataError(f"energy {wrong[0]} is {energies[wrong[0]]:g} GeV. Each is a number above 0.")
    return energies


def _checked_angles(problem: Showers, energies: np.ndarray, theta: Any) -> np.ndarray | None:
    if not problem.has_angle:
        if theta is not None:
            raise DataError(
                f"{problem._title()} makes showers of an energy alone. Leave theta= out, or train on showers with angles."
            )
        return None
    theta = None if theta is None else np.asarray(theta, np.float32)
    if theta is None or theta.shape != energies.shape:
        raise DataError(f"{problem._title()} makes showers of an energy and an angle: give theta={energies.shape}, in rad.")
    if (wrong := np.flatnonzero(~np.isfinite(theta))).size:
        raise DataError(f"theta {wrong[0]} is {theta[wrong[0]]:g}. Each is a number, in rad.")
    return theta


def _stream(
    problem: Showers,
    module: nn.Module,
    energies: np.ndarray,
    theta: np.ndarray | None,
    seed: int,
    batch_size: int,
    device: str,
    first: int = 0,
) -> Iterator[tuple[int, np.ndarray]]:
    """(where, showers (n, X, Y, Z)) batch by batch; `first` is the number of the first shower in a larger set, a multiple of BLOCK."""
    n, n_noise = len(energies), problem.n_noise(module)
    blocks = max(1, batch_size // BLOCK)
    with evaluating(module) as plain:
        for at in range(0, n, blocks * BLOCK):
            many = [_noise(seed, (first + start) // BLOCK, n_noise) for start in range(at, min(n, at + blocks * BLOCK), BLOCK)]
            noise = many[0] if len(many) == 1 else torch.cat(many)
            end = min(n, at + blocks * BLOCK)
            for begin in range(at, end, batch_size):
                some = slice(begin, min(end, begin + batch_size))
                given = [None if one is None else torch.from_numpy(one[some]).to(device) for one in (energies, theta)]
                of = noise[some.start - at : some.stop - at].to(device)
                with problem.autocast(torch.device(device)):
                    made = problem.make(plain, given[0], of, given[1])
                yield begin, made.float().cpu().numpy()


def _noise(seed: int, block: int, n_noise: int) -> torch.Tensor:
    """By torch's generator on the CPU, the quicker one, whose state comes of 32 bits; so the first numbers of a shower, which say most of it, by
    numpy's, which makes use of all of the seed: blocks whose 32 bits meet are not alike."""
    source = np.random.SeedSequence([seed, block])
    noise = torch.randn(BLOCK, n_noise, generator=torch.Generator().manual_seed(int(source.generate_state(1)[0])))
    first = np.random.default_rng(source).standard_normal((BLOCK, min(FIRST, n_noise)), np.float32)
    noise[:, : first.shape[1]] = torch.from_numpy(first)
    return noise


def _write(
    out: Path,
    layout: str,
    shape: tuple[int, ...],
    made: Iterator[tuple[int, np.ndarray]],
    energies: np.ndarray,
    theta: np.ndarray | None,
) -> Path:
    with Writer(out, layout, shape) as file:
        for at, part in made:
            file.append(part, energies[at : at + len(part)], None if theta is None else theta[at : at + len(part)])
    return out


def _by_workers(
    problem: Showers,
    run: Run,
    energies: np.ndarray,
    seed: int,
    theta: np.ndarray | None,
    batch_size: int,
    out: Path,
    layout: str,
    lab: Lab,
    version: Any,
) -> list[Path]:
    blocks = math.ceil(len(energies) / BLOCK)
    n = min(len(lab.free()) or 1, blocks)
    edges = [BLOCK * (blocks * part // n) for part in range(n)] + [len(energies)]
    out = out.absolute()
    items = [
        (problem, str(run.path), version, energies[low:high], None if theta is None else theta[low:high], seed, batch_size, low, layout,
         str(out.with_name(f"{out.stem}-{part:02d}{out.suffix or '.h5'}")))
        for part, (low, high) in enumerate(pairwise(edges))
    ]  # fmt: skip
    return [Path(path) for path in lab.map(_a_share, items, math.inf, placed=True)]  # as long as it takes


def _a_share(item: tuple, worker: Worker) -> str:
    """Runs on a worker: its part of the showers, into its file."""
    problem, path, version, energies, theta, seed, batch_size, first, layout, out = item
    prepare(worker.device, worker.threads)
    _, module = model_of(load_run(path, problem=problem), version)
    made = _stream(problem, module.to(worker.device), energies, theta, seed, batch_size, worker.device, first)
    _write(Path(out), layout, tuple(problem.dataset.shape[1:]), made, energies, theta)
    return out
