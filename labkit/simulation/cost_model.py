"""What work takes on a cluster, fitted from the events of recorded runs.

    from release to push    compute (per sample, with its spread) + score + exchange (push and pull of the weights)
    from push to release    the server's time for a merge, one after the other; and waiting, which a simulation makes itself

    exchange(bytes) = fixed + bytes / bandwidth        server(bytes) = fixed + bytes x seconds per byte

The bytes of an exchange are those on the wire, those of a merge float32's: in 16 bits half as much travels, and as much is merged.
With runs of two sizes of model both parts are fitted by least squares. With one size only their sum is known: then the fixed part
is taken to be what was measured for small messages (`FIXED_S`), and the rest to grow with the bytes.

Emulated slowdown is taken out, f = E[max(1, s exp(jitter z))] with s the slowdown at that time, and stalls by their mean, so that
a pace is a worker's own, and its spread is what the machine adds to the jitter and the stalls that were asked for. What all
workers go through at the same time (on a machine that they share, say) is no spread: it makes nobody wait for another.

How well a few local passes tell a pace is asked by drawing them anew (bootstrap; Efron, Annals of Statistics 7, 1979): `Timing.redrawn`.

Used by `labkit.simulation.simulator` and `labkit.simulation.scenario`. Imports neither torch nor sockets.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from labkit.cluster.emulation import Unevenness
from labkit.errors import RunError
from labkit.runs.events import effective
from labkit.training.wire.compression import n_bytes

if TYPE_CHECKING:
    from labkit.training.run import Run

FIXED_S = {"exchange": 1e-3, "server": 2e-4}  # seconds of a small message there and back; of a merge of few weights
FEW = 8  # passes of a worker that do not tell whether it follows the others
QUANTILES = np.array([statistics.NormalDist().inv_cdf((i + 0.5) / 2000) for i in range(2000)])
POINTS = np.linspace(0.05, 0.95, 10)  # of a local pass, where drift is looked at


@dataclass(frozen=True)
class Line:
    """Seconds as a straight line of bytes."""

    fixed: float
    per_byte: float

    def __call__(self, n_bytes: float) -> float:
        return self.fixed + self.per_byte * n_bytes


@dataclass(frozen=True)
class Pace:
    """One worker as it is without emulation: seconds per sample and of a score; what multiplies a pass (mean 1), and a probe; its index
    where it was measured, and by run the seconds per sample of each of its local passes."""

    seconds: float
    score_s: float = 0.0
    spread: tuple[float, ...] = (1.0,)
    probe: tuple[float, ...] = (1.0,)
    worker: int = 0
    recorded: tuple[tuple[float, ...], ...] = ()

    @property
    def passes(self) -> np.ndarray:
        """Seconds per sample of all local passes that were recorded."""
        return np.array([seconds for run in self.recorded for seconds in run])

    def redrawn(self, runs: Sequence[int], chance: np.random.Generator) -> Pace:
        """This worker by as many passes of these runs, drawn with repetition; of all runs where it was in none of these."""
        there = [self.recorded[run] for run in runs if self.recorded[run]] or [run for run in self.recorded if run]
        drawn = np.concatenate([chance.choice(run, len(run)) for run in there])
        return replace(self, seconds=self.seconds * float(drawn.mean() / self.passes.mean()))


@dataclass(frozen=True)
class Timing:
    """The workers that were measured, in the order of their indices; the links; the server; the mean score, and milestones."""

    paces: tuple[Pace, ...]
    exchange: Line
    server: Line
    score: float = 1.0
    settle_s: float = 0.0  # what a milestone takes, on whichever worker

    def with_links(self, bandwidth: float | None, latency: float | None) -> Timing:
        """Other links: `bandwidth` in bytes/s and `latency` in seconds, each way; None leaves it as it was measured."""
        fixed = self.exchange.fixed if latency is None else 2 * latency
        per_byte = self.exchange.per_byte if bandwidth is None else 2 / bandwidth
        return replace(self, exchange=Line(fixed, per_byte))

    def on_servers(self, n: int) -> Timing:
        """The weights cut into n parts, each on a server of its own: merged side by side, each in its time for one part."""
        return replace(self, server=Line(self.server.fixed, self.server.per_byte / n))

    def redrawn(self, chance: np.random.Generator) -> Timing:
        """The workers as another recording might have shown them: runs, and local passes in each, are drawn with repetition."""
        n_runs = len(self.paces[0].recorded)
        runs = chance.integers(n_runs, size=n_runs)
        return replace(self, paces=tuple(pace.redrawn(runs, chance) for pace in self.paces))


def stretch(uneven: Unevenness, ages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the factor by which emulation stretches one step, at these ages of the worker; stalls come on top."""
    slow = uneven.at(np.asarray(ages))
    grid = np.geomspace(slow.min(), slow.max(), 1 if slow.min() == slow.max() else 65)
    factors = np.maximum(1.0, grid[:, None] * np.exp(uneven.jitter * QUANTILES))
    return np.interp(slow, grid, factors.mean(axis=1)), np.interp(slow, grid, factors.var(axis=1))


