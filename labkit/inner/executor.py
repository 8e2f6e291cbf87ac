"""The gradients of one training step, computed by tasks on a pool of threads.

    engine = TaskEngine(network, pool)
    loss = engine.gradients(x, lambda outputs: F.cross_entropy(outputs, y))      # and on .grad of each parameter its gradient

Whenever a thread is free it takes the ready task of highest priority: list scheduling (`labkit.inner.scheduler`) with the times as
they come. torch releases Python's lock inside its operators, so that tasks run side by side; each is started by Python, which costs
some 30 us, and small tasks are therefore chained to those before them by what they were measured to cost.

What is computed depends on the blocks alone: sums over blocks have a fixed order, whichever thread was first. So a step gives the
same bits every time, with any number of threads, as long as the blocks are the same; and it equals plain torch up to rounding.

Used by `labkit.inner.inner` (split="rows") and `labkit.inner.profiling`.
"""

from __future__ import annotations

import contextlib
import heapq
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from labkit.errors import known
from labkit.errors import whole as whole_number
from labkit.inner.graph import Graph, Range, Task, chains, input_rows, step_graph
from labkit.inner.hooks import add, has_hooks, taken_off
from labkit.inner.layers import KINDS, Layer, padding_of, state_of, trace
from labkit.inner.scheduler import PRIORITIES, Schedule, priorities, successors

LEAST = 300e-6  # s; a task that takes less is chained to the one before it
SPEED, BANDWIDTH, START = 50e9, 10e9, 20e-6  # FLOP/s, bytes/s and s, until tasks have been measured


class Pool(Protocol):
    """Threads that stay; see `labkit.inner.pool`."""

    threads: int

    def run(self, functions: Sequence[Callable[[], Any]]) -> list[Any]: ...


class Plan:
    """How the steps over batches of one shape are executed: the graph, its tasks in chains, and what is known of their times.

    Attributes
    ----------
    graph : of the step.
    costs : seconds of each task; estimated from FLOPs and bytes at first, then measured.
    chains, before : tasks that are executed as one, and the chains before each.
    buffers : of values and gradients of which tasks write some of the rows.
    """

    def __init__(self, graph: Graph, priority: str) -> None:
        self.graph, self.priority = graph, priority
        self.costs = [max(task.flops / SPEED, task.bytes / BANDWIDTH) + START for task in graph.tasks]
        self.measured = 0  # steps
        self.buffers: dict[tuple[str, int], list[torch.Tensor]] = {}
        self._chain()

    def _chain(self) -> None:
        self.chains, self.before = chains(self.graph, self.costs, LEAST)
        self.after = successors(self.before)
        self.ranks = priorities(self.before, [sum(self.costs[task] for task in chain) for chain in self.chains], self.priority)

    def learn(self, costs: Sequence[float]) -> None:
        """From the times of a step; the first one makes torch prepare its kernels and is not like the others."""
        self.measured += 1
        if self.measured in (2, 4):  # what chains and priorities rest on; it changes when tasks run, not what they compute
            self.costs = list(costs) if self.measured == 2 else [min(pair) for pair in zip(self.costs, costs, strict=True)]
            self._chain()


