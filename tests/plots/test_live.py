"""The live view reads each event once, follows a run, and ends with it."""

from __future__ import annotations

import json
import re
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from bokeh.document import Document

from labkit import plots
from labkit.errors import RunError
from labkit.plots.live import FAILURES, MUTE, NOTHING, VIEWS, Screen, Watch, _feed, _Moved
from tests.helpers import until
from tests.plots.helpers import elements, title


def test_the_watch_reads_each_line_once_and_whole(run):
    file = run.path / "events.jsonl"
    lines = file.read_bytes()
    cut = len(lines) // 2
    file.write_bytes(lines[:cut])
    watch = Watch(run)
    before = sum(map(len, watch.look().series.values()))
    assert sum(map(len, watch.look().series.values())) == before
    file.write_bytes(lines)
    (series, here, workers, *_), pushes = watch.look(), run.events[run.events["kind"] == "push"]
    for worker, own in pushes.groupby("worker"):
        seconds, score, rate = np.array(series[worker]).T
        assert np.array_equal(seconds, own["seconds"]) and np.array_equal(score, own["score"])
        assert np.allclose(rate, own["samples"].astype(float) / np.diff(seconds, prepend=0.0))
    assert workers == {0, 1} and [n for _, n in here] == [1, 2]
    with open(file, "a") as more:
        more.write(
            f'{{"seq": {lines.count(bytes([10]))}, "kind": "leave", "worker": 1, "seconds": 90.0, "message": "it broke."}}\n'
        )
    assert watch.look()[1:3] == ([(0.0, 1), (0.0, 2), (90.0, 1)], {0})


