"""What the cells of a notebook put out, stored up to a stated length, in time that is linear in what they put out.

nbclient and papermill are made for short outputs. They join a stream one message after another, search the whole of it for
carriage returns (quadratic in the length of a line, and one call, during which no other thread of the process runs), update each
output of a display by each update, send the whole of an Output widget back at each message, and write the notebook at each cell.
The client here does these things itself, piece by piece, and what exceeds a length never gets as far as to be parsed. It reads
faster than a kernel writes, as what it has not read yet is in memory. One message is there
for a moment, as long as the kernel made it.

    stream      LONG characters of a cell's stdout or stderr are in the notebook; a longer one is in a file beside it, up to KEPT
                characters (beginning and end), and its beginning and end are in the notebook
    the rest    figures, tables, widgets: ROOM bytes in a notebook, each output counted as LEAST at least; what does not fit is
                counted, and a note says so; what has many lines or is JSON counts for what it becomes in the notebook's file
    JSON        DEEP levels; what is deeper is cut, with a line in its place
    error       LONG characters (beginning and end)

Used by `labkit.experiments.executor`, which imports this when a notebook is executed, as it imports papermill.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import zmq
from nbclient.exceptions import CellExecutionComplete
from nbclient.output_widget import OutputWidget
from nbclient.util import run_sync
from nbformat import NotebookNode, from_dict
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine
from papermill.log import logger

LONG = 100_000  # characters of a stream or of an error that are in the notebook
KEPT = 10_000_000  # characters of a stream that are in its file
ROOM = 50_000_000  # bytes of the other outputs of a notebook
LEAST = 10_000  # bytes that each of these counts for at least
LARGE = 16_000_000  # bytes of a stream's message of which only the beginning and the end are parsed
LINE = 1_000_000  # characters of an unfinished line that a carriage return can still take back
SLICE = 1_000_000  # characters that are handled by one call
MANY = 1_000_000  # bytes of a display of which the lines are counted
DEEP = 100  # levels of JSON: what reads and writes notebooks calls itself at each
FULL, UNFIT = (
    f"a notebook keeps {ROOM / 1e6:.0f} MB",
    f"no notebook holds them, or JSON of more than {DEEP} levels",
)  # why outputs are left out
TURN = 0.05  # seconds for which messages are read before it is somebody else's turn in this thread
PIECE = 4_000  # characters of a piece that still grows
DISPLAYS = ("display_data", "execute_result", "update_display_data")
JSON = re.compile(r"application/([\w.+-]+\+)?json")


class Stream:
    """stdout or stderr of a cell, growing: its beginning and its end, KEPT characters together.

    A carriage return takes back what stands before it in its line, as nbclient has it, unless a newline follows.
    """

    def __init__(self) -> None:
        self.size = 0  # characters, without those that were taken back
        self._beginning: list[str] = []
        self._end: deque[str] = deque()
        self._room, self._end_size = KEPT // 2, 0  # what the beginning can still take, and what the end holds
        self._line: list[str] = []  # behind the last newline
        self._line_size = 0
        self._return = ""  # a carriage return at the end: what follows decides

    def write(self, text: str) -> None:
        for start in range(0, len(text), SLICE):
            self._write(self._return + text[start : start + SLICE])

    def _write(self, text: str) -> None:
        self._return = "\r" * text.endswith("\r")
        text = text[: len(text) - len(self._return)]
        if "\r" in text:
            lines = text.split("\n")
            for number, line in enumerate(lines):
                end = len(line) - (number < len(lines) - 1)  # the last character of a line may be the \r of \r\n
                if (found := line.rfind("\r", 0, max(end, 0))) >= 0:
                    lines[number] = line[found + 1 :]
                    if number == 0:
                        self._line, self._line_size = [], 0
            text = "\n".join(lines)
        lines, newline, rest = text.rpartition("\n")
        _append(self._line, lines + newline or rest)
        self._line_size += len(lines + newline or rest)
        if newline or self._line_size > LINE:
            self._store("".join(self._line))
            self._line, self._line_size = [rest] * bool(newline), len(rest) * bool(newline)

    def skip(self, size: int) -> None:
        """So much of it is missing here."""
        self._store("".join(self._line))
        self._line, self._line_size, self._return, self._room = [], 0, "", 0
        self.size += size

    def _store(self, text: str) -> None:
        self.size += len(text)
        if self._room > 0:
            _append(self._beginning, text[: self._room])
            text, self._room = text[self._room :], self._room - len(text)
        if text:
            _append(self._end, text)
            self._end_size += len(text)
            while self._end_size - len(self._end[0]) >= KEPT // 2:
                self._end_size -= len(self._end.popleft())

    @property
    def whole(self) -> bool:
        """Is nothing left out?"""
        return sum(map(len, self._beginning)) + self._end_size == self.size

    def text(self) -> str:
        """All of it, or its beginning and its end, and a note between them on what is left out."""
        beginning, end = "".join(self._beginning), "".join([*self._end, *self._line, self._return])
        if self.whole:
            return beginning + end
        size = self.size + self._line_size + len(self._return)
        end = end[-(KEPT // 2) :]
        left_out = size - len(beginning) - len(end)
        return f"{beginning}\n[... {left_out:,} of {size:,} characters are left out here ...]\n{end}"


def _append(pieces: list[str] | deque[str], text: str) -> None:
    """Append to pieces, so that there are few: a short one grows."""
    if pieces and len(pieces[-1]) < PIECE:
        pieces[-1] += text
    else:
        pieces.append(text)


def excerpt(text: str, length: int = LONG, note: str = "") -> str:
    """Of a text that is longer than `length` a quarter of that from its beginning and from its end, and a note between them."""
    if len(text) <= length:
        return text
    ends = text[: length // 4], text[-(length // 4) :]
    note = note or f"{len(text) - 2 * (length // 4):,} of {len(text):,} characters are left out here"
    return f"{ends[0]}\n[... {note} ...]\n{ends[1]}"


def ends_of_stream(content: memoryview) -> dict[str, Any]:
    """The content of a stream's message, which is too long to be parsed: "text" is its beginning, "end" its end, and "skipped"
    bytes are between them."""
    size = KEPT // 2
    first, last = bytes(content[:size]), bytes(content[-size:])
    start = re.match(rb'\{"name": ?"(\w+)", ?"text": ?"', first)
    if not start or not last.endswith(b'"}'):
        return json.loads(bytes(content))
    text, end = (_unquoted(piece, cut) for piece, cut in ((first[start.end() :], -1), (last[:-2], 1)))
    return {"name": start[1].decode(), "text": text, "skipped": len(content) - 2 * size, "end": end}


def _unquoted(text: bytes, step: int) -> str:
    """A piece of a JSON string that was cut at its end (step -1) or at its beginning (1); less what was cut through there."""
    text = text.decode(errors="ignore").encode()
    for cut in range(12):  # of the longest escape, \\ud83d\\ude00
        with suppress(ValueError):
            return json.loads(b'"' + (text[: len(text) - cut] if step < 0 else text[cut:]) + b'"')
    return ""


def weight(content: bytes) -> int:
    """What a display counts for besides its length: each line of a text, and each number of JSON, is a line in the notebook's file,
    and is written by a call of its own."""
    return 20 * content.count(b"\\n") + 4 * len(content) * bool(re.search(rb'"application/[\w.+-]*json"', content))


def is_deep(value: Any) -> bool:
    """Has JSON more than DEEP levels?"""
    level = [value]
    for _ in range(DEEP):
        if not (
            level := [
                part for one in level for part in (one.values() if isinstance(one, dict) else one) if isinstance(part, dict | list)
            ]
        ):
            return False
    return True


def as_text(value: Any) -> str:
    """A string of a message; of what is none, the JSON of it."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "".join(value)
    return (
        value if isinstance(value, str) else f"[... JSON of more than {DEEP} levels ...]" if is_deep([value]) else json.dumps(value)
    )


