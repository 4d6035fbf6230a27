"""A run's folder is taken elsewhere, or loses its power, and goes on."""

import logging

import pytest
import yaml
from PIL import Image

import barlow
from barlow.checkpoint import load_checkpoint
from barlow.errors import UserError
from barlow.progress import Reporter
from barlow.run import METRICS, Run, open_run
from barlow.settings import Settings
from barlow.tracking import tracked

TINY = {
    "recipe": "demo",
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
        with pytest.raises(UserError, match=r"was trained on 8 images of .* these 8 are others"):
            barlow.pretrain(str(tmp_path / "others"), run.path, **settings | {"epochs": epochs})


def test_other_settings_that_name_a_place_are_still_refused(tmp_path):
    run = Run(tmp_path)
    run.config_file.write_text(yaml.safe_dump(Settings("a", init="b").to_dict()))
    assert open_run(tmp_path, Settings("elsewhere/a", init="b")) == run
    with pytest.raises(UserError, match="init was 'b', is 'c'"):
        open_run(tmp_path, Settings("a", init="c"))


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
    run.forget_metrics_after(2)
    assert f"{len(torn)} bytes after its last whole row dropped" in caplog.text
    run.add_metrics([row(3)])
    assert [r["step"] for r in run.metrics()] == [1, 2, 3]


def test_of_a_first_row_that_lost_power_nothing_stays(tmp_path):
    run = Run(tmp_path)
    run.metrics_file.write_bytes(b"step,epo")
    run.forget_metrics_after(0)
    run.add_metrics([row(1)])
    assert [r["step"] for r in run.metrics()] == [1]


def test_whole_rows_are_left_as_they_are(tmp_path, caplog):
    run = Run(tmp_path)
    run.add_metrics([row(1), row(2)])
    before = run.metrics_file.stat()
    with caplog.at_level(logging.WARNING):
        run.forget_metrics_after(2)
    assert run.metrics_file.stat().st_ino == before.st_ino
    assert caplog.text == ""


def test_trackers_too_begin_after_the_last_whole_row(tmp_path):
    pytest.importorskip("tensorboard")
    run = Run(tmp_path)
    run.add_metrics([row(1)])
    with open(run.metrics_file, "ab") as file:
        file.write(b"2,0.5,0.")
    tracked(None, Settings("mnist5k", track=["tensorboard"]), run)
