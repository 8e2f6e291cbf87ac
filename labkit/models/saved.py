"""A trained network as one file that is opened without labkit, by its ending.

    .pt2     a program (torch.export)       torch.export.load(path).module()(x)
    .onnx    the same as ONNX               onnxruntime.InferenceSession(path).run(None, {"x": x})
    .pt      its weights by name            module.load_state_dict(torch.load(path)), of the network alone or with its normalisation

Programs take any number of samples. No file holds pickled code.

Used by `labkit.training.run` for `Run.save`.
"""

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labkit.errors import ProblemError, calling, did_you_mean

ENDINGS = (".pt2", ".onnx", ".pt")


def ending(path: Path) -> str:
    """The ending of a path, if it is one of `ENDINGS`; ValueError otherwise."""
    if path.suffix not in ENDINGS:
        near = did_you_mean(path.suffix, ENDINGS) if path.suffix else ""
        raise ValueError(f"path={str(path)!r} must end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}.{near}")
    return path.suffix


def contents(module: nn.Module, inputs: Any, names: Sequence[str], kind: str) -> bytes:
    """What the file of this `kind` holds of a module that is called as `module(*inputs)` with two samples; each of the tensors in it
    has one of the `names`. ProblemError where the module cannot be made a program, or a package for that is missing."""
    file = io.BytesIO()
    if kind == ".pt":
        torch.save({name: tensor.detach() for name, tensor in module.state_dict().items()}, file)
        return file.getvalue()
    if kind == ".onnx" and importlib.util.find_spec("onnxscript") is None:
        raise ProblemError("a network is written as .onnx by onnxscript, which is not here. pip install 'labkit[onnx]'")
    title = f"saving as {kind} (the weights alone, as .pt, can be saved of each network)"
    with _quiet(), calling(title, passes=()):
        program = torch.export.export(module, inputs, dynamic_shapes=_any_number(inputs))
        if kind == ".onnx":
            made = torch.onnx.export(program, dynamo=True, input_names=list(names), output_names=["outputs"], verbose=False)
            return made.model_proto.SerializeToString()
        torch.export.save(program, file)
    return file.getvalue()


def _any_number(inputs: Any) -> Any:
    """The first axis of each tensor is of any length."""
    if isinstance(inputs, torch.Tensor):
        return {0: torch.export.Dim.DYNAMIC}
    return tuple(_any_number(one) for one in inputs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of its own packages while it exports."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
