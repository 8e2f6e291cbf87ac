"""Modules whose state is not plain: one of each kind that users bring. Each takes samples (n, 1, 6, 6) and gives 3 logits.

`ZOO` is by name; `Zoo` is all of them in one network, whose logits are the mean of theirs. `COMPILED` are those of torch.compile, for
slow tests: its first import takes seconds. All-reduce refuses `BY_BATCH`.

Used by the tests of `labkit.models.flat` and of runs.
"""

from __future__ import annotations

import functools
import random
import warnings

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

ZOO, COMPILED = {}, {}
BY_BATCH = ["activation_norm", "mean_assigned_anew", "queue", "embedding_max_norm"]  # parameters that a rank's own samples change


def kind(make, zoo=ZOO):
    zoo[make.__name__] = make
    return make


def compiled(make):
    return kind(make, COMPILED)


def net(first=None, last=None):
    return nn.Sequential(nn.Flatten(), first or nn.Linear(36, 5), nn.Tanh(), last or nn.Linear(5, 3))


class Changing(nn.Module):
    """A network that does something before each forward pass in training."""

    def __init__(self, change, before=lambda module: None):
        super().__init__()
        self.net, self.change = net(), change
        before(self)

    def forward(self, x):
        x = x.flatten(1)
        if self.training:
            with torch.no_grad():
                self.change(self, x)
        return self.net(x)


# -- parameters --------------------------------------------------------------------------------------------------------


@kind
def tied():
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3))
    module[3].weight = module[2].weight
    return module


@kind
def tied_by_data():
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3))
    module[3].weight.data = module[2].weight.data
    return module


@kind
def one_layer_twice():
    layer = nn.Linear(5, 5)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 5), layer, nn.Tanh(), layer, nn.Linear(5, 3))


@kind
def frozen():
    return net(first=nn.Linear(36, 5).requires_grad_(False))


@kind
def without_a_gradient():
    module = net()
    module[1].register_parameter("auxiliary", nn.Parameter(torch.randn(2)))
    return module


@kind
def odd_shapes():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.scalar = net(), nn.Parameter(torch.tensor(0.5))
            self.nothing, self.turned = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.randn(3, 2).t())

        def forward(self, x):
            return self.net(x) * self.scalar + self.turned.sum(0)

    return Odd()


@kind
def orthogonal():
    return net(first=parametrizations.orthogonal(nn.Linear(36, 5)))


@kind
def parametrised():
    class Positive(nn.Module):
        def forward(self, raw):
            return F.softplus(raw)

    layer = nn.Linear(36, 5)
    parametrize.register_parametrization(layer, "weight", Positive())
    return net(first=layer)


@kind
def weight_norm():
    return net(first=parametrizations.weight_norm(nn.Linear(36, 5)))


@kind
def weight_norm_by_hooks():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return net(first=nn.utils.weight_norm(nn.Linear(36, 5)))


@kind
def spectral_norm():
    return net(first=parametrizations.spectral_norm(nn.Linear(36, 5)))


@kind
def spectral_norm_by_hooks():
    return net(first=nn.utils.spectral_norm(nn.Linear(36, 5)))


@kind
def pruned():
    return net(first=prune.random_unstructured(nn.Linear(36, 5), "weight", 0.4))


# -- layers ------------------------------------------------------------------------------------------------------------


class Over(nn.Module):
    """A layer over the rows of the picture, and a dense layer on what it makes of the last one."""

    def __init__(self, layer, size):
        super().__init__()
        self.layer, self.dense = layer, nn.Linear(size, 3)

    def forward(self, x):
        out = self.layer(x.flatten(1, 2))
        return self.dense((out[0] if isinstance(out, tuple) else out)[:, -1])


@kind
def lstm():
    return Over(nn.LSTM(6, 4, num_layers=2, batch_first=True), 4)


@kind
def gru_both_ways():
    return Over(nn.GRU(6, 4, bidirectional=True, batch_first=True), 8)


@kind
def transformer():
    return Over(nn.TransformerEncoderLayer(6, 2, dim_feedforward=8, dropout=0.1, batch_first=True), 6)


@kind
def lazy():
    return nn.Sequential(nn.LazyConv2d(2, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3))


@kind
def batch_norm():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 3))


@kind
def batch_norm_by_count():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5, momentum=None), nn.Linear(5, 3))


@kind
def instance_norm():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2, track_running_stats=True), nn.Flatten(), nn.Linear(32, 3))


@kind
def group_norm_channels_last():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(2, 2), nn.Flatten(), nn.Linear(32, 3)).to(
        memory_format=torch.channels_last
    )


@kind
def dropout():
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(36, 5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 3))


