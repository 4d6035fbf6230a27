from types import SimpleNamespace

import pytest
import torch

from barlow.data.splits import NoSuchSplit
from barlow.errors import TrainingError, UserError
from barlow.ranks import (
    Devices,
    StopVote,
    create_fabric,
    divide_threads,
    launch,
    local_world_size,
    require_equal,
)

OUTSIDE = ("LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_CPUS_PER_TASK")
SPLIT = "barlow.data.splits.NoSuchSplit"
SLURM = ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES", "SLURM_JOB_ID", "SLURM_PROCID")


@pytest.fixture
def environment(monkeypatch):
    """Sets variables where none of a launcher is set."""
    for name in (*OUTSIDE, *SLURM):
        monkeypatch.setenv(name, "")  # so that what is set meanwhile is gone afterwards
        monkeypatch.delenv(name)

    def set_all(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return set_all


def _disagree(rank, world_size):
    fabric = SimpleNamespace(world_size=world_size)
    require_equal(fabric, 7.0, "the steps differ")
    try:
        require_equal(fabric, 90.0 + 10 * rank, "the steps differ")
    except TrainingError as error:
        return str(error)


def test_ranks_that_disagree_all_stop(on_ranks):
    assert on_ranks(2, _disagree) == ["the steps differ: 90, 100"] * 2


@pytest.mark.parametrize(("device", "following"), [("cpu", 12), ("cuda", 31)])
def test_gpus_agree_on_stopping_about_every_two_seconds_only(device, following):
    fabric = SimpleNamespace(
        world_size=2, device=torch.device(device), broadcast=lambda steps: steps
    )
    vote = StopVote(fabric, step=10)
    vote._voted_at = 100.0
    assert vote.due(11)
    vote.reschedule(11, now=100.1)
    assert [step for step in range(12, 40) if vote.due(step)] == [following]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, 3),
        ({"LOCAL_WORLD_SIZE": 4, "SLURM_NTASKS": 2}, 4),  # torchrun within SLURM
        ({"SLURM_NTASKS": 16, "SLURM_NTASKS_PER_NODE": 8, "SLURM_NNODES": 2}, 8),
        ({"SLURM_NTASKS": 16, "SLURM_NNODES": 2}, 8),
        ({"SLURM_NTASKS": 3, "SLURM_NNODES": 2}, 2),
        ({"SLURM_NTASKS": 1}, 1),
    ],
)
def test_processes_are_those_that_were_started(environment, variables, expected):
    environment(**variables)
    assert local_world_size(Devices(devices=3)) == expected


def test_devices_that_slurm_did_not_start_are_refused(environment):
    environment(SLURM_NTASKS=1, SLURM_JOB_ID=7, SLURM_JOB_NAME="train", SLURM_PROCID=0)
    environment(SLURM_LOCALID=0, SLURM_NODEID=0)
    with pytest.raises(UserError, match=r"--devices is 2.*started only 1 process"):
        create_fabric(Devices("cpu", 2))


def test_tasks_of_slurm_need_not_be_told_by_node(environment):
    environment(SLURM_NTASKS=2, SLURM_JOB_ID=7, SLURM_JOB_NAME="train", SLURM_PROCID=1)
    environment(SLURM_LOCALID=1, SLURM_NODEID=0)
    fabric = create_fabric(Devices("cpu"))
    assert (fabric.world_size, fabric.global_rank, fabric.local_rank) == (2, 1, 1)


@pytest.mark.parametrize(
    ("processes", "threads", "variables", "expected"),
    [
        (1, 8, {}, 8),
        (4, 8, {}, 2),
        (4, 2, {}, 1),
        (4, 8, {"SLURM_NTASKS": 4, "SLURM_CPUS_PER_TASK": 3}, 3),
        (4, 8, {"TORCHELASTIC_RUN_ID": "a"}, 8),  # told by OMP_NUM_THREADS
        (2, 1, {"TORCHELASTIC_RUN_ID": "a"}, 3),  # torchrun's own setting
    ],
)
def test_processes_share_the_cores(
    environment, monkeypatch, processes, threads, variables, expected
):
    environment(**variables)
    given = []
    monkeypatch.setattr("barlow.ranks._THREADS", threads)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    divide_threads(processes)
    assert given == ([] if processes == 1 else [expected])


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (UserError("no folder /home/gloo/third_party/gloo/images"), UserError, "no folder"),
        (RuntimeError("[/x/third_party/gloo/gloo/y.cc:5] Closed"), TrainingError, "lost contact"),
        (RuntimeError("/home/gloo/weights: of another shape"), RuntimeError, "another shape"),
        (Exception(f"Traceback\n  x\n{SPLIT}: no split 'val' in x\n"), NoSuchSplit, "^no split"),
    ],
)
def test_an_error_is_raised_as_what_it_is(error, kind, told):
    def fail(fabric):
        raise error

    with pytest.raises(kind, match=told):
        launch(create_fabric(Devices("cpu")), fail)
