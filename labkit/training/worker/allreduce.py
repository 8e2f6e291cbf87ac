"""The process group of an all-reduce: torch DistributedDataParallel among the workers of a lab.

DDP averages gradients over ranks; here they are averaged over samples, g = sum_j b_j g_j / sum_l b_l with b_j the batch of rank
j at this step, so that unequal shards (IDPA's too) give the gradient of the joint batch. Every rank takes the same number of
steps with batches in proportion to its shard: no rank waits for a missing batch.

A problem with several networks that are used one after the other (`Problem.networks`) has each of them wrapped on its own.

A group lives as long as its ranks. When one is lost gloo reports it to the others at once, or the server does if it is frozen, or
while gloo still connects them; the step under way fails with `Broken`, and the worker asks for a new group.

The ranks find each other through files in the run directory, without a listening store; gloo itself then
connects them over TCP, without authentication or encryption, on loopback where all are on one host. (A torch built with
USE_GLOO_WITH_OPENSSL=ON takes GLOO_DEVICE_TRANSPORT=TCP_TLS from the environment; the wheel of 2.13 says "unsupported gloo device" then.)

Used by `labkit.training.worker.worker`, `labkit.training.worker.replica` and `labkit.simulation.joint`; `check_problem` by
`labkit.training.train`.
"""

import contextlib
import copy
import datetime
import os
import queue
import re
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from labkit.errors import ClusterError, ProblemError
from labkit.models import seeded
from labkit.models.batch_norm import Ranks, together
from labkit.problems.problem import Clock, Problem, noise
from labkit.problems.trial import SHOWN
from labkit.training.worker.heartbeat import Heartbeat

# One-channel images in channels_last give the first convolution a gradient of equal layout but other strides: nothing is wrong.
warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
# A parameter that takes no part in one step may take part in another.
warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")

TIMEOUT = datetime.timedelta(seconds=60)  # of an exchange; a rank that is gone is noticed at once, a frozen one by the server
FORMING_S = 30.0  # how long the ranks may take to find each other

GONE = "the server says that a worker is gone"  # the reason where the exchange itself has not failed
UNUSED = "a parameter took no part in the loss of a step"  # the reason of `Unused`


class Broken(Exception):
    """The group can no longer be used: a rank is gone. Caught by the worker, which asks for a new group."""


class Unused(Broken):
    """A parameter took no part in the loss, which DDP has to know beforehand: the next group does."""


