from pathlib import Path

import pytest
import torch
from torch import nn

import barlow
from barlow.assembly import build_model
from barlow.checkpoint import load_checkpoint
from barlow.data import Preprocess
from barlow.model import create_projector
from barlow.settings import Settings
from barlow.share import save_encoder

TINY = {
    "recipe": str(Path(__file__).parents[1] / "digits.yaml"),
    "epochs": 1,
    "limit": 64,
    "validation_limit": 64,
    "batch_size": 32,
    "accelerator": "cpu",
}


@pytest.fixture
def original(resnet18, shaken, tmp_path):
    """A full checkpoint of the original code, and its two parts."""
    module = nn.Module()
    module.backbone, module.projector = resnet18(), shaken(create_projector(512, [32, 32, 32]))
    state = {"epoch": 1, "model": {f"module.{k}": v for k, v in module.state_dict().items()}}
    torch.save(state, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth", module.backbone, module.projector


def test_pretraining_starts_from_encoder_and_projector_of_the_original_code(original, tmp_path):
    path, backbone, projector = original
    widths = {"projector": [32, 32, 32], "channels": 3, "image_size": 32}
    model, _ = build_model(Settings.of("mnist5k", init=str(path), **widths))
    origin = model.encoder.origin.splitlines()
    for part, theirs in ((model.encoder, backbone), (model.projector, projector)):
        for name, value in theirs.state_dict().items():
            assert torch.equal(part.state_dict()[name], value), name
    assert "facebookresearch/barlowtwins" in origin[0]
    assert origin[1] == "the projector also starts from the file: 512-32-32-32"

    run = barlow.pretrain("mnist5k", tmp_path / "run", init=str(path), **{**TINY, **widths})
    assert all(line in run.log_file.read_text() for line in origin)


def test_a_projector_of_other_widths_starts_anew_and_that_is_said(original):
    path, backbone, _ = original
    model, _ = build_model(Settings.of("mnist5k", init=str(path), projector=[64, 16]))
    assert torch.equal(model.encoder.conv1.weight, backbone.conv1.weight)
    assert model.encoder.origin.splitlines()[1] == (
        "the projector starts from scratch: the file's is 512-32-32-32, this one is 512-64-16"
    )


def test_pretraining_starts_from_encoder_and_projector_of_a_checkpoint_of_ours(tmp_path):
    run = barlow.pretrain("mnist5k", tmp_path / "run", projector=[16, 16], **TINY)
    init = str(run.last_checkpoint)
    settings = Settings.of("mnist5k", init=init, **{**TINY, "projector": [16, 16]})
    model, _ = build_model(settings)
    state = load_checkpoint(run.last_checkpoint)["model"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.encoder.origin == "the projector also starts from the file: 128-16-16"


def test_images_are_normalised_as_for_the_weights_that_it_starts_from(tmp_path):
    encoder = barlow.create_encoder("resnet18", 32, channels=[8, 16, 24, 32])
    encoder.preprocess = Preprocess(32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    save_encoder(encoder, tmp_path / "encoder")
    started = Settings("mnist5k", init=str(tmp_path / "encoder"), image_size=24, eval_size=40)
    _, preprocess = build_model(started)
    assert preprocess.mean == (0.4, 0.5, 0.6)
    assert preprocess.std == (0.2, 0.3, 0.25)
    assert preprocess.image_size == 40
