import os
import pickle
import signal
import subprocess
import sys

import pytest
import torch

from barlow.checkpoint import load_checkpoint, load_last, previous, save_checkpoint, save_last
from barlow.errors import UserError

STATE = {"step": 3, "model": {"w": torch.arange(1000.0)}, "names": ["a", "b"]}


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    save_checkpoint(tmp_path / "a.ckpt", STATE)
    state = load_checkpoint(tmp_path / "a.ckpt")
    assert state["step"] == 3
    assert state["names"] == ["a", "b"]
    assert torch.equal(state["model"]["w"], STATE["model"]["w"])


def test_one_flipped_byte_is_noticed(tmp_path):
    save_checkpoint(tmp_path / "a.ckpt", STATE)
    damage(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"a\.ckpt"):
        load_checkpoint(tmp_path / "a.ckpt")


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(tmp_path, caplog):
    last = tmp_path / "last.ckpt"
    save_last(last, STATE)
    save_last(last, STATE | {"step": 4})
    assert load_last(last)["step"] == 4
    damage(last)
    assert load_last(last)["step"] == 3
    assert "trying the previous checkpoint" in caplog.text


def test_a_kill_between_writing_and_renaming_leaves_the_newest_to_resume_from(tmp_path):
    last = tmp_path / "last.ckpt"
    save_last(last, STATE)
    save_checkpoint(tmp_path / "last-new.ckpt", STATE | {"step": 4})
    last.rename(previous(last))
    damage(previous(last))
    assert load_last(last)["step"] == 4


def test_two_damaged_checkpoints_are_an_error_not_a_new_start(tmp_path):
    last = tmp_path / "last.ckpt"
    save_last(last, STATE)
    save_last(last, STATE)
    damage(last)
    damage(previous(last))
    with pytest.raises(UserError, match="no intact checkpoint"):
        load_last(last)


def test_no_checkpoint_is_none(tmp_path):
    assert load_last(tmp_path / "last.ckpt") is None


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_file_that_would_execute_code_is_refused_and_nothing_runs(tmp_path):
    trap = tmp_path / "executed"
    torch.save({"model": Touch(str(trap))}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match="execute code"):
        load_checkpoint(tmp_path / "evil.ckpt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Touch(str(trap)), protocol=2))
    with pytest.raises(UserError):
        load_checkpoint(tmp_path / "evil.pkl")
    assert not trap.exists()
    pickle.loads(pickle.dumps(Touch(str(trap)))).close()
    assert trap.exists(), "the trap works: unpickling would have sprung it"


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a.ckpt"
    save_checkpoint(path, STATE)
    before = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint(path, {"cannot be pickled": lambda: None})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.ckpt"]


WRITER = """
import sys, torch
from pathlib import Path
from barlow.checkpoint import save_last
step = 0
while True:
    step += 1
    save_last(Path(sys.argv[1]), {"step": step, "w": torch.full((2_000_000,), float(step))})
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_kill_inside_a_write_loses_nothing(tmp_path):
    last = tmp_path / "last.ckpt"
    for delay in (0.003, 0.011, 0.017, 0.029):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(last)], stdout=subprocess.PIPE, text=True
        ) as writer:
            for _ in range(2):
                written = int(writer.stdout.readline())
            signal.sigtimedwait([], delay)
            writer.send_signal(signal.SIGKILL)
            written = max([written, *map(int, writer.stdout.read().split())])
        state = load_last(last)
        assert state["step"] >= written
        assert torch.equal(state["w"], torch.full((2_000_000,), float(state["step"])))
