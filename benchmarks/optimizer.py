"""One step of Muon here and in timm, whose matrix products are in bfloat16.

    python benchmarks/optimizer.py [--repeats 15]

The weights are those of the encoder and projector of a shipped recipe.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from copy import deepcopy
from datetime import date
from pathlib import Path

import torch
from timm.optim.muon import Muon as TimmsMuon

from barlow.assembly import build_model
from barlow.muon import Muon
from barlow.settings import Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    model, _ = build_model(Settings.of("cifar10", recipe="cifar10-cpu"))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    theirs = deepcopy(model)
    for mine, other in zip(model.parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None
        other.grad = mine.grad.clone()
    optimizers = {
        "this package": Muon(model.parameters()),
        "timm": TimmsMuon(theirs.parameters(), nesterov=True, ns_coefficients="original"),
    }
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for optimizer in optimizers.values():
        optimizer.step()
    for _ in range(options.repeats):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    ours = seconds["this package"]
    print(f"{'Muon of':<14}{'ms a step':>10}{'ours is':>10}")
    for name, value in seconds.items():
        print(f"{name:<14}{value * 1e3:>10.1f}{value / ours:>9.1f}x")
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "seconds": seconds,
    }
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"optimizer-{date.today()}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