def fit(runs: Sequence[Run]) -> Timing:
    """The timing that the events of `runs` show; RunError where there is too little."""
    measured: dict[int, list[tuple]] = {}
    exchanges, merges, scores, settled = [], [], [], []
    recorded: dict[int, list[tuple[float, ...]]] = {}
    for number, run in enumerate(runs):
        events = effective(run.events)
        size = n_bytes(run.config.exchange, run.layout.size)
        joins = run.events.query("kind == 'join'").groupby("worker")
        passes = {int(w): _unstretched(run, int(w), own, joins.get_group(w)) for w, own in _passes(events).groupby("worker")}
        ratios = {worker: _ratios(own) for worker, own in passes.items()}
        for worker, own in passes.items():
            unshared = _unshared(ratios, worker)
            measured.setdefault(worker, []).append(_pace(run, worker, own, unshared, joins.get_group(worker)))
            seconds = max(1e-9, own.own_s.sum()) / own.samples.sum() * _unasked(run, worker, own, ratios[worker][1])
            recorded.setdefault(worker, [()] * len(runs))[number] = tuple(seconds.tolist())
            exchanges += [(size, seconds) for seconds in own.exchange_s.dropna()]
        merges += [(4 * run.layout.size, seconds) for seconds in _merge_times(events)]
        scores += events.score.dropna().tolist()
        settled += events.compute_s[events.kind == "settle"].tolist()
    if not measured or not exchanges:
        names = ", ".join(run.name for run in runs)
        raise RunError(f"nothing can be fitted from {names}: no worker has made two local passes. Give a longer run.")
    paces = []
    for worker, own in sorted(measured.items()):
        compute, samples, score_s = (sum(part[i] for part in own) for i in range(3))
        spread, probe = (tuple(np.concatenate([part[i] for part in own]).tolist()) for i in (3, 4))
        paces.append(Pace(compute / samples, score_s / len(own), spread, probe or (1.0,), worker, tuple(recorded[worker])))
    score = float(np.mean(scores)) if scores else 1.0
    return Timing(
        tuple(paces),
        _line(exchanges, "exchange"),
        _line(merges, "server"),
        min(1.0, max(score, 1e-3)),
        float(np.mean(settled or [0])),
    )


def _passes(events):
    """The pushes, with what lies between them and the release before that is neither computing nor waiting."""
    rows, freed, pushed = [], {}, {}
    for event in events[events.kind.isin(["push", "score", "release", "join", "settle"])].to_dict("records"):
        worker = event["worker"]
        if event["kind"] == "release":
            sent = event["seconds"] - pushed[worker] - event["wait_s"] if worker in pushed else 0.0
            freed[worker] = event["seconds"], max(0.0, sent)
        elif event["kind"] == "push":
            free, sent = freed.pop(worker, (math.nan, 0.0))
            between = event["seconds"] - free - event["compute_s"] - event["score_s"] - event["wait_s"]
            exchange_s = np.maximum(0.0, between) + sent
            if not math.isnan(event["hidden_s"]):  # partly at the same time as computing: the worker says how long
                exchange_s = (event["send_s"] + event["hidden_s"]) or math.nan
            rows.append({**event, "exchange_s": exchange_s})
            pushed[worker] = event["seconds"]
        elif event["kind"] == "settle":
            freed.pop(worker, None)
            pushed[worker] = event["seconds"]
        elif event["kind"] == "score":  # of its latest push
            next(row for row in reversed(rows) if row["worker"] == worker).update(score=event["score"], score_s=event["score_s"])
        else:
            freed.pop(worker, None), pushed.pop(worker, None)
    return pd.DataFrame(rows, columns=[*events.columns, "exchange_s"])


