import csv
import dataclasses
import logging
from pathlib import Path

import pytest
import timm
import torch
import yaml
from torch.multiprocessing.spawn import ProcessRaisedException

import barlow
from barlow.checkpoint import load_checkpoint
from barlow.errors import TrainingError, UserError
from barlow.optim import warmup_cosine
from barlow.progress import Reporter
from barlow.run import METRICS, Run
from barlow.settings import Settings, recipe_names
from barlow.validation import HEALTH

# Dropout in the encoder, random views and an order that is shuffled: nothing here is easy.
TINY = {
    "recipe": str(Path(__file__).parent / "digits.yaml"),
    "encoder_args": {
        "levels": [0, 0, 1, 1, 1, 1],
        "channels": [4, 4, 8, 8, 8, 16],
        "drop_rate": 0.1,
    },
    "projector": [16, 16],
    "batch_size": 32,
    "limit": 128,
    "validation_limit": 64,
    "epochs": 3,
    "log_every": 3,
    "eval_every": 1,
    "save_every": 2,
    "accelerator": "cpu",
}


class StopAt(Reporter):
    """Ends a training after a step as a crash would: nothing more is written."""

    class Crash(Exception):
        pass

    def __init__(self, at):
        self.at = at

    def step(self, step):
        if step == self.at:
            raise self.Crash


class TimeIsUp(Exception):
    pass


class StopAfter(Reporter):
    """Ends a training by the clock after some steps, as a crash would."""

    def __init__(self, steps):
        self.left = steps

    def step(self, done):
        self.left -= 1
        if not self.left:
            raise TimeIsUp


def weights(run):
    return load_checkpoint(run.last_checkpoint)["model"]


