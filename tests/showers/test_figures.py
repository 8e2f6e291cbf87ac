"""The page of a validation: its title is the result, and it can be kept. (As a picture: notebooks 10 and 11.)"""

from __future__ import annotations

import pytest

from labkit.showers import figures
from labkit.showers.gan import ShowerGAN
from labkit.showers.validation import validate
from tests.showers.helpers import data


@pytest.mark.usefixtures("cache")
def test_the_title_is_the_result():
    problem = ShowerGAN(data(300))
    found = validate((problem, problem.new_module(0)), n=20, classifiers=[], bootstrap=2)
    assert figures.headline(found).startswith("ShowerGAN: sampling fraction within ")
    assert f"separation of the total {found['separation total']:.3f}" in figures.headline(found)
    assert len(figures.page(found)) == 5 and figures.fractions({"a": found, "b": found})


def test_what_is_no_validation_is_refused():
    with pytest.raises(TypeError, match=r"found=5 must be what labkit\.showers\.validate returns"):
        figures.page(5)
    with pytest.raises(TypeError, match=r"found=\[\] must be a dict"):
        figures.fractions([])