def test_the_watch_goes_with_a_run_whose_name_another_one_takes(run):
    file = run.path / "events.jsonl"
    lines = file.read_bytes()
    file.write_bytes(lines[: len(lines) // 2])
    watch = Watch(run)
    before = watch.look()
    file.write_bytes(lines)
    run.path = run.path.rename(run.path.with_name("small.1"))  # as `RunRecord.path` says it
    file.parent.mkdir()
    file.write_text("another run\n")
    after, whole = watch.look(), Watch(run).look()
    assert after == whole and after.series != before.series


def test_a_push_without_a_score_keeps_the_latest_and_a_late_score_is_that_of_its_push(run):
    rows = [("push", 1.0, 0.3), ("push", 2.0, None), ("push", 3.0, None), ("score", 3.1, 0.6), ("push", 4.0, None)]
    (run.path / "events.jsonl").write_text(
        "".join(
            json.dumps({"seq": seq, "kind": kind, "worker": 0, "seconds": now, "score": score, "samples": 10}) + "\n"
            for seq, (kind, now, score) in enumerate(rows)
        )
    )
    assert [score for _, score, _ in Watch(run).look().series[0]] == [0.3, 0.3, 0.6, 0.6]


def test_live_static_waits_for_the_end(run):
    run.state = "running"
    threading.Timer(0.2, setattr, (run, "state", "done")).start()
    figure = plots.live(run)
    assert len(elements(figure, "Curve")["worker 0"]) == 7
    latest = sum(points[-1][2] for points in Watch(run).look().series.values())
    assert [*map(title, figure)][1] == f"Latest local passes: {latest:,.0f} samples/s, all workers together"


def test_in_vscode_and_colab_each_picture_takes_the_place_of_the_one_before(run, monkeypatch):
    shown, lines = [], (run.path / "events.jsonl").read_bytes()
    monkeypatch.setattr("IPython.display.display", lambda figure, **how: shown.append((figure, how)))
    monkeypatch.setattr(sys.modules["labkit.plots.live"], "front_end", lambda: "vscode")
    run.state = "running"
    (run.path / "events.jsonl").write_bytes(b"")
    plots.live(run)._ipython_display_()  # it does not wait
    (run.path / "events.jsonl").write_bytes(lines)
    until(lambda: any("mean held-out" in title(next(iter(figure))) for figure, _ in shown if not isinstance(figure, dict)))
    run.state, run.test_score = "done", 0.75
    until(lambda: not any(thread.name == f"live-{run.name}" for thread in threading.enumerate()))
    pictures = [(title(next(iter(figure))), how["display_id"]) for figure, how in shown if not isinstance(figure, dict)]
    assert len({place for _, place in pictures}) == 1 and "update" not in shown[0][1]
    first, *between, last = dict.fromkeys(of.partition(" after ")[0] for of, _ in pictures)
    assert first == "AGWU + IDPA: waiting for the first push" and last == "AGWU + IDPA: test score 0.750"
    assert any("mean held-out score" in of for of in between)


def test_a_page_that_never_listens_gets_pictures_after_a_while(run, monkeypatch):
    shown, sent = [], []
    monkeypatch.setattr("IPython.display.display", lambda figure, **how: shown.append(figure))
    plot = SimpleNamespace(comm=SimpleNamespace(_comm=None))
    pipe = SimpleNamespace(subscribers=[SimpleNamespace(__self__=plot)], send=sent.append)
    screen = Screen([pipe], lambda call, wait=0.0: call(), lambda seen: f"picture {seen.test}")
    screen.display("figure")
    for number in range(MUTE - 1):
        screen.show(NOTHING._replace(test=number))
    assert shown == ["figure"] and not sent
    for number in (1, 2):
        screen.show(NOTHING._replace(test=number))
    plot.comm._comm = "late"
    screen.show(NOTHING._replace(test=3))
    assert [one for one in shown if isinstance(one, str)] == ["figure", "picture 1", "picture 2", "picture 3"]
    assert [seen.test for seen in sent] == [3], "a page that comes late gets all from then on"


class Browser:
    """What pages get of a figure: its state as the page was shown, and what is sent once the page has opened its comm."""

    def __init__(self, figure, monkeypatch):
        import holoviews as hv
        from panel.io.model import add_to_doc
        from pyviz_comms import JupyterComm

        monkeypatch.setattr("ipykernel.comm.Comm", self._opened)
        self.sent = {}
        self.comm, (self.pane, _) = JupyterComm(id="figure"), hv.renderer("bokeh")._validate(figure, None)
        page = Document()
        add_to_doc(self.pane.layout._render_model(page, self.comm), page, hold=True)

    def _opened(self, target_name, data):
        messages = self.sent[len(self.sent)] = []
        return SimpleNamespace(send=lambda data, **how: messages.append(data), on_msg=lambda handle: None)

    def open(self):
        """A page listens: at first, and each time that it is loaded."""
        self.comm.init()

    def titles(self):
        """The titles of the first panel that were sent to the latest page, in their order."""
        return re.findall(r'"(AGWU[^"]*)"', self._text())

    def ends(self):
        """The ends of axes that were sent to the latest page."""
        return {float(end) for end in re.findall(r'"attr":"end","new":([-\d.]+)', self._text())}

    def _text(self):
        return "".join(part for part in self.sent[len(self.sent) - 1] if isinstance(part, str))


@pytest.mark.slow
def test_a_browser_that_comes_late_or_again_gets_the_last_picture(run, monkeypatch):
    plots.extension("interactive")
    lines = (run.path / "events.jsonl").read_bytes()
    (run.path / "events.jsonl").write_bytes(b"")
    run.state = "running"
    browser = Browser(plots.live(run), monkeypatch)
    (run.path / "events.jsonl").write_bytes(lines)
    until(lambda: browser.comm._on_open)  # something new was to be shown
    run.state, run.test_score = "done", 0.75
    until(lambda: not any(thread.name == f"live-{run.name}" for thread in threading.enumerate()))
    assert not browser.sent  # nobody listened: it would have been lost
    for page in range(2):
        browser.open()
        assert len(browser.sent) == page + 1
        last = run.events.loc[run.events["kind"] == "push", "seconds"].max()
        end = f"AGWU + IDPA: test score 0.750 after {last:.0f} s"  # and never an empty figure
        assert browser.titles()[0] == end and all(title.startswith(end) for title in browser.titles())
        assert last in browser.ends()


def test_at_the_end_the_output_of_the_cell_is_the_last_picture(run, monkeypatch):
    plots.extension("interactive")
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda figure, **how: shown.append((figure, how)))
    run.state = "running"
    figure = plots.live(run)
    figure._ipython_display_()
    run.state, run.test_score = "done", 0.75
    until(lambda: len(shown) == 3)
    (_, first), (between, _), (last, how) = shown
    assert between == {"text/plain": ""}
    assert how == first | {"update": True} and title(next(iter(last))).startswith("AGWU + IDPA: test score 0.750")
    assert all(
        title(view) == title(again) for view, again in zip(last, [draw(run, Watch(run).look()) for draw in VIEWS], strict=True)
    )
    figure._ipython_display_()  # in another cell, later
    assert title(next(iter(shown[3][0]))) == title(next(iter(last))) and shown[3][1] == first


def test_the_last_picture_is_drawn_before_the_one_before_goes_as_the_notebook_may_be_saved_meanwhile(monkeypatch):
    done = []

    def drawn(figure):
        done.append("drawn")
        return {"image/png": figure}, {"width": 2}

    monkeypatch.setattr("IPython.display.display", lambda data, **how: done.append((data, how)))
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(display_formatter=SimpleNamespace(format=drawn)))
    screen = Screen([], lambda call, wait=0.0: call(), lambda seen: f"picture of {seen.test}")
    screen.display("the figure that moves")
    screen.show(NOTHING._replace(test=0.5), last=True)
    (_, first), then, (between, _), (last, how) = done
    assert then == "drawn" and between == {"text/plain": ""}
    assert last == {"image/png": "picture of 0.5"} and how == first | {"update": True, "raw": True, "metadata": {"width": 2}}


