"""The picture of docs/recipe.md: accuracy against operations, ours beside published figures.

python docs/recipe_picture.py benchmarks/results/recipe-cifar10-10min-*.json docs/pictures
"""

import json
import statistics
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


def operations(recipe: str, epochs: float) -> float:
    """Count the floating-point operations of a recipe's training on 50,000 images."""
    settings = Settings.of("cifar10", recipe=recipe)
    model, _ = build_model(settings)
    views = torch.randn(2, 8, 3, settings.image_size, settings.image_size)
    with FlopCounterMode(display=False) as counter:
        model(*views).backward()
    return counter.get_total_flops() / views.shape[1] * 50_000 * epochs


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
    for path in results:
        rows = [row for row in json.loads(path.read_text())["rows"] if row["seconds"]]
        recipe = path.stem.removeprefix("recipe-")[: -len("-2026-01-01")]
        x = operations(recipe, statistics.mean(row["epochs"] for row in rows))
        y = 100 * statistics.mean(row["linear"] for row in rows)
        axes.plot(x, y, "s", color="#cc3e2e")
        axes.annotate(
            f"{recipe}: {y:.1f} %",
            (x, y),
            (6, -4),
            va="top",
            textcoords="offset points",
            fontsize=8,
        )
        print(f"{recipe}: {x:.2g} operations, {y:.2f} %")
    axes.set(xscale="log", xlim=(1e13, 3e19), ylim=(65, 95))
    axes.set(xlabel="operations of pretraining", ylabel="CIFAR-10 test top-1, %")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "recipe.png")


if __name__ == "__main__":
    *results, folder = map(Path, sys.argv[1:])
    draw(results, folder)
