"""What differs between runs, in a few words: the labels of lines and rows wherever several runs are shown together.

    AGWU + IDPA, lr 0.01          the strategy, and the settings in which the runs that are shown together differ
    AGWU + IDPA, seed 1           also the seed, where each run has a row or a line of its own
    AGWU + IDPA (runs/second)     the directory, where all settings are equal

The settings of a rule are compared among the runs of one strategy, all others among all runs. `LAST` are said only where nothing
else tells two runs apart: "code" is a digest of the user's modules, and of the functions that were written in a notebook.

Used by `labkit.runs.compare` and `labkit.plots`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labkit.runs.record import RunRecord

MOST = 2  # settings in a label, unless more are needed to tell two runs apart; "..." stands for others, which `differing` has
EXACT = 2**53  # whole numbers up to this are floats as well
OF_STRATEGY = ("update.", "partition.", "origin.")  # compared among runs of one strategy
ASIDE = ("checkpoints", "heartbeat_timeout", "join_timeout", "one_process", "budget", "batch_size", "labkit", "hosts", "source")
ASIDE += ("exact_buffers", "still", "balanced_end")
LAST = ("code", *ASIDE)  # said only where nothing else tells two runs apart; other code is another line
# What is derived from the rest, or told in a way of its own.
UNSAID = ("format", "id", "name", "created", "data_note", "synthetic", "emulated", "problem", "update", "partition", "workers")
UNSAID += ("origin", "scenario", "resumed", "sources", "milestones", "ema", "lower_is_better")
FOLD = tuple(f"cross_validation.{name}" for name in ("fold", "of", "seed"))
DERIVED = {
    "n_train": ("data", "train_samples", *FOLD),
    "batch_size": ("batch_size",),
}  # differs because one of these of the problem does


def labels(runs: Sequence[RunRecord], *, by_directory: bool = True) -> list[str]:
    """A label for each run: its strategy and what differs; two runs of one label are one directory, unless that is told otherwise (`ends`)."""
    return _labels(runs, settings(runs), {}, by_directory)


def ends(runs: Sequence[RunRecord]) -> list[str]:
    """Of the directory of each run the name, with so many folders above it as tell it from the others: "a", or "one/a" beside "two/a"."""
    paths = [_directory(run) for run in runs]
    return [_end(path, {*paths} - {path}) for path in paths]


def lines(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs by label, in the order given: those that differ in their seed alone share one, each run counts once."""
    once: dict[str, RunRecord] = {}
    for run in runs:
        once.setdefault(_directory(run), run)
    runs = list(once.values())
    read, groups = settings(runs), {}
    for run, own in zip(runs, read, strict=True):
        same = {key: value for key, value in own.items() if key not in ("seed", *ASIDE)}
        groups.setdefault((run.label, json.dumps(same, sort_keys=True, default=str)), []).append(run)
    by_line = []
    for group in groups.values():
        repeated = len({run.config.seed for run in group}) == 1  # nothing tells these apart: no line in common
        by_line += [[run] for run in group] if repeated else [group]
    firsts = [group[0] for group in by_line]
    alone = all(len(group) == 1 for group in by_line)
    read = [read[runs.index(run)] for run in firsts]
    return dict(zip(_labels(firsts, read, {} if alone else {"seed"}), by_line, strict=True))


