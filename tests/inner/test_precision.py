"""What a worker computes in: layers that are slow or wrong in bfloat16 are found, named and kept in float32, and nothing else changes.

Measured times are faked, so that it holds on hosts with and without instructions for bfloat16; errors are measured.
"""

from __future__ import annotations

import copy
import pickle
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import labkit
from labkit.inner import precision
from labkit.inner.precision import Found, Mode, Precision, choose, compare, keep, layers_of, native
from labkit.problems import Classifier
from labkit.runs.events import read_rows
from labkit.training import supervisor
from labkit.training.evaluation import as_recorded
from tests.helpers import until

FLOAT, LAST, HALF = Mode("float32", False), Mode("float32", True), Mode("bfloat16", True)
FINE = {"output": 0.01, "weight gradient": 0.02}


class Net(nn.Module):
    def __init__(self, shape=(3, 8, 8), n_classes=4):
        super().__init__()
        self.stem = nn.Conv2d(shape[0], 8, 3, padding=1)
        self.stage = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8))
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, n_classes)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.up(self.stage(self.stem(x))).mean((2, 3)))


def layers(net=None, n=5):
    net = net or Net()
    return layers_of(net, lambda: net(torch.zeros(n, 3, 8, 8)))


@pytest.fixture
def host(monkeypatch):
    """A host with instructions for bfloat16, where each layer takes these seconds in each mode, with these errors in bfloat16."""
    seconds, errors = {FLOAT: 1.0, LAST: 0.8, HALF: 0.2, Mode("bfloat16", False): 0.3}, {}
    slow = {}  # by a setting of the layer that it has

    def fake(layer, modes, timed=True):
        key = next((key for key in slow if key in str(layer)), None)
        own = {mode: seconds[mode] * (slow[key] if mode.dtype == "bfloat16" and key else 1) for mode in modes}
        wrong = next((errors[key] for key in errors if key in str(layer)), {})
        return {mode: Found(own[mode], FINE | (wrong if mode.dtype == "bfloat16" else {})) for mode in modes}

    monkeypatch.setattr(precision, "compare", fake)
    monkeypatch.setattr(precision, "native", lambda device="cpu": (True, "AMX"))
    return {"seconds": seconds, "slow": slow, "errors": errors}


# -- what is measured --------------------------------------------------------------------------------------------------