class Embedded(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.table, self.dense = nn.Embedding(4, 3, **options), nn.Linear(3, 3)

    def forward(self, x):
        return self.dense(self.table((x.flatten(1) * 2).long().clamp(0, 3)).mean(1))


@kind
def embedding_with_sparse_gradients():
    return Embedded(sparse=True)


@kind
def embedding_max_norm():
    return Embedded(max_norm=0.7)


# -- buffers -----------------------------------------------------------------------------------------------------------


@kind
def activation_norm():
    """Scaled by its first batch: a flag says that this is done."""

    class ActNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift, self.rate, self.dense = nn.Parameter(torch.zeros(36)), nn.Parameter(torch.ones(36)), nn.Linear(36, 3)
            self.register_buffer("initialised", torch.tensor(False))

        def forward(self, x):
            x = x.flatten(1)
            if self.training and not self.initialised:
                with torch.no_grad():
                    self.shift.data = -x.mean(0)
                    self.rate.data.copy_(1 / (x.std(0) + 0.1))
                    self.initialised.fill_(True)
            return self.dense((x + self.shift) * self.rate)

    return ActNorm()


@kind
def quantised_while_training():
    from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fake = FakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
    return nn.Sequential(nn.Flatten(), fake, nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 3))


@kind
def mean_assigned_anew():
    def change(module, x):
        module.mean = 0.9 * module.mean + 0.1 * x.mean(0)
        module.net[1].bias.data += module.mean[:5]

    return Changing(change, lambda module: module.register_buffer("mean", torch.zeros(36)))


@kind
def counter_assigned_anew():
    def change(module, x):
        module.steps = module.steps + 1
        module.net[1].bias.data -= 0.001 * module.steps

    return Changing(change, lambda module: module.register_buffer("steps", torch.tensor(0), persistent=False))


@kind
def queue():
    def change(module, x):
        module.rows[module.at] = x[0]
        module.at[:] = (module.at + 1) % 4
        module.net[1].weight.data[0] += 0.01 * module.rows.mean(0)

    def before(module):
        module.register_buffer("rows", torch.zeros(4, 36))
        module.register_buffer("at", torch.zeros(1, dtype=torch.long))

    return Changing(change, before)


@kind
def buffers_of_every_type():
    types = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16)
    types += (torch.float64, torch.complex64, torch.complex128)

    def before(module):
        for number, dtype in enumerate(types):
            module.register_buffer(f"b{number}", torch.tensor([0.3, -1, 1, 100]).abs().to(dtype))

    def change(module, x):
        for number, dtype in enumerate(types):
            buffer = getattr(module, f"b{number}")
            setattr(module, f"b{number}", ~buffer if dtype == torch.bool else buffer + 3)
        module.net[1].bias.data += 1e-4 * (module.b8.sum() + module.b9.real.sum()).float()

    return Changing(change, before)


# -- memory that is replaced -------------------------------------------------------------------------------------------


@kind
def short_weights():
    def change(module, x):
        module.net[3].weight.data = torch.renorm(module.net[3].weight.data, p=2, dim=0, maxnorm=0.4)

    return Changing(change)


@kind
def clamped_weights():
    def change(module, x):
        for parameter in module.parameters():
            parameter.data = parameter.data.clamp(-0.2, 0.2)

    return Changing(change)


@kind
def set_from_a_vector():
    def change(module, x):
        vector = nn.utils.parameters_to_vector(module.parameters())
        nn.utils.vector_to_parameters(0.99 * vector, module.parameters())

    return Changing(change)


# -- what the constructor brings ---------------------------------------------------------------------------------------


@kind
def permutation_by_numpy():
    class Permuted(nn.Module):
        def __init__(self):
            super().__init__()
            self.order, self.net = torch.from_numpy(np.random.permutation(36)), net()

        def forward(self, x):
            return self.net(x.flatten(1)[:, self.order])

    return Permuted()


@kind
def signs_by_random():
    class Signed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()
            self.register_buffer("signs", torch.tensor([random.choice((-1, 1)) for _ in range(36)]))

        def forward(self, x):
            return self.net(x.flatten(1) * self.signs)

    return Signed()


PRETRAINED = net()


@kind
def pretrained():
    return PRETRAINED


@kind
def pretrained_with_a_new_head():
    return nn.Sequential(PRETRAINED[:3], nn.Linear(5, 3))


# -- compiled, by a backend that needs no C++ ----------------------------------------------------------------------------


@compiled
def compiled_as_a_whole(backend="aot_eager"):
    inner = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Dropout(0.1), nn.Linear(5, 3))
    return torch.compile(inner, backend=backend)


@compiled
def compiled_in_part():
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 3))
    module[1] = torch.compile(module[1], backend="aot_eager")
    return module


@compiled
def compiled_in_place():
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Linear(5, 5), nn.Linear(5, 3))
    module[2].weight.data = module[1].weight.data[:, :5].clone()
    module.compile(backend="aot_eager")
    return module


@compiled
@functools.cache
def compiled_pretrained():
    return compiled_as_a_whole()


@compiled
def compiled_lazy():
    return torch.compile(nn.Sequential(nn.Flatten(), nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(3)), backend="aot_eager")


class Zoo(nn.Module):
    def __init__(self, but=(), more=()):
        super().__init__()
        cages = {name: make for name, make in ZOO.items() if name not in but} | {name: COMPILED[name] for name in more}
        self.cages = nn.ModuleDict({name: make() for name, make in cages.items()})

    def forward(self, x):
        return torch.stack([cage(x) for cage in self.cages.values()]).mean(0)
