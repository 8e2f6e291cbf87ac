"""The settings of a run: written, read back, read from earlier formats, refused."""

import json
from dataclasses import FrozenInstanceError

import pytest

from labkit.cluster.emulation import Unevenness
from labkit.errors import RunError
from labkit.runs.config import FORMAT, RunConfig, environment
from labkit.runs.files import read_json
from tests.helpers import settings

WORKER = {"index": 0, "host": "a", "pid": 1, "device": "cpu", "threads": 1, "slowdown": 1.0}


def stored(path, **changes):
    """`config.json` as it is written, with changes; None takes a key out."""
    settings([0, 3]).save(path)
    file = path / "config.json"
    config = {key: value for key, value in (read_json(file) | changes).items() if value is not None}
    file.write_text(json.dumps(config))
    return path


def test_what_is_saved_is_loaded_as_it_was(tmp_path):
    config = settings([0, 3], seed=7, stalls=[9.0, 2.0], origin={"kind": "simulated"}, exchange="bfloat16")
    config.save(tmp_path)
    assert RunConfig.load(tmp_path) == config and dict(RunConfig.load(tmp_path)) == dict(config)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == config["seed"] == config.seed == 7
    assert "resumed" not in json.loads((tmp_path / "config.json").read_text()), "a run has no history at first"


def test_settings_are_read_and_never_changed():
    config = settings([3, 0])
    with pytest.raises(FrozenInstanceError):
        config.seed = 1
    assert config.replace(seed=9).seed == 9 and config.seed != 9
    assert config.indices == [0, 3] and len(config) == len(list(config)) and "seed" in config and config.get("nonsense") is None
    assert "resumed" not in config and "resumed" in config.replace(resumed=[{"version": 3}])
    with pytest.raises(KeyError, match=r"a run has no setting 'sed'. It has: format, id"):
        config["sed"]


def test_format_2_is_read_by_the_names_of_now(tmp_path):
    problem = {"kind": "labkit.problems:Classifier", "batch_size": 24}
    times = {"silence": 7.5, "patience": 11.0, "heartbeat_timeout": None, "join_timeout": None}
    workers = [WORKER, {**WORKER, "index": 3}]
    new = dict.fromkeys(("batch_size", "one_process", "exchange", "overlap"))
    config = RunConfig.load(stored(tmp_path, format=2, problem=problem, workers=workers, **times, **new))
    assert (config.problem["kind"], config.batch_size, config.one_process) == ("labkit:Classifier", 24, True)
    assert (config.heartbeat_timeout, config.join_timeout, config.exchange, config.overlap) == (7.5, 11.0, "float32", 0)
    assert not RunConfig.load(stored(tmp_path, format=4, still=None)).still and RunConfig.load(stored(tmp_path)).still
    assert (
        not RunConfig.load(stored(tmp_path, format=5, balanced_end=None)).balanced_end
        and RunConfig.load(stored(tmp_path)).balanced_end
    )
    of_before = RunConfig.load(stored(tmp_path, update={"name": "allreduce"})).update
    assert of_before == {"name": "allreduce", "buffers": "first", "sync_batchnorm": False}, (
        "as it was done before there was a choice"
    )
    assert RunConfig.load(stored(tmp_path, update={"name": "allreduce", "buffers": "mean"})).update["buffers"] == "mean"
    config.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["format"] == FORMAT and RunConfig.load(tmp_path).batch_size == 24


def test_what_is_not_the_settings_of_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"written by a later labkit .*Update labkit"):
        RunConfig.load(stored(tmp_path, format=FORMAT + 1))
    fields = ("index", "name", "host", "device", "threads", "pid", "slowdown", "drifts_to")
    wrong = [WORKER | {name: {"a": 1}} for name in fields] + [{"slowdown": 1.0}]
    before = [{"resumed": [{"version": 3, "before": {"workers": [about]}}]} for about in wrong]
    for changes in ({"budget": None}, {"update": None}, *({"workers": [about]} for about in wrong), *before):
        with pytest.raises(RunError, match=r"config.json is not whole: .*Is it the file of a run\?"):
            RunConfig.load(stored(tmp_path, **changes))
    for what in ("update", "partition"):
        for name in ({}, {"name": 7}, {"name": {"by": "value"}}):
            with pytest.raises(RunError, match=rf"config.json is not whole: the name of its {what} is "):
                RunConfig.load(stored(tmp_path, **{what: name}))
    with pytest.raises(RunError, match=r"config.json is not whole: the name of the run is 'a\\x1b\[2J'"):
        RunConfig.load(stored(tmp_path, name="a\x1b[2J"))
    with pytest.raises(RunError):
        RunConfig.load(tmp_path / "nowhere")


def test_how_a_worker_was_slowed_down():
    workers = [{"index": 0, "slowdown": 1, "drifts_to": 4}, {"index": 3, "slowdown": 4, "drifts_to": 1}]
    config = settings([0, 3]).replace(workers=workers, jitter=0.2, drift=20, stalls=[9, 2])
    assert config.unevenness(3) == Unevenness(4, 0.2, 20, 1, (9, 2))
    assert config.unevenness(5) == Unevenness(1, 0.2, 20, 1, (9, 2)), "a newcomer"
    earlier = settings([0]).replace(workers=[{"index": 0, "slowdown": 2.0}])
    assert earlier.unevenness(0) == Unevenness(2.0, drifts_to=2.0), "of a run from before there was drift"


def test_where_a_run_was_made():
    about = environment()
    assert json.loads(json.dumps(about)) == about and about["versions"]["torch"] and about["versions"]["labkit"]
    assert about["cpus"] >= 1 and about["versions"]["numpy"] and set(about) >= {"python", "platform", "machine", "load_1min"}
