"""Showers in the HDF5 layouts of the field: files that others have published become a data set, and generated showers such files.

    layout          keys                                              showers                          energies
    "lcd"           ECAL (N, X, Y, Z), target (N, >= 2)               of LCD / CLIC, fixed angle       target[:, 1], GeV
    "lcd-angle"     ECAL (N, X, Y, Z), energy, theta or mtheta        the same, angles vary (rad)      GeV
    "nnlo"          X (N, X, Y, Z, 1), y/b                            as NNLO repacks "lcd"            100 GeV
    "calochallenge" incident_energies (N, 1), showers (N, voxels)     data sets 1 to 3, voxels in MeV  MeV
    "showerdata"    energies, num_points, shape, showers (points)     of showerdata 0.7                GeV

A data set has "x" (1, X, Y, Z), depth last, as it stands in the file, and the targets "energy" in GeV and, where there is one, "theta".
Of CaloChallenge's data sets 2 and 3 the axes are angle, radius, layer; the voxels of data set 1 are (1, 1, 1, 368), say. Files that labkit
wrote in this layout or as "showerdata" say which cells they have. What is read is
copied into the cache once, a block at a time; from there each worker maps it, and indices are dealt out.

Used by users through `labkit.showers.open_showers` and by `labkit.showers.generation`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from labkit.data import hdf5
from labkit.data.cache import Source, cached, converted_key, file_key, rows_per_chunk
from labkit.data.dataset import Dataset
from labkit.errors import DataError, file_path, flag, known, real, several, whole

KEYS = {  # of each layout, and the first that is there is the layout of a file
    "showerdata": ("showers", "energies", "num_points", "shape"),
    "calochallenge": ("incident_energies", "showers"),
    "lcd": ("ECAL", "target"),
    "lcd-angle": ("ECAL", "energy"),
    "nnlo": ("X", "y"),
}
LAYOUTS = tuple(KEYS)
ANGLES = ("theta", "mtheta")
IN_GEV = ("lcd", "lcd-angle", "nnlo")  # layouts whose cells their authors wrote in GeV
LEAST_VISIBLE = 0.5  # MeV per GeV: less no calorimeter of these shows
GEV = {"nnlo": 100.0, "calochallenge": 1e-3}  # what one unit of energy is in GeV, where it is none
CYLINDERS = {6480: (45, 16, 9), 40500: (45, 50, 18)}  # voxels of CaloChallenge: layers, angles, radii
EMPTY = ("refuse", "drop")
BLOCK = 256  # showers of a chunk in the files that are written: one is read as a whole
MOST_CELLS = 1 << 24  # of a shower that is stored as points: the file says how many cells there are, and holds none of them
ELECTRON = 11  # by the numbering of the Particle Data Group

Grid = tuple[tuple[float, float, int], ...]


class Part(NamedTuple):
    """One file: where, in which layout, how many showers of which shape."""

    path: Path
    layout: str
    n: int
    shape: tuple[int, int, int]
    angle: str | None
    external: bool


def open_showers(
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    layout: str | None = None,
    *,
    grid: Sequence[Sequence[float]] | None = None,
    empty: str = "refuse",
    scale: float | None = None,
    external: bool = False,
) -> Dataset:
    """The showers of one HDF5 file, of several, or of all in a folder, as one data set of which a tenth is held out.

    Parameters
    ----------
    files
        Files of one layout and one shape.
    layout
        "lcd", "lcd-angle", "nnlo", "calochallenge" or "showerdata"; by default known by the keys in the file.
    grid
        Of "showerdata", whose showers are points: (low, high, cells) of the axes x, y and depth. What lies outside does not count.
        Files that labkit wrote need none.
    empty
        "drop" leaves showers without energy out and says how many they were; "refuse" is a DataError.
    scale
        What each cell is multiplied by, so that it is in MeV, as the networks of this package and its figures take it: 1000 for files in GeV,
        as those of LCD and NNLO are. By default 1; such files are then refused where showers have less than 0.5 MeV per GeV.
    external
        Read also what a file shows of others (external links, external storage, virtual data sets). Without it such files are refused.

    Raises
    ------
    ValueError, TypeError
        An argument makes no sense.
    DataError
        A file is damaged or has none of the keys (the message has those that are there), shapes or numbers of rows differ, an energy is not above 0, a
        cell is negative or no number or seems to be in GeV, or a shower is empty.

    Examples
    --------
    >>> file = labkit.showers.generate(gan, np.linspace(10, 100, 20), out="made.h5")
    >>> labkit.showers.open_showers(file).shape
    (1, 25, 25, 25)
    """
    empty, scale = known("empty", empty, EMPTY), None if scale is None else real("scale", scale, above=0)
    layout = None if layout is None else known("layout", layout, LAYOUTS)
    grid = None if grid is None else _grid(grid)
    external = flag("external", external)
    parts = [_part(path, layout, grid, external) for path in _paths(files)]
    for part in parts[1:]:
        if (part.layout, *part[3:]) != (parts[0].layout, *parts[0][3:]):
            raise DataError(
                f"{part.path} has showers of shape {part.shape} ({part.layout}), and {parts[0].path} of {parts[0].shape} "
                f"({parts[0].layout}). Open them as two data sets."
            )
    others = [other for part in parts for other in hdf5.named_files(part.path)] if external else []
    key = converted_key(file_key([*(part.path for part in parts), *others]), layout, grid, empty, scale)
    name = parts[0].path.stem if len(parts) == 1 else f"{parts[0].path.parent.name}-{len(parts)}-files"
    return cached(name, key, lambda: (_fields(parts, grid, empty, scale), None))


class Writer:
    """An HDF5 file of showers that grows: `with Writer(path, "lcd", (25, 25, 25)) as file: file.append(showers, energies)`.

    Layouts "lcd", "lcd-angle", "calochallenge" and "showerdata"; cells as they are given, energies in GeV. Until it is closed it is called
    `<path>.part`, and after an error it is gone.
    """

    def __init__(self, path: str | os.PathLike[str], layout: str = "lcd", shape: tuple[int, int, int] = (25, 25, 25)) -> None:
        self.path = file_path("path", path)
        self.layout = known("layout", layout, ("lcd", "lcd-angle", "calochallenge", "showerdata"))
        self.shape, self.n, self.most = tuple(shape), 0, 0
        self._file: h5py.File | None = None

    def __enter__(self) -> Writer:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = h5py.File(self._part, "w")
        voxels = int(np.prod(self.shape))
        if self.layout == "showerdata":
            self._make("showers", (), h5py.vlen_dtype(np.dtype(np.float32)))
            for name, of, dtype in (("energies", (1,), "f4"), ("directions", (3,), "f4"), ("pdg", (), "i4")):
                self._make(name, of, dtype)
            for name in ("shower_ids", "num_points"):
                self._make(name, (), "i4")
            self._file.attrs["labkit_cells"] = self.shape  # x, y and z of a point are numbers of cells
        elif self.layout == "calochallenge":
            self._file.attrs["labkit_cells"] = self.shape
            self._make("showers", (voxels,), "f4", packed=True)
            self._make("incident_energies", (1,), "f4")
        else:
            self._make("ECAL", self.shape, "f4", packed=True)
            for name in ("target",) if self.layout == "lcd" else ("energy", "theta"):
                self._make(name, (2,) if name == "target" else (), "f4")
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._file is not None:
            if self.layout == "showerdata":
                self._file.create_dataset("shape", data=np.array([self.n, self.most, 4], np.int64))
            self._file.close()
            self._file = None
            if kind is None:
                os.replace(self._part, self.path)
            else:
                os.unlink(self._part)

    def append(self, showers: np.ndarray, energies: np.ndarray, theta: np.ndarray | None = None) -> None:
        """Showers (n, X, Y, Z), energies (n,) in GeV, angles (n,) in rad (by default 90 degrees)."""
        showers, energies = np.asarray(showers, np.float32), np.asarray(energies, np.float32)
        if showers.shape[1:] != self.shape or len(showers) != len(energies):
            raise DataError(f"showers {showers.shape} and energies {energies.shape} do not fit a file of showers {self.shape}.")
        n = len(showers)
        if self.layout == "showerdata":
            points = [np.argwhere(shower) for shower in showers]
            clouds = [
                np.column_stack([at, shower[tuple(at.T)]]).astype(np.float32) for at, shower in zip(points, showers, strict=True)
            ]
            self._put("showers", n)
            for number, cloud in enumerate(clouds):  # h5py makes one array of lists of one length
                self._file["showers"][self.n + number] = cloud.ravel()
            self._put("energies", energies[:, None])
            self._put("directions", np.tile(np.float32([0, 0, 1]), (n, 1)))
            self._put("pdg", np.full(n, ELECTRON))
            self._put("shower_ids", np.arange(self.n, self.n + n))
            self._put("num_points", np.array([len(cloud) for cloud in clouds]))
            self.most = max(self.most, *map(len, clouds))
        elif self.layout == "calochallenge":  # depth comes first there
            self._put("showers", np.moveaxis(showers, 3, 1).reshape(n, -1))
            self._put("incident_energies", energies[:, None] / GEV["calochallenge"])
        else:
            self._put("ECAL", showers)
            if self.layout == "lcd":
                self._put("target", np.column_stack([np.full(n, ELECTRON), energies]))
            else:
                self._put("energy", energies)
                self._put("theta", np.full(n, np.pi / 2) if theta is None else theta)
        self.n += n

    @property
    def _part(self) -> Path:
        return self.path.with_name(self.path.name + ".part")

    def _make(self, name: str, shape: tuple[int, ...], dtype: Any, packed: bool = False) -> None:
        rows = min(BLOCK, max(1, (1 << 20) // (4 * int(np.prod(shape) or 1))))  # a chunk of a MiB at most
        how = {"compression": "gzip", "compression_opts": 1} if packed else {}
        self._file.create_dataset(name, (0, *shape), dtype, maxshape=(None, *shape), chunks=(rows, *shape), **how)

    def _put(self, name: str, values: Any) -> None:
        stored = self._file[name]
        n = values if isinstance(values, int) else len(values)
        stored.resize(self.n + n, axis=0)
        if not isinstance(values, int):
            stored[self.n :] = values


def _paths(files: Any) -> list[Path]:
    single = isinstance(files, str | os.PathLike)
    paths = [file_path("files", files)] if single else several("files", files, file_path)
    if single and paths[0].is_dir():
        folder = paths[0]
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".h5", ".hdf5"))
        if not paths:
            raise DataError(f"{folder} holds no .h5 or .hdf5 file.")
    if not paths:
        raise DataError("files is an empty list. Give one HDF5 file at least.")
    for path in paths:
        if not path.is_file():
            raise DataError(f"There is no file {path}.")
    return [path.resolve() for path in paths]


def _grid(grid: Any) -> Grid:
    axes = several("grid", grid, lambda name, axis: tuple(axis))
    if len(axes) != 3 or any(len(axis) != 3 or not axis[0] < axis[1] for axis in axes):
        raise ValueError(f"grid={grid!r}: give (low, high, cells) of x, y and depth, low < high.")
    return tuple((float(low), float(high), whole("grid", cells)) for low, high, cells in axes)


def _part(path: Path, layout: str | None, grid: Grid | None, external: bool) -> Part:
    with hdf5.opened(path, external) as file:
        there = list(file)
        if layout is None:
            layout = next((name for name, keys in KEYS.items() if all(key in file for key in keys)), None)
        if layout is None or (missing := [key for key in KEYS[layout] if key not in file]):
            needs = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in KEYS.items())
            lacks = needs if layout is None else f"{', '.join(missing)} for layout {layout!r}"
            raise DataError(f"{path} has the keys {', '.join(there) or '(none)'}, and lacks those of showers ({lacks}).")
        angle = next((name for name in ANGLES if name in file), None) if layout == "lcd-angle" else None
        if layout == "lcd-angle" and angle is None:
            raise DataError(
                f"{path} has the keys {', '.join(there)}, and no angles; layout {layout!r} needs {' or '.join(ANGLES)}."
            )
        _check_rows(path, file, layout, angle)
        cells = file.attrs.get("labkit_cells")
        if layout == "showerdata":
            if grid is None and cells is None:
                raise DataError(
                    f"{path} holds points. Say in which cells they are counted: grid=[(low, high, cells), ...] of x, y, depth."
                )
            shape = tuple(axis[2] for axis in grid) if grid else tuple(map(int, np.ravel(cells)))
            if len(shape) != 3 or min(shape) < 1 or math.prod(shape) > MOST_CELLS:
                raise DataError(
                    f"{path}: points in cells {shape} are no shower of three sides and at most {MOST_CELLS:,} cells. Give a coarser grid."
                )
            return Part(path, layout, len(file["showers"]), shape, None, external)
        stored = file[KEYS[layout][1 if layout == "calochallenge" else 0]].shape
        shape = stored[1:-1] if len(stored) == 5 and stored[4] == 1 else stored[1:]
        if layout == "calochallenge":
            ok = len(shape) == 1
            if ok:
                depth, angles, radii = CYLINDERS.get(shape[0], (shape[0], 1, 1))
                own = cells is not None and int(np.prod(cells)) == shape[0]
                shape = tuple(cells) if own else (angles, radii, depth)
        else:
            ok = len(shape) == 3
        if not ok or 0 in stored:
            raise DataError(
                f"{path}: showers have shape {stored}; layout {layout!r} needs {KEYS[layout]} of (N, X, Y, Z) cells, N > 0."
            )
        return Part(path, layout, stored[0], tuple(map(int, shape)), angle, external)


def _check_rows(path: Path, file: hdf5.Members, layout: str, angle: str | None) -> None:
    """DataError unless every array has a row for each shower."""
    names = [*KEYS[layout], *([angle] if angle else [])]
    if layout == "nnlo" and isinstance(file["y"], hdf5.Members) and "b" in file["y"]:
        names.append("y/b")
    arrays = {name: file[name] for name in names if name != "shape" and isinstance(file[name], h5py.Dataset)}
    rows = {name: array.shape[0] if array.shape else 1 for name, array in arrays.items()}
    if len({*rows.values()}) > 1:
        raise DataError(
            f"{path} has {', '.join(f'{n} rows of {name}' for name, n in rows.items())}. Each shower needs one of each."
        )


def _blocks(part: Part, grid: Grid | None) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Blocks of showers (n, X, Y, Z), depth last, with "energy" in GeV and perhaps "theta"; checked."""
    rows = rows_per_chunk((part.n, *part.shape), np.dtype(np.float32))
    with hdf5.opened(part.path, part.external) as file:
        for at in range(0, part.n, rows):
            some = slice(at, min(part.n, at + rows))
            x, energy = _block(file, part, some, grid)
            answers = {"energy": np.asarray(energy, np.float64).reshape(len(x), -1)[:, 0] * GEV.get(part.layout, 1.0)}
            if part.angle:
                answers["theta"] = np.asarray(file[part.angle][some], np.float64).reshape(-1)
            for name, values in answers.items():
                if (wrong := np.flatnonzero(~(np.isfinite(values) & ((values > 0) | (name != "energy"))))).size:
                    raise DataError(
                        f"{part.path}: {name} of shower {at + wrong[0]} is {values[wrong[0]]:g}. Each is a number above 0."
                    )
            if not np.isfinite(x).all() or x.min() < 0:
                bad = np.flatnonzero(~(np.isfinite(x) & (x >= 0)).reshape(len(x), -1).all(1))[0]
                raise DataError(
                    f"{part.path}: shower {at + bad} has cells that are negative or no numbers. Set noise below 0 to 0."
                )
            yield x, {name: values.astype(np.float32) for name, values in answers.items()}


