"""Locks on folders: one holder at a time, as long as a process that has inherited the lock lives, and not a moment longer."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading

import pytest

from labkit import locks
from labkit.locks import DirectoryLock, Scratch, alone, held, parsed
from tests.helpers import until


def test_a_directory_is_held_until_it_is_released(tmp_path):
    assert held(tmp_path) is None  # as of an earlier labkit
    lock = DirectoryLock(tmp_path, "a1")
    assert (held(tmp_path), held(tmp_path, "a1"), held(tmp_path, "b2")) == (True, True, None)
    with pytest.raises(BlockingIOError, match="is in use"):
        DirectoryLock(tmp_path)
    lock.release()
    lock.release()
    assert held(tmp_path, "a1") is False
    DirectoryLock(tmp_path)  # nobody has it any more: it is collected
    assert held(tmp_path) is False


def test_it_is_held_while_one_lives_who_has_inherited_it_also_under_another_name(tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    lock = DirectoryLock(path)
    heir = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock.fd,))
    with heir:
        lock._close()  # as by kill -9
        assert held(path)
        path.rename(tmp_path / "b")
        assert held(tmp_path / "b") and held(path) is None
        heir.kill()
        heir.wait()
    assert held(tmp_path / "b") is False


def test_what_a_holder_forks_holds_nothing(tmp_path):
    lock = DirectoryLock(tmp_path)
    ready, go_on = os.pipe()
    if not (child := os.fork()):
        os.close(go_on)
        os.read(ready, 1)
        os._exit(0)
    os.close(ready)
    lock._close()
    until(lambda: not held(tmp_path))  # it has closed its own
    assert held(tmp_path) is False
    os.close(go_on)
    os.waitpid(child, 0)


def test_who_looks_keeps_nobody_out(tmp_path):
    DirectoryLock(tmp_path).release()
    over = threading.Event()

    def look():
        while not over.is_set():
            held(tmp_path)

    watchers = [threading.Thread(target=look) for _ in range(3)]
    [watcher.start() for watcher in watchers]
    try:
        for _ in range(50):
            DirectoryLock(tmp_path).release()
    finally:
        over.set()
        [watcher.join() for watcher in watchers]


def test_a_directory_that_was_renamed_while_it_was_taken_is_not_taken(tmp_path, monkeypatch):
    path, flock = tmp_path / "a", locks._flock
    path.mkdir()

    def renamed(fd, **how):
        path.rename(tmp_path / "a.1")
        path.mkdir()
        return flock(fd, **how)

    monkeypatch.setattr(locks, "_flock", renamed)
    with pytest.raises(BlockingIOError):
        DirectoryLock(path)


def test_without_locks_nobody_can_tell(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    lock = DirectoryLock(tmp_path)
    assert held(tmp_path) is None
    lock.release()
    with alone(tmp_path):
        pass


def test_one_at_a_time_is_alone(tmp_path):
    inside, most = [], []

    def work():
        for _ in range(20):
            with alone(tmp_path):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert max(most) == 1 and len(most) == 60


def test_what_a_killed_process_has_left_is_deleted_by_the_next(tmp_path):
    code = f"from labkit.locks import Scratch; made = Scratch('labkit-', {str(tmp_path)!r}); print(made.path, flush=True); input()"
    left, living = (
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    )
    folders = [process.stdout.readline().strip() for process in (left, living)]
    (tmp_path / "labkit-of-others").mkdir()  # without a lock: nobody knows whose it is
    (tmp_path / "labkit-link").symlink_to(folders[0])
    with left, living:
        left.kill()
        left.wait()
        mine = Scratch("labkit-", str(tmp_path))
        assert not os.path.exists(folders[0]) and os.path.isdir(folders[1])
        assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
            os.path.basename(folders[1]),
            mine.path.name,
            "labkit-of-others",
        }
        living.communicate("end")
    assert mine.path.is_dir()
    mine.close()
    mine.close()
    assert not mine.path.exists()


def test_a_folder_that_is_deleted_before_it_is_held_is_made_again(tmp_path, monkeypatch):
    made = []

    class Late(DirectoryLock):
        def __init__(self, path):
            made.append(path)
            if len(made) == 1:
                path.rmdir()
            super().__init__(path)

    monkeypatch.setattr(locks, "DirectoryLock", Late)
    scratch = Scratch("labkit-", str(tmp_path))
    assert len(made) == 2 and scratch.path == made[1] and held(scratch.path)
    scratch.close()


def test_what_is_parsed_is_parsed_again_where_a_thread_of_another_library_came_in_between():
    calls = []

    def parse(text, *, disturbed):
        calls.append(text)
        if len(calls) <= disturbed:
            raise SystemError("AST constructor recursion depth mismatch (before=69, after=71)")
        return int(text)

    assert parsed(parse, "7", disturbed=2) == 7 and calls == ["7"] * 3
    calls.clear()
    with pytest.raises(ValueError, match="invalid literal"):
        parsed(parse, "x", disturbed=0)
    assert calls == ["x"]
    with pytest.raises(SystemError, match="depth mismatch"):  # what is always so is no accident
        parsed(parse, "7", disturbed=99)
