"""Anomalies: events of two jets, clustered without labels; a rare signal shows where it is common in one cluster.

UCluster's other network. Each constituent of an event is to be said the bin of the mass of its own jet, from an embedding of the whole
event, two numbers wide, that is the largest of all its constituents:

    x (B, N, 7), event (B, 4): log mass and tau21 of both jets -> 16
    ABCNet's trunk and these 16 -> 2 a constituent -> max over the event: z (B, 2)
    z beside what is known of a constituent, 64 and 256 numbers -> 256 -> 128 -> 21 logits a constituent

The seven features are the eight of a jet without the last; of the published ones their number alone was found. Mikuni, Canelli:
arXiv:2010.07106; events are those of the LHC Olympics (arXiv:2101.08320), or pairs of any jets.

Used by users, as `labkit.jets.Anomalies`, `labkit.jets.events` and `labkit.jets.pairs`.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from labkit.data import hdf5
from labkit.errors import DataError, file_path
from labkit.jets.clustering import contingency, nearest
from labkit.jets.files import PARTICLES, SUBSTRUCTURE, Jets, momenta, padded
from labkit.jets.networks import FEATURES, Jet, Layer, Trunk, features, linear
from labkit.jets.problem import UCluster
from labkit.jets.pythia import clustered, libraries, substructure_of
from labkit.problems.problem import MEASURED

N_FEATURES = len(FEATURES) - 1
PAIR = ("mass", "pt", "eta", "phi", "tau21")  # of each of the two jets, the heavier one first
MASS_EDGES = np.linspace(10, 1000, 20)  # GeV
CLASSES = ("background", "signal")
RADIUS, LEAST_PT = 1.0, 20.0
HADRONS, BLOCK = 700, 1_000  # of an event of the LHC Olympics; events at once
LEAST_EVENTS = 10  # of a cluster whose share of signal counts: of one event it is 0 or 1


class Events(NamedTuple):
    """`x` (B, N, 7), `bins` (B, N), -1 in empty slots, `label` (B,), `event` (B, 4)."""

    x: torch.Tensor
    bins: torch.Tensor
    label: torch.Tensor
    event: torch.Tensor


class AnomalyNet(Trunk):
    """x (B, N, 7) and event (B, 4) -> z (B, embedding), and logits (B, N, 21) of each constituent."""

    def __init__(self, embedding: int, clusters: int, neighbours: int, attention: str, padding: str) -> None:
        super().__init__(N_FEATURES, embedding, clusters, neighbours, attention, padding, more=16)
        self.event = Layer(4, 16)
        self.head_0, self.head_1 = Layer(embedding + 64 + 256, 256), Layer(256, 128)
        self.logits = linear(128, len(MASS_EDGES) + 1)

    def forward(self, x: torch.Tensor, event: torch.Tensor, momentum: float = 0.1) -> Jet:
        z, known = self._embedded(x, event, momentum)
        a, _, c, *_ = known.parts
        head = self.head_1(self.head_0(torch.cat([known.of_jets(z), a, c], 1), momentum), momentum)
        return Jet(z, known.slots(self.logits(head)), self.distances(z))

    def embed(self, x: torch.Tensor, event: torch.Tensor, momentum: float = 0.1) -> torch.Tensor:
        return self._embedded(x, event, momentum)[0]

    def _embedded(self, x: torch.Tensor, event: torch.Tensor, momentum: float) -> tuple[torch.Tensor, Any]:
        known = self.known(x, momentum)
        rows = self.join([*known.parts, known.of_jets(self.event(event, momentum))], momentum)
        return known.slots(rows).amax(1), known  # rows are never negative, and empty slots 0


class Anomalies(UCluster):
    """Cluster events of two jets, by the masses of the jets that their constituents are of.

    Of a whole set `measure` has also "signal_share", the largest share of signal in a cluster of at least 10 events, by the labels
    (0 where no cluster has so many). `accuracy` says little here.

    Parameters beside those of `UCluster`
    -------------------------------------
    data : files of events, that `labkit.jets.write` wrote of what `events` or `pairs` give.
    clusters : many, so that a rare signal can have one.

    Examples
    --------
    >>> events = labkit.jets.pairs(jets[:300], jets[300:600], np.arange(300) % 10 == 0, particles=20)
    >>> file = labkit.jets.write("events.parquet", events)
    >>> problem = labkit.jets.Anomalies(file, clusters=4, pretrain=1, batch_size=32, neighbours=4, train_samples=96, test_samples=30)
    >>> labkit.train(problem, lab, passes=2).wait().state
    'done'
    """

    def __init__(
        self,
        data: Any,
        *,
        clusters: int = 20,
        embedding: int = 2,
        gamma: float = 2.0,
        pretrain: float = 11.0,
        slope: float = 10.0,
        cluster_weight: float = 1.0,
        alpha_units: str = "absolute",
        lr: float = 1e-2,
        halve_every: int = 500_000,
        neighbours: int = 10,
        attention: str = "faithful",
        padding: str = "faithful",
        batch_size: int = 1024,
        train_samples: int | None = None,
        test_samples: int | None = None,
        score_samples: int = 256,
        precision: str = "float32",
        ema: float | None = None,
    ) -> None:
        of_network = {"neighbours": neighbours, "attention": attention, "padding": padding}
        of_clusters = {"clusters": clusters, "embedding": embedding, "slope": slope, "cluster_weight": cluster_weight}
        super().__init__(
            data,
            gamma=gamma,
            pretrain=pretrain,
            alpha_units=alpha_units,
            lr=lr,
            halve_every=halve_every,
            batch_size=batch_size,
            train_samples=train_samples,
            test_samples=test_samples,
            score_samples=score_samples,
            precision=precision,
            ema=ema,
            **of_network,
            **of_clusters,
        )
        if "pair" not in self.dataset.fields:
            raise DataError(f"data {self.dataset.name!r} are jets, not events of two: give what labkit.jets.events or pairs made.")

    def build(self, seed: int) -> nn.Module:
        return AnomalyNet(self.embedding, self.clusters, self.neighbours, self.attention, self.padding)

    def load(self, indices: np.ndarray, split: str = "train", device: str | torch.device = "cpu") -> Events:
        read = self.dataset.batch(indices, split)
        constituents = torch.from_numpy(momenta(read, indices, split))
        pair = torch.from_numpy(read["pair"]).reshape(len(indices), 2, len(PAIR))
        own = pair.gather(1, torch.from_numpy(read["member"]).long()[..., None].expand(-1, -1, len(PAIR)))
        x = features(constituents, dict(zip(PAIR, own.unbind(-1), strict=True)))[..., :N_FEATURES]
        bins = torch.bucketize(own[..., 0].contiguous(), torch.from_numpy(MASS_EDGES).float(), right=True)
        bins = bins.masked_fill(constituents[..., 3] <= 0, -1)
        event = torch.cat([pair[..., 0].clamp_min(1e-3).log(), pair[..., 4]], 1)
        label = torch.from_numpy(read["label"].astype(np.int64))
        return Events(*(part.to(device) for part in (x, bins, label, event)))

    def call(self, network: nn.Module, batch: Events, momentum: float = 0.1, noise: torch.Generator | None = None) -> Jet:
        return network(batch.x, batch.event, momentum)

    def embed(self, network: nn.Module, batch: Events) -> torch.Tensor:
        return network.embed(batch.x, batch.event)

    def measure(
        self, module: nn.Module, indices: np.ndarray, split: str = "train", device: str = "cpu", batch_size: int = MEASURED
    ) -> dict[str, float]:
        found = super().measure(module, indices, split, device, batch_size)
        label = self.dataset.batch(indices, split, fields=["label"])["label"]
        z, centres = self.embeddings(module, indices, split, device), module.centres.detach().cpu().double().numpy()
        clusters = nearest(((z[:, None] - centres) ** 2).sum(-1))
        return {**found, "signal_share": float(signal_shares(clusters, label, LEAST_EVENTS).max())}

    @cached_property
    def edges(self) -> dict[str, np.ndarray]:
        return {"mass": MASS_EDGES}


def signal_shares(clusters: np.ndarray, label: np.ndarray, least: int = 1) -> np.ndarray:
    """The share of signal (label 1) in each cluster, (K,); 0 in those with fewer events than `least`."""
    table = contingency(clusters, label)
    of_signal, n = table[:, 1] if table.shape[1] > 1 else np.zeros(len(table)), table.sum(1)
    return np.where(n >= least, of_signal / np.maximum(1, n), 0.0)


def pairs(one: Jets, other: Jets, label: np.ndarray | Sequence[int], particles: int = PARTICLES) -> Jets:
    """Events of two jets each, the n-th of `one` and of `other`, with label 0 for background and 1 for signal. Jets need substructure,
    and at least as many slots as `particles`, if they have more constituents: these are the hardest of both jets.

    Examples
    --------
    >>> events = labkit.jets.pairs(jets[:300], jets[300:600], np.arange(300) % 10 == 0, particles=20)
    >>> int(events.label.sum()), events.constituents.shape
    (30, (300, 20, 4))
    """
    for jets in (one, other):
        if "substructure" not in jets.of_jet:
            raise DataError("jets of an event need their substructure (tau21): labkit.jets.generate(..., substructure=True).")
        slots = jets.constituents.shape[1]
        if particles > slots and (cut := int((jets.of_jet["n"] > slots).sum())):
            raise DataError(
                f"{cut} jets have more constituents than the {slots} that are stored, so that the {particles} hardest of their events are not "
                f"known. Give particles={slots}, or jets with more."
            )
    numbers = []
    for jets in (one, other):
        tau21 = jets.of_jet["substructure"][:, SUBSTRUCTURE.index("tau21")]
        numbers.append(np.stack([*(jets.of_jet[name] for name in PAIR[:-1]), tau21], 1))
    pair = np.stack(numbers, 1)  # (n, 2, 5)
    heavier = np.argsort(-pair[..., 0], axis=1, kind="stable")
    both = np.stack([one.constituents, other.constituents], 1)
    pair, both = (np.take_along_axis(v, heavier.reshape(-1, 2, *(1,) * (v.ndim - 2)), 1) for v in (pair, both))
    n, _, slots, _ = both.shape
    constituents, member = both.reshape(n, 2 * slots, 4), np.tile(np.repeat([0, 1], slots), (n, 1))
    order = np.argsort(-np.hypot(constituents[..., 0], constituents[..., 1]), axis=1, kind="stable")[:, :particles]
    constituents, member = np.take_along_axis(constituents, order[..., None], 1), np.take_along_axis(member, order, 1)
    return Jets.of(constituents, np.asarray(label), CLASSES, member=member, pair=pair.reshape(n, 2 * pair.shape[2]))


def events(path: Any, particles: int = PARTICLES, most: int | None = None, *, external: bool = False) -> Iterator[Jets]:
    """The events of the LHC Olympics' R&D set (Zenodo 2629073, HDF5: 700 hadrons of pT, eta, phi, and a label), in blocks: the two
    heaviest of their anti-kT jets with R = 1. Events with fewer are left out. `external` as in `labkit.jets.read`. Needs the extra [jets].

    Examples
    --------
    >>> import h5py
    >>> row = np.zeros(2101)
    >>> row[:6] = 600, 0.1, 0.2, 500, -0.1, 3.3  # pT, eta and phi of two hadrons; the label is the last number
    >>> with h5py.File("events.h5", "w") as file:
    ...     _ = file.create_dataset("df/block0_values", data=row[None])
    >>> [len(block) for block in labkit.jets.events("events.h5")]
    [1]
    """
    _, fastjet, ak = libraries()
    path, n = file_path("path", path), 0
    with hdf5.opened(path, external) as file:
        groups = [group for group in (file[name] for name in file) if isinstance(group, hdf5.Members)]
        tables = [group["block0_values"] for group in groups if "block0_values" in group]
        if not tables or tables[0].shape[1] != 3 * HADRONS + 1:
            raise DataError(f"{path} holds no table of {HADRONS} hadrons an event and a label, as pandas writes it.")
        for start in range(0, len(tables[0]), BLOCK):
            block = tables[0][start : start + BLOCK].astype(np.float64)
            made = _of_hadrons(block[:, :-1].reshape(len(block), -1, 3), block[:, -1].astype(int), particles, fastjet, ak)
            made = made[: None if most is None else most - n]
            n += len(made)
            yield made
            if n == most:
                return


def _of_hadrons(hadrons: np.ndarray, label: np.ndarray, particles: int, fastjet: Any, ak: Any) -> Jets:
    pt, eta, phi = hadrons[hadrons[..., 0] > 0].T
    momenta = np.stack([pt * np.cos(phi), pt * np.sin(phi), pt * np.sinh(eta), pt * np.cosh(eta)], 1)
    cluster = clustered(momenta, (hadrons[..., 0] > 0).sum(1), fastjet.antikt_algorithm, RADIUS, fastjet, ak)
    jets, inside = cluster.inclusive_jets(LEAST_PT), cluster.constituents(LEAST_PT)
    has_two = ak.to_numpy(ak.num(jets, axis=1)) >= 2
    jets, inside = jets[has_two], inside[has_two]
    mass = np.sqrt(np.maximum(0, jets["E"] ** 2 - jets["px"] ** 2 - jets["py"] ** 2 - jets["pz"] ** 2))
    heaviest = ak.argsort(mass, axis=1, ascending=False)[:, :2]
    mass, jets, inside = mass[heaviest], jets[heaviest], inside[heaviest]
    found = []
    for at in range(2):
        lengths = ak.to_numpy(ak.num(inside[:, at], axis=1))
        flat = ak.flatten(inside[:, at], axis=1)
        momenta = np.stack([ak.to_numpy(flat[axis]).astype(np.float64) for axis in ("px", "py", "pz", "E")], 1)
        px, py, pz = (ak.to_numpy(jets[:, at][axis]) for axis in ("px", "py", "pz"))
        of_jet = {"mass": ak.to_numpy(mass[:, at]), "pt": np.hypot(px, py), "phi": np.arctan2(py, px)}
        of_jet["eta"] = np.arcsinh(pz / np.maximum(of_jet["pt"], 1e-9))
        of_jet["substructure"] = substructure_of(momenta, lengths, of_jet, fastjet, ak, radius=RADIUS)
        found.append(Jets.of(padded(momenta, lengths, particles), np.zeros(len(lengths)), CLASSES, n=lengths, **of_jet))
    return pairs(*found, label[has_two], particles)