def differing(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """The settings in which the runs differ, by name: a value for each run, None where it has no such setting.

    Beside them stand results: the loss that was trained with is "loss function" here.
    """
    read = settings(runs)
    keys = [key for key in _differing(runs, read) if key not in ASIDE]
    named = {key: "loss function" if name == "loss" else name for key, name in _names(keys).items()}
    return {name: [own.get(key) for own in read] for key, name in named.items()}


def settings(runs: Iterable[RunRecord]) -> list[dict[str, Any]]:
    """All that was set for each run, by name with dots, what matters most first."""
    return [_settings(run) for run in runs]


def _settings(run: RunRecord) -> dict[str, Any]:
    config = dict(run.config)
    problem, workers = config.pop("problem"), config.pop("workers")
    first = ("kind", "model", "model_args", "data", "lr", "optimiser", "batch_size")
    found = _flat("problem", {key: problem[key] for key in (*first, *problem) if key in problem})
    for rule in ("update", "partition"):
        found |= _flat(rule, config[rule])
    found["origin.kind"] = (config.get("origin") or {}).get("kind", "live")
    for key in ("passes", "local_steps", "n_train", "exchange", "overlap", "kind", "n_workers"):
        found[key] = config[key]
    for key in ("slowdown", "drifts_to"):
        factors = [float(worker.get(key) or 1) for worker in workers]
        found[key] = None if all(factor == 1 for factor in factors) else factors
    if found["drifts_to"] == found["slowdown"]:
        del found["drifts_to"]
    found["device"] = sorted({str(worker.get("device", "cpu")).partition(":")[0] for worker in workers})
    found["threads"] = sorted({int(worker.get("threads") or 1) for worker in workers})
    found |= {key: config[key] for key in ("jitter", "drift", "stalls")} | _flat("scenario", config.get("scenario") or {})
    others = [key for key in run.config.__dataclass_fields__ if key not in (*found, *UNSAID, *ASIDE, "seed")]
    found |= {key: getattr(run.config, key) for key in others}
    sources = json.dumps(dict(config.get("sources") or {}), sort_keys=True)  # of users' modules
    found["code"] = hashlib.sha256(sources.encode()).hexdigest()[:6]
    found["seed"] = config["seed"]
    found["hosts"] = sorted({str(worker.get("host")) for worker in workers})
    found["source"] = (config.get("origin") or {}).get("run")
    return found | {key: config[key] for key in ASIDE if key in config}


def _flat(name: str, value: Any) -> dict[str, Any]:
    """By name with dots; what a problem takes with options, loss={"name": "huber", "delta": 2}, by the name that it has without them."""
    if not isinstance(value, Mapping) or "by_value" in value:
        return {name: value}
    inside = {name if part == "name" and name.startswith("problem.") else f"{name}.{part}": own for part, own in value.items()}
    return {key: inner for part, own in inside.items() for key, inner in _flat(part, own).items()}


def _differing(runs: Sequence[RunRecord], read: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the settings in which runs differ, in their order."""
    found = []
    for key in dict.fromkeys(key for own in read for key in own):
        scopes: dict[str, set[str]] = {}
        kinds = [own.get("problem.kind") for own in read if key in own and key.startswith("problem.")]
        for run, own in zip(runs, read, strict=True):
            if key in own or own.get("problem.kind") in kinds:  # a problem of that kind leaves out what is at its default
                value = _exact(own[key]) if key in own else ""
                scopes.setdefault(run.label if key.startswith(OF_STRATEGY) else "", set()).add(value)
        if any(len(values) > 1 for values in scopes.values()):
            found.append(key)
    return [key for key in found if not any(f"problem.{other}" in found for other in DERIVED.get(key, ()))]


def _labels(
    runs: Sequence[RunRecord], read: Sequence[Mapping[str, Any]], but: Iterable[str], by_directory: bool = True
) -> list[str]:
    keys = [key for key in _differing(runs, read) if key not in but]
    names, parts = _names(keys), {key: _parts(read, key) for key in keys}
    told = [{run.label: None} for run in runs]  # what each label tells, a dict for its order

    def tell(key: str) -> bool:
        """Whether this setting tells two runs apart that were not yet told apart."""
        before = len({tuple(own) for own in told})
        for own, part in zip(told, parts[key], strict=True):
            own |= {(names[key], part): None} if part else {}
        return len({tuple(own) for own in told}) > before

    main = [key for key in keys if key not in LAST]
    needed = [key for key in main if tell(key)]
    others = [key for key in main if key not in needed]
    shown = {*needed, *others[: max(0, MOST - len(needed))]}
    told = [{run.label: None} for run in runs]
    for key in main:
        if key in shown:
            tell(key)
    for key in (key for key in keys if key in LAST):
        before = [dict(own) for own in told]
        if not tell(key):
            told = before
    texts = [", ".join([label, *(_said(*said) for said in rest)]) for label, *rest in told]
    texts = [text + ", ..." * (len(shown) < len(main)) for text in texts]
    return _by_directory(texts, [_directory(run) for run in runs]) if by_directory else texts


def _said(name: str, text: str) -> str:
    if text in ("yes", "none"):
        return name if text == "yes" else f"no {name}"
    return f"not {name}" if text == "no" else f"{name} {text}"


def _names(keys: Sequence[str]) -> dict[str, str]:
    """Each by its last word, `update.lr` as "update lr" where there is another `lr`."""
    last = [key.rpartition(".")[2] for key in keys]
    short = {
        key: name if last.count(name) == 1 and name != "name" else key.replace(".", " ")
        for key, name in zip(keys, last, strict=True)
    }
    return (
        short | {key: "origin" for key in keys if key == "origin.kind"} | {key: "problem" for key in keys if key == "problem.kind"}
    )


def _parts(read: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """The value of a setting for each run as a text, as short as all that differ are told apart; "" where there is none."""
    exact = [_exact(own[key]) if key in own else None for own in read]
    apart = len({*exact} - {None})
    for length in range(6):
        texts = [_text(own[key], length) if key in own else "" for own in read]
        if len({text for text, value in zip(texts, exact, strict=True) if value is not None}) == apart:
            break
    return texts


def _exact(value: Any) -> str:
    """2 and 2.0 are one value; whole numbers beyond those that a float holds stay what they are."""
    return json.dumps(float(value) if type(value) is int and abs(value) <= EXACT else value, sort_keys=True, default=str)


def _text(value: Any, length: int) -> str:
    """A value for a label; a path or an import path by its last parts, the more the greater `length`."""
    if value is None or isinstance(value, bool):
        return "none" if value is None else "yes" if value else "no"
    if isinstance(value, float) or (isinstance(value, int) and abs(value) <= EXACT):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, Mapping):
        return str(value["by_value"]) if "by_value" in value else json.dumps(value, default=str)
    if isinstance(value, list | tuple):
        texts = [_text(item, length) for item in value]
        if len(texts) > 4 and length < 3:
            return ", ".join(f"{texts.count(text)} at {text}" for text in dict.fromkeys(texts))
        return ":".join(texts)
    text = str(value)
    if length == 0 or len(text) > 60:
        text = re.sub(r"-([0-9a-f]{6})[0-9a-f]{14}$", r"-\1", text)  # a data set in the cache
    parts = re.split(r"[/:\\]", text) if ":" in text or "/" in text or "\\" in text else [text]
    return text if length >= 5 else "/".join(parts[-1 - length :])


def _directory(run: RunRecord) -> str:
    return str(Path(run.path).resolve())


def _by_directory(texts: list[str], paths: Sequence[str]) -> list[str]:
    """Those texts that several directories share, each with the last parts of its own."""
    shared = {text: sorted({p for t, p in zip(texts, paths, strict=True) if t == text}) for text in texts}
    named = []
    for text, path in zip(texts, paths, strict=True):
        others = [other for other in shared[text] if other != path]
        named.append(f"{text} ({_end(path, others)})" if others else text)
    return named


def _end(path: str, others: Iterable[str]) -> str:
    """The last parts of a path, as many as no other one has."""
    parts, others = Path(path).parts, [Path(other).parts for other in others]
    n = next((n for n in range(1, len(parts)) if all(other[-n:] != parts[-n:] for other in others)), len(parts))
    return "/".join(parts[-n:])
