"""Files of a run directory: written whole or not at all, read whole or refused by name.

A file that is replaced is written beside its old version and renamed, so that no reader ever sees half of one, also after a crash.
A JSON file of a run ends with a `digest` of its contents and says whose it is (`run`), so what was changed, cut or taken from
another run is found where it is read; earlier formats have neither. A file that grows is read by lines; what follows the last
newline is still being written.

Used by whoever writes or reads a run directory, a checkpoint, or the folder of a sweep.
"""

import contextlib
import hashlib
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


def write_json(path: Path, value: Any, mode: int = 0o666, run: str | None = None) -> None:
    """With the id of a `run` its file: an object that says so, and ends with its digest."""
    if run is not None:
        value = json.loads(json.dumps({**value, "run": run}))  # as it is read back: keys are text
        value["digest"] = _digest(value)
    with replacing(path, mode) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


def read_json(path: Path, run: str | None = None) -> dict:
    """A JSON object of a run directory, without its digest; what is missing, damaged, or not of this `run` is refused by name."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing: is {Path(path).parent} a run directory?") from error
    except (ValueError, OSError, RecursionError) as error:
        raise RunError(f"{path} cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} holds a {type(value).__name__}, not a JSON object: it was not written by labkit.")
    digest = value.pop("digest", None)
    if digest != _digest(value) and (digest is not None or "run" in value):
        raise RunError(f"{path} is damaged: its contents do not fit its digest. Put a copy of it back.")
    if (other := value.pop("run", run)) != run and run is not None:
        raise RunError(f"{path} belongs to another run: {other}, not {run or 'one without id'}. Put its own back.")
    return value


def check_owner(run: Path, id: str) -> None:
    """Before anything is written by path: `RunError` where the directory is not that of the run with this id any more."""
    found = find_json(Path(run) / "config.json")
    if isinstance(found, dict) and found.get("id", "") != id:
        raise RunError(
            f"{run} holds another run now ({found.get('id')}, not {id}): it was moved or replaced while its run was running."
        )


def find_json(path: Path) -> Any:
    """What a JSON file holds, or None where it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def is_folder(path: Path) -> bool:
    """Is there a folder? A path that is too long for one is none."""
    try:
        return Path(path).is_dir()
    except OSError:
        return False


def run_id(path: Path) -> str:
    """What distinguishes the files of this run from those of another one; "" where there is none."""
    config = Path(path) / "config.json"
    return str(read_json(config).get("id", "")) if config.exists() else ""


def _digest(value: dict) -> str:
    """Whatever the order of its keys."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_lines_since(path: Path, offset: int = 0) -> tuple[list[bytes], int]:
    """The whole lines of a growing file behind `offset` (bytes), and the offset behind them; none of a file that is missing."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        lines = []
    return lines, offset + sum(len(line) + 1 for line in lines)
