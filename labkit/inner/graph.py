"""The tasks of one training step, and which must be done before which.

A step is cut into tasks over blocks of samples and of output rows (Chen et al. 2019; the paper has a task for each element of an
output map, which is far too fine for a processor of today: `logical_tasks` counts them). For a layer y = f(x, W) and its block b:

    forward            y_b  = f(x_b, W)
    input gradient     dx_b = df/dx (dy_b, W)           before anything of the layer below
    weight gradient    dW_b = df/dW (x_b, dy_b)         off the critical path
    sum                dW   = dW_1 + dW_2 + ...         in this order, always
    update             W    = W - rate dW               after every task that reads the old W

BatchNorm's statistics are those of the whole batch, so it has `statistics` for each block and one `combine` for all, and the same
on the way back. Each task says what it reads and what it writes, and the dependencies follow: read after write, write after write
(a sum of two gradients) and write after read (the update).

    value of a layer, gradient of a layer      a number of samples x rows [first, last)

Used by `labkit.inner.executor` and `labkit.inner.profiling`; the way to `layers` is `labkit.inner.layers.trace`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from labkit.errors import whole
from labkit.inner.layers import Layer

LEAST_ROWS = 4  # a block of fewer is mostly rim
FLOAT = 4  # bytes
Range = tuple[int, int]


@dataclass(frozen=True)
class Task:
    """One piece of work.

    Attributes
    ----------
    kind : "forward", "input gradient", "weight gradient", "sum", "update", "loss"; "statistics", "combine" and "gradient
        statistics", "gradient combine" of a BatchNorm; "backward" of a whole module.
    layer : its number.
    block : the number of the block of samples; None for all of them.
    rows : of the output (of the input: "input gradient"); of a linear layer's "weight gradient" its outputs.
    flops, bytes : floating-point operations; bytes read and written.
    adds : the layers to whose gradient it adds, instead of writing it first.
    predecessors : the numbers of the tasks that must be done before, without those that follow from others.
    """

    kind: str
    layer: int
    block: int | None
    rows: Range
    flops: int
    bytes: int
    adds: tuple[int, ...]
    predecessors: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """The tasks of a step, in an order in which predecessors come first.

    Attributes
    ----------
    layers : as `trace` gives them.
    samples : the blocks of samples, [first, last).
    rows : for each layer, its blocks of rows.
    tasks : see `Task`.
    trained : whether a layer, or one that it reads, has weights that are trained: then the gradient of its output is computed.
    split : ("value" | "gradient", layer) of which tasks write some of the rows alone.
    """

    layers: list[Layer]
    samples: list[Range]
    rows: list[list[Range]]
    tasks: list[Task]
    trained: list[bool] = field(default_factory=list)
    split: set[tuple[str, int]] = field(default_factory=set)

    @property
    def predecessors(self) -> list[tuple[int, ...]]:
        """Of each task."""
        return [task.predecessors for task in self.tasks]

    def name(self, task: Task) -> str:
        """ "conv1 forward, samples 0-31, rows 0-13"."""
        where = "" if task.block is None else ", samples {}-{}".format(*_ends(self.samples[task.block]))
        height = self.layers[task.layer].height
        if task.block is not None and task.rows != (0, height):
            where += f", rows {task.rows[0]}-{task.rows[1] - 1}"
        return f"{self.layers[task.layer].name} {task.kind}{where}"

    def table(self) -> list[dict[str, int | str]]:
        """A row for each layer: logical tasks of the paper (K_C for each filter), blocks that are executed, FLOPs and bytes of the step."""
        rows = []
        for number, layer in enumerate(self.layers[1:], start=1):
            own = [task for task in self.tasks if task.layer == number and task.kind != "loss"]
            rows.append(
                {
                    "layer": layer.name, "op": layer.op, "output": " x ".join(map(str, layer.shape)),
                    "filters": layer.shape[0] if layer.kind == "conv" else 0, "logical_tasks": layer.logical_tasks,
                    "blocks": sum(task.kind == "forward" for task in own), "tasks": len(own),
                    "flops": sum(task.flops for task in own), "bytes": sum(task.bytes for task in own),
                }
            )  # fmt: skip
        return rows


def _ends(block: Range) -> Range:
    return block[0], block[1] - 1


def cut(n: int, blocks: int) -> list[Range]:
    """[0, n) in `blocks` ranges as even as can be, none of them empty."""
    ends = [n * i // min(blocks, n) for i in range(min(blocks, n) + 1)]
    return list(pairwise(ends))


def step_graph(layers: Sequence[Layer], samples: int, *, block: int | None = None, rows: int = 1) -> Graph:
    """The tasks of a step over a batch of `samples`.

    Parameters
    ----------
    block : samples in a block at most; None for all.
    rows : blocks of rows at most; a layer whose map has few rows is cut into fewer (`LEAST_ROWS` each at least).

    The weight gradient of a linear layer is cut by its outputs, into as many tasks as there are blocks of samples; each sums over all
    samples itself, so that no block has an array of the size of these weights.
    """
    samples, rows = whole("samples", samples), whole("rows", rows)
    size = samples if block is None else whole("block", block)
    blocks = cut(samples, math.ceil(samples / size))
    builder = _Builder(list(layers), blocks, [_row_blocks(layer, rows) for layer in layers])
    builder.forward()
    builder.backward()
    builder.updates()
    graph = builder.graph
    return replace(graph, tasks=_reduced(graph.tasks))


def _row_blocks(layer: Layer, rows: int) -> list[Range]:
    splits = layer.window is not None and layer.kind not in ("batch", "whole") and len(layer.shape) > 1
    return cut(layer.height, max(1, min(rows, layer.height // LEAST_ROWS)) if splits else 1)


def _reduced(tasks: Sequence[Task]) -> list[Task]:
    """Without the predecessors that other predecessors come after anyway."""
    before: list[int] = []  # all that come before a task, as bits
    reduced = []
    for task in tasks:
        direct, known = [], 0
        for earlier in sorted(task.predecessors, reverse=True):
            if not known >> earlier & 1:
                direct.append(earlier)
                known |= before[earlier] | 1 << earlier
        before.append(known)
        reduced.append(replace(task, predecessors=tuple(sorted(direct))))
    return reduced


Region = tuple[str, int, int | None, Range]  # what, layer, block of samples (None: it has none), rows


class _Builder:
    """Adds task after task, and finds what comes before each from what it reads and writes."""

    def __init__(self, layers: list[Layer], blocks: list[Range], rows: list[list[Range]]) -> None:
        self.graph = Graph(layers, blocks, rows, [])
        self.layers, self.blocks, self.rows = layers, range(len(blocks)), rows
        self.writers: dict[tuple, list[tuple[Range, int]]] = {}
        self.readers: dict[tuple, list[tuple[Range, int]]] = {}
        self.trained = self.graph.trained
        for layer in layers:
            self.trained.append(bool(layer.parameters) or any(self.trained[i] for i in layer.inputs))
        first: dict[int, int] = {}  # a module that is called twice has the weights of its first layer
        self.owner = [first.setdefault(id(layer.module), i) if layer.module else i for i, layer in enumerate(layers)]

    def add(
        self, kind: str, layer: int, block: int | None, rows: Range, reads: Iterable[Region], writes: Iterable[Region],
        flops: float = 0, bytes: float = 0,
    ) -> None:  # fmt: skip
        number, after, adds = len(self.graph.tasks), set(), set()
        reads, writes = list(reads), list(writes)
        for *key, own in reads:
            after.update(_overlapping(self.writers.get(tuple(key), ()), own))
        for *key, own in writes:
            earlier = _overlapping(self.writers.get(tuple(key), ()), own)
            adds.update([key[1]] if earlier and key[0] in ("gradient", "sum") else [])
            after.update(earlier, _overlapping(self.readers.get(tuple(key), ()), own))
        for regions, table in ((reads, self.readers), (writes, self.writers)):
            for *key, own in regions:
                table.setdefault(tuple(key), []).append((own, number))
        for what, of, _, own in writes:
            if what in ("value", "gradient") and own != (0, self.layers[of].height):
                self.graph.split.add((what, of))
        self.graph.tasks.append(Task(kind, layer, block, rows, round(flops), round(bytes), tuple(adds), tuple(sorted(after))))

    def everything(self, what: str, layer: int) -> list[Region]:
        """All samples, all rows."""
        return [(what, layer, block, (0, self.layers[layer].height)) for block in self.blocks]

    def weights(self, layer: int) -> list[Region]:
        return [("weights", self.owner[layer], None, (0, 1))] if self.layers[layer].module else []

    def size(self, layer: int, block: int | None, rows: Range | None = None) -> int:
        """How many numbers an output has, of a block of samples (None: of all), of some of its rows (None: of all)."""
        first, last = (0, self.graph.samples[-1][1]) if block is None else self.graph.samples[block]
        share = (rows[1] - rows[0]) / self.layers[layer].height if rows else 1
        return round((last - first) * math.prod(self.layers[layer].shape) * share)

    def needed(self, layer: int, block: int, rows: Range, what: str = "value") -> list[Region]:
        """The rows of its inputs that some rows of a layer's output are made of; or those of their gradients that it writes."""
        return [(what, i, block, self.input_rows(layer, i, rows)) for i in self.layers[layer].inputs]

    def input_rows(self, layer: int, source: int, rows: Range) -> Range:
        return input_rows(self.layers[layer], self.layers[source], rows)

    def forward(self) -> None:
        for number, layer in enumerate(self.layers):
            if layer.kind == "batch":
                continue
            if layer.kind == "whole":
                reads = [region for i in layer.inputs for region in self.everything("value", i)] + self.weights(number)
                moved = FLOAT * sum(self.size(i, None) for i in (number, *layer.inputs))
                self.add("forward", number, None, (0, layer.height), reads, self.everything("value", number), 0, moved)
                continue
            cells = [(block, rows) for block in self.blocks for rows in self.rows[number]]
            statistics = self.weights(number)
            if layer.kind == "norm":
                (source,) = layer.inputs
                for block, rows in cells:
                    n = self.size(source, block, rows)
                    self.add("statistics", number, block, rows, [("value", source, block, rows)], [("statistics", number, block, rows)], 3 * n, FLOAT * n)  # fmt: skip
                parts = [("statistics", number, block, rows) for block, rows in cells]
                # The running statistics belong to the weights of a module that is called twice: one after the other.
                self.add("combine", number, None, (0, 1), parts, [("mean", number, None, (0, 1)), ("running", self.owner[number], None, (0, 1))])  # fmt: skip
                statistics = [*statistics, ("mean", number, None, (0, 1))]
            for block, rows in cells:
                reads = [*self.needed(number, block, rows), *statistics]
                moved = self.size(number, block, rows) + sum(
                    self.size(i, block, own) for _, i, _, own in self.needed(number, block, rows)
                )
                moved += n_weights(layer)
                flops = self.flops(number, block, rows)
                self.add("forward", number, block, rows, reads, [("value", number, block, rows)], flops, FLOAT * moved)

    def flops(self, layer: int, block: int | None, rows: Range | None = None) -> float:
        """Of the forward pass; of each of the two gradients it is the same."""
        return self.size(layer, block, rows) * flops_each(self.layers[layer], [self.layers[i] for i in self.layers[layer].inputs])

    def backward(self) -> None:
        last = len(self.layers) - 1
        if not self.trained[last]:
            raise ValueError("no parameter of the network is trained: each has requires_grad=False.")
        n = self.size(last, None)
        self.add("loss", last, None, (0, self.layers[last].height), self.everything("value", last), self.everything("gradient", last), 5 * n, 2 * FLOAT * n)  # fmt: skip
        for number in range(last, 0, -1):
            if self.trained[number] and ("gradient", number, 0) in self.writers:
                getattr(self, f"_backward_{self.layers[number].kind}")(number)

    def _backward_each(self, number: int) -> None:
        below = [i for i in self.layers[number].inputs if self.trained[i]]
        for block in self.blocks:
            for rows in self.rows[number]:
                writes = [("gradient", i, block, self.input_rows(number, i, rows)) for i in below]
                n = self.size(number, block, rows) + sum(self.size(i, block, own) for _, i, _, own in writes)
                reads = [("gradient", number, block, rows)]
                self.add("input gradient", number, block, rows, reads, writes, n, FLOAT * (n + self.size(number, block, rows)))

    _backward_dropout = _backward_each

    def _backward_conv(self, number: int) -> None:
        layer, (source,) = self.layers[number], self.layers[number].inputs
        if self.trained[source]:
            for block in self.blocks:
                for rows in self.rows[source]:
                    low, high = layer.window.touched(*rows, layer.height) if layer.window else (0, layer.height)
                    n, moved = self.size(source, block, rows), self.size(number, block, (low, max(low, high)))
                    flops = self.flops(number, block) * (rows[1] - rows[0]) / self.layers[source].height
                    self.add(
                        "input gradient", number, block, rows, [("gradient", number, block, (low, high)), *self.weights(number)],
                        [("gradient", source, block, rows)], flops, FLOAT * (n + moved + n_weights(layer)),
                    )  # fmt: skip
        if not layer.parameters:
            return
        for block in self.blocks:
            for rows in self.rows[number]:
                reads = [("gradient", number, block, rows), *self.needed(number, block, rows)]
                n = self.size(number, block, rows) + sum(self.size(i, block, own) for _, i, _, own in reads[1:])
                flops, writes = self.flops(number, block, rows), [("part", number, block, rows)]
                self.add("weight gradient", number, block, rows, reads, writes, flops, FLOAT * (n + n_weights(layer)))

    def _backward_linear(self, number: int) -> None:
        layer, (source,) = self.layers[number], self.layers[number].inputs
        if self.trained[source]:
            for block in self.blocks:
                n = self.size(number, block) + self.size(source, block) + n_weights(layer)
                height = (0, self.layers[source].height)
                self.add(
                    "input gradient", number, block, height, [*self.everything("gradient", number)[block : block + 1], *self.weights(number)],
                    [("gradient", source, block, height)], self.flops(number, block), FLOAT * n,
                )  # fmt: skip
        if not layer.parameters:
            return
        for outputs in cut(layer.module.out_features, len(self.blocks)):
            share = (outputs[1] - outputs[0]) / layer.module.out_features
            n = self.size(source, None) + share * (self.size(number, None) + n_weights(layer))
            reads = [*self.everything("gradient", number), *self.everything("value", source)]
            writes = [("sum", self.owner[number], None, outputs)]
            self.add("weight gradient", number, None, outputs, reads, writes, share * self.flops(number, None), FLOAT * n)

    def _backward_norm(self, number: int) -> None:
        (source,) = self.layers[number].inputs
        cells = [(block, rows) for block in self.blocks for rows in self.rows[number]]
        for block, rows in cells:
            n = self.size(number, block, rows)
            reads = [("gradient", number, block, rows), ("value", source, block, rows)]
            self.add("gradient statistics", number, block, rows, reads, [("gradient statistics", number, block, rows)], 4 * n, 2 * FLOAT * n)  # fmt: skip
        reads = [("gradient statistics", number, block, rows) for block, rows in cells] + self.weights(number)
        writes = [("slope", number, None, (0, 1)), ("sum", self.owner[number], None, (0, 1))]
        self.add("gradient combine", number, None, (0, 1), reads, writes)
        for block, rows in cells if self.trained[source] else ():
            n = self.size(number, block, rows)
            reads = [("gradient", number, block, rows), ("value", source, block, rows), ("slope", number, None, (0, 1))]
            self.add("input gradient", number, block, rows, reads, [("gradient", source, block, rows)], 4 * n, 3 * FLOAT * n)

    def _backward_whole(self, number: int) -> None:
        layer = self.layers[number]
        below = [region for i in layer.inputs if self.trained[i] for region in self.everything("gradient", i)]
        moved = FLOAT * 2 * sum(self.size(i, None) for i in (number, *layer.inputs))
        writes = [*below, ("sum", self.owner[number], None, (0, 1))]
        self.add(
            "backward",
            number,
            None,
            (0, layer.height),
            self.everything("gradient", number) + self.weights(number),
            writes,
            0,
            moved,
        )

    def updates(self) -> None:
        """Of each module with weights, when no task reads the old ones any more; in the order in which their gradients come."""
        for number in range(len(self.layers) - 1, 0, -1):
            layer = self.layers[number]
            if self.owner[number] != number or not layer.parameters:
                continue
            n = n_weights(layer)
            if layer.kind == "conv":
                parts = [region for region in ((*key, rows) for key, own in self.writers.items() for rows, _ in own) if region[0] == "part" and self.owner[region[1]] == number]  # fmt: skip
                if len(parts) > 0:
                    self.add("sum", number, None, (0, 1), parts, [("sum", number, None, (0, 1))], (len(parts) - 1) * n, FLOAT * (len(parts) + 1) * n)  # fmt: skip
            reads = [("sum", number, None, (0, max(1, getattr(layer.module, "out_features", 1))))]
            self.add("update", number, None, (0, 1), reads, self.weights(number), 2 * n, 3 * FLOAT * n)


