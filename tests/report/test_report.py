import re
import shlex
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import barlow
from barlow.assembly import training_images
from barlow.checkpoint import load_last, save_last
from barlow.cli.options import add_options, new_parser, parse
from barlow.command import command
from barlow.correlation_matrices import initial_and_current, initial_model
from barlow.data.decode import Picture
from barlow.errors import UserError
from barlow.evaluation.result import Result, Row
from barlow.report import write_report
from barlow.report.analysis import analyse
from barlow.report.charts import Series, chart
from barlow.report.facts import collect
from barlow.report.pictures import _worst
from barlow.report.watch import _Page
from barlow.run import Run
from barlow.settings import Settings
from barlow.share.card import model_card


@pytest.fixture
def copy(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "copy")
    (tmp_path / "copy" / "report.html").unlink()
    return Run(tmp_path / "copy")


def headings(path):
    return re.findall(r'<section id="(\w+)"', path.read_text())


def test_the_same_run_gives_the_same_page(run):
    before = run.report_file.read_bytes()
    write_report([str(run.path)])
    assert run.report_file.read_bytes() == before


def test_without_its_images_the_page_is_made_of_what_the_folder_says(copy, caplog):
    text = copy.config_file.read_text().replace("source: mnist5k", "source: gone/images")
    copy.config_file.write_text(text)
    page = write_report([str(copy.path)])
    assert headings(page) == ["worth", "data", "training", "health", "settings"]
    assert "omits the images: gone/images does not exist" in caplog.text


def test_a_run_that_has_only_begun_has_a_page(copy, caplog):
    for name in ("metrics.csv", "starts.jsonl", "log.txt"):
        (copy.path / name).unlink()
    for name in ("checkpoints", "encoder", "evaluation"):
        shutil.rmtree(copy.path / name)
    assert headings(write_report([str(copy.path)])) == ["data", "settings"]
    assert "has no checkpoint yet" in caplog.text


