"""The look and the back ends: each figure of a run can be kept as a picture and as a page, or says that nothing can be drawn."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from labkit import plots
from labkit.plots import style
from labkit.tables import Table
from tests.plots.helpers import Recorded, elements, rates

FIGURES = {
    "curves": lambda run: plots.curves([run], target=0.5),
    "timeline": plots.timeline,
    "membership": plots.membership,
    "staleness": plots.staleness,
    "balance": plots.balance,
    "weights": plots.weights,
    "speed": lambda run: plots.speed(rates(5100.0, 1290.0, slowdown=[1, 4])),
    "live": plots.live,
}


def test_importing_loads_no_plotting_library():
    code = "import labkit.plots, sys; print({'holoviews', 'hvplot', 'bokeh', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_a_picture_and_a_page(name, run, tmp_path):
    figure = FIGURES[name](run)
    picture = plots.save(figure, tmp_path / "figures" / f"{name}.png")
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 5_000
    page = plots.save(figure, tmp_path / f"{name}.html").read_text()
    assert "Bokeh" in page and not re.search(
        r"<script[^>]* src=|<link[^>]* href=.https?:|https?://[^\"\\ ]*[.]css", page
    )  # needs no network


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "speed"])
def test_of_a_run_without_events_the_figure_is_a_message(name, tmp_path):
    figure = FIGURES[name](Recorded(tmp_path, "idle", passes=0))
    assert plots.save(figure, tmp_path / "empty.png").stat().st_size > 2_000
    if name != "live":
        assert "idle: no" in next(iter(figure.traverse(lambda text: text.data[2], ["Text"])))


def test_a_figure_is_a_drawing_too_and_other_endings_are_refused(run, tmp_path):
    figure = plots.balance(run)
    assert "<svg" in plots.save(figure, tmp_path / "x.svg").read_text()
    assert plots.save(run.balance().hvplot.line("pass", "ratio"), tmp_path / "x.pdf").read_bytes()[:4] == b"%PDF"
    with pytest.raises(ValueError, match=r"'x\.jpg'.*\.png, \.svg, \.pdf or \.html"):
        plots.save(figure, tmp_path / "x.jpg")


def test_what_other_threads_say_while_a_library_is_loaded_quietly_is_there(monkeypatch, capsys):
    """As a search that goes on prints a line for each trial."""
    displayed = []
    publisher = SimpleNamespace(publish=lambda data: displayed.append(data))
    monkeypatch.setattr(style, "shell", lambda: SimpleNamespace(display_pub=publisher))

    def say(text):
        print(text)
        print(text, file=sys.stderr)
        publisher.publish(text)

    before = sys.stdout, sys.stderr
    with ThreadPoolExecutor(1) as pool, style._quiet():
        say("loaded")
        pool.submit(say, "a trial").result(20)
        taken = sys.stdout
    assert (sys.stdout, sys.stderr) == before
    say("drawn")
    print("by what was loaded", file=taken)
    assert displayed == ["a trial", "drawn"]
    assert capsys.readouterr() == ("a trial\ndrawn\nby what was loaded\n", "a trial\ndrawn\n")


@pytest.mark.parametrize("length", [8, 20, 30, 39])
@pytest.mark.parametrize("n", [2, 5])
def test_the_legend_is_within_the_cell_of_a_page(length, n):
    """Of 750 pixels, 90 of them left of the axes."""
    import holoviews as hv
    from matplotlib.font_manager import findfont, get_font

    labels = [f"AGWU + IDPA, {k} seeds: 20 % not reached, lr"[:length] for k in range(n)]
    plots.extension()
    figure = style.finish([style.line([0, 1], [k, 1], k, label, ("x", "y")) for k, label in enumerate(labels)], "Title")
    legend = hv.renderer("bokeh").get_plot(figure).state.legend[0]
    font = get_font(findfont("DejaVu Sans"))
    font.set_size(float(legend.label_text_font_size.removesuffix("pt")), 96)
    widths = []
    for item in legend.items:
        font.set_text(item.label.value)
        widths.append(font.get_width_height()[0] / 64 + legend.glyph_width + legend.label_standoff + legend.spacing)
    assert legend.ncols == 1 or legend.ncols * max(widths) < 660


def test_the_text_of_a_page_is_that_of_a_picture(run):
    """Of 96 pixels an inch, and of 120."""
    import holoviews as hv

    figure = plots.balance(run)
    page, picture = hv.renderer("bokeh").get_plot(figure).state, hv.renderer("matplotlib").get_plot(figure).handles["axis"]
    for above, beside in (
        (page.title.text_font_size, picture.title if picture.get_title() else picture._left_title),
        (page.xaxis[0].axis_label_text_font_size, picture.xaxis.label),
        (page.yaxis[0].major_label_text_font_size, picture.get_yticklabels()[0]),
        (page.legend[0].label_text_font_size, picture.get_legend().get_texts()[0]),
    ):
        assert float(above.removesuffix("pt")) * 96 == pytest.approx(beside.get_fontsize() * 120)
        assert beside.get_fontname() == "DejaVu Sans"
    mine = hv.renderer("matplotlib").get_plot(plots.balance(run).opts(title="Mine")).handles["axis"]
    assert mine.get_title(loc="left") == "Mine" and not mine.get_title()
    assert page.title.text_font.startswith("DejaVu Sans") and page.xaxis[0].axis_label_text_font_style == "normal"


def test_the_tables_of_a_run_are_drawn_in_a_line(run):
    plots.extension()
    for figure, column in (
        (run.curve().hvplot.line("seconds", "score"), "score"),
        (run.balance().hvplot.line("pass", "ratio"), "ratio"),
        (run.staleness().hvplot.hist("staleness", by="worker", bins=range(4)), "staleness"),
        (run.contributions().hvplot.bar("worker", ["samples", "weight"]), "value"),
        (
            pd.concat({"a": Table(run.curve())}, names=["run"]).hvplot.line("seconds", "score", by="run"),
            "run",
        ),  # an index of a name
    ):
        assert column in str(figure)
    table = run.timeline().assign(seconds=lambda table: table.end - table.start)
    wide = table.pivot_table(index="worker", columns="activity", values="seconds", aggfunc="sum")
    assert wide.sum().sum() == pytest.approx(table.seconds.sum()) and wide.hvplot.barh(stacked=True)
    assert Table(run.curve()).hvplot.step("seconds", "score").interface.datatype == "dataframe"  # as of any DataFrame


def test_the_mode_is_named_or_guessed(monkeypatch):
    monkeypatch.setenv("LABKIT_PLOTS", "interactive")
    assert plots.interactive()
    monkeypatch.setenv("LABKIT_PLOTS", "moving")
    with pytest.raises(ValueError, match="'moving'; it can be 'static'"):
        plots.extension()
    monkeypatch.delenv("LABKIT_PLOTS")
    assert plots.extension() == "static"  # this is no notebook


def test_what_a_cell_prints_is_not_lost_to_a_message_of_a_page(capsys):
    from pyviz_comms import Comm

    plots.extension("interactive")
    handling, printed = threading.Event(), threading.Event()
    comm = Comm(on_msg=lambda message: (handling.set(), printed.wait(60)))
    thread = threading.Thread(target=comm._handle_msg, args=({"comm_id": "page"},))
    thread.start()  # as JupyterLab does with the messages of a figure
    assert handling.wait(60)
    print("of a cell")
    printed.set()
    thread.join()
    assert capsys.readouterr().out == "of a cell\n"


@pytest.mark.slow
def test_a_notebook_keeps_a_picture_and_no_script(monkeypatch, tmp_path):
    import nbformat
    from nbclient import NotebookClient
    from traitlets.config import Config

    monkeypatch.setenv("LABKIT_PLOTS", "static")
    draw = "import pandas as pd\nfrom labkit import plots\n"
    draw += "plots.speed(pd.DataFrame({'worker': [0, 1], 'samples_per_s': [9.0, 3.0], 'slowdown': [1, 3]}))"
    more = "pd.DataFrame({'x': [1, 2], 'y': [3, 4]}).hvplot.line(x='x', y='y')"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (draw, more)])
    config = Config({"KernelManager": {"transport": "ipc", "ip": str(tmp_path / "k")}})
    NotebookClient(notebook, timeout=110, kernel_name="python3", config=config).execute()
    for cell in notebook.cells:
        assert [set(output.get("data", {})) - {"text/plain"} for output in cell.outputs] == [{"image/png"}], cell.source


def test_the_caption_states_what_a_reader_must_know(tmp_path):
    emulated, even = Recorded(tmp_path), Recorded(tmp_path, "even", slowdown=(1, 1), emulated=False)
    even.config = even.config.replace(synthetic=True)
    assert style.caption([emulated]) == "slowdown emulated: 1x, 4x"
    assert style.caption([even], "1 seed") == "synthetic data; 1 seed"
    emulated.config = emulated.config.replace(workers=[{**of, "host": "here", "device": "cpu"} for of in emulated.config.workers])
    assert style.caption([emulated]) == "slowdown emulated: 1x, 4x; slowdown asked 4x, reached 6.1x"
    pushes = emulated.events.kind == "push"
    emulated.events.loc[pushes, "compute_s"] = np.where(emulated.events.worker[pushes] == 1, 1.05, 1.0)
    assert style.caption([emulated]) == "slowdown emulated: 1x, 4x"
    assert style.emulated([1, 1, 1, 4, 4]) == "slowdown emulated: 3 at 1x, 2 at 4x"


DOORS = {
    "balance curves report staleness": r"runs=.* must be (a run|a list)",
    "confusion live membership timeline weights worst": r"run=.* must be a run, as labkit\.train and labkit\.load_run give it",
    "errors part_scores saturation scaling speed step_times": "give a pandas DataFrame",
    "search_history": r"searches=.* must be (a search|a list)",
    "search_front search_importance search_live search_points search_table search_timeline": r"found=.* must be a search, as labkit\.search gives it",
    "gantt roofline": r"profile=.* must be what labkit\.inner\.profile returns",
    "part_accuracy part_times": r"joined=.* must be what labkit\.train_subnets returns",
}


@pytest.mark.parametrize("bad", [5, None, np.float32(2), {"run": 1}, Recorded, [5]], ids=str)
def test_what_is_no_run_is_refused_by_its_name(bad, run, tmp_path):
    calls = {name: (partial(getattr(plots, name), bad), words) for names, words in DOORS.items() for name in names.split()}
    calls["decomposition"] = lambda: plots.decomposition(bad, np.zeros((1, 8, 8))), r"parts=.* must be a labkit\.Decomposition"
    calls["save"] = lambda: plots.save(bad, tmp_path / "a.png"), r"figure=.* must be a figure of labkit\.plots"
    assert calls.keys() == {*plots.__all__} - {"extension", "interactive"}
    for name, (call, words) in calls.items():
        with pytest.raises(TypeError, match=words):
            call()
            pytest.fail(name)
    assert elements(plots.curves(one for one in [run]), "Curve")


@pytest.mark.slow
@pytest.mark.timeout(320)
def test_an_interactive_figure_loads_nothing_from_a_network():
    """What HoloViews sends to a notebook, in a process of its own, as the mode is one of a process."""
    script = (
        "import holoviews as hv, numpy as np, re\n"
        "from labkit.plots import style\n"
        "assert style.extension('interactive') == 'interactive'\n"
        "figure = style.finish([style.line(np.arange(3.0), np.arange(3.0), 0, 'a', ('x', 'y'))], 'title')\n"
        "maps = hv.DynamicMap(lambda data: figure, streams=[hv.streams.Pipe(data=1)])\n"
        "for shown in (figure, maps):\n"
        "    data, _ = hv.renderer('bokeh').components(shown)\n"
        "    print(*re.findall(r'https?://[^\"\\\\]*[.](?:css|js|woff2?)', ''.join(map(str, data.values()))))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.split() == []