def bundle(data: Any) -> dict[str, Any]:
    """The data of a display as nbformat has them: a string for each type, of JSON what it is; what is neither is a line of text."""
    data = data if isinstance(data, dict) else {"text/plain": data}
    return {kind: value if JSON.fullmatch(kind) and not is_deep([value]) else as_text(value) for kind, value in data.items()}


def about(metadata: Any) -> dict[str, Any]:
    """The metadata of a display."""
    return metadata if isinstance(metadata, dict) and not is_deep([metadata]) else {}


class Shown:
    """What stands at all places of one display id: they share `data` and `metadata`, so that an update costs the same for all."""

    def __init__(self) -> None:
        self.data, self.metadata, self.places, self.size, self._shows = NotebookNode(), NotebookNode(), 0, 0, None

    def change(self, msg: dict) -> None:
        for node, new in ((self.data, bundle(msg["content"]["data"])), (self.metadata, about(msg["content"]["metadata"]))):
            node.clear()
            node.update(from_dict(new))
        self.size, self._shows = max(msg["size"], LEAST), msg["header"]["msg_id"]

    def shows(self, msg: dict) -> bool:
        return self._shows == msg["header"]["msg_id"]


class Expected(NotebookNode):
    """The error of a cell that is tagged `raises-exception`; papermill, which asks for this attribute, takes it for no failure."""

    output_type = "expected error"


