"""Short trainings of variants of a recipe, compared: how the settings of a recipe are chosen.

    python benchmarks/variants.py CIFAR10 --recipe cifar10-10min --minutes 2.5 \\
        --variants "" "--weight-decay 0.1" "--batch-size 64 --lr 0.03"

A variant is the options of `barlow pretrain` in which it differs from the recipe, as one argument.
The last 5,000 training images are left out of the trainings, and every encoder is scored on them:
by ridge regression on the classes of 20,000 others, with the best of a few penalties, and by k-NN
(k = 20) among the same. So the scores are for choosing and not for quoting; test images are not
read. A training by the clock depends on what else the machine does: run one alone. An option
without a value needs a space in front, as in " --compile".
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import barlow
from barlow.data import open_source
from barlow.evaluation.features import extract
from barlow.evaluation.knn import knn_scores
from barlow.evaluation.linear import standardisation
from barlow.run import Run
from recipe import write_result

HELD_OUT, FITTED = 5_000, 20_000
PENALTIES = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # times the mean of the Gram matrix's diagonal


def top1(scores: Tensor, y: Tensor) -> float:
    return (scores.argmax(1) == y).float().mean().item()


def ridge(x: Tensor, y: Tensor, x_held_out: Tensor, y_held_out: Tensor) -> float:
    """The best top-1 on held-out images over the penalties."""
    standardise = standardisation(x)
    x, x_held_out = standardise(x), standardise(x_held_out)
    classes = F.one_hot(y).float()
    shares = classes.mean(0)
    gram, right = (x.T @ x).double(), (x.T @ (classes - shares)).double()
    found = []
    for penalty in PENALTIES:
        regularised = gram + penalty * gram.diagonal().mean() * torch.eye(len(gram))
        factor = torch.linalg.cholesky(regularised)
        weight = torch.cholesky_solve(right, factor).float()
        found.append(top1(x_held_out @ weight + shares, y_held_out))
    return max(found)


def scored(folder: Path, data: str) -> dict[str, float]:
    """Ridge regression and k-NN on the images that the training left out."""
    encoder, images = barlow.load_encoder(folder), open_source(data, "train")
    first = len(images) - HELD_OUT
    parts = images.part(range(FITTED)), images.part(range(first, len(images)))
    (x, rows), (x_held_out, rows_held_out) = (extract(encoder, part) for part in parts)
    y, y_held_out = parts[0].labels[rows], parts[1].labels[rows_held_out]
    votes = knn_scores(x_held_out, x, y, (20,), (0.07,), int(y.max()) + 1)[20, 0.07]
    found = {"ridge": ridge(x, y, x_held_out, y_held_out), "knn": top1(votes, y_held_out)}
    return found | {"features": x.shape[1]}


def row(variant: str, options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Train a variant and score its encoder."""
    number = len(open_source(options.data, "train")) - HELD_OUT
    command = [sys.executable, "-m", "barlow", "pretrain", options.data, "--out", str(folder)]
    command += ["--recipe", options.recipe, "--limit", str(number), "--seed", str(options.seed)]
    command += ["--validation", f"{options.data}::train", "--minutes", f"{options.minutes:g}"]
    if subprocess.run(command + shlex.split(variant)).returncode:
        raise SystemExit(f"stopped: the training of {variant!r} did not end well")
    last = Run(folder).metrics()[-1]
    told = {"variant": variant, "seconds": last["seconds"], "images": last["epoch"] * number}
    return told | scored(folder, options.data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", default="", help="CIFAR-10, as any source")
    parser.add_argument("--recipe", default="cifar10-10min")
    parser.add_argument("--minutes", type=float, default=2.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", default=[""], help="each: options of pretrain")
    options = parser.parse_args()
    if not options.data:
        print("skipped: give CIFAR-10: cifar10, or a folder of its Parquet files")
        return
    print(f"{options.recipe}, {options.minutes:g} minutes, seed {options.seed}")
    print(f"{'variant':<48}{'images':>9}{'features':>10}{'ridge':>8}{'k-NN':>8}", flush=True)
    rows = []
    for variant in options.variants:
        with tempfile.TemporaryDirectory() as folder:
            found = row(variant, options, Path(folder) / "run")
        rows.append(found)
        print(f"{variant or 'as it is':<48}{found['images']:>9,.0f}", end="")
        print(f"{found['features']:>10,}{found['ridge']:>8.1%}{found['knn']:>8.1%}", flush=True)
    shared = f"--recipe {options.recipe} --minutes {options.minutes:g} --seed {options.seed}"
    command = f"variants.py CIFAR10 {shared} --variants {shlex.join(options.variants)}"
    write_result(f"variants-{options.recipe}-{options.minutes:g}min", command, rows)


if __name__ == "__main__":
    main()