class TaskEngine:
    """Computes gradients of a network by tasks.

    Parameters
    ----------
    module : the network; ProblemError, with the place, where it has a part that cannot be split.
    pool : threads, with one intra-op thread of torch each.
    block : samples in a block at most. None: as many blocks as threads, and twice as many where each still has 16 samples; of 2 samples
        at least, as torch computes convolutions of a single small sample without oneDNN, several times slower.
    rows : blocks of output rows at most. None: 1, and so many that each thread has one where there are fewer blocks of samples.
    whole : modules that are one task over the whole batch, as for `labkit.inner.layers.trace`.
    priority : "upward-rank" or "level".

    Attributes
    ----------
    measured : `Schedule` of the chains of the last step, as it was executed.
    tasks : `Schedule` of its single tasks.
    """

    def __init__(
        self, module: nn.Module, pool: Pool, *, block: int | None = None, rows: int | None = None, whole: bool | Sequence[str] = (),
        priority: str = "upward-rank",
    ) -> None:  # fmt: skip
        self.module, self.pool = module, pool
        self.block = None if block is None else whole_number("block", block)
        self.rows = None if rows is None else whole_number("rows", rows)
        self.whole = whole
        self.priority = known("priority", priority, PRIORITIES)
        self.measured: Schedule | None = None
        self.tasks: Schedule | None = None
        self._plans: dict[Any, Plan] = {}
        self._wholes: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # that are called as they are, whatever changes in them

    def plan(self, x: torch.Tensor) -> Plan:
        """Of batches like `x`; ProblemError if the network cannot be split."""
        layout = tuple(x.stride()[i] for i in range(1, x.dim()))
        key = (tuple(x.shape), layout, x.dtype, state_of(self.module, self._wholes))
        if key not in self._plans:
            layers, threads, samples = trace(self.module, x, self.whole), self.pool.threads, len(x)
            found = [layer.module for layer in layers if layer.kind == "whole"]
            if not self._wholes.issuperset(found):
                self._wholes.update(found)
                return self.plan(x)
            blocks = max(1, min(2 * threads if samples >= 32 * threads else threads, samples // 2))
            block = self.block or math.ceil(samples / blocks)
            rows = self.rows or math.ceil(threads / math.ceil(samples / block))
            graph = step_graph(layers, samples, block=block, rows=rows)
            if len(self._plans) >= 8:  # shapes come and go: a last short batch, another data set
                del self._plans[next(iter(self._plans))]
            self._plans[key] = Plan(graph, self.priority)
        return self._plans[key]

    def gradients(
        self,
        x: torch.Tensor,
        loss_of: Callable[[torch.Tensor], torch.Tensor],
        update: Callable[[list[nn.Parameter]], None] | None = None,
    ) -> torch.Tensor:
        """The loss of a batch; its gradient is added to .grad of each parameter, and BatchNorm has counted the batch once.

        Parameters
        ----------
        x : (samples, ...), as the network takes it.
        loss_of : from the outputs of the whole batch to a scalar; called once.
        update : called with the parameters of each layer when their gradients are there and nothing reads the old weights any
            more, on any thread, while other layers still compute; without those that have hooks (`labkit.inner.hooks`).

        On a GPU all tasks are computed in the stream of the caller, one after the other.
        """
        plan = self.plan(x)
        with torch.no_grad():
            step = _Step(plan, x, loss_of, update, self.module)
            with taken_off(step.parameters):
                thread, start, end = _execute(plan, self.pool, step)
        for parameter in reversed(step.parameters):  # as a backward pass comes to them
            if (gradient := step.beside.pop(parameter, None)) is not None:
                add(parameter, gradient)
        began = min(start)
        start, end = [moment - began for moment in start], [moment - began for moment in end]
        plan.learn([b - a for a, b in zip(start, end, strict=True)])
        self.tasks = Schedule(self.pool.threads, thread, start, end, plan.graph.predecessors)
        first, last = [chain[0] for chain in step.chains], [chain[-1] for chain in step.chains]
        self.measured = Schedule(
            self.pool.threads, [thread[i] for i in first], [start[i] for i in first], [end[i] for i in last], step.before
        )
        return step.loss


def _execute(plan: Plan, pool: Pool, step: _Step) -> tuple[list[int], list[float], list[float]]:
    """Thread, start and end of each task. The first error of a task ends the step and is raised."""
    n = len(plan.graph.tasks)
    thread, start, end = [0] * n, [0.0] * n, [0.0] * n
    changed = threading.Condition()
    waiting = [len(before) for before in plan.before]
    ready = [(-plan.ranks[chain], chain) for chain in range(len(waiting)) if not waiting[chain]]
    heapq.heapify(ready)
    left, failed = len(waiting), False
    stream = torch.cuda.current_stream(step.device) if step.device.type == "cuda" else None

    def work(own: int) -> None:
        nonlocal left, failed
        done = None
        while True:
            with changed:
                if done is not None:
                    left -= 1
                    for chain in plan.after[done]:
                        waiting[chain] -= 1
                        if not waiting[chain]:
                            heapq.heappush(ready, (-plan.ranks[chain], chain))
                    if not left:
                        changed.notify_all()
                    elif len(ready) > 1:  # this thread takes one of them itself
                        changed.notify(len(ready) - 1)
                while not ready and left and not failed:
                    changed.wait()
                if not left or failed:
                    return
                done = heapq.heappop(ready)[1]
            try:
                for task in plan.chains[done]:
                    thread[task], start[task] = own, perf_counter()
                    step.run(task)
                    end[task] = perf_counter()
            except BaseException:
                with changed:
                    failed = True
                    changed.notify_all()
                raise

    def begin(own: int) -> None:
        with torch.no_grad(), torch.cuda.stream(stream) if stream else contextlib.nullcontext():  # of this thread
            work(own)

    pool.run([partial(begin, own) for own in range(pool.threads)])
    return thread, start, end


class _Step:
    """The tensors of one step, and what each kind of task does with them."""

    def __init__(self, plan: Plan, x: torch.Tensor, loss_of: Callable, update: Callable | None, module: nn.Module) -> None:
        self.plan, self.graph, self.layers = plan, plan.graph, plan.graph.layers
        self.chains, self.before = plan.chains, plan.before
        self.loss_of, self.update, self.device = loss_of, update, x.device
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.hooked = set(filter(has_hooks, self.parameters))
        n = len(self.graph.samples)
        self.tensors: dict[str, list[list[Any]]] = {
            what: [plan.buffers[what, i] if (what, i) in plan.buffers else [None] * n for i in range(len(self.layers))]
            for what in ("value", "gradient")
        }
        self.tensors["value"][0] = [x[first:last] for first, last in self.graph.samples]
        self.saved: dict[Any, Any] = {}  # what a task leaves for a later one
        self.sums: dict[int, list[torch.Tensor | None]] = {}  # gradients of a module's parameters
        # Gradients that are added at the end: of a loss that reads parameters itself, and of parameters with hooks.
        self.beside: dict[nn.Parameter, torch.Tensor] = {}
        self.loss = torch.tensor(float("nan"))
        for number, layer in enumerate(self.layers):
            if layer.kind == "dropout":  # in the order of the layers, as plain torch draws them
                ones = torch.ones(len(x), *layer.shape, dtype=x.dtype, device=x.device)
                self.saved["mask", number] = layer.function(ones)
            if layer.kind == "linear" and layer.parameters and id(layer.module) not in self.sums:
                self.sums[id(layer.module)] = [torch.empty_like(p) if p is not None else None for p in _weights(layer)]

    def run(self, number: int) -> None:
        task = self.graph.tasks[number]
        layer = self.layers[task.layer]
        _ACTIONS[task.kind, layer.kind](self, task, layer)

    def get(self, what: str, layer: int, block: int, rows: Range) -> torch.Tensor:
        tensor = self.tensors[what][layer][block]
        return tensor if rows == (0, self.layers[layer].height) else tensor[:, :, rows[0] : rows[1]]

    def put(self, what: str, layer: int, block: int, rows: Range, tensor: torch.Tensor, adds: bool = False) -> None:
        """Keep a tensor; rows of it are copied to where all of them are."""
        held = self.tensors[what][layer]
        if (what, layer) not in self.graph.split:
            held[block] = held[block] + tensor if adds else tensor
            return
        target = self.buffer(what, layer, block, tensor)[:, :, rows[0] : rows[1]]
        target.add_(tensor) if adds else target.copy_(tensor)

    def buffer(self, what: str, layer: int, block: int, like: torch.Tensor) -> torch.Tensor:
        """Room for all rows, made once for all steps."""
        with _ROOM:
            held = self.plan.buffers.setdefault((what, layer), self.tensors[what][layer])
            if held[block] is None:
                first, last = self.graph.samples[block]
                side = [last - first, *self.layers[layer].shape]
                layout = _layout(like)
                held[block] = torch.empty(side, dtype=like.dtype, device=like.device, memory_format=layout)
            return held[block]

    def put_all(self, what: str, layer: int, tensor: torch.Tensor, adds: bool = False) -> None:
        """Of all samples, cut into the blocks."""
        for block, (first, last) in enumerate(self.graph.samples):
            self.put(what, layer, block, (0, self.layers[layer].height), tensor[first:last], adds)

    def inputs(self, task: Task, layer: Layer) -> list[torch.Tensor]:
        return [self.get("value", i, task.block, input_rows(layer, self.layers[i], task.rows)) for i in layer.inputs]

    def all_samples(self, what: str, layer: int) -> torch.Tensor:
        blocks = self.tensors[what][layer]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


_ROOM = threading.Lock()


def _layout(tensor: torch.Tensor) -> torch.memory_format:
    for layout, axes in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if tensor.dim() == axes and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=layout):
            return layout
    return torch.contiguous_format


def _weights(layer: Layer) -> list[nn.Parameter | None]:
    """In the order in which `sums` has their gradients."""
    return layer.parameters if layer.kind == "whole" else [layer.module.weight, layer.module.bias]


# -- convolution ------------------------------------------------------------------------------------------------------------


def _rows_of_conv(step: _Step, task: Task, layer: Layer) -> tuple[torch.Tensor, list[int]]:
    """The input that some output rows of a convolution need, and the padding that is left for the convolution itself.

    Where the rows reach over the rim of the map, zeros are put there; between blocks there is no padding.
    """
    (x,), padding = step.inputs(task, layer), list(padding_of(layer.module))
    if task.rows == (0, layer.height):
        return x, padding
    top, bottom = layer.window.needed(*task.rows)
    above, below = max(0, -top), max(0, bottom - step.layers[layer.inputs[0]].height)
    if above or below:
        x = F.pad(x, [0, 0] * (x.dim() - 3) + [above, below])
    return x, [0, *padding[1:]]


def _forward_conv(step: _Step, task: Task, layer: Layer) -> None:
    conv = layer.module
    x, padding = _rows_of_conv(step, task, layer)
    y = torch.convolution(x, conv.weight, conv.bias, conv.stride, padding, conv.dilation, False, [0] * len(padding), conv.groups)
    step.put("value", task.layer, task.block, task.rows, y)


def _backward_of(conv: nn.Module, dy: torch.Tensor, x: torch.Tensor, padding: Sequence[int], mask: list[bool]) -> tuple:
    biases = None if conv.bias is None else [conv.out_channels]
    rest = (conv.stride, padding, conv.dilation, False, [0] * len(padding), conv.groups, mask)
    return torch.ops.aten.convolution_backward(dy, x, conv.weight, biases, *rest)


def _input_gradient_conv(step: _Step, task: Task, layer: Layer) -> None:
    (source,), padding = layer.inputs, list(padding_of(layer.module))
    every = (0, step.layers[source].height)
    if task.rows == every:
        dy, x = step.get("gradient", task.layer, task.block, (0, layer.height)), step.get("value", source, task.block, every)
        dx = _backward_of(layer.module, dy, x, padding, [True, False, False])[0]
        return step.put("gradient", source, task.block, task.rows, dx, source in task.adds)
    first, last = task.rows
    low, high = layer.window.touched(first, last, layer.height)
    x = step.get("value", source, task.block, every)
    shape = [*x.shape]
    dy = step.get("gradient", task.layer, task.block, (low, max(low, high)))
    if high <= low:  # rows that no window reaches
        shape[2] = last - first
        return step.put("gradient", source, task.block, task.rows, dy.new_zeros(shape), source in task.adds)
    top, bottom = layer.window.needed(low, high)  # these rows, padding among them, are what the gradient of dy's rows covers
    shape[2] = bottom - top
    x = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(x))  # its shape alone is read
    dx = _backward_of(layer.module, dy, x, [0, *padding[1:]], [True, False, False])[0]
    dx = dx[:, :, max(0, first - top) : last - top]
    missing = [max(0, top - first), max(0, last - bottom)]
    if any(missing):
        dx = F.pad(dx, [0, 0] * (dx.dim() - 3) + missing)
    step.put("gradient", source, task.block, task.rows, dx, source in task.adds)


