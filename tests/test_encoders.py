import copy
import pickle

import pytest
import torch
from torch import nn

import barlow
from barlow.encoders import EncoderSpec, fresh_copy, spec_of
from barlow.errors import UserError


def test_a_resnet_for_small_images_keeps_their_resolution():
    encoder = barlow.create_encoder("resnet18", image_size=32)
    assert encoder.conv1.stride == (1, 1)
    assert isinstance(encoder.maxpool, nn.Identity)
    assert encoder.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 512, 4, 4)
    assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, encoder.num_features)


def test_large_images_and_other_families_keep_timms_stem():
    assert barlow.create_encoder("resnet18", image_size=224).conv1.stride == (2, 2)
    assert spec_of(barlow.create_encoder("convnext_atto", image_size=32)).stem == "standard"


def test_transformers_are_built_for_the_size_of_the_views():
    encoder = barlow.create_encoder("vit_tiny_patch16_224", image_size=64, in_chans=1)
    assert encoder(torch.zeros(1, 1, 64, 64)).shape == (1, encoder.num_features)


def test_arguments_reach_timm():
    encoder = barlow.create_encoder("resnet18", 32, channels=[8, 16, 24, 32])
    assert encoder.num_features == 32


@torch.no_grad()
def test_a_pooled_grid_keeps_the_quadrants_of_the_last_map_apart():
    encoder = barlow.create_encoder("resnet18", 32, channels=[8, 16, 24, 32], pool=2).eval()
    images = torch.randn(2, 3, 32, 32)
    quadrants = encoder.forward_features(images).unflatten(3, (2, 2)).unflatten(2, (2, 2))
    expected = quadrants.mean((3, 5)).flatten(1)  # (2, 32 * 2 * 2)
    torch.testing.assert_close(encoder(images), expected)
    assert encoder.num_features == 128


@torch.no_grad()
def test_several_stages_stand_side_by_side():
    # The last of the four has no blocks, so that it has no map of its own.
    small = {"channels": [8, 16, 24, 24], "layers": [1, 1, 1, 0]}
    encoder = barlow.create_encoder("resnet18", 32, pool=2, stages=2, **small).eval()
    images = torch.randn(2, 3, 32, 32)
    middle = encoder.layer2(encoder.layer1(encoder.act1(encoder.bn1(encoder.conv1(images)))))
    last = encoder.layer3(middle)
    expected = [nn.functional.adaptive_avg_pool2d(m, 2).flatten(1) for m in (middle, last)]
    torch.testing.assert_close(encoder(images), torch.cat(expected, 1))
    assert encoder.num_features == 4 * (16 + 24)
    assert torch.equal(pickle.loads(pickle.dumps(encoder))(images), encoder(images))


@torch.no_grad()
def test_the_blocks_of_a_transformer_are_stages_and_a_copy_has_its_own_weights():
    encoder = barlow.create_encoder("vit_tiny_patch16_224", 32, depth=2, stages=2).eval()
    assert encoder.num_features == 2 * 192
    images = torch.randn(2, 3, 32, 32)
    before = encoder(images)
    copied = copy.deepcopy(encoder)
    copied.blocks[0].mlp.fc2.bias += 1
    assert not torch.equal(copied(images), before)
    assert torch.equal(encoder(images), before)


def test_what_cannot_be_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="has 5 stages"):
        barlow.create_encoder("resnet18", 32, stages=6)
    with pytest.raises(UserError, match=r"unknown encoder 'resnet_18'.*did you mean"):
        barlow.create_encoder("resnet_18")
    with pytest.raises(UserError, match=r"does not accept these arguments.*'colour'"):
        barlow.create_encoder("resnet18", colour="red")
    with pytest.raises(UserError, match="no 7x7 ResNet stem"):
        barlow.create_encoder("convnext_atto", stem="small")
    with pytest.raises(UserError, match=r"^cannot load supervised weights for 'resnet18': .+"):
        barlow.create_encoder("resnet18", pretrained=True, channels=[8, 16, 24, 32])
    with pytest.raises(UserError, match=r"not supported by this version of barlow.*'colour'"):
        EncoderSpec.from_dict({"colour": "red"})


@pytest.mark.parametrize("argument", ["checkpoint_path", "pretrained_cfg", "cache_dir"])
def test_timm_is_sent_nowhere_by_the_arguments_of_an_architecture(argument, tmp_path):
    spec = barlow.create_encoder("resnet18", 32).spec.to_dict()
    spec["model_args"] = {argument: str(tmp_path / "weights.pth")}
    with pytest.raises(UserError, match=f"'{argument}' is not an architecture argument"):
        EncoderSpec.from_dict(spec)


def test_a_fresh_copy_is_the_same_architecture_with_other_weights():
    encoder = barlow.create_encoder("resnet18", 32, channels=[8, 16, 24, 32])
    one, same, other = fresh_copy(encoder, 1), fresh_copy(encoder, 1), fresh_copy(encoder, 2)
    weights = [e.conv1.weight for e in (encoder, one, same, other)]
    assert spec_of(one) == spec_of(encoder)
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[1], weights[3])
    assert not torch.equal(weights[0], weights[1])


def test_a_fresh_copy_leaves_the_callers_random_numbers_alone():
    encoder = barlow.create_encoder("resnet18", 32, channels=[8, 16, 24, 32])
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    fresh_copy(encoder)
    assert torch.equal(torch.rand(1), expected)


def test_a_foreign_module_cannot_be_copied():
    with pytest.raises(UserError, match="does not say how it was built"):
        fresh_copy(nn.Linear(2, 2))
