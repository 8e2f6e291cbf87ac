"""What a worker says of itself: the stacks of its own threads, bounded, with the innermost frames."""

from __future__ import annotations

import threading

from labkit.training.wire.protocol import MAX_STACK
from labkit.training.worker.inspection import memory_of, stacks_of


def test_of_a_deep_stack_the_innermost_frames_are_left_and_a_thread_that_is_gone_has_none():
    deep, go_on = threading.Event(), threading.Event()

    def back(n):
        return descend(n)

    def descend(n):  # two functions: of one that calls itself a stack has the first frames alone
        if n:
            return back(n - 1)
        deep.set()
        go_on.wait(90)
        return None

    thread = threading.Thread(target=descend, args=(300,))
    thread.start()
    assert deep.wait(90)
    text = stacks_of({"own": thread.ident, "gone": -1})
    go_on.set()
    thread.join()
    assert set(text) == {"own"} and len(text["own"]) == MAX_STACK and "in wait" in text["own"] and text["own"].startswith("...")
    assert memory_of("cpu")["rss_peak"] >= memory_of("cpu")["rss"] * 0.5 > 0
