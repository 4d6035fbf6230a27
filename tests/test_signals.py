import os
import signal
import stat
import time

import pytest

from barlow.signals import requeue, stop_on_signals


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_is_noted_and_the_usual_handler_comes_back(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.signal == name
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_exits_at_once():
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == "SIGINT", "what comes twice at once is one signal"
        assert not stop.warned
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (stop.signal, stop.warned) == ("SIGINT", True)
        time.sleep(0.6)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A program of that name which writes down what it was asked."""
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path / "asked"


def test_a_job_of_slurm_is_queued_again(scontrol, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert not requeue()
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    assert requeue()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "120")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert requeue()
    assert scontrol.read_text().splitlines() == ["requeue 123", "requeue 120_3"]


def test_a_refused_requeue_is_said(scontrol, monkeypatch, caplog):
    (scontrol.parent / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    assert not requeue()
    assert "cannot requeue SLURM job 123" in caplog.text
