"""Whether a run can train what a problem builds: tried out in the kernel, before anything is started.

    built twice  ->  equal?  ->  evaluated  ->  one step  ->  one push  ->  rebuilt from the vector  ->  the same outputs?

Each process builds a module of its own, and what one sends the others is its flat vector (`labkit.models.flat`). So two builds must
be equal, and what a module is must be in the vector, or its other replicas, `Run.model` and a resumed run are other networks.

The processes of a run are more than one, so each worker compares what it builds with the fingerprint of what the kernel has built.

Used by `Problem.new_module`, `Problem.check` and `Problem.fingerprint`; `separate` by `labkit.subnets.result`.
"""

import contextlib
import copy
import math
import numbers
import pickle
import random
import sys
import threading
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from labkit.errors import ProblemError
from labkit.models import evaluating, seeded
from labkit.models.flat import Flat
from labkit.problems.metrics import one_number


@dataclass
class _Eager:
    """How many threads compute without compiling, and what restores the setting of torch."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    n: int = 0
    stance: Any = None


_eager = _Eager()
OWN = frozenset(vars(nn.Module()))  # attributes that every module has
COMPILER = "_torchdynamo"  # so begin the attributes that torch.compile gives modules and functions
SHOWN = 3  # names in a message
TOLERANCE = 1e-4  # between two evaluations in one process
# Between losses in two processes, if plain attributes differ, and if none does: rounding differs from CPU to CPU, and in a network that
# rounds itself (quantised, binary) that is a step.
SUSPECT, ALIKE = 1e-3, 0.03
NUDGE = 0.02  # by which the weights of a fingerprint are moved
PLAIN = (numbers.Number, str, bytes, type(None))
LEAVES = (torch.Tensor, np.ndarray, set, frozenset, *PLAIN)
SEQUENCES = (list, tuple, deque)
DEPTH = 3  # within an attribute
FOREIGN = ("torch.", "functools", "weakref", "_thread", "threading", "logging")  # whose objects are not looked into
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
GLOBAL = (torch.default_generator, np.random.mtrand._rand, random._inst)  # those that `seeded` seeds

Measured = Callable[
    [nn.Module], dict[str, float]
]  # evaluates a module, always on the same samples and with the same random numbers


def shared(one: nn.Module, other: nn.Module) -> bool:
    """Do two modules have a tensor in common?"""
    return not _memory(one).isdisjoint(_memory(other))


def copied(module: nn.Module, title: str) -> nn.Module:
    """A module of its own with the same values; ProblemError where it cannot be copied."""
    computed = (value for part in module.modules() for value in vars(part).values() if isinstance(value, torch.Tensor))
    known = {
        id(tensor): tensor.detach().clone() for tensor in computed if not tensor.is_leaf
    }  # such as the product of a weight norm
    lazy = (buffer for buffer in module.buffers() if isinstance(buffer, UninitializedBuffer))  # torch cannot copy these
    known |= {id(buffer): UninitializedBuffer(device=buffer.device, dtype=buffer.dtype) for buffer in lazy}
    try:
        return copy.deepcopy(module, known)
    except Exception as error:
        raise ProblemError(
            f"{title} is made by a function that returns one module, or one with the same tensors, each time, and this cannot be "
            f"copied for each worker ({type(error).__name__}: {error}). Make a new module in the function."
        ) from error


def separate(make: Callable[[], nn.Module], shape: Sequence[int], seed: int, title: str) -> nn.Module:
    """What `make` returns, with tensors of its own, and sizes of lazy layers by samples of `shape`: for a network without data."""
    module = make()
    if shared(module, make()):
        module = copied(module, title)
    with seeded(seed), evaluating(module):
        initialise(module, lambda: module(torch.zeros(2, *shape)))
    return module


def is_of_compiler(error: BaseException) -> bool:
    """Does an error come from torch.compile, and not from what it compiles?"""
    return any(kind.__module__.startswith(("torch._dynamo", "torch._inductor")) for kind in type(error).__mro__)


def is_lazy(module: nn.Module) -> bool:
    """Does it hold tensors whose shape is known at the first forward pass alone?"""
    return any(isinstance(tensor, UninitializedParameter | UninitializedBuffer) for tensor in _tensors(module))


def initialise(module: nn.Module, evaluate: Callable[[], Any]) -> None:
    """Give the lazy tensors of a module their shapes, if it has any, by `evaluate()`; not compiled, at which torch may fail."""
    if is_lazy(module):
        with eagerly():
            evaluate()


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Nothing is compiled meanwhile. torch has one setting for all threads: the first that comes changes it, the last restores it."""
    with _eager.lock:
        if _eager.n == 0 and "torch._dynamo" in sys.modules:
            _eager.stance = torch.compiler.set_stance("force_eager")
        _eager.n += 1
    try:
        yield
    finally:
        with _eager.lock:
            _eager.n -= 1
            if _eager.n == 0 and _eager.stance:
                _eager.stance.__exit__(None, None, None)
                _eager.stance = None


