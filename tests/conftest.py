"""What several tests share."""

import multiprocessing
import os
import signal
import socket
from multiprocessing import forkserver

# What runs in the background of a shell without job control ignores Ctrl-C, and so would its
# children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Many small models: threads would spend their time waiting for each other. Before torch loads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _rank(rank, world_size, port, function, args, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        results[rank] = function(rank, world_size, *args)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def imported():
    """Processes of the method "forkserver" start with what takes seconds to import."""
    multiprocessing.set_forkserver_preload(["barlow.loss", "pytest", "timm"])
    forkserver.ensure_running()


@pytest.fixture
def on_ranks(imported):
    """`on_ranks(n, function, *args)`: what `function(rank, n, *args)` returns on n gloo ranks."""

    def run(world_size, function, *args):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with mp.Manager() as manager:
            results = manager.dict()
            given = (world_size, port, function, args, results)
            mp.start_processes(_rank, given, world_size, start_method="forkserver")
            return [results[r] for r in range(world_size)]

    return run
