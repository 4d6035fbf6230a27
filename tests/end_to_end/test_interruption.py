"""Real processes, killed, signalled and left without room."""

import contextlib
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from barlow.checkpoint import load_checkpoint
from barlow.cli import main
from barlow.run import Run

SETTINGS = {
    "encoder": "resnet18",
    # Several ranks meet at every batch norm, of each view, forward and back: here are few.
    "encoder_args": {"layers": [1, 1, 0, 0], "channels": [8, 16, 16, 16]},
    "stem": "standard",
    "projector": [16, 16],
    "image_size": 32,
    "channels": 1,
    "views": "digits",
    "batch_size": 32,
    "limit": 128,
    "validation_limit": 64,
    "epochs": 10,
    "log_every": 1,
    "accelerator": "cpu",
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
FAULTS = Path(__file__).parents[2] / "benchmarks" / "faults.py"


def arguments(folder: Path, name: str, **settings) -> list[str]:
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(SETTINGS | settings))
    options = ["--recipe", str(recipe), "--out", str(folder / name)]
    return ["-m", "barlow", "pretrain", "mnist5k", *options]


def start(command: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
        start_new_session=True,
    )


def wait_for_step(process: subprocess.Popen, run: Run, step: int) -> None:
    for _ in range(12_000):
        if process.poll() is not None:
            raise AssertionError(process.communicate()[0])
        rows = run.metrics()
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} within four minutes")


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_checkpoint(run.last_checkpoint)["model"]


