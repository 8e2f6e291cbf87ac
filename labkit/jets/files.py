"""Jets in files: one layout of labkit's own, in Parquet, and readers of those that others publish.

    constituents   float32 (N, 4): px, py, pz, E in GeV, the hardest first, zeros behind the last one; N is 100 by default
    label          int64: which of the `classes` that the file names
    mass, pt       float32, GeV, of the whole jet
    eta, phi       float32, of its axis; rad
    n              float32: its constituents, also those beyond N
    substructure   float32 (10,), `SUBSTRUCTURE` in order; in files of `labkit.jets.generate`

The metadata `labkit.jets` of the schema is JSON: classes, and where the jets are from (settings and seeds of the generator, versions,
the file that was converted). Rows of a file are in random order, its row groups of 1,000 jets are what partitions deal out.

Read are HLS4ML's LHC jets (HDF5, 100 or 150 particles), JetNet's HDF5, JetClass (ROOT by uproot, or Parquet with its columns), and
labkit's own.

Used by `labkit.jets.pythia`, `labkit.jets.problem`, `labkit.jets.evaluation` and by users.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from labkit.data import Dataset, hdf5, open_dataset
from labkit.data.cache import is_of_cache, print_once, reading
from labkit.errors import DataError, LabError, file_path, flag, known, real, several, text, whole
from labkit.runs.files import replacing

CLASSES = ("q", "g", "W", "Z", "t")
PARTICLES = 100  # constituents of a jet that a file has room for
ROWS = 1_000  # jets of a row group
BLOCK = 10_000  # jets in memory at once, and of a file that is written
OURS = "jets-[0-9][0-9][0-9][0-9][0-9].parquet"  # the files of a folder that is written
KEY = b"labkit.jets"
FORMAT = 1
SAMPLE = Path(__file__).with_name("sample.parquet")
OF_JET = ("mass", "pt", "eta", "phi", "n")
# of all constituents: GeV, GeV, and numbers without a unit; tau_N with axes of exclusive kT, energy correlation C2 with beta = 1
SUBSTRUCTURE = ("mass", "trimmed", "n", "girth", "ptd", "leading", "tau21", "tau32", "c2", "trimmed_share")
HLS4ML = {"j_q": "q", "j_g": "g", "j_w": "W", "j_z": "Z", "j_t": "t"}
HLS4ML_AT = {"j_mass": 3, "j_g": 53, "j_q": 54, "j_w": 55, "j_z": 56, "j_t": 57}  # where a file does not name its columns
JETCLASS = {"Wqq": "W", "Zqq": "Z", "Tbqq": "t"}  # others keep the name of their column: QCD, Hbb, ...
EXTRA = 'pip install "labkit[jets]"'


@dataclasses.dataclass(frozen=True)
class Jets:
    """Some jets in memory: `constituents` (n, N, 4), `label` (n,) into `classes`, and `of_jet` by name, (n,) each or (n, 10).

    Examples
    --------
    >>> w = jets[jets.label == jets.classes.index("W")]
    >>> len(w), w.constituents.shape[1:]
    (200, (100, 4))
    """

    constituents: np.ndarray
    label: np.ndarray
    classes: tuple[str, ...]
    of_jet: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, at: Any) -> "Jets":
        """Those at some indices, or where a mask is True."""
        return Jets(self.constituents[at], self.label[at], self.classes, {name: v[at] for name, v in self.of_jet.items()})

    @classmethod
    def of(cls, constituents: np.ndarray, label: np.ndarray, classes: Sequence[str], **of_jet: np.ndarray) -> "Jets":
        """Of jets what is not given is the sum of their constituents."""
        total = constituents.sum(1, dtype=np.float64)
        px, py, pz, energy = total.T
        pt = np.hypot(px, py)
        found = {
            "mass": np.sqrt(np.maximum(0, energy**2 - pt**2 - pz**2)),
            "pt": pt,
            "eta": np.arcsinh(pz / np.maximum(pt, 1e-9)),
            "phi": np.arctan2(py, px),
            "n": (constituents[..., 3] > 0).sum(1),
        }
        columns = {name: np.asarray(value, np.float32) for name, value in {**found, **of_jet}.items()}
        return cls(np.asarray(constituents, np.float32), np.asarray(label, np.int64), tuple(classes), columns)


def together(parts: Sequence[Jets]) -> Jets:
    """Several as one; their classes are one list, and of what is known of jets stays what is known of all."""
    classes = tuple(dict.fromkeys(name for part in parts for name in part.classes))
    names = [name for name in parts[0].of_jet if all(name in part.of_jet for part in parts)]
    of_jet = {name: np.concatenate([part.of_jet[name] for part in parts]) for name in names}
    label = np.concatenate([np.array([classes.index(name) for name in part.classes])[part.label] for part in parts])
    return Jets(np.concatenate([part.constituents for part in parts]), label, classes, of_jet)


def padded(momenta: np.ndarray, lengths: np.ndarray, particles: int = PARTICLES) -> np.ndarray:
    """Constituents one behind the other, (M, 4), of jets with so many each, as (n, particles, 4): the hardest, zeros behind them."""
    lengths = np.asarray(lengths, np.int64)
    jet = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((-np.hypot(momenta[:, 0], momenta[:, 1]), jet))
    rank = np.arange(len(jet)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    made, fits = np.zeros((len(lengths), particles, 4), np.float32), rank < particles
    made[jet[fits], rank[fits]] = momenta[order[fits]]
    return made


def _hardest(constituents: np.ndarray, particles: int) -> np.ndarray:
    """Constituents (n, N, 4) by falling pT, as many as there is room for."""
    order = np.argsort(-np.hypot(constituents[..., 0], constituents[..., 1]), axis=1, kind="stable")
    sorted_ = np.take_along_axis(constituents, order[..., None], axis=1)[:, :particles]
    room = particles - sorted_.shape[1]
    return np.pad(sorted_, ((0, 0), (0, max(0, room)), (0, 0)))


def mass_window(mass: Any) -> tuple[float, float] | None:
    """(least, most), GeV, or None for any mass; ValueError for what is no window."""
    if mass is None:
        return None
    window = tuple(several("mass", mass, lambda name, value: real(name, value, least=0)))
    if len(window) != 2 or window[0] >= window[1]:
        raise ValueError(f"mass={mass} must be (least, most) in GeV, the least below the most.")
    return window


def check(jets: Jets, where: str) -> None:
    """DataError for jets that are none: numbers that are not finite, negative energies, no constituents or transverse momentum."""
    if not len(jets):
        return
    for name, values in {"constituents": jets.constituents, **jets.of_jet}.items():
        if len(bad := np.flatnonzero(~np.isfinite(values).reshape(len(jets), -1).all(1))):
            raise DataError(f"{where}: {name} of {len(bad)} jets, the first of them jet {bad[0]}, are not finite. Drop these jets.")
    if len(bad := np.flatnonzero((jets.constituents[..., 3] < 0).any(1))):
        raise DataError(f"{where}: {len(bad)} jets, the first of them jet {bad[0]}, have constituents of negative energy.")
    if len(bad := np.flatnonzero(~(jets.constituents[..., 3] > 0).any(1))):
        raise DataError(f"{where}: {len(bad)} jets, the first of them jet {bad[0]}, have no constituents. Drop these jets.")
    if len(bad := np.flatnonzero(jets.of_jet.get("pt", np.ones(len(jets))) <= 0)):
        raise DataError(f"{where}: {len(bad)} jets, the first of them jet {bad[0]}, have no transverse momentum. Drop these jets.")
    if not (jets.label.min() >= 0 and jets.label.max() < len(jets.classes)):
        raise DataError(f"{where}: labels are {jets.label.min()} to {jets.label.max()}, of the classes {', '.join(jets.classes)}.")


# -- writing -----------------------------------------------------------------------------------------------------------


def write(path: Any, jets: Jets, about: Mapping[str, Any] | None = None, rows: int = ROWS) -> Path:
    """Write jets to a Parquet file, whole or not at all; `about` goes into its metadata. Values are split into their bytes and packed by
    zstd: some 1 kB a jet.

    Examples
    --------
    >>> file = labkit.jets.write("some.parquet", jets[:10])
    >>> len(labkit.jets.load(file))
    10
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = file_path("path", path)
    if not len(jets):
        raise DataError(f"{path.name}: there are no jets to write.")
    check(jets, path.name)
    columns, fields = {"constituents": jets.constituents, "label": jets.label, **jets.of_jet}, []
    arrays = []
    for name, values in columns.items():
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        many = values.ndim > 1
        arrays.append(pa.FixedSizeListArray.from_arrays(flat, values[0].size) if many else flat)
        shape = {"shape": json.dumps(list(values.shape[1:]))} if many else None
        fields.append(pa.field(name, arrays[-1].type, nullable=False, metadata=shape))
    said = {"format": FORMAT, "classes": list(jets.classes), **(about or {})}
    table = pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata={KEY: json.dumps(said)}))
    split = [f"{name}.list.element" if columns[name].ndim > 1 else name for name in columns if name != "label"]
    path.parent.mkdir(parents=True, exist_ok=True)
    how = {"compression": "zstd", "compression_level": 9, "use_dictionary": False}
    with replacing(path) as file:
        pq.write_table(table, file, row_group_size=rows, column_encoding=dict.fromkeys(split, "BYTE_STREAM_SPLIT"), **how)
    return path


