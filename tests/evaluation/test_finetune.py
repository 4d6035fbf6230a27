import csv

import pytest
import torch

import barlow
from barlow.data import eval_batches, open_source
from barlow.errors import TrainingError, UserError
from barlow.evaluation.classifier import load_classifier, predict
from barlow.evaluation.crops import CroppedImages, geometric_views
from barlow.evaluation.finetune import _Training, choose_rate, finetune
from barlow.evaluation.result import unpack
from barlow.evaluation.task import open_task
from barlow.evaluation.training import train_classifier

QUICK = {"limit": 300, "labels_per_class": 8, "epochs": 3, "rate": 1e-3, "views": "digits"}


@pytest.fixture(scope="module")
def tuned(encoder, tmp_path_factory):
    """A fine-tuning with two seeds and the random baseline: its result, where it was saved."""
    out = str(tmp_path_factory.mktemp("tuned") / "model")
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    result = finetune(encoder, "mnist5k", seeds=2, baseline="random", out=out, **QUICK)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    return result, out


def test_the_table_has_mean_and_spread_without_and_with_pretraining(tuned):
    result, _ = tuned
    assert [row.name for row in result.rows] == ["without pretraining", "with pretraining"]
    for row in result.rows:
        assert row.chosen == {"rate": 1e-3, "seeds": 2}
        assert set(row.spread) == set(row.values)
        assert row.spread["val_top1"] > 0
        of_seeds = [float(unpack(bits, 300).float().mean()) for bits in row.correct]
        assert of_seeds == pytest.approx(row.by_seed["val_top1"])
        assert sum(of_seeds) / 2 == pytest.approx(row.values["val_top1"])
    assert " ± " in str(result)
    assert result.data["train"]["images"] == 80


def test_it_repeats_itself(encoder, tuned):
    again = finetune(encoder, "mnist5k", seeds=2, baseline="random", **QUICK)
    assert again.rows == tuned[0].rows


def test_the_saved_classifier_is_the_one_that_was_measured(tuned):
    result, out = tuned
    classifier = load_classifier(out)
    digits = open_source("mnist5k", "test", in_chans=1, limit=300)
    with torch.inference_mode():
        scores = torch.cat(
            [classifier(x) for x, _ in eval_batches(digits, classifier.encoder.preprocess, 64)]
        )
    correct = unpack(result["with pretraining"].correct[0], 300)
    # The stem is stored for timm and computed back, so a tie may fall the other way.
    assert ((scores.argmax(1) == digits.labels) == correct).float().mean() > 0.99