def test_what_is_new_is_drawn_once_between_two_cells_and_a_record_that_cannot_be_read_is_read_again(run):
    posted, drawn = [], []
    pipe = SimpleNamespace(subscribers=[], send=drawn.append)
    screen = Screen([pipe], lambda call, wait=0.0: posted.append((wait, call)), None)
    for number in range(5):  # while a cell blocks the kernel
        screen.show(NOTHING._replace(test=number))
    assert len(posted) == 1 and not drawn
    posted.pop()[1]()
    posted.pop()[1]()  # its one panel; something else may come between two
    assert not posted and [seen.test for seen in drawn] == [4]

    screen._again({})  # a page is loaded, in whichever thread its kernel hears of it, and takes its time to draw the figure
    assert len(drawn) == 1 and posted[0][0] == 0 and posted[-1][0] > 20
    for _, call in posted:
        call()
    assert drawn[1:] == [NOTHING, drawn[0]] * len(posted)
    posted.clear()

    looks = iter([OSError(), RunError("busy"), NOTHING, NOTHING])

    def look():
        found = next(looks)
        if isinstance(found, Exception):
            raise found
        return found

    watch = SimpleNamespace(look=look, at=7)
    _feed(run, watch, screen, timeout=60)
    assert len(posted) == 1 and next(looks) is NOTHING


def test_however_long_the_record_cannot_be_read_the_view_says_so_and_ends_with_the_last_picture(run, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    shown, whole = [], Watch(run).look()
    looks = iter(
        [whole, *[OSError("disk")] * FAILURES, KeyError("kind"), RunError("busy"), whole, *[OSError("disk")] * FAILURES, whole]
    )

    def look():
        if isinstance(found := next(looks), Exception):
            raise found
        return found

    def show(seen, last):
        shown.append((seen, last))
        run.state = "done" if len(shown) == 4 else run.state

    run.state, screen = "running", SimpleNamespace(show=show, nothing=NOTHING, took=0.0)
    _feed(run, SimpleNamespace(look=look, at=7), screen, timeout=60)
    assert [(seen.trouble, last) for seen, last in shown[:4]] == [("", False), ("disk", False)] * 2
    assert shown[4:] == [(whole, True)]
    assert title(VIEWS[0](run, shown[1][0])) == "AGWU + IDPA: the record cannot be read now: disk"


def test_live_follows_a_run_and_stops_with_it(run):
    import holoviews as hv
    from bokeh.models import Plot

    plots.extension("interactive")
    file = run.path / "events.jsonl"
    lines = file.read_bytes()
    file.write_bytes(b"")
    run.state = "running"
    figure = plots.live(run)
    panel = figure.traverse(lambda view: view, [hv.DynamicMap])[0]
    shown = hv.renderer("bokeh").get_plot(figure).state.select({"type": Plot})
    assert all(len(line) == 0 for line in elements(panel[()], "Curve").values())
    file.write_bytes(lines)
    run.state = "done"
    for thread in threading.enumerate():
        if thread.name == f"live-{run.name}":
            thread.join(60)
            assert not thread.is_alive()
    assert {label: len(line) for label, line in elements(panel[()], "Curve").items()} == {"worker 0": 7, "worker 1": 7}
    assert title(panel[()]).startswith("AGWU + IDPA: mean held-out score")
    last = run.events.loc[run.events["kind"] == "push", "seconds"].max()
    assert [plot.x_range.end for plot in shown] == [last] * 3  # the axes follow


def looks_of(monkeypatch, seconds, reads=0.0, draws=0.0):
    """When a view looks at a run that ends after so many seconds, by a clock that only looks and pauses move."""
    now, looks = [0.0], []
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s))
    monkeypatch.setattr(sys.modules["labkit.plots.live"], "time", clock)
    run = SimpleNamespace(state="running")
    screen = SimpleNamespace(nothing=NOTHING, took=0.0, show=lambda seen, last: None)

    def look():
        looks.append(now[0])
        now[0] += reads
        screen.took = draws
        if now[0] >= seconds:
            run.state = "done"
        return NOTHING

    _feed(run, SimpleNamespace(look=look, at=7), screen, timeout=600)
    return looks


