"""Jets: made by Pythia and FastJet or read from files, a network that clusters them without labels, and what its clusters are worth.

labkit.jets.generate("jets/full", lab, jets=50_000, mass=(10, 200), classes="WZt")
run = labkit.train(labkit.jets.UCluster("jets/full"), lab, update="allreduce", passes=40).wait()
labkit.jets.table(run)
"""

from labkit.jets.anomaly import Anomalies, events, pairs
from labkit.jets.evaluation import baselines, chosen, confusion, embedded, network, silhouette, table
from labkit.jets.figures import before_and_after, embedding, masses, worlds
from labkit.jets.files import CLASSES, SUBSTRUCTURE, Jets, convert, dataset, load, provenance, read, to_awkward, write
from labkit.jets.problem import UCluster
from labkit.jets.pythia import generate
from labkit.names import face

__all__ = [
    "CLASSES",
    "SUBSTRUCTURE",
    "Anomalies",
    "Jets",
    "UCluster",
    "baselines",
    "before_and_after",
    "chosen",
    "confusion",
    "convert",
    "dataset",
    "embedded",
    "embedding",
    "events",
]
__all__ += [
    "generate",
    "load",
    "masses",
    "network",
    "pairs",
    "provenance",
    "read",
    "silhouette",
    "table",
    "to_awkward",
    "worlds",
    "write",
]
__getattr__, __dir__ = face(__name__)
