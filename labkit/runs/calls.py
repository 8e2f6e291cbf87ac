"""The calls that make a run again, as code that its user can paste: from the record alone, of which nothing is imported.

    problem = labkit.Classifier(...)     what was trained, by the settings in config.json
    lab = labkit.connect(...)            where
    run = labkit.train(problem, lab, ...)

What has no value in the record is left out. What was written in a notebook or a script is in it by its name alone: it is `...` in the code,
and named behind it. A run that no cluster has made is one call of `labkit.replay` or `labkit.simulate`. `from_record` has the calls that
read a run back, replay it and go on with it, which are given again what the record does not hold.

Used by `labkit.plots.report`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from labkit.imports import by_value
from labkit.runs.config import JOINT, REPLAYABLE

if TYPE_CHECKING:
    from labkit.runs.record import RunRecord

OF_TRAIN = ("passes", "local_steps", "seed", "checkpoints", "exchange", "overlap", "heartbeat_timeout", "join_timeout")
OF_TRAIN += ("target", "patience", "name")
OF_SIMULATE = ("passes", "local_steps", "exchange", "overlap", "seed")
UNEVEN = ("jitter", "drift", "stalls")
WIDE = 100  # characters of a call in one line


def calls(run: RunRecord) -> str:
    """The code that makes a run again: its problem, its lab and the call of `train`, or the call that made it without a lab."""
    return "\n".join(["import labkit", "", *(_trained(run) if run.origin == "live" else _made(run))])


def from_record(run: RunRecord) -> str:
    """The code that reads a run back, makes its weights again from the record, and goes on with it, or why one of these cannot be done.

    Problem, update and partition that `calls` writes with `...` are called by these names.
    """
    config, where = run.config, repr(str(run.path))
    lost = config.by_name_alone
    rules = "".join(f", {rule}={rule}" for rule in lost if rule != "problem")
    problem = ", problem=problem" if "problem" in lost else ""
    lines = [f"# With {' and '.join(lost)} as {'it was' if len(lost) == 1 else 'they were'} given to train."] if lost else []
    lines += [f"run = labkit.load_run({where}{problem})"]
    if run.origin != "live":
        return "\n".join(lines)
    devices = {str(worker.get("device") or "cpu").partition(":")[0] for worker in config.workers} - {"cpu"}
    if devices:
        lines.append(
            f"# No labkit.replay(run): it was computed on {', '.join(sorted(devices))}, where sums are not the same to the last bit."
        )
    elif config.format < (JOINT if config.update["name"] == "allreduce" else REPLAYABLE):
        lines.append(f"# No labkit.replay(run): a record of format {config.format} does not hold all that it needs.")
    elif run.state == "running":
        lines.append("# labkit.replay(run) makes the same weights again, once it has ended.")
    else:
        lines.append(f"labkit.replay(run{rules})  # the same weights again, from the record")
    if run.state in ("failed", "stopped"):
        lines.append(f"{config.resume_call(run.path, lab=True)}  # goes on from the last checkpoint")
    return "\n".join(lines)


def _trained(run: RunRecord) -> Iterator[str]:
    config = run.config
    yield from _problem(config.problem)
    where = {"n_workers": max(config.indices, default=0) + 1, "threads_per_worker": _threads(config.workers), **_uneven(config)}
    if config.kind == "slurm":
        yield "# What each job asked for (queue=, cores=, memory=, ...) is not in the record."
    elif config.kind in ("dask", "ipyparallel"):
        yield "# Workers of this machine. If it was a cluster of your own, give its address=, client= or profile= instead."
    yield _call("lab", "labkit.connect", [repr(config.kind)], where)
    how = {rule: config[rule] for rule in ("partition", "update")} | {name: getattr(config, name) for name in OF_TRAIN}
    if config.indices != list(range(where["n_workers"])):
        how["workers"] = config.indices
    yield _call("run", "labkit.train", ["problem", "lab"], how)
    if config.resumed:
        versions = ", ".join(str(time.get("version")) for time in config.resumed)
        yield f"# It was cut off or stopped, and resumed from version {versions}."


def _made(run: RunRecord) -> Iterator[str]:
    """The call of a replay or of a simulation."""
    config, origin = run.config, run.config.origin or {}
    lost = "problem" in config.by_name_alone
    if lost:
        yield from _problem(config.problem)
    given = ", problem=problem" if lost else ""
    source = "..." if origin.get("run") is None else f"labkit.load_run({str(run.path.parent / str(origin['run']))!r}{given})"
    if run.origin != "simulated":
        rule = {} if run.origin == "replay" else {"update": config.update}
        yield _call("run", "labkit.replay", [source], {**rule, "name": config.name})
        return
    if source == "...":
        yield "# ... are the samples/s of each worker, which are not in the record."
    how = {"n_workers": config.n_workers, **_uneven(config), "update": config.update, "partition": config.partition}
    how |= {name: getattr(config, name) for name in OF_SIMULATE} | dict(config.scenario or {})
    yield _call("run", "labkit.simulate", [source], {**how, "numerics": origin.get("numerics"), "name": config.name})


def _problem(config: Mapping[str, Any]) -> Iterator[str]:
    settings = dict(config)
    kind, fold = settings.pop("kind", None), settings.pop("cross_validation", None)
    module, _, name = kind.partition(":") if isinstance(kind, str) else ("", "", "")
    if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):  # of a notebook, or of a strange record
        yield f"problem = ...  # {by_value(kind) or kind!r} was written in a notebook or a script: the record holds its name alone"
        return
    outer = name.partition(".")[0]
    if module != "labkit":
        yield f"from {module} import {outer}"
    call = _call("problem", name if module != "labkit" else f"labkit.{name}", [], settings)
    if isinstance(fold, Mapping):
        numbers = [repr(fold.get(part)) for part in ("fold", "of", "seed")]
        call += f"\n{_call('problem', 'problem.fold', numbers, {})}"
    yield call


def _threads(workers: Any) -> int:
    return max((int(worker.get("threads") or 1) for worker in workers), default=1)


def _uneven(config: Any) -> dict[str, Any]:
    """How workers were made slower than they are, where they were."""
    slow = {index: config.unevenness(index).slowdown for index in range(max(config.indices, default=0) + 1)}
    found = {"slowdown": None if set(slow.values()) <= {1.0} else list(slow.values())}
    return found | {name: getattr(config, name) or None for name in UNEVEN}


def _call(result: str, function: str, given: list[str], settings: Mapping[str, Any]) -> str:
    """A call as code; settings that are None, empty, or no names of arguments are left out."""
    kept = {
        name: value for name, value in settings.items() if name.isidentifier() and value is not None and value not in ([], {}, ())
    }
    lines = [f"{name}={_code(value)}" for name, value in kept.items()]
    lost = {name: by_value(value) for name, value in kept.items() if by_value(value) is not None}
    whole = f"{result} = {function}({', '.join([*given, *lines])})"
    if len(whole) <= WIDE and not lost:
        return whole
    notes = [
        f"  # {lost[name]!r} was written in a notebook or a script: the record holds its name alone" if name in lost else ""
        for name in kept
    ]
    rows = [*(f"{own}," for own in given), *(f"{line},{note}" for line, note in zip(lines, notes, strict=True))]
    return "\n".join([f"{result} = {function}(", *(f"    {row}" for row in rows), ")"])


def _code(value: Any) -> str:
    """What stands for a value in code: its repr, and `...` for what the record has the name of alone."""
    if isinstance(value, Mapping):
        inner = ", ".join(f"{str(key)!r}: {_code(own)}" for key, own in value.items())
        return "..." if "by_value" in value else f"{{{inner}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_code, value))}]"
    if isinstance(value, float) and value != value:
        return "float('nan')"
    return f"float('{value}')" if value in (float("inf"), float("-inf")) else repr(value)
