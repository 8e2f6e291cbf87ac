"""Every notebook runs top to bottom through the sweep, with tiny parameters, and keeps the conventions.

A kernel needs longer for its imports and its first figure than a tiny notebook for its work. So several notebooks share one kernel,
with a namespace of its own each; one has a kernel for itself, as a user would.

Used by pytest.
"""

import json
from pathlib import Path

import pytest

import labkit

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
SMALL = {"kind": "threads", "data": "digits"}
TINY = {
    "00-bring-your-own-model": SMALL
    | {"train_samples": 300, "test_samples": 90, "passes": 2.0, "slowdown": [1, 2], "target": 0.2, "grid": {"lr": [0.003]}},
    "01-start-a-lab": SMALL | {"train_samples": 200},
    "02-partition-the-data": SMALL | {"train_samples": 400, "passes": 3.0},
    "03-update-the-weights": SMALL
    | {"train_samples": 300, "test_samples": 60, "passes": 2.0, "local_steps": 4, "target": 0.2}
    | {"strategy": "sgwu+idpa agwu+udpa"},
    "04-train-in-parts": SMALL
    | {"train_samples": 400, "test_samples": 100, "epochs": 1, "grid": [1, 2], "overlap": 1, "baselines": ["global", "coherent"]},
    "05-compare-the-updates": SMALL
    | {"updates": ["sgwu", "fedbuff"], "train_samples": 300, "test_samples": 60, "passes": 2.0, "local_steps": 4, "target": 0.2},
    "06-scale-the-cluster": SMALL
    | {"train_samples": 300, "passes": 2.0, "local_steps": 4, "data_sizes": [500, 1000], "node_counts": [1, 4], "crowds": [4, 12]}
    | {"checked": [["sgwu", "idpa"]], "long": 2.0, "larger": [1, 100], "per_worker": 2},
    "07-kill-a-worker": SMALL
    | {"train_samples": 400, "test_samples": 100, "passes": 16.0, "local_steps": 4, "every": 0.2, "most": 2},
    "08-split-the-step": SMALL
    | {"batch_size": 8, "batch_sizes": [8], "splits": ["none", "samples"], "steps": 3, "threads": 1}
    | {"train_samples": 200, "test_samples": 60, "passes": 1.0, "local_steps": 4},
    "09-search-the-settings": SMALL
    | {
        "methods": "random tpe",
        "trials": 4,
        "front_trials": 2,
        "seeds": [0],
        "passes": 0.5,
        "long": 1.0,
        "train_samples": 200,
        "test_samples": 60,
    },
    "10-generate-the-showers": {
        **{
            "kind": "threads",
            "gan_passes": 0.5,
            "flow_passes": 0.1,
            "local_steps": 1,
            "n_showers": 300,
            "compared": 30,
            "timed": 10,
        },
        **{"classifiers": [], "channels": 8},
    },
    "11-distribute-the-gan": {
        **{
            "kind": "threads",
            "updates": "sgwu",
            "passes": 0.5,
            "local_steps": 1,
            "n_showers": 300,
            "compared": 30,
            "classifiers": [],
        },
    },
    "12-cluster-the-jets": {"kind": "threads", "particles": 12, "most": 100, "passes": 3.0, "pretrain": 1.0, "batch_size": 16}
    | {"defects": ["kmeans-per-rank"], "trials": 1, "forms": ["several numbers", "distill"]},
    "13-scale-the-jets": {
        "kind": "threads",
        "particles": 12,
        "most": 100,
        "passes": 2.0,
        "batch_size": 16,
        "row_groups": [1, 4],
        "rows": 50,
    },
    "benchmarks/15-search": {"tables": ["made"], "trials": 12, "seeds": 2, "blocks": [1, 2], "gp_tables": ["made"], "gp_trials": 4}
    | {"gp_seeds": 1, "before": [8], "kind": "threads", "n_workers": 1},
    "benchmarks/14-inner": {"models": ["lenet"], "batch_sizes": [8], "small": True, "steps": 3, "compile_too": [], "take_core": []}
    | {"precisions": ["float32"], "threads": 1},
    "benchmarks/04-chaos": {"kinds": ["dask"], "updates": ["allreduce"], "n_workers": 2, "passes": 3.0, "most": 2, "every": 1.0}
    | {"beside": ["agwu"], "kills": 1, "freezes": 0, "simulated": ["agwu"], "simulated_s": 60.0}
    | {"minutes": 0.05, "every_s": 1.0, "calm_s": 0.5, "sleeping": 2},
    "benchmarks/01-overhead": SMALL | {"batch_sizes": [16], "updates": ["gem"], "rounds": 1, "samples": 600, "local_steps": 5},
    "benchmarks/11-every-batch": SMALL
    | {"samples": 400, "score_samples": 16, "test_samples": 60, "rounds": 1, "updates": ["easgd"]},
    "benchmarks/12-exchange": SMALL
    | {"exchanges": ["float32", "bfloat16"], "megabytes": 0.1, "batch_size": 16, "samples": 400, "rounds": 1}
    | {"test_samples": 60, "encrypted": [0.1]},
    "benchmarks/13-streaming": {
        **{
            "kind": "threads",
            "megabytes": 4.0,
            "part_megabytes": 2.0,
            "rows": 64,
            "limit_megabytes": 0.0,
            "width": 0.1,
            "rounds": 1,
        },
        **{"uneven": [1, 2], "uneven_rows": 32},
    },
    "benchmarks/05-back-ends": {
        **{"back_ends": ["dask", "ipyparallel"], "rounds": 1, "data": "digits", "train_samples": 300, "test_samples": 60},
        "passes": 2.0,
    },
    "benchmarks/06-parts": {
        **{"cuts": [[[1, 2], 1]], "width_rules": ["sqrt"], "seeds": [0]},
        "settings": SMALL | {"train_samples": 300, "test_samples": 100, "epochs": 1},
    },
    "benchmarks/07-volumes": {
        **{"kind": "threads", "n": 40, "size": [16, 16, 32], "grid": [1, 1, 2], "overlap": 1},
        **{"model_args": {"width": 0.1}, "epochs": 1, "baselines": ["global"]},
    },
    "benchmarks/08-updates": SMALL
    | {"updates": ["sgwu", "agwu"], "kinds": ["none", "jitter", "stalls"], "seeds": [0], "stalls": [0.3, 0.3], "target": 0.2}
    | {"train_samples": 300, "test_samples": 60, "passes": 2.0, "local_steps": 4},
    "benchmarks/09-simulator": SMALL
    | {"labs": [[[1, 2], 0.0], [[1], 0.3]], "rounds": 1, "train_samples": 300, "passes": 2.0, "fitted": ["agwu", "udpa", 2]},
    "benchmarks/10-server": {
        **{"sizes": [0.1], "crowd": [1, 3], "updates": ["agwu", "sgwu"]},
        **{"nap": 0.02, "seconds": 0.2, "turns": 2},
    },
    "benchmarks/03-gpu": SMALL
    | {"models": ["lenet"], "batch_size": 16, "steps": 8, "rounds": 1, "crowd": [1, 2], "megabytes": [0.1]}
    | {"layouts": [True]},
    "benchmarks/02-time-to-accuracy": {
        "strategies": ["sgwu+udpa"],
        "seeds": [0],
        "settings": SMALL | {"train_samples": 300, "test_samples": 60, "passes": 2.0, "local_steps": 4, "target": 0.2},
    },
}
FIGURES = {
    "00-bring-your-own-model": ["accuracy.png", "confusion.png", "worst.png"],
    "01-start-a-lab": ["speed.png"],
    "02-partition-the-data": ["balance.png"],
    "03-update-the-weights": ["accuracy.png", "timeline.png", "staleness.png"],
    "04-train-in-parts": ["parts.png", "part-accuracy.png", "part-times.png"],
    "05-compare-the-updates": ["accuracy.png", "staleness.png"],
    "06-scale-the-cluster": ["data.png", "nodes.png", "crowd.png"],
    "07-kill-a-worker": ["membership.png"],
    "08-split-the-step": ["gantt.png", "roofline.png", "step-times.png"],
    "09-search-the-settings": ["history.png", "points.png", "importance.png", "timeline.png", "front.png"],
    "10-generate-the-showers": ["flow.png", "gan.png"],
    "11-distribute-the-gan": ["fractions.png"],
    "12-cluster-the-jets": ["masses.png", "embedding.png"],
    "13-scale-the-jets": ["scale.png"],
    "benchmarks/15-search": ["blocks.png"],
    "benchmarks/02-time-to-accuracy": ["curves.png"],
    "benchmarks/05-back-ends": ["back-ends.png"],
    "benchmarks/06-parts": ["parts.png"],
    "benchmarks/11-every-batch": ["every-batch.png"],
    "benchmarks/12-exchange": ["exchange.png"],
    "benchmarks/13-streaming": ["memory.png"],
    "benchmarks/14-inner": ["lenet.png"],
    "benchmarks/04-chaos": ["storms.png"],
    "benchmarks/07-volumes": ["part-times.png"],
    "benchmarks/08-updates": ["updates.png"],
    "benchmarks/09-simulator": ["errors.png"],
    "benchmarks/10-server": ["server.png"],
}
BENCHMARKS = sorted(name for name in TINY if name.startswith("benchmarks/"))
FIRST = ["01-start-a-lab", "03-update-the-weights"]
ALONE = "00-bring-your-own-model"