def check_equal(one: Flat, other: Flat, title: str) -> None:
    """Refuse two builds with one seed that differ, by the names of what does."""
    differ = _other_tensors(_tensors_of(one), _tensors_of(other))
    differ = differ or [a.name for a, b in zip(one.slots, other.slots, strict=False) if not _same(a.view, b.view)]
    differ = differ or _differing(one.module, other.module, (torch.Tensor, np.ndarray))
    if differ:
        raise ProblemError(_other_network(title, differ))


def check_outputs(one: nn.Module, other: nn.Module, measured: Measured, title: str) -> dict[str, float]:
    """Refuse two builds with one seed that are evaluated differently although their tensors are equal; returns what they give."""
    given = _steady(one, measured)
    if _differs(given, measured(other)):
        raise ProblemError(_other_network(title, _differing(one, other)))
    return given


def check_rebuilt(one: Flat, other: Flat, measured: Measured, before: Mapping[str, float], title: str) -> None:
    """`one` has made a step, `other`, which gave `before`, has not: is it the same network once it has the vector of `one`?

    ProblemError where it is not, a warning where something else has changed that does not show in its outputs.
    """
    if new := one.appeared():
        raise ProblemError(
            f"{title} gets {_listed(new)} in its first step only. A run trains what is there before: make it in the constructor."
        )
    if broken := one.not_finite():
        raise ProblemError(
            f"{title}: after its first step, on two samples, {_listed(broken)} hold NaN or infinity, and no push of them would count. Lower the "
            "learning rate, or look for what has no finite gradient: a logarithm or a quotient of 0, samples or targets of NaN."
        )
    if _differs(before, measured(other.module)):
        raise ProblemError(
            f"{title}: something outside of the module changes in a step (a global variable, an attribute of a class or of the problem) "
            "that its outputs depend on. Each process has its own: it is in no push, no checkpoint and no run.model(). Make it a buffer."
        )
    other.load(one.pack())
    differs = _differs(_steady(one.module, measured), measured(other.module))
    changed = _differing(one.module, other.module)
    stays = "and is no parameter or buffer: it stays in each worker, and is in no push, no checkpoint and no run.model()"
    advice = "Make it a buffer: self.register_buffer(name, tensor)."
    if differs:
        what = f"{_listed(changed)} changes in a step" if changed else "something changes in a step that its outputs depend on"
        raise ProblemError(f"{title}: {what}, {stays}. {advice}")
    if changed:
        warnings.warn(f"{title}: {_listed(changed)} changes in a step, {stays}. If it matters: {advice}", stacklevel=4)


class Fingerprint(NamedTuple):
    """What a build is, for another process to compare its own with: name, type and shape of each tensor, digests of plain attributes,
    and the loss that it is evaluated with (None where that differs each time)."""

    tensors: list[tuple]
    attributes: dict[str, int]
    loss: float | None


def fingerprint(state: Flat, measured: Measured, seed: int) -> Fingerprint:
    """Of a build of which nobody else needs the weights: they are moved a little, as a last layer of zeros would hide what differs."""
    attributes = {name: zlib.crc32(repr(_plain(value)).encode()) for name, value in _attributes(state.module).items()}
    n_params = sum(math.prod(shape) for shape in state.shapes[0].values())
    noise = torch.randn(n_params, generator=torch.Generator().manual_seed(seed))
    state.pack()[:n_params].add_(noise, alpha=NUDGE)
    state.unpack()
    return Fingerprint(_tensors_of(state), attributes, _steady(state.module, measured).get("loss"))


def check_same(mine: Fingerprint, other: Fingerprint, title: str) -> None:
    """Refuse what this process builds where it differs from what the kernel has built."""
    differ = _other_tensors(mine.tensors, other.tensors)
    known = [name for name, digest in mine.attributes.items() if other.attributes.get(name) != digest]
    if not differ and (None in (mine.loss, other.loss) or _near(mine.loss, other.loss, SUSPECT if known else ALIKE)):
        return
    what = f"{_listed(differ or known)} differ" if differ or known else f"its loss is {mine.loss:.6g} for {other.loss:.6g}"
    raise ProblemError(
        f"{title} is another network in this process than in the kernel that began the run: {what}, with one seed and on the same samples. "
        "Does its constructor depend on the process, the machine, the time or the order of a set? Are the data the same here?"
    )


def _tensors_of(state: Flat) -> list[tuple]:
    return [(slot.name, *_told(slot.view)) for slot in state.slots]


