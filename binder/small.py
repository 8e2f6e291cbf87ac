"""Write small values into the parameters of the notebooks: what one core and 1 GB do within a minute.

    python binder/small.py FOLDER

The values are those of `binder/small.json`. A line that gets one says so, and what the default was.

Used by `binder/postBuild`, on the copy of the repository that Binder has made.
"""

import ast
import json
import sys
from pathlib import Path


def rewritten(source: str, values: dict) -> str:
    """The lines of a parameters cell with `values` as defaults."""
    lines, left = source.splitlines(keepends=True), dict(values)
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.AnnAssign) and node.target.id in left:
            about = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")[2].strip()
            was = " ".join(ast.unparse(node.value).replace("'", '"').split())
            line = f"{node.target.id}: {ast.unparse(node.annotation)} = {json.dumps(left.pop(node.target.id))}"
            lines[node.lineno - 1 : node.end_lineno] = [f"{line}  # {about} (small, for Binder; elsewhere {was})\n"]
    if left:
        raise SystemExit(f"no such parameters: {', '.join(left)}")
    return "".join(lines)


def main(folder: Path) -> None:
    for name, values in json.loads(Path(__file__).with_name("small.json").read_text()).items():
        path = folder / f"{name}.ipynb"
        notebook = json.loads(path.read_text())
        (cell,) = (cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", []))
        cell["source"] = rewritten("".join(cell["source"]), values).splitlines(keepends=True)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
