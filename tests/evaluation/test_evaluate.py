import csv
import json

import pytest
import torch
from PIL import Image

import barlow
from barlow.data import open_source
from barlow.errors import UserError
from barlow.evaluation import Result, task
from barlow.evaluation.classifier import predict
from barlow.evaluation.protocols import save_in_run
from barlow.evaluation.result import unpack


@pytest.fixture
def folders(tmp_path):
    """Train and test as folders of classes."""

    def make(name, classes, images=6):
        for c, kind in enumerate(classes):
            folder = tmp_path / name / kind
            folder.mkdir(parents=True)
            for i in range(images):
                pixels = torch.randint(0, 60, (1, 28, 28)) + 60 * c
                Image.fromarray(pixels[0].to(torch.uint8).numpy()).save(folder / f"{i}.png")
        return str(tmp_path / name)

    return make


def test_the_table_has_both_losses_and_accuracies_without_and_with(encoder):
    result = barlow.evaluate(
        encoder, "mnist5k", "mnist5k", limit=500, baseline="random, pixels", epochs=5
    )
    assert [row.name for row in result.rows] == [
        "without pretraining",
        "raw pixels",
        "with pretraining",
    ]
    for row in result.rows:
        assert list(row.values) == [
            f"{part}_{number}" for part in ("train", "val") for number in ("loss", "top1", "top5")
        ]
    assert result["raw pixels"].values["val_top1"] > 0.7
    assert "without pretraining" in str(result)


def test_it_repeats_itself(encoder):
    first, second = (
        barlow.evaluate(
            encoder, "mnist5k", "mnist5k", limit=500, labels_per_class=5, baseline="random", seed=4
        )
        for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("options", [{}, {"epochs": 2}, {"augment": True, "epochs": 1}])
def test_the_test_images_have_no_say_in_anything(encoder, folders, options):
    """With noise for a test, the classifier and every choice are the same to the last bit."""
    noise = folders("noise", [str(c) for c in range(10)], 3)
    options = {"limit": 500, "labels_per_class": 20, **options}
    honest, other = (
        barlow.evaluate(encoder, "mnist5k", test, **options).rows[0] for test in ("mnist5k", noise)
    )
    assert honest.chosen == other.chosen
    for name in honest.values:
        assert (honest.values[name] == other.values[name]) == name.startswith("train"), name


def test_the_linear_classifier_is_kept_as_it_was_measured(encoder, tmp_path):
    out = str(tmp_path / "model")
    options = {"limit": 300, "labels_per_class": 8, "baseline": "pixels"}
    result = barlow.evaluate(encoder, "mnist5k", out=out, **options)
    assert predict(out, "mnist5k::test", str(tmp_path / "p.csv"), limit=300) == 300
    with open(tmp_path / "p.csv", newline="") as file:
        predicted = [int(row["class"]) for row in csv.DictReader(file)]
    labels = open_source("mnist5k", "test", in_chans=1, limit=300).labels
    correct = unpack(result["with pretraining"].correct[0], 300)
    # The stem is stored for timm and computed back, so a tie may fall the other way.
    assert ((torch.tensor(predicted) == labels) == correct).float().mean() > 0.99
    assert "out" not in result.settings


def test_no_classifier_is_kept_where_it_cannot_be(encoder, pixels, folders, tmp_path, monkeypatch):
    monkeypatch.setattr("barlow.evaluation.probes.features_of", None)  # refused before any work
    source, new = folders("all", ["a", "b"]), str(tmp_path / "new")
    (tmp_path / "file").write_text("")
    (tmp_path / "tags.csv").write_text("file,tags\na/0.png,x|y\na/1.png,x\nb/2.png,y\n")
    with pytest.raises(UserError, match="exists and is not a saved classifier"):
        barlow.evaluate(encoder, source, out=source)
    with pytest.raises(NotADirectoryError, match="file/model"):
        barlow.evaluate(encoder, source, out=str(tmp_path / "file" / "model"))
    with pytest.raises(UserError, match="to save, and these are tags: drop --out"):
        barlow.evaluate(encoder, source, labels=str(tmp_path / "tags.csv"), out=new)
    with pytest.raises(UserError, match="does not say how it was built"):
        barlow.evaluate(pixels, source, out=new)
    assert not (tmp_path / "new").exists()


def test_one_source_without_splits_is_divided(encoder, folders):
    source = folders("all", ["a", "b"], 10)
    found = task.open_task(source, source, in_chans=1)
    assert torch.bincount(found.test.y).tolist() == [2, 2]
    assert not set(found.test.rows.tolist()) & set(found.train.rows.tolist())


def test_classes_are_matched_by_name(encoder, folders):
    train, test = folders("train_images", ["a", "b", "c"]), folders("test_images", ["a", "c"])
    found = task.open_task(train, test, in_chans=1)
    assert found.test.y.unique().tolist() == [0, 2]


def test_a_class_that_training_does_not_have_is_refused(encoder, folders):
    train, test = folders("train_images", ["a", "b"]), folders("test_images", ["a", "z"])
    with pytest.raises(UserError, match="class 'z', which is not among the training labels"):
        barlow.evaluate(encoder, train, test)


def test_a_source_without_labels_is_refused(encoder, folders):
    source = folders("all", ["."], 4)
    with pytest.raises(UserError, match="has no labels: put the images in one folder per class"):
        barlow.evaluate(encoder, source, source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels_per_class": 401}, "class '0' of mnist5k has only 50: ask for 50"),
        ({"labels_per_class": 1, "label_fraction": 0.1}, "both given"),
        ({"label_fraction": 2.0}, "at most 1"),
        ({"protocol": "magic"}, "unknown protocol 'magic': use one of linear, knn, finetune"),
        ({"baseline": "magic"}, "unknown baseline 'magic'"),
        ({"epochs": 0}, "epochs is 0"),
        (
            {"protocol": "knn", "augment": True},
            "protocol knn has no option augment: its options are test, labels",
        ),
        ({"batch_size": 0}, "batch size is 0"),
        ({"devices": 0}, "devices is 0"),
    ],
)
def test_mistakes_are_named(encoder, options, message):
    with pytest.raises(UserError, match=message):
        barlow.evaluate(encoder, "mnist5k", "mnist5k", limit=500, **options)


def test_a_result_survives_its_file(encoder, tmp_path):
    result = barlow.evaluate(encoder, "mnist5k", "mnist5k", "knn", limit=500, labels_per_class=2)
    result.save(tmp_path / "a" / "result.json")
    assert Result.load(tmp_path / "a" / "result.json") == result
    assert json.loads(result.to_json())["settings"]["labels_per_class"] == 2


def test_a_file_that_is_no_result_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(UserError, match="is not a result"):
        Result.load(tmp_path / "x.json")


def test_results_of_a_run_are_kept_in_the_run(encoder, tmp_path):
    from barlow.share import save_encoder

    save_encoder(encoder, tmp_path / "run" / "encoder")
    (tmp_path / "run" / "config.yaml").write_text("")
    run = str(tmp_path / "run")
    result = barlow.evaluate(run, "mnist5k", "mnist5k", "knn", limit=500, labels_per_class=2)
    (file,) = (tmp_path / "run" / "evaluation").iterdir()
    assert Result.load(file) == result


def test_a_run_that_cannot_be_written_to_costs_no_result(pixels, noise, tmp_path, caplog):
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "evaluation").write_text("no folder")
    result = barlow.evaluate(pixels, str(noise), protocol="knn")
    assert save_in_run(result, tmp_path) is None
    assert f"could not save the result in {tmp_path}: " in caplog.text
