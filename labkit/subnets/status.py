"""Progress of subnets across processes: files beside the weights, by which workers report epochs and learn that they are to stop.

    <folder>/awaited-<id>           there while a kernel waits for the training of this id; without it workers stop
    <folder>/subnet-<number>.jsonl  a line for each epoch, written by the worker that trains this subnet

The last line counts, and a subnet that is trained again begins again. The flag bears the id of the training, so that workers of
an earlier one of the same name do not go on for the next. The folder is one that the kernel and all workers see.

Used by `labkit.subnets.train` and `labkit.subnets.baselines`.
"""

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from labkit.locks import held


@contextlib.contextmanager
def awaited(folder: Path, id: str) -> Iterator[None]:
    """While it is open, the workers of the training with this id are to go on."""
    file = _flag(folder, id)
    file.write_text(socket.gethostname())
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # also when it failed: else they would go on to the end of what they train


def stopped(folder: str | Path, id: str) -> bool:
    """Runs on a worker: no kernel waits for these subnets any more; where it was on this machine, also since it was killed."""
    try:
        machine = _flag(folder, id).read_text()
    except OSError:
        return True
    return machine == socket.gethostname() and held(Path(folder).parent) is False


def _flag(folder: str | Path, id: str) -> Path:
    return Path(folder) / f"awaited-{id}"


def report(folder: str | Path, id: str, number: int, epoch: int, loss: float | None, score: float | None) -> bool:
    """Runs on a worker: record one more epoch of the subnet of this number. Is its training to stop?"""
    if stopped(folder, id):
        return True
    with open(Path(folder) / f"subnet-{number}.jsonl", "a") as file:
        file.write(json.dumps({"epoch": epoch, "loss": loss, "score": score}) + "\n")
    return False


def latest(folder: Path) -> dict[int, dict[str, Any]]:
    """The latest epoch, loss and score of each subnet, by its number, in order."""
    found = {}
    for file in folder.glob("subnet-*.jsonl"):
        whole = file.read_bytes().rpartition(b"\n")[0]  # the last line may still be incomplete
        if whole:
            found[int(file.stem.removeprefix("subnet-"))] = json.loads(whole.rpartition(b"\n")[2])
    return dict(sorted(found.items()))