class Widget(OutputWidget):
    """An Output widget that is sent back once, at the end of the cell: earlier its kernel is busy with the cell."""

    def output(self, outs: list, msg: dict, display_id: str | None, cell_index: int) -> None:
        if self.clear_before_next_output:
            self.outputs, self.clear_before_next_output = [], False
        self.parent_header, content = msg["parent_header"], msg["content"]
        last = self.outputs[-1] if self.outputs else {}
        if msg["msg_type"] == "stream" and last.get("name") == content["name"]:
            last["text"] = excerpt(last["text"] + content["text"], LONG // 10)
        elif self.executor.fits(msg):
            self.outputs.append(_output(msg))
        self.sync_state()
        self.executor.widget_state[self.comm_id]["outputs"] = self.outputs

    def sync_state(self) -> None:
        self.executor.changed_widgets[self.comm_id] = self

    def send_state(self) -> None:
        super().sync_state()


def _output(msg: dict) -> NotebookNode:
    """An output as the notebook has it. nbformat's own function validates each; the notebook is validated when it is written."""
    kind, content = msg["msg_type"], msg["content"]
    if kind in ("stream", "error"):
        names = ["name", "text"] if kind == "stream" else ["ename", "evalue", "traceback"]
        return from_dict({"output_type": kind} | {name: content[name] for name in names})
    count = {"execution_count": content["execution_count"]} if kind == "execute_result" else {}
    return from_dict({"output_type": kind, "data": bundle(content["data"]), "metadata": about(content["metadata"]), **count})


class Client(PapermillNotebookClient):
    """papermill's client, with outputs as the docstring of this file has them."""

    def __init__(self, nb_man: Any, **settings: Any) -> None:
        super().__init__(nb_man, **settings)
        self.widget_registry = {"@jupyter-widgets/output": {"OutputModel": Widget}}
        self.room = ROOM
        self.clear_before_next_output = False
        self.changed_widgets: dict[str, Widget] = {}
        self._displays: dict[str, Shown] = {}
        self._states: dict[tuple[str, ...], int] = {}  # bytes of a widget's traits, by its id and their names
        self._begin_cell()
        self._save, self._saved, self._saving = nb_man.save, -1e9, 0.0
        nb_man.save = self.save

    # -- a cell ----------------------------------------------------------------------------------------------------------

    def _begin_cell(self) -> None:
        self._streams: dict[str, tuple[Stream, NotebookNode]] = {}  # name -> the stream, and where it stands
        self._spent = 0  # bytes of this cell's outputs without a display id
        self._places: dict[str, int] = {}  # display id -> its places in this cell
        self._left_out: dict[str, list[int]] = {}  # why -> outputs and their bytes

    async def async_execute_cell(self, cell: NotebookNode, cell_index: int, *args: Any, **kwargs: Any) -> NotebookNode:
        self._begin_cell()
        try:
            return await super().async_execute_cell(cell, cell_index, *args, **kwargs)
        finally:
            self._end_cell(cell, cell_index)

    execute_cell = run_sync(async_execute_cell)

    def _end_cell(self, cell: NotebookNode, cell_index: int) -> None:
        for widget in self.changed_widgets.values():
            widget.send_state()
        self.changed_widgets.clear()
        outputs = cell.get("outputs", [])
        for i in range(1, len(outputs)):
            if [output.get("name") for output in outputs[i - 1 : i + 1]] == ["stderr", "stdout"]:  # which came first is chance
                outputs[i - 1 : i + 1] = outputs[i], outputs[i - 1]
        folder = Path(self.nb_man.output_path.partition("://")[2]).parent
        for name, (stream, output) in self._streams.items():
            text = stream.text()
            if len(text) > LONG:
                file = folder / f"cell-{cell_index + 1:02d}-{name}.txt"
                with suppress(OSError):  # a full disk ends the run where the notebook is written
                    file.write_text(text, encoding="utf-8", errors="backslashreplace")
                there = f"all {len(text):,} characters are" if stream.whole else f"the first and last {KEPT // 2:,} characters are"
                text = excerpt(text, note=f"{there} in {file.name}")
            output["text"] = text
        for why, (count, size) in self._left_out.items():
            note = f"{count:,} output{'s' * (count > 1)} of {size / 1e6:,.1f} MB left out: {why}"
            outputs.append(from_dict({"output_type": "display_data", "metadata": {}, "data": {"text/plain": f"[... {note} ...]"}}))
        self._streams = {}

    def save(self, **kwargs: Any) -> None:
        """Write the notebook as it is now, unless that took long the last time and was not long ago."""
        for stream, output in self._streams.values():
            output["text"] = excerpt(stream.text())
        began = time.monotonic()
        if began - self._saved > 10 * self._saving:
            self._save(**kwargs)
            self._saved, self._saving = time.monotonic(), time.monotonic() - began
        else:
            self.nb_man.last_save_time = self.nb_man.now()

    # -- messages --------------------------------------------------------------------------------------------------------

    async def _async_poll_output_msg(self, parent_msg_id: str, cell: NotebookNode, cell_index: int) -> None:
        channel = self.kc.iopub_channel
        socket = zmq.Socket.shadow(channel.socket.underlying)
        while True:
            await channel.socket.poll()
            turn = time.monotonic() + TURN
            try:
                while time.monotonic() < turn:
                    msg = self._parsed(channel.session, socket.recv_multipart(zmq.NOBLOCK, copy=False))
                    if (
                        msg is not None
                        and msg["parent_header"].get("msg_id") == parent_msg_id
                        and self._is_last(msg, cell, cell_index)
                    ):
                        return
            except zmq.Again:
                pass
            await asyncio.sleep(0)  # while there are messages, poll() gives nobody else a turn

    def _is_last(self, msg: dict, cell: NotebookNode, cell_index: int) -> bool:
        """Is this message the end of the cell? Else it is taken in; one with which nothing can be done is counted as left out."""
        try:
            self.process_message(msg, cell, cell_index)
        except CellExecutionComplete:
            return True
        except Exception:  # whatever a kernel sends
            self._leave_out(msg["size"], UNFIT)
        return False

    def _parsed(self, session: Any, frames: list) -> dict | None:
        """A message with its "size"; of a long stream its ends, of an output that does not fit nothing, and None of a widget's."""
        _, frames = session.feed_identities(frames, copy=False)
        size = sum(map(len, frames[4:]))
        if size > LEAST:
            header, parent = (session.unpack(frame.bytes) for frame in frames[1:3])
            kind = header["msg_type"]
            if kind in DISPLAYS and MANY < size <= self.room:
                size += weight(bytes(frames[4].buffer))
            msg = {"header": header, "msg_type": kind, "parent_header": parent, "metadata": {}, "buffers": [], "size": size}
            if kind == "stream" and size > LARGE:
                return msg | {"content": ends_of_stream(frames[4].buffer)}
            if kind in ("display_data", "execute_result") and size > self.room:
                return msg | {"content": {}}
            if kind.startswith(("comm_", "update_")) and size > self.room:
                self._leave_out(size)
                return None
        try:
            msg = session.deserialize(frames, copy=False) | {"size": size}
        except (RecursionError, ValueError, TypeError):
            self._leave_out(size, UNFIT)
            return None
        if msg["msg_type"].startswith("comm_") and is_deep(msg["content"]):
            self._leave_out(size, UNFIT)
            return None
        return msg

    def fits(self, msg: dict, least: int = LEAST) -> bool:
        """Is there room for an output? It is then taken; else the output is counted as left out."""
        size = max(msg["size"], least)
        if size > self.room or not msg["content"]:
            self._leave_out(msg["size"], FULL if size > self.room else UNFIT)
            return False
        self.room -= size
        return True

    def _leave_out(self, size: int, why: str = FULL) -> None:
        count, before = self._left_out.get(why, (0, 0))
        self._left_out[why] = [count + 1, before + size]

    def output(self, outs: list, msg: dict, display_id: str | None, cell_index: int) -> None:
        if hooks := self.output_hook_stack[msg["parent_header"].get("msg_id")]:
            hooks[-1].output(outs, msg, display_id, cell_index)
            return
        kind, content, display_id = msg["msg_type"], msg["content"], display_id and str(display_id)
        if kind not in ("stream", "error", *DISPLAYS):
            return
        if self.clear_before_next_output:
            self._clear(outs)
        if kind == "stream":
            if content["name"] not in self._streams:
                outs.append(NotebookNode(output_type=kind, name=content["name"], text=""))
                self._streams[content["name"]] = Stream(), outs[-1]
            stream, _ = self._streams[content["name"]]
            stream.write(content["text"])
            if "end" in content:
                stream.skip(content["skipped"])
                stream.write(content["end"])
        elif kind == "error":
            traceback = [as_text(line) for line in content["traceback"]]
            if sum(map(len, traceback)) > LONG:
                traceback = [excerpt("\n".join(traceback))]
            tags = self.nb.cells[cell_index].metadata.get("tags", [])
            name, value = excerpt(as_text(content["ename"]), 1000), excerpt(as_text(content["evalue"]))
            node = Expected if "raises-exception" in tags else NotebookNode
            outs.append(node(output_type=kind, ename=name, evalue=value, traceback=traceback))
        elif shown := self._displays.get(display_id):
            if shown.shows(msg) and self.fits(msg):  # else the update of its other places was left out, and so is this one
                self._show(outs, msg, display_id, shown)
        elif self.fits(msg):
            if display_id:
                shown = self._displays[display_id] = Shown()
                shown.change(msg)
                self._show(outs, msg, display_id, shown)
            else:
                outs.append(_output(msg))
                self._spent += max(msg["size"], LEAST)

    def _show(self, outs: list, msg: dict, display_id: str, shown: Shown) -> None:
        outs.append(_output(msg))
        outs[-1].data, outs[-1].metadata = shown.data, shown.metadata
        shown.places += 1
        self._places[display_id] = self._places.get(display_id, 0) + 1

    def _update_display_id(self, display_id: str, msg: dict) -> None:
        """A display came again: what stands at its places changes, where there is room for it."""
        if shown := self._displays.get(str(display_id)):
            more = (max(msg["size"], LEAST) - shown.size) * shown.places
            if more > self.room or not msg["content"]:
                self._leave_out(msg["size"])
            else:
                self.room -= more
                shown.change(msg)

    def clear_output(self, outs: list, msg: dict, cell_index: int) -> None:
        if hooks := self.output_hook_stack[msg["parent_header"].get("msg_id")]:
            hooks[-1].clear_output(outs, msg, cell_index)
        elif msg["content"].get("wait"):
            self.clear_before_next_output = True
        else:
            self._clear(outs)

    def _clear(self, outs: list) -> None:
        outs[:] = []
        self.clear_before_next_output = False
        self.room += self._spent
        for display_id, places in self._places.items():
            shown = self._displays[display_id]
            shown.places -= places
            self.room += places * shown.size
            if not shown.places:
                del self._displays[display_id]
        self._begin_cell()

    def handle_comm_msg(self, outs: list, msg: dict, cell_index: int) -> None:
        known = msg["content"]["comm_id"] in self.widget_state or msg["content"]["comm_id"] in self.comm_objects
        if self.fits(msg, 0) if msg["msg_type"] == "comm_open" else known and self._changes_fit(msg):
            super().handle_comm_msg(outs, msg, cell_index)

    def _changes_fit(self, msg: dict) -> bool:
        """Is there room for what a widget's state grows by? Of the same traits the latest values are in the notebook."""
        traits = msg["content"]["data"].get("state")
        if not isinstance(traits, dict):
            return True
        which = msg["content"]["comm_id"], *sorted(traits)
        more = max(0, msg["size"] - self._states.get(which, 0))
        if more > self.room:
            self._leave_out(msg["size"])
            return False
        self.room -= more
        self._states[which] = max(msg["size"], self._states.get(which, 0))
        return True


class Engine(NBClientEngine):
    """papermill's engine with the client of this file."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, start_timeout: int = 60, **settings: Any) -> Any:
        settings = {name: value for name, value in settings.items() if name not in ("input_path", "log_output")}
        for name in ("stdout_file", "stderr_file"):
            settings.pop(name, None)
        client = Client(nb_man, startup_timeout=start_timeout, kernel_name=kernel_name, log=logger, **settings)
        try:
            return client.execute()
        finally:
            nb_man.save = client._save  # what is written at the end is written
