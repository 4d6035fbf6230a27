"""What a recipe's encoder is worth over several seeds, and what peers reach in the same time.

    python benchmarks/recipe.py CIFAR10_FOLDER [--recipe NAME] [--seeds 0 1 2] [--untrained]
    python benchmarks/recipe.py CIFAR10_FOLDER --peer lightly --minutes 10
    python benchmarks/recipe.py CIFAR10_FOLDER --peer seed --minutes 10 --batch-size 32

Every encoder gets the same probes: a linear classifier on the frozen representation, trained on
the 50,000 training labels, and k-NN (k = 20); the 10,000 test images are read once, for the table.
The folder holds CIFAR-10 as Parquet files; without it the benchmark is skipped with a message.
Trainings are kept in --out: one that was interrupted goes on with the same command.

Peers, from random weights, with their own views on PIL images in two worker processes, their
learning rate annealed within the time: lightly's CIFAR-10 Barlow Twins (ResNet-18, projector 2048,
SGD 0.06 a 128 images, decay 5e-4), and this project's seed (timm's ResNet-50 at 224 pixels,
projector 8192 three times, the correlation divided by 228, LARS at the paper's rates).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import barlow
from barlow.checkpoint import write_text
from barlow.data import Preprocess, open_source
from barlow.environment import environment
from barlow.model import create_projector
from barlow.optim import LARS, parameter_groups, warmup_cosine
from barlow.run import Run

PROBES = {"linear": "{} pretraining", "knn": "{} pretraining, k = 20, t = 0.07"}


def probed(encoder: str | nn.Module, data: str, pretrained: str = "with") -> dict[str, float]:
    """Top-1 of the test images, by probe; "without" pretraining: of the same network untrained."""
    found = {}
    for protocol, name in PROBES.items():
        baseline = "random" if pretrained == "without" else None
        result = barlow.evaluate(encoder, data, data, protocol=protocol, baseline=baseline)
        found[protocol] = result[name.format(pretrained)].values["val_top1"]
    return found


def ours(data: str, recipe: str, seed: int, out: Path) -> dict[str, float]:
    """A training by the command line, and its probes."""
    run = Run(out / f"{recipe}-seed{seed}")
    command = [sys.executable, "-m", "barlow", "pretrain", data, "--recipe", recipe]
    subprocess.run([*command, "--seed", str(seed), "--out", str(run.path)], check=True)
    last = run.metrics()[-1]
    told = {"seed": seed, "seconds": last["seconds"], "epochs": last["epoch"]}
    return told | probed(str(run.path), data)


class Pictures(Dataset):
    """Two views of each image of a source, as a peer draws them."""

    def __init__(self, data: str, views) -> None:
        self.source, self.views = open_source(data, "train"), views

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from torchvision.transforms.v2.functional import to_pil_image

        view1, view2 = self.views(to_pil_image(self.source[index]))
        return view1, view2


def lightly_parts(batch_size: int):
    """Encoder, projector, loss, optimiser and views of lightly's CIFAR-10 example."""
    import lightly.loss
    import lightly.transforms as transforms
    from lightly.models.modules.heads import BarlowTwinsProjectionHead

    encoder = barlow.create_encoder("resnet18", image_size=32)
    head = BarlowTwinsProjectionHead(512, 2048, 2048)
    parameters = [*encoder.parameters(), *head.parameters()]
    rate = 0.06 * batch_size / 128
    optimizer = torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=5e-4)
    views = transforms.BYOLTransform(
        transforms.BYOLView1Transform(input_size=32, gaussian_blur=0.0),
        transforms.BYOLView2Transform(input_size=32, gaussian_blur=0.0),
    )
    return encoder, head, lightly.loss.BarlowTwinsLoss(), optimizer, views, Preprocess(32)


def seed_loss(z1: Tensor, z2: Tensor) -> Tensor:
    """The seed project's: Algorithm 1, but for a correlation divided by 228 whatever the batch."""
    z1, z2 = (nn.functional.batch_norm(z, None, None, training=True) for z in (z1, z2))
    c = z1.T @ z2 / 228
    on = (torch.diagonal(c) - 1).square().sum()
    return on + 0.0051 * (c.square().sum() - torch.diagonal(c).square().sum())


