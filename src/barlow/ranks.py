"""Devices and processes, started by Lightning Fabric."""

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessExitedException

from barlow.distributed import gather_objects
from barlow.errors import TrainingError, UserError, one_line
from barlow.rendezvous import PATIENCE, join, own_port
from barlow.settings import Settings
from barlow.signals import stop_on_signals

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# Fabric announces every process; set here because children of `spawn` import this first.
logging.getLogger("lightning_fabric.utilities").setLevel(logging.WARNING)
# And torch every process that it ends when another has failed; the failure itself is told.
logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)

Item = TypeVar("Item")
Module = TypeVar("Module", bound=nn.Module)


# Before Fabric's launchers divide it, which they do unless OMP_NUM_THREADS is set.
_THREADS = torch.get_num_threads()

_PRECISIONS = {"64": "64-true", "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


@dataclass(frozen=True)
class Devices:
    """What a task asks of the machine, where `Settings` would say more than it has to."""

    accelerator: str = "auto"
    devices: int = 1
    precision: str = "32"


def create_fabric(settings: Settings | Devices, patience: timedelta = PATIENCE) -> "Fabric":
    """A Fabric for these settings: one process, several of ours, torchrun's or SLURM's.

    Args:
        settings: what is asked for.
        patience: how long processes wait for each other.

    Raises:
        UserError: if this machine has no such accelerator, or not as many devices, or the
            accelerator not such a precision.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.ddp import DDPStrategy
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    several = settings.devices > 1 or externally_launched()
    strategy: Any = "auto"
    if several:
        strategy = DDPStrategy(
            gradient_as_bucket_view=True,
            start_method="popen" if externally_launched() else "spawn",
            timeout=patience,
        )
    if "SLURM_NTASKS" in os.environ:  # Fabric insists on what srun's --ntasks alone does not set
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(local_world_size(settings)))
    try:
        fabric = Fabric(
            accelerator=settings.accelerator,
            devices=local_world_size(settings),
            num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", os.environ.get("SLURM_NNODES", 1))),
            strategy=strategy,
            precision=_PRECISIONS[settings.precision],  # type: ignore[arg-type]
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot use accelerator {settings.accelerator!r} with {settings.devices} device(s): "
            f"{one_line(error)}"
        ) from error
    if fabric.device.type == "mps" and settings.precision == "64":
        raise UserError("mps does not support float64: use --precision 32 or --accelerator cpu")
    if externally_launched() and fabric.world_size < settings.devices:
        raise UserError(
            f"--devices is {settings.devices}, but srun or torchrun started only "
            f"{fabric.world_size} process(es) in all: have it start as many as --devices"
        )
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        join(fabric.device, patience)
    return fabric


def launch(fabric: "Fabric", task: Callable[["Fabric"], None]) -> None:
    """Run a task on every process; its error is raised here as it was raised there.

    Args:
        fabric: from `create_fabric`.
        task: called with the Fabric of its process. Arguments are bound to it beforehand: Fabric
            takes those it passes on apart, and frozen ones not at all.
    """
    # Started here, the others are children of this process, which only waits.
    children = fabric.world_size > 1 and not externally_launched()
    try:
        with (
            own_port() if children else nullcontext(),
            stop_on_signals(pass_on=True) if children else nullcontext(),
        ):
            fabric.launch(task)
    except (UserError, TrainingError):
        raise
    except Exception as error:
        if original := _error_from_child(error):
            raise original from None
        by_gloo = isinstance(error, RuntimeError) and "third_party/gloo/" in str(error)
        if isinstance(error, dist.DistError | ProcessExitedException) or by_gloo:
            raise TrainingError(
                "lost contact with another process: run the same command again to resume"
            ) from error
        raise


def _error_from_child(error: Exception) -> Exception | None:
    """The one-line error in the traceback that a spawned process left behind, if it is ours."""
    kinds: list[type[Exception]] = [UserError, *UserError.__subclasses__(), TrainingError]
    for kind in kinds:
        name = re.escape(f"{kind.__module__}.{kind.__name__}")
        if found := re.search(rf"^{name}: (.*)$", str(error), re.MULTILINE):
            return kind(found[1])
    return None


def local_world_size(settings: Settings | Devices) -> int:
    """Processes on this machine: as many as torchrun or SLURM started, else as the settings say."""
    started = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE")
    if not started and (tasks := os.environ.get("SLURM_NTASKS")):
        return -(-int(tasks) // int(os.environ.get("SLURM_NNODES", 1)))
    return int(started or settings.devices)


def externally_launched() -> bool:
    """Whether torchrun or SLURM started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_NTASKS" in os.environ


def is_main_process() -> bool:
    """Whether this is the first process of a training, over all machines."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0


def without_input_cast(fabric: "Fabric", wrapped: nn.Module) -> Callable[..., Tensor]:
    """A module that Fabric has set up, without its cast of the inputs.

    In mixed precision Fabric casts them to float16 or bfloat16, too coarse for gradients of a loss.
    """

    def call(*inputs: Tensor) -> Tensor:
        with fabric.autocast():
            output: Tensor = wrapped._forward_module(*inputs)  # type: ignore[operator]
        return output

    return call


def on_main_rank(fabric: "Fabric", task: Callable[[], None]) -> None:
    """Run a task on the first rank alone; a UserError of it is raised on every rank."""
    refused = list[str]()
    if fabric.is_global_zero:
        try:
            task()
        except UserError as error:
            refused.append(str(error))
    for what in all_gather(fabric, refused):
        raise UserError(what)


def any_rank(fabric: "Fabric", condition: bool) -> bool:
    """Whether the condition holds on any rank; every rank gets the same answer."""
    if fabric.world_size == 1:
        return condition
    votes = fabric.all_reduce(torch.tensor(float(condition)), reduce_op="sum")
    assert isinstance(votes, Tensor)
    return bool(votes > 0)


def require_equal(fabric: "Fabric", value: float, what: str) -> None:
    """Raise TrainingError on every rank unless the value is the same on all."""
    if len(values := set(all_gather(fabric, [value]))) > 1:
        raise TrainingError(f"{what}: {', '.join(f'{v:g}' for v in sorted(values))}")


def broadcast(fabric: "Fabric", value: float) -> float:
    """The first rank's value, on every rank."""
    return fabric.broadcast(value) if fabric.world_size > 1 else value


def all_gather(fabric: "Fabric", items: list[Item]) -> list[Item]:
    """The items of every rank in one list, on every rank, in the order of the ranks."""
    if fabric.world_size == 1:
        return items
    return [item for part in gather_objects(items) for item in part]


class StopVote:
    """The steps after which the ranks agree on whether to stop.

    To agree, ranks wait for each other. GPUs therefore vote about every two seconds only.
    """

    def __init__(self, fabric: "Fabric", step: int) -> None:
        self._fabric = fabric
        self._interval = 1  # steps
        self._next, self._voted_at = step + self._interval, time.monotonic()

    def due(self, step: int) -> bool:
        """Whether the ranks vote after this step; the same on every rank."""
        return step == self._next

    def reschedule(self, step: int, now: float) -> None:
        """Choose the step of the next vote, after one at `step`; every rank has to call it."""
        if self._fabric.world_size > 1 and self._fabric.device.type != "cpu":
            two_seconds = 2 * self._interval / (now - self._voted_at)  # steps
            self._interval = round(broadcast(self._fabric, max(1, two_seconds)))
        self._next, self._voted_at = step + self._interval, now


def divide_threads(processes: int) -> None:
    """Give each of `processes` on this machine its share of the cores."""
    if processes == 1:
        return
    # As many as torch would take for one process: it knows of affinity and OMP_NUM_THREADS.
    threads = _THREADS
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # A process: what OMP_NUM_THREADS says, which torchrun sets to 1 whatever the machine has.
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        threads = processes * threads if threads > 1 else cores
    elif "SLURM_CPUS_PER_TASK" in os.environ:
        threads = processes * int(os.environ["SLURM_CPUS_PER_TASK"])
    torch.set_num_threads(max(1, threads // processes))


@contextmanager
def flush_denormals() -> Iterator[None]:
    """Within it, numbers below 1e-38 count as zero on the CPU.

    The momentum of a weight without gradient decays below that within a thousand steps, and a
    product of such numbers takes a CPU a hundred times as long.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def disable_buffer_broadcast(wrapped: nn.Module) -> None:
    """Let DDP broadcast no buffers: those of synchronised batch norm are the same on every rank."""
    ddp = wrapped._forward_module
    ddp.broadcast_buffers = False  # type: ignore[union-attr]


def convert_sync_batch_norm(module: Module, device: torch.device) -> Module:
    """The module with batch norm over all ranks where torch has it: everywhere but on CPU."""
    if device.type == "cpu":
        return module  # there `exact_batch_norm` does it
    from timm.layers.norm_act import convert_sync_batchnorm

    converted: Module = convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    return converted