def _unstretched(run: Run, worker: int, passes, joins):
    """With what a pass and a score take without emulation (own_s, own_score_s), and the variance that it gives one step."""
    uneven, still = run.config.unevenness(worker), _still(run, worker)
    begun = joins.time.to_numpy()[np.searchsorted(joins.time, passes.time) - 1]
    ends = (passes.time - passes.score_s - begun).to_numpy()
    factor, variance = stretch(uneven, ends[:, None] - POINTS * passes.compute_s.to_numpy()[:, None])
    own_s, score_s = passes.compute_s * (1 / factor).mean(axis=1), passes.score_s / stretch(uneven, ends)[0]
    return passes.assign(own_s=own_s / still, own_score_s=score_s / still, variance=(variance / factor**2).mean(axis=1))


def _still(run: Run, worker: int) -> float:
    """By how much stalls stretch the work, on average."""
    every, stall = run.config.unevenness(worker).stalls or (math.inf, 0.0)
    return 1 + stall / every


def _ratios(passes) -> tuple[np.ndarray, np.ndarray]:
    """When the passes of a worker were half-way, and the log of their seconds per sample against its mean; of whole ones alone."""
    whole = passes[passes.samples >= passes.samples.median() / 2]
    mean = max(float(passes.own_s.sum()), 1e-9) / passes.samples.sum()
    ratios = np.maximum(1e-3, (whole.own_s / whole.samples).to_numpy(float) / mean)
    return (whole.seconds - (whole.compute_s + whole.score_s) / 2).to_numpy(float), np.log(ratios)


def _unshared(ratios: dict[int, tuple[np.ndarray, np.ndarray]], worker: int) -> np.ndarray:
    """The log ratios of a worker without what the others went through at the same time, as far as they follow it (regression)."""
    at, own = ratios[worker]
    others = [np.interp(at, *other) for index, other in ratios.items() if index != worker]
    if not others or len(own) < FEW:
        return own
    common = np.mean(others, axis=0)
    common -= common.mean()
    slope = float((own - own.mean()) @ common) / max(float(common @ common), 1e-12)
    return own - min(1.0, max(0.0, slope)) * common


def _pace(run: Run, worker: int, passes, ratios: np.ndarray, joins) -> tuple:
    """Seconds of computing without emulation, samples, seconds of a score, and the relative times of passes and of probes."""
    compute, samples = float(passes.own_s.sum()), float(passes.samples.sum())
    own = _unasked(run, worker, passes, ratios)
    stretched = float(stretch(run.config.unevenness(worker), np.zeros(1))[0][0])
    probed = joins.probe_s.dropna().to_numpy() / stretched * samples / max(compute, 1e-9)
    score_s = float(passes.own_score_s.sum()) / max(1, passes.score.notna().sum())
    return compute, samples, score_s, np.resize(own / own.mean(), len(passes)), probed


def _unasked(run: Run, worker: int, passes, ratios: np.ndarray) -> np.ndarray:
    """What multiplies a pass, of these log ratios, less the variance that emulated jitter and stalls give them."""
    uneven, still = run.config.unevenness(worker), _still(run, worker)
    steps = max(1.0, float(passes.samples.median()) / (run.config.batch_size or 1))
    seen, asked = float(np.var(ratios)), float(passes.variance.mean()) / steps
    if uneven.stalls:
        asked += uneven.stalls[1] * (still - 1) / still / max(1e-9, float(passes.compute_s.mean()))
    return np.exp(math.sqrt(max(0.0, 1 - asked / seen)) * ratios) if seen > 0 else np.ones(len(ratios))


def _merge_times(events) -> list[float]:
    """Seconds of the server for one merge: the time from a push that released its own worker at once, by the merges it made."""
    times, open_push = [], None
    for event in events[events.kind.isin(["push", "hold", "merge", "release"])].to_dict("records"):
        if event["kind"] == "push":
            open_push = [event["worker"], 0]
        elif open_push and event["kind"] == "merge":
            open_push[1] += 1
        elif open_push and event["worker"] == open_push[0]:
            if event["kind"] == "release" and open_push[1]:
                times.append(event["wait_s"] / open_push[1])
            open_push = None
    return times


def _line(points: list[tuple[float, float]], what: str) -> Line:
    if not points:
        return Line(FIXED_S[what], 0.0)
    n_bytes, seconds = np.array(points).T
    if n_bytes.min() == n_bytes.max():
        mean = float(seconds.mean())
        fixed = min(mean, FIXED_S[what])
        return Line(fixed, (mean - fixed) / n_bytes[0])
    slope = max(0.0, float(np.polyfit(n_bytes, seconds, 1)[0]))
    return Line(max(0.0, float(seconds.mean() - slope * n_bytes.mean())), slope)
