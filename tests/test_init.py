"""The public names: the stub, what `dir` says and the things themselves agree, editors see them, and none is loaded unasked.

Used by pytest.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import jedi
import pytest

import labkit

PACKAGE = Path(labkit.__file__).parent
STUB = [
    (f"labkit.{node.module}" if node.module else "labkit", alias)
    for node in ast.parse((PACKAGE / "__init__.pyi").read_text()).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
]
PACKAGES = "chaos", "data", "jets", "models", "plots", "problems", "updates"


@pytest.mark.parametrize(("home", "alias"), STUB, ids=[alias.name for _, alias in STUB])
def test_each_name_of_the_stub_is_there_and_lives_where_the_stub_says(home, alias):
    assert alias.asname == alias.name  # what a type checker takes for exported
    found = getattr(labkit, alias.name)
    if home == "labkit":
        assert found is sys.modules[f"labkit.{alias.name}"]
    else:
        assert found is getattr(sys.modules[home], alias.name)
        assert inspect.getmodule(found).__name__.startswith(home)


def test_the_public_names_are_those_of_the_stub():
    names = [alias.name for _, alias in STUB]
    assert len(names) == len(set(names)) and set(PACKAGES) <= set(names)
    assert dir(labkit) == sorted(labkit.__all__) == sorted([*names, "__version__"])


def test_the_version_is_that_of_the_project():
    assert labkit.__version__ == metadata.version("labkit")
    assert labkit.__version__ == tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]["version"]


def test_editors_complete_the_names(tmp_path, monkeypatch):
    monkeypatch.setattr(jedi.settings, "cache_directory", str(tmp_path))
    project = jedi.Project(PACKAGE.parent, load_unsafe_extensions=False)
    script = jedi.Script("import labkit\nlabkit.", project=project, environment=jedi.InterpreterEnvironment())
    assert set(labkit.__all__) <= {completion.name for completion in script.complete(2, len("labkit."))}
    script = jedi.Script("import labkit\nlabkit.train(", project=project, environment=jedi.InterpreterEnvironment())
    (signature,) = script.get_signatures(2, len("labkit.train("))
    assert [parameter.name for parameter in signature.params] == list(inspect.signature(labkit.train).parameters)
    assert (PACKAGE / "py.typed").is_file()


def test_libraries_stay_out_until_they_are_needed():
    heavy = "torch", "dask", "distributed", "bokeh", "pandas", "numpy", "matplotlib"
    code = f"import labkit, sys; dir(labkit); print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=110, check=True)
    assert done.stdout == "[]\n"


def test_packages_are_attributes_in_a_fresh_process():
    code = f"import labkit; print(*[getattr(labkit, name).__name__ for name in {PACKAGES}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=110, check=True)
    assert done.stdout.split() == [f"labkit.{name}" for name in PACKAGES]
