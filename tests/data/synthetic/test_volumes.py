"""Generated volumes, those of `phantom.py` too: the same seed gives the same patients, what is generated
is declared, and the classes differ in nothing but the shape of what was added."""

from __future__ import annotations

import numpy as np
import pytest

from labkit.data import open_dataset
from tests.data.synthetic.helpers import SMALL, accuracy_of_counts, volumes

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("name", ["chest-phantom", "head-lesions"])
def test_volumes_are_generated_balanced_with_a_note(name, little_ct):
    data = open_dataset(name, n=27, size=SMALL)
    assert (data.name, data.shape, data.n_classes, data.synthetic) == (name, (1, *SMALL), 2, True)
    assert (data.n_train, data.n_test) == (22, 5)
    assert ("is synthetic" if name == "chest-phantom" else "is semi-synthetic") in data.note
    for split in ("train", "test"):
        x, y = volumes(data, split)
        assert abs(int(y.sum()) * 2 - len(y)) <= 1
        assert x.min() >= 0 and x.max() <= 1 and x.std() > 0.1
        assert len({volume.tobytes() for volume in x}) == len(x)
    again = open_dataset(data.path)
    assert again.synthetic and again.note == data.note  # as the record of a run names it


@pytest.mark.parametrize("name", ["chest-phantom", "head-lesions"])
def test_a_patient_depends_on_seed_and_number_alone(name, little_ct):
    one, more = open_dataset(name, n=20, size=SMALL), open_dataset(name, n=22, size=SMALL)
    for split, n in (("train", 16), ("test", 4)):
        np.testing.assert_array_equal(one.raw(np.arange(n), split), more.raw(np.arange(n), split))
        np.testing.assert_array_equal(one.labels(split), more.labels(split)[:n])
    other = open_dataset(name, n=20, size=SMALL, seed=1)
    assert not np.array_equal(other.raw([0]), one.raw([0])) and open_dataset(name, n=20, size=SMALL).path == one.path


def test_what_is_asked_of_volumes_is_checked():
    for options, words in [
        ({"n": 19}, "n=19"),
        ({"n": 40.5}, "n=40.5"),
        ({"n": True}, "n=True"),
        ({"size": (8, 64, 64)}, "16 at least"),
        ({"size": (64, 64)}, "(depth, height, width)"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": None}, "seed=None"),
        ({"passes": 3}, "It has n, size, seed"),
    ]:
        for name in ("chest-phantom", "head-lesions"):
            with pytest.raises(ValueError) as caught:
                open_dataset(name, **options)
            assert words in str(caught.value)


@pytest.fixture(scope="module")
def chests(tmp_path_factory):
    """So many that a difference between the classes would be seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABKIT_CACHE", str(tmp_path_factory.mktemp("chests")))
        return open_dataset("chest-phantom", n=200, size=SMALL)


@pytest.mark.slow
def test_both_classes_get_the_same_in_sum(chests):
    """Lesions or vessels: mean and spread of the classes agree within their errors."""
    x, y = volumes(chests)
    for of in (x.mean(axis=(1, 2, 3, 4)), x.std(axis=(1, 2, 3, 4))):
        apart = abs(of[y == 0].mean() - of[y == 1].mean())
        assert apart < 3 * of.std() * np.sqrt(4 / len(y))


def test_counting_bright_voxels_does_not_solve_it(chests):
    assert accuracy_of_counts(chests) < 0.75


@pytest.mark.slow  # lesions of the same kind
def test_counting_bright_voxels_does_not_solve_it_in_heads(little_ct):
    assert accuracy_of_counts(open_dataset("head-lesions", n=300, size=SMALL)) < 0.75