def curves(run):
    rows = run.metrics()
    return [{k: v for k, v in r.items() if k not in ("seconds", "images_per_second")} for r in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return barlow.pretrain("mnist5k", tmp_path_factory.mktemp("whole") / "run", **TINY)


def test_a_run_holds_what_it_promises(whole):
    assert (whole.path / "checkpoints" / "last.ckpt").is_file()
    assert (whole.path / "checkpoints" / "epoch-0002.ckpt").is_file()
    assert (whole.path / "checkpoints" / "epoch-0003.ckpt").is_file()
    assert yaml.safe_load(whole.config_file.read_text())["lambd"] == 0.01
    assert whole.settings() == Settings.of("mnist5k", **TINY)
    with open(whole.metrics_file) as file:
        assert csv.DictReader(file).fieldnames == METRICS
    rows = whole.metrics()
    assert [r["step"] for r in rows] == [3, 4, 6, 8, 9, 12]
    assert [r["step"] for r in rows if "val_loss" in r] == [4, 8, 12]
    assert all(set(HEALTH) < set(r) for r in rows if "val_loss" in r)
    assert all(
        r["loss"] == pytest.approx(r["invariance"] + 0.01 * r["redundancy"], rel=1e-4) for r in rows
    )
    assert "epoch 3.00/3" in whole.log_file.read_text()


def test_the_encoder_loads_in_plain_timm_and_computes_the_same(whole):
    ours = whole.encoder()
    theirs = timm.create_model(
        f"local-dir:{whole.encoder_folder}", pretrained=True, num_classes=0
    ).eval()
    view = torch.randn(4, 1, 32, 32)
    assert torch.equal(ours(view), theirs(view))
    assert not ours.training
    assert ours.preprocess(torch.zeros(1, 28, 28, dtype=torch.uint8)).shape == (1, 32, 32)


@pytest.mark.parametrize("stop", [1, 6, 8, 11])
def test_a_crashed_run_resumed_ends_bit_identical(whole, tmp_path, stop):
    """Crashed mid-epoch or at an epoch's end, with a checkpoint after every step or none yet."""
    out = tmp_path / "run"
    with pytest.raises(StopAt.Crash):
        barlow.pretrain("mnist5k", out, **TINY, save_minutes=0.0, reporter=StopAt(stop))
    run = barlow.pretrain("mnist5k", out, **TINY, save_minutes=1000.0)
    expected, got = weights(whole), weights(run)
    assert all(torch.equal(expected[k], got[k]) for k in expected)
    assert curves(run) == curves(whole)


def test_a_run_knows_its_images_and_every_machine_it_ran_on(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(StopAt.Crash):
        barlow.pretrain("mnist5k", out, **TINY, save_minutes=0.0, reporter=StopAt(6))
    first, second = barlow.pretrain("mnist5k", out, **TINY).starts()
    assert (first["step"], second["step"]) == (0, 5)
    assert first["data"]["images"] == 128
    assert first["data"] == second["data"]
    assert first["environment"]["torch"] == torch.__version__
    assert first["time"] <= second["time"]


def test_a_run_goes_on_with_its_own_images_only(tmp_path):
    from PIL import Image

    folder, out = tmp_path / "images", tmp_path / "run"
    folder.mkdir()
    for i in range(40):
        Image.new("L", (32, 32), i).save(folder / f"{i:02}.png")
    small = TINY | {"limit": None}
    with pytest.raises(StopAt.Crash):
        barlow.pretrain(str(folder), out, **small, save_minutes=0.0, reporter=StopAt(2))
    before = (out / "starts.jsonl").read_text()
    (folder / "00.png").unlink()
    with pytest.raises(UserError, match=r"was trained on 40 images of .* these 39 are different"):
        barlow.pretrain(str(folder), out, **small)
    assert (out / "starts.jsonl").read_text() == before
    (out / "starts.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"starts\.jsonl is damaged"):
        barlow.pretrain(str(folder), out, **small)
    (out / "starts.jsonl").write_text(before)
    Image.new("L", (32, 32), 0).save(folder / "00.png")
    assert barlow.pretrain(str(folder), out, **small).metrics()[-1]["step"] == 3


def test_a_kill_among_the_last_files_is_made_good(whole, tmp_path, monkeypatch):
    import barlow.record as record

    def killed(*arguments):
        raise StopAt.Crash

    monkeypatch.setattr(record, "save_encoder", killed)
    small = TINY | {"save_every": 1000}
    with pytest.raises(StopAt.Crash):
        barlow.pretrain("mnist5k", tmp_path / "run", **small)
    monkeypatch.undo()
    (tmp_path / "run" / "checkpoints" / "epoch-0003.ckpt").unlink()
    run = barlow.pretrain("mnist5k", tmp_path / "run", **small)
    assert run.epoch_checkpoint(3).exists()
    assert run.encoder().num_features == whole.encoder().num_features


def test_what_a_kill_left_of_a_first_file_does_not_bar_the_folder(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".config.yaml.77.part").write_text("source: mn")
    barlow.pretrain("mnist5k", out, **TINY | {"epochs": 1})
    assert not list(out.glob(".*.part"))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    import barlow.record as record

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record, "write_text", full)
    with pytest.raises(UserError, match=r"No space left on device.*free up space"):
        barlow.pretrain("mnist5k", tmp_path / "run", **TINY)


def test_a_finished_run_is_left_alone(whole):
    before = whole.last_checkpoint.stat().st_mtime_ns
    heard = []

    class Ear(Reporter):
        def say(self, text):
            heard.append(text)

    barlow.pretrain("mnist5k", whole.path, **TINY, reporter=Ear())
    assert whole.last_checkpoint.stat().st_mtime_ns == before
    assert "finished" in heard[0]


def test_other_settings_are_refused_by_name(whole):
    with pytest.raises(UserError, match=r"lambd was 0\.01, is 0\.5"):
        barlow.pretrain("mnist5k", whole.path, **TINY | {"lambd": 0.5})


def test_more_epochs_go_on_from_the_finished_run(whole, tmp_path):
    import shutil

    shutil.copytree(whole.path, tmp_path / "run")
    run = barlow.pretrain("mnist5k", tmp_path / "run", **TINY | {"epochs": 4})
    assert run.metrics()[-1]["step"] == 16
    assert run.settings().epochs == 4


def test_a_training_of_so_many_minutes_ends_by_the_clock_with_the_rate_annealed(tmp_path):
    run = barlow.pretrain("mnist5k", tmp_path / "run", **TINY | {"minutes": 0.05, "log_every": 1})
    rows = run.metrics()
    assert rows[-1]["seconds"] >= 3
    assert all(row["seconds"] < 3 for row in rows[:-1])
    clock = [0.0, *(row["seconds"] for row in rows)]
    for row, seconds in zip(rows, clock[:-1], strict=True):
        factor = warmup_cosine(seconds, steps=3, warmup=0.3)
        assert row["lr"] == pytest.approx(2e-3 * factor, rel=1e-4, abs=1e-8)
    assert run.encoder().num_features == 16
    assert "knn_top1" in rows[-1]
    barlow.pretrain("mnist5k", tmp_path / "run", **TINY | {"minutes": 0.05})
    assert run.metrics() == rows


def test_an_interrupted_budget_of_minutes_goes_on_with_what_is_left(tmp_path):
    settings = TINY | {"minutes": 0.05, "log_every": 1}
    with pytest.raises(TimeIsUp):
        barlow.pretrain(
            "mnist5k", tmp_path / "run", **settings, save_minutes=0.0, reporter=StopAfter(2)
        )
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["step"] >= 1
    run = barlow.pretrain("mnist5k", tmp_path / "run", **settings)
    rows = run.metrics()
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[-1]["seconds"] >= 3
    with pytest.raises(UserError, match=r"minutes was 0\.05, is 0\.025 \(it may only increase\)"):
        barlow.pretrain("mnist5k", run.path, **settings | {"minutes": 0.025})
    more = barlow.pretrain("mnist5k", run.path, **settings | {"minutes": 0.075})
    assert more.metrics()[-1]["seconds"] >= 4.5


def test_two_ranks_agree_on_the_clock(tmp_path):
    run = barlow.pretrain("mnist5k", tmp_path / "run", **TINY | {"minutes": 0.05}, devices=2)
    assert run.metrics()[-1]["seconds"] >= 3


def test_numbers_too_small_to_matter_do_not_slow_a_training(tmp_path):
    """A momentum without gradient decays to denormal numbers, whose products take very long."""
    seen = []

    class Ear(Reporter):
        def step(self, done):
            seen.append(float(torch.tensor([1e-39]).mul(0.5)))

    barlow.pretrain("mnist5k", tmp_path / "run", **TINY | {"epochs": 1}, reporter=Ear())
    assert seen == [0.0] * 4
    assert torch.tensor([1e-39]).mul(0.5) > 0, "as before"


def test_images_may_be_larger_after_the_training(tmp_path):
    settings = TINY | {"image_size": 16, "eval_size": 32, "epochs": 1}
    encoder = barlow.pretrain("mnist5k", tmp_path / "run", **settings).encoder()
    assert encoder.preprocess(torch.zeros(1, 1, 32, 32, dtype=torch.uint8)).shape[-2:] == (32, 32)


@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path):
    # Dropout is drawn by each rank for its own part; everything else is the same everywhere.
    settings = TINY | {"encoder_args": TINY["encoder_args"] | {"drop_rate": 0.0}}
    settings |= {"precision": "64", "optimizer": "lars", "lr": 0.2}
    one = barlow.pretrain("mnist5k", tmp_path / "one", **settings)
    two = barlow.pretrain("mnist5k", tmp_path / "two", **settings, devices=2)
    expected, got = weights(one), weights(two)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-8, atol=1e-10)
    assert two.metrics()[-1]["val_loss"] == pytest.approx(one.metrics()[-1]["val_loss"], rel=1e-6)


