import json

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import barlow
from barlow.data import Preprocess
from barlow.errors import UserError
from barlow.share import load_encoder, save_encoder


def trained(name, image_size=32, in_chans=3, **model_args):
    """An encoder with running statistics and weights that are not the initial ones."""
    torch.manual_seed(0)
    encoder = barlow.create_encoder(name, image_size, in_chans, **model_args)
    encoder.preprocess = Preprocess(image_size, in_chans=in_chans)
    for _ in range(3):
        encoder(torch.randn(8, in_chans, image_size, image_size))
    for parameter in encoder.parameters():
        parameter.data += 0.1 * parameter.data.std().nan_to_num() * torch.randn(parameter.shape)
    return encoder.eval()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet18", {"channels": [8, 16, 24, 32]}),
        ("resnet18", {"channels": [8, 16, 24, 32], "stem": "standard"}),
        ("resnet18", {"channels": [8, 16, 24, 32], "stem": "padded"}),
        ("resnet18", {"channels": [8, 16, 24, 32], "stem": "strided"}),
        ("resnet18", {"channels": [8, 16, 24, 32], "pool": 2}),
        ("resnet18", {"channels": [8, 16, 24, 32], "stem": "strided", "pool": 3, "stages": 2}),
        ("dla34", {"channels": [8, 8, 8, 16, 16, 24], "levels": [0, 0, 1, 1, 1, 1], "pool": 2}),
        ("vit_tiny_patch16_224", {"depth": 2}),
        ("dla34", {"channels": [4, 4, 8, 8, 8, 16]}),
    ],
)
@torch.no_grad()
def test_an_encoder_comes_back_bit_for_bit(tmp_path, name, arguments):
    encoder = trained(name, **arguments)
    save_encoder(encoder, tmp_path)
    again = load_encoder(tmp_path)
    view = torch.randn(3, 3, 32, 32)
    assert torch.equal(again(view), encoder(view))
    assert again.spec == encoder.spec
    assert again.preprocess.to_dict() == encoder.preprocess.to_dict()
    for (key, saved), loaded in zip(
        encoder.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(saved, loaded), key


def test_the_preprocessing_is_kept_where_it_is_not_the_encoders_size(tmp_path):
    encoder = trained("resnet18", channels=[8, 16, 24, 32])
    encoder.preprocess = Preprocess(48, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    save_encoder(encoder, tmp_path)
    assert load_encoder(tmp_path).preprocess.to_dict() == encoder.preprocess.to_dict()


@torch.no_grad()
def test_plain_timm_computes_the_same_where_it_has_the_architecture(tmp_path):
    encoder = trained("dla34", channels=[4, 4, 8, 8, 8, 16])
    save_encoder(encoder, tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    view = torch.randn(3, 3, 32, 32)
    assert torch.equal(theirs(view), encoder(view))


@pytest.mark.parametrize(
    ("stem", "size", "atol"),
    # timm's border has the mean's colour rounded to a byte.
    [("small", 128, 1e-5), ("strided", 64, 1e-5), ("padded", 136, 0.02)],
)
@torch.no_grad()
def test_plain_timm_computes_the_small_stem_on_the_enlarged_image(tmp_path, stem, size, atol):
    encoder = trained("resnet18", channels=[8, 16, 24, 32], stem=stem)
    save_encoder(encoder, tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    image = Image.fromarray(torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy())
    transform = create_transform(**resolve_model_data_config(theirs), is_training=False)
    enlarged = transform(image)[None]
    assert enlarged.shape == (1, 3, size, size)
    torch.testing.assert_close(
        theirs(enlarged), encoder(encoder.preprocess(image)[None]), rtol=1e-4, atol=atol
    )


def test_anybodys_timm_folder_loads(tmp_path):
    pretrained_cfg = {"interpolation": "bicubic", "crop_pct": 0.9}
    model = timm.create_model(
        "resnet18", num_classes=10, channels=[8, 16, 24, 32], pretrained_cfg_overlay=pretrained_cfg
    ).eval()
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    encoder = load_encoder(tmp_path)
    view = torch.randn(2, 3, 64, 64)
    expected = model.forward_head(model.forward_features(view), pre_logits=True)
    torch.testing.assert_close(encoder(view), expected)
    assert encoder.origin == (
        f"{tmp_path} is a timm model: resnet18, 126 of 126 weights matched; left out: fc (2); "
        "missing: nothing; timm resizes its images with bicubic interpolation and keeps 90.0% of "
        "the shorter side, encoder.preprocess uses bilinear and keeps all of it"
    )


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    save_encoder(trained("resnet18", channels=[8, 16, 24, 32]), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["barlow"]["encoder"]["model_args"]["channels"] = [8, 16, 24, 40]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"a different shape for layer4\.0\.conv1\.weight"):
        load_encoder(tmp_path)


def test_a_damaged_folder_is_refused(tmp_path):
    save_encoder(trained("resnet18", channels=[8, 16, 24, 32]), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a complete timm folder"):
        load_encoder(tmp_path)
