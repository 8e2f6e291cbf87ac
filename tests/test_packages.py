"""The set-up files: three lists of packages that must agree, the scripts of Binder, and the Makefile's choice.

pyproject.toml is the truth. The two conda files differ from it only as CONDA_NAMES says and in the extras they take.

Used by pytest.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = ["binder/postBuild", "binder/start", ".ci/run", "tests/cluster/slurm/slurm.sh"]

# How conda-forge calls what the Python index calls otherwise.
CONDA_NAMES = {
    "torch": ["pytorch"],
    "dask[distributed]": ["dask", "distributed"],  # conda has no extras
    "matplotlib": ["matplotlib-base"],  # conda's matplotlib brings Qt
}
BINDER_NAMES = CONDA_NAMES | {"torch": ["pytorch-cpu"]}  # never a CUDA build


def required(*extras: str, names: dict[str, list[str]]) -> set[str]:
    """The dependencies of pyproject.toml with `extras`, as conda would write them: {"pytorch>=2.6", ...}."""
    lines = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    found = set()
    for requirement in map(Requirement, lines):
        name = requirement.name + (f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else "")
        found.update(f"{conda_name}{requirement.specifier}" for conda_name in names.get(name, [name]))
    return found


def conda_file(path: str) -> tuple[dict, set[str]]:
    """The file, and its packages without Python and pip."""
    content = yaml.safe_load((ROOT / path).read_text())
    packages = [line.replace(" ", "") for line in content["dependencies"] if isinstance(line, str)]
    assert len(packages) == len(set(packages))
    others = [Requirement(line) for line in packages if not re.fullmatch(r"(python|pip)([=<>!].*)?", line)]
    return content, {f"{one.name}{one.specifier}" for one in others}  # bounds in one order


def test_the_readme_says_what_each_extra_is_for():
    rows = re.findall(r"^\| (`[^|]+`) \| [^|]+ \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([a-z]+)`", row)]
    assert sorted(named) == sorted(PROJECT["optional-dependencies"])


def test_environment_yml_names_the_packages_of_pyproject():
    content, packages = conda_file("environment.yml")
    assert packages == required("test", names=CONDA_NAMES)
    assert content["name"] == PROJECT["name"]
    assert {"pip": ["-e ."]} in content["dependencies"]


def test_binder_names_the_packages_of_pyproject():
    content, packages = conda_file("binder/environment.yml")
    assert packages == required("lab", names=BINDER_NAMES)
    assert all(isinstance(line, str) for line in content["dependencies"])  # labkit itself comes in postBuild


@pytest.mark.parametrize("path", ["environment.yml", "binder/environment.yml"])
def test_conda_files_take_conda_forge_and_an_exact_python(path):
    content, _ = conda_file(path)
    assert content["channels"] == ["conda-forge", "nodefaults"]
    (python,) = (line for line in content["dependencies"] if isinstance(line, str) and line.startswith("python="))
    assert re.fullmatch(r"python=3\.\d+", python)  # Binder ignores python>=3.12 and takes another one
    assert python.removeprefix("python=") in SpecifierSet(PROJECT["requires-python"])


@pytest.mark.parametrize("path", SCRIPTS)
def test_scripts_can_be_run(path):
    assert os.access(ROOT / path, os.X_OK), f"chmod +x {path}"
    subprocess.run(["bash", "-n", ROOT / path], check=True, timeout=100)


@pytest.mark.parametrize("prefix", ["/user/ada/", None])
def test_binder_start_sets_small_defaults_and_the_dashboard_link(prefix):
    env = {"PATH": os.environ["PATH"]} | ({"JUPYTERHUB_SERVICE_PREFIX": prefix} if prefix else {})
    show = ["bash", "-c", 'echo "$LABKIT_SMALL" "$MALLOC_ARENA_MAX" "$DASK_DISTRIBUTED__DASHBOARD__LINK"']
    start = [ROOT / "binder/start", *show]
    printed = subprocess.run(start, env=env, check=True, capture_output=True, text=True, timeout=100).stdout
    assert printed.split() == ["1", "2", f"{prefix or '/'}proxy/{{port}}/status"]
    assert (ROOT / "binder/start").read_text().endswith('\nexec "$@"\n')


def test_binder_installs_labkit_and_the_images():
    assert {"set -e", "pip install --no-deps -e ."} <= set((ROOT / "binder/postBuild").read_text().splitlines())
    assert (ROOT / "binder/apt.txt").read_text().split() == ["dataset-fashion-mnist"]


@pytest.mark.parametrize(
    ("active", "chosen"),
    [
        ({}, f"{ROOT}/.venv"),
        ({"VIRTUAL_ENV": "/envs/mine"}, "/envs/mine"),
        ({"CONDA_DEFAULT_ENV": "base", "CONDA_PREFIX": "/conda"}, f"{ROOT}/.venv"),
        ({"CONDA_DEFAULT_ENV": "mine", "CONDA_PREFIX": "/conda/envs/mine"}, "/conda/envs/mine"),
        ({"CONDA_DEFAULT_ENV": "base", "CONDA_PREFIX": "/conda", "VIRTUAL_ENV": "/my envs/mine"}, "/my envs/mine"),
    ],
)
def test_make_uses_the_active_environment_or_its_own(active, chosen):
    if shutil.which("make") is None:
        pytest.skip("needs make")
    env = {"PATH": os.environ["PATH"], **active}  # nothing of a make that started these tests
    printed = subprocess.run(
        ["make", "-n", "test", "test-all"], cwd=ROOT, env=env, check=True, capture_output=True, text=True, timeout=100
    ).stdout
    assert f'"{chosen}/bin/python" -m pytest -n 4 --dist worksteal \n' in printed
    assert f'"{chosen}/bin/python" -m pytest -n 4 --dist worksteal -m "" \n' in printed


def test_an_editable_install_is_the_folder_as_it_is(tmp_path):
    build = "import hatchling.build as build, sys; build.build_editable(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=ROOT, check=True, capture_output=True, timeout=100)
    (wheel,) = tmp_path.glob("labkit-*.whl")
    with zipfile.ZipFile(wheel) as file:
        (path,) = (file.read(name).decode() for name in file.namelist() if name.endswith(".pth"))
    assert Path(path.strip()) == ROOT


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_is_installed_from_the_wheel_of_the_sdist_runs_the_demo_without_a_clone(tmp_path):
    """With fewer samples and strategies; and it writes its notebooks to a folder."""
    packaged = "import hatchling.build as build, sys; build.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", packaged, tmp_path], cwd=ROOT, check=True, capture_output=True, timeout=100)
    (sdist,) = tmp_path.glob("labkit-*.tar.gz")
    shutil.unpack_archive(sdist, tmp_path)
    unpacked = sdist.with_name(sdist.name.removesuffix(".tar.gz"))
    subprocess.run(
        [sys.executable, "-c", packaged.replace("sdist", "wheel"), tmp_path],
        cwd=unpacked,
        check=True,
        capture_output=True,
        timeout=100,
    )
    (wheel,) = tmp_path.glob("labkit-*.whl")
    shutil.unpack_archive(wheel, tmp_path / "installed", format="zip")
    names = {path.name for path in (tmp_path / "installed" / "labkit").iterdir()}
    assert {"__init__.pyi", "py.typed", "notebooks"} <= names
    (tmp_path / "empty").mkdir()
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "MPLBACKEND": "agg"}
    quick = (
        "import sys, labkit, labkit.experiments.demo as demo, labkit.__main__ as command\n"
        "assert 'installed' in labkit.__file__\n"
        "demo.SETTINGS.update(train_samples=300, test_samples=60, passes=1.0, local_steps=4, target=0.1, kind='threads', data='digits')\n"
        "demo.STRATEGIES[:] = demo.STRATEGIES[-2:]\n"
        "sys.exit(command.main(sys.argv[1:]))\n"
    )
    for arguments in (["demo"], ["notebooks", "mine"], ["notebooks", "mine"]):
        done = subprocess.run(
            [sys.executable, "-c", quick, *arguments], cwd=tmp_path / "empty", env=env, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "empty" / "runs" / "demo" / "curves.png").is_file()
    assert "0 files were written to mine" in done.stdout and "stay as they are" in done.stdout
    copied = {path.relative_to(tmp_path / "empty" / "mine") for path in (tmp_path / "empty" / "mine").rglob("*.*")}
    assert {Path("03-update-the-weights.ipynb"), Path("benchmarks/15-search.ipynb"), Path("benchmarks/tables.py")} <= copied
