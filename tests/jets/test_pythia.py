"""Jets by Pythia and FastJet: peaks where they belong, the same jets again, files that are there stay; without them, which extra is missing.

Used by pytest.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from labkit.errors import ProblemError
from labkit.jets import pythia
from labkit.jets.files import SUBSTRUCTURE, load, provenance, write
from labkit.jets.pythia import PROCESSES, generate, settings_of
from tests.jets.helpers import sample


def of(jets, name):
    return jets.of_jet["substructure"][:, SUBSTRUCTURE.index(name)]


def peak(values, width=2.0):
    """The middle of the narrowest window with a third of all values."""
    values = np.sort(values)
    n = len(values) // 3
    at = (values[n:] - values[:-n]).argmin()
    return np.median(values[at : at + n])


def test_the_sample_has_its_peaks_and_quarks_fewer_particles_than_gluons():
    from sklearn.metrics import roc_auc_score

    jets = sample()
    own = {name: jets[jets.label == at] for at, name in enumerate(jets.classes)}
    assert abs(peak(of(own["W"], "trimmed")) - 80.4) < 2 and abs(peak(of(own["Z"], "trimmed")) - 91.2) < 2
    assert abs(peak(of(own["t"], "trimmed")) - 173) < 6
    both = np.concatenate([own["q"].of_jet["n"], own["g"].of_jet["n"]])
    assert roc_auc_score(np.arange(len(both)) >= len(own["q"]), both) > 0.75
    assert (of(jets, "trimmed") <= of(jets, "mass") + 0.5).all()
    for name in ("girth", "ptd", "leading", "tau21", "tau32"):
        assert of(jets, name).min() >= 0 and of(jets, name).max() < 1.5
    assert (
        of(own["t"], "tau32").mean() < of(own["q"], "tau32").mean() and of(own["W"], "tau21").mean() < of(own["g"], "tau21").mean()
    )


def test_without_pythia_it_says_which_extra_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pythia8mc", None)
    with pytest.raises(ProblemError, match=r'Pythia 8 and FastJet, which are not here.*pip install "labkit\[jets\]"'):
        generate(tmp_path, jets=10)


def test_what_cannot_be_made_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"preset='ful'.*Did you mean 'full'"):
        generate(tmp_path, preset="ful")
    with pytest.raises(ValueError, match="classes='H'"):
        generate(tmp_path, classes="WH")
    with pytest.raises(ValueError, match="give each class once"):
        generate(tmp_path, classes="WW")
    with pytest.raises(ValueError, match=r"mass=\(200, 10\) must be \(least, most\) in GeV"):
        generate(tmp_path, mass=(200, 10))
    assert not list(tmp_path.iterdir())
    assert "PartonLevel:ISR = off" in settings_of("W", "clean") and "PartonLevel:ISR = off" not in settings_of("W")
    assert set(PROCESSES) == set("qgWZt")


def test_a_folder_holds_the_jets_of_one_call_and_nothing_of_others(tmp_path, monkeypatch):
    calls, version = [], ["8.317"]

    def make(item):  # jets of the sample, as if Pythia had made them
        path, shard = item
        calls.append(write(path, sample()[: shard["jets"]], {**shard, "pythia8mc": version[0]}))
        return shard["jets"]

    monkeypatch.setattr(pythia, "_make", make)
    monkeypatch.setattr(pythia, "metadata", SimpleNamespace(version=lambda name: version[0], PackageNotFoundError=ImportError))
    how = {"jets": 20, "jets_per_file": 10}
    paths = generate(tmp_path, **how)
    assert generate(tmp_path, **how) == paths == calls
    with pytest.raises(ProblemError, match=r"has 1 files beyond the 1 that jets=10 fill, from jets-00001\.parquet on"):
        generate(tmp_path, jets=10, jets_per_file=10)
    version[0] = "8.318"
    with pytest.raises(ProblemError, match=r"jets of pythia8mc='8\.317', and pythia8mc='8\.318' is asked for"):
        generate(tmp_path, **how)
    pq.write_table(pa.table({"x": [1.0]}), paths[0])
    before = paths[0].read_bytes()
    with pytest.raises(ProblemError, match=r"jets-00000\.parquet is a Parquet file of others, and is not replaced"):
        generate(tmp_path, **how)
    assert paths[0].read_bytes() == before and len(calls) == 2


@pytest.mark.slow
def test_the_same_seed_makes_the_same_jets_here_and_by_a_lab_and_what_is_there_stays(tmp_path, lab):
    for name in ("pythia8mc", "fastjet", "vector"):
        pytest.importorskip(name, reason="needs labkit[jets]")
    how = {"jets": 90, "jets_per_file": 50, "classes": "gWt", "seed": 3}
    here = generate(tmp_path / "here", **how)
    there = generate(tmp_path / "there", lab, **how)
    jets = load(tmp_path / "here")
    assert [len(load(path)) for path in here] == [50, 40] and np.bincount(jets.label).tolist() == [30, 30, 30]
    np.testing.assert_array_equal(jets.constituents, load(tmp_path / "there").constituents)
    assert provenance(here[0])["settings"]["t"] == settings_of("t") and provenance(here[1])["events"]["W"] > 0
    before = [path.stat().st_mtime_ns for path in here]
    here[1].write_bytes(here[1].read_bytes()[:1000])  # as one that was broken off on a bad disk
    assert generate(tmp_path / "here", **how) == here
    assert here[0].stat().st_mtime_ns == before[0] and here[1].read_bytes() == there[1].read_bytes()
    assert len(load(generate(tmp_path / "two", jets=2, classes="gWt")[0])) == 2  # and one class has none
    with pytest.raises(ProblemError, match="jets of seed=3, and seed=4 is asked for"):
        generate(tmp_path / "here", **how | {"seed": 4})
