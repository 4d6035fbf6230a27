"""Against a hub of our own, on this machine: what is asked of it, and what comes back."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from barlow.data import Preprocess
from barlow.encoders import create_encoder
from barlow.share import load_encoder, save_encoder

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, serve):
    """A folder `OWNER/NAME/FILE`, served as the hub serves models; what was asked; its address."""
    root = tmp_path / "hub"

    def answer(_, path, *__):
        parts = path.strip("/").split("?")[0].split("/")
        if parts[:2] == ["api", "models"] and (root / parts[2] / parts[3]).is_dir():
            names = sorted(p.name for p in (root / parts[2] / parts[3]).iterdir())
            return [{"type": "file", "path": n, "size": 1, "oid": n} for n in names], 200, {}
        if parts[2:3] == ["resolve"] and (root / parts[0] / parts[1] / parts[4]).exists():
            content = (root / parts[0] / parts[1] / parts[4]).read_bytes()
            return content, 200, {"ETag": f'"{parts[4]}"', "X-Repo-Commit": SHA}
        return {"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"}

    address, asked = serve(answer)
    return root, asked, address


CODE = """
import sys, torch, barlow
from barlow.errors import UserError
try:
    encoder = barlow.load_encoder(sys.argv[1])
except UserError as error:
    sys.exit(str(error))
print(encoder(torch.ones(1, 3, 32, 32)).double().sum().item(), encoder.origin)
"""


def load_from(endpoint, where, home, **more):
    """What a process says that loads from the hub at this endpoint."""
    return subprocess.run(
        [sys.executable, "-c", CODE, where],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)} | more,
    )


def small_encoder(folder):
    encoder = create_encoder("resnet18", 32, channels=[8, 16, 24, 32]).eval()
    encoder.preprocess = Preprocess(32)
    save_encoder(encoder, folder)
    return encoder(torch.ones(1, 3, 32, 32)).double().sum().item()


def test_a_timm_folder_of_the_hub_loads_also_without_a_network_afterwards(hub, tmp_path):
    root, asked, endpoint = hub
    wanted = small_encoder(root / "someone" / "model")
    (root / "someone" / "model" / "huge.bin").write_text("not wanted")
    done = load_from(endpoint, "hf://someone/model", tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == wanted
    assert not any("huge.bin" in path for path in asked)
    assert not any("harness" in path or "telemetry" in path for path in asked), asked

    asked.clear()
    again = load_from(endpoint, "hf://someone/model", tmp_path / "home", HF_HUB_OFFLINE="1")
    assert float(again.stdout) == wanted, again.stderr
    assert asked == []


def test_the_seed_project_loads_from_the_hub(hub, tmp_path, resnet18):
    root, _, endpoint = hub
    folder = root / "damerajee" / "barlow-twins-pt"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("a card")
    module = nn.Module()
    module.encoder = resnet18()
    module.projector = nn.Module()
    module.projector.fc1 = nn.Linear(512, 32, bias=False)
    torch.save({"epoch": 88, "model_state_dict": module.state_dict()}, folder / "model.pt")
    done = load_from(endpoint, "hf://damerajee/barlow-twins-pt", tmp_path / "home")
    assert done.returncode == 0, done.stderr
    wanted = load_encoder(folder / "model.pt")(torch.ones(1, 3, 32, 32)).double().sum().item()
    number, _, origin = done.stdout.partition(" ")
    assert float(number) == wanted
    assert origin.startswith(
        "hf://damerajee/barlow-twins-pt is a checkpoint of dame-cell/barlow-twins: resnet18"
    )


def test_of_several_files_one_is_asked_for_by_name(hub, tmp_path, resnet18):
    root, _, endpoint = hub
    folder = root / "someone" / "many"
    folder.mkdir(parents=True)
    for name in ("a.pth", "b.pth"):
        torch.save(resnet18().state_dict(), folder / name)
    refused = load_from(endpoint, "hf://someone/many", tmp_path / "home")
    assert "2 weights files (a.pth, b.pth): give one" in refused.stderr
    done = load_from(endpoint, "hf://someone/many@main/b.pth", tmp_path / "home")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("more", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_what_cannot_be_downloaded_is_said_in_one_line(hub, tmp_path, more):
    done = load_from(hub[2], "hf://someone/nothing", tmp_path / "home", **more)
    assert done.returncode == 1
    assert done.stderr.startswith("cannot download hf://someone/nothing: ")
    assert done.stderr.count("\n") == 1