@pytest.mark.slow
def test_twenty_steps_in_float32_are_the_same_on_one_rank_and_on_four(tmp_path):
    """LARS at the paper's rates, warming up. Weights only: biases start at zero, and one
    value on the other side of a ReLU moves a single one by more."""
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    for i in range(320):  # four by four random colours, smoothly joined
        colours = torch.randint(0, 256, (4, 4, 3), dtype=torch.uint8, generator=draw)
        image = Image.fromarray(colours.numpy()).resize((32, 32), Image.Resampling.BICUBIC)
        image.save(folder / f"{i:03}.png")
    narrow = {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]}
    settings = {"encoder": "resnet18", "encoder_args": narrow}
    settings |= {"stem": "small", "image_size": 32, "views": "small", "projector": [64, 64]}
    settings |= {"optimizer": "lars", "batch_size": 64, "epochs": 1000, "warmup_epochs": 10}
    settings |= {"save_minutes": 0.0, "save_every": 1000, "eval_every": 1000, "accelerator": "cpu"}
    ends = []
    for devices in (1, 4):
        out = tmp_path / str(devices)
        with pytest.raises((StopAt.Crash, ProcessRaisedException, TrainingError)):
            barlow.pretrain(str(folder), out, **settings, devices=devices, reporter=StopAt(21))
        state = load_checkpoint(out / "checkpoints" / "last.ckpt")
        assert state["step"] == 20
        ends.append({k: v for k, v in state["model"].items() if v.is_floating_point()})
    one, four = ends
    for name, weight in one.items():
        gap = (four[name] - weight).norm()
        assert weight.ndim == 1 or gap < 1e-4 * weight.norm(), name


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "muon"])
def test_every_optimizer_lowers_the_loss(tmp_path, optimizer):
    settings = TINY | {"epochs": 10, "save_every": 10, "eval_every": 10, "log_every": 100}
    run = barlow.pretrain(
        "mnist5k", tmp_path / "run", **settings | {"optimizer": optimizer, "lr": 0.2}
    )
    rows = run.metrics()
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_loss_that_is_not_finite_stops_before_the_checkpoint_is_touched(tmp_path):
    settings = TINY | {"optimizer": "sgd", "lr": 1e30, "lr_bias_norm": 1e30, "warmup_epochs": 0}
    with pytest.raises(TrainingError, match=r"is (nan|inf) at step \d+.*lower --lr"):
        barlow.pretrain("mnist5k", tmp_path / "run", **settings)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_bf16_trains(tmp_path):
    run = barlow.pretrain("mnist5k", tmp_path / "run", **TINY | {"precision": "bf16", "epochs": 1})
    assert run.metrics()[-1]["loss"] > 0


