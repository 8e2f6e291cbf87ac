"""Data sets that are asked for their items: what they give is what is trained on, whatever is wrong is said with the number of the item."""

from __future__ import annotations

import importlib
import pickle
import random
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset
from torch.utils.data import Dataset as TorchDataset

from labkit.data import cache, items, open_dataset
from labkit.errors import DataError

pytestmark = pytest.mark.usefixtures("own_cache")
N = 30
X = torch.arange(N * 4.0).reshape(N, 4)
Y = torch.arange(N) % 3


class Mine(TorchDataset):
    """Items that a function makes of a number."""

    def __init__(self, item=lambda i: (X[i], Y[i]), n=N):
        self.item, self.n, self.asked = item, n, 0

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if not isinstance(i, int) or not 0 <= i < self.n:
            raise IndexError(i)
        self.asked += 1
        return self.item(i)


def make_nothing():
    return [][0]


def make_mine():
    return Mine(), Mine(lambda i: (-X[i], Y[i]), n=7)


def fields(data):
    return {name: (field.role, str(field.dtype), field.shape, field.n_values) for name, field in data.fields.items()}


X_IS, Y_IS = ("input", "float32", (4,), None), ("label", "int64", (), 3)
TRAIN = np.flatnonzero(~cache.hold_out(N))


def test_labels_of_many_lengths_end_in_what_losses_ignore():
    def item(i):
        return torch.arange(1, 3 + i % 4), torch.arange(1, 3 + i % 4) % 3

    data = open_dataset(Mine(item), pad=0)
    batch = data.batch(np.arange(6))
    assert ((batch["y"] == -100) == (batch["x"] == 0)).all() and (batch["y"] == -100).any()
    assert data.fields["y"][2:] == ("label", 3, (-100,))
    with pytest.raises(DataError, match=r"Give pad=0"):
        open_dataset(Mine(item))


def test_the_names_of_its_classes_are_taken():
    data = Mine()
    assert open_dataset(data).classes is None
    data.classes = ["cat", "dog", "fox"]
    assert open_dataset(data).classes == open_dataset(Subset(data, range(9))).classes == ["cat", "dog", "fox"]
    data.classes = ["cat", "dog"]  # of 3
    assert open_dataset(data).classes is None


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (lambda i: (X[i], Y[i]), {"x": X_IS, "y": Y_IS}),
        (lambda i: [X[i].double().numpy(), int(Y[i])], {"x": X_IS, "y": Y_IS}),
        (lambda i: (X[i], float(Y[i])), {"x": X_IS, "y": ("target", "float32", (), None)}),
        (lambda i: (X[i].bfloat16(), X[i, :2]), {"x": X_IS, "y": ("target", "float32", (2,), None)}),
        (lambda i: (X[i], torch.eye(3)[Y[i]]), {"x": X_IS, "y": ("target", "float32", (3,), None)}),
        (lambda i: (X[i], torch.eye(3, dtype=torch.long)[Y[i]]), {"x": X_IS, "y": ("target", "float32", (3,), None)}),
        (lambda i: (X[i].view(1, 2, 2), Y[i] * torch.ones(2, 2, dtype=int)), {
            "x": ("input", "float32", (1, 2, 2), None), "y": ("label", "int64", (2, 2), 3)}),
        (lambda i: ((X[i], i), Y[i]), {"x1": X_IS, "x2": ("input", "int64", (), None), "y": Y_IS}),
        (lambda i: ((X[i], X[i, :1]), Y[i]), {"x1": X_IS, "x2": ("input", "float32", (1,), None), "y": Y_IS}),
        (lambda i: (X[i], X[i, :1], Y[i]), {"x1": X_IS, "x2": ("input", "float32", (1,), None), "y": Y_IS}),
        (lambda i: ({"a": X[i], "ids": torch.arange(3)}, Y[i]), {"a": X_IS, "ids": ("input", "int64", (3,), None), "y": Y_IS}),
        (lambda i: {"label": Y[i], "image": X[i], "name": "no number"}, {"image": X_IS, "label": Y_IS}),
        (lambda i: (X[i], {"kind": Y[i], "size": X[i, 0]}), {
            "x": X_IS, "kind": Y_IS, "size": ("target", "float32", (), None)}),
        (lambda i: X[i], {"x": X_IS}),
        (lambda i: (X[i],), {"x": X_IS}),
    ],
)  # fmt: skip
def test_items_of_any_form_have_named_fields(item, expected):
    data = open_dataset(Mine(item))
    assert fields(data) == expected and "nothing is normalised" in data.note
    assert (data.n_train, data.n_test) == (27, 3) and data.held_out
    batch = data.batch([0, 5])
    for name in data.fields:
        assert batch[name].dtype == data.fields[name].dtype and batch[name].shape == (2, *data.fields[name].shape)
    np.testing.assert_array_equal(batch[data.inputs[0]].reshape(2, 4), X[TRAIN[[0, 5]]])
    if data.label:
        np.testing.assert_array_equal(data.labels(), Y[TRAIN])
        np.testing.assert_array_equal(data.labels("test"), Y[np.flatnonzero(cache.hold_out(N))])
    assert data.batch([])[data.inputs[0]].shape == (0, *data.shape)
    with pytest.raises(IndexError, match="samples 0 to 26"):
        data.batch([27])