def test_photos_without_labels_or_held_out_images_have_neighbours_and_a_map(tmp_path):
    draw = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(60):
        pixels = draw.integers(0, 256, (30 + i, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.jpg")
    (folder / "05.jpg").write_text("one of sixty is few, one of the twelve on the map is many")
    settings = {"encoder": "resnet18", "image_size": 32, "projector": [16], "epochs": 1}
    settings["encoder_args"] = {"channels": [8, 16, 24, 32]}
    run = barlow.pretrain(str(folder), tmp_path / "run", batch_size=32, **settings)
    page = write_report([str(run.path)])
    assert headings(page) == [
        *("data", "training", "health", "matrix", "neighbours", "map", "settings")
    ]
    text = page.read_text()
    assert text.count("<circle cx") == 11, "every fifth image; no class to colour it by"
    assert "--dot:" not in text.split('class="map"')[1].split("<script")[0]
    assert 'alt="training image"' in text


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """An untrained run of 20 JPEGs in two of 102 classes; the larger sides decoded are listed."""
    folder, sides, decode = tmp_path / "photos" / "train", [], Picture.decode
    for i in range(100):
        (folder / f"empty {i:02}").mkdir(parents=True)
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        file = folder / ("cat" if i % 2 else "dog") / f"{i:02}.jpg"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).resize((800, 600)).save(file)
    settings = {"encoder": "resnet18", "image_size": 32, "projector": [16], "batch_size": 32}
    settings["encoder_args"] = {"channels": [8, 16, 24, 32]}
    settings = Settings(str(folder.parent), **settings)
    run = Run(tmp_path / "run")
    run.path.mkdir()
    run.config_file.write_text(yaml.safe_dump(settings.to_dict()))
    save_last(run.last_checkpoint, {"model": initial_model(settings).state_dict()})

    def heard(picture, reduction=1):
        pixels = decode(picture, reduction)
        sides.append(max(pixels.shape))
        return pixels

    monkeypatch.setattr(Picture, "decode", heard)
    return run, sides


def test_photographs_are_decoded_no_larger_than_they_are_shown(photographs):
    run, sides = photographs
    analysis = analyse(run)
    by_the_encoder, beside_their_views = 2 * 20, len(analysis.views)
    assert sides.count(800) <= by_the_encoder + beside_their_views
    assert {side for side in sides if side < 800} == {100, 200}
    assert analysis.neighbours[0][0].picture.size == (96, 72)
    assert analysis.mapped[0].picture.size == (40, 30)


def test_the_matrix_of_photographs_is_of_crops_as_the_training_decodes_them(photographs):
    run, sides = photographs
    state = load_last(run.last_checkpoint)
    start, now = initial_and_current(run.settings(), state, training_images(run.settings()))
    assert sides == [100] * 20, "once for both matrices"
    assert torch.equal(start, now)
    assert start.shape == (16, 16)


def test_classes_that_no_image_has_are_left_out(photographs):
    run, _ = photographs
    assert len(training_images(run.settings()).classes) == 102
    analysis = analyse(run)
    assert analysis.classes == ["cat", "dog"]
    assert analysis.confusion.shape == (2, 2)
    assert analysis.confusion.sum() == len(analysis.mapped)
    assert {image.label for image in analysis.mapped} == {"cat", "dog"}


def test_the_worst_pairs_of_many_classes_are_listed():
    counts = torch.zeros(30, 30, dtype=torch.int64)
    counts.fill_diagonal_(9)
    counts[3, 4], counts[29, 0], counts[5, 6] = 2, 7, 2
    text = _worst(counts, [f"class {i}" for i in range(30)])
    found = re.findall(r"class (\d+)</th><td>class (\d+)</td><td>(\d+)", text)
    assert found == [("29", "0", "7"), ("3", "4", "2"), ("5", "6", "2")]


def test_what_macos_leaves_beside_a_result_is_none(tmp_path):
    run, result = Run(tmp_path), Result("linear", (Row("with pretraining", {"val_top1": 0.9}),))
    run.config_file.write_text(yaml.safe_dump(Settings("mnist5k").to_dict()))
    result.save(run.path / "evaluation" / "linear.json")
    version = _Page(run).version()
    (run.path / "evaluation" / "._linear.json").write_bytes(b"\0\5\x16\7")
    assert collect(run).results == [result]
    assert _Page(run).version() == version
    encoder = initial_model(Settings("mnist5k", "resnet10t", projector=[8])).encoder
    assert "90.00%" in model_card(encoder, str(run.path), "owner/name", "mit")


def test_runs_of_one_name_are_told_apart_by_their_paths(run, tmp_path):
    shutil.copytree(run.path, tmp_path / run.path.name)
    runs = [str(run.path), str(tmp_path / run.path.name)]
    text = write_report(runs, out=str(tmp_path / "both.html")).read_text()
    assert all(f"{path}, validation" in text for path in runs)


def test_warnings_resumptions_and_skipped_images_are_told(copy):
    copy.add_start(
        {"step": 9, "data": {"name": "x", "images": 1, "fingerprint": ""}}
        | {"environment": {"system": "Linux", "barlow": "0"}}
    )
    copy.add_skipped([("images/<b>bad</b>.jpg", "it is <script>alert(1)</script>")])
    with open(copy.log_file, "a") as log:
        log.write("2026-01-01 00:00:00,000 WARNING the disk is full\n")
    text = write_report([str(copy.path)]).read_text()
    assert "resumed at step 9" in text
    assert "the disk is full" in text
    assert "&lt;b&gt;bad&lt;/b&gt;.jpg" in text
    assert "<b>bad" not in text
    assert "<script>alert" not in text


def test_the_command_on_the_page_makes_the_same_settings():
    settings = Settings.of(
        "a folder/of images",
        "cifar10",
        compile=True,
        sync_batch_norm=False,
        limit=64,
        view1={"blur": 0.5},
        track=["wandb", "tensorboard"],
    )
    argv = shlex.split(command(settings, "runs/a"))
    assert argv[:2] == ["barlow", "pretrain"]
    parser = new_parser("pretrain", "")
    parser.add_argument("--out")
    add_options(parser, Settings)
    values = parse(parser, argv[2:])
    assert values.pop("out") == "runs/a"
    assert Settings(**values) == settings


def test_a_very_long_run_stays_under_ten_megabytes(copy):
    row = collect(copy).rows[-1]
    columns = ",".join(row)
    lines = [columns]
    for i in range(30_000):
        lines.append(",".join(f"{v * (1 + i % 97 / 1000):.7g}" for v in row.values()))
    copy.metrics_file.write_text("\n".join(lines) + "\n")
    page = write_report([str(copy.path)])
    assert page.stat().st_size < 10e6
    assert max(len(p.split()) for p in re.findall(r'points="([^"]*)"', page.read_text())) <= 4_000


def test_a_value_that_is_no_number_is_left_out_of_a_chart():
    drawn = chart("Loss", [Series("a", [(1, 2.0), (2, float("nan")), (3, 1.0)])])
    assert drawn.count(",") > 0
    assert "nan" not in drawn.lower()
    assert chart("Loss", [Series("a", [(1, float("inf"))])]) == ""


def test_mistakes_are_one_line(tmp_path, command):
    with pytest.raises(UserError, match="give the folder that `barlow pretrain` wrote"):
        write_report([str(tmp_path)])
    done = command("report", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    done = command("watch", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_where_it_is_told(copy, command, tmp_path):
    done = command("report", copy.path, "--out", tmp_path / "page.html")
    assert done.stdout.strip() == str(tmp_path / "page.html")
    assert not copy.report_file.exists()
    assert headings(tmp_path / "page.html")[0] == "worth"
