import pytest
import torch
from PIL import Image

import barlow
from barlow.errors import UserError
from barlow.evaluation.result import Result
from barlow.evaluation.transfer import transfer


@pytest.fixture
def shades(tmp_path):
    """Two classes, dark and light, as a folder a class."""
    torch.manual_seed(0)
    for c, kind in enumerate(("dark", "light")):
        (tmp_path / "shades" / kind).mkdir(parents=True)
        for i in range(10):
            pixels = torch.randint(0, 60, (28, 28)) + 120 * c
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(
                tmp_path / "shades" / kind / f"{i}.png"
            )
    return str(tmp_path / "shades")


def test_each_source_has_the_numbers_it_has_alone_and_the_mean_is_theirs(encoder, shades):
    found = transfer(encoder, ["mnist5k", shades], labels_per_class=5, baseline="random")
    alone = [
        barlow.evaluate(encoder, s, s, labels_per_class=5, baseline="random")
        for s in ("mnist5k", shades)
    ]
    assert [row.values for row in found.rows[:4]] == [r.values for a in alone for r in a.rows]
    for row in ("without pretraining", "with pretraining"):
        mean = sum(a[row].values["val_top1"] for a in alone) / 2
        assert found[f"mean, {row}"].values["val_top1"] == pytest.approx(mean)
    # Two classes have no top-5, so the mean has none either.
    assert "val_top5" not in found["mean, with pretraining"].values
    assert f"{shades}, with pretraining" in str(found)


def test_the_result_is_kept_in_the_run_and_reads_back(encoder, shades, tmp_path):
    from barlow.share import save_encoder

    run = tmp_path / "run"
    save_encoder(encoder, run / "encoder")
    (run / "config.yaml").write_text("")
    found = transfer(str(run), ["mnist5k", shades], "knn", labels_per_class=5)
    (file,) = (run / "evaluation").glob("transfer-*.json")
    assert Result.load(file) == found
    assert len(list((run / "evaluation").glob("knn-*.json"))) == 2


@pytest.mark.slow
def test_two_processes_give_the_table_of_one(encoder, shades):
    one, two = (
        transfer(encoder, [shades], "knn", cache=False, devices=devices) for devices in (1, 2)
    )
    assert two.settings == one.settings, "processes are no setting of what is measured"
    for a, b in zip(one.rows, two.rows, strict=True):
        assert b.values == pytest.approx(a.values, abs=1e-5)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "give a list of one or more labelled sources"),
        ("mnist5k", "give a list"),
        (["mnist5k", "mnist5k"], "given twice"),
        (["mnist5k", "mnist6k"], "unknown source 'mnist6k'"),
    ],
)
def test_mistakes_are_named_before_any_image_is_read(encoder, monkeypatch, sources, message):
    monkeypatch.setattr("barlow.evaluation.transfer.evaluate", None)
    with pytest.raises(UserError, match=message):
        transfer(encoder, sources)
