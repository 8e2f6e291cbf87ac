"""The inner layer of one replica: computes the gradients of each batch in the way that its `Inner` asks for.

    batch -> a way: none | intra-op | samples in blocks | rows -> gradients on the parameters, and what it was: "samples 2x64"

A way is a string, so that a record can hold it: split, threads and, of samples, the block.

Used by `labkit.problems.supervised`.
"""

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from labkit.errors import LabError, ProblemError
from labkit.inner import samples
from labkit.inner.adaptive import Adaptive
from labkit.inner.executor import TaskEngine
from labkit.inner.hooks import taken_off
from labkit.inner.inner import Inner
from labkit.inner.layers import attributes, trace
from labkit.inner.pool import ThreadPool
from labkit.inner.samples import has_batch_statistics, refuse
from labkit.locks import alone

BLOCKS = (128, 64, 32, 16)  # samples; those that are tried beside a thread's whole part
SEARCHED = 3  # times each
# Between buffers after a step of a batch that is split and of one that is not: of what they have moved, and of themselves.
MOVED, MOVED_16, ROUNDING = 1e-2, 0.1, 1e-6
# shares(network, k) are k functions that each compute the loss of one of k equal blocks of a batch, weighted by its share.
Shares = Callable[[Callable[..., Any], int], Sequence[Callable[[], torch.Tensor]]]


class Way(NamedTuple):
    """How a step is computed; `block` of "samples" alone."""

    split: str
    threads: int = 1
    block: int = 0

    def __str__(self) -> str:
        return f"{self.split} {self.threads}x{self.block}" if self.block else f"{self.split} {self.threads}"

    @classmethod
    def of(cls, text: str) -> "Way":
        split, _, numbers = text.partition(" ")
        return cls(split, *map(int, numbers.split("x")))


