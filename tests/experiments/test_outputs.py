"""What cells put out: linear in its length, whole up to a stated length, and what is left out is said.

Most tests feed the client with messages, as a kernel takes a second; one sweep runs cells that froze a sweep before.
"""

from __future__ import annotations

import json
import re
import time
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from labkit.experiments import outputs
from labkit.experiments.outputs import Client, Stream, ends_of_stream, excerpt
from labkit.experiments.sweep import sweep
from tests.experiments.helpers import write

RETURN = re.compile(r".*\r(?=[^\n])")  # nbclient's, quadratic in the length of a line


# -- streams -----------------------------------------------------------------------------------------------------------


def streamed(*pieces: str) -> Stream:
    stream = Stream()
    for piece in pieces:
        stream.write(piece)
    return stream


@pytest.mark.parametrize(
    "text",
    ["", "a", "a\n", "a\rb", "a\rb\n", "a\r\nb", "a\r", "\ra", "\r\r\n", "a\r\r\nb\rc\n\rd\r", "1%\r2%\r3%\nend\r\n", "x\b\by\r\n"],
)
def test_a_stream_in_any_pieces_is_what_nbclient_makes_of_the_whole(text):
    expected = RETURN.sub("", text)
    assert streamed(text).text() == expected
    assert streamed(*text).text() == expected
    for cut in range(len(text)):
        assert streamed(text[:cut], text[cut:]).text() == expected


def test_a_long_stream_has_its_beginning_and_its_end(monkeypatch):
    monkeypatch.setattr(outputs, "KEPT", 1000)
    lines = [f"line {i}\n" for i in range(1000)]
    whole = streamed(*lines[:100])
    assert whole.whole and whole.text() == "".join(lines[:100])
    text = streamed(*lines).text()
    size = len("".join(lines))
    assert text.startswith("line 0\nline 1\n") and text.endswith("line 998\nline 999\n")
    assert f"[... {size - 1000:,} of {size:,} characters are left out here ...]" in text
    assert len(text) < 1100


@pytest.mark.parametrize("text", ["x" * 5_000_000, "50%\r" * 1_000_000, "\r\n" * 1_000_000, "a\b" * 2_000_000, "\x1b[" * 1_000_000])
def test_a_stream_takes_time_that_is_linear_in_its_length(text):
    began = time.process_time()
    stream = streamed(*(text[i : i + 100_000] for i in range(0, len(text), 100_000)))
    assert len(stream.text()) <= len(text)
    assert time.process_time() - began < 10  # quadratic, it would be minutes


def test_the_ends_of_a_message_that_is_too_long_to_be_parsed(monkeypatch):
    for kept in (40, 41, 42, 43, 44, 46, 48):  # cut at each place within an escape, and within a character
        monkeypatch.setattr(outputs, "KEPT", 2 * kept)
        for text in ("\\" * 99, '"' * 99, "é" * 99, "\n" * 99, "\x1b[0m" * 30, "a" * 200):
            found = ends_of_stream(memoryview(json.dumps({"name": "stderr", "text": text}, ensure_ascii=False).encode()))
            assert found["name"] == "stderr" and found["skipped"] > 0
            assert found["text"] and text.startswith(found["text"])
            assert found["end"] and set(found["end"]) <= set(text + json.dumps(text))  # of an escape that was cut
    assert ends_of_stream(memoryview(b'{"text": "a", "name": "stdout"}')) == {"text": "a", "name": "stdout"}


def test_excerpt():
    assert excerpt("abcdefgh", 8) == "abcdefgh"
    assert excerpt("abcdefghi", 8) == "ab\n[... 5 of 9 characters are left out here ...]\nhi"


# -- the client, by messages -------------------------------------------------------------------------------------------


class Cell:
    """One cell of a notebook with a client, which is fed with messages."""

    def __init__(self, path, **metadata):
        self.path = path
        self.cell = new_code_cell("1", metadata=metadata)
        manager = SimpleNamespace(
            nb=new_notebook(cells=[self.cell]),
            output_path=f"labkit://{path}/notebook.ipynb",
            save=lambda: None,
            autosave_cell=lambda: None,
        )
        self.client = Client(manager, kernel_name="python3")
        self.cell.metadata["execution"] = {}
        self.sent = 0

    def send(self, kind, size=None, display_id=None, **content):
        self.sent += 1
        header = {"msg_type": kind, "msg_id": str(self.sent)}
        content |= {"transient": {"display_id": display_id}} if display_id else {}
        size = len(json.dumps(content)) if size is None else size
        msg = {"header": header, "msg_type": kind, "parent_header": {"msg_id": "p"}, "content": content, "size": size}
        self.client.process_message(msg | {"metadata": {}, "buffers": []}, self.cell, 0)

    def show(self, text, kind="display_data", **more):
        self.send(kind, data={"text/plain": text}, metadata={}, **more)

    def end(self):
        self.client._end_cell(self.cell, 0)
        nbformat.validate(self.client.nb)
        return self.cell.outputs

    def texts(self):
        return [output["data"]["text/plain"] for output in self.cell.outputs if "data" in output]


