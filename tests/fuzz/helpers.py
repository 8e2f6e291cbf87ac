"""How much is tried: a few examples, always the same, in `make test`; more, the same too, in `make test-all`; in `make fuzz` many
times as many, by a seed that is printed.

Used by the tests in this folder.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, settings

NIGHTLY = int(os.environ.get("LABKIT_FUZZ") or 0)  # how many times as many examples as in `make test-all`; set by `make fuzz`
LIMIT = pytest.mark.timeout(7200 if NIGHTLY else 400)


def fuzzed(examples: int, steps: int = 30) -> settings:
    """Settings for so many examples, of so many steps each where they are of a state machine."""
    common = {"deadline": None, "suppress_health_check": list(HealthCheck), "stateful_step_count": steps, "print_blob": True}
    common |= {"phases": set(Phase) - {Phase.explain}, "report_multiple_bugs": False}  # either takes minutes
    if NIGHTLY:  # what has failed is in .hypothesis, and is tried first the next time
        return settings(max_examples=examples * NIGHTLY, **common)
    return settings(max_examples=examples, derandomize=True, database=None, **common)


def few_or_many(few: int, many: int) -> pytest.MarkDecorator:
    """An argument `examples` of a test: few, and, in a slow one, many."""
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.slow)])
