"""What peers reach on CIFAR-10 in the time of a recipe, under the same probes.

    python benchmarks/peers.py CIFAR10 --peer lightly [--minutes 10] [--seeds 0]
    python benchmarks/peers.py CIFAR10 --peer seed --labels-per-class 500 [--minutes 10]

Each trains from random weights on whole batches of its own views, which two worker processes make
from PIL images. Its learning rate follows its own schedule, shortened to the time:

lightly: its Barlow Twins benchmark on CIFAR-10. Its own ResNet-18, without a ReLU after the stem;
    projector 2048 twice; SGD with learning rate 0.06 per 128 images, weight decay 5e-4 and a cosine
    schedule; batch size 128.
seed: the project from which this one began. timm's ResNet-50 at 224 pixels; projector 8192 three
    times; the correlation divided by 228 where a batch has 124 images; LARS with learning rate 0.2
    per 256 images for every parameter (its loop gives biases and norms the rate of weights), with a
    warm-up and then a constant rate; batch size 32, which fits into 16 GB. That project starts from
    supervised weights, which are not available here. Two cores pass 5 to 15 images of 224 pixels a
    second through ResNet-50: with 500 labels of each class its probe takes half an hour instead of
    two. recipe.py takes the same option.

CIFAR10 is `cifar10` or its images as another source; without it, or without lightly (pip install -e
'.[bench]'), the benchmark is skipped with a message. A trained encoder is kept in --out, and the
same command then continues with its probes.
"""

import argparse
import importlib.metadata
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import barlow
from barlow.data import Preprocess, open_source
from barlow.model import create_projector
from barlow.optim import LARS, parameter_groups, warmup_cosine
from recipe import parse, probed, show, write_result

os.environ.setdefault("LIGHTLY_DID_VERSION_CHECK", "True")  # it uses the network on import


@dataclass
class Peer:
    """How a peer trains; `factor` scales the learning rate after a given share of the time."""

    encoder: nn.Module
    projector: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    views: Callable
    preprocess: Preprocess
    factor: Callable[[float], float]


class Cut(nn.Module):
    """lightly's ResNet-18 as its benchmark cuts it: all of its children except the classifier."""

    def __init__(self) -> None:
        from lightly.models import ResNetGenerator

        super().__init__()
        *layers, _ = ResNetGenerator("resnet-18").children()
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def lightly(batch_size: int) -> Peer:
    import lightly.loss
    import lightly.transforms as transforms
    from lightly.models.modules.heads import ProjectionHead

    encoder = Cut()
    hidden = (512, 2048, nn.BatchNorm1d(2048), nn.ReLU(inplace=True))
    head = ProjectionHead([hidden, (2048, 2048, None, None)])
    parameters = [*encoder.parameters(), *head.parameters()]
    rate = 0.06 * batch_size / 128
    optimizer = torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=5e-4)
    # The views behind its published figure; its script has used BYOL's since.
    views = transforms.SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0)

    def factor(done: float) -> float:
        return warmup_cosine(done, steps=1, warmup=0, final=0)

    loss = lightly.loss.BarlowTwinsLoss()
    return Peer(encoder, head, loss, optimizer, views, Preprocess(32), factor)


def seed_loss(z1: Tensor, z2: Tensor) -> Tensor:
    """Algorithm 1, except that the divisor is 228 where a batch has 124 images."""
    divisor = len(z1) * 228 / 124
    z1, z2 = (nn.functional.batch_norm(z, None, None, training=True) for z in (z1, z2))
    c = z1.T @ z2 / divisor
    on = (torch.diagonal(c) - 1).square().sum()
    return on + 0.0051 * (c.square().sum() - torch.diagonal(c).square().sum())


