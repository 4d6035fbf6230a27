"""The picture of docs/recipe.md: accuracy against operations, ours beside published figures.

python docs/recipe_picture.py benchmarks/results/recipe-*.json docs/pictures
"""

import json
import re
import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt
from torch.utils.flop_counter import FlopCounterMode

from barlow.assembly import build_model
from barlow.settings import Settings

matplotlib.use("Agg")

# Operations of pretraining, counted as 6 per multiply-add of a view's forward pass (for forward and
# backward), and CIFAR-10 top-1 as the authors state it, of a linear probe unless noted.
PUBLISHED = {
    "4,000 k-means features\n(Coates et al. 2011)": (4e13, 79.6),
    "EMP-SSL, 1 epoch": (5e15, 84.2),
    "EMP-SSL, 10 epochs": (3.5e16, 90.7),
    "ResNet-50, 50 epochs\n(Barlow-Twins-HSIC)": (3.9e16, 78.5),
    "lightly, 200 epochs (k-NN)": (6.7e16, 84.2),
    "solo-learn, 1,000 epochs": (4.3e17, 92.1),
    "Mixed Barlow Twins, 2,000 epochs": (1e18, 92.6),
}


def operations_per_epoch(recipe: str) -> float:
    """Count the floating-point operations of a recipe's training on 50,000 images."""
    settings = Settings.of("cifar10", recipe=recipe)
    model, _ = build_model(settings)
    views = torch.randn(2, 8, 3, settings.image_size, settings.image_size)
    with FlopCounterMode(display=False) as counter:
        model(*views).backward()
    return counter.get_total_flops() / views.shape[1] * 50_000


def ours(results: list[Path]) -> dict[str, list[tuple[float, float]]]:
    """Operations and top-1 in % of every training in the results, by recipe."""
    points: dict[str, list[tuple[float, float]]] = {}
    for result in map(json.loads, map(Path.read_text, results)):
        if "--labels-per-class" in result["command"]:  # not the probe of the published figures
            continue
        recipe = re.search(r"--recipe (\S+)", result["command"])[1]
        trained = [row for row in result["rows"] if row["seconds"]]
        per_epoch = operations_per_epoch(recipe)
        found = [(per_epoch * row["epochs"], 100 * row["linear"]) for row in trained]
        points.setdefault(recipe, []).extend(found)
    return points


def draw(results: list[Path], out: Path) -> None:
    """Write `recipe.png`."""
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    for label, (x, y) in PUBLISHED.items():
        axes.plot(x, y, "o", color="0.6")
        place = {"textcoords": "offset points", "fontsize": 7}
        if y > 92.5 or x < 1e14:  # the label goes above the point, clear of its neighbour
            axes.annotate(label, (x, y), (-20, 7), **place)
        else:
            axes.annotate(label, (x, y), (6, -4), va="top", **place)
    for recipe, points in ours(results).items():
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, "s", color="#cc3e2e", markersize=4)
        between = " to ".join(dict.fromkeys(f"{of(y):.1f}" for of in (min, max)))
        label = f"{recipe}: {between} %"
        place = {"textcoords": "offset points", "fontsize": 8}
        axes.annotate(label, (x[-1], y[-1]), (6, -4), va="top", **place)
        print(label, *(f"{value:.2g}" for value in x), "operations")
    axes.set(xscale="log", xlim=(1e13, 3e19), ylim=(65, 95))
    axes.set(xlabel="operations of pretraining", ylabel="CIFAR-10 test top-1, %")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "recipe.png")


if __name__ == "__main__":
    *results, folder = map(Path, sys.argv[1:])
    draw(results, folder)