def test_layers_are_those_that_are_called_with_what_their_speed_depends_on():
    net = Net()
    found = layers(net)
    assert list(found) == ["stem", "stage.0", "stage.2", "up", "head"]
    assert found["stem"].shape == (5, 3, 8, 8) and not found["stem"].has_input_gradient and found["head"].has_input_gradient
    assert found["stage.0"] == found["stage.2"] != found["stem"] and str(found["stage.0"]) == "Conv2d, groups=8"
    assert str(found["up"]) == "ConvTranspose2d, stride=2" and str(found["head"]) == "Linear"
    assert str(layers_of(odd := nn.Conv2d(1, 1, 3, stride=(2, 1), dilation=2), lambda: odd(torch.zeros(1, 1, 9, 9)))[""]) == (
        "Conv2d, stride=(2, 1), dilation=2"
    )
    (named,) = layers_of(
        linear := nn.Linear(3, 2), lambda: [linear(torch.zeros(n, 3, 3, 3)) for n in (2, 1)] + [linear(input=torch.zeros(4, 3))]
    ).values()
    assert named.shape == (2, 3, 3, 3)  # the largest
    assert not any(part._forward_pre_hooks for part in [*net.modules(), linear])


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(40, 8), (6, 40)),
        (nn.Conv1d(4, 6, 3, bias=False), (3, 4, 20)),
        (nn.Conv2d(8, 16, 3, stride=3, dilation=2, padding="valid"), (4, 8, 16, 16)),
        (nn.Conv2d(8, 8, 3, groups=4, padding=1, padding_mode="circular"), (4, 8, 9, 9)),
        (nn.Conv3d(2, 4, 3, stride=2), (2, 2, 7, 7, 7)),
        (nn.ConvTranspose2d(8, 4, 3, stride=2, output_padding=1, groups=2), (2, 8, 6, 6)),
    ],
)
def test_what_rounding_does_is_no_error_and_the_layer_stays_as_it_is(layer, shape):
    x = torch.zeros(shape, requires_grad=True)
    before, random = {name: value.clone() for name, value in layer.state_dict().items()}, torch.get_rng_state()
    found = compare(layers_of(layer, lambda: layer(x))[""], (FLOAT, LAST, HALF), timed=False)
    names = {"output", "input gradient", *(f"{name} gradient" for name, _ in layer.named_parameters())}
    for mode in found:
        assert found[mode].errors.keys() == names and np.isnan(found[mode].seconds)
    assert max(found[LAST].errors.values()) < 1e-4 and 1e-3 < max(found[HALF].errors.values()) < precision.WRONG / 3
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_a_layer_is_measured_once_in_a_process_and_timed_in_turns(monkeypatch):
    order = []
    monkeypatch.setattr(precision, "_compared", {})
    monkeypatch.setattr(precision, "_seconds", lambda call, device: order.append(call.args[-1]) or float(len(order)))
    layer = layers()["head"]
    found = compare(layer, (FLOAT, HALF))
    assert order == [FLOAT, HALF] * (len(order) // 2) and order
    assert found[HALF].seconds == found[FLOAT].seconds + 1  # medians
    assert compare(layer, (FLOAT, HALF)) is found


def broken(monkeypatch, change):
    """A torch whose grouped convolutions are wrong in bfloat16."""
    forward = nn.Conv2d.forward

    def wrong(self, x):
        out = forward(self, x)
        return change(out) if torch.is_autocast_enabled("cpu") and self.groups > 1 else out

    monkeypatch.setattr(precision, "_compared", {})
    monkeypatch.setattr(nn.Conv2d, "forward", wrong)


def one_pixel(out):
    mask = torch.ones_like(out)
    mask[0, 0, 0, 0] = -1
    return out * mask


@pytest.mark.parametrize("change", [one_pixel, lambda out: out * torch.nan, lambda out: out + (2 * out - (2 * out).detach())])
def test_what_is_wrong_is_found_also_in_one_pixel_or_the_gradient_alone(change, monkeypatch):
    broken(monkeypatch, change)
    found = choose(layers(), "bfloat16")
    assert found.dtype == "bfloat16" and list(found.float32) == ["stage.0", "stage.2"]
    assert "stage.0, stage.2 (Conv2d, groups=8) stay in float32: bfloat16 makes its " in found.lines()[-1]


# -- what is decided ---------------------------------------------------------------------------------------------------


def test_a_slow_layer_stays_in_float32_by_name_with_the_numbers(host):
    host["slow"]["groups"] = 24.4
    found = choose(layers(), "auto")
    assert found.dtype == "bfloat16" and found.channels_last and list(found.float32) == ["stage.0", "stage.2"]
    assert found.lines() == [
        "bfloat16, channels last: 1.8x as fast as float32 (AMX)",  # 5 x 0.8 s against 2 x 0.8 + 3 x 0.2
        "stage.0, stage.2 (Conv2d, groups=8) stay in float32: bfloat16 takes 6.1x as long",
    ]
    host["slow"]["groups"], host["slow"]["Transpose"] = 1, 5
    (line,) = choose(layers(), "auto").lines()[1:]
    assert line == "up (ConvTranspose2d, stride=2) stays in float32: bfloat16 takes 1.2x as long"


def test_a_layer_that_hardly_counts_is_worth_no_line(host):
    host["slow"]["Linear"] = 4.05
    assert choose(layers(), "auto").float32 == {}


def test_a_quick_layer_that_is_wrong_stays_in_float32(host):
    host["errors"]["Linear"] = {"weight gradient": 0.8}
    for asked in ("auto", "bfloat16"):
        *_, line = choose(layers(), asked).lines()
        assert line == "head (Linear) stays in float32: bfloat16 makes its weight gradient wrong, by 0.8 of its size"


def test_where_it_is_no_quicker_all_stays_in_float32_in_the_quicker_layout(host):
    host["seconds"][HALF] = 0.79
    found = choose(layers(), "auto")
    assert (found.dtype, found.channels_last, found.float32) == ("float32", True, {})
    assert found.lines() == ["float32, channels last: bfloat16 is no quicker here (layers take 0.99x as long)"]
    host["seconds"] |= {LAST: 0.99, HALF: 0.98}
    assert not choose(layers(), "auto").channels_last and choose(layers(), "auto", channels_last=True).channels_last


def test_a_host_without_instructions_keeps_float32_in_one_line(host, monkeypatch):
    monkeypatch.setattr(precision, "native", lambda device="cpu": (False, "AVX2"))
    found = choose(layers(), "auto")
    assert found.lines() == ["float32, channels last: AVX2 has no instructions for bfloat16"]
    (line,) = choose(layers(), "bfloat16").lines()
    assert line.startswith("bfloat16: as asked, though AVX2 has no instructions for it; precision='auto' would")
    host["seconds"].clear()  # nothing needs to be measured
    tokens = layers_of(linear := nn.Linear(3, 2), lambda: linear(torch.zeros(2, 3, 3, 3)))
    for some in ({}, {"head": layers()["head"]}, tokens):
        assert choose(some, "auto").lines() == ["float32: AVX2 has no instructions for bfloat16"]


def test_instruction_sets_are_what_torch_says(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for found in ({}, {"avx2": True}, {"avx512_bf16": True, "amx_tile": False}, {"amx_tile": True, "amx_bf16": True}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        able, what = native()
        assert able == ("avx512_bf16" in found or "amx_bf16" in found) and what.startswith("AVX512")
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as before torch 2.10
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert native() == (True, "AVX512, avx512_bf16")


# -- what is kept ------------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def dtypes(net):
    """Of the outputs of its layers under autocast, by name."""
    found, parts = {}, {name: part for name, part in net.named_modules() if isinstance(part, (nn.Conv2d, nn.Linear))}
    hooks = [
        part.register_forward_hook(lambda *call, name=name: found.update({name: call[2].dtype})) for name, part in parts.items()
    ]
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.zeros(2, 3, 8, 8)).sum().backward()
    for hook in hooks:
        hook.remove()
    return {name.removeprefix("module."): dtype for name, dtype in found.items()}


@pytest.mark.parametrize("change", [lambda net: net, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), Wrapped])
def test_a_layer_stays_in_float32_through_copies_and_wrappers(change):
    net = Net()
    before = copy.deepcopy(net)
    keep(net, ["stage.2", "head"])
    keep(net, ["head"])  # twice is fine
    changed = change(net)
    assert dtypes(changed) == {
        **dict.fromkeys(["stem", "stage.0"], torch.bfloat16),
        **dict.fromkeys(["stage.2", "head"], torch.float32),
    }
    assert set(dtypes(before).values()) == {torch.bfloat16} and net.state_dict().keys() == before.state_dict().keys()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(net(x), before(x))
    if changed is not net and not isinstance(changed, Wrapped):  # the copy computes with its own weights
        with torch.no_grad():
            changed.head.weight.zero_()
        assert net.head.weight.any() and torch.equal(changed(x)[0], changed.head.bias)


def test_layers_of_float64_and_with_a_forward_of_their_own_stay_what_they_are():
    net = Net()
    net.head = net.head.double()
    own = net.stem.forward
    net.stem.forward = lambda x: own(x) + 1
    x = torch.randn(2, 3, 8, 8)
    right = net.stem(x)
    keep(net, ["stem", "head"])
    keep(net, ["stem"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net.stem(x), right) and net(x).dtype == torch.float64


def images(n=120):
    y = np.arange(n) % 4
    x = np.random.default_rng(0).normal(size=(n, 3, 8, 8)).astype(np.float32)
    x[np.arange(n), 0, y] += 2
    return x, y


def net(shape, n_classes):
    return Net(shape, n_classes)


@pytest.fixture
def problem(cache):
    return Classifier(net, images(), batch_size=16, score_samples=20, precision="auto")


def test_a_problem_is_decided_by_a_step_of_its_own_and_stays_as_it_is(host, problem):
    host["slow"]["Linear"] = 10
    config, random = problem.config(), torch.get_rng_state()
    found = problem.choose_precision(0)
    assert found.dtype == "bfloat16" and list(found.float32) == ["head"] and torch.equal(random, torch.get_rng_state())
    ours = problem.in_precision(found)
    assert (ours.precision, ours.channels_last) == ("bfloat16", True) and problem.config() == config
    assert ours.load(np.arange(2))[0].stride(1) == 1 and problem.load(np.arange(2))[0].stride(1) == 64
    with problem.autocast(torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")  # "auto" beyond a worker is float32
    assert Classifier(net, images(), precision="float32").choose_precision(0) is None


def test_a_decision_that_was_recorded_for_such_a_host_holds(host, problem, monkeypatch):
    first = problem.choose_precision(0)
    monkeypatch.setattr("labkit.problems.problem.choose", lambda *_: Precision("float32", why="measured anew"))
    elsewhere = asdict(first) | {"host": "another CPU", "dtype": "float32"}
    assert problem.choose_precision(0, earlier=[elsewhere, asdict(first)]) == first
    assert problem.choose_precision(0, earlier=[elsewhere]).why == "measured anew"


def test_a_network_without_such_layers_is_left_alone(host, cache):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x[:, 0, 0, :4] * self.scale

    found = Classifier(lambda: Scale(), images(), precision="auto").choose_precision(0)
    assert found.dtype == "float32" and found.lines() == ["float32: bfloat16 is no quicker here"]


# -- in a run ----------------------------------------------------------------------------------------------------------


def decisions(run):
    return [row["precision"] for row in read_rows(run.path) if row["kind"] == "join"]


def refuse_to_decide(monkeypatch):
    monkeypatch.setattr("labkit.problems.problem.choose", lambda *_: pytest.fail("decided again"))


def test_a_run_records_and_says_once_what_was_decided_and_replays_with_it(host, problem, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(supervisor, "POLL_S", 0.02)
    host["slow"]["Linear"] = 10
    with labkit.connect("threads", 2) as lab:
        run = labkit.train(problem, lab, partition="udpa", update="agwu", passes=1, runs=tmp_path, name="r").wait()
    first, *_ = found = decisions(run)
    assert found == [first] * 2 and first["host"].startswith("AMX; torch ")
    assert Precision(**first).float32 == {"head": "Linear: bfloat16 takes 2.5x as long"}
    by = next(row["worker"] for row in read_rows(run.path) if row["kind"] == "join")  # who came first
    assert [line for line in capsys.readouterr().out.splitlines() if "float32" in line] == [
        f"Run 'r', worker {by}: bfloat16, channels last: 2.5x as fast as float32 (AMX).",
        f"Run 'r', worker {by}: head (Linear) stays in float32: bfloat16 takes 2.5x as long.",
    ]
    refuse_to_decide(monkeypatch)
    assert "bit for bit the same" in labkit.replay(run).status()["reason"]
    assert labkit.replay(run, update="fedasync").state == "done"


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_what_was_decided_also_where_threads_share_a_step(host, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(supervisor, "POLL_S", 0.02)
    host["slow"]["Linear"] = 10
    inner = labkit.Inner(threads=2, split="samples", block=4)
    problem = Classifier(net, images(), batch_size=16, score_samples=20, precision="auto", inner=inner)
    with labkit.connect("threads", 2) as lab:
        run = labkit.train(problem, lab, partition="udpa", update="agwu", passes=1000, local_steps=2, runs=tmp_path, name="r")
        until(lambda: run.status()["version"] > 3)
        run.stop()
        refuse_to_decide(monkeypatch)
        run = labkit.resume(run.path, lab, problem=problem)
        until(lambda: len(decisions(run)) == 4)
        run.stop()
    assert decisions(run) == [decisions(run)[0]] * 4
    assert "bit for bit the same" in labkit.replay(run).status()["reason"]


def test_weights_of_a_run_in_which_bfloat16_was_wrong_are_measured_in_float32(host, cache):
    half, auto = (Classifier(net, images(), precision=asked) for asked in ("bfloat16", "auto"))
    host["errors"]["Linear"] = {"output": 1.5}
    assert len(half.choose_precision(0).lines()) == 1
    found = asdict(half.choose_precision(0))
    for rows, dtype in (([None], "bfloat16"), ([None, found | {"float32": {}}], "bfloat16"), ([found, None], "float32")):
        run = SimpleNamespace(events=pd.DataFrame({"precision": pd.Series(rows, dtype=object)}))
        assert as_recorded(half, run).precision == dtype and as_recorded(auto, run) is auto
    assert half.precision == "bfloat16"