def test_streams_of_a_cell_are_one_each_stdout_first(tmp_path):
    cell = Cell(tmp_path)
    for name, text in (("stderr", "w1\n"), ("stdout", "1%\r"), ("stderr", "w2\n"), ("stdout", "2%\n")):
        cell.send("stream", name=name, text=text)
    cell.show("figure")
    assert [output.get("text") for output in cell.end()] == ["2%\n", "w1\nw2\n", None]
    assert not list(tmp_path.iterdir())


def test_a_long_stream_is_in_a_file_and_the_notebook_says_so(tmp_path):
    cell = Cell(tmp_path)
    for _ in range(20):
        cell.send("stream", name="stdout", text="x" * 9_999 + "\n")
    cell.send("stream", name="stdout", text="\udcff the end")
    (output,) = cell.end()
    assert output["text"].endswith("the end") and len(output["text"]) < 51_000
    assert "[... all 200,009 characters are in cell-01-stdout.txt ...]" in output["text"]
    assert (tmp_path / "cell-01-stdout.txt").read_text().endswith("\\udcff the end")


def test_displays_are_updated_at_all_their_places_in_constant_time(tmp_path):
    cell = Cell(tmp_path)
    for i in range(1_000):
        cell.show(f"{i}", display_id="a")
    began = time.process_time()
    for i in range(2_000):
        cell.show(f"update {i}", kind="update_display_data", display_id="a")
    cell.show("other", kind="update_display_data", display_id="unknown")
    assert time.process_time() - began < 10  # as nbclient has it, it would be 2 million changes
    cell.end()
    assert cell.texts() == ["update 1999"] * 1_000


def test_outputs_that_do_not_fit_are_counted_and_a_cleared_one_gives_its_room_back(tmp_path):
    cell = Cell(tmp_path)
    room = cell.client.room
    for i in range(3):
        cell.show(f"{i}", size=30_000_000, display_id=f"{i}")
    cell.show("small")
    cell.show("now large", kind="update_display_data", display_id="0", size=49_995_000)
    cell.end()
    assert cell.texts() == ["0", "small", "[... 3 outputs of 110.0 MB left out: a notebook keeps 50 MB ...]"]
    cell.send("clear_output", wait=True)
    cell.show("after", size=20_000_000)
    assert cell.texts() == ["after"]
    cell.send("clear_output", wait=False)
    assert cell.texts() == [] and cell.client.room == room


def test_widgets_have_room_for_their_latest_states(tmp_path):
    """Opened small, and filled afterwards."""
    cell = Cell(tmp_path)
    for i in range(4):
        widget = {"_model_module": "@jupyter-widgets/controls", "_model_name": "HTMLModel"}
        cell.send("comm_open", comm_id=f"{i}", target_name="jupyter.widget", data={"state": widget})
    for text in ("a", "b", "c"):
        for i in range(4):
            size = 20_000_000 if text == "b" else 100
            cell.send("comm_msg", comm_id=f"{i}", data={"method": "update", "state": {"value": text}}, size=size)
    states = [state["value"] for state in cell.client.widget_state.values()]
    assert states == ["c", "c", "c", "c"] and cell.client.room < 10_000_000
    cell.send("comm_msg", comm_id="0", data={"method": "update", "state": {"value": "d"}}, size=20_000_001)
    cell.send("comm_msg", comm_id="3", data={"method": "update", "state": {"value": "d"}}, size=20_000_001)
    assert [state["value"] for state in cell.client.widget_state.values()] == ["d", "c", "c", "c"]
    cell.end()
    assert cell.texts() == ["[... 3 outputs of 60.0 MB left out: a notebook keeps 50 MB ...]"]


