import copy
from types import SimpleNamespace

import pytest
import torch

import barlow
from barlow import validation
from barlow.data import Source, open_source
from barlow.data.source import Table
from barlow.errors import UserError
from barlow.evaluation import health as room
from barlow.evaluation.features import extract
from barlow.evaluation.spectrum import rankme, spectrum
from barlow.views import TwoViews


def health(encoder, source="mnist5k", **options):
    return barlow.evaluate(encoder, source, protocol="health", **options)


def test_the_table_is_of_the_features_of_the_images(encoder):
    result = health(
        encoder, "mnist5k::test", images=1000, views=2, preset="digits", baseline="random"
    )
    assert [row.name for row in result.rows] == ["without pretraining", "with pretraining"]
    row = result["with pretraining"]
    x, _ = extract(encoder, open_source("mnist5k", "test", in_chans=1))
    assert row.values["RankMe"] == pytest.approx(rankme(x), rel=1e-4)
    assert row.chosen["spectrum"] == pytest.approx(spectrum(x).tolist(), rel=1e-3, abs=1e-7)
    assert 0 < row.values["alignment"] < 1
    assert result.settings["images"] == result.data["train"]["images"] == 1000


def test_it_repeats_itself_and_another_seed_draws_other_views(encoder):
    def values(seed):
        return health(encoder, images=60, views=3, preset="digits", seed=seed).rows[0].values

    assert values(1) == values(1)
    assert values(1)["alignment"] != values(2)["alignment"]
    assert values(1)["RankMe"] == values(2)["RankMe"]


def test_the_encoder_is_left_as_it_was(encoder):
    encoder = copy.deepcopy(encoder).train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    health(encoder, images=20, views=2, preset="digits")
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    assert all(module.training for module in encoder.modules())


def test_an_error_leaves_the_encoder_as_it_was(encoder):
    encoder = copy.deepcopy(encoder).train()
    broken = Source("broken", Table([b"", b""], ["0", "1"]), 1)
    with pytest.raises(UserError, match="images are broken"):
        room._features_of_views(encoder, broken, TwoViews(20, "digits", in_chans=1), 2, 0)
    assert all(module.training for module in encoder.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 1}, "give at least 3 images and 2 views"),
        ({"images": 2}, "give at least 3 images and 2 views"),
        ({"baseline": "magic"}, "use one of random, pixels, supervised"),
        ({"test": "mnist5k"}, "protocol health has no option test: its options are baseline"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"preset": "magic"}, "unknown preset 'magic'"),
    ],
)
def test_mistakes_are_named(encoder, options, message):
    with pytest.raises(UserError, match=message):
        health(encoder, **options)


def test_images_of_every_class_are_looked_at_where_they_are_sorted_by_class(monkeypatch):
    monkeypatch.setattr(room, "_PAIRS", 100)
    x = torch.eye(10).repeat_interleave(100, 0) + 1e-3 * torch.randn(1000, 10)
    row = room._row("sorted", x, torch.randn(20, 2, 10))
    assert row.values["uniformity"] < -1  # 0, were they of the first class alone


def test_the_embeddings_looked_at_while_training_are_from_everywhere(encoder, monkeypatch):
    class Brightness(torch.nn.Linear):
        def encoder(self, images):
            return images.mean((1, 2, 3))[:, None]

        embed = encoder

    monkeypatch.setattr(validation, "_EMBEDDINGS", (40, 1))
    fabric = SimpleNamespace(
        global_rank=0, world_size=1, device=torch.device("cpu"), autocast=torch.no_grad
    )
    images = open_source("mnist5k", "test", in_chans=1, limit=100)
    y, z, _ = validation._outputs(fabric, Brightness(1, 1), images, encoder.preprocess)
    assert (len(y), len(z)) == (100, 40)
    assert set(z.flatten().tolist()) & set(y[-20:].flatten().tolist())
