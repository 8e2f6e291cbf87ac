"""Files of a run directory: written whole or not at all, read whole or refused by name.

A file that is replaced is written beside its old version and renamed, so that no reader ever sees half of one, also after a crash.
A file that grows is read by lines; what follows the last newline is still being written.

Used by whoever writes or reads a run directory, a checkpoint, or the folder of a sweep.
"""

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from labkit.errors import RunError


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[Any]:
    """A binary file that replaces `path` only once it is written and on the disk; `mode` holds from its first moment."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    draft.unlink(missing_ok=True)
    try:
        with open(draft, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # its new name, too, is on the disk
    finally:
        os.close(folder)


def write_json(path: Path, value: dict, mode: int = 0o666) -> None:
    with replacing(path, mode) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


def read_json(path: Path) -> dict:
    """A JSON object of a run directory; what is missing or damaged is refused by name."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing: is {Path(path).parent} a run directory?") from error
    except (ValueError, OSError) as error:
        raise RunError(f"{path} cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} holds a {type(value).__name__}, not a JSON object: it was not written by labkit.")
    return value


def find_json(path: Path) -> Any:
    """What a JSON file holds, or None where it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_lines_since(path: Path, offset: int = 0) -> tuple[list[bytes], int]:
    """The whole lines of a growing file behind `offset` (bytes), and the offset behind them; none of a file that is missing."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        lines = []
    return lines, offset + sum(len(line) + 1 for line in lines)