def _block(file: hdf5.Members, part: Part, some: slice, grid: Grid | None) -> tuple[np.ndarray, np.ndarray]:
    n = some.stop - some.start
    if part.layout == "showerdata":
        points, counts = int(file["shape"][2]), file["num_points"][some]
        sides = grid or tuple((-0.5, side - 0.5, side) for side in part.shape)
        x = np.zeros((n, *part.shape), np.float32)
        for row, (cloud, count) in enumerate(zip(file["showers"][some], counts, strict=True)):
            cloud = np.asarray(cloud, np.float32).reshape(-1, points)[: int(count)]
            at = [np.floor((cloud[:, i] - low) / (high - low) * side).astype(int) for i, (low, high, side) in enumerate(sides)]
            inside = np.logical_and.reduce([(a >= 0) & (a < side) for a, side in zip(at, part.shape, strict=True)])
            np.add.at(x[row], tuple(a[inside] for a in at), cloud[inside, 3])
        return x, file["energies"][some]
    if part.layout == "calochallenge":
        angles, radii, depth = part.shape
        x = np.asarray(file["showers"][some], np.float32).reshape(n, depth, angles, radii)
        return np.ascontiguousarray(np.moveaxis(x, 1, 3)), file["incident_energies"][some]
    x = np.asarray(file[KEYS[part.layout][0]][some], np.float32).reshape(n, *part.shape)
    if part.layout == "nnlo":
        group = file["y"]
        if not isinstance(group, hdf5.Members) or "b" not in group:
            raise DataError(f"{part.path}: y is no group with a member b, the energies / 100 GeV.")
        return x, group["b"][some]
    if part.layout == "lcd-angle":
        return x, file["energy"][some]
    target = np.asarray(file["target"][some])
    if target.ndim < 2 or target.reshape(n, -1).shape[1] < 2:
        raise DataError(f"{part.path}: target has shape {file['target'].shape}; its second column is the energy.")
    return x, target.reshape(n, -1)[:, 1]