def test_labels_that_the_set_holds_are_taken_where_they_are_those_of_its_items():
    held, wrong = Mine(), Mine(lambda i: (X[i], 2 - Y[i]))
    held.targets = wrong.targets = Y.tolist()
    np.testing.assert_array_equal(open_dataset(held).labels(), Y[TRAIN])
    assert held.asked < N
    np.testing.assert_array_equal(open_dataset(wrong).labels(), 2 - Y[TRAIN])
    for known in (
        TensorDataset(X, Y),
        Subset(TensorDataset(X.repeat(2, 1), Y.repeat(2)), range(N)),
        DataLoader(TensorDataset(X, Y)),
    ):
        data = open_dataset(known)
        np.testing.assert_array_equal(data.labels(), Y[TRAIN])
        np.testing.assert_array_equal(data.batch([3])["x"], X[TRAIN[[3]]])


def test_rows_as_dicts_and_two_splits():
    rows = [{"ids": list(range(i % 4 + 1)), "label": i % 2} for i in range(N)]
    with pytest.raises(DataError, match="ids have 1 to 4 entries"):
        open_dataset(rows)
    data = open_dataset({"train": rows, "test": rows[:5]}, pad=9)
    assert (data.n_train, data.n_test, data.shape) == (N, 5, (None,))
    np.testing.assert_array_equal(data.batch([0, 2])["ids"], [[0, 9, 9], [0, 1, 2]])
    pair = open_dataset((Mine(), Mine(n=7)))
    assert (pair.n_train, pair.n_test, pair.held_out) == (N, 7, False)
    with pytest.raises(DataError, match="split 'validation'"):
        open_dataset({"train": Mine(), "validation": Mine()})


def test_it_travels_by_value_or_is_made_where_it_is_used(monkeypatch):
    sent = pickle.dumps(open_dataset(TensorDataset(X, Y)))
    data = open_dataset(f"{__name__}:make_mine")
    assert (data.n_train, data.n_test) == (N, 7) and len(pickle.dumps(data)) < 3000
    monkeypatch.setattr(items, "_MADE", {})
    for again in (pickle.loads(sent), pickle.loads(pickle.dumps(data))):
        assert not items._MADE
        np.testing.assert_array_equal(again.batch([2])["x"][0], X[2 if again.n_test == 7 else TRAIN[2]])
        items._MADE.clear()
    np.testing.assert_array_equal(data.batch([2], "test")["x"][0], -X[2])
    assert data.reference == f"{__name__}:make_mine"
    regression = open_dataset(f"{__name__}:make_mine", target="y")
    assert open_dataset(regression.reference).fields == regression.fields and regression.n_classes is None
    monkeypatch.setitem(items._MADE, data.path, (make_mine, {"train": Mine(n=29), "test": Mine(n=7)}))
    with pytest.raises(DataError, match=r"has 29 items in the train split .* 30 where the problem comes from"):
        data.batch([0])
    large = TensorDataset(torch.zeros(3, 1 << 20))
    with pytest.raises(DataError, match=r"has 12.0 MiB, and by value at most 8 MiB travel.*my_module:make_my_set"):
        open_dataset(large)
    frame = sys._getframe()
    with pytest.raises(DataError, match=r"cannot travel.*my_module:make_my_set"):
        open_dataset(Mine(lambda i: (X[i], frame.f_lineno)))


