"""How the processes of a training find each other."""

import atexit
import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import Store, TCPStore, rendezvous  # type: ignore[attr-defined]

from barlow.errors import TrainingError

PATIENCE = timedelta(minutes=30)
"""How long processes wait for each other; torch's own default for gloo."""

_WHERE = "barlow"  # key of the address in torchrun's store
_STORES: list[Store] = []  # kept open as long as this process, which may host them


def join(device: torch.device, patience: timedelta) -> None:
    """Join the other processes of torchrun, those of this start and not of an earlier one."""
    # After a restart, torchrun's store still has the addresses of the processes that died, and its
    # count of restarts differs between machines. So the first process opens a store of its own and
    # announces its address; at an address left by a dead process, nobody answers.
    bootstrap_store, rank, world_size = next(rendezvous("env://"))
    store = _find_store(bootstrap_store) if rank else _open_store(bootstrap_store)
    store.set_timeout(patience)
    _STORES.extend([bootstrap_store, store])
    cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=patience,
        device_id=device if cuda else None,
    )
    if cuda:
        atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _open_store(bootstrap_store: Store) -> TCPStore:
    host = "127.0.0.1" if os.environ["GROUP_WORLD_SIZE"] == "1" else socket.getfqdn()
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
    bootstrap_store.set(_WHERE, f"{host} {store.port}")
    return store


def _find_store(bootstrap_store: Store, tries: int = 100) -> TCPStore:
    for _ in range(tries):
        host, port = bootstrap_store.get(_WHERE).decode().split()
        try:
            seconds = timedelta(seconds=5)
            return TCPStore(host, int(port), timeout=seconds, wait_for_workers=False)
        except (dist.DistError, dist.DistNetworkError):
            time.sleep(0.2)  # the first process may not have announced its new address yet
    raise TrainingError(
        f"cannot reach the first process at {host}:{port}, the address it announced"
    )


@contextmanager
def own_port() -> Iterator[None]:
    """Within it, the processes of this machine meet at a free port that is chosen here.

    It is not a port that the system hands out, as Fabric would take: until the first process
    listens there, which takes seconds, the system may hand it out again.
    """
    if "MASTER_PORT" in os.environ:
        yield
        return
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            break
    os.environ["MASTER_PORT"] = str(port)
    try:
        yield
    finally:
        del os.environ["MASTER_PORT"]
