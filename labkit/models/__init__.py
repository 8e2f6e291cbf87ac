"""The models that have a name, and how a model is made from a name, an import path or a function.

A model is a function that returns a torch module, called as `f()`, `f(shape)` or `f(shape, n_outputs)`, where `shape` is that of
one sample; or a module that exists, of which each worker trains a copy. A model of the user's own needs no entry here.

Used by `labkit.problems`; `seeded` and `evaluating` also by users' own problems and wherever a module is called.
"""

import contextlib
import inspect
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from labkit.errors import ProblemError, known
from labkit.imports import imported, short
from labkit.models.cnn import lenet, resnet20, vgg3, vgg9
from labkit.names import face

__all__ = ["MODELS", "evaluating", "lenet", "make_model", "resnet20", "seeded", "vgg3", "vgg9"]
__getattr__, __dir__ = face(__name__)

MODELS: dict[str, Callable[..., nn.Module]] = {"lenet": lenet, "vgg3": vgg3, "vgg9": vgg9, "resnet20": resnet20}
_seeding = threading.RLock()  # workers in threads share the generators
_turns = threading.Condition()
_drawing: set[int] = set()  # threads in a step that may draw from torch's generator
_building: set[int] = set()  # threads that build a module from a seed
_modes = threading.Lock()
# By id of a part of a module: how often it is being evaluated, and was it in training before?
_evaluated: dict[int, tuple[int, bool]] = {}
WAIT_S = 1.0  # so long the two wait for each other at most: a step may wait for that of another worker


def check_model(model: str | Callable[..., nn.Module]) -> None:
    """Refuse what cannot be a model, without importing or calling anything: ValueError or TypeError."""
    if not (isinstance(model, str) or callable(model)):
        raise TypeError(
            f"model must be a name, an import path, a function that makes a module, or a module, not {describe(model)}. Give for "
            "instance the class, or lambda: nn.Sequential(...)."
        )
    if isinstance(model, str) and ":" not in model:
        known("model", model, MODELS, ' An import path "my_module:make_model" or a function will do as well.')


def make_model(
    model: str | Callable[..., nn.Module],
    shape: tuple[Any, ...],
    n_outputs: Any,
    arguments: Mapping[str, Any],
    seed: int,
) -> nn.Module:
    """The module that `model` makes for samples of `shape`; the same seed gives the same weights.

    A module is what every seed begins from. A function with two required positional parameters is called with (shape, n_outputs), one with one that is named for a shape with
    that, one without any with nothing; `arguments` go to it by keyword. Raises ProblemError where it has others, or returns no module.

    Examples
    --------
    >>> one, other = (labkit.models.make_model("lenet", (1, 8, 8), 10, {"width": 0.5}, seed=1) for _ in range(2))
    >>> all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
    True
    """
    title = f"model {describe(model)}"
    if isinstance(model, nn.Module):
        module, model = model, lambda: module
    make = model if callable(model) else imported(model) if ":" in model else MODELS[model]
    parameters = inspect.signature(make).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p.name for p in positional if p.default is p.empty and p.name not in arguments]
    if len(needed) not in (0, 2) and not (len(needed) == 1 and "shape" in needed[0]):  # one number might be anything
        raise ProblemError(
            f"{title} needs {len(needed)} positional argument(s): {', '.join(needed)}. A model is called as f(), f(shape) or "
            "f(shape, n_outputs); give others by model_args={...}."
        )
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        free = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in needed]
        for name in arguments:
            known(f"{title}: model_args", name, free, error=ProblemError)
    with seeded(seed):
        module = make(*(shape, n_outputs)[: len(needed)], **arguments)
    if not isinstance(module, nn.Module):
        raise ProblemError(f"{title} returned {short(module)} ({type(module).__name__}), not a torch.nn.Module.")
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ProblemError(f"{title} has no parameter to train.")
    return module


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """A step whose modules may draw from torch's generator (dropout), where other threads of the process build modules from seeds: one
    after the other."""
    with _turn(_drawing, _building, goes_first=False):
        yield


@contextlib.contextmanager
def _turn(mine: set[int], others: set[int], goes_first: bool) -> Iterator[None]:
    """This thread is in `mine` while nobody is in `others`; who `goes_first` keeps new ones out while it waits. Within either, nothing is
    waited for."""
    me = threading.get_ident()
    with _turns:
        is_outermost = me not in mine | others
        if is_outermost and goes_first:
            mine.add(me)
        if is_outermost:
            _turns.wait_for(lambda: not others, WAIT_S)
            mine.add(me)
    try:
        yield
    finally:
        if is_outermost:
            with _turns:
                mine.discard(me)
                _turns.notify_all()


@contextlib.contextmanager
def seeded(seed: int, alone: bool = False) -> Iterator[None]:
    """Draw from torch's CPU generator, numpy's global one and `random` as if just seeded, and leave them as they were.

    `alone`: no other thread is in a step meanwhile that might draw from them (`drawing`).

    Examples
    --------
    >>> def drawn():
    ...     with labkit.models.seeded(3):
    ...         return torch.rand(2)
    >>> torch.equal(drawn(), drawn())
    True
    """
    turn = _turn(_building, _drawing, goes_first=True) if alone else contextlib.nullcontext()
    with turn, _seeding, torch.random.fork_rng(devices=[]):
        before = random.getstate(), np.random.get_state()
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed every GPU
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """The module itself (not its DistributedDataParallel), in evaluation mode and without gradients; several threads may be inside at once.

    Examples
    --------
    >>> net = torch.nn.Dropout(0.5)
    >>> with labkit.models.evaluating(net) as plain:
    ...     plain(torch.ones(3))
    tensor([1., 1., 1.])
    >>> net.training
    True
    """
    if isinstance(module, DistributedDataParallel):
        module = module.module  # a forward pass of the wrapper may wait for the other workers
    parts = list(module.modules())
    with _modes:
        for part in parts:  # a part that another thread evaluates has been in training if it was before that
            others, training = _evaluated.get(id(part), (0, part.training))
            _evaluated[id(part)] = others + 1, training
    try:
        module.eval()
        with torch.no_grad():
            yield module
    finally:
        with _modes:
            for part in parts:
                n, training = _evaluated.pop(id(part))
                if n > 1:
                    _evaluated[id(part)] = n - 1, training
                elif training:
                    part.training = True


def describe(model: Any) -> str:
    """A model's name for messages."""
    return repr(model) if isinstance(model, str) else type(model).__name__ if isinstance(model, nn.Module) else short(model)