@pytest.mark.slow
def test_ten_kills_cost_nothing_but_the_steps_since_a_checkpoint(tmp_path):
    command = [sys.executable, str(FAULTS), "--kills", "10", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    tally = {n: int(c) for c, n in re.findall(r"^ *(\d+)  (.+)$", done.stdout, re.MULTILINE)}
    assert tally["kills"] == 10
    assert tally["runs that end bit-identical"] == tally["runs"] > 0
    assert tally["half a checkpoint lay there"] > 0


@pytest.mark.slow
def test_a_rank_is_killed_and_torchrun_starts_again_to_the_same_end(tmp_path):
    torchrun = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    ends = []
    for name in ("calm", "killed"):
        run = Run(tmp_path / name)
        process = start([*torchrun, *arguments(tmp_path, name, save_minutes=0.0)])
        if name == "killed":
            wait_for_step(process, run, 6)
            listed = subprocess.run(
                ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
            )
            os.kill(int(listed.stdout.split()[1]), signal.SIGKILL)
        output = process.communicate()[0]
        assert process.returncode == 0, output
        assert ("resuming" in output) == (name == "killed")
        assert output.count("epoch 10.00/10") == 1, "one rank speaks"
        ends.append(weights(run))
    calm, killed = ends
    for name in calm:
        # Sums over processes may be taken in another order after a restart.
        torch.testing.assert_close(killed[name], calm[name], rtol=1e-5, atol=1e-6)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_two_machines_meet_again_though_one_has_restarted_more_often(tmp_path):
    """Two torchruns, as on two machines; one of them is killed with its rank and started anew, so
    that it counts no restart where the other counts one."""
    torchrun = [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}"]
    task = arguments(tmp_path, "run", save_minutes=0.0, epochs=20)

    def machine(host: bool) -> subprocess.Popen:
        rendezvous = ["--rdzv-conf", f"is_host={int(host)},join_timeout=120,keep_alive_interval=1"]
        return start([*torchrun, *rendezvous, *task], TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")

    run, stays, goes = Run(tmp_path / "run"), machine(host=True), machine(host=False)
    wait_for_step(stays, run, 6)
    listed = subprocess.run(["pgrep", "-P", str(goes.pid)], capture_output=True, text=True)
    for process in (goes.pid, *map(int, listed.stdout.split())):
        os.kill(process, signal.SIGKILL)
    goes.communicate()
    comes = machine(host=False)
    outputs = [process.communicate(timeout=300)[0] for process in (stays, comes)]
    assert (stays.returncode, comes.returncode) == (0, 0), outputs
    assert "resuming" in "".join(outputs)
    assert run.metrics()[-1]["step"] == 80


@pytest.mark.parametrize("devices", [1, 2])
def test_a_second_ctrl_c_exits_at_once(tmp_path, devices):
    # A step of many short operations: Python answers signals between them.
    long = {"batch_size": 3072, "limit": 3072, "accumulate": 96, "image_size": 128}
    command = [sys.executable, *arguments(tmp_path, "run", devices=devices, **long)]
    process, run = start(command), Run(tmp_path / "run")
    while not run.starts():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    time.sleep(5)
    for _ in range(3):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.7)
        if process.poll() is not None:
            break
    output = process.communicate(timeout=60)[0]
    assert process.returncode in (1, -signal.SIGINT)  # the third came while it was ending
    assert "saved" not in output
    assert not run.last_checkpoint.exists()


@pytest.mark.parametrize("devices", [1, 2])
def test_sigterm_saves_and_exits_within_five_seconds(tmp_path, devices):
    command = [sys.executable, *arguments(tmp_path, "run", devices=devices, epochs=1000)]
    process, run = start(command), Run(tmp_path / "run")
    wait_for_step(process, run, 3)
    before = time.monotonic()
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert time.monotonic() - before < 5 + 5 * devices  # and the time a process takes to end
    assert process.returncode == 1
    assert re.search(r"SIGTERM at step \d+ of 4000: checkpoint saved; run the same", output)
    assert "Traceback" not in output
    assert load_checkpoint(run.last_checkpoint)["step"] == run.metrics()[-1]["step"]


def test_slurms_warning_queues_the_job_again(tmp_path):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    path = f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, *arguments(tmp_path, "run", epochs=1000)]
    process = start(command, PATH=path, SLURM_JOB_ID="77")
    wait_for_step(process, Run(tmp_path / "run"), 3)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=60)[0]
    assert "SLURM will restart this job" in output
    assert (tmp_path / "asked").read_text() == "requeue 77\n"


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("may not mount a tmpfs here: " + mounted.stderr.decode().strip())
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_what_does_not_fit_on_the_disk_is_one_line_and_leaves_nothing(small_disk, capsys):
    file = small_disk / "encoder.safetensors"  # of five megabytes
    assert main(["export", "cifar10-small", "--format", "safetensors", "--out", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("barlow: cannot use the disk (No space left on device)")
    assert error.count("\n") == 1
    assert list(small_disk.iterdir()) == []


def test_a_full_disk_stops_nothing_and_what_waited_is_written_later(tmp_path, small_disk):
    command = [
        sys.executable,
        *arguments(small_disk, "run", save_minutes=0.0, epochs=120, save_every=120),
    ]
    process, run = start(command), Run(small_disk / "run")
    wait_for_step(process, run, 3)
    filler = small_disk / "filler"
    fill(filler)
    size = run.metrics_file.stat().st_size
    time.sleep(2)  # many steps
    assert process.poll() is None, "the training goes on"
    filler.unlink()
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert "training continues and will try again" in output
    assert "Traceback" not in output
    assert run.metrics_file.stat().st_size > size
    assert [row["step"] for row in run.metrics()] == list(range(1, 481)), "no row is lost"
    assert load_checkpoint(run.last_checkpoint)["step"] == 480


def test_a_mistake_on_two_ranks_is_one_line(tmp_path):
    command = [sys.executable, *arguments(tmp_path, "run", devices=2, limit=16)]
    process = start(command)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 2, output
    assert output.count("\n") == 1, output
    assert "fewer than one batch of 32" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("devices", [1, 2])
def test_a_second_training_in_the_same_run_is_refused_until_the_first_is_killed(tmp_path, devices):
    command = [sys.executable, *arguments(tmp_path, "run", devices=devices, epochs=1000)]
    first, run = start(command), Run(tmp_path / "run")
    wait_for_step(first, run, 3)
    before = run.starts()
    second = start(command)
    output = second.communicate(timeout=120)[0]
    assert second.returncode == 2, output
    assert output.count("\n") == 1, output
    named = re.search(
        rf"process (\d+) on host {re.escape(socket.gethostname())} is already training", output
    )
    os.kill(int(named[1]), 0)  # it is there
    assert run.starts() == before
    assert first.poll() is None
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    third = start(command)
    while len(run.starts()) == len(before):
        assert third.poll() is None, third.communicate()[0]
        time.sleep(0.1)
    os.killpg(third.pid, signal.SIGKILL)
    third.communicate()
