"""The report: one file that holds it all, also of runs of which something cannot be drawn."""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys
import textwrap
from html.parser import HTMLParser
from pathlib import Path

import pytest

import labkit
from labkit import plots
from labkit.__main__ import main
from labkit.errors import LabError
from tests.runs.test_old_records import FOLDER

reports = sys.modules["labkit.plots.report"]  # the name in `plots` is the function
RUNS = FOLDER / "format-2-agwu", FOLDER / "format-3-resumed"


@pytest.fixture(autouse=True)
def _static(monkeypatch):
    monkeypatch.setenv("LABKIT_PLOTS", "static")


class Page(HTMLParser):
    """What a browser would load, show and say."""

    def __init__(self, path):
        super().__init__()
        self.open, self.images, self.words, self.tags = [], [], [], []
        self.feed(path.read_text())
        assert not self.open, self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "img":
            self.images.append(dict(attributes))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_a_report_is_one_page_that_loads_nothing(tmp_path):
    runs = [labkit.load_run(path) for path in RUNS]
    page = Page(plots.report(runs, tmp_path / "new" / "report.html"))
    assert len(page.images) == 3 + 2 * 3 and all(image["alt"] for image in page.images)
    for image in page.images:
        kind, _, content = image["src"].partition(",")
        assert kind == "data:image/png;base64" and base64.b64decode(content).startswith(b"\x89PNG")
    assert not any(tag in ("script", "link", "iframe") or "href" in about for tag, about in page.tags)
    assert not re.search(r"https?://|url\(", (tmp_path / "new" / "report.html").read_text())
    for run in runs:
        assert f"labkit.load_run({str(run.path)!r})" in page.text and f"{run.summary()['samples_per_s']:.4g}" in page.text
        assert f"problem.lr {run.config.problem['lr']}" in page.text
        assert f"seed {run.config.seed}." in page.text and f"labkit.connect('{run.config.kind}'" in page.text
        assert "labkit.train(" in page.text and "labkit.replay(run)" in page.text
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["report.html"]


def test_what_cannot_be_drawn_is_said(tmp_path, monkeypatch):
    path = shutil.copytree(RUNS[0], tmp_path / "run")
    lines = (path / "events.jsonl").read_text().splitlines(True)
    (path / "events.jsonl").write_text("".join([*lines[:5], "{<b>\n", *lines[6:]]))
    for figures in ("OF_ALL", "OF_EACH"):  # one of each
        monkeypatch.setattr(reports, figures, dict(list(getattr(reports, figures).items())[:1]))
    page = Page(plots.report(labkit.load_run(path), tmp_path / "report.html"))
    assert "state damaged" in page.text and "line 6 is damaged" in page.text
    assert not page.images and "No timeline:" in page.text
    with pytest.raises(LabError, match="needs a run at least"):
        plots.report([])
    with pytest.raises(ValueError, match=r"must end in .html"):
        plots.report(labkit.load_run(RUNS[0]), tmp_path / "report.txt")


def test_a_report_from_the_shell(tmp_path, monkeypatch, capsys):
    for figures in ("OF_ALL", "OF_EACH"):
        monkeypatch.setattr(reports, figures, {})
    page = tmp_path / "page.html"
    assert main(["report", *map(str, RUNS), "--out", str(page)]) == 0
    assert page.name in capsys.readouterr().out and "2 runs" in Page(page).text
    assert main(["report", str(RUNS[0]), "--out", str(tmp_path / "page.txt")]) == 2
    assert main(["report", str(tmp_path / "nowhere")]) == 2 and "there is no run at" in capsys.readouterr().err


