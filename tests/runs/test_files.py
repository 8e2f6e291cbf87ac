"""Files of a run directory: a reader never sees half of one, and what is damaged or foreign is refused by name."""

from __future__ import annotations

import threading

import pytest

from labkit.errors import RunError
from labkit.runs.files import find_json, read_json, read_lines_since, replacing, write_json


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "config.json"
    write_json(file, {"a": 1})

    def half():
        with replacing(file) as out:
            out.write(b"{")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert read_json(file) == {"a": 1} and [path.name for path in tmp_path.iterdir()] == ["config.json"]
    write_json(file, {"b": [2.5, None, "ä"]})
    assert read_json(file) == {"b": [2.5, None, "ä"]}


def test_a_reader_never_sees_half_a_file(tmp_path):
    file, over = tmp_path / "status.json", threading.Event()
    write_json(file, {"n": 0, "filler": "x" * 5000})

    def write():
        n = 0
        while not over.is_set():
            n += 1
            write_json(file, {"n": n, "filler": "x" * 5000})

    threads = [threading.Thread(target=write) for _ in range(2)]
    [thread.start() for thread in threads]
    seen = {read_json(file)["n"] for _ in range(300)}
    over.set()
    [thread.join() for thread in threads]
    assert seen and [path.name for path in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize(
    ("text", "words"), [("{", "cannot be read"), ("[1]", "holds a list, not a JSON object"), ("", "cannot be read")]
)
def test_json_that_is_damaged_or_foreign_is_refused_by_name(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RunError, match=rf"config\.json {words}"):
        read_json(tmp_path / "config.json")


def test_json_that_is_missing_or_a_folder(tmp_path):
    with pytest.raises(RunError, match=r"config\.json is missing: is .* a run directory\?"):
        read_json(tmp_path / "config.json")
    with pytest.raises(RunError, match="cannot be read"):
        read_json(tmp_path)


def test_json_that_may_be_missing_is_looked_for(tmp_path):
    file = tmp_path / "results.json"
    assert find_json(file) is None and find_json(tmp_path) is None
    for text, value in (("[1]", [1]), ("{", None), ("", None)):
        file.write_text(text)
        assert find_json(file) == value
    file.write_bytes(b"\xff\xfe")
    assert find_json(file) is None


def test_of_a_growing_file_whole_lines_are_read_once(tmp_path):
    file = tmp_path / "events.jsonl"
    assert read_lines_since(file) == ([], 0)
    file.write_bytes(b"one\n\ntwo")
    assert read_lines_since(file) == ([b"one", b""], 5)
    assert read_lines_since(file, 5) == ([], 5)
    file.write_bytes(b"one\n\ntwo\nthree\n")
    assert read_lines_since(file, 5) == ([b"two", b"three"], 15)
