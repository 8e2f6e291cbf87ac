"""The documentation as a site: README, notebooks with their outputs, public names, glossary, architecture.

    python docs/build.py [--execute all|NUMBER ...] [--out build/docs]

Pages are what the repository has, copied to a folder in which links between them hold; only the pages of public names are made here, from
`labkit/__init__.pyi`. Notebooks are executed with the defaults of their parameters where that is asked for, each in the same folder, so
that one that is there already need not be executed again. Needs the extra `docs`; no network.

Used by `make docs`.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import labkit

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "docs/architecture.md",
    "docs/data.md",
    "docs/glossary.md",
    "docs/jets.md",
)
LINKED = ("LICENSE", "CITATION.cff", "notebooks/demo.png", "tests/test_tasks.py", "pyproject.toml")  # that pages link to
PARTS = (  # of the reference: title, and the public names in it; a package stands for all of its own
    ("The lab", ("connect", "Lab")),
    ("Problems", ("Classifier", "Regressor", "Problem", "problems", "step_times")),
    ("Data and models", ("open_dataset", "data", "models")),
    ("Training", ("train", "resume", "Run", "load_run", "watch", "compare")),
    ("Partitions and updates", ("UDPA", "IDPA", "SGWU", "AGWU", "AllReduce", "updates")),
    ("Replay and simulation", ("replay", "simulate")),
    ("The inner layer", ("Inner", "inner")),
    ("Sweeps and searches", ("parameters", "sweep", "summary", "report", "search", "Search", "load_search", "gallery")),
    ("Subnets", ("Decomposition", "Subnet", "train_subnets", "load_subnets")),
    ("Showers", ("showers",)),
    ("Jets", ("jets",)),
    ("Figures", ("plots",)),
    ("Faults on purpose", ("chaos",)),
    (
        "Errors",
        (
            "LabError",
            "ClusterError",
            "DataError",
            "PartitionError",
            "ProblemError",
            "RunError",
            "SweepError",
            "UpdateError",
            "WireError",
            "WorkerError",
        ),
    ),
)

# What each example of a public docstring finds; the reference shows it.
BEFORE = """\
import numpy as np
import torch

import labkit

lab = labkit.connect("threads", 2)
problem = labkit.Classifier("lenet", "digits", train_samples=400)
run = labkit.train(problem, lab, passes=2).wait()
found = labkit.search(problem, {"lr": (0.01, 0.5, "log"), "momentum": (0.0, 0.95)}, lab, trials=4, passes=1)
joined = labkit.train_subnets(problem, lab, (2, 2), epochs=1)
jets = labkit.jets.load("jets")
small = {"train_samples": 96, "test_samples": 64, "batch_size": 32}
clustered = labkit.train(labkit.jets.UCluster("jets", pretrain=1, neighbours=4, **small), lab, passes=2).wait()
gan = labkit.train(labkit.showers.ShowerGAN("showers-wsi", score_samples=32, **small), lab, passes=1).wait()
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--execute", nargs="*", default=[], metavar="NUMBER", help='notebooks to execute first, such as 00 01, or "all"'
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "docs", help="the site; default: build/docs")
    options = parser.parse_args(arguments)
    pages = options.out.with_name(options.out.name + "-pages")
    collect(pages)
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        number = notebook.name[:2]
        execute(notebook, pages / "notebooks" / notebook.name, anew="all" in options.execute or number in options.execute)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", ROOT / "docs", pages, options.out]
    code = subprocess.run(command, check=False).returncode
    (options.out / "index.html").write_text('<meta http-equiv="refresh" content="0; url=README.html">')
    return code


def collect(pages: Path) -> None:
    """Copies of the pages, and those that are made here."""
    figures = [path.relative_to(ROOT) for path in (ROOT / "docs" / "figures").glob("*.png")]
    for name in (*PAGES, *LINKED, *figures):
        target = pages / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    architecture = pages / "docs" / "architecture.md"
    architecture.write_text(
        re.sub(r"```mermaid\n(.*?)```", lambda fence: picture(fence[1]), architecture.read_text(), flags=re.DOTALL)
    )
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb")), sorted((ROOT / "notebooks" / "benchmarks").glob("*.ipynb"))
    (pages / "notebooks" / "benchmarks").mkdir(parents=True, exist_ok=True)
    for notebook in notebooks[1]:  # hours of measurements: their text and code
        shutil.copy2(notebook, pages / "notebooks" / "benchmarks" / notebook.name)
    (pages / "reference").mkdir(exist_ok=True)
    for title, names in PARTS:
        (pages / "reference" / f"{slug(title)}.md").write_text(reference(title, names))
    trees = {
        "Notebooks": [f"notebooks/{path.stem}" for path in notebooks[0]],
        "Public names": [f"reference/{slug(title)}" for title, _ in PARTS],
        "More": ["docs/data", "docs/jets"],
        "The project": ["docs/glossary", "docs/architecture", "CONTRIBUTING", "SECURITY", "CHANGELOG"],
        "Benchmarks": [f"notebooks/benchmarks/{path.stem}" for path in notebooks[1]],
    }
    with (pages / "README.md").open("a") as readme:
        for caption, entries in trees.items():
            readme.write(
                "\n".join(["", "```{toctree}", ":hidden:", ":maxdepth: 1", f":caption: {caption}", "", *entries, "```", ""])
            )


