"""Update rules: how the weights that workers push become the next global weights.

An update is a pure state machine on flat float32 vectors. It does no I/O, never sleeps and reads no clock, so the same
object serves a live run, a replay and a simulation. Each of its calls returns *replies*; a reply releases one worker with
a version and the weights of that version. A barrier is nothing but "no replies yet".

    sgwu, localsgd, allreduce             all push, then all go on                     synchronous.py
    agwu, downpour, fedasync, fedbuff     each push is answered at once                asynchronous.py
    ssp, ringmaster, rescaled             the same, late pushes bounded or scaled      bounded.py
    easgd, gem                            each worker's own weights, tied to a centre  elastic.py
    diloco, delayed-nesterov, heloco      with a momentum of the server                outer.py
    what they share                       pushes, members, versions, checks            base.py

Every vector is [parameters | buffers]: buffers (BatchNorm's running statistics) are mixed as convex averages under every rule,
because a variance must not be extrapolated below zero.

`names()` lists the rules; `make_update` makes one from its name, an import path, or a dict of name and settings.

Used by `labkit.training.server.coordinator` (live) and by anybody who tests or invents a rule.
"""

from labkit.imports import make_rule
from labkit.names import face
from labkit.updates.asynchronous import AGWU, Downpour, FedAsync, FedBuff
from labkit.updates.base import BadPush, Changes, Diverged, Merge, Push, Reply, Update
from labkit.updates.bounded import SSP, Rescaled, Ringmaster
from labkit.updates.elastic import EASGD, GEM
from labkit.updates.outer import DelayedNesterov, DiLoCo, HeLoCo
from labkit.updates.synchronous import SGWU, AllReduce, Barrier, LocalSGD

RULES = (SGWU, LocalSGD, AllReduce, AGWU, Downpour, FedAsync, FedBuff, SSP, Ringmaster, Rescaled, EASGD, GEM)
RULES += (DiLoCo, DelayedNesterov, HeLoCo)
UPDATES = {rule.name: rule for rule in RULES}

__all__ = ["UPDATES", "BadPush", "Barrier", "Changes", "Diverged", "Merge", "Push", "Reply", "Update", "make_update", "names"]
__all__ += [rule.__name__ for rule in RULES]
__getattr__, __dir__ = face(__name__)


def names() -> list[str]:
    """The names of all rules, as `train(update=...)` takes them.

    Examples
    --------
    >>> "agwu" in labkit.updates.names()
    True
    """
    return list(UPDATES)


def make_update(update: str | dict | Update) -> Update:
    """An update from its name ("agwu"), an import path ("my_module:Mine"), name and settings (its `config()`), or itself.

    ValueError with the known ones where a name or a setting does not exist.

    Examples
    --------
    >>> labkit.updates.make_update({"name": "fedbuff", "size": 4}).config()
    {'name': 'fedbuff', 'size': 4, ...}
    """
    return update if isinstance(update, Update) else make_rule("update", update, UPDATES, Update)