def _fields(parts: list[Part], grid: Grid | None, empty: str, scale: float | None) -> dict[str, Source]:
    """The split, on its way into the cache: the answers are read now, the showers as they are written."""
    kept, total, answers = [], 0.0, {"energy": [], **({"theta": []} if parts[0].angle else {})}
    for part in parts:
        masks, start = [], 0
        for x, found in _blocks(part, grid):
            mask = x.reshape(len(x), -1).any(1)
            if empty == "refuse" and not mask.all():
                bad = start + int(np.flatnonzero(~mask)[0])
                raise DataError(f'{part.path}: shower {bad} is empty. Leave such out with empty="drop".')
            masks.append(mask)
            start += len(x)
            total += float(x.sum(dtype=np.float64))
            for name, values in found.items():
                answers[name].append(values[mask])
        kept.append(np.concatenate(masks))
    n, dropped = (sum(int((mask == one).sum()) for mask in kept) for one in (True, False))
    if not n:
        raise DataError(f"{parts[0].path}: all {dropped} showers are empty.")
    visible = total / sum(float(values.sum(dtype=np.float64)) for values in answers["energy"])
    if scale is None and parts[0].layout in IN_GEV and visible < LEAST_VISIBLE:
        raise DataError(
            f"{parts[0].path}: showers have {visible:.2g} per GeV, which is little in MeV. For cells in GeV give scale=1000; scale=1 says that "
            "they are in MeV."
        )
    scale = 1.0 if scale is None else scale

    def chunks() -> Iterator[np.ndarray]:
        for part, mask in zip(parts, kept, strict=True):
            at = 0
            for x, _ in _blocks(part, grid):
                yield np.float32(scale) * x[mask[at : at + len(x)]][:, None]
                at += len(x)

    about = f"{dropped} of {n + dropped} showers were empty and are left out." if dropped else ""
    shape = (n, 1, *parts[0].shape)
    made = {"x": Source(shape, np.dtype(np.float32), chunks, about=about, as_given=True)}
    for name, values in answers.items():
        whole_field = np.concatenate(values)
        made[name] = Source((n,), np.dtype(np.float32), lambda values=whole_field: [values], role="target", as_given=True)
    return made
