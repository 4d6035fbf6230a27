"""What takes long is told, what is quick is not."""

import logging
import time

import pytest
import torch

from barlow import progress
from barlow.data import Preprocess, open_source
from barlow.evaluation.features import features_of
from barlow.progress import log_if_slow


@pytest.fixture
def heard(monkeypatch, caplog):
    """The lines that are logged, with hundredths for seconds."""
    for name in ("_SLOW", "_FIRST", "_EVERY"):
        monkeypatch.setattr(progress, name, getattr(progress, name) / 100)
    caplog.set_level(logging.INFO, "barlow.progress")
    return lambda: [record.getMessage() for record in caplog.records]


def test_what_is_quick_is_not_named(caplog):
    caplog.set_level(logging.INFO, "barlow.progress")
    with log_if_slow("features"):
        pass
    assert not caplog.records


def test_what_takes_long_is_named_and_then_now_and_then_how_far_it_is(heard, monkeypatch):
    monkeypatch.setattr(progress, "_FIRST", 0.5)
    with log_if_slow("features") as reached:
        reached("1 done")
        time.sleep(0.7)
        for done in (2, 3):
            reached(f"{done} done")
    time.sleep(0.1)
    assert heard() == ["features", "features: 2 done"]


class Slow(torch.nn.Flatten):
    preprocess = Preprocess(8, in_chans=1)

    def forward(self, images):
        time.sleep(0.5)
        return super().forward(images)


def test_features_that_take_long_say_of_what_they_are(heard, tmp_path):
    digits = open_source("mnist5k", "test", in_chans=1, limit=30)
    features_of(Slow(), digits, batch_size=20, cache=tmp_path)
    assert heard()[:2] == [
        "computing features of 30 images of mnist5k",
        "computing features of 30 images of mnist5k: 20 done",
    ]
    found = len(heard())
    features_of(Slow(), digits, batch_size=20, cache=tmp_path)
    assert len(heard()) == found, "they were kept"
