"""A network as a list of layers: the place of each in the module, its inputs, and which rows of these a row of its output needs.

    trace(network, x)  ->  [batch, conv1, pool1, relu1, ..., dense2]

torch.fx records the calls of one forward pass, in which the shapes are those of `x` and no number is computed. A layer is of a kind

    conv, linear, norm     with weights; their gradients are tasks of their own
    dropout                its mask is drawn before the step
    each                   any function of each sample alone: ReLU, pooling, flatten, add, a cut, zeros at the rim
    whole                  a module that cannot be split: one task over the whole batch

Row o of a window (Chen et al. 2019, with stride S, padding P and filter height H_f) is made of the rows
o S - P ... o S - P + H_f - 1 of its input: so neighbouring blocks of rows share a rim.

Used by `labkit.inner.graph` and `labkit.inner.executor`.
"""

from __future__ import annotations

import copy
import math
import operator
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partialmethod
from types import FunctionType, NoneType
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from labkit.errors import ProblemError

KINDS = ("batch", "conv", "linear", "norm", "dropout", "each", "whole")
RECORDING = threading.Lock()  # what torch.fx has replaced it puts back in its own order


@dataclass(frozen=True)
class Window:
    """Which rows of its input a row of an output is made of; "rows" are the first axis behind the channels."""

    kernel: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    @property
    def reach(self) -> int:
        """From the first row of a window to its last."""
        return self.dilation * (self.kernel - 1)

    def needed(self, first: int, last: int) -> tuple[int, int]:
        """Input rows [top, bottom) for the output rows [first, last); some may lie in the padding, outside of the input."""
        return first * self.stride - self.padding, (last - 1) * self.stride - self.padding + self.reach + 1

    def touched(self, first: int, last: int, height: int) -> tuple[int, int]:
        """Output rows [low, high), of `height` in all, that the input rows [first, last) have a part in; none if high <= low."""
        low = -((self.reach - first - self.padding) // self.stride)
        return max(0, low), min(height, (last - 1 + self.padding) // self.stride + 1)


EACH_ROW = Window()


@dataclass(frozen=True, eq=False)
class Layer:
    """One operation of a network.

    Attributes
    ----------
    name : its place, "stage2.1.conv1"; of a function, the module that calls it and what it is, "stage2.1.add".
    kind : see above.
    op : what it computes, for tables: "conv", "relu", "max_pool2d", ...
    inputs : the numbers of the layers whose outputs it reads; 0 is the batch.
    shape : of the output for one sample.
    reference : to the user's own module, of a layer with weights; weak, so that a plan of steps keeps no network alive.
    function : f(*inputs) -> output of a layer without.
    window : which rows it needs; None if it needs all of them.
    """

    name: str
    kind: str
    op: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    reference: Callable[[], nn.Module | None] | None = None
    function: Callable[..., torch.Tensor] | None = None
    window: Window | None = None

    @property
    def module(self) -> nn.Module | None:
        """The user's own, of a layer with weights."""
        if self.reference and self.reference() is None:
            raise ReferenceError(f"the network of the layer {self.name} is gone; hold it as long as its layers are used.")
        return self.reference() if self.reference else None

    @property
    def height(self) -> int:
        """How many rows the output has."""
        return self.shape[1] if len(self.shape) > 1 else 1

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of its module that are trained."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad] if self.module else []

    @property
    def logical_tasks(self) -> int:
        """K_C = H_a x W_a of BPT-CNN: the elements of one output map, each a task of its own in the paper; 0 if it is no convolution."""
        return math.prod(self.shape[1:]) if self.kind == "conv" else 0


def trace(module: nn.Module, x: torch.Tensor, whole: bool | Sequence[str] = ()) -> list[Layer]:
    """The layers of `module` for a batch like `x` (samples first), each behind those that it reads; the last one is the output.

    Parameters
    ----------
    whole : names of modules that are one layer each, of kind "whole", whatever is in them; True for those that cannot be split: the
        smallest module round what no rule covers that maps tensors to a tensor. Without, that is a ProblemError that names it.
    """
    names = dict(module.named_modules())
    wholes = set() if isinstance(whole, bool) else set(whole)
    if wrong := [name for name in wholes if name not in names or not name]:
        raise ProblemError(f"whole={list(whole)}: the network has no module {wrong[0]!r}. It has {', '.join(filter(None, names))}.")
    while True:
        try:
            return _layers(module, x, wholes)
        except _Misfit as found:
            raise found.args[0] from None
        except _Unsupported as found:
            place = found.place
            while place and place in wholes:  # it is a layer already, and its output is no tensor: the module around it
                place = place.rpartition(".")[0]
            if whole is not True or place in wholes:
                raise ProblemError(_message(module, found)) from found.__cause__
            wholes.add(place)


def padding_of(conv: nn.Module) -> tuple[int, ...]:
    """On each side of each axis; "same" and "valid" as numbers."""
    if conv.padding == "valid":
        return (0,) * len(conv.kernel_size)
    if conv.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return tuple(conv.padding)


class _Unsupported(Exception):
    """Something has no rule; `place` is the module that contains it."""

    def __init__(self, place: str, what: str) -> None:
        super().__init__(place, what)
        self.place, self.what = place, what


class _Misfit(Exception):
    """A layer that can be split does not take its input, as in plain torch."""


def _message(module: nn.Module, found: _Unsupported) -> str:
    kind = type(module.get_submodule(found.place)).__name__
    name = f"{found.place} ({kind})" if found.place else f"the network itself ({kind})"
    return (
        f"{name} cannot be split into tasks: {found.what}. Have one thread compute it for the whole batch, with "
        f"Inner(whole={[found.place] if found.place else True}), or share the step by its samples, with Inner(split='samples'). "
        f"What can be split: {', '.join(sorted(rule.__name__ for rule in MODULES))}; as functions {', '.join(sorted(FUNCTIONS))}."
    )


# -- what a recording depends on --------------------------------------------------------------------------------------------

OWN = frozenset(vars(nn.Module())) - {"training"}  # attributes that every module has
PLAIN = frozenset([int, float, complex, bool, str, bytes, NoneType, torch.device, torch.dtype])
FOREIGN = (
    "torch",
    "builtins",
    "functools",
    "numpy",
    "logging",
    "threading",
    "_thread",
    "weakref",
)  # whose objects are not looked into
DEPTH = 3  # within an attribute


def attributes(part: nn.Module) -> dict[str, Any]:
    """What a module holds besides parameters, buffers and modules, such as the p of a dropout, in a form that can be compared.

    Numbers and strings by value, also within lists, dicts and objects; of other objects, tensors among them, which they are.
    """
    return {name: value if type(value) in PLAIN else _plain(value) for name, value in vars(part).items() if name not in OWN}


def _plain(value: Any, depth: int = DEPTH) -> Any:
    if type(value) in PLAIN or (type(value) is tuple and PLAIN.issuperset(map(type, value))):
        return value
    if isinstance(value, torch.Tensor):
        return id(value), 0 if value.is_inference() else value._version
    if isinstance(value, nn.Module) or not depth:
        return id(value)
    if isinstance(value, dict):
        return tuple((_plain(key, 0), _plain(item, depth - 1)) for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(_plain(item, depth - 1) for item in value)
    if type(value).__module__.partition(".")[0] in FOREIGN:
        return weakref.ref(value) if isinstance(value, FunctionType) else id(value)
    return id(value), tuple(_plain(item, depth - 1) for item in getattr(value, "__dict__", {}).values())


def state_of(module: nn.Module, without: Iterable[nn.Module] = ()) -> tuple:
    """Equal for two moments at which `trace` gives the same layers of batches of one shape; what is in `without` does not count."""
    inside = {part for outer in without for part in outer.modules()}
    found: list[Any] = [parameter.requires_grad for parameter in module.parameters()]
    for part in module.modules():
        if part not in inside:
            found += [weakref.ref(part), has_hooks(part), *attributes(part).values()]
    return tuple(found)


def has_hooks(part: nn.Module) -> bool:
    """Is something else called with it, which a layer in its place would not call?"""
    return bool(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks)


# -- recording --------------------------------------------------------------------------------------------------------------


class _Samples(int):
    """The number of samples, where a network asks for it: another one in each block, so that nothing may be computed from it."""

    def _refuse(self, *other: Any) -> Any:
        raise TypeError("it computes with the number of samples")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __neg__ = _refuse


class _Sized(fx.Proxy):
    """A recorded value whose shape is known, so that a network may ask for it."""

    @property
    def shape(self) -> tuple[int, ...]:
        samples, *rest = self.node.meta["example"].shape
        return (_Samples(samples), *rest)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def _changed_by(self, operation: Callable[..., Any], other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    # torch.fx takes `y += 1` for `y = y + 1`, which changes no other name of y.
    __iadd__ = partialmethod(_changed_by, operator.iadd)
    __isub__ = partialmethod(_changed_by, operator.isub)
    __imul__ = partialmethod(_changed_by, operator.imul)
    __itruediv__ = partialmethod(_changed_by, operator.itruediv)


class _Tracer(fx.Tracer):
    """Records a network on a batch that has a shape and no numbers; modules named in `wholes` are not looked into."""

    def __init__(self, batch: torch.Tensor, wholes: set[str]) -> None:
        super().__init__()
        self.batch, self.wholes = batch, wholes
        self.thread, self.computing = threading.get_ident(), False

    @property
    def idle(self) -> bool:
        """torch.fx replaces `Module.__call__` for the whole process: calls of other threads, and those of an example, are not recorded."""
        return self.computing or threading.get_ident() != self.thread

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.wholes or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Sized(node, self)

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        made = super().create_proxy(*args, **kwargs)
        self.computing = True
        made.node.meta["example"] = self._example(made.node)
        self.computing = False
        return made

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if self.idle:
            return forward(*args, **kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except (_Unsupported, _Misfit):
            raise
        except Exception as error:  # whatever the user's forward raises where it is given no numbers
            raise _Misfit(error) if type(m) in MODULES else _Unsupported(self.path_of_module(m), _said(error)) from error

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        return attr_val if self.idle else super().getattr(attr, attr_val, parameter_proxy_cache)

    def _example(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.batch
        if node.op == "get_attr":
            return operator.attrgetter(node.target)(self.root)
        return _call(node, self.root)(*(source.meta["example"] for source in node.all_input_nodes))


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _record(module: nn.Module, x: torch.Tensor, wholes: set[str]) -> fx.Graph:
    """On a copy without numbers, so that BatchNorm's running statistics stay as they are."""
    with torch.no_grad(), RECORDING:
        network = _without_numbers(module)
        try:
            return _Tracer(x.detach().to("meta"), wholes).trace(network)
        except (_Unsupported, _Misfit):
            raise
        except Exception as error:
            raise _Unsupported("", _said(error)) from error


def _without_numbers(module: nn.Module) -> nn.Module:
    empty: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
    computed = (value for part in module.modules() for value in vars(part).values() if isinstance(value, torch.Tensor))
    empty |= {id(value): value.detach() for value in computed if not value.is_leaf}  # which torch cannot copy
    network = copy.deepcopy(module, empty | {id(buffer): buffer.to("meta") for buffer in module.buffers()})
    for part in network.modules():
        if getattr(part, "momentum", 0.1) is None:  # a BatchNorm that counts its batches
            part.momentum = 0.1
    return network


def _call(node: fx.Node, root: nn.Module, **changed: Any) -> Callable[..., Any]:
    """f(*tensors) that does what a node does, with the tensors that it reads; `changed` are other values of its keywords."""

    owner = weakref.ref(root)

    def function(*tensors: Any) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), dict(zip(node.all_input_nodes, tensors, strict=True)).__getitem__)
        if node.op == "call_module":
            return owner().get_submodule(node.target)(*args, **kwargs | changed)
        target = getattr(args[0], node.target.rstrip("_")) if node.op == "call_method" else _not_in_place(node.target)
        return target(*(args[1:] if node.op == "call_method" else args), **kwargs | changed)

    return function


# -- from calls to layers ---------------------------------------------------------------------------------------------------


def _layers(module: nn.Module, x: torch.Tensor, wholes: set[str]) -> list[Layer]:
    layers = [Layer("batch", "batch", "batch", (), tuple(x.shape[1:]), window=EACH_ROW)]
    if "" in wholes:
        with torch.no_grad():
            example = _without_numbers(module)(x.detach().to("meta"))
        if not _is_batch(example, x):
            raise _Unsupported("", "its output is not one tensor of the batch")
        return [
            *layers,
            Layer("network", "whole", type(module).__name__, (0,), tuple(example.shape[1:]), weakref.ref(module), _weakly(module)),
        ]
    _check(module, wholes)
    holder: dict[fx.Node, int] = {}  # the layer that has the value of a node
    names: dict[str, int] = {}
    nodes = list(_record(module, x, wholes).nodes)
    aliases, order = _aliases(nodes, module), {node: at for at, node in enumerate(nodes)}
    for node in nodes:
        if node.op == "placeholder" and not holder:
            holder[node] = 0
        elif node.op == "placeholder":
            if node.users:
                raise _Unsupported("", f"it has a second input, {node.target}")
        elif node.op == "output":
            if node.args[0] not in holder:
                raise _Unsupported("", "its output is not one tensor of the batch")
            return _reached(layers, holder[node.args[0]])
        elif node.op != "get_attr":
            place, sources, example = _place(node), node.all_input_nodes, node.meta["example"]
            for source in sources:
                if source not in holder:
                    raise _Unsupported(place, f"{_op(node)} reads {source.target}, which is no output of a layer")
            fields = {"kind": "each", "op": _op(node)} | _rule(node, module, place, wholes)
            if not sources or not _is_batch(example, x):
                raise _Unsupported(place, f"what {fields['op']} gives is not one tensor of the batch")
            name = node.target if node.op == "call_module" else f"{place}.{fields['op']}".lstrip(".")
            names[name] = names.get(name, 0) + 1
            name += f" ({names[name]})" if names[name] > 1 else ""
            inputs = tuple(holder[source] for source in sources)
            layers.append(Layer(name=name, inputs=inputs, shape=tuple(example.shape[1:]), **fields))
            holder[node] = len(layers) - 1
            for other in list(holder) if _in_place(node, module) else ():
                if aliases[other].tensor is aliases[node].tensor:
                    holder[other] = holder[node]  # who reads the value that was changed reads the new one
                elif aliases[other].memory is aliases[node].memory and any(order[user] > order[node] for user in other.users):
                    raise _Unsupported(
                        place, f"{fields['op']} changes memory in place that {other.name}, which is read afterwards, lies in too"
                    )
    raise AssertionError("a graph of torch.fx ends with its output")


class _Alias(NamedTuple):
    """The first value that is the same tensor as this one, and the first that lies in the same memory: a view of it, say."""

    tensor: fx.Node
    memory: fx.Node


def _aliases(nodes: Sequence[fx.Node], module: nn.Module) -> dict[fx.Node, _Alias]:
    found: dict[fx.Node, _Alias] = {}
    for node in nodes:
        sources = node.all_input_nodes if node.op != "output" else []
        own, changed = _memory(node), bool(sources) and _in_place(node, module)
        found[node] = _Alias(node, node)
        for source in sources[:1] if changed else sources:
            if changed or (own is not None and node.meta["example"] is source.meta.get("example")):
                found[node] = found[source]
                break
            if own is not None and own == _memory(source):
                found[node] = _Alias(node, found[source].memory)
    return found


def _memory(node: fx.Node) -> int | None:
    example = node.meta.get("example")
    return example.untyped_storage()._cdata if isinstance(example, torch.Tensor) else None


def _weakly(module: nn.Module) -> Callable[..., Any]:
    owner = weakref.ref(module)
    return lambda *tensors: owner()(*tensors)


def _is_batch(example: Any, x: torch.Tensor) -> bool:
    return isinstance(example, torch.Tensor) and example.dim() > 0 and example.shape[0] == x.shape[0]


def _reached(layers: list[Layer], last: int) -> list[Layer]:
    """The layers that the output depends on, with new numbers."""
    kept = {0, last}
    for number in reversed(range(len(layers))):
        kept.update(layers[number].inputs if number in kept else ())
    new = {number: i for i, number in enumerate(sorted(kept))}
    return [replace(layers[number], inputs=tuple(new[i] for i in layers[number].inputs)) for number in sorted(kept)]


def _check(module: nn.Module, wholes: set[str]) -> None:
    """What no rule of a single call sees: hooks, and a tensor that two modules share."""
    owners: dict[int, str] = {}
    for place, part in module.named_modules():
        if any(place == outer or place.startswith(f"{outer}.") for outer in wholes):
            continue
        if has_hooks(part):
            raise _Unsupported(place, "it has hooks")
        for name, parameter in part.named_parameters(recurse=False):
            if id(parameter) in owners:
                raise _Unsupported("", f"{owners[id(parameter)]} and {place}.{name} are one tensor")
            owners[id(parameter)] = f"{place}.{name}"


def _place(node: fx.Node) -> str:
    """The module whose forward makes this call; of a module, its own."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return node.target if node.op == "call_module" else stack[-1][0] if stack else ""


def _op(node: fx.Node) -> str:
    if node.op == "call_module":
        return "a call"
    name = _name(node)
    return {"getitem": "cut", "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "truediv"}.get(name, name).rstrip("_")


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _in_place(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return getattr(module.get_submodule(node.target), "inplace", False)
    return node.kwargs.get("inplace", False) or node.target in OUT_OF_PLACE or _name(node).rstrip("_") == _name(node)[:-1]


def _not_in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function that gives the same and changes nothing: torch.relu for torch.relu_."""
    name = getattr(function, "__name__", "")
    if name.rstrip("_") == name[:-1]:
        return next((getattr(home, name[:-1]) for home in (torch, F) if hasattr(home, name[:-1])), function)
    return OUT_OF_PLACE.get(function, function)


def _rule(node: fx.Node, module: nn.Module, place: str, wholes: set[str]) -> dict[str, Any]:
    """kind, op, module, function and window of the layer that a node is, as far as they are not the usual ones."""
    if node.op == "call_module":
        part = module.get_submodule(node.target)
        if node.target in wholes:
            return {"kind": "whole", "op": type(part).__name__, "reference": weakref.ref(part), "function": _call(node, module)}
        if type(part) not in MODULES:
            raise _Unsupported(place, "there is no rule for it")
        fields = MODULES[type(part)](part)
        if isinstance(fields, str):
            raise _Unsupported(place, fields)
        return {"op": type(part).__name__} | fields
    name = _op(node)
    if name not in FUNCTIONS or (node.op == "call_function" and not _of_torch(node.target)):
        raise _Unsupported(place, f"there is no rule for {name}, which it calls")
    fields = FUNCTIONS[name](node, [source.meta["example"] for source in node.all_input_nodes])
    if isinstance(fields, str):
        raise _Unsupported(place, f"{name}: {fields}")
    changed = {"inplace": False} if "inplace" in node.kwargs else {}
    return {"function": _call(node, module, **changed)} | fields


def _of_torch(function: Any) -> bool:
    name = getattr(function, "__name__", "")
    return any(getattr(home, name, None) is function for home in (torch, F, operator))


# -- the rules --------------------------------------------------------------------------------------------------------------


def _convolution(conv: nn.Module) -> dict[str, Any] | str:
    spread = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if conv.padding_mode != "zeros" or (conv.padding == "same" and any(reach % 2 for reach in spread)):
        return f"padding={conv.padding!r}, padding_mode={conv.padding_mode!r}"
    window = Window(conv.kernel_size[0], conv.stride[0], padding_of(conv)[0], conv.dilation[0])
    return {"kind": "conv", "reference": weakref.ref(conv), "window": window}


def _norm(norm: nn.Module) -> dict[str, Any]:
    return {"kind": "norm", "reference": weakref.ref(norm), "window": EACH_ROW}


def _linear(linear: nn.Module) -> dict[str, Any]:
    return {"kind": "linear", "reference": weakref.ref(linear)}


def _pointwise(part: nn.Module) -> dict[str, Any]:
    return {"function": _out_of_place(part), "window": EACH_ROW}


def _dropout(part: nn.Module) -> dict[str, Any]:
    kind = "dropout" if part.training and part.p > 0 else "each"
    return {"kind": kind, "function": _out_of_place(part), "window": EACH_ROW}


def _pool(pool: nn.Module) -> dict[str, Any]:
    kernel, stride, padding, dilation = (
        given[0] if isinstance(given := getattr(pool, name, default), tuple | list) else given
        for name, default in (("kernel_size", 1), ("stride", None), ("padding", 0), ("dilation", 1))
    )
    # Where the windows neither overlap nor leave a gap, each row of the input belongs to one of the output.
    apart = (stride in (None, kernel)) and padding == 0 and dilation == 1 and not pool.ceil_mode
    return {"function": pool, "window": Window(kernel, kernel) if apart else None}


def _all_rows(part: nn.Module) -> dict[str, Any]:
    return {"function": part}


def _out_of_place(part: nn.Module) -> nn.Module:
    part = copy.copy(part)
    if hasattr(part, "inplace"):
        part.inplace = False
    return part


MODULES: dict[type[nn.Module], Callable[[Any], dict[str, Any]]] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _norm),
    nn.Linear: _linear,
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), _pool),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), _all_rows),
    nn.Flatten: _all_rows,
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Softplus), _pointwise),
    nn.Identity: _pointwise,
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), _dropout),
}


