"""Each file is built as its project writes it, from that project's own module names."""

import argparse
import os
import sys
import types
from itertools import pairwise

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

import barlow
from barlow.errors import UserError
from barlow.share import save_encoder
from barlow.share.exporting import export
from barlow.share.loading import load_with_projector
from barlow.share.pushing import push

IMAGES = 64


class Module(nn.Module):
    """Parts by name, as a project's module has them."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def mlp(*widths, bias=False, last_bias=False):
    layers = []
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out, bias=bias), nn.BatchNorm1d(n_out), nn.ReLU()]
    layers[-3] = nn.Linear(*widths[-2:], bias=bias or last_bias)
    return nn.Sequential(*layers[:-2])


def exclude_bias_and_norm(p):
    return p.ndim == 1


def lightning(module, **more):
    return {
        "epoch": 3,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": module.state_dict(),
        "optimizer_states": [],
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(1.0)}},
        **more,
    }


def facebookresearch(resnet, folder, monkeypatch):
    module = Module(
        backbone=resnet, projector=mlp(512, 32, 32, 32), bn=nn.BatchNorm1d(32, affine=False)
    )
    # Its optimiser keeps a function of the script in the state of each group.
    monkeypatch.setattr(
        sys.modules["__main__"], "exclude_bias_and_norm", exclude_bias_and_norm, raising=False
    )
    monkeypatch.setattr(exclude_bias_and_norm, "__module__", "__main__")
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    optimizer.param_groups[0]["weight_decay_filter"] = exclude_bias_and_norm
    state = {
        "epoch": 5,
        "model": {f"module.{k}": v for k, v in module.state_dict().items()},
        "optimizer": optimizer.state_dict(),
    }
    torch.save(state, folder / "checkpoint.pth")
    return folder / "checkpoint.pth", module.projector


def seed_project(resnet, folder, _):
    projector = Module(
        fc1=nn.Linear(512, 32, bias=False),
        bn1=nn.BatchNorm1d(32),
        fc2=nn.Linear(32, 32, bias=False),
        bn2=nn.BatchNorm1d(32),
        fc3=nn.Linear(32, 32, bias=False),
    )
    module = Module(encoder=resnet, projector=projector, bn=nn.BatchNorm1d(32, affine=False))
    state = {"epoch": 88, "model_state_dict": module.state_dict(), "loss": torch.tensor(3795.0)}
    torch.save(state, folder / "model.pt")
    order = [projector.fc1, projector.bn1, nn.ReLU(), projector.fc2, projector.bn2, nn.ReLU()]
    return folder / "model.pt", nn.Sequential(*order, projector.fc3)


def solo_learn(resnet, folder, monkeypatch):
    module = Module(
        backbone=resnet, classifier=nn.Linear(512, 10), projector=mlp(512, 32, 32, 32, bias=True)
    )
    omegaconf = types.ModuleType("omegaconf")  # its settings, which need not be installed here
    omegaconf.DictConfig = type("DictConfig", (), {"__module__": "omegaconf"})
    monkeypatch.setitem(sys.modules, "omegaconf", omegaconf)
    settings = omegaconf.DictConfig()
    settings.content = {"method": "barlow_twins", "more": argparse.Namespace(lamb=0.0051)}
    torch.save(lightning(module, hyper_parameters=settings), folder / "solo.ckpt")
    return folder / "solo.ckpt", module.projector


def lightly_head():
    return Module(layers=mlp(512, 32, 32, 32, last_bias=True))


def lightly_sequential(resnet, folder, _):
    backbone = nn.Sequential(*list(resnet.children())[:-1])
    module = Module(backbone=backbone, projection_head=lightly_head())
    torch.save(lightning(module), folder / "lightly.ckpt")
    return folder / "lightly.ckpt", module.projection_head.layers


def lightly_benchmark(resnet, folder, _):
    module = Module(
        backbone=resnet,
        projection_head=lightly_head(),
        online_classifier=Module(linear=nn.Linear(512, 10)),
    )
    torch.save(lightning(module), folder / "benchmark.ckpt")
    return folder / "benchmark.ckpt", module.projection_head.layers


def stable_pretraining(resnet, folder, _):
    probe = nn.ModuleDict({"linear_probe": nn.Linear(512, 10)})
    module = Module(backbone=resnet, projector=mlp(512, 32, 32, 32), callbacks_modules=probe)
    settings = {"system.working_dir": "/tmp", "lambd": 0.1}
    torch.save(lightning(module, hyper_parameters=settings), folder / "stable.ckpt")
    return folder / "stable.ckpt", module.projector


def plain_lightning(resnet, folder, _):
    module = Module(model=Module(net=resnet), projector=mlp(512, 32, 32))
    compiled = {f"_orig_mod.{k}": v for k, v in module.state_dict().items()}
    torch.save(lightning(module) | {"state_dict": compiled}, folder / "last.ckpt")
    return folder / "last.ckpt", module.projector


@pytest.mark.parametrize(
    ("write", "project", "padding", "left_out"),
    [
        (facebookresearch, "facebookresearch/barlowtwins", None, "projector (13), bn (3)"),
        (seed_project, "dame-cell/barlow-twins", None, "projector (13), bn (3)"),
        (solo_learn, "solo-learn", None, "classifier (2), projector (16)"),
        (solo_learn, "solo-learn", 2, "classifier (2), projector (16)"),
        (lightly_sequential, "lightly", None, "projection_head (14)"),
        (lightly_benchmark, "lightly", None, "projection_head (14), online_classifier (2)"),
        (stable_pretraining, "stable-pretraining", None, "projector (13), callbacks_modules (2)"),
        (stable_pretraining, "stable-pretraining", 1, "projector (13), callbacks_modules (2)"),
        (plain_lightning, "Lightning", None, "projector (7)"),
    ],
)
@torch.no_grad()
def test_an_encoder_of_another_project_computes_what_it_did_there(
    resnet18, tmp_path, monkeypatch, write, project, padding, left_out
):
    theirs = resnet18(padding)
    path, projector = write(theirs, tmp_path, monkeypatch)
    monkeypatch.undo()  # nothing of the project is there any more
    loaded = load_with_projector(path)
    view = torch.randn(2, 3, IMAGES, IMAGES)
    assert torch.equal(loaded.encoder(view), theirs(view))
    assert f"a checkpoint of {project}: resnet18" in loaded.origin
    colours = (0.4914, 0.4822, 0.4465) if padding == 2 else (0.485, 0.456, 0.406)
    assert loaded.encoder.preprocess.mean == colours
    assert f"normalised with mean {colours}" in loaded.origin
    assert "120 of 120 weights matched" in loaded.origin
    assert f"left out: {left_out};" in loaded.origin
    assert "missing: nothing" in loaded.origin

    ours = barlow.BarlowTwins(loaded.encoder, [p.shape[0] for p in linear(loaded.projector)])
    ours.projector.load_state_dict(loaded.projector)
    y = torch.randn(8, 512)
    norm = nn.BatchNorm1d(ours.projector[-1].out_features, affine=False)
    for mode in (True, False):
        got, wanted = ours.projector.train(mode)(y), projector.train(mode)(y)
        torch.testing.assert_close(norm(got), norm(wanted), rtol=1e-4, atol=1e-4)


def linear(projector):
    return [v for v in projector.values() if v.ndim == 2]


@torch.no_grad()
def test_the_weights_of_the_original_code_load(resnet18, tmp_path):
    theirs = resnet18(name="resnet50")
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    ours = barlow.load_encoder(tmp_path / "resnet50.pth")
    assert "resnet50, 318 of 318 weights matched" in ours.origin
    view = torch.randn(1, 3, IMAGES, IMAGES)
    assert torch.equal(ours(view), theirs(view))


@pytest.mark.parametrize("name", ["resnet34", "wide_resnet50_2", "resnext50_32x4d"])
def test_the_architecture_is_told_by_the_shapes(tmp_path, name):
    theirs = torchvision.models.get_model(name).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = barlow.load_encoder(tmp_path / "weights.pth")
    theirs.fc = nn.Identity()
    view = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(view), theirs(view))


@torch.no_grad()
def test_the_small_resnets_of_lightly_load(shaken, tmp_path):
    theirs = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1])
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = theirs.fc = nn.Identity()
    layers = [theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4]
    backbone = nn.Sequential(theirs.conv1, theirs.bn1, *layers, theirs.avgpool)
    state = {
        f"backbone.{k.replace('downsample', 'shortcut')}": v
        for k, v in shaken(backbone).state_dict().items()
    }
    torch.save({"state_dict": state}, tmp_path / "cifar.ckpt")
    ours = barlow.load_encoder(tmp_path / "cifar.ckpt")
    view = torch.randn(2, 3, 32, 32)
    features = backbone(view).flatten(1)  # the ReLU behind the stem is no child, and is not there
    assert torch.equal(ours(view), features)
    assert not torch.equal(theirs.eval()(view), features)
    assert "no ReLU after it" in ours.origin

    save_encoder(ours, tmp_path / "saved")
    assert torch.equal(barlow.load_encoder(tmp_path / "saved")(view), features)
    with pytest.raises(RuntimeError, match=r"size mismatch for conv1\.weight"):
        timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True, num_classes=0)
    with pytest.raises(UserError, match="has no ReLU after its stem, which timm"):
        export(ours, "timm", str(tmp_path / "timm"))
    with pytest.raises(UserError, match="has no ReLU after its stem, which timm"):
        push(str(tmp_path / "cifar.ckpt"), "someone/model", dry_run=True)


@torch.no_grad()
def test_a_small_resnet_of_lightly_that_is_whole_has_its_relu(shaken, tmp_path):
    theirs = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1])
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = theirs.fc = nn.Identity()
    state = shaken(theirs).state_dict().items()
    whole = {f"backbone.{k.replace('downsample', 'shortcut')}": v for k, v in state}
    torch.save({"state_dict": whole}, tmp_path / "whole.ckpt")
    view = torch.randn(2, 3, 32, 32)
    assert torch.equal(barlow.load_encoder(tmp_path / "whole.ckpt")(view), theirs(view))


def test_a_resnet_that_lost_its_pooling_is_refused(tmp_path):
    theirs = torchvision.models.resnet18()
    layers = [theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4]
    backbone = nn.Sequential(theirs.conv1, theirs.bn1, *layers)
    torch.save(backbone.state_dict(), tmp_path / "cut.pth")
    with pytest.raises(UserError, match="no ReLU or no pooling after its 7x7 stem"):
        barlow.load_encoder(tmp_path / "cut.pth")


def saved(folder, parts, **more):
    """A checkpoint of modules under the given names."""
    state = {f"{name}.{k}": v for name, part in parts.items() for k, v in part.state_dict().items()}
    torch.save({"state_dict": state | more}, folder / "weights.ckpt")
    return folder / "weights.ckpt"


@pytest.mark.parametrize(
    "beside",
    [
        {"projector": nn.Linear(512, 8, bias=False), "predictor": nn.Linear(8, 8)},  # SimSiam
        {"momentum_projector": nn.Linear(512, 8, bias=False)},  # MoCo v3
    ],
)
@torch.no_grad()
def test_solo_learns_other_methods_pad_their_stem_too(resnet18, tmp_path, beside):
    theirs = resnet18(2)
    path = saved(tmp_path, {"backbone": theirs, "classifier": nn.Linear(512, 100), **beside})
    ours = barlow.load_encoder(path)
    view = torch.randn(2, 3, IMAGES, IMAGES)
    assert torch.equal(ours(view), theirs(view))
    assert ours.preprocess.std == (0.2673, 0.2564, 0.2762), "of CIFAR-100"


@torch.no_grad()
def test_a_classifier_beside_stable_pretrainings_projector_pads_nothing(resnet18, tmp_path):
    theirs = resnet18(1)
    parts = {"backbone": theirs, "projector": mlp(512, 32, 32, bias=True)}
    parts |= {"classifier": nn.Linear(512, 10), "callbacks_modules.probe": nn.Linear(512, 10)}
    ours = barlow.load_encoder(saved(tmp_path, parts))
    view = torch.randn(2, 3, IMAGES, IMAGES)
    assert torch.equal(ours(view), theirs(view))
    assert "where solo-learn's pads by two" in ours.origin


def test_the_encoder_that_is_trained_is_taken_not_the_keys(resnet18, tmp_path):
    theirs, averaged = resnet18(), resnet18(name="resnet18")
    nn.init.zeros_(averaged.bn1.weight)
    ours = barlow.load_encoder(saved(tmp_path, {"encoder_k": averaged, "encoder_q": theirs}))
    assert torch.equal(ours.bn1.weight, theirs.bn1.weight)


@torch.no_grad()
def test_pooling_behind_a_small_stem_is_told_by_the_place_of_the_layers(resnet18, tmp_path):
    theirs = resnet18(1)
    conv1, bn1, relu, _, *layers = list(theirs.children())[:-2]  # without pooling and classifier
    counted = {"f.total_ops": torch.zeros(1), "f.3.0.conv1.total_params": torch.zeros(1)}  # thop's
    sequential = nn.Sequential(conv1, bn1, relu, *layers)
    ours = barlow.load_encoder(saved(tmp_path, {"f": sequential}, **counted))
    view = torch.randn(2, 3, IMAGES, IMAGES)
    assert torch.equal(ours(view), theirs(view))
    pooled = nn.Sequential(conv1, bn1, relu, nn.MaxPool2d(2), *layers)
    with pytest.raises(UserError, match="has pooling after a 3x3 stem"):
        barlow.load_encoder(saved(tmp_path, {"f": pooled}))


def test_the_dilated_resnet_of_a_segmentation_is_not_taken(resnet18, tmp_path):
    path = saved(tmp_path, {"backbone": resnet18(), "aux_classifier.0": nn.Conv2d(8, 8, 3)})
    with pytest.raises(UserError, match="is a segmentation model"):
        barlow.load_encoder(path)


@pytest.mark.parametrize(
    "beside",
    [
        {"encoder.fc": nn.Linear(512, 512)},  # the projector reads what this makes of the features
        {"prototypes": nn.Linear(8, 8)},  # MSN's head has GELUs
    ],
)
def test_a_projector_of_another_kind_is_left_out(resnet18, tmp_path, beside):
    encoder = resnet18()
    parts = {"encoder": encoder, "projector": mlp(512, 32, 32)}
    assert load_with_projector(saved(tmp_path, parts)).projector
    assert not load_with_projector(saved(tmp_path, parts | beside)).projector


def small_vit(heads):
    model = timm.create_model(
        "vit_small_patch16_224", img_size=32, patch_size=8, depth=1, num_heads=heads, num_classes=0
    ).eval()
    nn.init.zeros_(model.pos_embed[:, 0])  # as where positions are sines and cosines
    return model


@torch.no_grad()
def test_the_heads_of_a_small_transformer_are_those_of_its_project(tmp_path):
    theirs, averaged, view = small_vit(12), small_vit(12), torch.randn(2, 3, 32, 32)
    moco = {"module.base_encoder": theirs, "module.momentum_encoder": averaged}
    solo = {"backbone": theirs, "classifier": nn.Linear(384, 10), "momentum_backbone": averaged}
    for parts in (moco, solo):
        assert torch.equal(barlow.load_encoder(saved(tmp_path, parts))(view), theirs(view))
    of_timm = small_vit(6)
    ours = barlow.load_encoder(saved(tmp_path, {"backbone.vit": of_timm}))
    assert torch.equal(ours(view), of_timm(view))
    with pytest.raises(UserError, match="small transformers have 12 heads where timm's have fewer"):
        barlow.load_encoder(saved(tmp_path, {"backbone": theirs}))


def test_a_swin_is_no_vision_transformer(tmp_path):
    swin = {
        "backbone.layers.0.blocks.0.attn.qkv": nn.Linear(8, 24),
        "backbone.norm": nn.Linear(8, 8),
    }
    with pytest.raises(UserError, match="no weights of a ResNet or vision transformer"):
        barlow.load_encoder(saved(tmp_path, swin))


@torch.no_grad()
def test_a_vision_transformer_of_timm_loads_at_its_own_image_size(tmp_path):
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=2).eval()
    state = {f"backbone.{k}": v for k, v in theirs.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "vit.ckpt")
    ours = barlow.load_encoder(tmp_path / "vit.ckpt")
    assert ours.spec.image_size == 32
    view = torch.randn(2, 3, 32, 32)
    theirs.reset_classifier(0)
    assert torch.equal(ours(view), theirs(view))


@torch.no_grad()
def test_a_vision_transformer_of_torchvision_loads(tmp_path):
    theirs = torchvision.models.VisionTransformer(32, 16, 2, 3, 192, 768).eval()
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    ours = barlow.load_encoder(tmp_path / "vit.pth")
    theirs.heads = nn.Identity()
    view = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(view), theirs(view), rtol=1e-4, atol=1e-5)


def test_weights_beside_the_encoder_with_a_name_of_its_own_do_not_get_in(resnet18, tmp_path):
    theirs = resnet18()
    state = {f"backbone.{k}": v for k, v in theirs.state_dict().items()}
    torch.save({"state_dict": {**state, "bn1.weight": torch.zeros(64)}}, tmp_path / "a.ckpt")
    ours = barlow.load_encoder(tmp_path / "a.ckpt")
    assert torch.equal(ours.bn1.weight, theirs.bn1.weight)
    del state["backbone.bn1.weight"]
    torch.save({"state_dict": {**state, "bn1.weight": torch.zeros(64)}}, tmp_path / "b.ckpt")
    with pytest.raises(UserError, match=r"lacks bn1\.weight"):
        barlow.load_encoder(tmp_path / "b.ckpt")


def test_an_averaged_copy_is_not_taken_for_the_encoder(resnet18, tmp_path):
    theirs = resnet18()
    other = {f"momentum_backbone.{k}": v + 1 for k, v in theirs.state_dict().items()}
    mine = {f"backbone.{k}": v for k, v in theirs.state_dict().items()}
    torch.save({"state_dict": other | mine}, tmp_path / "moco.ckpt")
    ours = barlow.load_encoder(tmp_path / "moco.ckpt")
    assert torch.equal(ours.conv1.weight, theirs.conv1.weight)


def test_counters_that_old_files_lack_are_said_to_be_missing(resnet18, tmp_path):
    state = {k: v for k, v in resnet18().state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "old.pth")
    assert "missing: num_batches_tracked (20)" in barlow.load_encoder(tmp_path / "old.pth").origin


def test_weights_that_do_not_fit_are_refused_with_the_reason(resnet18, tmp_path):
    state = resnet18().state_dict()
    cases = {
        "lacks layer3.1.conv2.weight": {
            k: v for k, v in state.items() if "layer3.1.conv2" not in k
        },
        "resnet18 has no layer1.0.se.fc.weight": state | {"layer1.0.se.fc.weight": torch.ones(1)},
        "layer3.0.conv2.weight' is missing": {
            k: v for k, v in state.items() if k != "layer3.0.conv2.weight"
        },
        "stem is not one 7x7": state | {"conv1.weight": torch.zeros(64, 3, 5, 5)},
        "no weights of a ResNet or vision transformer, only features (1)": {
            "features.0.weight": torch.ones(1)
        },
        "holds no weights": {"epoch": 3},
    }
    for message, weights in cases.items():
        torch.save(weights, tmp_path / "weights.pth")
        with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")):
            barlow.load_encoder(tmp_path / "weights.pth")


class Trap:
    """Unpickled in full, it leaves a folder behind."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (self.place,)


@pytest.mark.parametrize("beside", [False, True])
def test_a_file_that_would_execute_code_is_refused_and_nothing_runs(resnet18, tmp_path, beside):
    trap = tmp_path / "executed"
    notes = {"hyper_parameters": argparse.Namespace(x=Trap(str(trap)))} if beside else {}
    weights = {} if beside else {"trap": Trap(str(trap))}
    state = {"state_dict": resnet18().state_dict() | weights, **notes}
    torch.save(state, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match=r"execute code \(\w+\.mkdir\)"):
        barlow.load_encoder(tmp_path / "evil.ckpt")
    assert not trap.exists()
    torch.load(tmp_path / "evil.ckpt", weights_only=False)
    assert trap.exists(), "the trap works"


def test_names_that_stand_for_notes_do_nothing_when_they_are_called(tmp_path):
    class Called:
        def __reduce__(self):
            return argparse.Namespace, ({"a": 1},)

    torch.save({"state_dict": {}, "notes": Called()}, tmp_path / "notes.ckpt")
    with pytest.raises(UserError, match="holds no weights"):
        barlow.load_encoder(tmp_path / "notes.ckpt")
