"""What a file says of its encoder is checked, and nothing else is loaded for it."""

import json
import os
import re

import pytest
import torch
from safetensors.torch import save_file

import barlow
from barlow.data import Preprocess
from barlow.errors import UserError
from barlow.share import load_encoder

ARGUMENTS = {"channels": [8, 16, 24, 32]}


def as_folder(path, weights, description):
    path.mkdir()
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(
        json.dumps({"architecture": "resnet18", "barlow": description})
    )


def as_timms_folder(path, weights, description):
    as_folder(path, weights, description)
    spec, how = description["encoder"], description["preprocess"]
    data = {"input_size": [3, 32, 32], "mean": how.get("mean"), "std": how["std"]}
    config = {"architecture": spec["name"], "model_args": spec["model_args"]}
    (path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": data}))


def as_safetensors(path, weights, description):
    save_file(weights, path, {"barlow": json.dumps(description)})


def as_checkpoint(path, weights, description):
    model = {f"encoder.{name}": value for name, value in weights.items()}
    torch.save({**description, "model": model}, path)


WRITERS = {
    "encoder": as_folder,
    "timms": as_timms_folder,
    "encoder.safetensors": as_safetensors,
    "encoder.ckpt": as_checkpoint,
}


@pytest.fixture(params=WRITERS)
def written(request, tmp_path):
    """`written(change)`: a place with an encoder, whose description was changed."""

    def write(change):
        encoder = barlow.create_encoder("resnet18", 32, stem="standard", **ARGUMENTS)
        how = Preprocess(32)
        description = {"encoder": encoder.spec.to_dict(), "preprocess": how.to_dict()}
        change(description)
        WRITERS[request.param](tmp_path / request.param, encoder.state_dict(), description)
        return tmp_path / request.param

    return write


def test_what_is_described_as_it_should_be_loads(written):
    encoder = load_encoder(written(lambda description: None))
    assert encoder.spec.model_args == ARGUMENTS
    assert encoder.preprocess.to_dict() == Preprocess(32).to_dict()


@pytest.mark.parametrize("written", [name for name in WRITERS if name != "timms"], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["encoder"].update(new_field=1), "new_field"),
        (lambda d: d["encoder"].pop("in_chans"), "in_chans"),
        (lambda d: d["preprocess"].update(new_field=1), "new_field"),
        (lambda d: d.update(preprocess=None), ""),
        (lambda d: d.update(encoder=[]), ""),
    ],
)
def test_a_description_of_another_version_is_refused(written, change, message):
    place = written(change)
    words = f"{re.escape(str(place))} is .* another version of barlow: .*{message}"
    with pytest.raises(UserError, match=words):
        load_encoder(place)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["encoder"].update(model_args=None),
        lambda d: d["encoder"].update(name=None),
        lambda d: d["encoder"].update(model_args={"pretrained": True}),
        lambda d: d["encoder"].update(model_args={"widths": 3}),
        lambda d: d["encoder"].update(model_args={"channels": "wide"}),
        lambda d: d["preprocess"].update(mean=[0.5]),
    ],
)
def test_a_description_that_cannot_be_is_refused(written, change):
    place = written(change)
    with pytest.raises(UserError, match=re.escape(str(place))):
        load_encoder(place)


class Pickled:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_description_cannot_make_timm_load_another_file(written, tmp_path):
    bait, trap = tmp_path / "bait.pth", tmp_path / "executed"
    torch.save({"state_dict": Pickled(trap)}, bait)
    place = written(lambda d: d["encoder"]["model_args"].update(checkpoint_path=str(bait)))
    with pytest.raises(UserError, match="checkpoint_path"):
        load_encoder(place)
    assert not trap.exists()
