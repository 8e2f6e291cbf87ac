"""Flat weight vectors: all tensors of a module as views into one float32 vector, parameters first, then floating-point buffers.

    vector = [ weight of layer 1 | bias of layer 1 | ... | running mean | running variance | ... ]

So a pull is received straight into the model and a push is sent straight out of it.

Used by the replica of a worker, and wherever a stored vector becomes a model; `labkit.runs.checkpoints.Layout` describes the vector
without torch.
"""

import torch

from labkit.errors import WorkerError

Shapes = dict[str, tuple[int, ...]]


def flatten(module: torch.nn.Module, device: str = "cpu") -> tuple[torch.Tensor, Shapes, Shapes]:
    """Move the module to `device` and make all its tensors views into one flat float32 vector.

    Returns the vector, and the shapes of the parameters and of the buffers in it by their names, in its order. Integer buffers
    stay outside. WorkerError where a tensor is not float32.
    """
    module.to(device)
    params = dict(module.named_parameters())
    buffers = {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    tensors = params | buffers
    if odd := [name for name, tensor in tensors.items() if tensor.dtype != torch.float32]:
        raise WorkerError(f"tensors {odd[:3]} are not float32. Keep float32 weights; use precision='bfloat16' for speed.")
    flat = torch.empty(sum(tensor.numel() for tensor in tensors.values()), device=device)
    for tensor, part in zip(tensors.values(), flat.split([tensor.numel() for tensor in tensors.values()]), strict=True):
        part = part.view(tensor.shape)
        part.copy_(tensor.detach())
        tensor.data = part
    params, buffers = ({name: tuple(tensor.shape) for name, tensor in some.items()} for some in (params, buffers))
    return flat, params, buffers
