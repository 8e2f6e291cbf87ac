"""The errors of labkit: one family, so that `except labkit.LabError` catches every one of them; and the checks of arguments.

A message states what happened, with the values, and then what to do. Errors travel between processes, so each of them
survives pickling. Plain bad arguments stay `ValueError` and `TypeError`.

Every public argument goes through one of the checks once, where it is given, and its caller goes on with what the check returns:
Python's own int, float, bool, str, list or `Path`, whatever scalar, array or sequence it was.

Used by every module; imports nothing of labkit.
"""

import contextlib
import difflib
import functools
import math
import numbers
import operator
import os
import sys
import sysconfig
import threading
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

MOST = 2**53  # of a count: beyond it a float is no longer exact
SEEDS = 2**63 - 1  # the largest seed that torch's generators accept
LONGEST_WAIT_S = 2e6  # of a limit of time that the system keeps, 23 days: it counts milliseconds in 31 bits
TYPED = ("<stdin>", "<console>", "<string>", "<dynamic-code>")  # where Python says that code is from which is in no file
TYPED_N = ("<ipython-input", "<python-input", "<doctest ")  # the same with a number: prompts of IPython, and of Python since 3.13
HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep  # of labkit
_formatting = threading.Lock()


class LabError(Exception):
    """Something in the lab went wrong; the message states what, and what to do.

    Examples
    --------
    >>> try:
    ...     labkit.connect("threads", 0)
    ... except labkit.LabError as error:
    ...     type(error).__name__
    'ClusterError'
    """


class DataError(LabError):
    """A data set is missing, damaged, or of the wrong shape, type or range.

    Examples
    --------
    >>> labkit.open_dataset("my-images")
    Traceback (most recent call last):
        ...
    labkit.errors.DataError: ...
    """


class ProblemError(LabError):
    """The model, the data and the settings of a problem do not fit each other.

    Examples
    --------
    >>> labkit.train(labkit.Classifier("vgg9", "digits", model_args={"depth": 3}), lab)
    Traceback (most recent call last):
        ...
    labkit.errors.ProblemError: ...
    """


class ClusterError(LabError):
    """Workers did not arrive, were lost, or cannot do what was asked.

    Examples
    --------
    >>> labkit.connect("threads", 0)
    Traceback (most recent call last):
        ...
    labkit.errors.ClusterError: ...
    """


class PartitionError(LabError):
    """Samples cannot be shared out among the workers as asked.

    Examples
    --------
    >>> labkit.train(problem, lab, partition=labkit.IDPA(speeds=[1, 2, 3])).wait()
    Traceback (most recent call last):
        ...
    labkit.errors.PartitionError: ...
    """


class UpdateError(LabError):
    """An update rule was given weights that it cannot merge.

    Examples
    --------
    >>> labkit.SGWU().start(np.zeros((2, 2)), workers=[0])
    Traceback (most recent call last):
        ...
    labkit.errors.UpdateError: weights have shape (2, 2); one flat vector is needed.
    """


def interrupted(text: str, at_exit: Callable[[], str] | None = None) -> KeyboardInterrupt:
    """What waiting raises when it was interrupted (Ctrl-C, or the square in the notebook): one line without a traceback says what goes on.

    That is `text` in a notebook and in a console, and where it ends a script what `at_exit()` says, once the script has left its `with`
    blocks. It is a KeyboardInterrupt itself, and no subclass, as Python ends by the signal (130 in a shell) for that class alone.
    """
    error = KeyboardInterrupt(text)
    error._render_traceback_ = lambda: [f"Interrupted: {text}"]  # of IPython
    error._at_exit = at_exit or (lambda: text)
    if not getattr(sys.excepthook, "_says_interrupts", False):
        sys.excepthook = _saying_interrupts(sys.excepthook)
    return error