def path_of(name):
    return NOTEBOOKS / f"{name}.ipynb"


def test_every_notebook_is_here():
    assert {str(path.relative_to(NOTEBOOKS).with_suffix("")) for path in NOTEBOOKS.rglob("[0-9]*.ipynb")} == set(TINY)


def left(name, folder):
    """Results and figures are there, and each figure is a picture."""
    for figure in FIGURES.get(name, []):
        assert (folder / figure).read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "results.json").read_text())


def run(path, parameters, out, timeout=1500):
    table = labkit.sweep(path, [parameters], out=out, timeout=timeout, progress=False)
    assert set(table.status) == {"done"}, table[["error", "notebook"]].to_dict("records")
    return Path(table.notebook.iloc[0]).parent


@pytest.mark.slow
@pytest.mark.timeout(1520)
def test_one_runs_and_leaves_results_and_figures(tmp_path, cache):
    left(ALONE, run(path_of(ALONE), TINY[ALONE], tmp_path / "sweep"))


LATER = [name for name in TINY if name not in (*BENCHMARKS, *FIRST, ALONE)]
GROUPS = {"first": FIRST, **{f"later-{i + 1}": LATER[i::2] for i in range(2)}}
GROUPS |= {f"benchmarks-{i + 1}": BENCHMARKS[i::3] for i in range(3)}


