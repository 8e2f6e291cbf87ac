"""Who imports whom: the contracts of pyproject.toml hold without an exception, and no files import each other in a circle.

Imports inside functions and under TYPE_CHECKING count.

Used by pytest.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parent.parent
LARGE = ("pandas", "bokeh", "h5py", "pyarrow", "scipy", "PIL", "sklearn", "matplotlib", "IPython")
LAYERS, SERVER = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    """An edge for each file and each file of labkit that it imports."""
    return grimp.build_graph("labkit", cache_dir=None)


def test_packages_import_from_lower_layers_only(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    code = lint_imports(config_filename="pyproject.toml", no_cache=True)
    assert code == 0, capsys.readouterr().out
    assert not any("ignore_imports" in contract for contract in (LAYERS, SERVER))


def test_no_files_import_each_other_in_a_circle(graph):
    both = {file: graph.find_upstream_modules(file) & graph.find_downstream_modules(file) for file in graph.modules}
    assert not {tuple(sorted({file, *others})) for file, others in both.items() if others}


def test_nothing_inside_imports_the_table_of_public_names(graph):
    assert graph.find_modules_that_directly_import("labkit") == set()


def test_a_process_that_loads_what_a_server_needs_loads_nothing_large(graph):
    files = [file for file in sorted(graph.modules) if any(f"{file}.".startswith(f"{name}.") for name in SERVER["source_modules"])]
    code = f"import importlib, sys; [importlib.import_module(file) for file in {files}]; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=110, check=True)
    assert {"labkit.runs.events", "labkit.training.server.server"} <= set(done.stdout.split())
    assert not set(done.stdout.split()) & {*SERVER["forbidden_modules"], *LARGE}
