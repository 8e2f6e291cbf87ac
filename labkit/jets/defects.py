"""What the published notebooks of distributed UCluster do otherwise, each by a name, so that its cost can be measured.

    frozen-alpha       the counter of epochs never moves: alpha stays slope (2 - pretrain)
    frozen-schedules   learning rate and momentum of the normalisations stay what they are at the beginning
    scaled-rate        the learning rate is multiplied by the number of workers (2), without a warm-up
    kmeans-per-rank    each rank has centres of its own, in any order, from k-means on its own half, and nothing makes them one
    reinitialised      ranks have weights of their own: they are made again after the broadcast; the centres are those of the first
    local-statistics   each rank normalises by its own half, and the running statistics of the first are those that count
    uneven-batches     the first rank has a batch more in each pass, for which the other has no gradient; there it would wait for ever

The last four are of ranks that differ, which an all-reduce of labkit does not let happen. They are emulated in one process by two
`Replicas`: each trains on its half of a batch, with statistics of its own, and gradients are averaged as if both were one network. So
"local-statistics" is what the other three have, too.

Used by `labkit.jets.problem`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from labkit.models import seeded

OF_RANKS = ("kmeans-per-rank", "reinitialised", "local-statistics", "uneven-batches")
DEFECTS = ("frozen-alpha", "frozen-schedules", "scaled-rate", *OF_RANKS)
RANKS = 2


class Replicas(nn.ModuleList):
    """The networks of ranks that are no longer equal, in one process; what is measured is the first."""

    @classmethod
    def of(cls, network: Callable[[], nn.Module], defects: Sequence[str], seed: int) -> nn.Module:
        """One network, or, with a defect of ranks, several: from one seed, or each from its own."""
        with seeded(seed):
            first = network()
        if not set(OF_RANKS) & set(defects):
            return first
        others = []
        for rank in range(1, RANKS):
            with seeded(seed + 1000 * rank if "reinitialised" in defects else seed):
                others.append(network())
        return cls([first, *others])

    def backward(
        self, batch: tuple, losses: Callable[[nn.Module, tuple], dict[str, torch.Tensor]], first_alone: bool = False
    ) -> dict[str, torch.Tensor]:
        """Each rank's gradients on its part of the batch, averaged; the losses are means. With `first_alone` the others have none."""
        rows = torch.arange(len(batch[0]), device=batch[0].device).tensor_split(len(self))
        parts = [(network, own) for network, own in zip(self, rows, strict=True) if len(own)][: 1 if first_alone else None]
        made = []
        for network, own in parts:
            made.append(losses(network, type(batch)(*(part[own] for part in batch))))
            made[-1]["loss"].backward()
        for ranks in zip(*(network.parameters() for network in self), strict=True):
            given = [p.grad for p in ranks if p.grad is not None]
            if given:
                mean = torch.stack(given).sum(0) / (len(self) if first_alone else len(parts))
                for p in ranks:
                    p.grad = mean.clone()
        return {name: torch.stack([one[name].detach() for one in made]).mean() for name in made[0]}