def seed_parts(batch_size: int):
    """Encoder, projector, loss, optimiser and views of the project this one began as."""
    import lightly.transforms as transforms

    encoder = barlow.create_encoder("resnet50", image_size=224)
    head = create_projector(2048, (8192, 8192, 8192))
    model = nn.ModuleList([encoder, head])
    scale = batch_size / 256
    groups = parameter_groups(
        model, lr=0.2 * scale, lr_bias_norm=0.0048 * scale, weight_decay=1.5e-6
    )
    views = transforms.BYOLTransform(
        transforms.BYOLView1Transform(input_size=224), transforms.BYOLView2Transform(input_size=224)
    )
    return encoder, head, seed_loss, LARS(groups, 0.2), views, Preprocess(224)


PEERS = {"lightly": lightly_parts, "seed": seed_parts}


def peer(name: str, data: str, minutes: float, batch_size: int) -> dict[str, float]:
    """A peer's training for so long by the clock, and our probes of its encoder."""
    torch.manual_seed(0)
    encoder, head, loss_of, optimizer, views, preprocess = PEERS[name](batch_size)
    pictures = Pictures(data, views)
    loader = DataLoader(pictures, batch_size, shuffle=True, drop_last=True, num_workers=2)
    rates = [group["lr"] for group in optimizer.param_groups]
    start, total, steps = time.monotonic(), 60 * minutes, 0
    encoder.train()
    while (at := time.monotonic() - start) < total:
        for view1, view2 in loader:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * warmup_cosine(at, steps=total, warmup=total / 10)
            loss = loss_of(head(encoder(view1)), head(encoder(view2)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            if (at := time.monotonic() - start) >= total:
                break
    encoder.eval()
    encoder.preprocess = preprocess
    told = {"seconds": at, "epochs": steps * batch_size / len(pictures)}
    return told | probed(encoder, data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", default="", help="CIFAR-10 as Parquet files")
    parser.add_argument("--recipe", default="cifar10-10min")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--untrained", action="store_true", help="also the recipe's network as is")
    parser.add_argument("--peer", choices=list(PEERS))
    parser.add_argument("--minutes", type=float, default=10, help="of a peer")
    parser.add_argument("--batch-size", type=int, default=128, help="of a peer")
    parser.add_argument("--out", type=Path, default=Path("runs/recipe"), help="for trainings")
    options = parser.parse_args()
    if not options.data or not Path(options.data).is_dir():
        print("skipped: give a folder with CIFAR-10 as Parquet files")
        return
    if options.peer:
        name = f"{options.peer}-{options.minutes:.0f}min"
        rows = [peer(options.peer, options.data, options.minutes, options.batch_size)]
    else:
        name = options.recipe
        rows = [ours(options.data, name, seed, options.out) for seed in options.seeds]
    print(f"\n{name:<22}{'seconds':>9}{'epochs':>8}{'linear':>9}{'k-NN':>9}")
    untrained = []
    if options.untrained:
        run = str(options.out / f"{name}-seed{options.seeds[0]}")
        untrained = [{"seconds": 0, "epochs": 0} | probed(run, options.data, "without")]
    for row in rows + untrained:
        label = f"seed {row.get('seed', 0)}" if row["seconds"] else "untrained"
        print(f"{label:<22}{row['seconds']:>9.0f}{row['epochs']:>8.2f}", end="")
        print("".join(f"{row[p]:>9.2%}" for p in PROBES))
    if len(rows) > 1:
        means = [statistics.mean(row[p] for row in rows) for p in PROBES]
        spreads = [statistics.stdev(row[p] for row in rows) for p in PROBES]
        for label, values in (("mean", means), ("deviation", spreads)):
            print(f"{label:<39}{''.join(f'{v:>9.2%}' for v in values)}")
    result = {
        "date": date.today().isoformat(),
        "command": " ".join(["python", "benchmarks/recipe.py", "CIFAR10_FOLDER", *sys.argv[2:]]),
        "environment": environment(),
        "rows": rows,
        "untrained": untrained,
    }
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    write_text(folder / f"recipe-{name}-{date.today()}.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
