"""Trained subnets to disk and back: same predictions; what is damaged, foreign or of another shape is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import labkit
from labkit.errors import ProblemError, RunError
from labkit.runs import checkpoints
from labkit.runs.config import FORMAT
from labkit.runs.files import read_json
from labkit.subnets.decomposition import Decomposition
from labkit.subnets.result import BASELINES, NAMES
from tests.subnets.helpers import data, net, problem, same, weights

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize(
    ("inputs", "model"), [("probabilities", "lenet"), ("logits", net), pytest.param("features", "resnet20", marks=pytest.mark.slow)]
)
def test_predictions_are_the_same_after_the_way_to_disk(inputs, model, train, tmp_path):
    a_problem = problem(model, model_args={"width": 0.2}, data=data(shape=(1, 12, 12)), precision="bfloat16")
    joined = train(a_problem, Decomposition((2, 2), 1), inputs=inputs, baselines=["transfer", "small"], epochs=1)
    test = a_problem.test_indices()
    images, answers = a_problem.dataset.raw(test, "test"), a_problem.dataset.labels("test")[test]
    for again in (labkit.load_subnets(tmp_path / "joined"), labkit.load_subnets(joined.save(tmp_path / "new" / "folder"))):
        for by, model in (NAMES | {baseline: BASELINES[baseline] for baseline in ("small", "transfer")}).items():
            assert np.array_equal(joined.scores(images, by), again.scores(images, by))
            assert (again.predict(images, by) == answers).mean() == pytest.approx(again.table().accuracy[model])
        assert again.summary() == joined.summary() and again.parts().equals(joined.parts())
        assert same(weights(joined), weights(again))
    np.testing.assert_allclose([joined.scores(images, by).sum(1) for by in ("coarse", "transfer", "small")], 1, rtol=1e-5)
    assert not np.array_equal(joined.scores(images), joined.scores(images, "transfer"))
    assert joined.predict(images[:0]).shape == (0,)


def test_what_was_damaged_mixed_or_is_something_else_is_refused(train, tmp_path):
    joined = train(baselines=["global"])
    joined.save(tmp_path / "copy")
    for number in (0, 1):  # the subnets, and their baseline
        file = checkpoints.file_of(tmp_path / "copy", number)
        whole = file.read_bytes()
        for content, message in (
            (checkpoints.file_of(tmp_path / "joined", number).read_bytes(), "belongs to another run"),
            (whole[:-40], "is damaged"),
            (b"\x80\x04pickle", "is no checkpoint of labkit"),
        ):
            file.write_bytes(content)
            with pytest.raises(RunError, match=message):
                labkit.load_subnets(tmp_path / "copy")
        file.write_bytes(whole)
    config = read_json(tmp_path / "copy" / "config.json")
    for change, message in (
        ({"what": "run"}, "does not hold subnets"),
        ({"format": 99}, "by a later labkit"),
        ({"rows": None}, ""),
        ({"problem": None}, "lacks problem"),
        ({"centre": None}, "lacks centre: it is damaged"),
        ({"baselines": ["globl"]}, "Did you mean 'global'"),
        ({"baselines": ["small"]}, "weights for a model of"),
        ({"decomposition": {"grid": [20, 2]}}, "does not describe subnets"),
        ({"problem": config["problem"] | {"model": {"by_value": "net"}}}, r"'net' was written in a notebook.*model="),
    ):
        changed = {key: value for key, value in (config | change).items() if value is not None}
        (tmp_path / "copy" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(RunError, match=message or "did not end"):
            labkit.load_subnets(tmp_path / "copy")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(RunError, match="holds something else"):
        joined.save(tmp_path / "run")


def test_subnets_of_before_the_word_was_changed_are_read(train, tmp_path):
    joined = train(baselines=["small"], epochs=1)
    config = read_json(tmp_path / "joined" / "config.json")
    assert config["format"] == FORMAT and "rivals" not in config
    config |= {"format": 2, "rivals": config.pop("baselines")}
    (tmp_path / "joined" / "config.json").write_text(json.dumps(config))
    again, images = labkit.load_subnets(tmp_path / "joined"), data(5)[0]
    assert np.array_equal(again.scores(images, "small"), joined.scores(images, "small")) and again.table().equals(joined.table())
    again.save(tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["format"] == FORMAT and config["baselines"] == ["small"] and "rivals" not in config
    assert list(labkit.load_subnets(tmp_path / "new").baselines) == ["small"]


def test_a_model_of_a_notebook_is_given_again(train, tmp_path):
    joined = train(problem(lambda shape, n_classes, width=1.0: net(shape, n_classes, width)))
    with pytest.raises(RunError, match="was written in a notebook"):
        labkit.load_subnets(tmp_path / "joined")
    images = data(5)[0]
    assert np.array_equal(labkit.load_subnets(tmp_path / "joined", model=net).scores(images), joined.scores(images))


def test_raw_images_in_any_layout_are_predicted_measured_and_taken_by_the_whole_model(train, tmp_path):
    joined = train(epochs=1, baselines=["small"])
    images, y = data(40)
    for given in (images[:, 0], torch.from_numpy(images), images.tolist()):
        assert np.array_equal(joined.predict(given), joined.predict(images))
    assert joined.evaluate((images, y)) == {"score": (joined.predict(images) == y).mean(), "samples": 40}
    for by in ("coarse", "small"):
        logits = joined.model(by)(torch.from_numpy(images))
        assert np.allclose(logits.softmax(1).detach().numpy(), joined.predict_proba(images, by), atol=1e-6)
    with pytest.raises(ValueError, match="Votes are no network"):
        joined.model("majority")


def test_images_of_another_shape_are_refused(train):
    joined = train(epochs=1, baselines=["small"])
    with pytest.raises(ProblemError, match=r"images has shape \(3, 8, 7\); this network needs \(n, 1, 8, 8\)"):
        joined.predict(np.zeros((3, 8, 7)))
    for wrong in (np.full((3, 1, 8, 8), np.nan), np.full((3, 1, 8, 8), "a"), np.full((3, 1, 8, 8), None)):
        with pytest.raises(ProblemError, match=r"images (of .* were given that are not all finite numbers|is of type object)"):
            joined.predict(wrong)
    for by in ("vote", "transfer"):
        with pytest.raises(ValueError, match=rf"by='{by}' is not known. Known: coarse, average, majority, small. .* be trained"):
            joined.predict(np.zeros((3, 1, 8, 8)), by=by)
