"""How a run ended: `status.json`, and what its events and checkpoints say of it. The files of a run must fit each other.

    status.json    state, reason, version, samples; events: how many the record holds
    events.jsonl   has that many, and leads to the newest checkpoint; all samples of the budget are merged where it is done

A status that is missing or damaged is made anew where the rest leaves no doubt: an event says that the run was stopped or failed, or
all samples were merged, and the last version is kept.

Written by `labkit.training.server.server`, `labkit.training.supervisor` and `labkit.simulation.offline`; read by `labkit.runs.record`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.errors import RunError
from labkit.runs.events import COLUMNS, RESTORE, VERSIONS, Tail, effective
from labkit.runs.events import FILE as EVENTS
from labkit.runs.files import check_owner, read_json, write_json

if TYPE_CHECKING:
    import pandas as pd

    from labkit.runs.config import RunConfig

FILE = "status.json"
STATES = ("done", "stopped", "failed")
KEYS = {"state": str, "reason": str, "version": int, "samples": int, "events": int}
ALWAYS = ("state", "reason")


def write(path: Path, run: str, status: Mapping[str, Any], events: int | None = None) -> None:
    """The run of this id has ended; its record holds so many `events`."""
    check_owner(path, run)
    write_json(Path(path) / FILE, {**status, **({} if events is None else {"events": events})}, run=run)


def read(path: Path, run: str) -> dict[str, Any] | None:
    """How the run of this id ended, None where nothing says so; RunError for a file that is damaged or of another run."""
    file = Path(path) / FILE
    if not file.exists():
        return None
    status = read_json(file, run)
    wrong = [name for name, kind in KEYS.items() if name in (*status, *ALWAYS) and type(status.get(name)) is not kind]
    if wrong or status.get("state") not in STATES:
        raise RunError(f"{file} is not whole: its {', '.join(wrong) or 'state'} is none that labkit writes.")
    return status


def check(path: Path, events: pd.DataFrame, config: RunConfig, ended: Mapping[str, Any] | None, saved: Sequence[int]) -> None:
    """Do the events lead to how the run `ended` (None: not yet), and to the versions that were `saved`? RunError if they do not."""
    file, n = Path(path) / EVENTS, (ended or {}).get("events")
    unwritten = ended is not None and ended["state"] == "failed" and len(events) - 1 == n  # a full disk took the last one late
    if n is not None and n != len(events) and not unwritten:
        end = "The end of it is missing" if n > len(events) else f"It was written to after the run, or {FILE} is an older one"
        raise RunError(f"{file} holds {len(events)} of {n} events. {end}. {RESTORE}")
    made = events.version[events.kind.isin([*VERSIONS, "checkpoint", "resume"])].max()
    if saved and (0.0 if made != made else made) < saved[-1]:
        raise RunError(
            f"The end of {file} is missing: it leads to version {made:.0f}, and version {saved[-1]} was saved. {RESTORE}"
        )
    if not ended or ended["state"] != "done" or "version" not in ended:
        return
    version, merged = _reached(events)
    if version != ended["version"] or not _budget_merged(events, config, merged):
        raise RunError(
            f"{file} does not lead to how the run ended: {merged} of {config.budget} samples are merged in version {version}, and it was done "
            f"at version {ended['version']}. {RESTORE}"
        )


def check_continued(path: Path, version: int, merged: int) -> int:
    """Can the run go on from this version, in which so many samples are merged? RunError where its events do not lead there.

    Returns the last version that was saved by the events.
    """
    import pandas as pd

    events = pd.DataFrame(Tail(path).read(continued=True), columns=COLUMNS)
    counted = effective(events)
    merges = counted[counted.kind.isin(VERSIONS) & (counted.version <= version)]
    saved = counted.version[counted.kind == "checkpoint"].astype(int).tolist()
    reached = (merges.version.iloc[-1], merges.total.iloc[-1]) if len(merges) else (version if version in saved else 0, merged)
    if version and reached != (version, merged):
        raise RunError(
            f"{Path(path) / EVENTS} does not lead to version {version}, which was saved after {merged} samples: it leads to version "
            f"{reached[0]:.0f}. {RESTORE}"
        )
    return max(saved, default=version)


def anew(events: pd.DataFrame, config: RunConfig, saved: Sequence[int]) -> dict[str, Any] | None:
    """How the run ended by its events alone; None where they do not say it, or the version that was the last is not `saved`."""
    version, merged = _reached(events)
    if not len(events) or not saved or saved[-1] != version:
        return None
    since = events.index[events.kind == "resume"].max() if (events.kind == "resume").any() else events.index[0]
    said = events[events.kind.isin(["stop", "error"]) & (events.index >= since)]
    reached = {"version": version, "samples": merged, "events": len(events)}
    if len(said):
        reason = said.message.iloc[-1]
        state = "failed" if said.kind.iloc[-1] == "error" else "stopped"
        return {"state": state, "reason": reason if isinstance(reason, str) else "", **reached}
    return {"state": "done", "reason": "", **reached} if _budget_merged(events, config, merged) else None


def _reached(events: pd.DataFrame) -> tuple[int, int]:
    """The last version, and the samples that are part of it."""
    merges = (counted := effective(events))[counted.kind.isin(VERSIONS)]
    return int(merges.version.max()) if len(merges) else 0, int(merges.samples.sum())


def _budget_merged(events: pd.DataFrame, config: RunConfig, merged: int) -> bool:
    joint = int(events.worker.nunique()) if config.update["name"] == "allreduce" else 1  # they stop together
    return config.budget - joint < merged <= config.budget
