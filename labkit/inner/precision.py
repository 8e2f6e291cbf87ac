"""In which precision a worker computes: bfloat16 where that is native, quicker and right, decided layer by layer.

    no instructions for bfloat16         ->  float32
    each distinct layer, once a process  ->  seconds (interleaved, medians) and errors, against float32
    slower or wrong in bfloat16          ->  that layer stays in float32 (`keep`): by name, with the numbers
    sums over the layers                 ->  is bfloat16 worth it, and are channels to be innermost in memory?

Strided, dilated and grouped convolutions in bfloat16 are many times slower than in float32, or wrong, in some builds of torch
(pytorch issues 183815, 169688), so nothing is assumed of any layer. Layers are compared on random numbers of their shapes, forward
and backward; what lies between them (activations, pooling, normalisation) is not measured.

The decision goes by the clock, so another process may decide otherwise: a `Precision` is what a run has to record.

Used by `labkit.problems.problem`, by the workers of a run, and by replays, which do as was recorded.
"""

import math
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

KINDS = {  # a layer is of the first of which it is an instance
    kind.__name__: kind
    for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
}
INSTRUCTIONS = ("amx_bf16", "amx_tile", "avx512_bf16", "sve_bf16", "bf16")  # as torch names them; the last two are of ARM
SAMPLES = 32  # of a batch, at most: workers are waited for
LEAST, MOST = 3, 9  # rounds of a comparison
ENOUGH_S, LONG_S = 0.1, 0.5  # seconds after which LEAST rounds are enough, and after which one is
SLOWER = 1.2  # times as long as in float32: below that a layer is not worth a line
MATTERS = 0.01  # of the time of all layers: what a slow layer loses, to be worth one
# The largest error of any number, over the root of the mean square of all of them: rounding makes 0.005 to 0.1 (measured, also where
# bfloat16 is emulated and weight gradients are added up in it), and one number that is wrong about 1.
WRONG = 0.3
WORTH = 0.95  # of the time as it was: what another layout or dtype must stay below
SHOWN = 3  # names in a line


@dataclass(frozen=True)
class Precision:
    """What a worker computes in: autocast to `dtype` over float32 weights, `channels_last` or not.

    `float32` are the layers that stay in float32, by name, and why; `why` says the same of the dtype, and `host` for which
    device, torch and number of threads it was decided. As a dict (`dataclasses.asdict`) it is an entry of the event "join".
    """

    dtype: str
    channels_last: bool = False
    float32: Mapping[str, str] = field(default_factory=dict)
    why: str = ""
    host: str = ""

    def lines(self) -> list[str]:
        """What a user should know: the dtype, unless there is nothing to say of it; then one line for layers of one shape that stay
        in float32."""
        last = ", channels last" if self.channels_last else ""
        found = [f"{self.dtype}{last}: {self.why}"] if self.why else []
        for why in dict.fromkeys(self.float32.values()):
            names = [name for name, own in self.float32.items() if own == why]
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            kind, _, reason = why.partition(": ")
            stay = "stay" if len(names) > 1 else "stays"
            found.append(f"{', '.join(names[:SHOWN])}{more} ({kind}) {stay} in float32: {reason}")
        return found


class Layer(NamedTuple):
    """All that the speed and the rounding of a layer depend on."""

    kind: str
    arguments: tuple[tuple[str, Any], ...]  # of its constructor
    shape: tuple[int, ...]  # of its input
    has_input_gradient: bool
    device: str
    threads: int

    def __str__(self) -> str:
        """Its kind, and what of a convolution is not as usual."""
        unusual = {"stride": 1, "dilation": 1, "groups": 1, "padding_mode": "zeros"}
        given = {name: value for name, value in self.arguments if name in unusual}
        given = {name: value[0] if isinstance(value, tuple) and len({*value}) == 1 else value for name, value in given.items()}
        return ", ".join([self.kind, *(f"{name}={value}" for name, value in given.items() if value != unusual[name])])


class Mode(NamedTuple):
    dtype: str
    channels_last: bool


class Found(NamedTuple):
    """Of a layer in a mode: median seconds of a forward and a backward pass (NaN: not timed), and errors by what is wrong."""

    seconds: float
    errors: Mapping[str, float]