def _weight_gradient_conv(step: _Step, task: Task, layer: Layer) -> None:
    conv = layer.module
    x, padding = _rows_of_conv(step, task, layer)
    dy = step.get("gradient", task.layer, task.block, task.rows)
    mask = [False, conv.weight.requires_grad, conv.bias is not None and conv.bias.requires_grad]
    step.saved["part", task.layer, task.block, task.rows] = _backward_of(conv, dy, x, padding, mask)[1:]


def _sum_conv(step: _Step, task: Task, layer: Layer) -> None:
    """In the order of layers, blocks and rows."""
    users = [number for number, other in enumerate(step.layers) if other.module is layer.module]
    cells = [
        (number, block, rows) for number in users for block in range(len(step.graph.samples)) for rows in step.graph.rows[number]
    ]
    parts = [step.saved.pop(("part", *cell)) for cell in cells]
    total = list(parts[0])
    for part in parts[1:]:
        for held, more in zip(total, part, strict=True):
            if held is not None:
                held += more
    step.sums[id(layer.module)] = total


# -- linear -----------------------------------------------------------------------------------------------------------------


def _forward_linear(step: _Step, task: Task, layer: Layer) -> None:
    (x,) = step.inputs(task, layer)
    step.put("value", task.layer, task.block, task.rows, F.linear(x, layer.module.weight, layer.module.bias))