def test_what_items_draw_is_seeded_by_batch_and_leaves_the_generators_alone():
    data = open_dataset(Mine(lambda i: (X[i] * 0 + random.random() + np.random.rand(), Y[i])))
    before = random.getstate(), np.random.get_state()[1].copy()
    with items.seeding(3):
        first = data.batch([0, 1])["x"]
    np.testing.assert_array_equal(data.batch([0, 1])["x"], data.batch([0, 1], "test")["x"])
    with items.seeding(3):
        np.testing.assert_array_equal(first, data.batch([0, 1])["x"])
    assert not np.array_equal(first, data.batch([0, 1])["x"]) and first[0, 0] != first[1, 0]
    assert before[0] == random.getstate() and np.array_equal(before[1], np.random.get_state()[1])


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (lambda i: (X[i], Y[i]) if i != 17 else 1 / 0, ["item 17 cannot be read", "ZeroDivisionError"]),
        (lambda i: (X[i], Y[i] - 1), ["is -1", "target='y'"]),
        (lambda i: (X[i], torch.tensor([[0, 100], [200, 300]])), ["y holds 4 different labels, 0 to 300", "numpy.unique"]),
        (lambda i: {"x": X[i], "y": Y[i]} if i != 17 else {"x": X[i]}, ["item 17 has no 'y'"]),
        (lambda i: (X[i], "cat"), ["y of item 0 is of type <U3"]),
        (lambda i: ("cat", Y[i]), ["nothing of an item is an input"]),
        (lambda i: (X[i], None), ["item 0", "NoneType"]),
        (
            lambda i: (X[i], torch.ones(2, 2, dtype=int) if i != 17 else torch.ones(2, 3, dtype=int)),
            ["item 17 has y of shape (2, 3)"],
        ),
    ],
)
def test_the_item_that_is_wrong_is_named(item, words):
    with pytest.raises(DataError) as caught:
        open_dataset(Mine(item))
    for word in words:
        assert word in str(caught.value)


def test_what_is_wrong_later_is_named_too():
    data = open_dataset(Mine(lambda i: (X[i] if i < 20 else X[i, :2], float(i)) if i != 17 else 1 / 0))
    at = int(np.flatnonzero(TRAIN == 17)[0])
    with pytest.raises(DataError, match="item 17 cannot be read: ZeroDivisionError"):
        data.batch([0, at])
    with pytest.raises(DataError, match=r"Mine: item 29 and others: samples of x have 2 to 4 entries .* pad=0"):
        data.batch([0, 26])


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda i: (X[i][:, None], Y[i]), r"Mine: item 28 has x of shape \(4, 1\), where \(4,\) is expected"),
        (lambda i: (1.0, Y[i]), r"Mine: item 28 has x of shape \(\), where \(4,\) is expected"),
        (lambda i: (X[i], "text"), "Mine: y of item 28 is of type <U4. Give numbers"),
        (lambda i: X[i], r"Mine: item 28 has x of shape \(\), where"),
        (lambda i: None, "Mine: item 28 has no 0, as the first one has"),
        (lambda i: 1 / 0, "Mine: item 28 cannot be read: ZeroDivisionError"),
    ],
)
def test_an_item_that_is_unlike_the_others_is_named_wherever_it_stands(bad, words):
    def item(i):
        return bad(i) if i == late else (X[i], float(Y[i]))

    late = -1
    data = open_dataset({"train": Mine(item), "test": Mine(item)}, target="y")
    late = N - 2
    for indices in ([late], [0, late, 3]):
        with pytest.raises(DataError, match=words):
            data.batch(indices)


def test_what_a_function_that_makes_a_data_set_raises_names_it():
    with pytest.raises(DataError, match=rf"data='{__name__}:make_nothing' raised IndexError: list index out of range"):
        open_dataset(f"{__name__}:make_nothing")


def test_what_is_no_data_set_by_items_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    for wrong in (Stream(), DataLoader(Stream())):
        with pytest.raises(DataError, match="no items by number"):
            open_dataset(wrong)
    for path, words in (("no_such_module:f", "no module"), (f"{__name__}:Mine2", "has no 'Mine2'"), (f"{__name__}:N", "no items")):
        with pytest.raises(DataError, match=words):
            open_dataset(path)
    with pytest.raises(DataError, match="the train split has 0 item"):
        open_dataset(Mine(n=0))
    with pytest.raises(ValueError, match="no option channels"):
        open_dataset(Mine(), channels="first")


def test_it_is_made_anew_when_its_module_was_loaded_again(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    text = "def made(): return [({'x': [FACTOR * i, 1.0], 'y': i % 2}) for i in range(20)]"
    (tmp_path / "items_edited.py").write_text(text.replace("FACTOR", "1.0"))
    data = open_dataset("items_edited:made")
    x = data.batch([3])["x"]
    (tmp_path / "items_edited.py").write_text(text.replace("FACTOR", "-2.00"))
    importlib.reload(sys.modules["items_edited"])
    np.testing.assert_array_equal(data.batch([3])["x"], x * [-2, 1])
    del sys.modules["items_edited"]