class Engine:
    """Computes the gradients of the batches of one module.

    inner : how.
    remembered : file with the blocks that were found quickest, None for none.
    plain : are the gradients of float32 numbers, without autocast? "rows" computes no others.
    """

    def __init__(self, inner: Inner, remembered: str | os.PathLike[str] | None = None, plain: bool = True) -> None:
        self.inner, self.remembered, self.plain = inner, remembered, plain
        self.threads = inner.threads or torch.get_num_threads()
        self._pool: ThreadPool | None = None
        self._tasks: TaskEngine | None = None
        self._blocks: dict[int, int] = {}  # by samples in a batch
        self._adaptive: Adaptive[Way] | None = None
        self._usual = 0  # samples in most batches
        self._tried: Way | None = None  # by `_adaptive`, in this step
        self._done: list[tuple[str, int]] = []
        self._given: Iterator[str] | None = None

    def gradients(self, module: nn.Module, x: Any, shares: Shares) -> torch.Tensor:
        """Adds the gradients of a batch to `.grad` of the parameters; returns its loss.

        module : always the same one. ProblemError, by name, where it cannot be split as asked.
        x : the inputs, (samples, ...), or a tuple of them.
        shares : of the batch.
        """
        way = self._way(module, x, shares)
        started = time.perf_counter()
        loss = self._compute(way, module, x, shares)
        if self._tried is not None:
            if loss.is_cuda:
                torch.cuda.synchronize(loss.device)
            self._adaptive.note(self._tried, time.perf_counter() - started)
        text, steps = self._done.pop() if self._done and self._done[-1][0] == str(way) else (str(way), 0)
        self._done.append((text, steps + 1))
        return loss

    def done(self) -> str:
        """How the steps since the last call were computed: "none 1 *3, samples 2x64 *97"."""
        runs, self._done = [f"{way} *{steps}" for way, steps in self._done], []
        return ", ".join(runs)

    def repeat(self, done: str) -> None:
        """Compute the next steps as these were, and then as `Inner` says again."""
        runs = [text.rsplit(" *", 1) for text in done.split(", ") if text]
        self._given = iter([Way.of(way) for way, steps in runs for _ in range(int(steps))])

    def check(self, module: nn.Module, x: Any, shares: Shares) -> float:
        """The relative difference between the gradients of a batch, split and not; dropout is left out. Leaves no trace.

        It is rounding where the loss is a mean over samples, and what the network makes of a sample does not depend on the others.
        ProblemError, by name, for layers that cannot be split, for buffers that a forward pass moves with each part, for values that it
        leaves on a module, and for random numbers of its own.
        """
        whole = samples.unsupported(module) if self.inner.whole is True else self.inner.whole or ()
        if self.inner.split != "rows":  # which names what it cannot split itself
            refuse(module, self.inner.whole)
        before = {name: _wide(buffer) for name, buffer in module.named_buffers()}
        found, buffers = [], []
        by_tasks = self.inner.split == "rows" or (self.inner.split == "auto" and self._can_be_tasks(module, x))
        block = 0 if self._is_one_block(module) else self.inner.block or 0
        ways = [Way("none")] + [Way("samples", 2, block)] * (self.inner.split != "rows") + [Way("rows", 2)] * by_tasks
        for way in ways:
            with as_it_was(module, x), torch.random.fork_rng(devices=[]):
                for part in module.modules():
                    if isinstance(part, _DropoutNd):
                        part.eval()
                random = torch.get_rng_state()
                if way.split == "none":
                    self._compute(way, module, x, shares)
                    if self.inner.split != "rows" and not torch.equal(random, torch.get_rng_state()):
                        raise ProblemError(
                            "the inner layer cannot split a network, or a loss, that draws random numbers itself: its threads would draw them from "
                            "one generator, in any order. Have nn.Dropout do so, or leave the step undivided, with Inner(split='none')."
                        )
                else:
                    self._tried_out(way, module, x, shares, whole)
                found.append({at: _wide(p.grad) for at, p in enumerate(module.parameters()) if p.grad is not None})
                buffers.append({name: _wide(buffer) for name, buffer in module.named_buffers()})
        if self.inner.split != "rows" and any(isinstance(part, _DropoutNd) for part in module.modules()):
            with as_it_was(module, x):  # may fail with it alone
                self._tried_out(Way("samples", 2), module, x, shares, whole)
        for name, buffer in buffers[0].items():
            for other in (after[name] for after in buffers[1:]):
                moved = (buffer - before[name]).norm() if before[name].shape == buffer.shape else buffer.norm()
                limit = (MOVED if self.plain else MOVED_16) * moved + ROUNDING * buffer.norm()
                if buffer.shape != other.shape or (buffer - other).norm() > limit:
                    raise ProblemError(
                        f"the inner layer cannot split a network whose forward pass moves the buffer {name!r} with each part of a batch. Have its "
                        "module computed whole, with Inner(whole=['its name']), or leave the step undivided, with Inner(split='none')."
                    )
        one, *others = found
        if any(one.keys() != other.keys() for other in others):
            return float("inf")
        differ = max(sum(float((one[at] - other[at]).abs().square().sum()) for at in one) for other in others)
        size = sum(float(gradient.abs().square().sum()) for gradient in one.values())
        return math.sqrt(differ / size) if size else math.sqrt(differ)

    def _tried_out(self, way: Way, module: nn.Module, x: Any, shares: Shares, whole: Collection[str]) -> None:
        """A step of `check`; ProblemError where it fails with parts of a batch, or leaves values on a module, which its threads share."""
        inside = tuple(f"{name}." for name in whole)
        parts = {name: part for name, part in module.named_modules() if not f"{name}.".startswith(inside)}
        held = [dict(vars(part)) for part in parts.values()]  # so that nothing else gets the address of what is replaced
        before, failed = {name: attributes(part) for name, part in parts.items()}, None
        try:
            self._compute(way, module, x, shares, seed=0)
        except LabError:
            raise
        except Exception as error:
            failed = error
        del held
        for name, part in parts.items():
            now = attributes(part)
            changed = [key for key in now if key != "training" and now[key] != before[name].get(key, now)]
            if changed and way.split == "samples":
                apart = f"have it computed whole, with Inner(whole={[name]}), " if name else ""
                raise ProblemError(
                    f"the inner layer cannot split {name or 'the model itself'} ({type(part).__name__}): its forward pass leaves {changed[0]!r} on "
                    f"it, which the threads of a step would do to each other. Use a local variable, {apart}or leave the step undivided, with "
                    "Inner(split='none')."
                ) from failed
        if failed:
            raise ProblemError(
                f"the inner layer cannot split this network: in parts of a batch it fails with {type(failed).__name__}: "
                f"{' '.join(str(failed).split())[:200]}. Leave the step undivided, with Inner(split='none')."
            ) from failed

    def close(self) -> None:
        """End its threads."""
        if self._pool:
            self._pool.close()
            self._pool = self._tasks = None

    # How.

    def _way(self, module: nn.Module, x: Any, shares: Shares) -> Way:
        self._tried = None
        if self._given is not None:
            if (given := next(self._given, None)) is not None:
                return given
            self._given = None
        split, threads, n = self.inner.split, self.threads, samples_in(x)
        if split == "samples":
            return self._of_samples(module, x, shares)
        if split != "auto":
            return Way(split, 1 if split == "none" else threads)
        if threads == 1 or n < 2:
            return Way("none")
        if n > self._usual:  # the last batch of a pass is shorter
            intra_op = Way("intra-op", threads)
            ways = [Way("none"), self._of_samples(module, x, shares), intra_op]
            ways += [Way("rows", threads)] if self._can_be_tasks(module, x) else []
            self._usual, self._adaptive = n, Adaptive(list(dict.fromkeys(ways)), fragile=[intra_op])
        way = self._adaptive.next()
        self._tried = way if n == self._usual else None
        return self._of_samples(module, x, shares) if way.split == "samples" else way

    def _is_one_block(self, module: nn.Module) -> bool:
        """Is the part of a thread not to be cut further, because layers compute with all of the batch at once?"""
        return bool(self.inner.whole) or has_batch_statistics(module)

    def _can_be_tasks(self, module: nn.Module, x: Any) -> bool:
        """Can this step be cut into tasks of its layers?"""
        if not self.plain or not isinstance(x, torch.Tensor):
            return False
        try:
            trace(module, x, self.inner.whole)
        except ProblemError:
            return False
        return True

    def _of_samples(self, module: nn.Module, x: Any, shares: Shares) -> Way:
        n = samples_in(x)
        part = -(-n // self.threads)
        if self._is_one_block(module):
            if first_of(x).is_cuda:  # where one thread computes the backward passes of all: they cannot wait for each other
                return Way("none")
            return Way("samples", self.threads, part)
        if self.inner.block is not None:
            return Way("samples", self.threads, min(part, self.inner.block))
        if n > max(self._blocks, default=0):
            refuse(module, self.inner.whole)
            self._blocks[n] = self._searched(module, x, part, shares)
        return Way("samples", self.threads, min(part, self._blocks[max(self._blocks)]))

    def _searched(self, module: nn.Module, x: Any, part: int, shares: Shares) -> int:
        """The size of block that is quickest for such batches, looked up or tried."""
        sizes = [part, *(size for size in BLOCKS if size < part)]
        key = self._key(module, x)
        if len(sizes) == 1 or (known := self._remembered().get(key)) in sizes:
            return part if len(sizes) == 1 else known
        times: dict[int, list[float]] = {size: [] for size in sizes}
        for _ in range(SEARCHED + 1):
            for size in sizes:
                with as_it_was(module, x):
                    started = time.perf_counter()
                    loss = self._compute(Way("samples", self.threads, size), module, x, shares, seed=0)
                    if loss.is_cuda:
                        torch.cuda.synchronize(loss.device)
                    times[size].append(time.perf_counter() - started)
        best = min(sizes, key=lambda size: median(times[size][1:]))
        self._remember(key, best)
        return best

    def _compute(self, way: Way, module: nn.Module, x: Any, shares: Shares, seed: int | None = None) -> torch.Tensor:
        if way.split in ("samples", "rows") and (self._pool is None or self._pool.threads != way.threads):
            self.close()
            self._pool = ThreadPool(way.threads)
        if way.split == "rows":
            if isinstance(x, tuple):
                raise ProblemError(f"Inner(split='rows') cuts the step of a network with one input, and this one has {len(x)}.")
            if self._tasks is None:
                self._tasks = TaskEngine(module, self._pool, whole=self.inner.whole, block=self.inner.block)
            self._tasks.module = module
            try:
                return self._tasks.gradients(x, lambda outputs: shares(lambda *_: outputs, 1)[0]())
            finally:
                self._tasks.module = None  # whoever holds an engine for each module must not keep the module
        if way.split == "samples":
            n = samples_in(x)
            part = -(-n // way.threads)
            n_blocks = way.threads * -(-part // (way.block or part))
            # A single sample may be another thing to a network: squeeze() takes its axis off. So there are two, unless one is asked for.
            most = n if self.inner.block == 1 else max(1, n // 2)
            return samples.gradients(module, self._pool, shares(module, min(most, n_blocks)), self.inner.whole, seed)
        with _threads(way.threads):
            (share,) = shares(module, 1)
            loss = share()
            loss.backward()
        return loss.detach()

    def _key(self, module: nn.Module, x: Any) -> str:
        """Of a network, a batch and a machine."""
        n = [(tuple(part.shape), part.stride(), str(part.dtype)) for part in (x if isinstance(x, tuple) else (x,))]
        made = [(type(part).__name__, [tuple(p.shape) for p in part.parameters(recurse=False)]) for part in module.modules()]
        where = torch.__version__, torch.backends.cpu.get_cpu_capability(), os.cpu_count()
        return hashlib.sha256(repr((made, n, self.threads, self.plain, where)).encode()).hexdigest()[:16]

    def _remembered(self) -> dict[str, Any]:
        try:
            with open(self.remembered, encoding="utf-8") as file:
                found = json.load(file)
            return found if isinstance(found, dict) else {}
        except (OSError, ValueError, TypeError):
            return {}

    def _remember(self, key: str, block: int) -> None:
        if self.remembered is None:
            return
        folder, own = os.path.dirname(os.fspath(self.remembered)), f"{os.fspath(self.remembered)}.{os.getpid()}"
        try:
            os.makedirs(folder, exist_ok=True)
            with alone(
                Path(folder)
            ):  # workers, threads or processes, have searched at the same time: none forgets what others remember
                with open(own, "w", encoding="utf-8") as file:
                    json.dump(self._remembered() | {key: block}, file)
                os.replace(own, self.remembered)
        except OSError:  # such as a full disk: it is searched again next time
            return


def samples_in(x: Any) -> int:
    """Of a batch, (samples, ...) or a tuple of such."""
    return len(first_of(x))


def first_of(x: Any) -> torch.Tensor:
    """The first input of a batch."""
    return x[0] if isinstance(x, tuple) else x


@contextlib.contextmanager
def _threads(n: int) -> Iterator[None]:
    """Torch computes with n threads."""
    before = torch.get_num_threads()
    if n != before:
        torch.set_num_threads(n)
    try:
        yield
    finally:
        if n != before:
            torch.set_num_threads(before)


@contextlib.contextmanager
def as_it_was(module: nn.Module, x: Any = ()) -> Iterator[None]:
    """What happens to gradients, buffers and modes of a module in here is undone, and what its forward pass does to the inputs `x`;
    hooks on parameters, an optimiser's, say, are not called."""
    inputs = [(part, part.clone()) for part in (x if isinstance(x, tuple) else (x,))]
    buffers = [  # a module may hold another tensor afterwards
        (part._buffers, name, buffer, buffer.detach().clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    modes = [(part, part.training) for part in module.modules()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with taken_off([parameter for parameter, _ in gradients]):
            yield
    finally:
        with torch.no_grad():
            for held, name, buffer, value in buffers:
                buffer.copy_(value)
                held[name] = buffer
            for part, value in inputs:
                if not torch.equal(part, value):
                    part.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for part, training in modes:
            part.training = training


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In double precision, for comparisons."""
    dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    return dense.to(torch.complex128 if dense.is_complex() else torch.float64, copy=True)