def _input_gradient_linear(step: _Step, task: Task, layer: Layer) -> None:
    (source,), dy = layer.inputs, step.tensors["gradient"][task.layer][task.block]
    step.put("gradient", source, task.block, task.rows, dy @ layer.module.weight, source in task.adds)


def _weight_gradient_linear(step: _Step, task: Task, layer: Layer) -> None:
    """Of some outputs, over all samples: block after block."""
    outputs = slice(*task.rows)
    weight, bias = step.sums[id(layer.module)]
    adds = bool(task.adds)
    for dy, x in zip(step.tensors["gradient"][task.layer], step.tensors["value"][layer.inputs[0]], strict=True):
        dy, x = dy.flatten(0, -2)[:, outputs], x.flatten(0, -2)
        weight[outputs].addmm_(dy.T, x, beta=1 if adds else 0)
        if bias is not None:
            bias[outputs] = bias[outputs] + dy.sum(0) if adds else dy.sum(0)
        adds = True


# -- batch normalisation ----------------------------------------------------------------------------------------------------


def _counts(layer: Layer) -> bool:
    """Whether a BatchNorm takes the statistics of the batch, and not those that it has."""
    return layer.module.training or layer.module.running_mean is None


def _statistics_norm(step: _Step, task: Task, layer: Layer) -> None:
    """Number of values, mean and variance of each channel of a block."""
    if _counts(layer):
        x = step.get("value", layer.inputs[0], task.block, task.rows)
        mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
        step.saved["statistics", task.layer, task.block, task.rows] = x.numel() // x.shape[1], mean, variance


