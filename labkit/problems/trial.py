"""Whether a run can train what a problem builds: tried out in the kernel, before anything is started.

    built twice  ->  equal?  ->  evaluated  ->  one step  ->  one push  ->  rebuilt from the vector  ->  the same outputs?

Each process builds a module of its own, and what one sends the others is its flat vector (`labkit.models.flat`). So two builds must
be equal, and what a module is must be in the vector, or its other replicas, `Run.model` and a resumed run are other networks.

Used by `Problem.new_module` and `Problem.check`; `separate` by `labkit.subnets.result`.
"""

import copy
import math
import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from labkit.errors import ProblemError
from labkit.models import evaluating, seeded
from labkit.models.flat import Flat

OWN = frozenset(vars(nn.Module()))  # attributes that every module has
SHOWN = 3  # names in a message


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
    if is_lazy(module):
        with seeded(seed), evaluating(module):
            module(torch.zeros(2, *shape))
    return module


def is_lazy(module: nn.Module) -> bool:
    """Does it hold tensors whose shape is known at the first forward pass alone?"""
    return any(isinstance(tensor, UninitializedParameter | UninitializedBuffer) for tensor in _tensors(module))


def check_equal(one: Flat, other: Flat, title: str) -> None:
    """Refuse two builds with one seed that differ, by the names of what does."""
    differ = [a.name for a, b in zip(one.slots, other.slots, strict=False) if (a.name, *_told(a.view)) != (b.name, *_told(b.view))]
    equal_so_far = not differ and len(one.slots) == len(other.slots)
    differ = differ or [a.name for a, b in zip(one.slots, other.slots, strict=False) if not _same(a.view, b.view)]
    differ += [] if differ else _differing(one.module, other.module, (torch.Tensor, np.ndarray))
    if differ or not equal_so_far:
        raise ProblemError(_other_network(title, differ))


def check_outputs(one: nn.Module, other: nn.Module, evaluate: Callable[[nn.Module], Mapping], seed: int, title: str) -> None:
    """Refuse two builds with one seed that are evaluated differently although their tensors are equal."""
    if _evaluated_differently(one, other, evaluate, seed):
        raise ProblemError(_other_network(title, _differing(one, other)))


def check_rebuilt(one: Flat, other: Flat, evaluate: Callable[[nn.Module], Mapping], seed: int, title: str) -> None:
    """`one` has made a step, `other` has not: is it the same network once it has the vector of `one`?

    ProblemError where it is not, a warning where something else has changed that does not show in its outputs.
    """
    if new := one.appeared():
        raise ProblemError(
            f"{title} gets {_listed(new)} in its first step only. A run trains what is there before: make it in the constructor."
        )
    other.load(one.pack())
    differ = _evaluated_differently(one.module, other.module, evaluate, seed)
    changed = _differing(one.module, other.module)
    stays = "and is no parameter or buffer: it stays in each worker, and is in no push, no checkpoint and no run.model()"
    advice = "Make it a buffer: self.register_buffer(name, tensor)."
    if differ:
        what = f"{_listed(changed)} changes in a step" if changed else "something changes in a step that its outputs depend on"
        raise ProblemError(f"{title}: {what}, {stays}. {advice}")
    if changed:
        warnings.warn(f"{title}: {_listed(changed)} changes in a step, {stays}. If it matters: {advice}", stacklevel=4)


def _evaluated_differently(one: nn.Module, other: nn.Module, evaluate: Callable[[nn.Module], Mapping], seed: int) -> bool:
    def measured(module: nn.Module) -> dict[str, float]:
        with seeded(seed):
            return {name: float(value) for name, value in evaluate(module).items() if isinstance(value, numbers.Real)}

    a, b = measured(one), measured(other)
    return not _close(a, b) and _close(a, measured(one))  # what draws numbers of its own differs each time


def _close(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    return a.keys() == b.keys() and all(
        math.isclose(a[name], b[name], rel_tol=1e-4, abs_tol=1e-6) or (math.isnan(a[name]) and math.isnan(b[name])) for name in a
    )


def _other_network(title: str, differ: list[str]) -> str:
    what = f"{_listed(differ)} differ" if differ else "what they compute differs"
    return (
        f"{title}: two builds with one seed are different networks: {what}. Each worker would train another one. Draw random numbers "
        "from torch, from numpy's np.random.* functions or from random, which are seeded, or give a fixed seed."
    )


def _listed(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _differing(one: nn.Module, other: nn.Module, kinds: tuple[type, ...] = (torch.Tensor, np.ndarray, numbers.Number)) -> list[str]:
    """Names of plain attributes, also in a list or a dict there, that both have, of the same kind, with other values."""
    found, others = [], dict(other.named_modules())
    for path, part in one.named_modules():
        for key, value in list(vars(part).items()):
            if key not in OWN and path in others:
                name, there = f"{path}.{key}" if path else key, _items(getattr(others[path], key, None))
                pairs = [(f"{name}{at}", item, there[at]) for at, item in _items(value).items() if at in there]
                found += [at for at, a, b in pairs if isinstance(a, kinds) and _told(a) == _told(b) and not _same(a, b)]
    return found


def _items(value: Any) -> dict[str, Any]:
    """The value of an attribute, or what it holds, by what stands behind its name."""
    if isinstance(value, Mapping):
        return {f"[{at!r}]": item for at, item in value.items()}
    return {f"[{at}]": item for at, item in enumerate(value)} if isinstance(value, list | tuple) else {"": value}


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
    return a == b or (a != a and b != b)


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
