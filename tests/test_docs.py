"""The site of the documentation: every public name is in it, its links hold, and it loads nothing from a network.

Tests `docs/build.py`, `docs/conf.py`, `docs/glossary.md` and `CITATION.cff`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

import labkit
from tests.helpers import module_of

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def build():
    return module_of(ROOT / "docs" / "build.py")


def test_every_public_name_has_its_place_in_the_reference(build):
    names = [name for _, part in build.PARTS for name in part]
    assert len(names) == len(set(names)) and {*names} == {*labkit.__all__} - {"__version__"}


def test_the_layers_are_drawn_with_their_packages(build):
    drawn = build.picture((ROOT / "docs" / "architecture.md").read_text().split("```mermaid")[1].split("```")[0])
    assert ElementTree.fromstring(drawn).tag == "svg" and re.findall(r">([\w/.]+)</text>", drawn)[:2] == [
        "__main__.py",
        "simulation/",
    ]
    assert drawn.count('stroke-width="3"') == 4  # what the server of a run loads


def test_terms_are_in_order_and_said_once():
    terms = re.findall(r"^([A-Za-z][\w -]*)$", (ROOT / "docs" / "glossary.md").read_text().split("```{glossary}")[1], re.MULTILINE)
    assert len(terms) > 30 and terms == sorted({*terms}, key=str.lower)


def test_what_to_cite_is_this_version():
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (said["version"], said["license"]) == (project["version"], project["license"])


@pytest.mark.slow
@pytest.mark.timeout(800)  # two blocks of several runs each, on a machine that may be busy
def test_the_first_lines_of_the_readme(tmp_path):
    """With fewer samples."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for block in blocks[:2]:
        block = re.sub(r"\b(8000|4000)\b", "400", block)
        (tmp_path / "first.py").write_text(block)
        done = subprocess.run([sys.executable, "first.py"], cwd=tmp_path, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        (tmp_path / "curves.png").unlink()


def test_the_files_that_the_readme_links_to_are_there():
    for page in ("README.md", "docs/data.md", "docs/jets.md"):
        links = re.findall(r"\]\(([^)#:]+)[^)]*\)", (ROOT / page).read_text())
        assert links or page != "README.md"
        for link in (link for link in links if not link.startswith("http")):
            assert ((ROOT / page).parent / link).exists(), f"{page} links to {link}"


@pytest.mark.slow
def test_the_site(tmp_path):
    """Sphinx says no warning: each link between pages and each term is there."""
    for needed in ("sphinx", "myst_nb", "furo"):
        pytest.importorskip(needed, reason="needs labkit[docs]")
    site = tmp_path / "site"
    done = subprocess.run([sys.executable, ROOT / "docs" / "build.py", "--out", site], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    pages = {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.html")}
    assert {"index.html", "README.html", "docs/glossary.html", "notebooks/09-search-the-settings.html"} <= {*pages}
    text = "".join(pages.values())
    for name in labkit.__all__:
        assert name in {"__version__"} or f'id="labkit.{name}"' in text or f'id="module-labkit.{name}"' in text, name
    loaded = re.findall(r'<(?:script|img)[^>]*src="(https?:[^"]*)"|<link[^>]*rel="stylesheet"[^>]*href="(https?:[^"]*)"', text)
    assert not loaded
