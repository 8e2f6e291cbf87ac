"""The split into training and score samples: disjoint, complete, in proportion, always the same."""

from __future__ import annotations

import numpy as np
import pytest

from labkit.errors import ProblemError
from labkit.problems.splits import batches, first, fold, folds, hold_out, shuffled


@pytest.mark.parametrize(("n", "asked", "size"), [(2, 256, 1), (17, 256, 3), (1500, 256, 256), (1500, 7, 7)])
@pytest.mark.parametrize("labelled", [True, False])
def test_the_parts_are_disjoint_and_cover_everything(n, asked, size, labelled):
    labels = np.arange(n) % 3 if labelled else None
    train, score = hold_out(labels, n, asked)
    assert score.size == size
    assert np.array_equal(np.sort(np.concatenate([train, score])), np.arange(n))
    again = hold_out(labels, n, asked)
    assert np.array_equal(train, again[0]) and np.array_equal(score, again[1])


def test_the_score_set_has_each_class_in_proportion():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 5], [500, 300, 199, 1]))
    _, score = hold_out(labels, labels.size, 100)
    assert [int((labels[score] == label).sum()) for label in (0, 1, 2, 5)] == [50, 30, 20, 0]


def test_one_sample_cannot_be_split():
    with pytest.raises(ProblemError, match=r"1 training sample\(s\)"):
        hold_out(None, 1, 256)


def test_first_keeps_the_same_samples_for_all_runs():
    order = shuffled(17)
    assert np.array_equal(first("n", 5, order), shuffled(17)[:5]) and first("n", None, order).size == 17
    with pytest.raises(ProblemError, match=r"train_samples=18, but the data have 17 here. Use train_samples=None"):
        first("train_samples", 18, order, " here")


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 15, 16, 17, 31, 33, 49])
def test_batches_cover_everything_in_order_and_none_is_a_lone_sample(n, batch_size):
    parts = batches(np.arange(n), batch_size)
    assert np.array_equal(np.concatenate([*parts, np.arange(0)]), np.arange(n))
    assert all(len(part) == batch_size for part in parts[:-1])
    if n > 1 and batch_size > 1:
        assert all(1 < len(part) <= batch_size + 1 for part in parts)
    assert len(parts) <= -(-n // batch_size)
    if n % batch_size == 0:
        assert len(parts) == n // batch_size  # local_steps is the number of optimiser steps


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(("n", "n_folds"), [(100, 5), (17, 4), (17, 17), (5, 2)])
def test_the_folds_of_a_cross_validation_are_equal_and_hold_each_sample_once(n, n_folds, labelled):
    labels = np.random.default_rng(0).integers(4, size=n) if labelled else None
    parts = [fold(labels, np.arange(n), k, n_folds, 3) for k in range(n_folds)]
    assert np.array_equal(np.sort(np.concatenate([held for _, held in parts])), np.arange(n))
    assert np.ptp([len(held) for _, held in parts]) <= 1
    for train, held in parts:
        assert np.array_equal(np.sort(np.concatenate([train, held])), np.arange(n))
    for label in range(4 if labelled else 0):
        assert np.ptp([(labels[held] == label).sum() for _, held in parts]) <= 1
    assert np.array_equal(parts[0][1], fold(labels, np.arange(n), 0, n_folds, 3)[1])
    assert n != 100 or not np.array_equal(parts[0][1], fold(labels, np.arange(n), 0, n_folds, 4)[1])


def test_of_units_folds_are_whole_ones():
    unit = np.repeat(np.arange(7), [3, 9, 4, 4, 1, 30, 2])
    parts = [fold(np.arange(53) % 3, unit, k, 3)[1] for k in range(3)]
    assert sorted(np.concatenate(parts)) == list(range(53))
    assert sorted(len(set(unit[held])) for held in parts) == [2, 2, 3] and len(set(unit[parts[0]]) & set(unit[parts[1]])) == 0


def test_folds_cover_everything_once_and_hold_every_class():
    labels = np.random.default_rng(0).integers(3, size=100)
    of = folds(labels, 3)
    assert set(of) == {0, 1, 2} and np.ptp(np.bincount(of)) <= 3
    for label in range(3):
        assert np.ptp(np.bincount(of[labels == label], minlength=3)) <= 1


@pytest.mark.parametrize("labelled", [True, False])
def test_of_units_the_score_set_is_drawn_from_a_few_and_the_others_stay_whole(labelled):
    units = np.arange(0, 4001, 100)
    labels = np.arange(4000) % 3 if labelled else None
    train, score = hold_out(labels, 4000, 60, units)
    assert len(score) == 60 and np.array_equal(np.sort(np.concatenate([train, score])), np.arange(4000))
    assert 3 <= len({*(score // 100)}) <= 8
    assert np.count_nonzero(np.diff(train // 100)) == 39  # one unit after the other
    if labelled:
        assert np.bincount(score % 3).tolist() == [20, 20, 20]


def test_an_order_of_units_keeps_them_whole():
    order = shuffled(35, np.array([0, 10, 20, 35]))
    assert sorted(order) == list(range(35)) and np.count_nonzero(np.diff(order) != 1) <= 2
