"""A notebook to be swept; used by all tests of experiments."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

PARAMETERS = """seed: int = 0  # of everything
lr: float = 0.1  # learning rate
sizes: list[int] = [1, 2]
strategy = "agwu"
extra = None
run_dir: str = "runs"  # where results go"""


def write(path: Path, *cells: str, first: str | None = PARAMETERS, **metadata: object) -> Path:
    """A notebook of a parameters cell and more."""
    tagged = [] if first is None else [new_code_cell(first, metadata={"tags": ["parameters"]})]
    nbformat.write(new_notebook(cells=tagged + [new_code_cell(cell) for cell in cells], metadata=metadata), path)
    return path
