"""A run's folder is taken elsewhere, or loses its power, and goes on."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import barlow
from barlow import lock, pretraining
from barlow.checkpoint import load_checkpoint
from barlow.errors import TrainingError, UserError
from barlow.progress import Reporter
from barlow.run import METRICS, Run, open_run
from barlow.settings import Settings
from barlow.tracking import tracked

TINY = {
    "recipe": str(Path(__file__).parent / "digits.yaml"),
    "encoder_args": {"levels": [0, 0, 1, 1, 1, 1], "channels": [4, 4, 8, 8, 8, 16]},
    "projector": [16, 16],
    "batch_size": 8,
    "epochs": 2,
    "save_minutes": 0.0,
    "accelerator": "cpu",
}


class Crash(Exception):
    pass


class StopAtTwo(Reporter):
    def step(self, step):
        if step == 2:
            raise Crash


def images(folder, names):
    folder.mkdir()
    for i, name in enumerate(names):
        Image.new("L", (32, 32), 20 * i).save(folder / f"{name}.png")


def test_a_run_goes_on_where_its_images_and_its_folder_were_copied_to(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    images(here / "train", "abcdefgh")
    images(here / "held-out", "ijklmnop")
    settings = TINY | {"validation": str(here / "held-out")}
    with pytest.raises(Crash):
        barlow.pretrain(str(here / "train"), here / "run", **settings, reporter=StopAtTwo())
    assert load_checkpoint(here / "run" / "checkpoints" / "last.ckpt")["step"] == 1
    here.rename(there)
    settings["validation"] = str(there / "held-out")
    run = barlow.pretrain(str(there / "train"), there / "run", **settings)
    assert [start["step"] for start in run.starts()] == [0, 1]
    assert run.metrics()[-1]["step"] == 2
    assert run.settings().source == str(there / "train")

    images(tmp_path / "others", "ABCDEFGH")
    for epochs in (2, 3):  # it is finished, or goes on
        with pytest.raises(UserError, match=r"was trained on 8 images of .* these 8 are different"):
            barlow.pretrain(str(tmp_path / "others"), run.path, **settings | {"epochs": epochs})


def test_other_settings_that_name_a_place_are_still_refused(tmp_path):
    run = Run(tmp_path)
    run.config_file.write_text(yaml.safe_dump(Settings("a", init="b").to_dict()))
    run.epoch_checkpoint(1).parent.mkdir()
    run.epoch_checkpoint(1).touch()
    assert open_run(tmp_path, Settings("elsewhere/a", init="b")) == run
    with pytest.raises(UserError, match="init was 'b', is 'c'"):
        open_run(tmp_path, Settings("a", init="c"))


def too_large(*arguments, **options):
    torch.empty(10**15, dtype=torch.uint8)


def test_a_step_too_large_for_the_memory_says_what_takes_less_and_that_is_then_taken(
    tmp_path, monkeypatch
):
    images(tmp_path / "train", "abcdefgh")
    run = Run(tmp_path / "run")
    monkeypatch.setattr(pretraining, "accumulate", too_large)
    told = r"^a step does not fit in memory: try --accumulate 4 .* bf16 \(about half\), .*$"
    with pytest.raises(TrainingError, match=told):
        barlow.pretrain(str(tmp_path / "train"), run.path, **TINY)
    monkeypatch.undo()
    run.add_metrics([row(1)])
    run.add_skipped([("a.png", "of other images")])
    (run.path / "trackers.json").write_text("{}\n")
    barlow.pretrain(str(tmp_path / "train"), run.path, **TINY | {"accumulate": 4, "epochs": 1})
    assert run.settings().accumulate == 4
    assert [start["step"] for start in run.starts()] == [0]
    assert [r["epoch"] for r in run.metrics()] == [1]
    assert run.skipped() == {}
    assert not (run.path / "trackers.json").exists()
    with pytest.raises(UserError, match="accumulate was 4, is 2"):
        open_run(run.path, Settings.of(str(tmp_path / "train"), **TINY | {"accumulate": 2}))


def test_a_run_that_was_trained_keeps_its_settings_without_its_checkpoints(tmp_path):
    run = Run(tmp_path)
    run.config_file.write_text(yaml.safe_dump(Settings("a").to_dict()))
    run.encoder_folder.mkdir()
    with pytest.raises(UserError, match="seed was 0, is 1"):
        open_run(tmp_path, Settings("a", seed=1))


HOLD = """
import sys, time
from pathlib import Path
from barlow.lock import _take
_take(Path(sys.argv[1]))
print(flush=True)
time.sleep(60)
"""


def test_a_run_that_is_just_starting_is_not_taken_by_other_settings(tmp_path, monkeypatch):
    images(tmp_path / "train", "abcdefgh")
    run = Run(tmp_path / "run")
    run.path.mkdir()
    run.config_file.write_text(
        yaml.safe_dump(Settings.of(str(tmp_path / "train"), **TINY).to_dict())
    )
    before = run.config_file.read_bytes()
    monkeypatch.setattr(lock, "_GRACE", 0.1)
    command = [sys.executable, "-c", HOLD, str(run.path / lock.NAME)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match=rf"process {other.pid} on host .* is already training"):
            barlow.pretrain(str(tmp_path / "train"), run.path, **TINY | {"accumulate": 2})
        other.kill()
    assert run.config_file.read_bytes() == before


def row(step):
    return dict.fromkeys(METRICS[:8], 0.5) | {"step": step}


TORN = pytest.mark.parametrize(
    "torn",
    [b"3,0.5,0.", b"3,0.5,0.5,0.5,0.5,0.5,0.5,0.5,,,1", b"\0" * 99, b"\0\0.5,0.5\r\n3,0.5\r\n"],
)


@TORN
def test_what_lost_power_left_of_a_row_is_dropped_and_made_again(tmp_path, caplog, torn):
    run = Run(tmp_path)
    run.add_metrics([row(1), row(2)])
    with open(run.metrics_file, "ab") as file:
        file.write(torn)
    run.truncate_metrics(2)
    assert f"dropped {len(torn)} bytes after its last complete row" in caplog.text
    run.add_metrics([row(3)])
    assert [r["step"] for r in run.metrics()] == [1, 2, 3]


def test_of_a_first_row_that_lost_power_nothing_stays(tmp_path):
    run = Run(tmp_path)
    run.metrics_file.write_bytes(b"step,epo")
    run.truncate_metrics(0)
    run.add_metrics([row(1)])
    assert [r["step"] for r in run.metrics()] == [1]


def test_whole_rows_are_left_as_they_are(tmp_path, caplog):
    run = Run(tmp_path)
    run.add_metrics([row(1), row(2)])
    before = run.metrics_file.stat()
    with caplog.at_level(logging.WARNING):
        run.truncate_metrics(2)
    assert run.metrics_file.stat().st_ino == before.st_ino
    assert caplog.text == ""


def test_trackers_too_begin_after_the_last_whole_row(tmp_path):
    pytest.importorskip("tensorboard")
    run = Run(tmp_path)
    run.add_metrics([row(1)])
    with open(run.metrics_file, "ab") as file:
        file.write(b"2,0.5,0.")
    reporter = tracked(None, Settings("mnist5k", track=["tensorboard"]), run)
    assert reporter._last_logged_step == 1
