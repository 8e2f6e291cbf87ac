"""The gallery: rows of runs, of a sweep and of a search, on one page that loads nothing, runs no text of a record and imports nothing.

tests/plots/test_gallery.py has the page, and tests/browser/test_gallery.py opens it.
"""

from __future__ import annotations

import json
import re
import shutil
import sys

import pytest

import labkit
from labkit.__main__ import main
from labkit.errors import RunError
from labkit.experiments.search import Search
from labkit.experiments.space import Space
from labkit.experiments.study import Study
from tests.plots.test_report import Page
from tests.runs.test_old_records import FOLDER
from tests.test_cards import card_of

EVIL = "</script><script>hacked = true</script><!--&amp;"


def copied(folder, name, source="format-2-agwu", **problem):
    """A run of an earlier format, whose settings have no digest: with these of its problem."""
    path = shutil.copytree(FOLDER / source, folder / name)
    config = json.loads((path / "config.json").read_text())
    config["problem"] |= problem
    config["name"] = problem.get("called", name)
    (path / "config.json").write_text(json.dumps(config))
    return path


def read(path):
    """What the page shows, and the page."""
    page = Page(path)
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())
    data = json.loads(data)
    return {(column["kind"], column["name"]): column for column in data["columns"]}, data["rows"], page


def test_runs_of_a_folder_are_rows_with_what_differs_their_results_and_curves(tmp_path):
    for name, lr in (("a", 0.1), ("b", 0.2)):
        copied(tmp_path, name, lr=lr)
    copied(tmp_path / "deeper", "c", "format-2-stopped")
    (tmp_path / "a" / "notebook.ipynb").write_text("{}")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    path = labkit.gallery(tmp_path)
    assert path == tmp_path / "gallery.html"
    columns, rows, page = read(path)
    assert [row["state"] for row in rows] == ["done", "done", "stopped", "damaged"] and "broken" in rows[3]["error"]
    assert columns["setting", "lr"]["values"][:2] == [0.1, 0.2] and columns["setting", "lr"]["values"][3] is None
    run = labkit.load_run(tmp_path / "a")
    assert columns["result", "score"]["values"][0] == pytest.approx(run.summary()["score"], rel=1e-4)
    assert rows[0]["curves"][0]["seconds"] == pytest.approx(run.kept_curve().seconds.tolist(), rel=1e-4)
    assert rows[0]["links"] == [{"text": "notebook", "href": "./a/notebook.ipynb"}] and not rows[1]["links"]
    assert "4 runs" in page.text and tmp_path.name in page.text
    assert read(labkit.gallery([run, tmp_path / "b"], tmp_path / "two.html"))[0]["setting", "lr"]["values"] == [0.1, 0.2]


def test_a_row_names_its_directory_once(tmp_path):
    for folder, name in (("", "a"), ("", "b"), ("one", "c"), ("two", "c"), ("", "kept")):
        copied(tmp_path / folder, name)
    (tmp_path / "kept").rename(tmp_path / "d")
    _, rows, _ = read(labkit.gallery(tmp_path))
    label = labkit.load_run(tmp_path / "a").label
    assert sorted(row["name"] for row in rows) == [f"{name}: {label}" for name in ("a", "b", "kept (d)", "one/c", "two/c")]


def test_a_page_loads_nothing_and_lets_one_script_run(tmp_path):
    copied(tmp_path, "a")
    _, _, page = read(labkit.gallery(tmp_path))
    assert not re.search(r"https?:|url\(|@import", (tmp_path / "gallery.html").read_text())
    assert not any(tag in ("link", "iframe", "img", "object") or "src" in about or "href" in about for tag, about in page.tags)
    (policy,) = [about["content"] for tag, about in page.tags if about.get("http-equiv")]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy


def test_text_of_a_record_stays_text(tmp_path):
    copied(tmp_path, "a", called=EVIL, model=EVIL, lr=0.1)
    copied(tmp_path, "<img src=x onerror=alert(1)>", lr=0.2)
    columns, rows, page = read(labkit.gallery(tmp_path))
    assert sum(tag == "script" for tag, _ in page.tags) == 2 and not any(tag == "img" for tag, _ in page.tags)
    assert rows[1]["name"].startswith(EVIL) and EVIL in columns["setting", "model"]["values"]