def _saying_interrupts(otherwise: Callable[..., object]) -> Callable[..., None]:
    """What Python calls with an error that nobody has caught: the line of `interrupted`, all others as before."""

    def say(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        if not hasattr(error, "_at_exit"):
            otherwise(kind, error, trace)
            return
        goes_on = sys.flags.interactive or hasattr(sys, "ps1")
        print(f"Interrupted: {error if goes_on else error._at_exit()}", file=sys.stderr)

    say._says_interrupts = True
    return say


class WireError(LabError):
    """Two processes of a run could not communicate: refused, silent, or of another protocol.

    Examples
    --------
    >>> issubclass(labkit.WireError, labkit.LabError)  # what `load_run(path).attach()` raises where a server does not answer
    True
    """


class RunError(LabError):
    """A run directory cannot be written, read or understood.

    Examples
    --------
    >>> labkit.load_run("runs/no-such-run")
    Traceback (most recent call last):
        ...
    labkit.errors.RunError: ...
    """


class RunningError(RunError):
    """The run of this directory is running, or somebody else writes in it."""


class SweepError(LabError):
    """A sweep was asked for something that its notebook does not have.

    Examples
    --------
    >>> labkit.sweep("no-such.ipynb", {"seed": [0, 1]})
    Traceback (most recent call last):
        ...
    labkit.errors.SweepError: ...
    """


class WorkerError(LabError):
    """A worker failed; `worker` is its index and `remote_traceback` the traceback from there.

    Examples
    --------
    >>> error = labkit.WorkerError("worker 1 failed at version 17: OSError: no such file", worker=1, remote_traceback="Traceback ...")
    >>> error.worker
    1
    """

    def __init__(self, message: str, worker: int | None = None, remote_traceback: str = "") -> None:
        super().__init__(message, worker, remote_traceback)
        self.worker = worker
        self.remote_traceback = remote_traceback

    def __str__(self) -> str:
        message = str(self.args[0])
        return f"{message}\n\n{self.remote_traceback}" if self.remote_traceback else message


def traceback_of(error: BaseException) -> str:
    """The text of an error with its traceback, `shortened` to the frames of the user's own.

    One at a time: to mark a place in a line it is parsed, and CPython 3.11 counts the depth of its parser for all threads together, so
    that two which format at once may end in a SystemError.
    """
    with _formatting:
        return "".join(traceback.format_exception(shortened(error)))


def shortened(error: BaseException) -> BaseException:
    """The error, with the tracebacks of it and of what caused it reduced to the frames of the user's own, where there are any.

    Those come first and last: what labkit does before it calls a user's function, and what libraries do in between and after it, is left
    out. In which line of a library the error was raised, after the user's last frame, is a note of it (`BaseException.add_note`), which
    stands below its message. Frames of labkit behind the user's last one stay, unless it is labkit that explains the error (`LabError`):
    of an explanation of what a user's function has raised none is left.
    """
    todo, seen = [error], set()
    while todo:
        one = todo.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        todo += [one.__cause__, one.__context__]
        frames, own = _frames(one)
        if own:
            behind = frames[own[-1] + 1 :]
            if behind and not isinstance(one, LabError) and not _is_of_labkit(behind[-1]):
                _note(one, f"Raised in {_place(behind[-1])}.")
            behind = [] if isinstance(one, LabError) else [each for each in behind if _is_of_labkit(each)]
            kept = None
            for each in reversed([*(frames[at] for at in own), *behind]):
                kept = types.TracebackType(kept, each.tb_frame, each.tb_lasti, each.tb_lineno)
            one.__traceback__ = kept
        elif isinstance(one, LabError) and one.__cause__ is not None and _frames(one.__cause__)[1]:
            one.__traceback__ = None
    return error


def is_own_code(file: str) -> bool:
    """Is a file, or the name of a cell or of a line of a prompt, code of the user's own: not of labkit, Python or an installed package?"""
    if file.startswith("<"):
        return file in TYPED or file.startswith(TYPED_N)
    return not os.path.abspath(file).startswith(_not_own()) and not {"site-packages", "dist-packages"} & set(Path(file).parts)


def own_line(error: BaseException) -> str:
    """Where in the user's own code it was raised, or what that had called raised it: "net.py:12, Net.forward"; "" where there is none of it."""
    frames, own = _frames(error)
    return _place(frames[own[-1]]) if own else ""


def _frames(error: BaseException) -> tuple[list[types.TracebackType], list[int]]:
    """The parts of its traceback, the outermost first, and which of them are of the user's own."""
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(trace)
        trace = trace.tb_next
    return frames, [at for at, each in enumerate(frames) if is_own_code(each.tb_frame.f_code.co_filename)]


def _place(trace: types.TracebackType) -> str:
    code = trace.tb_frame.f_code
    return f"{code.co_filename}:{trace.tb_lineno}, {code.co_qualname}"


def _note(error: BaseException, text: str) -> None:
    if text not in getattr(error, "__notes__", ()):
        error.add_note(text)


def _is_of_labkit(trace: types.TracebackType) -> bool:
    return trace.tb_frame.f_code.co_filename.startswith(HERE)


@functools.cache
def _not_own() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return (HERE, *(os.path.abspath(paths[name]) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")))


@contextlib.contextmanager
def calling(title: str, error: type[Exception] = ProblemError, passes: type[Exception] | tuple = LabError) -> Iterator[None]:
    """Round a call of a user's function: what it raises becomes an `error` that names it by its `title`; errors of labkit pass."""
    try:
        yield
    except passes:
        raise
    except Exception as raised:
        reason = str(raised).strip().partition("\n")[0].removesuffix(".")
        raise error(f"{title} raised {type(raised).__name__}{f': {reason}' if reason else ''}.") from raised


def did_you_mean(given: Any, options: Iterable[Any]) -> str:
    """ " Did you mean 'agwu'?" for the option nearest to `given`, whether letters are capital or not; empty where none is near."""
    options = {str(option): str(option).casefold() for option in options}
    near = difflib.get_close_matches(str(given).casefold(), dict.fromkeys(options.values()), n=1)
    same = [option for option, text in options.items() if text in near]  # Run and run: the nearer one
    return f" Did you mean {(difflib.get_close_matches(str(given), same, n=1, cutoff=0))[0]!r}?" if near else ""


def plain_scalar(value: Any) -> Any:
    """A scalar of numpy, torch or pandas, or an array without axes, as Python's own; anything else as it is. What is masked is nothing."""
    if getattr(value, "ndim", None) != 0 or not hasattr(value, "item"):
        return value
    mask = getattr(value, "mask", False)
    return ... if not callable(mask) and bool(mask) else value.item()  # numpy's own item() gives 0 for it


def known(name: str, value: Any, options: Iterable[Any], advice: str = "", error: type[Exception] = ValueError) -> Any:
    """The one of `options` that `value` is; otherwise an `error` with all of them and the nearest. True is not taken for 1."""
    options, given = list(options), plain_scalar(value)
    for option in options:
        if isinstance(given, str | int | float | None) and given == option and isinstance(given, bool) == isinstance(option, bool):
            return option
    listed = ", ".join(str(option) for option in options) or "(none)"
    raise error(f"{name}={_shown(value)} is not known. Known: {listed}.{did_you_mean(value, options)}{advice}")


def whole(name: str, value: Any, least: int = 1, most: float = MOST, error: type[Exception] = TypeError) -> int:
    """`value` as an int, least <= value <= most, ValueError otherwise; `error` where it is no whole number. 2.0 is one."""
    number = plain_scalar(value)
    try:
        if isinstance(number, bool):
            raise TypeError
        number = int(number) if _is_whole(number) else operator.index(number)
    except TypeError:
        raise error(f"{name}={_shown(value)} must be a whole number, not {type(value).__name__}.") from None
    if number < least:
        raise ValueError(f"{name}={_shown(number)} must be at least {least}.")
    if number > most:
        raise ValueError(f"{name}={_shown(number)} must be at most {most}.")
    return number


def real(
    name: str,
    value: Any,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
    error: type[Exception] = TypeError,
    *,
    finite: bool = True,
) -> float:
    """`value` as a float with above < value < below, least <= value <= most, else ValueError; `error` where it is no number.

    Infinity is refused, unless `finite` is False: a limit of time that never ends.
    """
    number = plain_scalar(value)
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise error(f"{name}={_shown(value)} must be a number, not {type(value).__name__}.")
    try:
        number = float(number)
    except OverflowError:  # an int of hundreds of digits
        raise ValueError(f"{name}={_shown(value)} is too large.") from None
    if not (above < number and least <= number <= most and (number < below or (not finite and number == below == math.inf))):
        low = f"above {above:g}" if math.isfinite(above) else f"at least {least:g}" if math.isfinite(least) else ""
        high = f"below {below:g}" if below < math.inf else f"at most {most:g}" if most < math.inf else "finite" if finite else ""
        raise ValueError(f"{name}={number:g} must be {' and '.join(filter(None, (low, high))) or 'a number'}.")
    return number


def flag(name: str, value: Any) -> bool:
    """`value` as a bool; 1 and 0 will do. TypeError for anything else: the string "false" is true to Python."""
    given = plain_scalar(value)
    if isinstance(given, int | float) and given in (0, 1):
        return bool(given)
    raise TypeError(f"{name}={_shown(value)} must be True or False, not {type(value).__name__}.")


def text(name: str, value: Any) -> str:
    """`value` as a str; TypeError for anything else."""
    given = plain_scalar(value)
    if not isinstance(given, str):
        raise TypeError(f"{name}={_shown(value)} must be a string, not {type(value).__name__}.")
    return str(given)


def file_path(name: str, value: Any) -> Path:
    """`value`, a str or a path, as a `Path` with ~ for the home folder; TypeError for anything else."""
    given = plain_scalar(value)
    if not isinstance(given, str | os.PathLike) or not isinstance(os.fspath(given), str):
        raise TypeError(f"{name}={_shown(value)} must be a path, not {type(value).__name__}.")
    if "\0" in os.fspath(given):
        raise ValueError(f"{name}={given!r} holds a null character, and no path does.")
    try:
        os.fsencode(given)
    except UnicodeEncodeError:  # half a surrogate pair
        raise ValueError(f"{name}={given!r} holds a character that no path holds.") from None
    try:
        return Path(os.fspath(given)).expanduser()
    except RuntimeError as error:  # no such user
        raise ValueError(f"{name}={os.fspath(given)!r}: {error}") from error


def instance(name: str, value: Any, cls: type, such: str = "") -> Any:
    """`value`, if it is one of `cls`; TypeError otherwise, with `such` as what to give."""
    if not isinstance(value, cls):
        raise TypeError(f"{name}={_shown(value)} must be a {cls.__name__}{such}, not {type(value).__name__}.")
    return value


def like(name: str, value: Any, parts: Iterable[str], such: str) -> Any:
    """`value`, if it has the attributes `parts`, as a run or a figure has; TypeError otherwise, as it must be `such`."""
    if isinstance(value, type) or not all(hasattr(value, part) for part in parts):
        raise TypeError(f"{name}={_shown(value)} must be {such}, not {type(value).__name__}.")
    return value


def several(name: str, values: Any, convert: Callable[[str, Any], Any], error: type[Exception] = TypeError) -> list[Any]:
    """Each of `values` as `convert(name, value)` gives it, in a list; `error` where they are a single one, a string or a dict."""
    try:
        if isinstance(values, str | bytes | Mapping):
            raise TypeError
        values = list(values)
    except TypeError:
        raise error(f"{name}={_shown(values)} must be a list, not {type(values).__name__}.") from None
    return [convert(name, value) for value in values]


def _is_whole(number: Any) -> bool:
    if isinstance(number, numbers.Integral):  # of any length
        return True
    return isinstance(number, numbers.Real) and math.isfinite(number) and number == int(number)


def _shown(value: Any) -> str:
    """A value in a message, on one line."""
    try:
        shown = " ".join(repr(value).split())
    except Exception:  # an int of thousands of digits; or the value's own
        shown = f"<{type(value).__name__}>"
    return shown if len(shown) <= 80 else shown[:77] + "..."
