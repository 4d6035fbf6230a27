import subprocess
import sys
from pathlib import Path

import pytest

import barlow

TINY = {
    "recipe": str(Path(__file__).parents[1] / "digits.yaml"),
    "encoder_args": {"levels": [0, 0, 1, 1, 1, 1], "channels": [4, 4, 8, 8, 8, 16]},
    "projector": [16, 16],
    "batch_size": 32,
    "limit": 200,
    "validation_limit": 60,
    "epochs": 3,
    "log_every": 2,
    "eval_every": 1,
    "accelerator": "cpu",
}


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A small real run, evaluated, with its page."""
    from barlow.report import write_report

    run = barlow.pretrain("mnist5k", tmp_path_factory.mktemp("report") / "tiny", **TINY)
    barlow.evaluate(
        run.path,
        "mnist5k",
        "mnist5k",
        limit=300,
        labels_per_class=5,
        baseline="random",
        cache=False,
    )
    write_report([str(run.path)])
    return run


@pytest.fixture
def command():
    def barlow(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "barlow", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
        )

    return barlow
