from pathlib import Path

import pytest
import torch

import barlow
from barlow.encoders import fresh_copy
from barlow.errors import UserError
from barlow.share.loading import shipped_encoders

SHIPPED = Path(barlow.__file__).parent / "shipped"


@pytest.mark.parametrize("name", shipped_encoders())
@torch.no_grad()
def test_a_shipped_encoder_is_small_has_its_card_and_loads_by_name(name):
    folder = SHIPPED / name
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10_000_000
    card = (folder / "README.md").read_text()
    assert "barlow pretrain" in card
    assert "license: mit" in card
    encoder = barlow.load_encoder(name)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert encoder(encoder.preprocess(images)).shape == (2, encoder.num_features)
    assert not encoder.training


def test_the_shipped_encoder_of_cifar10_tells_digits_apart_better_than_an_untrained_one():
    trained = barlow.load_encoder("cifar10-small")
    few = {"train": "mnist5k", "test": "mnist5k", "labels_per_class": 10}
    one, other = (barlow.evaluate(e, **few) for e in (trained, fresh_copy(trained)))
    assert one.rows[0].values["val_top1"] > other.rows[0].values["val_top1"]


def test_the_names_are_told_where_nothing_is_found(tmp_path):
    with pytest.raises(UserError, match="cifar10-small, which comes with this package"):
        barlow.load_encoder(tmp_path / "nothing")
