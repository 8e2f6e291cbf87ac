"""Cards: what the objects that users hold show of themselves below a notebook's cell, and numbers as people read them.

    Card        title, rows of names and values, a small curve, next calls: as HTML that brings all that it needs
    Carded      base of what has a card: an object says what is on it in `_card()`
    number      a number to three or four digits, the same in cards, tables and lines of text

A card has no script and no style sheet. Text has the colour of the page and lines are half transparent, so that it is read on a light
page and on a dark one; the curve is told in words to who cannot see it. In a terminal an object shows its `repr`.

Used by the classes that users hold, and by `labkit.tables`.
"""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

BLUE = "#3b82c4"  # of a curve: three times as bright or as dark as a white and as a black page
RULE = "1px solid rgba(128, 128, 128, 0.35)"
LINE = (160, 36)  # pixels of a curve
MOST = 12  # rows of a table, of which the first are shown


def number(value: float) -> str:
    """A number for people: 0.450, 1.084, 12.35, 1235, 0.0123, 1.20e-05; whole ones without a point; nothing for what is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, numbers.Integral) or not math.isfinite(value):
        return str(value)
    size = abs(float(value))
    if size == int(size) or size >= 999.95:
        return f"{value:.0f}" if size < 1e15 else f"{value:.3e}"
    if size < 1e-4:
        return f"{value:.2e}"
    return f"{value:#.4g}" if size >= 1 else f"{value:.3f}" if size >= 0.1 else f"{value:#.3g}"


def value_text(value: Any) -> str:
    """The value of a setting or a result, on one line."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, numbers.Integral):
        return f"{value:,}"
    if isinstance(value, numbers.Real):
        return number(value)
    if isinstance(value, Mapping):
        if "by_value" in value:
            return str(value["by_value"])
        return ", ".join(f"{name}: {value_text(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value))
    return str(value)


def settings_text(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as they were given: 0.01, not 0.0100."""
    return {name: f"{value:g}" if isinstance(value, float) else value_text(value) for name, value in settings.items()}


def call_text(name: str, settings: Mapping[str, Any]) -> str:
    """An object as the call that makes it: "AGWU(quality='raw')"."""
    given = [
        f"{key}={value['by_value'] if isinstance(value, Mapping) and 'by_value' in value else repr(value)}"
        for key, value in settings.items()
    ]
    return f"{name}({', '.join(given)})"


def rule_text(rule: Any) -> str:
    """An update or a partition as the call that makes it; one that does not store its settings by its class alone."""
    try:
        settings = {name: value for name, value in rule.config().items() if name != "name"}
    except Exception:
        return f"{type(rule).__name__}(...)"
    return call_text(type(rule).__name__, settings)


def rule_card(rule: Any, what: str, call: str) -> "Card":
    """Of an update or a partition: the name, the first line of its docstring, the settings."""
    settings = {name: value for name, value in rule.config().items() if name != "name"}
    about = (type(rule).__doc__ or "").strip().partition("\n")[0]
    return Card(f"{type(rule).__name__} ({what})", about, settings_text(settings), calls={call: f"uses this {what}"})


@dataclass(frozen=True)
class Line:
    """A small curve. `text` says what it shows, with its first and its last value."""

    values: Sequence[float]
    text: str

    def html(self) -> str:
        values = [float(value) for value in self.values if math.isfinite(value)]
        if len(values) < 2:
            return ""
        (width, height), low, high = LINE, min(values), max(values)
        x = [3 + at * (width - 6) / (len(values) - 1) for at in range(len(values))]
        y = [height - 4 - (value - low) / ((high - low) or 1) * (height - 8) for value in values]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        return (
            f'<svg role="img" aria-label="{escape(self.text)}" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
            f'<title>{escape(self.text)}</title><polyline points="{points}" fill="none" stroke="{BLUE}" stroke-width="2"/>'
            f'<circle cx="{x[-1]:.1f}" cy="{y[-1]:.1f}" r="3" fill="{BLUE}"/></svg>'
        )


@dataclass(frozen=True)
class Card:
    """What is shown of an object.

    title : what it is, in a few words.
    about : a sentence below it.
    rows : names and values.
    line : a small curve, with its text beside it.
    table : rows of one kind, each with the same names.
    calls : what to do next, by the calls: {"run.wait()": "waits until it has ended"}.
    """

    title: str
    about: str = ""
    rows: Mapping[str, Any] = field(default_factory=dict)
    line: Line | None = None
    table: Sequence[Mapping[str, Any]] = ()
    calls: Mapping[str, str] = field(default_factory=dict)

    def html(self) -> str:
        cell = f"text-align: left; padding: 2px 14px 2px 0; border: none; border-bottom: {RULE}; background: none"
        parts = [f'<div style="font-weight: 600">{escape(self.title)}</div>']
        if self.about:
            parts.append(f'<div style="opacity: 0.8">{escape(self.about)}</div>')
        if self.line and (drawn := self.line.html()):
            parts.append(
                f'<div style="display: flex; align-items: center; gap: 10px">{drawn}<span>{escape(self.line.text)}</span></div>'
            )
        if self.rows:
            rows = "".join(
                f'<tr style="background: none"><th scope="row" style="{cell}; font-weight: normal; opacity: 0.75">{escape(str(name))}</th>'
                f'<td style="{cell}">{escape(value_text(value))}</td></tr>'
                for name, value in self.rows.items()
            )
            parts.append(
                f'<table aria-label="{escape(self.title)}" style="border-collapse: collapse; margin: 4px 0">{rows}</table>'
            )
        if self.table:
            names = list(dict.fromkeys(name for row in self.table for name in row))
            head = "".join(f'<th scope="col" style="{cell}; font-weight: 600">{escape(str(name))}</th>' for name in names)
            body = "".join(
                '<tr style="background: none">'
                + "".join(f'<td style="{cell}">{escape(value_text(row[name]) if name in row else "")}</td>' for name in names)
                + "</tr>"
                for row in self.table[:MOST]
            )
            more = f'<div style="opacity: 0.8">and {len(self.table) - MOST} more</div>' if len(self.table) > MOST else ""
            parts.append(
                f'<table style="border-collapse: collapse; margin: 4px 0"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}'
            )
        if self.calls:
            calls = "".join(f"<li><code>{escape(call)}</code> {escape(what)}</li>" for call, what in self.calls.items())
            parts.append(f'<ul aria-label="next steps" style="margin: 4px 0; padding-left: 18px">{calls}</ul>')
        style = f"border: {RULE}; border-radius: 4px; padding: 8px 12px; max-width: 760px; line-height: 1.4; color: inherit"
        return f'<div role="group" aria-label="{escape(self.title)}" style="{style}">{"".join(parts)}</div>'


class Carded:
    """Base of what shows a card in a notebook; what it has on it is `_card()`."""

    def _card(self) -> Card:
        raise NotImplementedError

    def _repr_html_(self) -> str | None:
        try:
            return self._card().html()
        except Exception:  # a damaged run, a data set that is gone: its text says it
            return None


class Summary(dict):
    """A dict of results that is shown as lines of names and values, rounded for people; its values are exact."""

    def __repr__(self) -> str:
        wide = max(map(len, map(str, self)), default=0)
        return "\n".join(f"{name!s:{wide}}  {value_text(value)}" for name, value in self.items()) or "{}"

    def _repr_html_(self) -> str:
        return Card(str(self.get("name", "Summary")), rows=self).html()