def _combine_norm(step: _Step, task: Task, layer: Layer) -> None:
    """mean = sum n_b m_b / n;  variance = sum n_b (v_b + (m_b - mean)^2) / n  (Chan et al. 1979); and the running ones, once."""
    norm = layer.module
    if not _counts(layer):
        step.saved["mean", task.layer] = math.inf, norm.running_mean, norm.running_var, torch.rsqrt(norm.running_var + norm.eps)
        return
    cells = [(block, rows) for block in range(len(step.graph.samples)) for rows in step.graph.rows[task.layer]]
    counts, means, variances = zip(*(step.saved.pop(("statistics", task.layer, *cell)) for cell in cells), strict=True)
    n, mean, variance = sum(counts), means[0], variances[0]
    if n == 1:
        raise ValueError(f"{layer.name}: a batch of one value per channel has no variance; give larger batches.")
    if len(counts) > 1:
        share = torch.tensor(counts, dtype=torch.float64, device=mean.device)[:, None] / n
        means, variances = torch.stack(means).double(), torch.stack(variances).double()
        centre = (share * means).sum(0)
        variance = (share * (variances + (means - centre) ** 2)).sum(0).to(mean.dtype)
        mean = centre.to(mean.dtype)
    step.saved["mean", task.layer] = n, mean, variance, torch.rsqrt(variance + norm.eps)
    if norm.training and norm.running_mean is not None:
        norm.num_batches_tracked += 1
        rate = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        norm.running_mean.mul_(1 - rate).add_(mean, alpha=rate)
        norm.running_var.mul_(1 - rate).add_(variance, alpha=rate * n / (n - 1))


