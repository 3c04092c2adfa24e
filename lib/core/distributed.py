"""Several processes that train one model: who this one is, and what they tell each other.

Started by `torchrun`, or by `srun` with a task for every GPU. Without either there is one process
and every function here does the obvious for one.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from core.errors import UserError
from core.train_graphs import on_training_stream

# Host-side talk may wait for rank 0 to read annotations or to evaluate; a process that dies closes
# its connections, which ends the wait at once.
_PATIENCE = timedelta(days=1)
_FAREWELL = 30.0  # seconds
_host_group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Launch:
    """This process among all: `rank` of `world_size`, `local_rank` on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def launch_from_environment(environment: Mapping[str, str] = os.environ) -> Launch:
    """What torchrun's variables, or else those of SLURM's `srun`, say."""
    if "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    # A batch script has SLURM_NTASKS too; only what srun starts has a number of tasks of a step.
    elif int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    else:
        return Launch()
    try:
        return Launch(*(int(environment[name]) for name in names))
    except (KeyError, ValueError) as error:
        raise UserError(
            f"the environment has {names[1]} but no usable {error}: start the script with "
            "torchrun, or with srun and a task for every GPU"
        ) from error


def join(launch: Launch, environment: dict[str, str] | None = None) -> None:
    """Meet the other processes; nothing for a single one. `leave` undoes it."""
    global _host_group
    if launch.world_size == 1:
        return
    environment = os.environ if environment is None else environment
    if "MASTER_ADDR" not in environment:  # srun
        environment["MASTER_ADDR"] = first_host(environment["SLURM_STEP_NODELIST"])
        # Jobs on one machine must not meet: a port that follows from the job's number.
        environment["MASTER_PORT"] = str(20000 + int(environment["SLURM_JOB_ID"]) % 20000)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, rank=launch.rank, world_size=launch.world_size)
    _host_group = dist.new_group(backend="gloo", timeout=_PATIENCE)


def leave() -> None:
    """End what `join` began."""
    global _host_group
    if dist.is_initialized():
        _host_group = None
        dist.destroy_process_group()


@contextlib.contextmanager
def without_peers() -> Iterator[None]:
    """In the block a GPU stops waiting for processes that may be gone; nothing is exchanged on it
    after that.

    Recorded exchanges have no time limit. The block drops the recordings: NCCL's abort ends what
    is under way, then waits for them to go.
    """
    if not (dist.is_initialized() and torch.cuda.is_available()):
        yield
        return
    backend = dist.group.WORLD._get_backend(torch.device("cuda"))
    abort = threading.Thread(target=backend.abort, daemon=True)
    abort.start()
    yield
    abort.join(_FAREWELL)


def first_host(nodes: str) -> str:
    """First name of a SLURM list of nodes: `node03` of `node[03-05,9],other1`."""
    name, number = re.match(r"([^,\[]*)(?:\[(\w+))?", nodes).groups()
    return name + (number or "")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device_of(launch: Launch, devices: list[torch.device]) -> list[torch.device]:
    """The one of a machine's devices that this process uses; all of them for a single process.

    Raises:
        UserError: there are more processes than GPUs.
    """
    if launch.world_size == 1 or devices[0].type == "cpu":
        return devices[:1] if launch.world_size > 1 else devices
    if launch.local_rank >= len(devices):
        raise UserError(
            f"process {launch.local_rank} of this machine has no GPU, torch sees {len(devices)}: "
            f"start at most {len(devices)} processes a machine (--nproc_per_node) and leave out "
            "--device cuda:N"
        )
    return [devices[launch.local_rank]]


def distribute(model: nn.Module) -> nn.Module:
    """The model as torch's DistributedDataParallel, or itself for a single process.

    Rank 0's weights become everyone's. The gradients of vectors (biases, weights of normalisations)
    stay this rank's own until `exchange_the_rest`: each would be copied and divided by itself, and
    they are most of the parameters.
    """
    if world_size() == 1:
        return model
    vectors = _vectors(model)
    # It is said of 1x1 convolutions in channels_last: strides of sizes of 1, which mean nothing.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    with on_training_stream(next(model.parameters()).device):
        for vector in vectors:  # it only looks after what needs a gradient now
            vector.requires_grad_(False)
        # Nothing but the frozen constants is a buffer: there is nothing to tell the others each
        # step.
        distributed = DistributedDataParallel(
            model, broadcast_buffers=False, gradient_as_bucket_view=True
        )
        for vector in vectors:
            vector.requires_grad_(True)
    # Every hundredth step it would read its clocks, which cannot be recorded (core.train_graphs).
    distributed._set_ddp_runtime_logging_sample_rate(1 << 30)
    return distributed


def _vectors(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model whose gradients `exchange_the_rest` exchanges."""
    trained = [p for p in model.parameters() if p.requires_grad]
    vectors = [p for p in trained if p.dim() <= 1]
    # DistributedDataParallel refuses a model of which it would have nothing to look after.
    return vectors[1:] if len(vectors) == len(trained) else vectors


def bare(model: nn.Module) -> nn.Module:
    """The model inside what `distribute` returned."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def without_exchange(model: nn.Module) -> contextlib.AbstractContextManager:
    """Backward passes inside add to this rank's own gradients only."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def exchange_the_rest(model: nn.Module, values: Tensor) -> Tensor:
    """After the last backward pass of a step, what the ranks have yet to agree on.

    Args:
        model: what `distribute` returned; its vectors' gradients become means over the ranks.
        values: (n,) float32.

    Returns:
        (n,): means of the values over the ranks. The host does not wait for them on a GPU.
    """
    if world_size() == 1:
        return values
    vectors = _vectors(model)
    own = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in vectors]
    together = torch.cat([*(grad.flatten() for grad in own), values])
    dist.all_reduce(together)
    together /= world_size()
    *means, values = together.split([*(p.numel() for p in vectors), len(values)])
    for vector, mean in zip(vectors, means, strict=True):
        vector.grad = mean.view_as(vector)
    return values


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value, group=_host_group)
    return values


def from_rank_zero(value: Any) -> Any:
    """Rank 0's value on every rank; the others wait for it."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_host_group)
    return box[0]


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """Rank 0 runs the block, then the others do (and find its caches)."""
    if world_size() == 1:
        yield
        return
    if rank() > 0:
        dist.barrier(group=_host_group)
    yield
    if rank() == 0:
        dist.barrier(group=_host_group)


class AgreedFlag:
    """The largest number that any rank has raised, known to all of them after the same step.

    The exchange of one step goes on during the next, so that no step waits for it.
    """

    def __init__(self) -> None:
        self._work: dist.Work | None = None
        self._value = torch.zeros(1, dtype=torch.int64)

    def exchange(self, own: int) -> int:
        """Call once a step on every rank: what was agreed on about the step before."""
        if world_size() == 1:
            return own
        agreed = 0
        if self._work is not None:
            self._work.wait()
            agreed = int(self._value)
        self._value = torch.tensor([own])
        self._work = dist.all_reduce(
            self._value, dist.ReduceOp.MAX, group=_host_group, async_op=True
        )
        return agreed

    def settle(self) -> None:
        """Wait until every rank has called `exchange` as often as this one; an error if one is
        gone, for whom a GPU would wait without end."""
        if self._work is not None:
            self._work.wait()

    def finish(self) -> None:
        """Take in the last exchange, before the ranks part."""
        if self._work is not None:
            self._work.wait()
            self._work = None