def seed(batch_size: int) -> Peer:
    import lightly.transforms as transforms
    from torchvision.transforms.v2 import InterpolationMode, RandomResizedCrop

    encoder = barlow.create_encoder("resnet50", image_size=224)
    head = create_projector(2048, (8192, 8192, 8192))
    rate = 0.2 * batch_size / 256
    model = nn.ModuleList([encoder, head])
    groups = parameter_groups(model, lr=rate, lr_bias_norm=rate, weight_decay=1.5e-6)
    views = transforms.BYOLTransform(
        transforms.BYOLView1Transform(input_size=224), transforms.BYOLView2Transform(input_size=224)
    )
    crop = RandomResizedCrop(224, interpolation=InterpolationMode.BICUBIC)
    for view in views.transforms:
        view.transform.transforms[0] = crop

    def factor(done: float) -> float:
        return min(1.0, 10 * done)

    return Peer(encoder, head, seed_loss, LARS(groups, rate), views, Preprocess(224), factor)


PEERS = {"lightly": (lightly, 128), "seed": (seed, 32)}


class Pictures(Dataset):
    """Two views of each image of a source, as a peer draws them."""

    def __init__(self, data: str, views: Callable) -> None:
        self.source, self.views = open_source(data, "train"), views

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from torchvision.transforms.v2.functional import to_pil_image

        view1, view2 = self.views(to_pil_image(self.source[index]))
        return view1, view2


def train(peer: Peer, data: str, minutes: float, batch_size: int) -> dict[str, float]:
    """Train for `minutes` of wall-clock time, including workers, decoding and views."""
    pictures = Pictures(data, peer.views)
    rates = [group["lr"] for group in peer.optimizer.param_groups]
    loss = torch.zeros(())
    start, total, steps = time.monotonic(), 60 * minutes, 0
    loader = DataLoader(pictures, batch_size, shuffle=True, drop_last=True, num_workers=2)
    peer.encoder.train()
    while (seconds := time.monotonic() - start) < total:
        for view1, view2 in loader:
            for group, rate in zip(peer.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * peer.factor(seconds / total)
            z1, z2 = (peer.projector(peer.encoder(view)) for view in (view1, view2))
            loss = peer.loss(z1, z2)
            loss.backward()
            peer.optimizer.step()
            peer.optimizer.zero_grad()
            steps += 1
            if (seconds := time.monotonic() - start) >= total:
                break
    if not loss.isfinite():
        raise SystemExit(f"it diverged: its last loss is {loss.item()}")
    return {"seconds": seconds, "steps": steps, "epochs": steps * batch_size / len(pictures)}


def row(options: argparse.Namespace, seed: int) -> dict[str, float]:
    """Train a peer, unless its encoder is kept already, and probe its encoder."""
    make, batch_size = PEERS[options.peer]
    kept = options.out / f"{options.peer}-{options.minutes:g}min-seed{seed}.pt"
    torch.manual_seed(seed)
    peer = make(batch_size)
    if kept.exists():
        state = torch.load(kept, weights_only=True)
    else:
        torch.set_flush_denormal(True)
        told = train(peer, options.data, options.minutes, batch_size) | {"batch_size": batch_size}
        state = {"told": told, "encoder": peer.encoder.state_dict()}
        options.out.mkdir(parents=True, exist_ok=True)
        torch.save(state, kept)
    peer.encoder.load_state_dict(state["encoder"])
    peer.encoder.eval()
    peer.encoder.preprocess = peer.preprocess
    found = probed(peer.encoder, options.data, options.labels_per_class)
    return {"seed": seed} | state["told"] | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", default="", help="CIFAR-10, as any source")
    parser.add_argument("--peer", choices=list(PEERS), default="lightly")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options, shared = parse(parser)
    if not options.data:
        print("skipped: give CIFAR-10: cifar10, or a folder of its Parquet files")
        return
    try:
        version = importlib.metadata.version("lightly")
    except importlib.metadata.PackageNotFoundError:
        print("skipped: lightly is not installed (pip install -e '.[bench]')")
        return
    name = f"{options.peer}-{options.minutes:g}min"
    rows = [row(options, seed) for seed in options.seeds]
    show(name, rows)
    command = f"peers.py CIFAR10 --peer {options.peer} --minutes {options.minutes:g}{shared}"
    write_result(f"peer-{name}{shared}", command, rows, lightly=version)


if __name__ == "__main__":
    main()
