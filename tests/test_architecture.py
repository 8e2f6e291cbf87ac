"""docs/architecture.md: its picture is that of the import contracts, what it names is there, and the tests mirror the files.

Used by pytest.
"""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from labkit.imports import imported

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()
LAYERS, SERVER = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
# What a line of the last table names, where it lives.
TABLES = {
    "RULES": "labkit.updates:RULES",
    "UPDATES": "labkit.updates:UPDATES",
    "PARTITIONS": "labkit.partition:PARTITIONS",
    "BACKENDS": "labkit.cluster.connect:BACKENDS",
    "MODELS": "labkit.models:MODELS",
    "FILES": "labkit.data:FILES",
    "NAMED": "labkit.data.named:NAMED",
    "COLUMNS": "labkit.runs.events:COLUMNS",
    "TINY": "tests.test_notebooks:TINY",
    "FIGURES": "tests.plots.test_style:FIGURES",
}


def layers():
    """[["__main__"], ["simulation", ...], ...] from the top; what is in brackets is to come."""
    return [[door for door in re.split(r"\s*\|\s*", layer) if not door.startswith("(")] for layer in LAYERS["layers"]]


def picture():
    """The block of the page, as the contracts have it."""
    numbers, lines = range(len(layers()), 0, -1), ["flowchart TD"]
    for number, doors in zip(numbers, layers(), strict=True):
        lines += [f"    subgraph L{number}[{number}]"]
        lines += [f'        {door.strip("_")}["{door}{file(door)}"]' for door in doors]
        lines += ["    end"]
    lines += [f"    {' --> '.join(f'L{number}' for number in numbers)}"]
    small = dict.fromkeys(source.split(".")[1] for source in SERVER["source_modules"])
    return "\n".join([*lines, "    classDef server stroke-width:4px", f"    class {','.join(small)} server"])


def file(door):
    return "/" if (ROOT / "labkit" / door).is_dir() else ".py"


def test_the_picture_shows_the_contracts():
    (drawn,) = re.findall(r"```mermaid\n(.*?)\n```", PAGE, re.DOTALL)
    assert drawn == picture(), f"the picture that the contracts ask for:\n\n{picture()}"


def test_every_door_of_the_picture_exists_and_every_door_is_in_it():
    doors = {path.stem for path in (ROOT / "labkit").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {door for layer in layers() for door in layer} == doors - {"__init__"}


def test_every_file_has_a_test_of_its_name_or_is_named_by_a_test_of_its_folder():
    untested = []
    for path in (ROOT / "labkit").rglob("[!_]*.py"):
        folder = ROOT / "tests" / path.parent.relative_to(ROOT / "labkit")
        tests = list(folder.glob("test_*.py"))
        if folder / f"test_{path.name}" not in tests:
            headers = [ast.get_docstring(ast.parse(test.read_text())) or "" for test in tests]
            untested += [str(path)] if not any(f"{path.name}`" in header for header in headers) else []
    assert not untested


def test_the_files_that_it_names_exist():
    named = {path for path in re.findall(r"`((?:labkit|tests|notebooks)/[^`<]+)`", PAGE) if "NN-" not in path}
    assert len(named) > 40 and not [path for path in sorted(named) if not (ROOT / path).exists()]
    assert all((ROOT / "docs" / link).exists() for link in re.findall(r"\]\(([^)#:]+)\)", PAGE))


@pytest.mark.parametrize("table", re.findall(r"`([A-Z]{4,})`", PAGE.split("## Where do I add")[1]))
def test_the_tables_of_the_registering_lines_exist(table):
    assert len(imported(TABLES[table])) > 1


def test_what_is_called_by_name_is_there():
    from labkit.cluster import backend, connect
    from labkit.runs.config import RunConfig
    from labkit.training import train
    from labkit.training.server.coordinator import Coordinator
    from labkit.training.server.server import ServerSpec
    from labkit.training.wire.protocol import Grant
    from labkit.training.worker.worker import WorkerSpec

    assert "overlap" in RunConfig.__dataclass_fields__ and RunConfig.load
    assert "config" in ServerSpec.__dataclass_fields__ and "config" in WorkerSpec.__dataclass_fields__
    assert train.configure and train.launch and Coordinator.push and backend.Request and Grant
    for module in set(connect.BACKENDS.values()):
        assert callable(imported(f"{module}:check")) and callable(imported(f"{module}:open"))