def picture(layers: str) -> str:
    """The layers of the packages, which GitHub draws by mermaid, as SVG: no script, no network."""
    rows = [re.findall(r'(\w+)\["(.+?)"\]', layer) for layer in re.findall(r"subgraph .*?\n(.*?)\n    end", layers, re.DOTALL)]
    thick = re.search(r"class (\S+) server", layers)[1].split(",")
    width, height, gap, most = 112, 34, 12, max(map(len, rows))
    wide, parts = most * (width + gap) + gap, []
    for number, row in enumerate(rows):
        y, left = number * (height + 3 * gap) + gap, (wide - len(row) * (width + gap) + gap) / 2
        for at, (name, label) in enumerate(row):
            x = left + at * (width + gap)
            stroke = 3 if name in thick else 1
            parts.append(f'<rect x="{x:g}" y="{y}" width="{width}" height="{height}" rx="4" fill="none" stroke-width="{stroke}"/>')
            parts.append(f'<text x="{x + width / 2:g}" y="{y + 22}">{label}</text>')
        if number + 1 < len(rows):
            parts.append(f'<path d="M{wide / 2:g} {y + height + 6} v{2 * gap} m-5 -8 l5 8 l5 -8" fill="none"/>')
    said = "Layers of packages, the highest first: " + "; ".join(", ".join(label for _, label in row) for row in rows)
    style = "stroke:currentColor;font:14px sans-serif"
    text = "<style>.layers text{text-anchor:middle;fill:currentColor;stroke:none}</style>"
    size = f'viewBox="0 0 {wide} {len(rows) * (height + 3 * gap)}" width="{wide}"'
    return (
        f'<svg class="layers" {size} style="max-width:100%;{style}" role="img" aria-label="{said}">{text}{"".join(parts)}</svg>\n'
    )


def execute(notebook: Path, target: Path, anew: bool) -> None:
    """The notebook with its outputs; as it is in the repository where it was never executed and need not be."""
    if anew:
        papermill = [sys.executable, "-m", "papermill", "--cwd", str(target.parent), str(notebook), str(target)]
        subprocess.run(papermill, check=True)
    elif not target.exists():
        shutil.copy2(notebook, target)


def slug(title: str) -> str:
    return title.lower().replace(" ", "-")


def public(module: str) -> list[str]:
    """The public names of `labkit`, or of a package of it."""
    if module == "labkit":
        stub = ast.parse((ROOT / "labkit" / "__init__.pyi").read_text())
        return [alias.asname or alias.name for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    return list(getattr(importlib.import_module(f"labkit.{module}"), "__all__", ()))


def reference(title: str, names: tuple[str, ...]) -> str:
    """A page of public names with their docstrings."""
    lines = [f"# {title}", "", "Before each example this has run:", "", "```python", BEFORE.rstrip(), "```", ""]
    for name in names:
        thing = getattr(labkit, name)
        if isinstance(thing, type(labkit)):
            lines += [f"## `labkit.{name}`", "", *directive("module", f"labkit.{name}", [":no-members:"])]
            for own in (one for one in public(name) if one not in public("labkit")):
                lines += directive(kind(getattr(thing, own)), f"labkit.{name}.{own}", [])
        else:
            lines += directive(kind(thing), f"labkit.{name}", [])
    return "\n".join(lines)


def kind(thing: object) -> str:
    """As Sphinx calls it."""
    if isinstance(thing, type):
        return "exception" if issubclass(thing, Exception) else "class"
    return "function" if callable(thing) else "data"


def directive(what: str, name: str, options: list[str]) -> list[str]:
    return ["```{eval-rst}", f".. auto{what}:: {name}", *(f"   {option}" for option in options), "```", ""]


if __name__ == "__main__":
    sys.exit(main())
