"""The weights of a worker's replica on their way: where a pull is received, and what a push sends.

In float32 on a CPU both are the replica's own vector, and nothing is copied. Where the weights travel in 16 bits, live on a GPU, or
are exchanged while the replica trains on, they have a place of their own here.

Used by `labkit.training.worker.worker`.
"""

from __future__ import annotations

import torch

from labkit.training.wire import compression as exchange
from labkit.training.worker.replica import Replica


class Parcel:
    """The weights of `replica` as bytes on the wire. `apart`: the replica trains while they are under way."""

    def __init__(self, replica: Replica, kind: str, apart: bool) -> None:
        self.replica, self.kind = replica, kind
        flat, on_cpu = replica.flat, replica.device == "cpu"
        self.host = flat if on_cpu and not apart else torch.empty(len(flat), pin_memory=not on_cpu)
        self.weights = self.host.numpy()
        halves = kind != "float32"
        self.given = exchange.place(kind, len(flat)) if halves else self.weights  # as received
        self.change = exchange.place(kind, len(flat)) if halves else self.weights  # as sent
        self.shift = 0  # of the change: what it was multiplied by, as a power of two

    def place(self) -> memoryview:
        """Where a pull is received."""
        return memoryview(self.given).cast("B")

    def arrived(self, carry: int) -> None:
        """A pull is complete: the replica goes on from it, with the `carry` samples that it has trained on meanwhile."""
        if self.kind != "float32":
            exchange.unpack(self.given, self.kind, self.weights)
        if self.host is not self.replica.flat:
            self.replica.take_in(self.host, carry)

    def leaves(self) -> memoryview:
        """The weights of the replica as they are now, to be sent before the next pull."""
        if self.host is not self.replica.flat:
            self.host.copy_(self.replica.flat)
        if self.kind != "float32":
            self.shift = exchange.pack_change(self.weights, self.given, self.kind, self.change, self.replica.layout.n_params)
        return memoryview(self.change).cast("B")
