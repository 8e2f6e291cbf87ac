"""Names that labkit does not have: each is answered with the one that was meant, and completion offers what is public.

    an argument      `named` functions: "In labkit it is passes=.", also for what other libraries call it
    an attribute     `face` of a package, `Public` objects: "Did you mean 'curves'?", and `dir` without what is labkit's own

Used by the packages and classes that users type.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

from labkit.errors import LabError, did_you_mean, shortened

F = TypeVar("F", bound=Callable[..., Any])

# Where an argument is given, by the name of the function or class; of a problem, that of the classes that most people use.
ARGUMENTS = {
    "a problem, as labkit.Classifier": (
        "model", "data", "batch_size", "lr", "momentum", "weight_decay", "optimiser", "schedule", "loss", "metrics", "augment", "precision",
    ),
    "labkit.train": ("runs", "partition", "update", "passes", "local_steps", "seed", "checkpoints", "target", "patience", "on_version"),
    "labkit.connect": ("n_workers", "threads_per_worker", "slowdown", "address", "client"),
    "labkit.search": ("trials", "folds", "prune"),
}  # fmt: skip
# What other libraries call an argument, and what labkit does.
NEIGHBOURS = {
    "optimizer": "optimiser", "criterion": "loss", "loss_fn": "loss", "loss_function": "loss", "learning_rate": "lr", "batch": "batch_size",
    "bs": "batch_size", "scheduler": "schedule", "lr_scheduler": "schedule", "metric": "metrics", "dataset": "data", "net": "model",
    "network": "model", "epochs": "passes", "n_epochs": "passes", "num_epochs": "passes", "max_epochs": "passes", "callback": "on_version",
    "callbacks": "on_version", "early_stopping": "patience", "random_state": "seed", "num_workers": "n_workers", "n_jobs": "n_workers",
    "world_size": "n_workers", "workers": "n_workers", "n_trials": "trials", "run_dir": "runs", "num_trials": "trials", "cv": "folds", "pruner": "prune",
}  # fmt: skip
_TEST_SPLIT = (
    'The test split is part of the data of the problem: data=(x_train, y_train, x_test, y_test), or a dict with "train" and "test"; what a worker '
    "holds out of the training samples is score_samples=."
)
_DEVICE = "Each worker has its device: where there are GPUs, labkit.connect(n_workers=...) gives worker i one of them."
ELSEWHERE = {
    **dict.fromkeys(("val_data", "validation_data", "valid_data", "val_loader", "eval_data", "test_data"), _TEST_SPLIT),
    **dict.fromkeys(("device", "devices", "accelerator", "gpus"), _DEVICE),
}

# Of a problem: what the columns of its data are.
OF_DATA = {"label": "label", "labels": "label", "target": "target", "targets": "target", "inputs": "inputs", "features": "inputs"}


def where_given(name: str, names: Iterable[str]) -> str:
    """What to say of an argument that a call does not have: where labkit has it, by which name; `names` are those that the call has."""
    names = list(names)
    return called_here(name, names) or did_you_mean(name, names) or f" It has: {', '.join(names)}."


def called_here(name: str, names: Iterable[str]) -> str:
    """What labkit calls something that other libraries call `name`, or where it has it; "" where nothing is known of it."""
    ours = NEIGHBOURS.get(name, name)
    owner = next((owner for owner, own in ARGUMENTS.items() if ours in own), None)
    if ours in names:
        return f" In labkit it is {ours}=."
    if name in ELSEWHERE:
        return f" {ELSEWHERE[name]}"
    if name in OF_DATA and "data" in names and "batch_size" in names:
        return f" What the columns of data are is said as they are opened: data=labkit.open_dataset(data, {OF_DATA[name]}=...)."
    return "" if owner is None else f" {ours}= is an argument of {owner}."


def named(function: F) -> F:
    """Of a public function or `__init__`: an argument that it does not have is a TypeError that says where in labkit that is given.

    Where a class hands `**options` on to the `__init__` of its base, decorate that one.
    """
    code = function.__code__
    known = frozenset(code.co_varnames[code.co_posonlyargcount : code.co_argcount + code.co_kwonlyargcount])
    places = code.co_varnames[: code.co_argcount]
    needs = places[: len(places) - len(function.__defaults__ or ())]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in known:
                of_class = function.__name__ == "__init__"
                title, names = (
                    (type(args[0]).__name__, _of_class(type(args[0]))) if of_class else (function.__name__, _of(function))
                )
                raise TypeError(f"{title}() got an unexpected keyword argument {name!r}.{where_given(name, names)}")
        if len(args) > len(places) and places[0] == "runs":
            one = function.__name__
            raise TypeError(f"{one}() got {len(args)} positional arguments. Give several runs as a list: {one}([a, b]).")
        if "lab" in needs and len(args) == places.index("lab") and "lab" not in kwargs:
            whole = f"{function.__name__}({', '.join([*places[: len(args)], 'lab'])})"
            raise TypeError(f"{function.__name__}() needs a lab: lab = labkit.connect(n_workers=2), and then {whole}.")
        try:
            return function(*args, **kwargs)
        except Exception as error:
            __tracebackhide__ = True  # of IPython and pytest
            if isinstance(error, LabError) and error.__cause__ is None:
                raise
            shortened(error)  # a user's function, such as the model, has raised: its frames, and who called labkit
            error.__traceback__ = None if isinstance(error, LabError) else error.__traceback__
            raise

    return call


def _of(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [it.name for it in parameters if it.kind in (it.POSITIONAL_OR_KEYWORD, it.KEYWORD_ONLY) and it.name != "self"]


def _of_class(cls: type) -> list[str]:
    """The arguments of a class and, where it hands others on, of its bases."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base) and base is not object:
            names |= dict.fromkeys(_of(base.__init__))
            if not any(it.kind is it.VAR_KEYWORD for it in inspect.signature(base.__init__).parameters.values()):
                break
    return list(names)


def unknown_attribute(owner: str, name: str, names: Iterable[str]) -> str:
    """What to say of an attribute that `owner` does not have: the one that was meant, or all that it has."""
    names = list(names)
    near = did_you_mean(name, names)
    return f"{owner} has no attribute {name!r}.{near}" + ("" if near else f" It has: {', '.join(names)}.")


def face(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a module that users type: `dir` has its `__all__` alone, an unknown name is answered by it."""

    def get(name: str) -> Any:
        raise AttributeError(unknown_attribute(f"module {package!r}", name, names()), name=name)

    def names() -> list[str]:
        return sorted(sys.modules[package].__all__)

    return get, names


class Public:
    """Base of what users hold: `dir` leaves out what is for labkit (`internal`), an unknown name is answered with the one that was meant."""

    internal: ClassVar[frozenset[str]] = frozenset()

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if name not in self.internal and name != "internal"]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # such as what pickle asks for
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
        if inspect.getattr_static(type(self), name, None) is not None:  # a property that has raised an AttributeError: that one
            return object.__getattribute__(self, name)
        public = [name for name in dir(self) if not name.startswith("_")]
        raise AttributeError(unknown_attribute(f"{type(self).__name__!r} object", name, public), name=name)
