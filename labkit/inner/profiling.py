"""Where the time of one training step goes: its tasks by thread, how good their schedule is, and each layer against the machine.

    profile(network, (x, y))  ->  Profile: .table(), .schedule, .planned, .peaks; figures: plots.gantt, plots.roofline

A layer of F operations on B bytes takes at least max(F / peak, B / bandwidth) on one thread (roofline, Williams et al. 2009). Peaks
are measured in the same call, as those of a machine that others use change.

Used by users through `labkit.inner.profile`, and by `labkit.plots.inner`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from labkit.errors import ProblemError, whole
from labkit.inner.engine import as_it_was
from labkit.inner.executor import Plan, TaskEngine
from labkit.inner.graph import Graph
from labkit.inner.inner import Inner
from labkit.inner.pool import ThreadPool
from labkit.inner.precision import native
from labkit.inner.scheduler import Schedule, schedule

if TYPE_CHECKING:
    import pandas as pd

WARM_UP = 5  # steps, until the chains rest on measured times
SIDES, NUMBERS, SLOW_S = (192, 1024), 16_000_000, 0.005  # of the matrices and of the array that the peaks are measured with


@dataclass(frozen=True)
class Profile:
    """One training step, task by task.

    Attributes
    ----------
    graph : its tasks, of which `graph.name(graph.tasks[i])` is the name of one.
    tasks : thread, start and end of each task, as measured.
    schedule : the same of the chains of tasks that are executed as one: makespan, bounds, idle_share, critical_path.
    planned : what list scheduling makes of the measured costs of these, without the overhead of an execution.
    peaks : FLOP/s of a product of matrices on one thread, "float32" and "bfloat16", and "bytes" that are moved a second.
    instructions : torch's vector instructions, and what the processor has for bfloat16: "AVX512, amx_tile".
    title : of what network and batch.
    """

    graph: Graph
    tasks: Schedule
    schedule: Schedule
    planned: Schedule
    peaks: dict[str, float]
    instructions: str
    title: str

    def table(self) -> pd.DataFrame:
        """A row for each layer, in their order.

        Columns: layer, op, output (of a sample), filters, logical_tasks (K_C of the paper, for each filter), blocks, tasks, flops, bytes,
        ms (on all threads together), share (of the step's work), gflops (a second, on one thread), intensity (FLOPs a byte) and
        of_roof (of what the roofline allows in float32).
        """
        import pandas as pd

        frame = pd.DataFrame(self.graph.table())
        seconds = [0.0] * len(self.graph.layers)
        for task, cost in zip(self.graph.tasks, self.tasks.costs, strict=True):
            seconds[task.layer] += cost if task.kind != "loss" else 0.0
        own = pd.Series(seconds[1:])
        frame["ms"], frame["share"] = 1e3 * own, own / sum(self.tasks.costs)
        frame["gflops"], frame["intensity"] = frame["flops"] / own / 1e9, frame["flops"] / frame["bytes"]
        roof = (frame["intensity"] * self.peaks["bytes"]).clip(upper=self.peaks["float32"])
        frame["of_roof"] = 1e9 * frame["gflops"] / roof
        return frame

    def __str__(self) -> str:
        measured, bounds = self.schedule, self.schedule.bounds
        logical = sum(layer.logical_tasks * layer.shape[0] for layer in self.graph.layers if layer.kind == "conv")
        return (
            f"{self.title}: {1e3 * measured.makespan:.3g} ms on {measured.threads} threads, {100 * (measured.makespan / measured.bound - 1):.0f} % "
            f"above the bound (work / threads {1e3 * bounds['work / threads']:.3g} ms, critical path {1e3 * bounds['critical path']:.3g} ms); "
            f"idle {100 * measured.idle_share:.0f} %; {len(self.graph.tasks)} tasks in {len(measured.start)} chains, for {logical:,} logical "
            f"tasks a sample; peaks of one thread: {self.peaks['float32'] / 1e9:.3g} GFLOP/s float32, {self.peaks['bfloat16'] / 1e9:.3g} "
            f"bfloat16, {self.peaks['bytes'] / 1e9:.0f} GB/s ({self.instructions})"
        )


def profile(
    problem: Any,
    batch: Any = None,
    inner: Inner | int | None = None,
    *,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    rows: int | None = None,
    steps: int = 5,
    seed: int = 0,
) -> Profile:
    """Measure a training step that threads share task by task (split="rows"), in float32.

    Parameters
    ----------
    problem : a network, or a problem, such as a `labkit.Classifier`, whose network is made from `seed`. A network is afterwards as it was,
        gradients and running statistics included.
    batch : (x, y) for a network. For a problem the number of samples of its training set; by default its batch size.
    inner : threads, block and whole of a `labkit.Inner`, or the number of threads; by default that of the problem, if it has one, and as many
        threads as torch has.
    loss : loss(outputs, y); by default that of the problem; of a network cross-entropy where y are classes, the mean square elsewhere.
    rows : blocks of rows of a map, as of `labkit.inner.executor.TaskEngine`.
    steps : how many are measured, after some that are not; the quickest is kept.

    TypeError or ValueError for a bad argument; ProblemError, by name, for what cannot be split, or is on a GPU, whose times are not
    those of the threads.

    Examples
    --------
    >>> profile = labkit.inner.profile(problem, batch=16, inner=1, steps=2)
    >>> len(profile.table()) > 0  # a row a layer
    True
    """
    inner = Inner.of(inner) or getattr(problem, "inner", None) or Inner()
    steps, seed = whole("steps", steps), whole("seed", seed, 0)
    network, (x, y) = _network(problem, batch, seed)
    of = loss or (F.mse_loss if y.is_floating_point() else F.cross_entropy)
    own = loss is None and hasattr(problem, "loss_of")
    pool = ThreadPool(inner.threads or torch.get_num_threads())
    with closing(pool), as_it_was(network, x):
        network.train()
        engine = TaskEngine(network, pool, block=inner.block, rows=rows, whole=inner.whole)
        best: tuple[float, Any] = (float("inf"), None)
        for step in range(WARM_UP + steps):
            network.zero_grad()
            engine.gradients(x, lambda outputs: problem.loss_of(lambda *_: outputs, x, y) if own else of(outputs, y))
            if step >= WARM_UP and engine.measured.makespan < best[0]:
                best = engine.measured.makespan, (engine.tasks, engine.measured)
        plan, peaks = engine.plan(x), pool.run([measure_peaks])[0]
    tasks, measured = best[1]
    planned = schedule(measured.predecessors, _work(plan, tasks), pool.threads)
    title = f"{_name(problem)}, {len(x)} samples of {' x '.join(map(str, x.shape[1:]))}"
    title += ", in float32" if getattr(problem, "precision", "float32") != "float32" else ""
    return Profile(plan.graph, tasks, measured, planned, peaks, native()[1], title)


def _name(problem: Any) -> str:
    model = getattr(problem, "model", None) if not isinstance(problem, nn.Module) else None
    return model if isinstance(model, str) else getattr(model, "__name__", type(problem).__name__)


def _work(plan: Plan, tasks: Schedule) -> list[float]:
    """Seconds of the tasks of each chain, without what lies between them."""
    costs = tasks.costs
    return [sum(costs[task] for task in chain) for chain in plan.chains]


def _network(problem: Any, batch: Any, seed: int) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    if not isinstance(problem, nn.Module):
        if not hasattr(problem, "new_module"):
            raise TypeError(f"problem={type(problem).__name__} must be a network (torch.nn.Module) or a labkit problem.")
        n = problem.batch_size if batch is None else whole("batch", batch)
        network, pair = problem.new_module(seed), problem.load(problem.train_indices()[:n])
    else:
        network, pair = problem, batch
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(part, torch.Tensor) for part in pair)):
        raise ProblemError("a step is profiled on a batch of two tensors, (x, y): profile(network, (x, y)).")
    if pair[0].device.type != "cpu":
        raise ProblemError(
            f"a step is profiled on a CPU, and this batch is on {pair[0].device}: threads do not wait for what a GPU computes."
        )
    return network, tuple(pair)


def measure_peaks(rounds: int = 5) -> dict[str, float]:
    """FLOP/s of a product of matrices in float32 and in bfloat16 and bytes/s of a copy, on this thread: the best of `rounds`."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for side in SIDES:
            a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
            seconds = _quickest(lambda a=a, b=b: a @ b, rounds)
            found[str(dtype).removeprefix("torch.")] = 2 * side**3 / seconds
            if seconds > SLOW_S:  # emulated: no need to wait for larger ones
                break
    source, target = torch.zeros(NUMBERS), torch.empty(NUMBERS)
    found["bytes"] = 2 * 4 * NUMBERS / _quickest(lambda: target.copy_(source), rounds)
    return found


def _quickest(call: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times[1:])  # the first one makes ready
