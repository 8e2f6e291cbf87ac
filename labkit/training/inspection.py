"""What is known of one worker of a running run: what it has answered just now, beside what its server knows. `Run.inspect` returns it.

Used by `labkit.training.run` and `labkit.training.page`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from labkit.errors import ClusterError, WireError

MB = 1e6


@dataclass(frozen=True)
class Inspection:
    """One worker, seen from inside.

    Attributes
    ----------
    worker, host, pid, device, threads : which one, where, and on how many threads torch computes.
    doing : "a local pass", "measuring its score", or that it exchanges weights.
    version, samples, granted : of the weights that it works on, and how many samples of its local pass are done, of how many.
    stacks : by thread, its stack as text, the innermost frame last.
    exchange : of the latest one: send_s and hidden_s (seconds), bytes, seconds_ago; empty before the first.
    memory : bytes: rss and rss_peak of its process, and on a GPU device and device_reserved of torch.
    """

    worker: int
    host: str
    pid: int
    device: str
    threads: int
    doing: str
    version: int
    samples: int
    granted: int
    stacks: Mapping[str, str]
    exchange: Mapping[str, float]
    memory: Mapping[str, float]

    def __str__(self) -> str:
        memory = ", ".join(f"{name} {value / MB:,.0f} MB" for name, value in self.memory.items())
        exchange = ", ".join(f"{name} {value:g}" for name, value in self.exchange.items()) or "none yet"
        lines = [
            f"Worker {self.worker}: process {self.pid} on {self.host}, {self.device}, {self.threads} thread(s)",
            f"  does      {self.doing}, from version {self.version}, {self.samples:,} of {self.granted:,} samples",
            f"  exchange  {exchange}",
            f"  memory    {memory}",
        ]
        return "\n".join([*lines, *(f"{name}:\n{text.rstrip()}" for name, text in self.stacks.items())])

    __repr__ = __str__


def inspection(status: Mapping[str, Any], worker: int, timeout: float) -> Inspection:
    """Of the status that a server sends when it was asked to inspect a worker; ClusterError where the worker did not answer, or could not."""
    here = sorted(int(index) for index in status["workers"])
    if status.get("inspected") is None:
        raise ClusterError(f"worker {worker} is not in the run; workers {here} are.")
    if error := status["inspected"].get("error") or (status["inspected"]["answer"] or {}).get("error"):
        raise ClusterError(f"worker {worker} could not be inspected; the run goes on.\n{_shown(str(error))}")
    answer, known = status["inspected"]["answer"], status["inspected"]["known"]
    samples = {"samples": known["seen"], "granted": known["granted"]}
    if answer is None:
        doing = (
            f"in local pass {known['passes'] + 1}, {known['seen']:,} of {known['granted']:,} samples" if known["busy"] else "held"
        )
        where = f"process {known['pid']} on {known['host']}"
        raise ClusterError(
            f"worker {worker} ({where}) did not answer within {timeout:g} s. Its last message, {known['heard']!r}, came "
            f"{known['heard_s']:.1f} s ago; by that it was {doing}, with a training loss of {known['loss']}. It is frozen, cut off, or in "
            "a call that lets no other thread run."
        )
    try:
        own = {name: answer[name] for name in ("device", "threads", "doing", "version", "exchange", "memory")}
        stacks = {_shown(name): _shown(text) for name, text in answer["stacks"].items()}
        return Inspection(worker, _shown(str(known["host"])), known["pid"], **own, **samples, stacks=stacks)
    except (KeyError, TypeError, AttributeError) as error:
        raise WireError(f"what the server says of worker {worker} was refused: {error!r}.") from error


def _shown(text: str) -> str:
    """Without characters that a terminal obeys."""
    return "".join(character if character.isprintable() or character == "\n" else "?" for character in text)