def _other_tensors(some: list[tuple], others: list[tuple]) -> list[str]:
    """The names of tensors in which two builds differ by name, type, shape or order."""
    return [(a or b)[0] for a, b in zip_longest(some, others) if a != b]


def numbers_of(measured: Mapping[str, Any]) -> dict[str, float]:
    """Of what `evaluate` gives, the entries that are one number, also as a tensor."""
    found = {name: one_number(value) for name, value in measured.items()}
    return {name: value for name, value in found.items() if value is not None}


def _steady(module: nn.Module, measured: Measured) -> dict[str, float]:
    """What a module is evaluated with, but for what differs each time, as numbers from a generator of its own do."""
    first, again = measured(module), measured(module)
    return {name: value for name, value in first.items() if _near(value, again.get(name, math.nan), TOLERANCE)}


def _differs(steady: Mapping[str, float], found: Mapping[str, float]) -> bool:
    return not all(_near(value, found.get(name, math.nan), TOLERANCE) for name, value in steady.items())


def _near(a: float, b: float, tolerance: float) -> bool:
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance / 100) or (math.isnan(a) and math.isnan(b))


def _other_network(title: str, differ: list[str]) -> str:
    what = f"{_listed(differ)} differ" if differ else "what they compute differs"
    return (
        f"{title}: two builds with one seed are different networks: {what}. Each worker would train another one. Draw random numbers "
        "from torch, from numpy's np.random.* functions or from random, which are seeded, or give a fixed seed."
    )


def _listed(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _differing(one: nn.Module, other: nn.Module, kinds: tuple[type, ...] = (object,)) -> list[str]:
    """Names of plain attributes of one of these `kinds`, also within others, that only one has, or with another value."""
    mine, others = (_attributes(module) for module in (one, other))
    found = [
        name for name, value in mine.items() if isinstance(value, kinds) and not (name in others and _equal(value, others[name]))
    ]
    return found + [name for name, value in others.items() if isinstance(value, kinds) and name not in mine]


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module holds besides parameters, buffers and modules, by name: plain values, and those within lists, dicts and objects."""
    found: dict[str, Any] = {}
    for path, part in module.named_modules():
        for key, value in list(vars(part).items()):
            if key not in OWN:
                _collect(f"{path}.{key}" if path else key, value, found, DEPTH)
    return found


def _collect(name: str, value: Any, found: dict[str, Any], depth: int) -> None:
    if name.rpartition(".")[2].startswith(COMPILER):
        return
    if isinstance(value, GENERATORS):
        if not any(value is seeded_one for seeded_one in GLOBAL):
            found[name] = value.get_state().numpy().tobytes() if isinstance(value, torch.Generator) else pickle.dumps(value)
        return
    if isinstance(value, LEAVES) or (isinstance(value, SEQUENCES) and value and all(isinstance(item, PLAIN) for item in value)):
        found[name] = value
    elif isinstance(value, (Mapping, *SEQUENCES)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for at, item in list(items) if depth else ():
            _collect(f"{name}[{at!r}]", item, found, depth - 1)
    elif depth and not isinstance(value, type) and not type(value).__module__.startswith(FOREIGN):
        for at, item in list(getattr(value, "__dict__", {}).items()):
            _collect(f"{name}.{at}", item, found, depth - 1)


def _equal(a: Any, b: Any) -> bool:
    return _told(a) == _told(b) and _same(a, b)


def _plain(value: Any) -> Any:
    """What is the same in each process."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy() if value.layout == torch.strided and not (value.is_quantized or value.is_meta) else 0
    if isinstance(value, np.ndarray):
        return value.tobytes() if value.dtype != object else 0
    return (
        sorted(map(repr, value)) if isinstance(value, set | frozenset) else list(value) if isinstance(value, SEQUENCES) else value
    )


def _told(value: Any) -> tuple:
    """What kind of a value it is: type and shape."""
    return (value.dtype, tuple(value.shape)) if isinstance(value, torch.Tensor | np.ndarray) else (type(value),)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        if a.layout != torch.strided or a.is_quantized or a.is_meta:
            return True
        a, b = a.detach(), b.detach()
        return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, np.ndarray):
        return a.dtype == object or np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
    return bool(a == b) or (a != a and b != b)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _memory(module: nn.Module) -> set[int]:
    """Addresses of the tensors of a module, and of what they lie in."""
    found: set[int] = set()
    for tensor in _tensors(module):
        found.add(id(tensor))
        if (
            not isinstance(tensor, UninitializedParameter | UninitializedBuffer)
            and tensor.layout == torch.strided
            and tensor.numel()
        ):
            found.add(-tensor.untyped_storage().data_ptr())
    return found - {0}