def native(device: str = "cpu") -> tuple[bool, str]:
    """Has the device instructions for bfloat16? And its instruction set, or the name of the card."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_name(device)
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
    else:  # before torch 2.10 or so
        checks = {"amx_tile": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}
        capabilities = {name: getattr(torch.cpu, check, bool)() for name, check in checks.items()}
    found = [name for name in INSTRUCTIONS if capabilities.get(name)]
    return bool(found) and torch.backends.mkldnn.is_available(), ", ".join([torch.backends.cpu.get_cpu_capability(), *found])


def host(device: str = "cpu") -> str:
    """Of what a decision holds: it depends on nothing else but the network and its batches."""
    return f"{native(device)[1]}; torch {torch.__version__}; {torch.get_num_threads()} thread(s)"


def layers_of(module: nn.Module, step: Callable[[], object], device: str = "cpu") -> dict[str, Layer]:
    """The convolutions and linear layers of `module` that `step()` calls, by name, each with the largest input that it is given."""
    found: dict[str, Layer] = {}

    def called(name: str, part: nn.Module, inputs: tuple, named: dict) -> None:
        x = (*inputs, *named.values())[:1]
        if x and isinstance(x[0], torch.Tensor):
            layer = _layer(part, x[0], device)
            if name not in found or math.prod(layer.shape) > math.prod(found[name].shape):
                found[name] = layer

    kinds = tuple(KINDS.values())
    hooks = [
        part.register_forward_pre_hook(partial(called, name), with_kwargs=True)
        for name, part in module.named_modules()
        if isinstance(part, kinds)
    ]
    try:
        step()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _layer(part: nn.Module, x: torch.Tensor, device: str) -> Layer:
    kind = next(name for name, kind in KINDS.items() if isinstance(part, kind))
    names = ("in_features", "out_features")
    if kind != "Linear":
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        names += ("output_padding",) if "Transpose" in kind else ()
    arguments = (*((name, getattr(part, name)) for name in names), ("bias", part.bias is not None))
    return Layer(kind, arguments, tuple(x.shape), x.requires_grad, device, torch.get_num_threads())


_compared: dict[tuple, dict[Mode, Found]] = {}
_comparing = threading.RLock()  # workers that are threads: one measures, and the others have it from there


def compare(layer: Layer, modes: tuple[Mode, ...], timed: bool = True) -> dict[Mode, Found]:
    """A layer in several modes, errors against the first of them; measured once in a process."""
    with _comparing:
        key = layer, modes, timed
        if key not in _compared:
            _compared[key] = _compare(layer, modes, timed)
        return _compared[key]


def _compare(layer: Layer, modes: tuple[Mode, ...], timed: bool) -> dict[Mode, Found]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(layer.device)

    with torch.enable_grad():
        twin = nn.utils.skip_init(KINDS[layer.kind], device=layer.device, **dict(layer.arguments))
        for parameter in twin.parameters():
            parameter.data.copy_(normal(*parameter.shape) / math.sqrt(max(1, parameter[0].numel())))
        x, calls, gradient = normal(*layer.shape), {}, None
        for mode in modes:
            own = laid_out(x) if mode.channels_last and layer.kind != "Linear" else x.clone()
            if layer.has_input_gradient:  # it comes from a layer that has computed in this dtype
                own = own.to(getattr(torch, mode.dtype)).requires_grad_()
            out = _forward(twin, own, mode)
            gradient = normal(*out.shape) if gradient is None else gradient
            calls[mode] = partial(_passes, twin, own, torch.empty_like(out).copy_(gradient), mode)
        results = {mode: call() for mode, call in calls.items()}
        seconds: dict[Mode, list[float]] = {mode: [] for mode in modes}
        began, n = time.perf_counter(), 0
        while timed and (not n or time.perf_counter() - began < (LONG_S if n < LEAST else ENOUGH_S if n < MOST else 0)):
            n += 1
            for mode, call in calls.items():
                seconds[mode].append(_seconds(call, layer.device))
    right = results[modes[0]]
    # The sum over a whole batch may happen to be near 0; its rounding goes by how many are summed.
    summed = {"bias gradient": math.sqrt(gradient.numel() / twin.bias.numel())} if twin.bias is not None else {}
    return {
        mode: Found(
            statistics.median(seconds[mode]) if timed else math.nan,
            {name: _error(made[name], right[name], summed.get(name, 0.0)) for name in right},
        )
        for mode, made in results.items()
    }


def _forward(twin: nn.Module, x: torch.Tensor, mode: Mode) -> torch.Tensor:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=mode.dtype == "bfloat16"):
        return twin(x)


def _passes(twin: nn.Module, x: torch.Tensor, gradient: torch.Tensor, mode: Mode) -> dict[str, torch.Tensor]:
    out = _forward(twin, x, mode)
    wanted = {f"{name} gradient": parameter for name, parameter in twin.named_parameters()}
    wanted |= {"input gradient": x} if x.requires_grad else {}
    return {"output": out.detach(), **dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), gradient), strict=True))}


def _seconds(call: Callable[[], object], device: str) -> float:
    started = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _error(found: torch.Tensor, right: torch.Tensor, least: float) -> float:
    right = right.float()
    scale = right.square().mean().sqrt().clamp(min=max(least, torch.finfo(torch.float32).tiny))
    return float(((found.float() - right).abs().max() / scale).nan_to_num(math.inf, math.inf))


def laid_out(x: torch.Tensor) -> torch.Tensor:
    """x (n, C, ...) with the channels as the innermost axis in memory; what has no spatial axes, or one, stays as it is."""
    if x.dim() < 4:
        return x
    # Not .contiguous(memory_format=...): that leaves one-channel images as they are, and convolutions slow.
    x = x.movedim(1, -1).contiguous()
    return x.view(-1).view(x.shape).movedim(-1, 1)


def choose(layers: Mapping[str, Layer], asked: str, channels_last: bool = False, device: str = "cpu") -> Precision:
    """What a network of these layers is to be trained in here, by comparing each of them.

    Parameters
    ----------
    asked : "bfloat16": that, but for layers which it computes wrongly. "auto": that where the device has instructions for it and
        the layers together are quicker, but for those that are slower or wrong in it; else float32.
    channels_last : True to have it whatever is measured. False: with "auto" where it is quicker, with "bfloat16" never.
    """
    able, what = native(device)
    of_host = host(device)
    if asked == "bfloat16":
        plain, half = Mode("float32", channels_last), Mode("bfloat16", channels_last)
        stay = {
            name: wrong for name, layer in layers.items() if (wrong := _wrong(layer, compare(layer, (plain, half), False)[half]))
        }
        slow = f"as asked, though {what} has no instructions for it; precision='auto' would take float32"
        return Precision("bfloat16", channels_last, stay, "" if able else slow, of_host)
    last = channels_last or any(len(layer.shape) > 3 and layer.kind != "Linear" for layer in layers.values())
    modes = tuple(dict.fromkeys([Mode("float32", channels_last), Mode("float32", last)]))
    half = Mode("bfloat16", last)
    if not able and len(modes) == 1:
        return Precision("float32", channels_last, {}, f"{what} has no instructions for bfloat16", of_host)
    found = {name: compare(layer, (*modes, half) if able else modes) for name, layer in layers.items()}
    total = {mode: sum(own[mode].seconds for own in found.values()) for mode in modes}
    best = modes[-1] if total[modes[-1]] < WORTH * total[modes[0]] else modes[0]
    if not able:
        return Precision("float32", best.channels_last, {}, f"{what} has no instructions for bfloat16", of_host)
    stay = {
        name: why
        for name, own in found.items()
        if (why := _wrong(layers[name], own[half]) or _slow(layers[name], own[half], own[modes[-1]], total[modes[-1]]))
    }
    mixed = sum(own[modes[-1] if name in stay else half].seconds for name, own in found.items())
    if mixed < WORTH * total[best]:
        return Precision("bfloat16", last, stay, f"{total[best] / mixed:.1f}x as fast as float32 ({what})", of_host)
    ratio = f" (layers take {mixed / total[best]:.2f}x as long)" if total[best] else ""
    return Precision("float32", best.channels_last, {}, f"bfloat16 is no quicker here{ratio}", of_host)


def _wrong(layer: Layer, half: Found) -> str:
    what, error = max(half.errors.items(), key=lambda item: item[1])
    return f"{layer}: bfloat16 makes its {what} wrong, by {error:.2g} of its size" if not error < WRONG else ""


def _slow(layer: Layer, half: Found, plain: Found, total: float) -> str:
    is_slow = half.seconds > SLOWER * plain.seconds and half.seconds - plain.seconds > MATTERS * total
    return f"{layer}: bfloat16 takes {half.seconds / plain.seconds:.1f}x as long" if is_slow else ""


def keep(module: nn.Module, names: Iterable[str]) -> None:
    """Have the layers of these names compute in float32 under autocast too (those of float64 weights in that), inputs cast; whatever else
    the module is stays.

    They get a `forward` of their own, which copies, pickles and wrappers have too, around one that they have already. For a module
    that nobody else holds, such as the replica of a worker.
    """
    for name in names:
        layer = module.get_submodule(name)
        own = vars(layer).get("forward")
        if not (isinstance(own, partial) and own.func is _in_float32):
            layer.forward = partial(_in_float32, layer, own)


def _in_float32(layer: nn.Module, own: Callable[..., Any] | None, *inputs: Any, **named: Any) -> Any:
    weight = next(layer.parameters())
    dtype = weight.dtype if weight.is_floating_point() else torch.float32

    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    with torch.autocast(weight.device.type, enabled=False):
        forward = own or partial(type(layer).forward, layer)
        return forward(*map(cast, inputs), **{name: cast(x) for name, x in named.items()})
