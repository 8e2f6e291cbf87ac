"""Cards of objects: in words and numbers of people, readable on a light and on a dark page, and with nothing from elsewhere."""

from __future__ import annotations

import math
from html.parser import HTMLParser

import numpy as np
import pytest
from torch import nn

import labkit
from labkit.cards import Card, Line, Summary, number, value_text
from tests.helpers import data, net


class Page(HTMLParser):
    """Tags, attributes and text; fails where a tag is closed that is not open."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag not in ("polyline", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += f"{text} "


def card_of(thing):
    """The card of an object, looked over: it needs nothing from elsewhere, and fits both themes."""
    html = thing._repr_html_()
    assert not any(word in html for word in ("src=", "href=", "<script", "<style", "@import", "url(")), html
    assert "color: inherit" in html and "background: #" not in html and "background: white" not in html
    page = Page(html)
    first = page.attributes[0][1]
    assert first["role"] == "group" and first["aria-label"]
    assert all(own.get("aria-label") for tag, own in page.attributes if tag == "svg")
    return page.text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.44999999807907104, "0.450"),
        (1.0843474864959717, "1.084"),
        (12.3456, "12.35"),
        (11408.04901235872, "11408"),
        (0.0123456, "0.0123"),
        (1.2e-5, "1.20e-05"),
        (3.0, "3"),
        (np.int64(7), "7"),
        (math.nan, ""),
        (None, ""),
        (math.inf, "inf"),
    ],
)
def test_numbers_are_rounded_for_people(value, text):
    assert number(value) == text


def test_values_in_words():
    assert value_text({"lr": 0.25, "by": None}) == "lr: 0.250, by: none" and value_text([1, True]) == "1, yes"
    assert value_text(12345) == "12,345" and value_text({"by_value": "my_net"}) == "my_net"


def test_what_is_not_html_in_a_name_stays_text():
    html = Card("<b>&", rows={"<i>": "<script>"}, calls={"a<b": ""}, line=Line([1, 2], '"quoted"')).html()
    assert "<b>" not in html and "<script>" not in html and "&quot;quoted&quot;" in html
    assert "<svg" not in Card("", line=Line([1.0, math.nan], "one point is no line")).html()


def test_a_summary_is_a_dict():
    summary = Summary(name="a", score=0.123456789)
    assert summary == {"name": "a", "score": 0.123456789} and isinstance(summary, dict)
    assert repr(summary) == "name   a\nscore  0.123"


def test_rules_problems_and_data_say_what_they_are(cache):
    assert repr(labkit.AGWU(quality="raw")) == "AGWU(quality='raw')" and "quality raw" in " ".join(
        card_of(labkit.AGWU("raw")).split()
    )
    assert repr(labkit.IDPA(batches=4)).startswith("IDPA(batches=4, ") and "batches 4" in " ".join(card_of(labkit.IDPA(4)).split())
    a_problem = labkit.Classifier(net, data(), batch_size=16, lr=0.01)
    assert repr(a_problem) == "Classifier(model='tests.helpers:net', data='arrays', batch_size=16, lr=0.01)"
    text = " ".join(card_of(a_problem).split())
    assert "batch_size 16" in text and "lr 0.01" in text and "momentum" not in text and "labkit.train(problem, lab)" in text
    assert "training samples 207" in " ".join(card_of(a_problem.dataset).split())
    assert "4: 2 rows x 2 columns" in card_of(labkit.Decomposition((2, 2), 3))


def test_a_problem_that_is_not_opened_is_shown_without_opening_it():
    unknown = labkit.Classifier("lenet", "/no/such/folder")
    assert "/no/such/folder" in repr(unknown) and "/no/such/folder" in card_of(unknown)


class Forgetful(labkit.Problem):
    """Stores nothing that it was given."""

    def __init__(self, data, width):
        super().__init__(data)

    def build(self, seed):
        return nn.Linear(2, 2)


def test_what_cannot_be_shown_is_shown_as_text():
    forgetful = Forgetful("digits", width=3)
    assert repr(forgetful) == "Forgetful(...)" and forgetful._repr_html_() is None
