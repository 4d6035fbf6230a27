import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]

# In a process of its own, where the package is not installed: -I ignores PYTHONPATH.
CODE = """
import runpy, sys, torch
sys.path = [p for p in sys.path if not p.endswith("/src")]
encoder = torch.hub.load(sys.argv[1], "load_encoder", sys.argv[2], source="local")
listed = runpy.run_path(sys.argv[1] + "/hubconf.py")
print(*(name for name, value in listed.items() if callable(value) and name[0] != "_"))
print(sys.modules["barlow"].__file__)
print(encoder(torch.ones(1, 3, 32, 32)).double().sum().item())
"""


def test_torch_hub_loads_an_encoder_from_the_repository(resnet18, tmp_path):
    theirs = resnet18()
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    done = subprocess.run(
        [sys.executable, "-I", "-c", CODE, str(REPOSITORY), str(tmp_path / "resnet18.pth")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *entries, place, number = done.stdout.split()
    assert entries == ["create_encoder", "load_encoder"]
    assert Path(place).is_relative_to(REPOSITORY)
    with torch.no_grad():
        expected = theirs(torch.ones(1, 3, 32, 32)).double().sum().item()
    # Two processes may lay their memory out, and so round, differently.
    assert float(number) == pytest.approx(expected, rel=1e-6)