class ProcessGroup:
    """One rank's membership, from `__init__` to `close`; `close` is what the other ranks notice when this one is gone.

    `index` is this worker, `ranks` are the workers that make the group, `number` says how often one was formed in this run;
    `one_process`: the ranks are threads of one process. `meeting` begins the names of the files through which they find each
    other. `unused`: on this rank, or another, a step may leave parameters without a gradient. `sync_batchnorm`: batch normalisations are
    by the joint batch of a step. The `heartbeat` is notified by the server when a rank is gone, and then breaks off an exchange that waits
    for it.
    """

    def __init__(
        self,
        index: int,
        ranks: Sequence[int],
        number: int,
        heartbeat: Heartbeat,
        *,
        meeting: str,
        device: str = "cpu",
        one_process: bool = False,
        unused: bool = False,
        sync_batchnorm: bool = False,
    ) -> None:
        if not dist.is_available():
            raise ClusterError("this torch was built without torch.distributed, which update='allreduce' needs. Use 'sgwu'.")
        self.one_process, self.number, self.rank, self.heartbeat = one_process, number, ranks.index(index), heartbeat
        self.exchange, self.parts, self.sync_batchnorm = _Exchange(None, 1 / len(ranks), _Waiting()), [], sync_batchnorm
        self.module: torch.nn.Module | None = None  # what `wrap` has made
        file = f"{meeting}-{number}"
        found = self._meet(file, len(ranks), (socket.gethostname(), device, str(unused)))
        devices, self.unused = [(host, device) for host, device, _ in found], any(unused == "True" for *_, unused in found)
        try:
            if one_process or backend(devices) == "gloo":
                self.exchange.group = self._form(file, len(ranks), one_host=one_process or len({host for host, _ in devices}) == 1)
            else:
                # torch counts groups by process, also those that were never formed, and finds the other ranks under that number.
                dist.distributed_c10d._world.group_count = 0
                dist.init_process_group(
                    "nccl", init_method=f"file://{file}", rank=self.rank, world_size=len(ranks), timeout=TIMEOUT
                )
                self.exchange.group = dist.group.WORLD
        except RuntimeError as error:
            self.close()
            raise Broken(f"the group could not be formed: {error}") from error
        heartbeat.on_interrupt = lambda: self.exchange.waiting.fail(GONE)

    def _meet(self, file: str, n_ranks: int, own: tuple[str, str, str]) -> list[tuple[str, str, str]]:
        """Wait until every rank is here; host, device and `unused` of each, of which `own` are this one's.

        torch would wait for the whole of its time limit for one that is gone.
        """
        store, ranks = dist.FileStore(f"{file}-here", n_ranks), [str(rank) for rank in range(n_ranks)]
        store.set(str(self.rank), " ".join(own))
        limit = time.monotonic() + FORMING_S
        while not store.check(ranks):
            if self.heartbeat.interrupt or time.monotonic() > limit:
                raise Broken(f"not all of {n_ranks} ranks came within {FORMING_S:g} s")
            time.sleep(0.01)
        return [tuple(store.get(rank).decode().split(" ")) for rank in ranks]

    def _form(self, file: str, n_ranks: int, one_host: bool) -> dist.ProcessGroup:
        """The group of gloo. It waits for a rank that is lost meanwhile until its time limit, and cannot be broken off: in a thread."""
        formed: queue.SimpleQueue[dist.ProcessGroup | RuntimeError] = queue.SimpleQueue()

        def form() -> None:
            try:
                formed.put(_gloo(file, self.rank, n_ranks, one_host))
            except RuntimeError as error:
                formed.put(error)

        threading.Thread(target=form, name="labkit-gloo", daemon=True).start()
        while not self.heartbeat.interrupt:
            with contextlib.suppress(queue.Empty):
                group = formed.get(timeout=0.01)
                if isinstance(group, RuntimeError):
                    raise group
                return group
        raise Broken(GONE)

    def wrap(self, module: torch.nn.Module, networks: Sequence[torch.nn.Module] = ()) -> torch.nn.Module:
        """The module whose backward pass averages gradients over the samples of all ranks.

        With several `networks` in it each of them is wrapped, and what is returned is `module` with these in their places.
        """
        wrapped = {}
        for network in networks or (module,):
            # Buffers are those of one version on every rank, and gloo has not all of their types.
            buffers = [name for name, _ in network.named_buffers(remove_duplicate=False)]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, buffers)
            with self.exchanging():  # the ranks compare their parameters
                ddp = DistributedDataParallel(network, process_group=self.exchange.group, find_unused_parameters=self.unused)
            ddp.broadcast_buffers = False  # the rule reduces them when the pass is over; until then no rank waits for them
            ddp.register_comm_hook(self.exchange, _average)
            self.parts.append(ddp)
            wrapped[network] = ddp
        self.module = _with(wrapped, module)
        return self.module

    @contextlib.contextmanager
    def exchanging(self) -> Iterator[None]:
        """An error of the other ranks in here is `Broken`; one of the model stays what it is."""
        try:
            yield
            for part in self.parts:
                part._check_reducer_finalized()  # else the next forward pass says it, and after the last step nobody does
        except RuntimeError as error:
            if "Expected to have finished reduction" in str(error) and not self.unused:
                raise Unused(UNUSED) from error
            if self.exchange.waiting.broken or isinstance(error, dist.DistError) or "gloo" in str(error):
                raise Broken(self.exchange.waiting.broken or _short(error)) from error
            raise

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """A step of the wrapped module, whose errors are those of `exchanging`."""
        normalised = together(Ranks(self._add_up, self.exchange.weight)) if self.sync_batchnorm else contextlib.nullcontext()
        with self.exchanging(), normalised:
            yield

    def begin(self, weight: float) -> None:
        """A step comes, of whose samples this rank has the share `weight`."""
        self.exchange.weight = weight
        self.exchange.waiting.seconds.clear()

    def _add_up(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of these over the ranks, each of which has as many; in the middle of a step."""
        begun, waiting = time.perf_counter(), self.exchange.waiting
        total = waiting.new()
        if not total.done():
            work = self.exchange.group.allreduce([values])
            work.get_future().add_done_callback(lambda future: waiting.done(total, future))
        total.wait()  # which `fail` can end
        work.wait()  # on a card the sum may only be queued
        waiting.seconds.append(time.perf_counter() - begun)
        return values

    @property
    def waited(self) -> float:
        """Seconds that the latest step spent in exchanges, which is mostly waiting for the slowest rank."""
        return sum(self.exchange.waiting.seconds)

    def close(self) -> None:
        # The sockets of a gloo group close with its last owner, not before. The wrapped modules are emptied rather than
        # dropped, because torch may keep it (DistributedDataParallel._active_ddp_module, when ranks are threads), and before the
        # group, because its reducer would wait for gloo's threads with the lock of the interpreter, which they need.
        self.heartbeat.on_interrupt = lambda: None
        for part in self.parts:
            vars(part).clear()
        active = DistributedDataParallel._active_ddp_module  # one of another thread, too: each restores what it found
        if active is not None and not vars(active):  # what is compiled from now on is no part of it
            DistributedDataParallel._active_ddp_module = None
        self.parts, self.module = [], None
        if self.exchange.waiting.under_way:  # maybe with a rank that is frozen: the end of the group would wait for it
            late = self.exchange.group, self.exchange.waiting
            threading.Thread(target=_await, args=late, name="labkit-gloo", daemon=True).start()
        if dist.is_initialized() and self.exchange.group is dist.group.WORLD:
            dist.destroy_process_group()
        self.exchange.group = None


def check_problem(problem: Problem, seed: int) -> None:
    """A few steps of one rank, here; ProblemError for a problem that cannot be trained by all-reduce.

    A network whose forward pass is not called, or whose parts are trained one after the other, fails in the second step at the latest.
    Parameters that two ranks would change by something else than the gradients, as by the first batch that they see, are refused by
    name.
    """
    called: set[int] = set()
    with tempfile.TemporaryDirectory() as folder, seeded(seed):
        module = problem.new_module(seed)
        networks = networks_of(problem, module)
        optimisers, batch = problem.optimisers(module), problem.load(problem.train_indices()[:2])
        clock = Clock(0, 1, 0.0, noise(seed, 0))
        with gradients(module) as unused:
            problem.step(module, batch, optimisers, clock)
        group = ProcessGroup(0, [0], 0, Heartbeat(), meeting=os.path.join(folder, "group"), one_process=True, unused=bool(unused))
        try:
            wrapped = group.wrap(module, networks)
            for number, part in enumerate(group.parts):
                part.register_forward_pre_hook(lambda *_, number=number: called.add(number))
            with gradients(module) as untrained:
                for _ in range(2):
                    problem.step(wrapped, batch, optimisers, clock)
            passed_by = [n for n, network in enumerate(networks) if n not in called and not untrained.issuperset(_trained(network))]
            which = "the module" if networks == (module,) else f"network {(passed_by or [0])[0]} of networks()"
            reason = f"its step() never calls {which}" if passed_by or not called else ""
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0].split('. ')[0]}"
        finally:
            group.close()
    if reason:
        raise ProblemError(
            f"{problem._title()} cannot be trained with update='allreduce': {reason}. The module is wrapped as a whole to average "
            "gradients, so step() must call it (module(x), not module['part']). Networks that are used one after the other are for "
            "networks(module) to return, each is wrapped then; or use another update: 'sgwu', 'agwu'."
        )
    first, other = (_without_gradients(problem, seed, rank) for rank in range(2))
    shortened = {
        f"{path}.weight"
        for path, part in module.named_modules()
        if isinstance(part, torch.nn.Embedding | torch.nn.EmbeddingBag) and part.max_norm is not None
    }  # the rows that a batch looks up: here they may be the same ones
    if differ := [
        name for name, value in first.items() if name in shortened or not torch.allclose(value, other[name], equal_nan=True)
    ]:
        raise ProblemError(
            f"{problem._title()} cannot be trained with update='allreduce': {', '.join(map(repr, differ[:SHOWN]))} change by the "
            "samples of a batch, or at random, besides by its gradients, so that the ranks would train different networks. Keep such "
            "values in buffers, which are reduced after each local pass, or use another update: 'sgwu', 'agwu'."
        )


def _without_gradients(problem: Problem, seed: int, rank: int) -> dict[str, torch.Tensor]:
    """The parameters after a step whose gradients are zero; each rank has samples and random numbers of its own."""
    if getattr(problem, "inner", None) is not None:  # whose gradients may come from no backward pass
        problem = copy.copy(problem)
        problem.inner = None
    module, indices = problem.new_module(seed), problem.train_indices()
    for parameter in _trained(module):
        parameter.register_hook(torch.zeros_like)
    batch, optimisers = problem.load(indices[-2:] if rank else indices[:2]), problem.optimisers(module)
    with seeded(seed + rank):
        problem.step(module, batch, optimisers, Clock(0, 1, 0.0, noise(seed, rank)))
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def networks_of(problem: Problem, module: torch.nn.Module) -> tuple[torch.nn.Module, ...]:
    """The networks of a problem; ProblemError unless each trained parameter is in one of them, and in one alone."""
    networks, inside = tuple(problem.networks(module)), set(module.modules())
    title = f"{problem._title()}: networks(module)"
    if other := next((network for network in networks if not isinstance(network, torch.nn.Module) or network not in inside), None):
        raise ProblemError(f"{title} returned a {type(other).__name__} that is no part of the module.")
    trained = [_trained(network) for network in networks]
    for name, parameter in module.named_parameters():
        n = sum(parameter in some for some in trained)
        if n != 1 and parameter.requires_grad:
            what = "no network, so that its gradients would not be averaged" if n == 0 else f"{n} networks"
            raise ProblemError(f"{title} has parameter {name!r} in {what}. Each trained parameter belongs to one of them.")
    return tuple(network for network, some in zip(networks, trained, strict=True) if some)


def _trained(network: torch.nn.Module) -> set[torch.nn.Parameter]:
    return {parameter for parameter in network.parameters() if parameter.requires_grad}


def _with(wrapped: Mapping[torch.nn.Module, torch.nn.Module], module: torch.nn.Module) -> torch.nn.Module:
    """`module` with those parts in it replaced; what holds them is copied, and its tensors stay the same."""
    if module in wrapped:
        return wrapped[module]
    parts = {name: part and _with(wrapped, part) for name, part in module._modules.items()}
    if all(part is module._modules[name] for name, part in parts.items()):
        return module
    made = copy.copy(module)
    made._modules = parts
    return made


@contextlib.contextmanager
def gradients(module: torch.nn.Module) -> Iterator[set[torch.nn.Parameter]]:
    """The trained parameters that have had no gradient yet, as steps are made in here."""
    unused = {parameter for parameter in module.parameters() if parameter.requires_grad}
    hooks = [parameter.register_post_accumulate_grad_hook(unused.discard) for parameter in list(unused)]
    try:
        yield unused
    finally:
        for hook in hooks:
            hook.remove()
        unused -= {parameter for parameter in unused if parameter.grad is not None}  # set by what is no backward pass


def _short(error: Exception) -> str:
    """The message of gloo, without the line of its source."""
    return re.sub(r"^.*?\.cc:\d+\] ", "", str(error).splitlines()[0]).split(". This is")[0]


class _Waiting:
    """What a step waits for. It can be ended from here, which gloo offers no way to do."""

    def __init__(self) -> None:
        self.seconds: list[float] = []  # of the latest step
        self.broken = ""  # why the group cannot be used any more
        self.under_way = 0  # exchanges that gloo has begun and not ended
        self.lock, self.futures = threading.Condition(), []

    def new(self) -> torch.futures.Future:
        """For an exchange that comes now; failed already if none must begin any more."""
        with self.lock:
            self.futures = [future for future in self.futures if not future.done()]
            self.futures.append(torch.futures.Future())
            if self.broken:
                self.futures[-1].set_exception(RuntimeError(self.broken))
            else:
                self.under_way += 1
            return self.futures[-1]

    def done(self, future: torch.futures.Future, result: torch.futures.Future) -> None:
        with self.lock:
            self.under_way -= 1
            self.lock.notify_all()
            if future.done():
                return
            try:
                future.set_result(result.value()[0])
            except Exception as error:  # whatever it is, the step waits for this future
                self.broken = self.broken or _short(error)
                future.set_exception(RuntimeError(self.broken))

    def fail(self, why: str) -> None:
        """From another thread: what waits fails, and what would begin."""
        with self.lock:
            self.broken = self.broken or why
            for future in self.futures:
                if not future.done():
                    future.set_exception(RuntimeError(self.broken))


def _await(_: dist.ProcessGroup, waiting: _Waiting) -> None:
    """Own a group that is closed until its exchanges have ended, at the time limit at the latest; its threads and sockets go then."""
    with waiting.lock:
        waiting.lock.wait_for(lambda: not waiting.under_way)


@dataclass
class _Exchange:
    group: dist.ProcessGroup | None
    weight: float  # this rank's share of the samples of the coming step
    waiting: _Waiting


def backend(devices: list[tuple[str, str]]) -> str:
    """NCCL if each rank (host, device) has a card to itself; chosen for each group, as a newcomer may share a card."""
    return "nccl" if len(set(devices)) == len(devices) and all(device != "cpu" for _, device in devices) else "gloo"


def _average(exchange, bucket):  # no annotations: DDP compares them with types, and here they are strings
    begun, last, waiting = time.perf_counter(), bucket.is_last(), exchange.waiting
    average = waiting.new()
    if average.done():
        return average

    # In a thread of the group; it must not own the group, whose end waits for its threads. NCCL calls it when the exchange is only
    # queued on the card, so there waiting counts as computing.
    def done(future):
        if last:  # the earlier ones travel while the backward pass computes
            waiting.seconds.append(time.perf_counter() - begun)
        waiting.done(average, future)

    buffer = bucket.buffer().mul_(exchange.weight)
    exchange.group.allreduce([buffer]).get_future().add_done_callback(done)
    return average


def _gloo(file: str, rank: int, n_ranks: int, one_host: bool) -> dist.ProcessGroup:
    """A group that is not torch's default one, of which there is one for each process, and ranks may be threads.

    Ranks of one host are connected over loopback alone; of several, over what gloo finds, or the user has set.
    """
    store = dist.PrefixStore("labkit", dist.FileStore(file, n_ranks))
    store.set_timeout(TIMEOUT)
    if one_host:
        options = dist.ProcessGroupGloo._Options()
        options._timeout = TIMEOUT
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        backend = dist.ProcessGroupGloo(store, rank, n_ranks, options)
    else:
        backend = dist.ProcessGroupGloo(store, rank, n_ranks, TIMEOUT)  # reads GLOO_SOCKET_IFNAME
    group = dist.ProcessGroup(store, rank, n_ranks)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    for device in ("cpu", "cuda"):  # gloo takes gradients from a card too, by way of the host
        group._register_backend(torch.device(device), dist.ProcessGroup.BackendType.GLOO, backend)
    backend._set_sequence_number_for_group()
    return group
