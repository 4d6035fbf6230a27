import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

import barlow
from barlow.data import Preprocess
from barlow.errors import UserError
from barlow.evaluation.classifier import Classifier, load_classifier, save_classifier
from barlow.share import exporting, load_encoder
from barlow.share.exporting import export

NARROW = {"channels": [8, 16, 24, 32]}


@pytest.fixture
def encoder(shaken):
    """A narrow ResNet for images of 32 pixels, with statistics that are not ImageNet's."""
    torch.manual_seed(0)
    encoder = shaken(barlow.create_encoder("resnet18", 32, **NARROW))
    encoder.preprocess = Preprocess(32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    return encoder


def bytes_in(path):
    return sum(f.stat().st_size for f in [path, *path.rglob("*")] if f.is_file())


def pictures(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator())


def test_a_run_goes_to_timm_and_back_bit_for_bit(tmp_path):
    tiny = {
        "recipe": str(Path(__file__).parents[1] / "digits.yaml"),
        "epochs": 1,
        "limit": 64,
        "batch_size": 32,
        "projector": [16],
    }
    run = barlow.pretrain("mnist5k", tmp_path / "run", accelerator="cpu", **tiny)
    done = export(run.path, "timm", str(tmp_path / "timm"))
    assert done.path == tmp_path / "timm"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "timm"], "nothing else is left"
    images = pictures(4, 1, 28, 28)
    mine, again = load_encoder(run.path), load_encoder(tmp_path / "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=0)
    with torch.no_grad():
        wanted = mine(mine.preprocess(images))
        assert torch.equal(again(again.preprocess(images)), wanted)
        assert torch.equal(theirs.eval()(mine.preprocess(images)), wanted)


@torch.no_grad()
def test_safetensors_come_back_bit_for_bit(encoder, tmp_path):
    export(encoder, "safetensors", str(tmp_path / "e.safetensors"))
    again = load_encoder(tmp_path / "e.safetensors")
    images = pictures(2, 3, 40, 50)
    assert torch.equal(again(again.preprocess(images)), encoder(encoder.preprocess(images)))


@pytest.mark.parametrize(("format", "out"), [("timm", "e"), ("safetensors", "e.safetensors")])
@torch.no_grad()
def test_half_the_bytes_come_back_as_float32_and_nearly_the_same(encoder, tmp_path, format, out):
    full, half = tmp_path / f"full-{out}", tmp_path / out
    export(encoder, format, str(full))
    export(encoder, format, str(half), half=True)
    assert bytes_in(half) < 0.65 * bytes_in(full)
    again = load_encoder(half)
    assert {p.dtype for p in [*again.parameters(), *encoder.parameters()]} == {torch.float32}
    assert torch.equal(again.bn1.running_mean, encoder.bn1.running_mean)
    images = pictures(2, 3, 40, 50)
    features, wanted = again(again.preprocess(images)), encoder(encoder.preprocess(images))
    assert not torch.equal(features, wanted)
    torch.testing.assert_close(features, wanted, rtol=0, atol=2e-3 * float(wanted.abs().max()))


@torch.no_grad()
def test_plain_timm_makes_float32_of_half_the_bytes(encoder, tmp_path):
    export(encoder, "timm", str(tmp_path / "half"), half=True)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'half'}", pretrained=True, num_classes=0)
    again, state = load_encoder(tmp_path / "half"), theirs.eval().state_dict()
    assert {p.dtype for p in theirs.parameters()} == {torch.float32}
    for name, value in again.state_dict().items():
        assert name == "conv1.weight" or torch.equal(state[name], value), name
    view = again.preprocess(pictures(2, 3, 40, 50))
    enlarged = view.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(theirs(enlarged), again(view), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "image_size", "theirs"),
    [
        ("resnet18", 224, lambda: torchvision.models.resnet18()),
        (
            "vit_tiny_patch16_224",
            32,
            lambda: torchvision.models.VisionTransformer(32, 16, 12, 3, 192, 768),
        ),
    ],
)
@torch.no_grad()
def test_safetensors_have_torchvisions_names(tmp_path, name, image_size, theirs):
    encoder = barlow.create_encoder(name, image_size).eval()
    encoder.preprocess = Preprocess(image_size)
    export(encoder, "safetensors", str(tmp_path / "e.safetensors"))
    model = theirs()
    model.fc = model.heads = nn.Identity()
    model.load_state_dict(load_file(tmp_path / "e.safetensors"))
    view = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(view), encoder(view), rtol=1e-4, atol=1e-5)
    assert torch.equal(load_encoder(tmp_path / "e.safetensors")(view), encoder(view))


def onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["features"], {"images": images.numpy()})[0]


def torch_export(path):
    return lambda images: torch.export.load(path).module()(images).detach().numpy()


@pytest.mark.parametrize(
    ("format", "file", "load"), [("onnx", "e.onnx", onnx), ("torch-export", "e.pt2", torch_export)]
)
@pytest.mark.parametrize("preprocess", [False, True])
@torch.no_grad()
def test_a_graph_computes_the_same_for_every_batch_size(
    encoder, tmp_path, format, file, load, preprocess
):
    done = export(encoder, format, str(tmp_path / file), preprocess=preprocess)
    assert done.difference is not None
    assert done.difference < 1e-4
    run = load(tmp_path / file)
    for images in (pictures(1, 3, 32, 32), pictures(5, 3, 61, 40)):
        prepared = encoder.preprocess.prepare(images)
        features = run(images if preprocess else prepared)
        np.testing.assert_allclose(features, encoder(prepared).numpy(), atol=1e-4)


@pytest.fixture
def model(encoder, tmp_path):
    """Where a classifier of three classes is."""
    save_classifier(Classifier(encoder, ["good", "scratch", "dent"]), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("preprocess", [False, True])
@torch.no_grad()
def test_a_classifier_gives_scores_to_onnx(model, tmp_path, preprocess):
    import onnxruntime

    export(str(model), "onnx", str(tmp_path / "prod.onnx"), preprocess=preprocess)
    session = onnxruntime.InferenceSession(tmp_path / "prod.onnx")
    images, classifier = pictures(5, 3, 61, 40), load_classifier(model)
    prepared = classifier.preprocess.prepare(images)
    given = images if preprocess else prepared
    (scores,) = session.run(["scores"], {"images": given.numpy()})
    np.testing.assert_allclose(scores, classifier(prepared).numpy(), atol=1e-4)
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["barlow"])
    assert metadata["classes"] == ["good", "scratch", "dent"]
    assert metadata["encoder"]["name"] == "resnet18"


@torch.no_grad()
def test_a_classifier_gives_scores_to_torch_export(model, tmp_path):
    export(load_classifier(model), "torch-export", str(tmp_path / "prod.pt2"), preprocess=True)
    metadata = {"barlow": ""}
    program = torch.export.load(tmp_path / "prod.pt2", extra_files=metadata)
    images, classifier = pictures(5, 3, 61, 40), load_classifier(model)
    wanted = classifier(classifier.preprocess.prepare(images))
    torch.testing.assert_close(program.module()(images), wanted, rtol=0, atol=1e-4)
    assert json.loads(metadata["barlow"])["classes"] == ["good", "scratch", "dent"]


@pytest.mark.parametrize(("format", "out"), [("timm", "e"), ("safetensors", "e.safetensors")])
def test_a_classifier_is_not_cut_down_to_its_encoder_in_silence(model, tmp_path, format, out):
    with pytest.raises(UserError, match=r"this is a classifier: give .*model/encoder, or export"):
        export(str(model), format, str(tmp_path / out))
    assert not (tmp_path / out).exists()
    export(f"{model}/encoder", format, str(tmp_path / out))


def test_a_graph_that_computes_something_else_is_not_written(encoder, tmp_path, monkeypatch):
    right = exporting._traceable

    def wrong(encoder, preprocess):
        graph, images, shapes = right(encoder, preprocess)
        return nn.Sequential(graph, nn.Hardtanh(-0.01, 0.01)), images, shapes

    monkeypatch.setattr(exporting, "_traceable", wrong)
    with pytest.raises(RuntimeError, match="differs from PyTorch by"):
        export(encoder, "torch-export", str(tmp_path / "e.pt2"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("format", "name", "options", "message"),
    [
        ("timm", "there", {}, "already exists"),
        ("keras", "e", {}, "unknown format 'keras': use one of timm, safetensors"),
        ("onnx", "e.pb", {}, "name it e.onnx"),
        ("safetensors", "e.safetensors", {"preprocess": True}, "--preprocess works only with onnx"),
        ("torch-export", "e.pt2", {"half": True}, "--half works only with timm and safetensors"),
    ],
)
def test_a_mistake_writes_nothing(encoder, tmp_path, format, name, options, message):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match=message):
        export(encoder, format, str(tmp_path / name), **options)
    assert [p.name for p in tmp_path.rglob("*")] == ["there"]


def test_a_missing_package_is_named_with_what_installs_it(encoder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install onnx"):
        export(encoder, "onnx", str(tmp_path / "e.onnx"))