def _forward_norm(step: _Step, task: Task, layer: Layer) -> None:
    (x,), norm = step.inputs(task, layer), layer.module
    _, mean, variance, _ = step.saved["mean", task.layer]
    y = torch.native_batch_norm(x, norm.weight, norm.bias, mean, variance, False, 0.0, norm.eps)[0]
    step.put("value", task.layer, task.block, task.rows, y)


def _gradient_statistics_norm(step: _Step, task: Task, layer: Layer) -> None:
    """sum dy (x - mean) / deviation and sum dy of each channel of a block: also its part of the weights' gradients."""
    norm = layer.module
    dy = step.get("gradient", task.layer, task.block, task.rows)
    x = step.get("value", layer.inputs[0], task.block, task.rows)
    _, mean, _, scale = step.saved["mean", task.layer]
    rest = (None, None, mean, scale, True, norm.eps, [False, True, True])
    sums = torch.ops.aten.native_batch_norm_backward(dy, x, norm.weight, *rest)[1:]
    step.saved["gradient statistics", task.layer, task.block, task.rows] = sums


def _gradient_combine_norm(step: _Step, task: Task, layer: Layer) -> None:
    """dx = a dy + b x + c, with a, b, c from the sums over the whole batch; without the last two where statistics are given."""
    norm = layer.module
    cells = [(block, rows) for block in range(len(step.graph.samples)) for rows in step.graph.rows[task.layer]]
    parts = [step.saved.pop(("gradient statistics", task.layer, *cell)) for cell in cells]
    dweight, dbias = (sum(column[1:], column[0]) for column in zip(*parts, strict=True))
    n, mean, _, scale = step.saved["mean", task.layer]
    a = scale if norm.weight is None else norm.weight * scale
    b = -a * scale * dweight / n
    c = -a * dbias / n - b * mean
    step.saved["slope", task.layer] = tuple(x.view(1, -1, *[1] * (len(layer.shape) - 1)) for x in (a, b, c))
    if norm.weight is not None:
        held = step.sums.get(id(norm), [0, 0]) if task.adds else [0, 0]
        step.sums[id(norm)] = [dweight + held[0], dbias + held[1]]


def _input_gradient_norm(step: _Step, task: Task, layer: Layer) -> None:
    (source,) = layer.inputs
    a, b, c = step.saved["slope", task.layer]
    dy = step.get("gradient", task.layer, task.block, task.rows)
    x = step.get("value", source, task.block, task.rows)
    step.put("gradient", source, task.block, task.rows, torch.addcmul(c, x, b).addcmul_(dy, a), source in task.adds)


# -- all others -------------------------------------------------------------------------------------------------------------


def _forward_each(step: _Step, task: Task, layer: Layer) -> None:
    """A function of each sample: autograd remembers how the way back goes."""
    trained = [step.graph.trained[i] for i in layer.inputs]
    # .data, and not detach(): other tasks write other rows of the same tensor meanwhile, which autograd takes for a change of these.
    inputs = [x.data.requires_grad_(needed) for x, needed in zip(step.inputs(task, layer), trained, strict=True)]
    with torch.set_grad_enabled(any(trained)):
        y = layer.function(*inputs)
    step.saved["each", task.layer, task.block, task.rows] = inputs, y
    step.put("value", task.layer, task.block, task.rows, y.detach())


def _input_gradient_each(step: _Step, task: Task, layer: Layer) -> None:
    inputs, y = step.saved.pop(("each", task.layer, task.block, task.rows))
    dy = step.get("gradient", task.layer, task.block, task.rows)
    below = [(i, x) for i, x in zip(layer.inputs, inputs, strict=True) if x.requires_grad]
    for (i, _), dx in zip(below, torch.autograd.grad(y, [x for _, x in below], dy), strict=True):
        step.put("gradient", i, task.block, input_rows(layer, step.layers[i], task.rows), dx, i in task.adds)


def _mask(step: _Step, task: Task) -> torch.Tensor:
    first, last = step.graph.samples[task.block]
    mask = step.saved["mask", task.layer][first:last]
    return mask if task.rows == (0, step.layers[task.layer].height) else mask[:, :, task.rows[0] : task.rows[1]]


