"""The state of a module as one flat float32 vector: what a worker receives, sends, and what a checkpoint holds.

    vector = [ weight of layer 1 | bias of layer 1 | ... | running mean | ... | bytes of the other buffers ]
               parameters, float32                         buffers, float32     one number 0..255 a byte

Parameters and float32 buffers are views into the vector, so a pull is received straight into the model and a push is sent straight
out of it. Buffers of any other type (counters, flags, indices, float64), and those that begin with infinity (a mask, say), must come
through bit for bit: they are views into one vector of bytes, which `pack` and `unpack` convert at once. A byte is exact in every
precision of the wire.

A module may replace the memory of its tensors (`p.data = ...`, `self.mean = 0.9 * self.mean + ...`) at any time; `pack` and
`unpack` compare addresses, copy the values back and point the module at the vector again.

Used by the replica of a worker, and wherever a stored vector becomes a model; `labkit.runs.checkpoints.Layout` describes the vector
without torch.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from labkit.errors import ProblemError

Shapes = dict[str, tuple[int, ...]]


class Slot(NamedTuple):
    """Where a module holds a tensor: `held[key]`, which should be `tensor` and lie where `view` does, in the vector or the bytes."""

    name: str
    what: str  # "parameter" or "buffer"
    held: Mapping[str, torch.Tensor | None]
    key: str
    tensor: torch.Tensor
    view: torch.Tensor

    def now(self) -> torch.Tensor | None:
        return self.held[self.key] if self.key in self.held else None  # noqa: SIM401  a scripted module has no `get`


class Flat:
    """All tensors of a module as one `vector` (n,) on `device`.

    `shapes` are the shapes of parameters and of float32 buffers by their names, in the order of the vector, and types and shapes of
    the buffers that travel as bytes; with exact=False these stay outside, as in runs of format 3 and before. Tensors that are one
    (tied weights) are one in the vector. ProblemError, by name, for what cannot be in it.
    """

    def __init__(self, module: torch.nn.Module, device: str = "cpu", exact: bool = True) -> None:
        for name, _, _, tensor, what in _held(module):
            if why := _unfit(tensor, what):
                raise ProblemError(f"{what} {name!r} {why}")
        first = _first_of_each(module)  # before it moves: afterwards each has memory of its own
        own = [(name, tensor, what) for name, _, _, tensor, what in _held(module) if first[name] == name]
        params = {name: tensor for name, tensor, what in own if what == "parameter"}
        others = {name: tensor for name, tensor, what in own if what == "buffer"}
        buffers = {name: tensor for name, tensor in others.items() if _is_averaged(tensor, exact)}
        # The widest first, so that every view of the bytes is aligned.
        odd = sorted(set(others) - set(buffers), key=lambda name: (-others[name].element_size(), list(others).index(name)))
        odd = {name: others[name] for name in odd if exact}
        values = {name: tensor.detach() for name, tensor in (params | others).items()}
        module.to(device)
        self.n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in odd.values())
        size = sum(tensor.numel() for tensor in (*params.values(), *buffers.values()))
        self.vector = torch.empty(size + self.n_bytes, device=device)
        self.bytes = torch.empty(self.n_bytes, dtype=torch.uint8, device=device)
        views, start = {}, 0
        for name, tensor in (params | buffers).items():
            views[name], start = self.vector[start : start + tensor.numel()].view(tensor.shape), start + tensor.numel()
        start = 0
        for name, tensor in odd.items():
            n = tensor.numel() * tensor.element_size()
            views[name], start = self.bytes[start : start + n].view(tensor.dtype).view(tensor.shape), start + n
        for name, view in views.items():
            view.copy_(values[name])
        self.module, self.slots, self.addresses = module, [], []
        for name, held, key, tensor, what in _held(module):
            if (view := views.get(first[name])) is not None:
                tensor.data = view
                self.slots.append(Slot(name, what, held, key, tensor, view))
                self.addresses.append((held, key, view.data_ptr()))
        shapes = ({name: tuple(tensor.shape) for name, tensor in some.items()} for some in (params, buffers))
        self.shapes = (*shapes, {name: (_kind(tensor), tuple(tensor.shape)) for name, tensor in odd.items()})
        self.pack()

    def pack(self) -> torch.Tensor:
        """The vector, with the state of the module as it is now; ProblemError, by name, for what has left it."""
        self._point(take=True)
        if self.n_bytes:
            self.vector[-self.n_bytes :].copy_(self.bytes)
        return self.vector

    def unpack(self) -> None:
        """The vector has been written: the module goes on from it."""
        self._point(take=False)
        if self.n_bytes:
            self.bytes.copy_(self.vector[-self.n_bytes :])

    def load(self, weights: torch.Tensor) -> None:
        """Go on from `weights` (n,), on any device."""
        self.vector.copy_(weights)
        self.unpack()

    def saved(self) -> torch.Tensor:
        """A copy of the vector as it is now, for `load`."""
        return self.pack().clone()

    def _point(self, take: bool) -> None:
        """Whatever no longer lies in the vector does so again, with its own values (`take`) or with those of the vector."""
        with contextlib.suppress(KeyError, AttributeError, RuntimeError):  # one is gone, or has no address
            if all(held[key].data_ptr() == at for held, key, at in self.addresses):  # nearly always, and at each push: quick
                return
        moved = [slot for slot, (*_, at) in zip(self.slots, self.addresses, strict=True) if _address(slot.now()) != at]
        for slot in moved:
            self._check_moved(slot)
        for slot in moved if take else ():
            slot.view.copy_(slot.held[slot.key].detach())
        for slot in moved:
            if slot.held[slot.key] is not slot.tensor:  # a buffer that was assigned anew
                slot.held[slot.key] = slot.tensor
            slot.tensor.data = slot.view

    def _check_moved(self, slot: Slot) -> None:
        """Can a tensor that has left the vector be put back?"""
        now, where = slot.now(), f"{slot.what} {slot.name!r}"
        if now is None:
            raise ProblemError(f"{where} has gone from the module during training. Keep it, and change its values in place.")
        if slot.what == "parameter" and now is not slot.tensor:
            raise ProblemError(
                f"{where} was replaced by a new Parameter during training, which the optimiser does not know. Change its values in "
                f"place: with torch.no_grad(): module.{slot.name}.copy_(...)."
            )
        if now.shape != slot.view.shape or now.dtype != slot.view.dtype or now.layout != torch.strided:
            before, after = (f"{_kind(t)} {tuple(t.shape)}" for t in (slot.view, now))
            raise ProblemError(f"{where} has changed from {before} to {after} during training; its type and shape must stay.")
        for other in self.slots:
            if other.view is slot.view and _address(other.now()) != _address(now):
                raise ProblemError(
                    f"{slot.name!r} and {other.name!r} were one tensor, and became two during training. Change their values in place."
                )

    def not_finite(self) -> list[str]:
        """Names of what a rule computes with, parameters and buffers, that holds NaN or infinity now."""
        self.pack()
        computed = {**self.shapes[0], **self.shapes[1]}
        return [slot.name for slot in self.slots if slot.name in computed and not torch.isfinite(slot.view).all()]

    def appeared(self) -> list[str]:
        """Names of tensors that the module has got since; they are in no vector."""
        known = {slot.name for slot in self.slots}
        return [name for name, *_ in _held(self.module) if name not in known]


def _held(module: torch.nn.Module) -> Iterator[tuple[str, Mapping, str, torch.Tensor, str]]:
    """Name, where it is held and by which key, tensor, "parameter" or "buffer": of all, parameters first, aliases too."""
    parts = [(f"{path}." if path else "", part) for path, part in module.named_modules()]
    for what in ("parameter", "buffer"):
        for prefix, part in parts:
            held = part._parameters if what == "parameter" else part._buffers
            for key, tensor in list(held.items()):
                if tensor is not None:
                    yield f"{prefix}{key}", held, key, tensor, what


def _is_averaged(buffer: torch.Tensor, exact: bool) -> bool:
    """Is a buffer among the numbers that a rule averages?"""
    return buffer.dtype == torch.float32 and (not exact or bool(torch.isfinite(buffer).all()))


def _address(tensor: torch.Tensor | None) -> int:
    return -1 if tensor is None or tensor.layout != torch.strided else tensor.data_ptr()


def _kind(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _first_of_each(module: torch.nn.Module) -> dict[str, str]:
    """For each tensor, by name, the name under which the same memory comes first; ProblemError where memory is shared in part."""
    found, taken = {}, {}
    for name, _, _, tensor, _ in _held(module):
        storage = tensor.untyped_storage().data_ptr() if tensor.numel() else 0
        begin, where = tensor.data_ptr(), (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        others = taken.setdefault(storage, []) if storage else []
        alias = next((other for other, its, *_ in others if its == where), name)
        if alias == name:
            end = begin + tensor.element_size() * (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)))
            if cut := next((other for other, _, start, stop in others if start < end and begin < stop), None):
                raise ProblemError(f"{name!r} and {cut!r} share a part of their memory. Give each its own: use clone().")
            others.append((name, where, begin, end))
        found[name] = alias
    return found


def _unfit(tensor: torch.Tensor, what: str) -> str:
    """Why this tensor cannot be in a flat vector; "" where it can."""
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        return "has no shape yet: no forward pass of `evaluate` reaches its lazy layer. Call the layer, or leave it out."
    if tensor.is_meta:
        return "is on the device 'meta', without values. Make the model with values, for instance by module.to_empty() and init."
    if tensor.layout != torch.strided or tensor.is_quantized:
        return (
            f"is {'quantised' if tensor.is_quantized else 'sparse'}; only dense tensors can be trained here. Use tensor.to_dense()."
        )
    if what == "parameter" and tensor.dtype != torch.float32:
        advice = "two float32 parameters, its real and its imaginary part" if tensor.is_complex() else "float32 weights"
        return f"is {_kind(tensor)}, not float32. Give it {advice}; precision='bfloat16' computes in 16 bits over float32 weights."
    return ""
