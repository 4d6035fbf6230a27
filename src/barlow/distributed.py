"""The default process group, or a single process where there is none."""

from typing import Any, TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


def rank() -> int:
    """The rank of this process; 0 without a process group."""
    return dist.get_rank() if _initialized() else 0


def world_size(group: Any = None) -> int:
    """The number of processes in a group, by default in all; 1 without a process group."""
    return dist.get_world_size(group) if _initialized() else 1


def gather_objects(value: Value) -> list[Value]:
    """The value of every rank, on every rank, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