def test_mistakes_are_refused_before_anything_is_written(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(UserError, match="128 images, fewer than one batch of 256"):
        barlow.pretrain("mnist5k", out, **TINY | {"batch_size": 256})
    with pytest.raises(UserError, match=r"unknown encoder 'resnet19'.*resnet18"):
        barlow.pretrain("mnist5k", out, **TINY | {"encoder": "resnet19", "encoder_args": {}})
    with pytest.raises(UserError, match=r"unknown setting 'epoch'.*'epochs'"):
        barlow.pretrain("mnist5k", out, epoch=3)
    assert not out.exists()
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="contains other files but no run"):
        barlow.pretrain("mnist5k", out, **TINY)
    assert (out / "precious.txt").read_text() == "mine"


def test_a_full_disk_does_not_end_a_training(tmp_path, monkeypatch, caplog):
    import barlow.record as record

    calls = []

    def full_once(path, state):
        calls.append(path)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        real(path, state)

    real = record.save_last
    monkeypatch.setattr(record, "save_last", full_once)
    with caplog.at_level(logging.WARNING, "barlow"):
        run = barlow.pretrain("mnist5k", tmp_path / "run", **TINY)
    assert "No space left on device" in caplog.text
    assert load_checkpoint(run.last_checkpoint)["step"] == 12


