"""The trained network in a file, opened by torch or onnxruntime alone: `labkit/models/saved.py` by `Run.save`.

Used by pytest.
"""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import labkit
from labkit.errors import ProblemError
from tests.helpers import ended, net_with_statistics, problem
from tests.runs.test_old_records import FOLDER

pytestmark = pytest.mark.usefixtures("cache")
DIGITS = FOLDER / "format-2-agwu"
ALONE = """
import sys
import numpy as np
x = np.load(sys.argv[1])
if sys.argv[2].endswith(".onnx"):
    import onnxruntime
    session = onnxruntime.InferenceSession(sys.argv[2], providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert given.name == "x", given.name
    out = np.concatenate([session.run(None, {"x": part})[0] for part in (x[:1], x[1:])])
else:
    import torch
    program = torch.export.load(sys.argv[2]).module()
    out = torch.cat([program(torch.from_numpy(part)) for part in (x[:1], x[1:])]).detach().numpy()
assert "labkit" not in sys.modules
np.save(sys.argv[3], out)
"""


@pytest.fixture
def train(tmp_path_factory):
    with labkit.connect("threads", 1) as lab:
        yield lambda a_problem, **options: labkit.train(a_problem, lab, runs=tmp_path_factory.mktemp("runs"), **options)


def opened(path, x, tmp_path):
    """Its outputs, of one sample and of the others, in a process that knows nothing of labkit."""
    given, made = tmp_path / "x.npy", tmp_path / "outputs.npy"
    np.save(given, x)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, given, path, made], capture_output=True, text=True, timeout=100, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    return np.load(made)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [".pt2", ".onnx"])
def test_a_program_takes_raw_samples_in_plain_torch_and_in_onnxruntime(kind, tmp_path):
    if kind == ".onnx":
        pytest.importorskip("onnxruntime", reason="pip install 'labkit[onnx]'")
        pytest.importorskip("onnxscript", reason="pip install 'labkit[onnx]'")
    run = labkit.load_run(DIGITS)
    x = run.problem().dataset.raw(np.arange(7), "test").astype(np.float32)
    path = run.save(tmp_path / f"model{kind}")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    found = opened(path, x, tmp_path)
    np.testing.assert_allclose(found, run.model()(torch.from_numpy(x)).detach(), atol=1e-5)
    assert (found.argmax(1) == run.predict(x)).all()
    alone = run.save(tmp_path / f"alone{kind}", 0, normalised=False)
    x = run.problem().load(np.arange(5), "test")[0]
    np.testing.assert_allclose(opened(alone, x, tmp_path), run.model(0, normalised=False)(x).detach(), atol=1e-5)


def test_weights_are_loaded_by_plain_torch(train, tmp_path):
    run = ended(train(problem(net_with_statistics), passes=1))
    path = run.save(tmp_path / "weights.pt", normalised=False)
    other = net_with_statistics((1, 6, 6), 3).eval()
    other.load_state_dict(torch.load(path, weights_only=True))
    x = run.problem().load(np.arange(5), "test")[0]
    assert torch.equal(other(x), run.model(normalised=False)(x)) and torch.equal(other(x), run.model().network(x))
    run.save(path)
    run.model().load_state_dict(torch.load(path, weights_only=True))
    raw = torch.from_numpy(run.problem().dataset.raw(np.arange(5), "test"))
    made = {"torch": torch, "net": net_with_statistics((1, 6, 6), 3), "x": raw, "run": run}
    lines = inspect.cleandoc(labkit.Run.save.__doc__).split("of one input:\n")[1].split("\n\n")[0]
    exec(inspect.cleandoc(lines).replace("model.pt", str(path)), made)  # as the docstring says it
    assert torch.equal(made["outputs"], run.model()(raw)) and torch.equal(made["outputs"], other(run.model().normalise(raw)))


@pytest.mark.parametrize("name", ["weights.pth", "weights", "sub/weights.onnxx"])
def test_another_ending_is_refused_by_the_path_given_and_missing_folders_are_made(name, tmp_path):
    run = labkit.load_run(DIGITS)
    with pytest.raises(ValueError, match=rf"path='{tmp_path / name}' must end in .pt2, .onnx or .pt\."):
        run.save(tmp_path / name)
    assert not list(tmp_path.iterdir())
    assert run.save(tmp_path / "sub" / "folder" / "weights.pt").exists()


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnxscript" else found(name, *rest))
    with pytest.raises(ProblemError, match=r"by onnxscript, which is not here. pip install 'labkit\[onnx\]'"):
        labkit.load_run(DIGITS).save(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(1, 2)

    def forward(self, wide, age):
        return self.first(wide) + self.second(age)


class Branching(nn.Module):
    """Goes by the values of its samples, of which no program can be made."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(36, 3)

    def forward(self, x):
        x = self.layer(x.flatten(1))
        return x if x.sum() > 0 else -x


@pytest.mark.slow
def test_several_inputs_and_what_no_program_can_be_made_of(train, tmp_path):
    generator = np.random.default_rng(0)
    data = {"wide": generator.normal(3, 2, (60, 3)), "age": generator.normal(40, 9, (60, 1)), "label": np.arange(60) % 2}
    run = ended(train(labkit.Classifier(Two, data, batch_size=8, score_samples=10), passes=1))
    program = torch.export.load(run.save(tmp_path / "two.pt2")).module()
    x = tuple(
        torch.from_numpy(np.asarray(run.problem().dataset.raw(np.arange(5), "test", name))).float() for name in ("wide", "age")
    )
    torch.testing.assert_close(program(x), run.model()(x))
    run = ended(train(problem(lambda: Branching()), passes=1, name="branching"))
    with pytest.raises(ProblemError, match=r"saving as .pt2 \(the weights alone, as .pt, can be saved of each network\) raised"):
        run.save(tmp_path / "branching.pt2")
    assert not (tmp_path / "branching.pt2").exists()
