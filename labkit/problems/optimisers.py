"""Optimisers: any of torch's by its name, with its settings, or a function of the parameters.

    "adamw"                                       with lr, weight_decay and momentum of the problem
    {"name": "rmsprop", "alpha": 0.9}             settings of its own, which count for more than those of the problem
    "my_module:Lion", a class, a function         f(parameters) or f(parameters, lr) returns a torch optimiser

Used by `labkit.problems.supervised`.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from labkit.errors import ProblemError, calling
from labkit.imports import check_settings, chosen, short

WITHOUT = ("Optimizer", "LBFGS", "SparseAdam")  # LBFGS evaluates the loss many times in a step; no gradient here is sparse
_first = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
_all = {name.lower(): kind for name, kind in vars(torch.optim).items() if isinstance(kind, type) and name not in WITHOUT}
OPTIMISERS: dict[str, type[torch.optim.Optimizer]] = _first | _all
DEFAULTS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.0}  # of the problems
WAYS = ("foreach", "fused", "capturable", "differentiable")  # in which torch computes a step


def check_optimiser(given: Any, **common: float) -> None:
    """ValueError or TypeError for what is no optimiser, for a setting that it has not, and for one of the problem that it would
    not use; `common` are lr, momentum, weight_decay."""
    kind, settings = chosen("optimiser", given, OPTIMISERS)
    title, changed = title_of(given), [name for name, value in common.items() if value != DEFAULTS[name]]
    check_settings(title, kind, settings, beside=("params", "parameters"))
    used = {"lr", *inspect.signature(kind).parameters} if _is_class(kind) else {"lr"} if _takes_lr(kind, settings) else set()
    used |= {"momentum"} if kind in (torch.optim.Adam, torch.optim.AdamW) else set()
    used -= set() if kind in _first.values() else {"momentum"}
    for name in changed:
        if name not in used:
            how = f'{{"name": {given!r}, ...}}' if isinstance(given, str) else "the function itself"
            raise ValueError(f"{name}={common[name]:g} is not used by {title}: it is for {_users(name)}. Set it in {how}.")


def make_optimiser(given: Any, parameters: Sequence[nn.Parameter], **common: float) -> torch.optim.Optimizer:
    """The optimiser of these parameters; ProblemError where a function returns none."""
    kind, settings = chosen("optimiser", given, OPTIMISERS)
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    with calling(title_of(given)):
        if _is_class(kind):
            return kind(parameters, **{**_defaults(kind, parameters, settings, **common), **settings})
        made = kind(parameters, *([common["lr"]] if _takes_lr(kind, settings) else []), **settings)
    if not isinstance(made, torch.optim.Optimizer):
        raise ProblemError(f"{title_of(given)} returned {short(made)} ({type(made).__name__}), not a torch.optim.Optimizer.")
    return made


def title_of(given: Any) -> str:
    """What messages call an optimiser."""
    return f"optimiser {short(chosen('optimiser', given, OPTIMISERS)[0])}"


def _defaults(
    kind: type, parameters: Sequence[nn.Parameter], settings: dict, lr: float, momentum: float, weight_decay: float
) -> dict[str, Any]:
    """What the problem's own settings are to this class."""
    common = {"lr": lr, "weight_decay": weight_decay}
    if kind is torch.optim.SGD:  # torch's default form: a loop written by hand gets the same bits
        return {"momentum": momentum, **common}
    if kind in (torch.optim.Adam, torch.optim.AdamW):
        fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
        return {"betas": (momentum, 0.999), **({} if set(WAYS) & set(settings) else {"fused": fused}), **common}
    return {"lr": lr} | ({"weight_decay": weight_decay} if weight_decay else {})


def _is_class(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)


def _takes_lr(make: Any, settings: dict) -> bool:
    """Has a function a second parameter without a default?"""
    parameters = list(inspect.signature(make).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len([p for p in positional if p.default is p.empty and p.name not in settings]) > 1


def _users(name: str) -> str:
    return {
        "lr": "optimisers by name and functions f(parameters, lr)",
        "momentum": "'sgd', 'adam' and 'adamw'",
        "weight_decay": "optimisers by name that have it",
    }[name]