def _forward_dropout(step: _Step, task: Task, layer: Layer) -> None:
    (x,) = step.inputs(task, layer)
    step.put("value", task.layer, task.block, task.rows, x * _mask(step, task))


def _input_gradient_dropout(step: _Step, task: Task, layer: Layer) -> None:
    (source,), dy = layer.inputs, step.get("gradient", task.layer, task.block, task.rows)
    step.put("gradient", source, task.block, task.rows, dy * _mask(step, task), source in task.adds)


def _forward_whole(step: _Step, task: Task, layer: Layer) -> None:
    inputs = [step.all_samples("value", i).detach().requires_grad_(step.graph.trained[i]) for i in layer.inputs]
    with torch.enable_grad():
        y = layer.function(*inputs)
    step.saved["whole", task.layer] = inputs, y
    step.put_all("value", task.layer, y.detach())


def _backward_whole(step: _Step, task: Task, layer: Layer) -> None:
    inputs, y = step.saved.pop(("whole", task.layer))
    below = [(i, x) for i, x in zip(layer.inputs, inputs, strict=True) if x.requires_grad]
    wanted = [*(x for _, x in below), *layer.parameters]
    found = torch.autograd.grad(y, wanted, step.all_samples("gradient", task.layer), allow_unused=True)
    found = [torch.zeros_like(x) if dx is None else dx for x, dx in zip(wanted, found, strict=True)]
    for (i, _), dx in zip(below, found, strict=False):
        step.put_all("gradient", i, dx, i in task.adds)
    held = step.sums.get(id(layer.module))
    step.sums[id(layer.module)] = [a + b for a, b in zip(held, found[len(below) :], strict=True)] if held else found[len(below) :]


def _loss(step: _Step, task: Task, layer: Layer) -> None:
    outputs = step.all_samples("value", task.layer).detach().requires_grad_()
    with torch.enable_grad():
        loss = step.loss_of(outputs)
    found = torch.autograd.grad(loss, [outputs, *step.parameters], allow_unused=True)
    step.put_all("gradient", task.layer, torch.zeros_like(outputs) if found[0] is None else found[0])
    step.beside.update((p, gradient) for p, gradient in zip(step.parameters, found[1:], strict=True) if gradient is not None)
    step.loss = loss.detach()


def _update(step: _Step, task: Task, layer: Layer) -> None:
    held = [parameter for parameter in _weights(layer) if parameter is not None]
    found = [
        gradient for parameter, gradient in zip(_weights(layer), step.sums[id(layer.module)], strict=True) if parameter is not None
    ]
    for parameter, gradient in zip(held, found, strict=True):
        if parameter.requires_grad:
            beside = step.beside.pop(parameter, None)
            gradient = gradient if beside is None else gradient + beside
            if parameter in step.hooked:  # hooks are the user's own, and not for several threads
                step.beside[parameter] = gradient
            else:
                add(parameter, gradient)
    if step.update is not None:
        step.update([parameter for parameter in layer.parameters if parameter not in step.hooked])


_ACTIONS: dict[tuple[str, str], Callable[[_Step, Task, Layer], None]] = {
    ("forward", "conv"): _forward_conv,
    ("input gradient", "conv"): _input_gradient_conv,
    ("weight gradient", "conv"): _weight_gradient_conv,
    ("sum", "conv"): _sum_conv,
    ("forward", "linear"): _forward_linear,
    ("input gradient", "linear"): _input_gradient_linear,
    ("weight gradient", "linear"): _weight_gradient_linear,
    ("statistics", "norm"): _statistics_norm,
    ("combine", "norm"): _combine_norm,
    ("forward", "norm"): _forward_norm,
    ("gradient statistics", "norm"): _gradient_statistics_norm,
    ("gradient combine", "norm"): _gradient_combine_norm,
    ("input gradient", "norm"): _input_gradient_norm,
    ("forward", "each"): _forward_each,
    ("input gradient", "each"): _input_gradient_each,
    ("forward", "dropout"): _forward_dropout,
    ("input gradient", "dropout"): _input_gradient_dropout,
    ("forward", "whole"): _forward_whole,
    ("backward", "whole"): _backward_whole,
}
_ACTIONS |= {(kind, layer): action for kind, action in (("loss", _loss), ("update", _update)) for layer in KINDS}
