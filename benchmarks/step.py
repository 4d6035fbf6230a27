"""Where a training step's time goes, how near the machine's rate it is, and what peers reach.

    python benchmarks/step.py CIFAR10_FOLDER [--batch-size 128] [--repeats 15] [--compile]

One process; ResNet-18 with the small-image stem, projector 2048 three times. The folder holds
CIFAR-10 as Parquet files; without it the benchmark is skipped with a message.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import barlow
from barlow.batch_norm import exact_batch_norm
from barlow.checkpoint import save_last
from barlow.data import Loader, open_source
from barlow.loss import BarlowTwinsLoss
from barlow.loss_terms import Means
from barlow.optim import LARS, parameter_groups

WIDTHS = (2048, 2048, 2048)


def matrix_rate(n: int = 2048, repeats: int = 10) -> float:
    """Floating-point operations per second of a large float32 matrix product."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def interleaved(actions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each action; they take turns, so that machine drift affects all alike."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    for _ in range(repeats):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def forever(loader: Loader):
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


def new_model() -> tuple[barlow.BarlowTwins, LARS]:
    torch.manual_seed(0)
    encoder = barlow.create_encoder("resnet18", image_size=32)
    model = barlow.BarlowTwins(encoder, WIDTHS).to(memory_format=torch.channels_last).train()
    groups = parameter_groups(model, lr=0.1, lr_bias_norm=0.005, weight_decay=1e-6)
    return model, LARS(groups, 0.1)


