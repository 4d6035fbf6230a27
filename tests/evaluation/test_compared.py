import pytest
import timm
import torch

import barlow
from barlow.data import Preprocess
from barlow.errors import UserError
from barlow.evaluation.compared import compared


def _encoder(**options):
    torch.manual_seed(0)
    encoder = barlow.create_encoder("resnet10t", image_size=32, **options)
    encoder.preprocess = Preprocess(32, mean=[0.5] * 3, std=[0.2] * 3)
    return encoder.eval()


def _line(encoder, name):
    (_, make), _ = compared(encoder, name)
    return make(0)


def test_supervised_weights_are_timms_with_timms_own_preprocessing(tmp_path):
    torch.manual_seed(1)
    theirs = timm.create_model("resnet10t").eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    # timm reads the file where it would have asked the hub.
    local = {"file": str(tmp_path / "weights.pth"), "mean": (0.4, 0.4, 0.4), "std": (0.3, 0.3, 0.3)}
    found = _line(_encoder(pretrained_cfg_overlay=local), "supervised")
    assert (found.preprocess.mean, found.preprocess.std) == ((0.4,) * 3, (0.3,) * 3)
    images = torch.randn(2, 3, 32, 32)
    expected = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
    torch.testing.assert_close(found(images), expected)


def test_weights_for_a_standard_stem_see_images_that_are_enlarged_for_it(tmp_path):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "weights.pth")
    local = {"file": str(tmp_path / "weights.pth")}
    encoder = barlow.create_encoder("resnet18", image_size=32, pretrained_cfg_overlay=local)
    encoder.preprocess = Preprocess(32)
    found = _line(encoder, "supervised")
    assert encoder.conv1.kernel_size == (3, 3)
    assert found.conv1.kernel_size == (7, 7)
    assert found.preprocess.image_size == 128
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    small = encoder.forward_features(encoder.preprocess(image))
    assert found.forward_features(found.preprocess(image)).shape == small.shape


def test_weights_that_do_not_fit_are_an_error_that_names_the_encoder(tmp_path):
    torch.save({"conv1.0.weight": torch.zeros(1)}, tmp_path / "weights.pth")
    encoder = _encoder(pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")})
    with pytest.raises(UserError, match="no supervised weights of 'resnet10t'"):
        _line(encoder, "supervised")


def test_pixels_are_features_of_32_pixels_a_side_at_most():
    encoder = _encoder()
    encoder.preprocess = Preprocess(48)
    image = encoder.preprocess(torch.randint(0, 255, (2, 3, 48, 48), dtype=torch.uint8))
    assert _line(encoder, "pixels")(image).shape == (2, 3 * 32 * 32)


def test_each_seed_starts_another_random_network():
    a, b, again = (compared(_encoder(), "random")[0][1](seed) for seed in (0, 1, 0))
    weights = [next(module.parameters()) for module in (a, b, again)]
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[1])