def test_what_takes_long_to_read_and_draw_is_read_and_drawn_less_often(monkeypatch):
    looks = looks_of(monkeypatch, 42, reads=0.5, draws=1.0)
    assert (np.diff(looks)[:4] >= 10).all() and len(looks) == 6
    assert looks[-1] - looks[-2] < 2, "and at the end of the run at once"


def test_a_page_has_time_for_what_it_draws_and_the_workers_have_the_rest(monkeypatch):
    looks = np.array(looks_of(monkeypatch, 100))
    assert set(np.diff(looks[looks < 10])) == {1.0} and set(np.diff(looks[(looks > 10) & (looks < 100)])) == {3.0}


def drawn(figure):
    """The panels of a figure, by bokeh."""
    import holoviews as hv
    from bokeh.models import Plot

    panels = hv.renderer("bokeh").get_plot(figure).state.select({"type": Plot})
    return sorted(panels, key=lambda panel: panel.yaxis[0].axis_label)


def test_a_live_figure_that_is_shown_once_more_begins_with_what_is_known_then(run, monkeypatch):
    plots.extension("interactive")
    shown = []
    monkeypatch.setattr(
        "IPython.display.display",
        lambda figure, **how: shown.append(None if isinstance(figure, dict) else drawn(figure)[0]),
    )
    file = run.path / "events.jsonl"
    lines = file.read_bytes()
    file.write_bytes(b"")
    run.state = "running"
    figure = plots.live(run)
    figure._ipython_display_()
    file.write_bytes(lines)
    until(lambda: "mean held-out score" in shown[0].title.text)
    figure._ipython_display_()
    assert shown[1].title.text == shown[0].title.text
    run.state = "done"
    until(lambda: not any(thread.name == f"live-{run.name}" for thread in threading.enumerate()))


def test_what_is_moved_is_what_would_be_drawn_anew(run):
    import holoviews as hv

    plots.extension("interactive")
    whole = Watch(run).look()
    early = whole._replace(series={0: whole.series[0][:2]}, here=whole.here[:1], workers=frozenset({0}))
    unscored = whole._replace(series={worker: [(s, np.nan, rate) for s, _, rate in own] for worker, own in whole.series.items()})
    first = early._replace(series={0: whole.series[0][:1]})
    joined = NOTHING._replace(here=[(0.0, 1)], workers=frozenset({0}))  # as the clock begins
    states = [
        joined,
        first,
        early,
        whole,
        unscored,
        whole._replace(test=0.75),
        early._replace(trouble="disk " * 40),
        NOTHING,
        whole,
    ]

    def panels(seen):
        pipes = [hv.streams.Pipe(data=seen) for _ in VIEWS]
        maps = [
            hv.DynamicMap(lambda data, draw=draw: draw(run, data), streams=[pipe]) for draw, pipe in zip(VIEWS, pipes, strict=True)
        ]
        return _Moved(run, VIEWS, pipes), drawn(hv.Layout(maps).cols(1))

    moved, shown = panels(NOTHING)
    for seen in states:
        moved.send(seen)
        for one, anew in zip(shown, panels(seen)[1], strict=True):
            assert (one.title.text, one.title.text_font_size) == (anew.title.text, anew.title.text_font_size)
            assert one.html_attributes == anew.html_attributes
            for line, again in zip(one.renderers, anew.renderers, strict=True):
                columns = line.data_source.data, again.data_source.data
                assert all(np.array_equal(columns[0][name], values, equal_nan=True) for name, values in columns[1].items())
            assert one.x_range.end == anew.x_range.end
            height = (anew.y_range.end - anew.y_range.start) * (20 if seen is first else 1)  # of one value it is anybody's choice
            assert one.y_range.start == pytest.approx(anew.y_range.start, abs=height / 20)
            assert one.y_range.end == pytest.approx(anew.y_range.end, abs=height / 20)
