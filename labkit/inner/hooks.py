"""Hooks on parameters in a step that is split: called once, with the gradient of the whole batch, as a backward pass would.

    taken_off(parameters)   their gradients come in parts, on several threads: no hook is called
    add(parameter, sum)     hooks of the tensor (`register_hook`) -> `.grad` -> `register_post_accumulate_grad_hook`

Used by `labkit.inner.samples`, `labkit.inner.executor`, `labkit.inner.engine` and `labkit.problems.supervised`.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

KINDS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def has_hooks(parameter: nn.Parameter) -> bool:
    """Is something to be called with its gradient?"""
    return any(getattr(parameter, kind) for kind in KINDS)


@contextlib.contextmanager
def taken_off(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """In here the parameters have no hooks."""
    held = [(hooks, dict(hooks)) for parameter in parameters for kind in KINDS if (hooks := getattr(parameter, kind))]
    for hooks, _ in held:  # torch and the handles by which they are removed know these dicts
        hooks.clear()
    try:
        yield
    finally:
        for hooks, own in held:
            hooks.update(own)


def add(parameter: nn.Parameter, gradient: torch.Tensor) -> None:
    """Adds to `.grad` the gradient of a batch, which nobody else holds, through the hooks of the parameter if it has any."""
    if has_hooks(parameter):
        torch.autograd.backward(parameter, gradient)
    else:
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