def test_images_that_cannot_be_read_are_listed_and_the_training_goes_on(tmp_path):
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(64):
        pixels = torch.randint(0, 256, (28, 28), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:02}.png")
    (folder / "13.png").write_bytes(b"")
    whole = (folder / "14.png").read_bytes()
    (folder / "14.png").write_bytes(whole[: len(whole) // 2])
    settings = TINY | {"epochs": 1, "validation": "mnist5k", "limit": None}
    run = barlow.pretrain(str(folder), tmp_path / "run", **settings)
    with open(run.skipped_file) as file:
        rows = list(csv.DictReader(file))
    assert [row["id"].rsplit("/")[-1] for row in rows] == ["13.png", "14.png"]
    assert all(row["reason"] for row in rows)
    assert run.metrics()[-1]["step"] == 2, "the batches stay full"
    with pytest.raises(UserError, match=r"the first is .*13\.png"):
        barlow.pretrain(str(folder), tmp_path / "strict", **settings, max_broken=0.01)
    strict = barlow.pretrain(str(folder), tmp_path / "strict", **settings)
    assert strict.metrics()[-1]["step"] == 2, "more may be allowed in the same folder"


def test_accumulation_takes_the_memory_of_a_part_and_the_loss_of_the_whole(tmp_path):
    settings = TINY | {"epochs": 1, "log_every": 1}
    whole = barlow.pretrain("mnist5k", tmp_path / "whole", **settings)
    parts = barlow.pretrain("mnist5k", tmp_path / "parts", **settings, accumulate=2)
    # The encoder's batch norm sees micro-batches: the first losses are near, not equal.
    losses = [run.metrics()[0]["loss"] for run in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=0.2)
    assert parts.metrics()[-1]["step"] == 4


def test_accumulation_works_in_float64_too(tmp_path):
    settings = TINY | {"epochs": 1, "precision": "64", "accumulate": 2}
    assert barlow.pretrain("mnist5k", tmp_path / "run", **settings).metrics()[-1]["step"] == 4


def test_accumulation_in_mixed_precision_does_not_round_its_gradients(tmp_path, monkeypatch):
    from barlow.model import BarlowTwins

    seen = set()

    def forward(self, view1, view2, grad1=None, grad2=None):
        seen.update(grad.dtype for grad in (grad1, grad2) if grad is not None)
        return real(self, view1, view2, grad1, grad2)

    real = BarlowTwins.forward
    monkeypatch.setattr(BarlowTwins, "forward", forward)
    settings = TINY | {"epochs": 1, "precision": "bf16", "accumulate": 2}
    assert barlow.pretrain("mnist5k", tmp_path / "run", **settings).metrics()[-1]["loss"] > 0
    assert seen == {torch.float32}


def test_settings_from_python_are_those_that_a_recipe_would_give(tmp_path):
    settings = Settings("cifar10", projector=(16, 16), init=tmp_path, precision=64)
    assert (settings.projector, settings.init) == ([16, 16], str(tmp_path))
    assert settings.precision == "64"
    with pytest.raises(UserError, match=r"optimizer is 'LARS': expected one of lars, adamw, sgd"):
        Settings("cifar10", optimizer="LARS")


def test_as_many_held_out_images_may_be_broken_as_training_images(tmp_path):
    from PIL import Image

    for i in range(40):
        pixels = torch.randint(0, 256, (28, 28), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i:02}.png")
    for i in (3, 11, 26):
        (tmp_path / f"{i:02}.png").write_bytes(b"")
    settings = TINY | {"epochs": 1, "validation": str(tmp_path), "max_broken": 0.2}
    row = barlow.pretrain("mnist5k", tmp_path / "run", **settings, devices=2).metrics()[-1]
    assert row["val_loss"] > 0
    assert row["effective_rank"] > 0


def test_a_folder_that_cannot_be_made_is_a_users_mistake(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot write to --out"):
        barlow.pretrain("mnist5k", tmp_path / "file" / "run", **TINY)


def test_a_compiled_training_that_would_not_synchronise_batch_norm_is_refused(tmp_path):
    with pytest.raises(UserError, match="--compile cannot synchronise"):
        barlow.pretrain("mnist5k", tmp_path / "run", **TINY, compile=True, devices=2)
    assert not (tmp_path / "run").exists()


def test_settings_and_options_are_one_list():
    names = {f.name for f in dataclasses.fields(Settings)}
    for recipe in recipe_names():
        settings = Settings.of("cifar10", recipe=recipe)
        assert set(settings.to_dict()) == names
        assert Settings(**settings.to_dict()).to_dict() == settings.to_dict()


def test_an_optimiser_brings_its_own_learning_rates():
    assert Settings.of("cifar10").rates == (0.2, 0.0048)
    assert Settings.of("cifar10", optimizer="adamw").rates == (2e-3, 2e-3)
    assert Settings.of("cifar10", optimizer="muon", lr=0.1).rates == (0.1, 0.02)
    assert Settings.of("cifar10", optimizer="adamw").to_dict()["lr"] == 2e-3


def test_epochs_replace_the_minutes_of_a_recipe():
    assert Settings.of("cifar10", "cifar10-10min").minutes == 10
    assert Settings.of("cifar10", "cifar10-10min", epochs=3).minutes is None
    assert Settings.of("cifar10", "cifar10-10min", epochs=3, minutes=5).minutes == 5


def test_run_reads_a_path_given_as_text():
    assert Run("runs/a").log_file.name == "log.txt"


def test_a_collapse_is_warned_of_once(tmp_path, caplog):
    one_feature = TINY["encoder_args"] | {"channels": [4, 4, 8, 8, 8, 1]}
    with caplog.at_level(logging.WARNING, "barlow"):
        barlow.pretrain("mnist5k", tmp_path / "run", **TINY | {"encoder_args": one_feature})
    assert caplog.text.count("the representation has collapsed") == 1


def test_a_gradient_that_is_not_finite_stops_before_the_checkpoint_is_touched(
    tmp_path, monkeypatch
):
    import barlow.assembly as assembly

    backward = []

    def poison(gradient):
        backward.append(gradient)
        return gradient * (torch.nan if len(backward) == 6 else 1)

    def build(settings):
        model, preprocess = real(settings)
        model.projector[0].weight.register_hook(poison)
        return model, preprocess

    real = assembly.build_model
    monkeypatch.setattr(assembly, "build_model", build)
    out = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"gradient of projector.* before step 6.*lower --lr"):
        barlow.pretrain("mnist5k", out, **TINY, save_minutes=0.0)
    assert load_checkpoint(out / "checkpoints" / "last.ckpt")["step"] == 5
