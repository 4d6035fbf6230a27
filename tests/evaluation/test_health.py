import copy

import pytest
import torch

import barlow
from barlow.data import open_source
from barlow.errors import UserError
from barlow.evaluation.features import extract
from barlow.evaluation.spectrum import rankme, spectrum


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 1}, "give at least 3 and 2"),
        ({"images": 2}, "give at least 3 and 2"),
        ({"baseline": "magic"}, "there are random, pixels, supervised"),
        ({"test": "mnist5k"}, "the protocol health takes no test: it takes baseline"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"preset": "magic"}, "no preset 'magic'"),
    ],
)
def test_mistakes_are_named(encoder, options, message):
    with pytest.raises(UserError, match=message):
        health(encoder, **options)
