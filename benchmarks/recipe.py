"""What a recipe's encoder is worth over several seeds.

    python benchmarks/recipe.py CIFAR10 [--recipe NAME] [--seeds 0 1 2] [--untrained]

Every encoder gets the same probes: a linear classifier on the frozen representation, trained on
the 50,000 training labels (or on --labels-per-class of each class), and k-NN (k = 20) among the
same images. The 10,000 test images are used once, for the table.
CIFAR10 is `cifar10` or any other source; without it the benchmark is skipped with a message.
Trainings are kept in --out; the same command resumes one that was interrupted.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from torch import nn

import barlow
from barlow.atomic import write_text
from barlow.environment import environment
from barlow.run import Run
from step import matrix_rate

PROBES = {"linear": "{} pretraining", "knn": "{} pretraining, k = 20, t = 0.07"}


def probed(
    encoder: str | nn.Module, data: str, labels: int | None, pretrained: str = "with"
) -> dict[str, float]:
    """Top-1 on the test images by probe, from so many labels of each class (None: from all).

    It is that of the untrained network if `pretrained` is "without".
    """
    found = {}
    options = {} if labels is None else {"labels_per_class": labels}
    for protocol, name in PROBES.items():
        baseline = "random" if pretrained == "without" else None
        result = barlow.evaluate(encoder, data, data, protocol, baseline=baseline, **options)
        found[protocol] = result[name.format(pretrained)].values["val_top1"]
    return found


def ours(data: str, recipe: str, seed: int, out: Path, labels: int | None) -> dict[str, float]:
    """Train through the command line, then probe the encoder."""
    run = Run(out / f"{recipe}-seed{seed}")
    command = [sys.executable, "-m", "barlow", "pretrain", data, "--recipe", recipe]
    if subprocess.run([*command, "--seed", str(seed), "--out", str(run.path)]).returncode:
        raise SystemExit(f"stopped: the training of seed {seed} did not end well")
    last = run.metrics()[-1]
    told = {"seed": seed, "seconds": last["seconds"], "epochs": last["epoch"]}
    return told | probed(str(run.path), data, labels)


def show(name: str, rows: Sequence[dict[str, float]]) -> None:
    """Print the rows; those with zero seconds are of untrained networks."""
    print(f"\n{name:<22}{'seconds':>9}{'epochs':>8}{'linear':>9}{'k-NN':>9}")
    for row in rows:
        label = f"seed {row['seed']}" if row["seconds"] else "untrained"
        print(f"{label:<22}{row['seconds']:>9.0f}{row['epochs']:>8.2f}", end="")
        print("".join(f"{row[p]:>9.2%}" for p in PROBES))
    trained = [row for row in rows if row["seconds"]]
    if len(trained) > 1:
        for label, of in (("mean", statistics.mean), ("deviation", statistics.stdev)):
            cells = "".join(f"{of(row[p] for row in trained):>9.2%}" for p in PROBES)
            print(f"{label:<39}{cells}")


def write_result(name: str, command: str, rows: Sequence[object], **more: object) -> None:
    """Write the rows, with the command and the machine's current rate of matrix products."""
    result = {
        "date": date.today().isoformat(),
        "command": f"python benchmarks/{command}",
        "environment": environment(),
        "matrix_rate": matrix_rate(),
        **more,
        "rows": rows,
    }
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    stem = re.sub("[ -]+", "-", f"{name}-{date.today()}")
    write_text(folder / f"{stem}.json", json.dumps(result, indent=1) + "\n")


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, str]:
    """Parse the command line, with options that peers share; returns these as text, too."""
    parser.add_argument("--labels-per-class", type=int, help="of training images, for the probes")
    parser.add_argument("--out", type=Path, default=Path("runs/recipe"), help="for trainings")
    options = parser.parse_args()
    shared = f" --seeds {' '.join(map(str, options.seeds))}"
    if options.labels_per_class is not None:
        shared += f" --labels-per-class {options.labels_per_class}"
    return options, shared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", default="", help="CIFAR-10, as any source")
    parser.add_argument("--recipe", default="cifar10-10min")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--untrained", action="store_true", help="also the recipe's network as is")
    options, shared = parse(parser)
    if not options.data:
        print("skipped: give CIFAR-10: cifar10, or a folder of its Parquet files")
        return
    name, labels = options.recipe, options.labels_per_class
    rows = [ours(options.data, name, seed, options.out, labels) for seed in options.seeds]
    if options.untrained:
        run = str(options.out / f"{name}-seed{options.seeds[0]}")
        bare = {"seed": 0, "seconds": 0, "epochs": 0}
        rows.append(bare | probed(run, options.data, labels, "without"))
    show(name, rows)
    command = f"recipe.py CIFAR10 --recipe {name}{' --untrained' * options.untrained}{shared}"
    write_result(f"recipe-{name}{shared}", command, rows)


if __name__ == "__main__":
    main()