@pytest.mark.slow
@pytest.mark.timeout(1520)
@pytest.mark.parametrize("group", GROUPS)
def test_several_run_in_one_kernel_and_leave_results_and_figures(group, tmp_path, cache):
    names = GROUPS[group]
    book, cells = json.loads(path_of(names[0]).read_text()), []

    def add(source, *tags):
        about = {"cell_type": "code", "id": f"cell-{len(cells)}", "metadata": {"tags": tags}}
        cells.append(about | {"source": source, "outputs": [], "execution_count": None})

    add('run_dir: str = "runs"', "parameters")
    there = str(path_of(names[0]).parent)  # benchmarks use modules and notebooks beside them
    add(f"import os, sys\nsys.path.insert(0, {there!r})\nos.chdir({there!r})")
    for name in names:
        values = TINY[name] | {"run_dir": str(tmp_path / name)}
        assert {*values} <= {parameter.name for parameter in labkit.parameters(path_of(name))}
        for cell in json.loads(path_of(name).read_text())["cells"]:
            if cell["cell_type"] == "code":
                add("".join(cell["source"]))
            if "parameters" in cell["metadata"].get("tags", []):
                add("\n".join(f"{key} = {value!r}" for key, value in values.items()))
        add("%reset -f\n__spec__ = None  # which it deletes, and processes that a benchmark starts by itself ask for")
    (tmp_path / "several.ipynb").write_text(json.dumps(book | {"cells": cells}))
    run(tmp_path / "several.ipynb", {}, tmp_path / "sweep")
    for name in names:
        left(name, tmp_path / name)


@pytest.mark.parametrize("name", TINY)
def test_it_keeps_the_conventions(name):
    cells = json.loads(path_of(name).read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code), "commit it without outputs"
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in code) == 1
    assert len(cells) <= 30 and "What to look at" in text and "*In words:*" in text
    for cell in code:
        lines = [line for line in "".join(cell["source"]).splitlines() if line.strip()]
        assert len(lines) <= 8 or "parameters" in cell["metadata"].get("tags", []), lines
    folders = [parameter.default for parameter in labkit.parameters(path_of(name)) if parameter.name == "run_dir"]
    assert folders == [f"runs/{Path(name).name}"], "of its own: notebooks do not overwrite each other's results"
    assert all(parameter.help for parameter in labkit.parameters(path_of(name))), "each parameter has a comment"