def _each_row(node: fx.Node, inputs: Sequence[torch.Tensor]) -> dict[str, Any] | str:
    if any(isinstance(arg, _Samples) for arg in [*node.args, *node.kwargs.values()]):
        return "it computes with the number of samples"
    if any(x.dim() == 0 or x.shape[0] != inputs[0].shape[0] for x in inputs):
        return "its inputs have other numbers of samples"
    return {"window": EACH_ROW if len({x.shape for x in inputs}) == 1 else None}


def _anyhow(node: fx.Node, inputs: Sequence[torch.Tensor]) -> dict[str, Any]:
    return {}


def _pooling(node: fx.Node, inputs: Sequence[torch.Tensor]) -> dict[str, Any]:
    names = ("kernel_size", "stride", "padding", *(("dilation", "ceil_mode") if _op(node).startswith("max") else ("ceil_mode",)))
    given = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    pool = nn.Module()
    pool.__dict__.update({"ceil_mode": False, **given})
    return {"window": _pool(pool)["window"]}


def _drop(node: fx.Node, inputs: Sequence[torch.Tensor]) -> dict[str, Any]:
    p, training, *_ = [*node.args[1:3], *(0.5, True)[len(node.args) - 1 :]]
    drops = node.kwargs.get("p", p) > 0 and node.kwargs.get("training", training)
    return {"kind": "dropout" if drops else "each", "window": EACH_ROW}