def test_a_display_id_of_any_kind(tmp_path):
    cell = Cell(tmp_path)
    for text in ("1", "2"):
        cell.show(text, display_id=["a", 5])
    cell.show("3", kind="update_display_data", display_id=["a", 5])
    cell.end()
    assert cell.texts() == ["3", "3"]


def deep(n):
    value = 1
    for _ in range(n):
        value = [value]
    return value


def test_displays_that_no_notebook_holds_are_texts_and_what_is_too_deep_is_cut(tmp_path):
    cell = Cell(tmp_path)
    for data in ({"text/plain": 5}, {"text/plain": None, "application/json": deep(900)}, {"text/plain": deep(900)}, ["a", "b"], 7):
        for kind, more in (("display_data", {}), ("execute_result", {"execution_count": 3}), ("display_data", {"display_id": "a"})):
            cell.send(kind, data=data, metadata=deep(900) if kind == "execute_result" else {}, size=100, **more)
        cell.send("update_display_data", data=data, metadata={"x": deep(900)}, size=100, display_id="a")
    cell.end()  # validates
    cut = "[... JSON of more than 100 levels ...]"
    assert cell.texts()[::3] == ["5", "null", cut, "ab", "7"] and cell.cell.outputs[3].data["application/json"] == cut
    assert json.loads(nbformat.writes(cell.client.nb))


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("display_data", {}),
        ("stream", {"name": "stdout", "text": 5}),
        ("stream", {"name": ["stdout"], "text": "a"}),
        ("comm_msg", {"comm_id": {}, "data": {}}),
        ("comm_open", {"comm_id": "1", "data": {"state": 5}}),
        ("error", {"ename": 5}),
        ("display_data", {"data": {}, "metadata": {}, "transient": 5}),
    ],
)
def test_a_message_with_which_nothing_can_be_done_is_counted_and_the_cell_goes_on(kind, content, tmp_path):
    cell = Cell(tmp_path)
    msg = {"header": {"msg_type": kind, "msg_id": "1"}, "msg_type": kind, "parent_header": {"msg_id": "p"}, "content": content}
    assert not cell.client._is_last(msg | {"size": 100, "metadata": {}, "buffers": []}, cell.cell, 0)
    cell.show("after")
    cell.end()
    assert cell.texts()[0] == "after" and "no notebook holds them" in cell.texts()[1]


def test_an_error_is_stored_in_short_and_expected_where_its_cell_says_so(tmp_path):
    for tags, kind in (([], "error"), (["raises-exception"], "expected error")):
        cell = Cell(tmp_path, tags=tags)
        cell.send("error", ename="ValueError", evalue="v" * 200_000, traceback=["t" * 200_000, "u" * 100])
        (output,) = cell.end()
        assert output.output_type == kind and output["output_type"] == "error"  # papermill asks for the attribute
        assert len(output["evalue"]) < 60_000 and len("".join(output["traceback"])) < 60_000


# -- cells that froze a sweep ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_long_outputs_delay_nothing(tmp_path):
    cells = {
        "line": "print([i / 7 for i in range(60_000)])",
        "returns": "import sys\nsys.stdout.write('50%\\r' * 500_000); sys.stderr.write('x' * 3_000_000)",
        "error": "raise ValueError('\\x1b[' * 300_000)",
        "surrogate": "print('\\ud800')\nfrom IPython.display import HTML\nHTML('<p>' * 20_000_000)",
        "expected": "1 / 0",
    }  # fmt: skip
    notebook = write(tmp_path / "n.ipynb", f"get_ipython().run_cell({cells!r}[strategy]).raise_error()", "1 + 1")
    content = nbformat.read(notebook, 4)
    content.cells[1].metadata.tags = ["raises-exception"]
    nbformat.write(content, tagged := tmp_path / "tagged.ipynb")
    first = sweep(notebook, {"strategy": list(cells)[:-1]}, out=tmp_path / "out", parallel=4, timeout=180, progress=False)
    last = sweep(tagged, {"strategy": "expected"}, out=tmp_path / "out2", timeout=180, progress=False)
    assert [*first["status"], *last["status"]] == ["done", "done", "failed", "done", "done"], [*first["error"], *last["error"]]
    assert first["error"][2].startswith("In [3]: ValueError: ") and len(first["error"][2]) < 450
    shown = nbformat.read(last["notebook"][0], 4).cells
    assert {output.output_type for output in shown[2].outputs} == {"error"} and shown[3].outputs[0].data["text/plain"] == "2"