def _overlapping(entries: Sequence[tuple[Range, int]], own: Range) -> list[int]:
    return [task for (first, last), task in entries if first < own[1] and own[0] < last]


def input_rows(layer: Layer, source: Layer, rows: Range) -> Range:
    """The rows of `source` that `rows` of `layer` are made of, as far as there are any (the padding has none).

    Where windows do not overlap each row of the input belongs to one row of the output, and what is left over to the last one.
    """
    if layer.window is None or rows == (0, layer.height):
        return 0, source.height
    if layer.kind == "conv":
        top, bottom = layer.window.needed(*rows)
        return max(0, top), min(source.height, bottom)
    stride = layer.window.stride
    return rows[0] * stride, source.height if rows[1] == layer.height else rows[1] * stride


def n_weights(layer: Layer) -> int:
    """How many numbers the weights of a layer have."""
    return sum(parameter.numel() for parameter in layer.module.parameters()) if layer.module else 0


def flops_each(layer: Layer, inputs: Sequence[Layer]) -> float:
    """Floating-point operations for each number of the output, a multiplication and an addition as two."""
    if layer.kind in ("conv", "linear"):
        return 2 * layer.module.weight[0].numel()
    if layer.kind == "norm":
        return 2
    return max(1.0, math.prod(inputs[0].shape) / math.prod(layer.shape)) if inputs else 1


def chains(graph: Graph, costs: Sequence[float], least: float) -> tuple[list[list[int]], list[tuple[int, ...]]]:
    """Tasks in chains that are executed as one, and the predecessors of each chain.

    A task whose predecessors are all in one chain joins it, if the task, or the chain so far, takes less than `least` seconds: what is
    executed is then worth its overhead, and no chain waits for another in its middle.
    """
    found: list[list[int]] = []
    cost: list[float] = []
    before: list[tuple[int, ...]] = []
    home: list[int] = []  # the chain of each task
    for number, task in enumerate(graph.tasks):
        above = {home[earlier] for earlier in task.predecessors}
        if len(above) == 1 and min(costs[number], cost[(only := next(iter(above)))]) < least:
            found[only].append(number)
            cost[only] += costs[number]
            home.append(only)
        else:
            home.append(len(found))
            found.append([number])
            cost.append(costs[number])
            before.append(tuple(sorted(above)))
    return found, before