def _cut(node: fx.Node, inputs: Sequence[torch.Tensor]) -> dict[str, Any] | str:
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if len(inputs) > 1 or not isinstance(inputs[0], torch.Tensor):
        return "only numbers and slices of one tensor"
    at = index.index(...) if ... in index else len(index)
    rest = (slice(None),) * (inputs[0].dim() - sum(item is not ... and item is not None for item in index))
    index = (*index[:at], *rest, *index[at + 1 :])
    if index[0] != slice(None):
        return "it takes some of the samples"
    rows = index[2] if len(index) > 2 else None
    by_rows = all(isinstance(item, slice) for item in index) and rows and rows.start is None and rows.stop is None
    return {"window": Window(1, rows.step or 1) if by_rows else None}


def _zeros(node: fx.Node, inputs: Sequence[torch.Tensor]) -> dict[str, Any] | str:
    pads = node.args[1] if len(node.args) > 1 else node.kwargs["pad"]
    by_axis = {inputs[0].dim() - 1 - i // 2: pads[i : i + 2] for i in range(0, len(pads), 2)}
    return {"window": EACH_ROW if not any(by_axis.get(2, ())) else None}


def _reshape(node: fx.Node, inputs: Sequence[torch.Tensor]) -> dict[str, Any] | str:
    shape = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
    if not (isinstance(shape[0], _Samples) or shape[0] == -1) or any(isinstance(side, _Samples) for side in shape[1:]):
        return "its first side is not the number of samples"
    rest = tuple(shape[1:])
    return {"function": lambda x: x.reshape(x.shape[0], *rest)}


def _mean(node: fx.Node, inputs: Sequence[torch.Tensor]) -> dict[str, Any] | str:
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    axes = [axes] if isinstance(axes, int) else axes
    mixed = axes is None or any(axis % inputs[0].dim() == 0 for axis in axes)
    return "it mixes the samples" if mixed else {}


def _joined(node: fx.Node, inputs: Sequence[torch.Tensor]) -> dict[str, Any]:
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return {"window": EACH_ROW if axis == 1 else None}


FUNCTIONS: dict[str, Callable[[fx.Node, Sequence[Any]], dict[str, Any] | str]] = {
    **dict.fromkeys(("relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "sigmoid", "tanh", "softplus"), _each_row),
    **dict.fromkeys(("add", "sub", "mul", "div", "truediv", "neg"), _each_row),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"), _pooling),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "flatten"), _anyhow),
    **dict.fromkeys(("view", "reshape"), _reshape),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d"), _drop),
    "cut": _cut,
    "pad": _zeros,
    "mean": _mean,
    **dict.fromkeys(("cat", "concat"), _joined),
}
OUT_OF_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
