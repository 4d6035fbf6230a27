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

# Fabric announces every process. Its log level is set here because the children of `spawn` import
# this module first.
logging.getLogger("lightning_fabric.utilities").setLevel(logging.WARNING)
# torch logs every process that it ends after another one failed. The failure itself is reported.
logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)

Item = TypeVar("Item")
Module = TypeVar("Module", bound=nn.Module)


# Read before Fabric's launchers divide the number, as they do unless OMP_NUM_THREADS is set.
_THREADS = torch.get_num_threads()

_PRECISIONS = {"64": "64-true", "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


@dataclass(frozen=True)
class Devices:
    """What a task other than pretraining asks of the machine, in place of `Settings`."""

    accelerator: str = "auto"
    devices: int = 1
    precision: str = "32"


def create_fabric(settings: Settings | Devices, patience: timedelta = PATIENCE) -> "Fabric":
    """Create a Fabric: one process, several that it starts itself, or those of torchrun or SLURM.

    Args:
        settings: of which accelerator, number of devices and precision are used.
        patience: how long processes wait for each other.

    Raises:
        UserError: if this machine lacks the accelerator or has too few devices or processes, or the
            accelerator does not support the precision.
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
    if "SLURM_NTASKS" in os.environ:  # Fabric requires what srun's --ntasks alone does not set
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
    """Run a task on every process; an error raised there is raised here too.

    Args:
        fabric: from `create_fabric`.
        task: called with the Fabric of its process. Bind its arguments beforehand: those that
            Fabric passes on are taken apart and rebuilt, which fails for frozen dataclasses.
    """
    # Processes that are started here are children of this one, which only waits for them.
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
    """The one-line error in the traceback of a spawned process, if it is one of this package's."""
    kinds: list[type[Exception]] = [UserError, *UserError.__subclasses__(), TrainingError]
    for kind in kinds:
        name = re.escape(f"{kind.__module__}.{kind.__name__}")
        if found := re.search(rf"^{name}: (.*)$", str(error), re.MULTILINE):
            return kind(found[1])
    return None


def local_world_size(settings: Settings | Devices) -> int:
    """Processes on this machine: as many as torchrun or SLURM started, else `settings.devices`."""
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
    """Call a module that Fabric has set up, without Fabric's cast of the inputs.

    In mixed precision, Fabric casts inputs to float16 or bfloat16, which are too coarse for the
    gradients of a loss.
    """

    def call(*inputs: Tensor) -> Tensor:
        with fabric.autocast():
            output: Tensor = wrapped._forward_module(*inputs)  # type: ignore[operator]
        return output

    return call


def on_main_rank(fabric: "Fabric", task: Callable[[], None]) -> None:
    """Run a task on the first rank alone; if it raises a UserError, every rank raises it."""
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
    """Decides after which steps the ranks vote on whether to stop.

    For a vote, ranks wait for each other. On GPUs they therefore vote only about every two seconds.
    """

    def __init__(self, fabric: "Fabric", step: int) -> None:
        self._fabric = fabric
        self._interval = 1  # steps
        self._next, self._voted_at = step + self._interval, time.monotonic()

    def due(self, step: int) -> bool:
        """Whether the ranks vote after this step; the same on every rank."""
        return step == self._next

    def reschedule(self, step: int, now: float) -> None:
        """Choose the step of the next vote, after one at `step`; every rank must call it."""
        if self._fabric.world_size > 1 and self._fabric.device.type != "cpu":
            two_seconds = 2 * self._interval / (now - self._voted_at)  # in steps
            self._interval = round(broadcast(self._fabric, max(1, two_seconds)))
        self._next, self._voted_at = step + self._interval, now


def divide_threads(processes: int) -> None:
    """Give each of `processes` on this machine its share of the cores."""
    if processes == 1:
        return
    # What torch would use for one process: it takes CPU affinity and OMP_NUM_THREADS into account.
    threads = _THREADS
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Here OMP_NUM_THREADS is per process. torchrun sets it to 1 whatever the machine has, so 1
        # is taken as not set.
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
    """Stop DDP from broadcasting buffers: synchronised batch norm has the same on every rank."""
    ddp = wrapped._forward_module
    ddp.broadcast_buffers = False  # type: ignore[union-attr]


def convert_sync_batch_norm(module: Module, device: torch.device) -> Module:
    """Convert batch norm to torch's synchronised kind, which exists for all devices but the CPU."""
    if device.type == "cpu":
        return module  # on CPU, `exact_batch_norm` synchronises it
    from timm.layers.norm_act import convert_sync_batchnorm

    converted: Module = convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    return converted
