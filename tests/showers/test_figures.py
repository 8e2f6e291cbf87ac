"""The page of a validation: its title is the result, and it can be kept. (As a picture: notebooks 10 and 11.)"""

from __future__ import annotations

import pytest

from labkit import plots
from labkit.showers import figures
from labkit.showers.gan import ShowerGAN
from labkit.showers.validation import validate
from tests.showers.helpers import data


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_it_can_be_kept_as_a_page_with_the_result_as_its_title(tmp_path):
    problem = ShowerGAN(data(300), batch_size=16)
    found = validate((problem, problem.new_module(0)), n=30, classifiers=[], bootstrap=2)
    page = plots.save(figures.page(found), tmp_path / "page.html").read_text()
    assert "Bokeh" in page and f"30 showers each; data: {found.data}" in page
    assert figures.headline(found).startswith("ShowerGAN: sampling fraction within ")
    assert f"separation of the total {found['separation total']:.3f}" in figures.headline(found)
    assert "within" in plots.save(figures.fractions({"a": found, "b": found}), tmp_path / "fractions.html").read_text()


def test_what_is_no_validation_is_refused():
    with pytest.raises(TypeError, match=r"found=5 must be what labkit\.showers\.validate returns"):
        figures.page(5)
    with pytest.raises(TypeError, match=r"found=\[\] must be a dict"):
        figures.fractions([])
