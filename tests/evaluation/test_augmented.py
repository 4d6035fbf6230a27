import copy

import pytest
import torch

import barlow
from barlow.data import open_source
from barlow.errors import UserError
from barlow.evaluation.augmented import augmented_probe
from barlow.evaluation.sgd import RATES
from barlow.evaluation.task import LabelledImages


@pytest.fixture(scope="module")
def part():
    source = open_source("mnist5k", "train", in_chans=1, limit=300)
    return LabelledImages(source, torch.arange(300), source.labels)


def test_it_learns_and_repeats_itself(encoder, part, digits):
    (a, rate), (b, _) = (
        augmented_probe(encoder, part, 10, epochs=8, views="digits", batch_size=50) for _ in "ab"
    )
    assert torch.equal(a.weight, b.weight)
    assert rate in RATES
    assert (a(digits[2]).argmax(1) == digits[3]).float().mean() > 0.2  # chance is 0.1


def test_another_seed_sees_other_crops(encoder, part):
    a, b = (
        augmented_probe(encoder, part, 10, 1, rate=0.01, seed=seed, views="digits")[0]
        for seed in (1, 2)
    )
    assert not torch.allclose(a.weight, b.weight)


def test_the_encoder_is_left_as_it_was(encoder, part):
    encoder = copy.deepcopy(encoder).train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    augmented_probe(encoder, part, 10, epochs=1, views="digits")
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    assert all(module.training for module in encoder.modules())


def test_an_error_leaves_the_encoder_as_it_was(encoder, part, monkeypatch):
    def refuse(*_):
        raise UserError("too many images are broken")

    monkeypatch.setattr("barlow.evaluation.augmented.CroppedImages.draw", refuse)
    encoder = copy.deepcopy(encoder).train()
    with pytest.raises(UserError, match="too many images"):
        augmented_probe(encoder, part, 10, epochs=1, views="digits")
    assert all(module.training for module in encoder.modules())


def test_evaluate_measures_it_on_images_as_they_are(encoder):
    result = barlow.evaluate(
        encoder, "mnist5k", "mnist5k", epochs=1, limit=200, augment=True, baseline="pixels"
    )
    assert [row.name for row in result.rows] == ["raw pixels", "with pretraining"]
    assert result.rows[1].chosen["rate"] in RATES
