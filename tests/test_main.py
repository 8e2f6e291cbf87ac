"""The command line: how a grid is read, which exit codes are given, what the doctor asks."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook

import labkit
from labkit import __main__ as cli
from labkit.__main__ import main, parse_grid
from labkit.errors import SweepError
from tests.helpers import Slow, ended, problem, until


@pytest.fixture
def notebook(tmp_path) -> Path:
    """Reports the half of its seed, and fails at 13."""
    first = new_code_cell("seed: int = 0\nname: str = 'x'\nrun_dir: str = 'runs'", metadata={"tags": ["parameters"]})
    cell = "from labkit.experiments.sweep import report\nassert seed != 13, 'unlucky'\nreport(run_dir, {'score': seed / 2})"
    nbformat.write(new_notebook(cells=[first, new_code_cell(cell)]), tmp_path / "n.ipynb")
    return tmp_path / "n.ipynb"


# -- main --------------------------------------------------------------------------------------------------------------


def test_no_command_prints_help(capsys):
    assert main([]) == 0
    assert "sweep" in capsys.readouterr().out


def test_a_wrong_request_is_a_line_and_exit_code_2(notebook, capsys):
    assert main(["sweep", str(notebook), "--grid", "sed=1"]) == 2
    error = capsys.readouterr().err
    assert error == "SweepError: n.ipynb has no parameter 'sed'. It has: seed, name. Did you mean 'seed'?\n"
    assert main(["summary", str(notebook.parent / "nowhere")]) == 2
    with pytest.raises(SystemExit, match="2"):
        main(["sweep", str(notebook), "--parallel", "many"])


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"labkit {labkit.__version__}\n"


def test_each_command_answers_in_json(capsys):
    (commands,) = (action.choices for action in cli._parser()._actions if action.dest == "command")
    assert {"compare", "demo", "doctor", "gallery", "report", "search", "summary", "sweep", "watch"} <= set(commands)
    for name, command in commands.items():
        assert "--json" in command.format_help(), name


def test_an_answer_in_json_is_all_that_standard_output_holds(monkeypatch, capsys, tmp_path):
    table = pd.DataFrame(
        {"seed": [0, 1], "score": [0.1 + 0.2, math.nan], "status": ["done", "failed"], "notebook": [Path("a"), "b"]}
    )
    monkeypatch.setattr(cli, "sweep", lambda *_, **__: print("[1/2] seed=0  started") or table)
    monkeypatch.setattr(cli, "parameters", lambda _: [])
    assert main(["sweep", "n.ipynb", "--json"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out) == [
        {"seed": 0, "score": 0.1 + 0.2, "status": "done", "notebook": "a"},
        {"seed": 1, "score": None, "status": "failed", "notebook": "b"},
    ]
    assert said.err.startswith("[1/2] seed=0  started\n")
    assert main(["summary", str(tmp_path / "nowhere"), "--json"]) == 2
    refused = json.loads(capsys.readouterr().out)
    assert refused["error"] == "SweepError" and "there is no folder" in refused["message"]


def test_the_address_of_a_page_is_said_before_it_is_served(monkeypatch, capsys):
    said = []
    monkeypatch.setattr(
        cli, "serve", lambda path, port, with_parent, tell: tell("http://x") or said.append(capsys.readouterr().out) or 0
    )
    assert main(["watch", "run"]) == main(["watch", "run", "--json"]) == 0
    assert said[0] == "http://x\n" and json.loads(said[1]) == {"url": "http://x", "path": str(Path("run").absolute())}
    assert not capsys.readouterr().out


def test_an_interrupt_is_exit_code_130(monkeypatch, capsys, notebook):
    monkeypatch.setattr(cli, "sweep", lambda *_, **__: signal.default_int_handler(signal.SIGTERM, None))
    assert main(["sweep", str(notebook)]) == 130
    assert "goes on from here" in capsys.readouterr().err


@pytest.mark.slow
def test_sweep_and_summary_in_a_shell(notebook, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "labkit", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)

    grid = ["--grid", "seed=2,13", "--grid", "name=007"]
    first = run("sweep", "n.ipynb", *grid, "--out", "out", "--parallel", "2")
    assert first.returncode == 1 and first.stderr == "", first.stderr
    assert "2 runs: 1 new, 0 reused, 1 failed" in first.stdout
    assert "In [3]: AssertionError: unlucky" in first.stdout and " 007 " in first.stdout
    second = run("summary", "out")
    assert second.returncode == 1 and second.stderr == ""
    assert second.stdout == first.stdout.split("failed\n")[-1]


# -- compare -----------------------------------------------------------------------------------------------------------


def test_compare_names_what_came_out_and_what_still_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with labkit.connect("threads", 1) as lab:
        ended(labkit.train(problem(), lab, passes=1, name="first"))
        run = labkit.train(problem(kind=Slow), lab, passes=500, name="second")
        until(lambda: len(run.events.query("kind == 'merge'")) > 0)
        assert main(["compare"]) == 0
        table, _, last = capsys.readouterr().out.rstrip().rpartition("\n")
        assert last.startswith("Run 'second' still goes on in process ") and last.endswith(
            "labkit.load_run('runs/second').attach() follows it."
        )
        assert [len(re.findall(rf"\b{word}\b", table)) for word in ("first", "second", "done", "running")] == [1, 1, 1, 1]
        run.stop()
    (tmp_path / "runs/third").mkdir()
    (tmp_path / "runs/third/config.json").write_text("{")
    assert main(["compare", "runs", "--json"]) == 1  # one is damaged
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"]: row["state"] for row in rows} == {"first": "done", "second": "stopped", "third": "damaged"}
    assert main(["compare", "runs/first"]) == 0 and "goes on" not in capsys.readouterr().out


# -- search ------------------------------------------------------------------------------------------------------------


def test_a_space_is_read():
    texts = ["lr=1e-4:0.5:log", "width=4:32:int", "batch_size=32,64", "model=lenet,my_module:net", "data=digits", "m=0:0.9"]
    assert cli.parse_space(texts) == {
        "lr": (1e-4, 0.5, "log"), "width": (4, 32, "int"), "batch_size": [32, 64], "model": ["lenet", "my_module:net"],
        "data": ["digits"], "m": (0, 0.9),
    }  # fmt: skip
    nested = 'optimiser={"sgd": {"momentum": "0:0.9", "nesterov": [true, false], "steps": "1:9:int"}, "adam": {"beta": 0.9, "of": {"a": {}}}}'
    assert cli.parse_space([nested, 'hidden=[64, {"a": 1}],[8]', 'kind={"a": {"b": "x,y"}}']) == {
        "optimiser": {
            "sgd": {"momentum": (0, 0.9), "nesterov": [True, False], "steps": (1, 9, "int")},
            "adam": {"beta": [0.9], "of": {"a": {}}},
        },
        "hidden": [[64, {"a": 1}], [8]], "kind": {"a": {"b": ["x", "y"]}},
    }  # fmt: skip
    for text, said in (('a={"b": 1}', "what comes with 'b' is 1; give a dict"), ("a={b", "--set a: {b is not JSON")):
        with pytest.raises(SweepError, match=said):
            cli.parse_space([text])
    constraints = cli.parse_constraints(["size=50000", "accuracy=0.9:", "time=1.5:20"])
    assert constraints == {"size": 50000, "accuracy": (0.9, None), "time": (1.5, 20)}
    with pytest.raises(SweepError, match="--constraint gives 'size' twice"):
        cli.parse_constraints(["size=1", "size=2"])
    with pytest.raises(SweepError, match="--set gives 'lr' twice"):
        cli.parse_space(["lr=1", "lr=2"])


@pytest.mark.slow
def test_a_search_from_the_shell(tmp_path, capsys, cache):
    command = ["search", "labkit:Classifier", "--kind", "threads", "--n-workers", "1", "--runs", str(tmp_path), "--method", "grid"]
    command += [
        "--set",
        "data=digits",
        "--set",
        "train_samples=100",
        "--set",
        "test_samples=50",
        "--passes",
        "1",
        "--update",
        "sgwu",
    ]
    assert main([*command, "--set", "lrr=0.1:0.2"]) == 2 and "Did you mean 'lr'" in capsys.readouterr().err
    assert main([*command, "--set", "width=3", "--constraint", "siez=3"]) == 2 and "mean 'size'" in capsys.readouterr().err
    about = ["--target", "2", "--local-steps", "2", "--constraint", "size=1:"]
    assert main([*command, "--set", "width=0.1,-1", *about]) == 0
    assert "2 of 2 trials, best held-out score" in capsys.readouterr().out and (tmp_path / "search" / "log.jsonl").exists()
    assert {"table.png", "history.png", "points.png", "timeline.png"} <= {path.name for path in (tmp_path / "search").iterdir()}
    assert main([*command, "--set", "width=0.1,-1", *about, "--json"]) == 0  # all of it is there already
    answer = json.loads(capsys.readouterr().out)
    assert answer["path"] == str(tmp_path / "search") and [trial["state"] for trial in answer["trials"]] == ["done", "failed"]


# -- grids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "type_", "values"),
    [
        ("1,-2, +3", "int", [1, -2, 3]),
        ("1e-3,.5,2.,nan,-inf", "float", [0.001, 0.5, 2.0, math.nan, -math.inf]),
        ("true,False,none,NULL", "bool", [True, False, None, None]),
        ("agwu,sgwu+idpa,1.2.3", "", ["agwu", "sgwu+idpa", "1.2.3"]),
        ("007,none,[a,1e3", "str", ["007", "none", "[a,1e3"]),
        ("a=b", "str", ["a=b"]),
        ('[1,[2,3]],[],{"k":[1,2]}', "list", [[1, [2, 3]], [], {"k": [1, 2]}]),
        ("", "str", [""]),
    ],
)
def test_values_of_a_grid(text, type_, values):
    assert repr(parse_grid([f"x={text}"], {"x": type_})) == repr({"x": values})


def test_a_grid_that_cannot_be_read():
    for texts, says in [
        (["seed"], "'seed' is not NAME=VALUE"),
        (["=1"], "is not NAME=VALUE"),
        (["a=1", "a=2"], "gives 'a' twice"),
        (["a=[x]"], "is not JSON"),
    ]:
        with pytest.raises(SweepError, match=says):
            parse_grid(texts, {})


@pytest.mark.parametrize("command", ["demo", "notebooks"])
def test_labkit_without_its_notebooks_says_what_to_do(command, monkeypatch, capsys):
    monkeypatch.setattr(Path, "is_file", lambda _: False)
    assert main([command]) == 2
    assert "is without its notebooks. Install labkit again" in capsys.readouterr().err


# -- doctor ------------------------------------------------------------------------------------------------------------


def test_the_doctor_goes_on_after_a_failed_probe(monkeypatch, capsys):
    def fail():
        raise OSError("no such thing")

    monkeypatch.setattr(cli, "_fashion", fail)
    monkeypatch.setattr(cli, "_lab", lambda: "starts")
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "FAILED: OSError: no such thing" in said and "lab of 1 thread        starts" in said
    assert said.endswith("Not in order: fashion-mnist.\n")
    assert main(["doctor", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["not_in_order"] == ["fashion-mnist"] and answer["found"]["lab of 1 thread"] == "starts"
    assert answer["found"]["fashion-mnist"] == "FAILED: OSError: no such thing"


def test_the_doctor_fetches_nothing(monkeypatch, capsys, own_cache):
    from labkit.data import fetch

    def fail(*arguments, **options):
        raise AssertionError(f"it fetched {arguments}")

    monkeypatch.setattr(fetch, "fetch", fail)
    monkeypatch.setattr(fetch, "_has_apt", lambda: True)
    monkeypatch.setattr(cli, "_lab", lambda: "starts")
    main(["doctor", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["found"]["fashion-mnist"].startswith("not on this machine; the first labkit.open_dataset")
    assert "fetches 31 MB by apt-get or raw.github" in answer["found"]["fashion-mnist"]
    assert "fashion-mnist" not in answer["not_in_order"] and not own_cache.exists()


@pytest.mark.slow
def test_the_doctor_finds_this_environment_in_order(capsys, cache):
    assert main(["doctor"]) == 0, capsys.readouterr().out


def test_packages_are_those_of_the_metadata(monkeypatch):
    asked = ["torch>=2.6", "dask[distributed]", "numpy", 'nibabel>=5; extra == "volumes"', "pytest>=8; extra == 'test'"]
    monkeypatch.setattr(cli.importlib.metadata, "requires", lambda name: asked)
    assert cli.packages() == (["dask", "numpy"], ["nibabel"])
