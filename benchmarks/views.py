"""Two views of small images: samples a second, against the tools people use today.

    python benchmarks/views.py [--seconds 8] [--out benchmarks/results]

All contestants get the same 1,024 images of 32 x 32 pixels; one view has the paper's second
distribution, the other its first, without blur. torchvision's PIL pipeline is composed as in the
original code; it and lightly run on one core, like one worker of a loader. kornia and ours take
batches of 256 on two threads. Rounds alternate between the contestants, so that other load on the
machine affects all alike; the median round counts. Prints one table and writes it as JSON. The
original resizes with a bicubic filter in integer arithmetic; ours, lightly and kornia resize
bilinearly.
"""

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from barlow.views import TwoViews

SIZE, BATCH, IMAGES, ROUNDS = 32, 256, 1024, 7
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_images() -> Tensor:
    """Smooth random colour images with the whole range of values: (IMAGES, 3, SIZE, SIZE)."""
    coarse = torch.rand(IMAGES, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic")
    return smooth.mul(255).clamp(0, 255).to(torch.uint8)


def pictures(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(np.asarray(i.permute(1, 2, 0))) for i in images[:BATCH]]


def ours(images: Tensor) -> Callable[[int], object]:
    views = TwoViews(SIZE, "small")
    batches = images.split(BATCH)
    return lambda i: views(batches[i % len(batches)], key=i)


def torchvision_pil(images: Tensor) -> Callable[[int], object]:
    import torchvision.transforms as T

    def one(solarise: float) -> Callable[[Image.Image], Tensor]:
        return T.Compose(
            [
                T.RandomResizedCrop(SIZE, scale=(0.2, 1), interpolation=Image.Resampling.BICUBIC),
                T.RandomHorizontalFlip(p=0.5),
                T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                T.RandomGrayscale(p=0.2),
                lambda x: ImageOps.solarize(x) if random.random() < solarise else x,
                T.ToTensor(),
                T.Normalize(MEAN, STD),
            ]
        )

    first, second = one(0.0), one(0.2)
    sources = pictures(images)
    return lambda _: torch.stack([v for x in sources for v in (first(x), second(x))])


def lightly(images: Tensor) -> Callable[[int], object]:
    from lightly.transforms.byol_transform import (
        BYOLTransform,
        BYOLView1Transform,
        BYOLView2Transform,
    )

    kwargs = {"input_size": SIZE, "min_scale": 0.2, "gaussian_blur": 0.0}
    both = BYOLTransform(BYOLView1Transform(**kwargs), BYOLView2Transform(**kwargs))
    sources = pictures(images)
    return lambda _: torch.stack([v for x in sources for v in both(x)])


def kornia(images: Tensor) -> Callable[[int], object]:
    import kornia.augmentation as K

    def one(solarise: float) -> torch.nn.Module:
        return K.AugmentationSequential(
            K.RandomResizedCrop((SIZE, SIZE), scale=(0.2, 1.0)),
            K.RandomHorizontalFlip(p=0.5),
            K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
            K.RandomGrayscale(p=0.2),
            # The threshold is always 0.5 and the brightness unchanged: the paper's solarisation.
            K.RandomSolarize((0.5, 0.5), (0.0, 0.0), p=solarise),
            K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        )

    first, second = one(0.0), one(0.2)
    batches = images.split(BATCH)

    def both(i: int) -> tuple[Tensor, Tensor]:
        batch = batches[i % len(batches)].float().div_(255)
        return first(batch), second(batch)

    return both


# Name: how it is made, its number of threads, how many times as fast as it we want to be.
CONTESTANTS = {
    "barlow.TwoViews": (ours, 2, None),
    "torchvision PIL, original code": (torchvision_pil, 1, 20),
    "lightly BYOLTransform": (lightly, 1, 24),
    "kornia, batched": (kornia, 2, 5),
}


def contestant(name: str, pipe: Connection) -> None:
    """Run rounds on request in a process of its own: receives seconds, sends samples per second."""
    warnings.filterwarnings("ignore")  # from the libraries compared
    make, threads, _ = CONTESTANTS[name]
    torch.set_num_threads(threads)
    call = make(make_images())
    call(0)
    while seconds := pipe.recv():
        start, done = time.perf_counter(), 0
        while not done or time.perf_counter() - start < seconds:
            call(done)
            done += 1
        pipe.send(done * BATCH / (time.perf_counter() - start))


def measure(seconds: float) -> dict[str, list[float]]:
    """Samples per second of every round, by contestant; each gets `seconds` in total.

    Each runs in a process of its own, so that it has its own number of threads from the start.
    """
    spawn = multiprocessing.get_context("spawn")
    pipes = {}
    for name in CONTESTANTS:
        pipes[name], theirs = spawn.Pipe()
        spawn.Process(target=contestant, args=(name, theirs), daemon=True).start()
    rounds: dict[str, list[float]] = {name: [] for name in pipes}
    for round_ in range(ROUNDS + 1):  # the first one warms up
        for name, pipe in pipes.items():
            pipe.send(seconds / (ROUNDS + 1))
            if (rate := pipe.recv()) and round_:
                rounds[name].append(rate)
    for pipe in pipes.values():
        pipe.send(0)
    return rounds


def machine() -> dict[str, object]:
    model = platform.processor()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    packages = ("torch", "torchvision", "pillow", "lightly", "kornia")
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),  # above 1, something else was running too
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="for each contestant")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    about = machine()
    rounds = measure(args.seconds)
    median = {name: statistics.median(values) for name, values in rounds.items()}
    own = median["barlow.TwoViews"]
    rows = []
    print(f"{'two views of 32 x 32':32s} threads  samples/s (lowest-highest)   we are  wanted")
    for name, values in rounds.items():
        _, threads, wanted = CONTESTANTS[name]
        times = own / median[name]
        span = f"({min(values):,.0f}-{max(values):,.0f})"
        against = f"{times:5.1f}x  {wanted:5d}x" if wanted else ""
        print(f"{name:32s} {threads:7d} {median[name]:10,.0f} {span:17s} {against}")
        rows.append(
            {
                "name": name, "threads": threads, "samples_per_second": round(median[name], 1),
                "rounds": [round(v, 1) for v in values], "ours_is_times": round(times, 2),
                "wanted_times": wanted,
            }
        )  # fmt: skip
    date = datetime.date.today().isoformat()
    out = args.out / f"views-{date}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    command = "python " + " ".join(["benchmarks/views.py", *sys.argv[1:]])
    record = {"command": command, "date": date, "machine": about, "batch": BATCH, "size": SIZE}
    out.write_text(json.dumps(record | {"rows": rows}, indent=2) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
