from types import SimpleNamespace

import pytest
import timm
import torch

import barlow
from barlow.data import Preprocess
from barlow.errors import UserError
from barlow.evaluation.baselines import views_of_run, with_baselines
from barlow.evaluation.classifier import Classifier, predict, save_classifier
from barlow.evaluation.features import resolve_encoder
from barlow.evaluation.transfer import transfer
from barlow.share import save_encoder


def _encoder(**options):
    torch.manual_seed(0)
    encoder = barlow.create_encoder("resnet10t", image_size=32, **options)
    encoder.preprocess = Preprocess(32, mean=[0.5] * 3, std=[0.2] * 3)
    return encoder.eval()


def _baseline(encoder, name):
    (_, make), _ = with_baselines(encoder, name)
    return make(0)


def test_supervised_weights_are_timms_with_timms_own_preprocessing(tmp_path):
    torch.manual_seed(1)
    theirs = timm.create_model("resnet10t").eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    # timm reads the file where it would have asked the hub.
    local = {"file": str(tmp_path / "weights.pth"), "mean": (0.4, 0.4, 0.4), "std": (0.3, 0.3, 0.3)}
    found = _baseline(_encoder(pretrained_cfg_overlay=local), "supervised")
    assert (found.preprocess.mean, found.preprocess.std) == ((0.4,) * 3, (0.3,) * 3)
    images = torch.randn(2, 3, 32, 32)
    expected = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
    torch.testing.assert_close(found(images), expected)


def test_weights_for_a_standard_stem_see_images_that_are_enlarged_for_it(tmp_path):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "weights.pth")
    local = {"file": str(tmp_path / "weights.pth")}
    encoder = barlow.create_encoder("resnet18", image_size=32, pretrained_cfg_overlay=local)
    encoder.preprocess = Preprocess(32)
    found = _baseline(encoder, "supervised")
    assert encoder.conv1.kernel_size == (3, 3)
    assert found.conv1.kernel_size == (7, 7)
    assert found.preprocess.image_size == 128
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    small = encoder.forward_features(encoder.preprocess(image))
    assert found.forward_features(found.preprocess(image)).shape == small.shape


def test_weights_that_do_not_fit_are_an_error_that_names_the_encoder(tmp_path):
    torch.save({"conv1.0.weight": torch.zeros(1)}, tmp_path / "weights.pth")
    encoder = _encoder(pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")})
    with pytest.raises(UserError, match="cannot load supervised weights for 'resnet10t'"):
        _baseline(encoder, "supervised")


def test_pixels_are_features_of_32_pixels_a_side_at_most():
    encoder = _encoder()
    encoder.preprocess = Preprocess(48)
    image = encoder.preprocess(torch.randint(0, 255, (2, 3, 48, 48), dtype=torch.uint8))
    assert _baseline(encoder, "pixels")(image).shape == (2, 3 * 32 * 32)


def test_each_seed_starts_another_random_network():
    a, b, again = (with_baselines(_encoder(), "random")[0][1](seed) for seed in (0, 1, 0))
    weights = [next(module.parameters()) for module in (a, b, again)]
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[1])


@pytest.fixture
def saved(encoder, tmp_path):
    save_encoder(encoder, tmp_path / "encoder")
    return str(tmp_path / "encoder")


@pytest.fixture
def asked(monkeypatch):
    """The accelerators that are asked for; what they have is called "meta"."""
    found = []

    def create_fabric(devices):
        found.append(devices.accelerator)
        return SimpleNamespace(device=torch.device("meta"))

    monkeypatch.setattr("barlow.evaluation.features.create_fabric", create_fabric)
    return found


def test_an_encoder_is_loaded_where_the_accelerator_is_and_its_baselines_beside_it(
    saved, asked, encoder
):
    there = resolve_encoder(saved, "auto")
    lines = with_baselines(there, ["random", "pixels"])
    assert asked == ["auto"]
    devices = [[p.device.type for p in make(0).parameters()] for _, make in lines]
    assert [set(of_one) for of_one in devices] == [{"meta"}, set(), {"meta"}]
    assert resolve_encoder(encoder, "cuda") is encoder
    assert next(encoder.parameters()).device.type == "cpu"


@pytest.mark.parametrize("protocol", ["linear", "knn", "finetune", "health"])
def test_every_protocol_asks_for_the_accelerator_that_is_given(saved, asked, protocol, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    module = {"linear": "probes", "knn": "probes"}.get(protocol, protocol)
    monkeypatch.setattr(f"barlow.evaluation.{module}.preprocess_of", stop)
    with pytest.raises(KeyboardInterrupt):
        barlow.evaluate(saved, "mnist5k", protocol=protocol, accelerator="cpu")
    assert asked == ["cpu"]


def test_an_accelerator_that_is_not_there_is_said_in_one_line(saved, encoder, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has the accelerator that none should have here")
    save_classifier(Classifier(encoder, ["a", "b"]), tmp_path / "model")
    for run in (
        lambda: barlow.evaluate(saved, "mnist5k", protocol="health", accelerator="cuda"),
        lambda: transfer(saved, ["mnist5k"], accelerator="cuda"),
        lambda: barlow.embed(saved, "mnist5k", accelerator="cuda"),
        lambda: predict(
            str(tmp_path / "model"), "mnist5k", str(tmp_path / "p.csv"), accelerator="cuda"
        ),
    ):
        with pytest.raises(UserError, match="cannot use accelerator 'cuda'") as error:
            run()
        assert "\n" not in str(error.value)


def test_results_of_one_machine_and_another_have_the_same_settings(saved):
    options = {"protocol": "knn", "limit": 50}
    one, other = (
        barlow.evaluate(saved, "mnist5k", **options, accelerator=a) for a in ("auto", "cpu")
    )
    assert "accelerator" not in one.settings
    assert one.settings == other.settings


def test_the_views_of_a_run_are_its_preset_and_its_own_changes(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "source: mnist5k\nviews: digits\nview1: {horizontal_flip: 0.5, blur: 1.0}\n"
    )
    assert views_of_run(tmp_path) == ("digits", {"horizontal_flip": 0.5})
    assert views_of_run(tmp_path / "nothing") == ("small", {})
