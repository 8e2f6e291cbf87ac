"""Jets as Pythia 8 and FastJet make them, by a lab: q, g, W, Z and t with a transverse momentum of about 1 TeV.

    pp -> qq, gg, WW, ZZ, tt at 13 TeV, 900 < pT-hat < 1100 GeV -> shower, hadrons -> anti-kT R = 0.8 of all that a detector sees
    -> the two hardest jets, 800 < pT < 1200 GeV, |eta| < 2.5, within 0.8 of a parton of the class -> their constituents

`full` has initial and final state radiation and multiple interactions, as events have; `clean` has final state radiation alone, for which
masses are as narrow as in the jets that the field publishes. A file holds equal numbers of all classes in random order, from seeds
that follow from (seed, number of the file, class) alone: the same on every lab. What is there already is not made again.

Pythia (Bierlich et al. 2022, arXiv:2203.11601) and FastJet (Cacciari, Salam, Soyez 2012, arXiv:1111.6097) are free software under the
GPL; the extra [jets] installs them, and labkit only imports them.

Used by users, as `labkit.jets.generate`, by notebook 12 and `labkit.jets.anomaly`.
"""

import json
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from labkit.errors import SEEDS, DataError, LabError, ProblemError, file_path, known, several, text, whole
from labkit.jets.files import CLASSES, EXTRA, OURS, PARTICLES, ROWS, Jets, check, mass_window, padded, provenance, together, write

COMMON = (
    "Beams:idA = 2212",
    "Beams:idB = 2212",
    "Beams:eCM = 13000.",
    "PhaseSpace:pTHatMin = 900.",
    "PhaseSpace:pTHatMax = 1100.",
    "Print:quiet = on",
    "Next:numberCount = 0",
    "Random:setSeed = on",
)
HADRONIC_W = ("24:onMode = off", "24:onIfAny = 1 2 3 4 5")
# The processes of a class, and the absolute ids of the partons that its jets come from.
PROCESSES = {
    "q": (("HardQCD:qq2qq = on", "HardQCD:gg2qqbar = on", "HardQCD:qqbar2qqbarNew = on"), (1, 2, 3, 4, 5)),
    "g": (("HardQCD:gg2gg = on", "HardQCD:qqbar2gg = on"), (21,)),
    "W": (("WeakDoubleBoson:ffbar2WW = on", *HADRONIC_W), (24,)),
    "Z": (
        ("WeakDoubleBoson:ffbar2gmZgmZ = on", "WeakZ0:gmZmode = 2", "23:onMode = off", "23:onIfAny = 1 2 3 4 5"),
        (23,),
    ),
    "t": (("Top:gg2ttbar = on", "Top:qqbar2ttbar = on", *HADRONIC_W), (6,)),
}
PRESETS = {"full": (), "clean": ("PartonLevel:MPI = off", "PartonLevel:ISR = off")}
RADIUS, ETA, JET_ETA, JET_PT, LEAST_PT, TRUTH = 0.8, 4.0, 2.5, (800.0, 1200.0), 300.0, 0.8
TRIM_RADIUS, TRIM_SHARE = 0.2, 0.03  # of trimming: kT subjets with less than this share of the jet's pT go
INVISIBLE = (12, 14, 16)
EVENTS = 500  # at once: a few hundred MB
YIELD = 1.5  # jets of an event
PYTHIA_SEEDS = 900_000_000
BARREN = 40  # batches of events in a row without a jet

_alone = threading.Lock()  # workers in threads: Pythia and FastJet have one state for a process