def test_predictions_are_a_table_of_id_class_and_probability(tuned, tmp_path):
    _, out = tuned
    assert predict(out, "mnist5k::test", str(tmp_path / "p.csv"), limit=50) == 50
    with open(tmp_path / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    digits = open_source("mnist5k", "test", in_chans=1, limit=50)
    assert [row["id"] for row in rows] == list(digits.ids)
    classifier = load_classifier(out)
    images, _ = next(eval_batches(digits, classifier.encoder.preprocess, 50))
    with torch.inference_mode():
        p, at = classifier(images).softmax(1).max(1)
    assert [row["class"] for row in rows] == [str(c) for c in at.tolist()]
    assert [float(row["probability"]) for row in rows] == pytest.approx(p.tolist(), abs=1e-4)


def test_predictions_have_the_probability_of_every_class(tuned, tmp_path):
    classifier = load_classifier(tuned[1])
    predict(tuned[1], "mnist5k::test", str(tmp_path / "p.csv"), batch_size=8, limit=20)
    with open(tmp_path / "p.csv", newline="") as file:
        headings, *rows = csv.reader(file)
    assert headings == ["id", "class", "probability", *classifier.classes]
    digits = open_source("mnist5k", "test", in_chans=1, limit=20)
    images, _ = next(eval_batches(digits, classifier.encoder.preprocess, 20))
    with torch.inference_mode():
        p = classifier(images).softmax(1)
    written = torch.tensor([[float(share) for share in row[3:]] for row in rows])
    torch.testing.assert_close(written, p, rtol=0, atol=1e-4)
    assert [max(row[3:], key=float) for row in rows] == [row[2] for row in rows]


def test_training_the_encoder_fits_what_a_frozen_one_cannot(encoder):
    frozen = barlow.evaluate(encoder, "mnist5k", "mnist5k", limit=400)["with pretraining"]
    result = finetune(encoder, "mnist5k", seeds=1, limit=400, epochs=40, rate=3e-3, views="digits")
    row = result["with pretraining"]
    assert not row.spread
    assert row.values["val_top1"] > frozen.values["val_top1"] + 0.02


def test_the_test_images_have_no_say_in_the_rate_or_any_weight(encoder, tmp_path):
    from PIL import Image

    for c in range(10):
        (tmp_path / "noise" / str(c)).mkdir(parents=True)
        pixels = torch.randint(0, 255, (28, 28)).to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "noise" / str(c) / "1.png")
    options = {**QUICK, "rate": None, "epochs": 1, "seeds": 1}
    honest = finetune(encoder, "mnist5k", out=str(tmp_path / "a"), **options)
    noise = str(tmp_path / "noise")
    other = finetune(encoder, "mnist5k", noise, out=str(tmp_path / "b"), **options)
    assert honest.rows[0].chosen == other.rows[0].chosen
    assert honest.rows[0].values["val_loss"] != other.rows[0].values["val_loss"]
    for file in ("head.safetensors", "encoder/model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_images_of_several_sizes_are_tuned_on(encoder, tmp_path):
    from PIL import Image

    torch.manual_seed(0)
    for c, kind in enumerate("ab"):
        (tmp_path / kind).mkdir()
        for i in range(5):
            pixels = torch.randint(0, 60, (28 + i, 40 - i)) + 150 * c
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(tmp_path / kind / f"{i}.png")
    task = open_task(str(tmp_path), in_chans=1)
    classifier = train_classifier(
        encoder, task.train, task.names, rate=1e-3, epochs=2, batch_size=3, seed=0, views="small"
    )
    assert not classifier.training


def test_a_rate_that_diverges_is_said(encoder):
    with pytest.raises(TrainingError, match=r"diverged in epoch .* give a lower rate"):
        finetune(encoder, "mnist5k", **{**QUICK, "rate": 1e30})


def test_a_rate_that_diverges_is_not_chosen(encoder, monkeypatch):
    monkeypatch.setattr("barlow.evaluation.finetune.RATES", (1e-3, 1e30))
    result = finetune(encoder, "mnist5k", **{**QUICK, "rate": None, "epochs": 1, "seeds": 1})
    assert result.rows[0].chosen["rate"] == 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"seeds": 0}, "seeds is 0"),
        ({"rate": -1.0}, "rate is -1"),
        ({"crop": 0.0}, "crop is 0.0: it must be a share of the image, above 0 and at most 1"),
        ({"crop": 1.5}, "crop is 1.5"),
        ({"batch_size": 1}, "batch size is 1"),
        (
            {"baseline": "pixels"},
            "unknown baseline 'pixels' for this protocol: use one of random, supervised",
        ),
        ({"views": "magic"}, "unknown preset 'magic'"),
    ],
)
def test_mistakes_are_named(encoder, options, message):
    with pytest.raises(UserError, match=message):
        finetune(encoder, "mnist5k", **{**QUICK, **options})