def test_a_report_of_a_folder_has_all_runs_below(tmp_path, monkeypatch, capsys):
    for figures in ("OF_ALL", "OF_EACH"):
        monkeypatch.setattr(reports, figures, {})
    for name in ("a", "sweep/n-0/run"):
        shutil.copytree(RUNS[0], tmp_path / name)
    for name in ("sweep/n-1", "sweep/n-2/damaged"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "sweep" / "n-2" / "damaged" / "config.json").write_text("{")
    shutil.copytree(RUNS[1], tmp_path / "sweep" / "n-1" / "run")
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "sweep"), "--out", str(page), "--json"]) == 0
    answer, text = capsys.readouterr(), Page(page).text
    runs = [str(tmp_path / name) for name in ("a", "sweep/n-0/run", "sweep/n-1/run")]
    assert list(json.loads(answer.out)["runs"]) == runs and "3 runs" in text and "Left out: " in answer.err
    (tmp_path / "a" / "events.jsonl").write_text("{<b>\n")
    assert main(["report", str(tmp_path / "a"), "--out", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][runs[0]]["state"] == "damaged"
    table = labkit.compare(tmp_path / "sweep")
    assert table.state.tolist() == ["done", "done", "damaged"]


@pytest.fixture
def _no_figures(monkeypatch):
    for figures in ("OF_ALL", "OF_EACH"):
        monkeypatch.setattr(reports, figures, {})


@pytest.mark.usefixtures("_no_figures")
def test_a_loss_that_is_no_number_is_said_and_what_there_is_not_is_left_empty(tmp_path, monkeypatch):
    runs = [labkit.load_run(path) for path in RUNS]
    card = dict(runs[0].summary())
    monkeypatch.setattr(runs[0], "summary", lambda: card | {"loss": float("nan"), "own": None})
    rows = Page(plots.report(runs, tmp_path / "report.html")).text
    assert re.search(r" loss nan [\d.]+ ", rows) and rows.count("nan") == 1 and "None" not in rows.partition("Settings")[0]


@pytest.fixture
def printer(tmp_path, monkeypatch):
    """Stands in for Chromium on PATH, and does what it is told, with `given`, its arguments by name, and `page`, that of the report."""

    def make(code):
        file = tmp_path / "bin" / "chromium"
        file.parent.mkdir()
        file.write_text(
            f"#!{sys.executable}\nimport os, sys, time\nfrom pathlib import Path\nfrom urllib.parse import unquote, urlsplit\n"
            "given = dict(a.lstrip('-').partition('=')[::2] for a in sys.argv[1:])\n"
            f"page = Path(unquote(urlsplit(sys.argv[-1]).path)).read_text()\n{textwrap.dedent(code)}"
        )
        file.chmod(0o755)
        monkeypatch.setenv("PATH", str(file.parent))

    return make


@pytest.mark.usefixtures("_no_figures")
def test_a_pdf_is_the_opened_page_as_chromium_prints_it(tmp_path, printer):
    printer("Path(given['print-to-pdf']).write_text('%PDF' + given['user-data-dir'] + '\\n' + page)")
    made = plots.report(labkit.load_run(RUNS[0]), tmp_path / "new" / "report.pdf")
    profile, _, page = made.read_text().partition("\n")
    assert made.name == "report.pdf" and not Path(profile.removeprefix("%PDF")).parent.exists()
    assert "<details open>" in page and "<details>" not in page


@pytest.mark.usefixtures("_no_figures")
def test_a_pdf_that_cannot_be_made_is_said_in_a_line(tmp_path, printer, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    run = labkit.load_run(RUNS[0])
    with pytest.raises(LabError, match=r"none of chromium, .* is on PATH"):
        plots.report(run, tmp_path / "report.pdf")
    assert main(["report", str(RUNS[0]), "--out", str(tmp_path / "report.pdf")]) == 2
    printer("print('no display', file=sys.stderr); sys.exit(3)")
    with pytest.raises(LabError, match=r"printed no PDF and ended with 3: no display"):
        plots.report(run, tmp_path / "report.pdf")
    monkeypatch.setattr(reports, "PRINT_S", 0.3)
    (tmp_path / "bin" / "chromium").write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)")
    with pytest.raises(LabError, match=r"printed no PDF in 0.3 s"):
        plots.report(run, tmp_path / "report.pdf")
    assert [file.name for file in tmp_path.iterdir()] == ["bin"]


@pytest.mark.slow
@pytest.mark.usefixtures("_no_figures")
@pytest.mark.skipif(not any(map(shutil.which, reports.CHROMIUM)), reason="no Chromium on PATH")
def test_chromium_prints_a_report(tmp_path):
    made = plots.report(labkit.load_run(RUNS[0]), tmp_path / "report.pdf")
    assert made.read_bytes().startswith(b"%PDF") and made.read_bytes().count(b"/Type /Page\n") >= 2  # closed, it is one page
