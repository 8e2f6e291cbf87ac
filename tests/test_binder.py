"""Binder: its small values fit the notebooks, and what its files install runs one of them in little memory.

Tests the folder `binder/`; its lists of packages are tested beside the others, in `test_packages.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml

import labkit
from tests.helpers import module_of, until
from tests.test_packages import BINDER_NAMES

ROOT = Path(__file__).parent.parent
SMALL = json.loads((ROOT / "binder" / "small.json").read_text())
PIP_NAMES = {conda: pip for pip, names in BINDER_NAMES.items() for conda in names} | {"pytorch-cpu": "torch"}

MEASURED = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.fixture(scope="module")
def small():
    return module_of(ROOT / "binder" / "small.py")


def test_each_notebook_has_small_values_that_its_cell_takes(small, tmp_path):
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert sorted(SMALL) == [path.stem for path in notebooks]
    for path in notebooks:
        shutil.copy2(path, tmp_path)
    small.main(tmp_path)
    for path in notebooks:
        before, after = labkit.parameters(path), labkit.parameters(tmp_path / path.name)
        assert [(one.name, one.type) for one in before] == [(one.name, one.type) for one in after]
        changed = {one.name: one.default for one, other in zip(after, before, strict=True) if one.default != other.default}
        assert changed.items() <= SMALL[path.stem].items() and changed
        assert all("elsewhere" in one.help for one in after if one.name in SMALL[path.stem])


@pytest.mark.usefixtures("cache")
def test_the_small_data_hold_as_many_samples_as_are_asked_for():
    counted = 0
    for name, values in SMALL.items():
        given = {one.name: one.default for one in labkit.parameters(ROOT / "notebooks" / f"{name}.ipynb")} | values
        asked = {key: given[key] for key in ("train_samples", "test_samples") if key in given}
        if "data" in values and asked:
            problem = labkit.Classifier("lenet", data=given["data"], **asked)
            found = {"train_samples": problem.train_indices(), "test_samples": problem.test_indices()}
            assert {key: len(found[key]) for key in asked} == asked, name
            counted += 1
    assert counted > 5


def test_a_name_that_a_notebook_does_not_have_is_refused(small):
    assert (
        small.rewritten("lr: float = 0.1  # rate\n", {"lr": 0.2}) == "lr: float = 0.2  # rate (small, for Binder; elsewhere 0.1)\n"
    )
    with pytest.raises(SystemExit, match="no such parameters: rate"):
        small.rewritten("lr: float = 0.1  # rate\n", {"rate": 0.2})


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_what_the_files_of_binder_install_runs_a_notebook(tmp_path):
    """As repo2docker does: the packages, `postBuild`, then JupyterLab by `start`; from the Python index instead of conda-forge."""
    if sys.platform != "linux":
        pytest.skip("Binder is Linux")
    clone, env = tmp_path / "clone", tmp_path / "env"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split("\0")
    if not any(files):
        pytest.skip("this is no clone")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clone / name)
    lines = yaml.safe_load((ROOT / "binder" / "environment.yml").read_text())["dependencies"]
    wanted = [line.replace(" ", "") for line in lines if not line.startswith(("python=", "pip"))]
    named = [line.replace(conda, pip, 1) for line in wanted for conda, pip in _named(line)]
    torch_here = f"torch=={torch.__version__.partition('+')[0]}"  # an open range would take a build for CUDA
    places = {"PATH": f"{env / 'bin'}:/usr/bin:/bin", "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    settings = {key: value for key, value in os.environ.items() if key.startswith(("PIP_", "XDG_CONFIG", "LABKIT_DATA", "SSL_"))}
    variables = {**settings, **places, "JUPYTERHUB_SERVICE_PREFIX": "/", "OMP_NUM_THREADS": "1"}
    run = {"cwd": clone, "env": variables, "check": True, "capture_output": True, "text": True}
    subprocess.run([sys.executable, "-m", "venv", env], check=True, timeout=120)
    subprocess.run([env / "bin" / "pip", "install", "-q", torch_here, *named], timeout=900, **run)
    subprocess.run([clone / "binder" / "postBuild"], timeout=120, **run)

    lab = ["jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0", "--IdentityProvider.token=token"]
    server = subprocess.Popen([clone / "binder" / "start", *lab], cwd=clone, env=variables, stdout=-3, stderr=-3)
    try:
        found = {}

        def answers() -> bool:
            files = [*tmp_path.rglob("jpserver-*.json")]
            found.update(json.loads(files[0].read_text()) if files else {})
            return bool(found)

        until(answers, 120)
        status = urllib.request.urlopen(f"{found['url']}api/status?token=token", timeout=30)
        assert json.loads(status.read())["kernels"] == 0
    finally:
        server.terminate()
        server.wait(30)
    name = "01-start-a-lab"
    papermill = ["papermill", "-k", "python3", "--cwd", "notebooks", f"notebooks/{name}.ipynb", "out.ipynb"]
    done = subprocess.run([sys.executable, "-c", MEASURED, clone / "binder" / "start", *papermill], timeout=300, **run)
    assert json.loads((clone / "notebooks" / "runs" / name / "results.json").read_text())
    assert "small, for Binder" in (clone / "out.ipynb").read_text()
    assert int(done.stdout.split()[-1]) < 1e6, "its kernel takes more than 1 GB (in kB)"


def _named(line: str) -> list[tuple[str, str]]:
    """What conda calls the package of a line, and what pip does."""
    name = next((name for name in PIP_NAMES if line == name or line.startswith((f"{name}>", f"{name}<", f"{name}="))), "")
    return [(name, PIP_NAMES.get(name, ""))]
