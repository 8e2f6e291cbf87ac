"""`Inner`: how the threads of one worker share a training step.

Used by users through `labkit.Inner`, and by `labkit.problems.supervised`.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from labkit.errors import known, whole

SPLITS = ("auto", "none", "intra-op", "samples", "rows")


@dataclass(frozen=True)
class Inner:
    """How the threads of one worker compute a training step together: the inner layer of BPT-CNN (Chen et al. 2019).

        labkit.Classifier("vgg9", "cifar-10", inner=labkit.Inner(threads=2))

    Parameters
    ----------
    threads : how many share a step; by default as many as torch computes with in the worker (`labkit.connect(threads=...)`). More than
        the machine has cores is a warning.
    split : what they share.
        "samples"  blocks of the batch, a backward pass for each (`labkit.inner.samples`). One number of threads gives the same bits
                   each time.
        "rows"     the tasks of each layer: blocks of its output, forward, input gradient and weight gradient
                   (`labkit.inner.graph`), scheduled by their upward rank; one input, in float32.
        "intra-op" nothing: torch cuts each operator.
        "none"     nothing: one thread computes.
        "auto"     whichever of these is quickest now: each is tried in the first steps, again when the time of a step changes, and
                   now and then, so that it falls back while somebody else uses a core, and comes back. What was chosen is recorded, so
                   that a run can be replayed.
    block : samples in a block of "samples"; by default as many as were quickest on the first batch, tried once for a network,
        a batch and a number of threads, and remembered beside the data in labkit's cache. Two at least, as a network may take a single
        sample for something else (`squeeze`), unless block=1 is asked for.
    whole : layers, by their names, that one thread computes for the whole batch because they cannot be split; True for all that
        labkit does not know. Without, they are an error.

    ValueError or TypeError for what cannot be; ProblemError before the run, by name, for a model that is not computed the same in parts,
    and for a problem whose `step` goes past it. The step keeps its meaning: gradients are those of the whole batch, BatchNorm's
    statistics too, but for rounding; dropout draws other zeros. Hooks on parameters are called once a step, on the thread of the worker;
    those on modules for each block, on its thread ("samples"), or they are refused ("rows", BatchNorm, dropout).

    On a GPU "samples" has a stream for each thread, and leaves networks with BatchNorm and `whole` layers undivided; the tasks of "rows"
    are computed one after the other. There are no CUDA graphs: what launching its operators costs a step of a small batch, it costs here.

    Weights are pushed when a local pass is done and scored, and not layer by layer while the last of its steps computes: that could hide no
    more than the `send_share` of `Run.summary()`, and `labkit.train(..., overlap=1)` hides nearly all of it behind the next steps: on two busy
    cores with 10 local steps 1.6 % for LeNet (0.5 MB), 1.2 % for VGG9 (6 MB); with overlap=1 0.3 % and 0.0 %.

    Examples
    --------
    >>> inner = labkit.Inner(threads=1, split="samples", block=16)
    >>> labkit.train(labkit.Classifier("lenet", "digits", train_samples=200, inner=inner), lab, passes=1).wait().state
    'done'
    """

    threads: int | None = None
    split: str = "auto"
    block: int | None = None
    whole: bool | Sequence[str] = ()

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731  frozen
        put("threads", None if self.threads is None else whole("threads", self.threads))
        put("split", known("split", self.split, SPLITS))
        put("block", None if self.block is None else whole("block", self.block))
        if isinstance(self.whole, str) or not isinstance(self.whole, (bool, list, tuple)):
            raise TypeError(f"whole={self.whole!r} must be True, or a list of names of layers.")
        put("whole", self.whole if isinstance(self.whole, bool) else tuple(map(str, self.whole)))
        cores = os.cpu_count() or 1
        if self.threads is not None and self.threads > cores:
            warnings.warn(
                f"threads={self.threads} share the {cores} cores of this machine: more threads than cores are no quicker.",
                stacklevel=3,
            )

    @classmethod
    def of(cls, given: Any) -> "Inner | None":
        """What a user gave as `inner=`: an `Inner`, its settings as a dict, a number of threads, or None."""
        if given is None or isinstance(given, cls):
            return given
        if isinstance(given, Mapping):
            return cls(
                **{known("a setting of inner", name, [field.name for field in fields(cls)]): value for name, value in given.items()}
            )
        if isinstance(given, bool) or not hasattr(given, "__index__"):
            raise TypeError(f"inner={given!r} must be a labkit.Inner, such as labkit.Inner(threads=2), or a number of threads.")
        return cls(threads=given)

    def config(self) -> dict[str, Any]:
        """Its settings that are not the defaults, as JSON can store them; `of` takes them."""
        settings = {name: value for name, value in asdict(self).items() if value != getattr(Inner, name)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
