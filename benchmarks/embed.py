"""`barlow embed` beside the encoder alone: images a second, decoding and writing included.

    python benchmarks/embed.py [SOURCE] [--encoder resnet18] [--image-size 224] [--images 512]

The encoder alone runs in eval mode, channels last, on batches that are already in memory. SOURCE is
any source; by default a folder of random JPEGs is made. The two are measured in turns, and their
medians are compared. Prints a table and writes `benchmarks/results/embed-DATE.json`.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import barlow
from barlow.data import Preprocess, open_source
from barlow.embeddings.writing import write_embeddings
from barlow.environment import environment
from barlow.progress import Reporter
from barlow.share import save_encoder
from barlow.tables import text_table


class Clock(Reporter):
    """Times the work from the first image to the last, without loading the encoder."""

    def start(self, done: float, total: float, unit: str = "step") -> None:
        self.begin = time.perf_counter()

    def say(self, text: str) -> None:
        self.seconds = time.perf_counter() - self.begin


def make_photos(folder: Path, images: int, side: int = 256) -> None:
    """Write smooth random JPEGs with about as many bytes as photographs of that size."""
    random = np.random.default_rng(0)
    for i in range(images):
        coarse = random.integers(0, 256, (side // 8, side // 8, 3), np.uint8)
        image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        image.save(folder / f"{i:05}.jpg", quality=90)


def bare(encoder: torch.nn.Module, batch: torch.Tensor, images: int) -> float:
    """Images per second of the encoder alone."""
    batches = max(1, images // len(batch))
    with torch.inference_mode():
        start = time.perf_counter()
        for _ in range(batches):
            encoder(batch)
        return batches * len(batch) / (time.perf_counter() - start)


def embedded(encoder: Path, source: str, batch_size: int, images: int) -> float:
    """Images per second of the whole, from image files to a file of embeddings."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        write_embeddings(
            str(encoder),
            source,
            f"{folder}/e.parquet",
            batch_size=batch_size,
            limit=images,
            accelerator="cpu",
            reporter=clock,
        )
    return images / clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", help="default: random JPEGs of 256 pixels")
    parser.add_argument("--encoder", default="resnet18", help="timm architecture")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    torch.manual_seed(0)
    encoder = barlow.create_encoder(args.encoder, args.image_size).eval()
    encoder.preprocess = Preprocess(args.image_size)
    rates: dict[str, list[float]] = {"encoder alone": [], "barlow embed": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_encoder(encoder, folder / "encoder")
        if args.source is None:
            (folder / "photos").mkdir()
            make_photos(folder / "photos", args.images)
        source = args.source or str(folder / "photos")
        images = min(args.images, len(open_source(source)))
        encoder.to(memory_format=torch.channels_last)
        batch = torch.randn(min(args.batch_size, images), 3, args.image_size, args.image_size)
        batch = batch.to(memory_format=torch.channels_last)
        bare(encoder, batch, len(batch))
        for _ in range(args.repeats):
            rates["encoder alone"].append(bare(encoder, batch, images))
            rates["barlow embed"].append(
                embedded(folder / "encoder", source, args.batch_size, images)
            )
    medians = {name: statistics.median(values) for name, values in rates.items()}
    share = medians["barlow embed"] / medians["encoder alone"]
    lines = [[f"{args.encoder}, {args.image_size} pixels", "images/s", "lowest", "highest"]]
    lines += [
        [name, f"{medians[name]:.1f}", f"{min(values):.1f}", f"{max(values):.1f}"]
        for name, values in rates.items()
    ]
    print(text_table(lines))
    print(f"{share:.1%} of the encoder alone, over {images} images")
    record: dict[str, Any] = {
        "command": " ".join(["python benchmarks/embed.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "environment": environment(),
        "load_before": load,
        "images": images,
        "images_per_second": rates,
        "share": share,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"embed-{date.today().isoformat()}.json"
    file.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
