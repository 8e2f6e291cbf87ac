"""The page of a gallery: what JSON and an element of a page cannot hold. tests/experiments/test_gallery.py has its rows."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd

from labkit.plots.gallery import Curve, Row, in_element, write

EVIL = "</script><!--&amp;\u2028"


def test_json_in_an_element_is_the_same_and_ends_none():
    text = in_element([EVIL])
    assert json.loads(text) == [EVIL] and not {*"<>&"} & {*text}


def test_curves_are_thinned_and_have_their_ends():
    n = 1000
    curve = Curve(pd.DataFrame({name: np.arange(n) for name in ("seconds", "samples", "score")} | {"loss": np.nan}))
    thin = curve.as_json()
    assert len(thin["seconds"]) == 60 and (thin["seconds"][0], thin["seconds"][-1]) == (0, n - 1) and set(thin["loss"]) == {None}


def test_values_of_any_kind_can_be_shown_and_links_name_no_scheme(tmp_path):
    links = {"notebook": tmp_path / "javascript:alert(1).ipynb"}
    row = Row("x\ud800", "done", {"a": [1, 2], "b": True, "c": float("inf"), "d": 2**70}, {"e": None}, links=links)
    text = write(tmp_path / "page.html", "title", "", [row]).read_text()
    assert '"values":["[1, 2]"]' in text and '"values":["yes"]' in text and '"values":[null]' in text and '"name":"e"' not in text
    assert '"href":"./javascript%3Aalert%281%29.ipynb"' in text