def generate(
    out: Any,
    lab: Any = None,
    *,
    jets: int = 10_000,
    classes: Sequence[str] | str = CLASSES,
    preset: str = "full",
    seed: int = 0,
    jets_per_file: int = 5_000,
    particles: int = PARTICLES,
    mass: tuple[float, float] | None = None,
    substructure: bool = True,
    timeout: float = 24 * 3600.0,
) -> list[Path]:
    """Make jets, in as many files as they fill, side by side on the workers of a lab; returns the files.

    A call that was broken off goes on when it is made again: files that are whole, of these settings and of this Pythia, stay.

    Parameters
    ----------
    out : the folder for jets-00000.parquet and so on, in labkit's layout (`labkit.jets.files`).
    lab : as of `labkit.connect`; None makes them here. Workers must see the folder under its path.
    jets : how many, of all classes together; each class has the same number, but for one.
    classes : of "q", "g", "W", "Z", "t", in the order of their numbers; also a text, "WZt".
    preset : "full" (radiation and multiple interactions) or "clean" (final state radiation alone).
    seed : of everything.
    jets_per_file : a file is what a worker makes at once.
    particles : room for so many constituents of a jet, the hardest.
    mass : (least, most), GeV: only such jets; UCluster takes (10, 200).
    substructure : also the ten numbers of `labkit.jets.files.SUBSTRUCTURE`, among them the trimmed mass.
    timeout : seconds for all of it.

    Raises
    ------
    ProblemError
        Pythia or FastJet is not installed: it says which extra is missing. Also where the folder holds jets of other settings or of
        another Pythia, more files than these, or files of these names that are not of labkit.

    Examples
    --------
    >>> [file.name for file in labkit.jets.generate("clean", jets=4, classes="WZ", preset="clean")]
    ['jets-00000.parquet']
    """
    jets, jets_per_file = whole("jets", jets), whole("jets_per_file", jets_per_file)
    seed, particles = whole("seed", seed, 0, SEEDS), whole("particles", particles, 3)
    preset = known("preset", preset, PRESETS)
    classes = tuple(known("classes", name, CLASSES) for name in several("classes", list(classes), text))
    if len(set(classes)) != len(classes) or not classes:
        raise ValueError(f"classes={classes}: give each class once.")
    out = file_path("out", out).resolve()
    settings = {"generator": "pythia", "preset": preset, "seed": seed, "particles": particles}
    mass = mass_window(mass)
    settings |= {"mass": None if mass is None else list(mass), "substructure": bool(substructure)}
    shards = [
        {**settings, "classes": list(classes), "file": at, "jets": min(jets_per_file, jets - at * jets_per_file)}
        for at in range(-(-jets // jets_per_file))
    ]
    paths = [out / f"jets-{at:05d}.parquet" for at in range(len(shards))]
    if later := sorted(set(out.glob(OURS)) - set(paths)):
        raise ProblemError(
            f"{out} has {len(later)} files beyond the {len(paths)} that jets={jets} fill, from {later[0].name} on, which "
            "would be read with them as one set. Remove these, or give another folder."
        )
    todo = [(str(path), shard) for path, shard in zip(paths, shards, strict=True) if not _is_made(path, shard)]
    begun, done = time.monotonic(), []

    def each(number: int, made: int) -> None:
        done.append(made)
        rate = sum(done) / (time.monotonic() - begun)
        end = "\n" if len(done) == len(todo) else ""
        print(f"\r{len(done)} of {len(todo)} files, {sum(done):,} jets, {rate:,.0f} jets/s", end=end, flush=True)

    if lab is not None:
        lab.map(_make, todo, timeout=timeout, each=each)
    else:
        for number, item in enumerate(todo):
            each(number, _make(item))
    return paths


def _is_made(path: Path, shard: Mapping[str, Any]) -> bool:
    """Is the file there, whole, and of these settings? ProblemError where it is of others, of another Pythia or not of labkit."""
    if not path.exists():
        return False
    try:
        said = provenance(path)
    except LabError:  # broken off on a bad disk
        return False
    if said is None:
        raise ProblemError(f"{path} is a Parquet file of others, and is not replaced. Give another folder.")
    wanted = dict(shard)
    with suppress(metadata.PackageNotFoundError):  # the workers may have it
        wanted["pythia8mc"] = metadata.version("pythia8mc")
    if other := {name: said.get(name) for name in wanted if said.get(name) != wanted[name]}:
        name, value = next(iter(other.items()))
        raise ProblemError(f"{path} has jets of {name}={value!r}, and {name}={wanted[name]!r} is asked for. Give another folder.")
    return True


def libraries() -> tuple[Any, Any, Any]:
    """Pythia, FastJet and awkward; ProblemError with the extra to install."""
    try:
        import awkward
        import fastjet
        import pythia8mc
        import vector
    except ImportError as error:
        raise ProblemError(f"jets are made by Pythia 8 and FastJet, which are not here ({error}). {EXTRA}") from error
    vector.register_awkward()
    return pythia8mc, fastjet, awkward


def _make(item: tuple[str, dict]) -> int:
    """A file: its jets, class by class, in random order; returns how many."""
    path, shard = item
    with _alone:
        libraries()
        parts, events = [], {}
        counts = np.diff(np.linspace(0, shard["jets"], len(shard["classes"]) + 1).round().astype(int))
        for number, (name, n) in enumerate(zip(shard["classes"], counts.tolist(), strict=True)):
            own = [shard["seed"], shard["file"], CLASSES.index(name)]
            pythia_seed = 1 + int(np.random.SeedSequence(own).generate_state(1)[0]) % PYTHIA_SEEDS
            made, events[name] = of_class(
                name, n, pythia_seed, **{k: shard[k] for k in ("preset", "particles", "mass", "substructure")}
            )
            parts.append(Jets(made.constituents, np.full(n, number), tuple(shard["classes"]), made.of_jet))
        jets = together([part for part in parts if len(part)])
        order = np.random.default_rng([shard["seed"], shard["file"]]).permutation(len(jets))
    versions = {name: metadata.version(name) for name in ("pythia8mc", "fastjet", "labkit")}
    about = {
        **shard,
        "events": events,
        "settings": {name: settings_of(name, shard["preset"]) for name in shard["classes"]},
        **versions,
    }
    write(path, jets[order], json.loads(json.dumps(about)), min(ROWS, max(1, len(jets) // 2)))
    return len(jets)


def settings_of(name: str, preset: str = "full") -> list[str]:
    """The settings of Pythia for a class, without its seed."""
    return [*COMMON, *PRESETS[preset], *PROCESSES[name][0]]


def of_class(
    name: str,
    n: int,
    seed: int,
    *,
    preset: str = "full",
    particles: int = PARTICLES,
    mass: Sequence[float] | None = None,
    substructure: bool = True,
) -> tuple[Jets, int]:
    """n jets of one class, in the order in which Pythia made them, and how many events that took; `seed` is Pythia's."""
    pythia8mc, fastjet, ak = libraries()
    pythia = pythia8mc.Pythia("", False)
    for line in [*settings_of(name, preset), f"Random:seed = {seed}"]:
        if not pythia.readString(line):
            raise ProblemError(f"Pythia {metadata.version('pythia8mc')} does not know {line!r}. {EXTRA}")
    if not pythia.init():
        raise ProblemError(f"Pythia could not be started for {name!r}, preset {preset!r}.")
    parts, events, barren = [], 0, 0
    while sum(map(len, parts)) < n:
        missing = n - sum(map(len, parts))
        batch = pythia.nextBatch(min(EVENTS, 10 + round(missing / YIELD)))
        events += len(batch)
        found = _jets_of(batch["prt"], PROCESSES[name][1], particles, mass, fastjet, ak, substructure)
        barren = 0 if len(found) else barren + 1
        if barren == BARREN:
            raise DataError(f"{events} events of {name!r} gave {sum(map(len, parts))} jets. Is a mass in {mass} possible?")
        parts.append(found)
    made = together(parts)[:n] if n else together([*parts, _none(particles, substructure)])
    check(made, f"jets of {name!r} by Pythia")
    return made, events


def _none(particles: int, substructure: bool) -> Jets:
    more = {"substructure": np.zeros((0, 10))} if substructure else {}
    return Jets.of(np.zeros((0, particles, 4)), np.zeros(0), CLASSES, **more)


def _jets_of(
    prt: Any, partons: Sequence[int], particles: int, mass: Sequence[float] | None, fastjet: Any, ak: Any, substructure: bool
) -> Jets:
    """The jets of a batch of events that are of the class, two an event at most."""
    status, id_, p = np.abs(prt["status"]), np.abs(prt["id"]), prt["p"]
    pt = np.sqrt(p["px"] ** 2 + p["py"] ** 2)
    eta = np.arcsinh(p["pz"] / ak.where(pt > 0, pt, 1e-9))
    seen = (prt["status"] > 0) & (np.abs(eta) < ETA)
    for neutrino in INVISIBLE:
        seen = seen & (id_ != neutrino)
    parton = (status == 22) | (status == 23)
    parton = parton & _any(id_, partons)
    hard = ak.zip({"eta": eta[parton], "phi": np.arctan2(p["py"][parton], p["px"][parton])})

    visible = ak.zip({"px": p["px"][seen], "py": p["py"][seen], "pz": p["pz"][seen], "E": p["e"][seen]}, with_name="Momentum4D")
    visible = ak.to_packed(visible)  # FastJet goes by its offsets alone
    cluster = fastjet.ClusterSequence(visible, fastjet.JetDefinition(fastjet.antikt_algorithm, RADIUS))
    jets, inside = cluster.inclusive_jets(LEAST_PT), cluster.constituents(LEAST_PT)
    jet_pt = np.sqrt(jets["px"] ** 2 + jets["py"] ** 2)
    first = ak.argsort(jet_pt, axis=1, ascending=False)[:, :2]
    jets, inside, jet_pt = jets[first], inside[first], jet_pt[first]
    jet_eta, jet_phi = np.arcsinh(jets["pz"] / jet_pt), np.arctan2(jets["py"], jets["px"])
    jet_mass = np.sqrt(np.maximum(0, jets["E"] ** 2 - jet_pt**2 - jets["pz"] ** 2))
    fits = (jet_pt > JET_PT[0]) & (jet_pt < JET_PT[1]) & (np.abs(jet_eta) < JET_ETA)
    if mass is not None:
        fits = fits & (jet_mass > mass[0]) & (jet_mass < mass[1])
    one, other = ak.unzip(ak.cartesian([ak.zip({"eta": jet_eta, "phi": jet_phi}), hard], axis=1, nested=True))
    turn = np.abs(one["phi"] - other["phi"])
    turn = ak.where(turn > np.pi, 2 * np.pi - turn, turn)
    near = ak.any((one["eta"] - other["eta"]) ** 2 + turn**2 < TRUTH**2, axis=2)
    fits = fits & near

    chosen = ak.flatten(inside[fits], axis=1)
    lengths = ak.to_numpy(ak.num(chosen, axis=1))
    flat = ak.flatten(chosen, axis=1)
    momenta = np.stack([ak.to_numpy(flat[axis]).astype(np.float64) for axis in ("px", "py", "pz", "E")], 1)
    of_jet = {"mass": jet_mass, "pt": jet_pt, "eta": jet_eta, "phi": jet_phi}
    of_jet = {name: ak.to_numpy(ak.flatten(value[fits], axis=1)) for name, value in of_jet.items()}
    if substructure:
        of_jet["substructure"] = substructure_of(momenta, lengths, of_jet, fastjet, ak)
    return Jets.of(padded(momenta, lengths, particles), np.zeros(len(lengths)), CLASSES, n=lengths, **of_jet)


def _any(id_: Any, of: Sequence[int]) -> Any:
    found = id_ == of[0]
    for one in of[1:]:
        found = found | (id_ == one)
    return found


def clustered(momenta: np.ndarray, lengths: np.ndarray, algorithm: Any, radius: float, fastjet: Any, ak: Any) -> Any:
    """The constituents of each jet clustered again; `momenta` (M, 4) are one behind the other."""
    axes = {name: ak.unflatten(momenta[:, at], lengths) for at, name in enumerate(("px", "py", "pz", "E"))}
    return fastjet.ClusterSequence(ak.zip(axes, with_name="Momentum4D"), fastjet.JetDefinition(algorithm, radius))


def substructure_of(
    momenta: np.ndarray, lengths: np.ndarray, of_jet: Mapping[str, np.ndarray], fastjet: Any, ak: Any, radius: float = RADIUS
) -> np.ndarray:
    """`SUBSTRUCTURE` of jets with so many constituents each, `momenta` (M, 4) one behind the other: (n, 10).

    Trimming: Krohn, Thaler, Wang, arXiv:0912.1342; tau_N: Thaler, Van Tilburg, arXiv:1011.2268; C2: Larkoski, Salam, Thaler,
    arXiv:1305.0007, here of the hardest 20 constituents.
    """
    n = len(lengths)
    if not n:
        return np.zeros((0, 10))
    jet, starts = np.repeat(np.arange(n), lengths), np.cumsum(lengths) - lengths
    px, py, pz, _ = momenta.T
    pt = np.hypot(px, py)
    eta, phi, total = np.arcsinh(pz / pt), np.arctan2(py, px), np.add.reduceat(pt, starts)

    def distance(of_eta: np.ndarray, of_phi: np.ndarray) -> np.ndarray:
        turn = np.abs(phi - of_phi)
        return np.hypot(eta - of_eta, np.minimum(turn, 2 * np.pi - turn))

    away = distance(of_jet["eta"][jet], of_jet["phi"][jet])
    girth = np.add.reduceat(pt * away, starts) / total
    ptd = np.sqrt(np.add.reduceat(pt**2, starts)) / total
    leading = np.maximum.reduceat(pt, starts) / total

    subjets = clustered(momenta, lengths, fastjet.kt_algorithm, TRIM_RADIUS, fastjet, ak).inclusive_jets(0.0)
    sub_pt = np.sqrt(subjets["px"] ** 2 + subjets["py"] ** 2)
    kept = sub_pt > TRIM_SHARE * of_jet["pt"]
    sums = {axis: ak.to_numpy(ak.sum(subjets[axis][kept], axis=1)) for axis in ("px", "py", "pz", "E")}
    trimmed_pt = np.hypot(sums["px"], sums["py"])
    trimmed = np.sqrt(np.maximum(0, sums["E"] ** 2 - trimmed_pt**2 - sums["pz"] ** 2))

    tau, many = {1: np.ones(n), 2: np.zeros(n), 3: np.zeros(n)}, lengths >= 3
    if many.any():
        cluster = clustered(momenta[np.repeat(many, lengths)], lengths[many], fastjet.kt_algorithm, max(1.0, radius), fastjet, ak)
        at = (np.cumsum(many) - 1)[jet]
        for axes in tau:
            with warnings.catch_warnings(action="ignore"):  # kT is meant for this; it warns whatever the algorithm
                found = cluster.exclusive_jets(n_jets=axes)
            of_x, of_y, of_z = (ak.to_numpy(ak.to_regular(found[axis], axis=1)).reshape(-1, axes) for axis in ("px", "py", "pz"))
            of_eta, of_phi = np.arcsinh(of_z / np.maximum(np.hypot(of_x, of_y), 1e-9)), np.arctan2(of_y, of_x)
            least = np.min([distance(of_eta[at, one], of_phi[at, one]) for one in range(axes)], axis=0)
            tau[axes] = np.where(many, np.add.reduceat(pt * least, starts) / (total * radius), tau[axes])
    tau21, tau32 = (np.divide(tau[a], tau[b], out=np.zeros(n), where=tau[b] > 1e-9) for a, b in ((2, 1), (3, 2)))

    hardest = padded(momenta, lengths, 20).astype(np.float64)
    x, y, z, energy = np.moveaxis(hardest, -1, 0)
    h_pt, real = np.hypot(x, y), energy > 0
    h_eta, h_phi = np.arcsinh(z / np.maximum(h_pt, 1e-9)) * real, np.arctan2(y, x)
    turn = np.abs(h_phi[:, :, None] - h_phi[:, None])
    apart = np.hypot(h_eta[:, :, None] - h_eta[:, None], np.minimum(turn, 2 * np.pi - turn))
    pairs = h_pt[:, :, None] * h_pt[:, None] * apart
    e2 = pairs.sum((1, 2)) / 2
    # of all triples i < j < k, as sum_ijk w_ij w_jk w_ki / 6 with w_ij = sqrt(pT_i pT_j) r_ij
    weight = np.sqrt(h_pt[:, :, None] * h_pt[:, None]) * apart
    e3 = np.einsum("nij,nji->n", weight @ weight, weight) / 6
    c2 = np.divide(e3 * h_pt.sum(1), e2**2, out=np.zeros(n), where=e2 > 1e-9)
    mass = of_jet["mass"]
    return np.stack([mass, trimmed, lengths, girth, ptd, leading, tau21, tau32, c2, trimmed / np.maximum(mass, 1e-9)], 1)