def test_nothing_that_a_record_names_is_imported(tmp_path, monkeypatch):
    (tmp_path / "named_by_record.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    path = copied(tmp_path / "runs", "a", kind="named_by_record:Problem", model="named_by_record:net")
    (path / "metrics.parquet").unlink()
    columns, rows, _ = read(labkit.gallery(tmp_path / "runs"))
    assert "named_by_record" not in sys.modules and ("result", "score") not in columns
    (curve,) = rows[0]["curves"]
    pushes = labkit.load_run(path).events.query("kind == 'push'")
    assert curve["dashed"] and len(curve["loss"]) == len(pushes) and curve["samples"][-1] == pushes.samples.sum()


def test_a_sweep_has_its_parameters_its_results_and_its_notebooks(tmp_path):
    for number, lr in enumerate((0.1, 0.2)):
        folder = tmp_path / f"n-{number}"
        folder.mkdir()
        record = {"id": str(number), "hash": str(number), "given": ["lr"], "parameters": {"lr": lr, "seed": 0}}
        (folder / "params.json").write_text(json.dumps(record))
        (folder / "status.json").write_text(json.dumps({"state": "done", "seconds": 3.0}))
        (folder / "results.json").write_text(json.dumps([{"accuracy": lr / 2, "seconds": 1.0}]))
        (folder / "notebook.ipynb").write_text("{}")
    copied(tmp_path / "n-0", "run")
    columns, rows, _ = read(labkit.gallery(tmp_path))
    assert [row["name"] for row in rows] == ["lr=0.1", "lr=0.2"] and [len(row["curves"]) for row in rows] == [1, 0]
    assert columns["result", "accuracy"]["values"] == [0.05, 0.1]
    assert columns["result", "seconds"]["values"] == [1, 1], "its own, of which the first front is"
    assert columns["result", "notebook_seconds"]["values"] == [3, 3]
    assert rows[1]["links"] == [{"text": "notebook", "href": "./n-1/notebook.ipynb"}]


def test_a_search_that_goes_on_meanwhile_has_the_trials_of_its_table(tmp_path, monkeypatch):
    study = Study(Space({"lr": (0.01, 0.1)}), "random", 0, 3)
    config = {"method": "random", "trials": 9, "target": None, "folds": None, "problem": {}}
    study.ask()
    table = Search.table

    def asks(found):
        seen = table(found)
        study.ask()
        return seen

    monkeypatch.setattr(Search, "table", asks)
    page = labkit.gallery(Search(tmp_path, config, study), tmp_path / "gallery.html")
    assert "1 trials of a search" in page.read_text() and len(study.trials) == 2


def test_a_search_has_a_row_for_each_trial(tmp_path):
    space = Space({"lr": (0.1, 1.0), "width": [4, 8]})
    study = Study(space, "random", 0, 3, tmp_path)
    for number in range(3):
        study.ask()
        study.begin(number, None, [0])
        study.tell(number, *(("done", number / 2) if number < 2 else ("failed", None, "no luck")))
    config = {"id": "x", "name": "s", "problem": "m:p", "space": space.config(), "method": "random", "seed": 0, "folds": 0}
    config |= {"prune": None, "trials": 3, "target": None, "n_random": 3, "counts_constants": False}
    (tmp_path / "search.json").write_text(json.dumps(config))
    copied(tmp_path / "trials", "1")
    columns, rows, _ = read(labkit.gallery(tmp_path, tmp_path / "page.html"))
    found = labkit.load_search(tmp_path)
    assert [row["name"] for row in rows] == ["trial 0", "trial 1", "trial 2"] and rows[2]["error"] == "no luck"
    assert columns["result", "score"]["values"] == [0.0, 0.5, None] and [len(row["curves"]) for row in rows] == [0, 1, 0]
    assert columns["setting", "lr"]["values"] == pytest.approx([point["lr"] for point in found.points], rel=1e-4)
    assert read(labkit.gallery(found))[1] == rows


def test_a_curve_that_cannot_be_read_is_said_and_a_run_alone_is_shown(tmp_path):
    path = copied(tmp_path, "a")
    (path / "metrics.parquet").write_bytes(b"x")
    run = labkit.load_run(path)
    columns, (row,), _ = read(labkit.gallery(run, tmp_path / "page.html"))
    assert row["state"] == "done" and "metrics.parquet is damaged" in row["error"] and ("result", "score") not in columns
    assert row["curves"][0]["dashed"]
    assert "curve" in card_of(run) and "metrics.parquet is damaged" in card_of(run) and "samples/s" in card_of(run)


def test_models_of_a_notebook_go_by_their_names(tmp_path):
    for name in "ab":
        copied(tmp_path, name, model={"by_value": f"net_{name}"})
    columns, *_ = read(labkit.gallery(tmp_path))
    assert columns["setting", "model"]["values"] == ["net_a", "net_b"]


def test_what_is_no_folder_of_runs_is_refused(tmp_path, capsys):
    with pytest.raises(RunError, match="there are no runs in"):
        labkit.gallery(tmp_path)
    with pytest.raises(RunError, match="there is no folder"):
        labkit.gallery(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"must end in .html"):
        labkit.gallery(tmp_path, tmp_path / "gallery.txt")
    copied(tmp_path, "a")
    assert main(["gallery", str(tmp_path), "--out", str(tmp_path / "out.txt")]) == 2
    assert main(["gallery", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(tmp_path / "gallery.html")}