def test_a_folder_that_holds_something_else_is_left_alone(encoder, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a saved classifier"):
        finetune(encoder, "mnist5k", out=str(tmp_path), **QUICK)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_what_cannot_be_predicted_with_or_to_is_named(tuned, tmp_path):
    with pytest.raises(UserError, match="no classifier in"):
        predict(str(tmp_path), "mnist5k", str(tmp_path / "p.csv"))
    with pytest.raises(UserError, match=r"name the file p\.csv"):
        predict(tuned[1], "mnist5k", str(tmp_path / "p.parquet"))


def test_what_a_run_changed_of_its_views_is_tuned_on_too(encoder):
    changed = geometric_views(
        encoder, "small", {"horizontal_flip": 0.0, "rotation": 5.0, "jitter": 1.0}
    )
    first = changed.settings[0]
    assert (first.horizontal_flip, first.rotation, first.jitter) == (0.0, 5.0, 0.0)
    assert geometric_views(encoder, "small").settings[0].horizontal_flip == 0.5


def test_a_run_without_mirroring_is_evaluated_without(encoder, tmp_path, monkeypatch):
    from barlow.evaluation import augmented, training
    from barlow.share import save_encoder

    save_encoder(encoder, tmp_path / "encoder")
    (tmp_path / "config.yaml").write_text(
        "source: mnist5k\nviews: small\nview1: {horizontal_flip: 0}\n"
    )
    seen = []

    def record(*given):
        seen.append(geometric_views(*given).settings[0].horizontal_flip)
        return geometric_views(*given)

    for room in (augmented, training):
        monkeypatch.setattr(room, "geometric_views", record)
    options = {"limit": 60, "epochs": 1}
    barlow.evaluate(tmp_path, "mnist5k", augment=True, **options)
    options |= {"protocol": "finetune", "seeds": 1, "rate": 1e-3}
    results = [barlow.evaluate(tmp_path, "mnist5k", views=v, **options) for v in (None, "small")]
    assert seen == [0, 0, 0.5]
    assert ["view1" in result.settings for result in results] == [True, False]


def test_views_are_finished_where_the_encoder_is(encoder):
    task = open_task("mnist5k", in_chans=1, limit=20)
    views, seen = geometric_views(encoder, "digits").to("meta"), []

    def record(*given):
        seen.extend(crops.device.type for crops in given[:2])
        return given[:2]

    views.finish = record
    CroppedImages(task.train, views).draw(torch.arange(4), 0, 0)
    assert seen == ["meta", "meta"]


def test_a_place_that_cannot_be_written_is_told_before_any_training(
    pixels, noise, tmp_path, monkeypatch
):
    monkeypatch.setattr("barlow.evaluation.finetune.train_classifier", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        finetune(pixels, str(noise), out=str(tmp_path / "file" / "model"), rate=1e-3)


def test_a_mistake_leaves_no_folder_behind(pixels, noise, tmp_path):
    with pytest.raises(UserError, match="has only 20"):
        finetune(pixels, str(noise), labels_per_class=21, out=str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_a_crop_keeps_as_much_of_the_image_as_is_asked_for(pixels, noise, monkeypatch):
    from barlow.evaluation import training

    seen = []

    def record(*given):
        seen.append(geometric_views(*given).settings[0].crop_scale)
        return geometric_views(*given)

    monkeypatch.setattr(training, "geometric_views", record)
    options = {"seeds": 1, "epochs": 1, "rate": 1e-3, "views": "small"}
    for crop in (None, 0.7):
        finetune(pixels, str(noise), crop=crop, **options)
    assert seen == [(0.2, 1.0), (0.7, 1.0)]


def test_of_few_defects_the_rate_that_finds_them_is_chosen(pixels, noise, monkeypatch):
    found = {3e-4: (0.95, 0.5), 1e-3: (0.9, 0.8), 3e-3: (0.4, 0.6)}

    def measure(rate, *_):
        top1, recall = found[rate]
        return {"val_loss": 1.0, "val_top1": top1, "val_recall": recall}, None, None

    monkeypatch.setattr("barlow.evaluation.finetune._train", lambda *given: given[3])
    monkeypatch.setattr("barlow.evaluation.finetune._measure", measure)
    training = _Training(1, 64, "small", {}, ["good", "defect"])
    part = open_task(str(noise), in_chans=1).train
    assert choose_rate(pixels, part, training, 0) == 1e-3


def test_a_disk_that_fills_up_meanwhile_costs_no_result(
    pixels, noise, tmp_path, monkeypatch, caplog
):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("barlow.evaluation.classifier.save_classifier", full)
    out = str(tmp_path / "model")
    result = finetune(pixels, str(noise), out=out, seeds=1, rate=1e-3, epochs=1)
    assert result.rows
    assert "could not save the classifier: no space left" in caplog.text