def compiled_step(batches) -> Callable[[], object]:
    """Our step as `barlow pretrain --compile` runs it."""
    model, optimizer = new_model()
    model.compile()
    means = Means()

    def step() -> None:
        model(*next(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
        means.add(model.criterion.terms)

    return step


def saving(folder: Path) -> Callable[[], object]:
    """An action that saves a checkpoint of the same model and optimiser, flushed to disk."""
    model, optimizer = new_model()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    return lambda: save_last(folder / "last.ckpt", state)


def parts_of_a_step(batches, batch_size: int) -> tuple[dict[str, Callable[[], object]], float]:
    """Our step, its parts other than encoder and projector, and the step's operations."""
    model, optimizer = new_model()
    means = Means()
    z1, z2 = (torch.randn(batch_size, WIDTHS[-1]).requires_grad_() for _ in range(2))
    criterion = BarlowTwinsLoss()
    view1, view2 = next(batches)

    def step(view1: Tensor, view2: Tensor) -> None:
        with exact_batch_norm(True, over_ranks=False):  # as `barlow pretrain` does on a CPU
            model(view1, view2).backward()
        optimizer.step()
        optimizer.zero_grad()
        means.add(model.criterion.terms)

    def optimise() -> None:
        for p in model.parameters():
            p.grad = p.detach()
        optimizer.step()
        optimizer.zero_grad()

    def log() -> None:
        means.add(model.criterion.terms)
        means.pop()

    with FlopCounterMode(display=False) as counter:
        step(view1, view2)
    return {
        "whole step": lambda: step(*next(batches)),
        "images and views": lambda: next(batches),
        "loss": lambda: criterion(z1, z2).backward(),
        "optimiser": optimise,
        "logging": log,
    }, counter.get_total_flops()


def peer_steps(source, batch_size: int) -> dict[str, Callable[[], object]]:
    """One training step of each peer, without decoding: from PIL images to updated weights."""
    try:
        import lightly.loss
        import lightly.models.modules.heads as heads
        import lightly.transforms as transforms
    except ImportError:
        print("lightly is not installed: peers are left out (pip install -e '.[bench]')")
        return {}
    import torchvision
    from torchvision.transforms.v2.functional import to_pil_image

    pictures = [to_pil_image(source[i]) for i in range(batch_size)]

    class Example(nn.Module):
        """Lightly's example for Barlow Twins: torchvision's ResNet-18 and its projection head."""

        def __init__(self, small_stem: bool) -> None:
            super().__init__()
            resnet = torchvision.models.resnet18()
            if small_stem:
                resnet.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
                resnet.maxpool = nn.Identity()
            resnet.fc = nn.Identity()
            self.backbone = resnet
            self.head = heads.BarlowTwinsProjectionHead(512, 2048, 2048)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone(x))

    torch.manual_seed(0)
    lightly_model = Example(small_stem=True)
    lightly_loss = lightly.loss.BarlowTwinsLoss()
    lightly_optimizer = torch.optim.SGD(lightly_model.parameters(), lr=0.06)
    lightly_views = transforms.BYOLTransform(
        transforms.BYOLView1Transform(input_size=32, gaussian_blur=0.0),
        transforms.BYOLView2Transform(input_size=32, gaussian_blur=0.0),
    )

    def lightly_step() -> None:
        pairs = [lightly_views(p) for p in pictures]
        view1, view2 = (torch.stack([pair[i] for pair in pairs]) for i in range(2))
        lightly_loss(lightly_model(view1), lightly_model(view2)).backward()
        lightly_optimizer.step()
        lightly_optimizer.zero_grad()

    plain_model = Example(small_stem=True)
    plain_optimizer = torch.optim.SGD(plain_model.parameters(), lr=0.06)
    norm = nn.BatchNorm1d(2048, affine=False)

    def plain_step() -> None:
        pairs = [lightly_views(p) for p in pictures]
        view1, view2 = (torch.stack([pair[i] for pair in pairs]) for i in range(2))
        z1, z2 = plain_model(view1), plain_model(view2)
        c = norm(z1).T @ norm(z2) / len(z1)
        diagonal = torch.diagonal(c)
        off = c.flatten()[:-1].view(2047, 2049)[:, 1:]
        ((diagonal - 1).square().sum() + 0.0051 * off.square().sum()).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()

    return {"lightly's example": lightly_step, "plain loop": plain_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default="", help="CIFAR-10 as Parquet files")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="also torch.compile's step")
    options = parser.parse_args()
    if not Path(options.folder).is_dir() or not options.folder:
        print("skipped: give a folder with CIFAR-10 as Parquet files")
        return
    source = open_source(options.folder, "train", limit=20 * options.batch_size)
    views = barlow.TwoViews(32, preset="small")
    batches = forever(Loader(source, views, options.batch_size, seed=0))
    ours, operations = parts_of_a_step(batches, options.batch_size)
    peers = peer_steps(source, options.batch_size)
    if options.compile:
        peers = {"this package, compiled": compiled_step(batches)} | peers
    rates = [matrix_rate()]
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        save = {"a checkpoint": saving(Path(folder))}
        seconds = interleaved(ours | peers | save, options.repeats)
    rates.append(matrix_rate())
    rate = statistics.mean(rates)

    whole = seconds["whole step"]
    rest = ("images and views", "loss", "logging")
    share = 1 - sum(seconds[name] for name in rest) / whole
    print(f"{'part':<22}{'ms':>9}{'of the step':>13}")
    for name in ours:
        print(f"{name:<22}{seconds[name] * 1e3:>9.2f}{seconds[name] / whole:>13.1%}")
    print(f"\nencoder, projector and their optimiser: {share:.1%} of the step")
    print(f"achieved {operations / whole / 1e9:.0f} GFLOP/s of {rate / 1e9:.0f} (matrix product)")
    print(f"a checkpoint every 10 minutes: {seconds['a checkpoint'] / 600:.2%} of the time")
    print(f"\n{'who':<22}{'images/s':>9}{'ours is':>13}")
    for name in ("whole step", *peers):
        label = "this package" if name == "whole step" else name
        speed = options.batch_size / seconds[name]
        print(f"{label:<22}{speed:>9.1f}{seconds[name] / whole:>12.2f}x")
    result = {
        "command": " ".join(["python", *sys.argv[:1], "CIFAR10_FOLDER", *sys.argv[2:]]),
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "seconds": seconds,
        "operations_a_step": operations,
        "matrix_rate": rate,
        "encoder_and_projector_share": share,
    }
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"step-{date.today()}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
