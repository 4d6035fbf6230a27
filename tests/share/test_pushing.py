import json
import os
import re
import shlex
import subprocess
import sys
from base64 import b64decode
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image

import barlow
from barlow.cli.options import add_options, new_parser, parse
from barlow.data import Preprocess
from barlow.errors import UserError
from barlow.evaluation.result import Result, Row
from barlow.run import Run
from barlow.settings import Settings
from barlow.share import load_encoder, save_encoder
from barlow.share.card import _OMITTED
from barlow.share.pushing import push

TINY = {
    "recipe": str(Path(__file__).parents[1] / "digits.yaml"),
    "epochs": 1,
    "limit": 64,
    "validation_limit": 64,
    "batch_size": 32,
    "accelerator": "cpu",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was evaluated."""
    out = tmp_path_factory.mktemp("push") / "run"
    run = barlow.pretrain("mnist5k", out, projector=[16, 16], **TINY)
    options = {"labels_per_class": 5, "limit": 200, "cache": False}
    barlow.evaluate(str(out), "mnist5k", "mnist5k", baseline="random", **options)
    barlow.evaluate(str(out), "mnist5k", "mnist5k", protocol="knn", **options)
    return run


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where temporary folders go."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def test_a_dry_run_writes_a_complete_card_and_a_folder_that_timm_loads(run, scratch):
    done = push(str(run.path), "someone/digits", dry_run=True)
    folder = Path(done.place)
    assert folder.parent == scratch
    assert list(done.files) == ["README.md", "config.json", "model.safetensors"]
    card = (folder / "README.md").read_text()
    assert card == done.card

    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "mit"
    assert head["library_name"] == "timm"
    titles = re.findall("^##? (.*)$", card, re.MULTILINE)
    assert titles == ["digits", "Use", "Data", "Training", "Results", "Licence"]
    assert "`mnist5k`, the first 64 images." in card
    assert "| lambd | 0.01 |" in card
    assert "| seed | 0 |" in card
    assert re.search(r"\| without pretraining \|.*%", card)
    assert re.search(r"\| with pretraining, k = 20, t = 0.07 \|.*%", card)

    images = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    mine = run.encoder()
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        view = mine.preprocess(images)
        assert torch.equal(theirs(view), mine(view))


@torch.no_grad()
def test_the_code_on_the_card_of_several_maps_computes_the_representation(tmp_path, scratch):
    torch.manual_seed(0)
    small = {"channels": [8, 16, 24, 24], "layers": [1, 1, 1, 0], "stem": "strided"}
    encoder = barlow.create_encoder("resnet18", 32, pool=2, stages=2, **small).eval()
    encoder.preprocess = Preprocess(32)
    save_encoder(encoder, tmp_path / "encoder")
    done = push(str(tmp_path / "encoder"), "someone/maps", dry_run=True)
    image = Image.fromarray(torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy())
    code = done.card.split("```python\n")[1].split("```")[0]
    names = {"image": image}
    exec(code.replace("hf-hub:someone/maps", f"local-dir:{done.place}"), names)
    expected = encoder(encoder.preprocess(image)[None])
    torch.testing.assert_close(names["features"], expected)


@pytest.fixture
def card_of(run, tmp_path, scratch):
    """`card_of(results, **settings)`: the card of such a run, with the encoder of `run`."""

    def card(*results, **settings):
        other = Run(tmp_path / "other")
        (other.path / "evaluation").mkdir(parents=True)
        for i, result in enumerate(results):
            result.save(other.path / "evaluation" / f"{i}.json")
        (other.path / "encoder").symlink_to(run.path / "encoder")
        settings = run.settings().to_dict() | settings
        other.config_file.write_text(yaml.safe_dump(settings))
        return push(str(other.path), "someone/model", dry_run=True).card

    return card


def test_the_command_on_the_card_makes_the_same_settings(run, card_of):
    settings = {"view1": {"blur": 0.5}, "sync_batch_norm": False, "init": "/home/me/runs/first"}
    card = card_of(track=["wandb", "tensorboard"], workers=1, **settings)
    line = card.split("## Training\n```\n")[1].split("\n")[0]
    parser = new_parser("pretrain", "")
    parser.add_argument("--out")
    add_options(parser, Settings)
    parsed = parse(parser, shlex.split(line)[2:])
    for name, value in (run.settings().to_dict() | settings | {"init": "runs/first"}).items():
        assert name in _OMITTED or parsed[name] == value, name
    assert "wandb" not in card


def test_of_places_on_this_machine_only_the_last_two_parts_are_told(card_of):
    cats, dogs = "/home/me/secret/photos/cats", "~/secret/photos/dogs::train"
    rows = [Row(f"{source}, with pretraining", {"val_top1": 0.5}) for source in (cats, dogs, "x")]
    data = {"name": cats, "images": 9, "fingerprint": ""}
    labels = {"labels": "/home/me/secret/lists/train.csv", "test_labels": "test.csv", "seed": 0}
    card = card_of(
        Result("transfer", tuple(rows), {"sources": [cats, dogs, "x"]}, {cats: {"train": data}}),
        Result("linear", (Row("with pretraining", {}),), labels, {"train": data, "test": data}),
        source=cats,
        init="/home/me/secret/runs/first",
        validation="/home/me/secret/photos/held-out",
    )
    assert "secret" not in card
    assert "`photos/cats`" in card
    assert "started from `runs/first`" in card
    assert "| photos/cats, with pretraining | 50.00% |" in card
    assert "| photos/dogs::train, with pretraining | 50.00% |" in card
    assert "\nsources photos/cats, photos/dogs::train, x.\n" in card
    assert "labels lists/train.csv, test_labels test.csv, seed 0.\n" in card


def test_a_source_of_the_hub_is_in_the_cards_head(card_of):
    card = card_of(source="hf://someone/images::train")
    assert yaml.safe_load(card.split("---\n")[1])["datasets"] == ["someone/images"]
    assert "Not evaluated yet." in card


def test_the_card_of_half_the_bytes_says_so_beside_the_same_numbers(run, scratch):
    whole = push(str(run.path), "someone/digits", dry_run=True)
    half = push(str(run.path), "someone/digits", dry_run=True, half=True)
    words = " (matrices and filters rounded to float16; loading converts them to float32)"
    assert half.card == whole.card.replace(" million parameters", f" million parameters{words}")
    assert half.files["model.safetensors"] < 0.65 * whole.files["model.safetensors"]


def test_an_encoder_of_another_project_says_where_it_is_from(resnet18, tmp_path, scratch):
    torch.save(
        {
            "model": {f"backbone.{k}": v for k, v in resnet18().state_dict().items()}
            | {"projector.0.weight": torch.zeros(1, 1)}
        },
        tmp_path / "checkpoint.pth",
    )
    card = push(str(tmp_path / "checkpoint.pth"), "someone/original", dry_run=True).card
    assert "is a checkpoint of facebookresearch/barlowtwins: resnet18" in card
    assert "trained with" not in card
    assert str(tmp_path) not in card


def test_a_name_that_cannot_be_is_refused(run):
    with pytest.raises(UserError, match="give OWNER/NAME"):
        push(str(run.path), "digits", dry_run=True)


@pytest.fixture
def hub(serve):
    """A hub that takes commits: what it was asked, the files it was sent, its address."""
    files = {}

    def answer(_, path, headers, body):
        if not headers.get("Authorization"):
            return {"error": "Invalid username or password."}, 401, {}
        if "/preupload/" in path:
            wanted = [file["path"] for file in json.loads(body)["files"]]
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            return {"files": [{"path": name, **mode} for name in wanted]}, 200, {}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = b64decode(line["value"]["content"])
        url = f"http://{headers['Host']}/someone/digits"
        answered = {"id": "someone/digits", "sha": "0", "siblings": [], "url": url}
        return answered | {"commitUrl": f"{url}/commit/0", "commitOid": "0"}, 200, {}

    address, asked = serve(answer)
    return asked, files, address


def pushed(run, address, home, **more):
    command = [sys.executable, "-m", "barlow", "push", str(run.path), "someone/digits"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": address, "HF_HOME": str(home)} | more
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)


def test_what_arrives_at_the_hub_loads_and_nobody_is_told_anything_else(run, hub, tmp_path):
    asked, files, address = hub
    done = pushed(run, address, tmp_path / "home", HF_TOKEN="hf_test")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{address}/someone/digits\n")
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    assert not any("harness" in path or "telemetry" in path for path in asked), asked
    arrived = tmp_path / "arrived"
    arrived.mkdir()
    for name, content in files.items():
        (arrived / name).write_bytes(content)
    again, mine = load_encoder(arrived).state_dict(), run.encoder().state_dict()
    assert all(torch.equal(again[name], value) for name, value in mine.items())


def test_a_refusal_of_the_hub_is_one_line_that_says_how_to_log_in(run, hub, tmp_path):
    done = pushed(run, hub[2], tmp_path / "home")
    assert done.returncode == 2
    assert done.stderr.startswith("barlow: cannot push to someone/digits: ")
    assert "hf auth login" in done.stderr
    assert done.stderr.count("\n") == 1
