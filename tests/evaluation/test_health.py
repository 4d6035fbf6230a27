import copy

import pytest
import torch

from barlow.data import open_source
from barlow.errors import UserError
from barlow.evaluation.features import extract
from barlow.evaluation.health import health
from barlow.evaluation.spectrum import rankme, spectrum


def test_the_table_is_of_the_features_of_the_test_images(encoder):
    result = health(encoder, "mnist5k", images=1000, views=2, preset="digits", baseline="random")
    assert [row.name for row in result.rows] == ["without pretraining", "with pretraining"]
    row = result["with pretraining"]
    x, _ = extract(encoder, open_source("mnist5k", "test", in_chans=1))
    assert row.values["RankMe"] == pytest.approx(rankme(x), rel=1e-4)
    assert row.chosen["spectrum"] == pytest.approx(spectrum(x).tolist(), rel=1e-3, abs=1e-7)
    assert 0 < row.values["alignment"] < 1


def test_it_repeats_itself_and_another_seed_draws_other_views(encoder):
    def values(seed):
        result = health(encoder, "mnist5k", images=60, views=3, preset="digits", seed=seed)
        return result.rows[0].values

    assert values(1) == values(1)
    assert values(1)["alignment"] != values(2)["alignment"]
    assert values(1)["RankMe"] == values(2)["RankMe"]


def test_the_encoder_is_left_as_it_was(encoder):
    encoder = copy.deepcopy(encoder).train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    health(encoder, "mnist5k", images=20, views=2, preset="digits")
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    assert all(module.training for module in encoder.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 1}, "give at least 3, 2 and 1"),
        ({"images": 2}, "give at least 3, 2 and 1"),
        ({"baseline": "pixels"}, "there is random"),
        ({"preset": "magic"}, "no preset 'magic'"),
    ],
)
def test_mistakes_are_named(encoder, options, message):
    with pytest.raises(UserError, match=message):
        health(encoder, "mnist5k", **options)
