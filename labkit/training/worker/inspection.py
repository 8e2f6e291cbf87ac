"""What a worker says of itself when it is inspected: where its threads are, and how much memory it has taken.

A text is all that leaves the process, and it is bounded: of a long stack the innermost frames, without those that called labkit
(of Dask, a thread pool, Python's threads).

Used by `labkit.training.worker.worker`.
"""

import resource
import sys
import traceback
from collections.abc import Mapping
from types import FrameType

import psutil
import torch

from labkit.errors import HERE
from labkit.training.wire.protocol import MAX_STACK


def stacks_of(threads: Mapping[str, int]) -> dict[str, str]:
    """The stack of each of these threads (their idents by name) that is alive, from labkit on, the innermost frame last."""
    frames = sys._current_frames()
    return {name: bounded(_text(frames[ident])) for name, ident in threads.items() if ident in frames}


def _text(frame: FrameType) -> str:
    stack = traceback.extract_stack(frame)
    first = next((number for number, one in enumerate(stack) if one.filename.startswith(HERE)), 0)
    return "".join(traceback.format_list(stack[first:]))


def memory_of(device: str) -> dict[str, float]:
    """Bytes of this process, now and at most, and what torch has of a GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"rss": psutil.Process().memory_info().rss, "rss_peak": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    if device != "cpu":
        found |= {"device": torch.cuda.memory_allocated(device), "device_reserved": torch.cuda.memory_reserved(device)}
    return found


def bounded(text: str) -> str:
    """As much of it as a message may have, the end of it."""
    text = text.encode(errors="replace").decode()  # half of a surrogate pair cannot be sent
    return text if len(text) <= MAX_STACK else "... " + text[4 - MAX_STACK :]
