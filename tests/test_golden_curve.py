import json
from pathlib import Path

import pytest

import barlow

GOLDEN = Path(__file__).parent / "golden_curve.json"


@pytest.mark.slow
def test_the_losses_of_a_hundred_steps_are_those_of_before(tmp_path):
    """In float64, so that machines agree. A change that means to change numbers writes the file
    anew and shows both curves; any other leaves it alone."""
    settings = json.loads(GOLDEN.read_text())
    losses = settings.pop("losses")
    run = barlow.pretrain("mnist5k", tmp_path / "run", **settings)
    assert [row["loss"] for row in run.metrics()] == pytest.approx(losses, rel=1e-5)