def provenance(path: Any) -> dict[str, Any] | None:
    """What a file of labkit says of itself: classes, and where its jets are from; None of another file. DataError where that is damaged.

    Examples
    --------
    >>> labkit.jets.provenance(labkit.jets.write("some.parquet", jets[:10]))["classes"]
    ['q', 'g', 'W', 'Z', 't']
    """
    import pyarrow.parquet as pq

    path = Path(path)
    with reading(path, advice="Is it a whole Parquet file?"):
        said = (pq.read_schema(path).metadata or {}).get(KEY)
    if said is None:
        return None
    try:
        about = json.loads(said)
        return {**about, "classes": [str(name) for name in about["classes"]]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: what labkit.jets wrote of its classes is damaged. Make or convert these jets again.") from error


def convert(
    data: Any,
    out: Any,
    *,
    classes: Sequence[str] | str | None = None,
    mass: tuple[float, float] | None = None,
    particles: int = PARTICLES,
    seed: int = 0,
    jets_per_file: int = BLOCK,
    most: int | None = None,
    external: bool = False,
) -> list[Path]:
    """Read jets of any of the formats, select some, and write them in labkit's layout, file by file, in random order.

        labkit.jets.convert("jetImage_7_100p.h5", "jets/wzt", classes="WZt", mass=(10, 200))   # as UCluster selects them

    Parameters
    ----------
    data : a path, several, or "jets", the sample that labkit has.
    out : a folder; its files are jets-00000.parquet and so on. Those of an earlier conversion are made anew, no others.
    classes : those to take, in the order of their numbers: names, or a text such as "WZt" of names of one letter.
    mass : (least, most), GeV, of the jet as it is given, ungroomed.
    particles : room for so many constituents of a jet; of more, the hardest are taken, which is counted and printed.
    seed : of the order. Jets are mixed within `jets_per_file`; where a source has one class behind the other, mix several sources,
        or give a `jets_per_file` that holds all.
    most : end after so many jets.
    external : read also what an HDF5 file shows of others (external links, external storage, virtual data sets); it is refused otherwise.

    Raises
    ------
    DataError
        A file is of no known format, or holds jets that are none; nothing is left of them. `out` has files of these names that no
        conversion has written, or that are to be read.

    Examples
    --------
    >>> [file.name for file in labkit.jets.convert("jets", "wzt", classes="WZt", mass=(10, 200))]
    ['jets-00000.parquet']
    """
    out, generator = file_path("out", out), np.random.default_rng(seed)
    size, most = whole("jets_per_file", jets_per_file, 2), None if most is None else whole("most", most)
    particles, mass, external = whole("particles", particles), mass_window(mass), flag("external", external)
    wanted = None if classes is None else tuple(several("classes", list(classes), text))
    waiting, written, n, cut = [], [], 0, 0

    def flush(parts: list[Jets]) -> None:
        jets = together(parts)
        about = {"source": [str(path) for path in paths], "mass": mass, "seed": seed, "labkit": metadata.version("labkit")}
        order = generator.permutation(len(jets))
        written.append(write(out / f"jets-{len(written):05d}.parquet", jets[order], about, min(ROWS, max(1, len(jets) // 2))))

    paths = [SAMPLE if isinstance(one, str) and one == "jets" else file_path("data", one) for one in _each(data)]
    sources = [list(_sources(path)) for path in paths]
    _replaceable(out, [path for own in sources for path in own])
    how = {"particles": particles, "block": max(2, size // sum(map(len, sources))), "external": external}
    blocks = _by_turns([read(path, **how) for own in sources for path in own])
    for jets in blocks:
        jets = _selected(jets, wanted, mass)
        jets = jets[: None if most is None else max(0, most - n)]
        cut += int((jets.of_jet["n"] > particles).sum())
        n += len(jets)
        waiting.append(jets)
        while sum(map(len, waiting)) >= size:
            whole_ = together(waiting)
            flush([whole_[:size]])
            waiting = [whole_[size:]]
        if n == most:
            break
    if sum(map(len, waiting)):
        flush(waiting)
    if not n:
        of = f"of the classes {', '.join(wanted)}" if wanted else "there"
        within = f" with a mass in {mass} GeV" if mass else ""
        raise DataError(f"no jet of {', '.join(map(str, paths))} is {of}{within}.")
    for late in sorted(set(out.glob(OURS)) - set(written)):  # of an earlier, longer conversion
        late.unlink()
    if cut:
        print_once(f"{out.name}: {cut} of {n} jets have more than {particles} constituents, of which the hardest are kept.")
    return written


def _replaceable(out: Path, sources: Sequence[Path]) -> None:
    """DataError where a conversion to this folder would replace what is no conversion, or is read by it."""
    read_ = {path.resolve() for path in sources}
    for path in sorted(out.glob(OURS)):
        if path.resolve() in read_:
            raise DataError(f"{path} is to be converted, and would be replaced. Give another folder as `out`.")
        said = None
        with suppress(LabError):
            said = provenance(path)
        if said is None or "source" not in said:
            raise DataError(f"{path} was not written by labkit.jets.convert, and would be replaced. Give another folder as `out`.")


def _each(data: Any) -> list[Any]:
    return list(data) if isinstance(data, list | tuple) else [data]


def _sources(path: Path) -> Iterator[Path]:
    """A file, or those of a folder, in order."""
    if not path.is_dir():
        yield path
        return
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in READERS and file.is_file())
    if not found:
        raise DataError(f"{path} holds no file of jets: {', '.join(READERS)}.")
    yield from found


def _by_turns(sources: list[Iterator[Jets]]) -> Iterator[Jets]:
    """A block of each, until all have ended: files of one class each are mixed so."""
    while sources:
        for source in list(sources):
            if (block := next(source, None)) is None:
                sources.remove(source)
            else:
                yield block


def _selected(jets: Jets, classes: Sequence[str] | None, mass: tuple[float, float] | None) -> Jets:
    """Those of some classes, numbered in this order, with a mass in a window."""
    if classes is not None:
        number = {name: at for at, name in enumerate(classes)}
        new = np.array([number.get(name, -1) for name in jets.classes])[jets.label]
        jets = dataclasses.replace(jets, label=new, classes=tuple(classes))[new >= 0]
    if mass is not None:
        jets = jets[(jets.of_jet["mass"] > mass[0]) & (jets.of_jet["mass"] < mass[1])]
    return jets


# -- reading -----------------------------------------------------------------------------------------------------------


def read(path: Any, *, particles: int = PARTICLES, block: int = BLOCK, external: bool = False) -> Iterator[Jets]:
    """The jets of a file of any of the formats, in blocks of at most so many; DataError for another file, and for jets that are none.

    Of an HDF5 file that names other files (external links, external storage, virtual data sets) these are read too if `external`.

    Examples
    --------
    >>> [len(block) for block in labkit.jets.read("jets", block=600)]
    [600, 400]
    """
    path = SAMPLE if isinstance(path, str) and path == "jets" else file_path("path", path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} ends in {path.suffix or 'nothing'!r}. Jets are read from {', '.join(READERS)}.")
    if not path.exists():
        raise DataError(f"there is no file {path}.")
    is_hdf5 = reader is _from_hdf5
    for at, jets in enumerate(reader(path, particles, block, external) if is_hdf5 else reader(path, particles, block)):
        check(jets, f"{path.name}, from jet {at * block} on")
        yield jets


def load(path: Any = "jets", *, particles: int = PARTICLES, most: int | None = None, external: bool = False) -> Jets:
    """All jets of a file or a folder, or the first so many, in memory; "jets" is the sample that labkit has. `external` as in `read`.

    Examples
    --------
    >>> jets = labkit.jets.load("jets")
    >>> len(jets), jets.classes
    (1000, ('q', 'g', 'W', 'Z', 't'))
    """
    path = SAMPLE if isinstance(path, str) and path == "jets" else file_path("path", path)
    particles, most = whole("particles", particles), None if most is None else whole("most", most)
    parts, n = [], 0
    for file in _sources(path):
        for jets in read(file, particles=particles, external=external):
            parts.append(jets)
            n += len(jets)
            if most is not None and n >= most:
                return together(parts)[:most]
    if not parts:
        raise DataError(f"{path} holds no jets.")
    return together(parts)


def _from_hdf5(path: Path, particles: int, block: int, external: bool = False) -> Iterator[Jets]:
    with hdf5.opened(path, external) as file:
        if "jetConstituentList" in file:
            yield from _hls4ml(path, file, particles, block)
        elif "particle_features" in file:
            yield from _jetnet(path, file, particles, block)
        else:
            raise DataError(
                f"{path} has {', '.join(file) or 'nothing'}. HLS4ML's jets have jetConstituentList and jets, JetNet's particle_features and "
                "jet_features."
            )


def _hls4ml(path: Path, file: Any, particles: int, block: int) -> Iterator[Jets]:
    """LHC jets of HLS4ML (Zenodo 3602254, 3602260): (n, 100 or 150, 16) constituents that begin with px, py, pz, E."""
    if "jets" not in file:
        raise DataError(f"{path} has jetConstituentList, and no table 'jets' with their classes.")
    names = (
        [name.decode() if isinstance(name, bytes) else str(name) for name in file["jetFeatureNames"][:]]
        if "jetFeatureNames" in file
        else []
    )
    at = {name: names.index(name) if name in names else HLS4ML_AT[name] for name in HLS4ML}
    mass_at = names.index("j_mass") if "j_mass" in names else None if names else HLS4ML_AT["j_mass"]
    width = file["jets"].shape[1]
    if max(at.values()) >= width or file["jetConstituentList"].ndim != 3 or file["jetConstituentList"].shape[2] < 4:
        raise DataError(f"{path}: jets have {width} columns, and their classes should be in {', '.join(at)}.")
    for start in range(0, len(file["jets"]), block):
        rows = slice(start, start + block)
        of_jet = file["jets"][rows]
        one_hot = of_jet[:, list(at.values())]
        if (one_hot.sum(1) != 1).any():
            raise DataError(f"{path}: jet {start + int(np.flatnonzero(one_hot.sum(1) != 1)[0])} is of no class, or of several.")
        classes = tuple(HLS4ML.values())
        given = file["jetConstituentList"][rows, :, :4]
        mass = {} if mass_at is None else {"mass": of_jet[:, mass_at]}
        jets = Jets.of(given, one_hot.argmax(1), classes, **mass)  # of all constituents
        yield dataclasses.replace(jets, constituents=_hardest(jets.constituents, particles))


def _jetnet(path: Path, file: Any, particles: int, block: int) -> Iterator[Jets]:
    """JetNet (Zenodo 6975118): (n, 30 or 150, 4) of eta_rel, phi_rel, pT_rel and a mask, (n, 4) of pT, eta, mass, n; massless
    constituents. A file is one class, and named by it: q.hdf5, t150.hdf5."""
    name = re.match(r"([gqtwz])(?=[\d_.-]|$)", path.stem.lower())
    if name is None:
        raise DataError(f"{path}: a file of JetNet is one class, and is called by it: g.hdf5, q.hdf5, t.hdf5, w.hdf5, z.hdf5.")
    label = [one.lower() for one in CLASSES].index(name[1])
    if "jet_features" not in file:
        raise DataError(f"{path} has particle_features, and no jet_features.")
    for start in range(0, len(file["jet_features"]), block):
        eta, phi, pt, mask = np.moveaxis(file["particle_features"][start : start + block].astype(np.float64), -1, 0)
        jets = file["jet_features"][start : start + block].astype(np.float64)
        pt, eta = pt * jets[:, :1] * (mask > 0.5), eta + jets[:, 1:2]
        momenta = np.stack([pt * np.cos(phi), pt * np.sin(phi), pt * np.sinh(eta), pt * np.cosh(eta)], -1)
        of_jet = {"pt": jets[:, 0], "eta": jets[:, 1], "mass": jets[:, 2], "phi": np.zeros(len(jets))}
        n = jets[:, 3] if jets.shape[1] > 3 else (mask > 0.5).sum(1)
        yield Jets.of(_hardest(momenta, particles), np.full(len(jets), label), CLASSES, n=n, **of_jet)


def _from_parquet(path: Path, particles: int, block: int) -> Iterator[Jets]:
    import pyarrow.parquet as pq

    with reading(path, advice="Is it a whole Parquet file?"), pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if said := provenance(path):
            _check_layout(path, file, said, ("constituents", "label"))  # what else is missing follows from the constituents
            of_jet = [name for name in names if name not in ("constituents", "label")]
            for batch in file.iter_batches(block):
                held = batch.column("constituents").flatten().to_numpy().reshape(batch.num_rows, -1, 4)
                columns = {name: _column(batch.column(name)) for name in of_jet}
                yield Jets.of(_hardest(held, particles), batch.column("label").to_numpy(), said["classes"], **columns)
            return
        wanted = _jetclass_columns(path, names)
        for batch in file.iter_batches(block, columns=wanted):
            table = {name: batch.column(name) for name in wanted}
            lengths = np.diff(table["part_px"].offsets.to_numpy())
            flat = {name: table[name].flatten().to_numpy(zero_copy_only=False) for name in wanted if name.startswith("part_")}
            others = {name: table[name].to_numpy(zero_copy_only=False) for name in wanted if not name.startswith("part_")}
            yield _jetclass(path, flat, lengths, others, particles)


def _check_layout(path: Path, file: Any, said: Mapping[str, Any], needed: Sequence[str]) -> None:
    """DataError for a Parquet file of a later labkit, or without the columns of this one, as others may write it anew."""
    import pyarrow as pa

    names = file.schema_arrow.names
    if (written := said.get("format", FORMAT)) != FORMAT:
        raise DataError(
            f"{path} was written by a later labkit (format {written}; this one reads {FORMAT}). Update labkit to read it."
        )
    for name in needed:
        if name not in names:
            raise DataError(f"{path} has no column {name!r}, as files of labkit.jets have. It has: {', '.join(names)}.")
    if not pa.types.is_integer(kind := file.schema_arrow.field("label").type):
        raise DataError(f"{path}: labels are {kind}, not whole numbers of classes. Write it again.")


def _column(values: Any) -> np.ndarray:
    """A column of numbers, or of lists of one length, as an array (n,) or (n, length)."""
    n = len(values)
    return (
        values.flatten().to_numpy().reshape(n, -1)
        if hasattr(values, "flatten") and hasattr(values.type, "list_size")
        else values.to_numpy()
    )


def _from_root(path: Path, particles: int, block: int) -> Iterator[Jets]:
    """A ROOT file as JetClass has them: the branches part_px, part_py, part_pz, part_energy and label_* of a tree."""
    try:
        import awkward as ak
        import uproot
    except ImportError as error:
        raise DataError(f"{path} is read with uproot, which is not here ({error}). {EXTRA}") from error
    with reading(path, advice="Is it a whole ROOT file?"), uproot.open(path) as file:
        trees = [name for name, kind in file.classnames().items() if kind in ("TTree", "ROOT::RNTuple")]
        if not trees:
            raise DataError(f"{path} holds no tree.")
        tree = file[trees[0]]
        wanted = _jetclass_columns(path, tree.keys())
        for batch in tree.iterate(wanted, step_size=block):
            lengths = ak.to_numpy(ak.num(batch["part_px"]))
            flat = {name: ak.to_numpy(ak.flatten(batch[name])) for name in wanted if name.startswith("part_")}
            others = {name: ak.to_numpy(batch[name]) for name in wanted if not name.startswith("part_")}
            yield _jetclass(path, flat, lengths, others, particles)


def _jetclass_columns(path: Path, names: Sequence[str]) -> list[str]:
    energy = next((name for name in ("part_energy", "part_e") if name in names), "part_energy")
    needed = ["part_px", "part_py", "part_pz", energy]
    labels = [name for name in names if name.startswith("label_")] or [name for name in ("jet_label", "label") if name in names][:1]
    if missing := [name for name in needed if name not in names] or ([] if labels else ["label_*"]):
        raise DataError(
            f"{path} has no column {missing[0]}, as files of JetClass have, and is none of labkit.jets. It has {', '.join(list(names)[:12])}."
        )
    return [*needed, *labels]


def _jetclass(
    path: Path, flat: Mapping[str, np.ndarray], lengths: np.ndarray, others: Mapping[str, np.ndarray], particles: int
) -> Jets:
    momenta = np.stack(list(flat.values()), 1).astype(np.float64)
    if len(others) == 1 and not next(iter(others)).startswith("label_"):  # numbers, as JetClass-II has them
        (label,) = others.values()
        classes = tuple(str(at) for at in range(int(label.max()) + 1))
    else:
        one_hot = np.stack(list(others.values()), 1).astype(bool)
        if (one_hot.sum(1) != 1).any():
            raise DataError(f"{path}: jet {int(np.flatnonzero(one_hot.sum(1) != 1)[0])} of a block is of no class, or of several.")
        names = [name.removeprefix("label_") for name in others]
        classes, label = tuple(JETCLASS.get(name, name) for name in names), one_hot.argmax(1)
    starts = np.cumsum(lengths) - lengths
    total = np.add.reduceat(np.vstack([momenta, np.zeros(4)]), np.minimum(starts, len(momenta)), axis=0)
    px, py, pz, energy = np.where((lengths > 0)[:, None], total, 0.0).T
    pt = np.hypot(px, py)
    of_jet = {"mass": np.sqrt(np.maximum(0, energy**2 - pt**2 - pz**2)), "pt": pt, "phi": np.arctan2(py, px), "n": lengths}
    return Jets.of(padded(momenta, lengths, particles), label, classes, eta=np.arcsinh(pz / np.maximum(pt, 1e-9)), **of_jet)


READERS = {".h5": _from_hdf5, ".hdf5": _from_hdf5, ".parquet": _from_parquet, ".root": _from_root}


def to_awkward(jets: Jets) -> Any:
    """The jets as an awkward array, as users of vector and coffea expect them: `constituents`, a list of Momentum4D records each,
    the `jet`, a Momentum4D with pt, eta, phi and mass, and `label`, `name` and whatever else the file had. Needs the extra [jets].

    Examples
    --------
    >>> labkit.jets.to_awkward(jets[:2]).constituents.pt.ndim
    2
    """
    try:
        import awkward as ak
        import vector
    except ImportError as error:
        raise DataError(f"awkward and vector make this, and are not here ({error}). {EXTRA}") from error
    vector.register_awkward()
    real = jets.constituents[..., 3] > 0
    lengths, flat = real.sum(1), jets.constituents[real]
    names = ("px", "py", "pz", "E")
    constituents = ak.zip({name: ak.unflatten(flat[:, at], lengths) for at, name in enumerate(names)}, with_name="Momentum4D")
    jet = ak.zip({name: jets.of_jet[name] for name in ("pt", "eta", "phi", "mass")}, with_name="Momentum4D")
    others = {name: jets.of_jet[name] for name in jets.of_jet if name not in ("pt", "eta", "phi", "mass")}
    name = np.array(jets.classes)[jets.label]
    return ak.zip({"constituents": constituents, "jet": jet, "label": jets.label, "name": name, **others}, depth_limit=1)


# -- as a data set -----------------------------------------------------------------------------------------------------


def sample() -> Dataset:
    """About 1,000 jets of `labkit.jets.generate`, of all five classes: the data set "jets"."""
    return dataset(SAMPLE)


def dataset(data: Any = "jets", *, stream: bool | None = None) -> Dataset:
    """Jets in labkit's layout as a data set: input `constituents`, and targets for everything else; labels are for evaluation alone.

    Parameters
    ----------
    data : "jets" (the sample), a Parquet file, a folder of them (also with `train` and `test` in it), a list, or a dict of splits.
    stream : read a single file row group by row group, too; folders are.

    Raises
    ------
    DataError
        A file is not of labkit's layout: `labkit.jets.convert` writes it. Values are not finite, labels are none of the file's
        classes, jets have no constituents (n) or no transverse momentum. Files have other classes than the first one. Slots that are all
        empty, whatever n says, are refused where they are read: by `momenta`.

    Examples
    --------
    >>> labkit.jets.dataset("jets").inputs
    ['constituents']
    """
    if isinstance(data, Dataset):
        _check_fields(data)
        return data
    if isinstance(data, str) and data == "jets":
        data = SAMPLE
    if not isinstance(data, list | tuple | Mapping) and is_of_cache(file_path("data", data).resolve()):  # as a record names it
        return dataset(open_dataset(data))
    paths = [file_path("data", one) for part in (data.values() if isinstance(data, Mapping) else [data]) for one in _each(part)]
    for path in paths:
        if not path.exists():
            raise DataError(
                f'there is no file or folder {path}. Give one that labkit.jets.generate or convert has written, or "jets".'
            )
    found = [file for path in paths for file in _sources(path)]
    files = [file for file in found if file.suffix.lower() == ".parquet"] or found
    names, classes = [], None
    for file in files:
        has, said = _names(file)
        if said is None:
            raise DataError(
                f"{file} is not in the layout of labkit.jets. Convert it: labkit.jets.convert({str(file)!r}, 'jets-of-mine')."
            )
        names, classes = names or has, classes or said["classes"]
        if said["classes"] != classes:
            raise DataError(
                f"{file} has jets of the classes {', '.join(said['classes'])}, and {files[0]} of {', '.join(classes)}, so that one "
                "label is two classes. Convert them together: labkit.jets.convert([...], 'jets-of-mine')."
            )
    targets = ["label", *(name for name in names if name not in ("constituents", "label"))]
    options = {} if stream is None else {"stream": stream}
    return open_dataset(data, inputs=["constituents"], target=targets, as_given="constituents", **options)


def momenta(read: Mapping[str, np.ndarray], indices: np.ndarray, split: str) -> np.ndarray:
    """The constituents of what a data set's `batch` gave, (n, N, 4); DataError where all slots of a jet are empty."""
    constituents = read["constituents"].reshape(len(indices), -1, 4)
    if len(bad := np.flatnonzero(~(constituents[..., 3] > 0).any(1))):
        raise DataError(f"jet {int(indices[bad[0]])} of the {split} split has no constituents. Drop such jets.")
    return constituents


def _names(file: Path) -> tuple[list[str], dict[str, Any] | None]:
    import pyarrow.parquet as pq

    if file.suffix.lower() != ".parquet":
        return [], None
    said = provenance(file)
    with reading(file, advice="Is it a whole Parquet file?"), pq.ParquetFile(file) as opened:
        names = opened.schema_arrow.names
        if said is None:
            return names, None
        _check_layout(file, opened, said, ("constituents", "label", *OF_JET))
        for name in ("label", "n", "pt"):
            low, high = _range(opened, name)
            if name == "label" and (low < 0 or high >= len(said["classes"])):
                raise DataError(f"{file}: labels are {low} to {high}, of the classes {', '.join(said['classes'])}. Write it again.")
            if name != "label" and low <= 0:
                what = {"n": "constituents", "pt": "transverse momentum"}[name]
                raise DataError(f"{file}: there are jets without {what}, their {name} is {low + 0:g}. Drop these jets.")
    return names, said


def _range(file: Any, name: str) -> tuple[float, float]:
    """The least and the largest value of a column of a Parquet file, as its row groups know them, or else by reading it."""
    about = file.metadata
    column = [about.schema.column(at).path for at in range(about.num_columns)].index(name)
    held = [about.row_group(group).column(column).statistics for group in range(about.num_row_groups)]
    if all(one is not None and one.has_min_max for one in held):
        return min((one.min for one in held), default=np.inf), max((one.max for one in held), default=-np.inf)
    values = file.read([name]).column(0).to_numpy()
    return values.min(initial=np.inf), values.max(initial=-np.inf)


def _check_fields(data: Dataset) -> None:
    for name in ("constituents", "label", *OF_JET):
        known("data: field", name, data.fields, " labkit.jets.dataset opens files of jets.", error=DataError)
