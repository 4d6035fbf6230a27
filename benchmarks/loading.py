"""From files to batches of two views: against the original pipeline, and how soon the first comes.

    python benchmarks/loading.py [--parquet FOLDER] [--files 1000000] [--skip photographs ...]

Three measurements, each in processes of its own:

- photographs: making two 224 x 224 views on 2 workers from 500 JPEGs of about 500 x 375 pixels and
  110 KB, cropped from the photographs that scikit-image and scikit-learn ship. The original
  pipeline (torchvision on PIL images, as the paper's code composes it) and ours take turns.
- parquet: the time from the start of Python to the first batch of a folder of Parquet files, with
  every image decoded. Skipped without `--parquet`.
- files: the time from the start of Python to the first batch of a folder of a million tiny files,
  and the memory that this takes.
"""

import argparse
import io
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image, ImageFilter, ImageOps

import barlow
from barlow.data import Loader, open_source
from barlow.views import TwoViews

COLOUR = ["astronaut", "chelsea", "coffee", "motorcycle_left", "motorcycle_right"]
FIRST_BATCH = """
import multiprocessing, re, sys, threading, time
from pathlib import Path
from barlow.data import Loader, open_source
from barlow.views import TwoViews
source = open_source(sys.argv[1], "train")
opened = time.time()
loader = Loader(source, TwoViews(32, preset="small"), 256, seed=0, workers=2)
peak = 0
def watch():  # workers count with what they do not share
    global peak
    while True:
        found = 0
        for child in multiprocessing.active_children():
            try:
                text = Path(f"/proc/{child.pid}/smaps_rollup").read_text()
                found += sum(map(int, re.findall(r"Private_\\w+: +(\\d+)", text)))
            except OSError:
                pass
        peak = max(peak, found)
        time.sleep(0.05)
threading.Thread(target=watch, daemon=True).start()
batches = loader.epoch(0)
view1, view2 = next(batches)
first = time.time()
assert view1.shape == view2.shape == (256, 3, 32, 32)
main = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(len(source), opened, first, main // 1024, peak // 1024)
batches.close()
"""


def write_photographs(folder: Path, n: int) -> None:
    """Crops of real photographs, each saved at the JPEG quality that brings it nearest 110 KB."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    place = Path(skimage.data.__file__).parent
    originals = [Image.open(place / f"{name}.png").convert("RGB") for name in COLOUR]
    originals += [Image.fromarray(image) for image in load_sample_images().images]
    draw = random.Random(0)
    (folder / "all").mkdir(parents=True)
    for i in range(n):
        image = originals[i % len(originals)]
        share = draw.uniform(0.6, 1.0)
        height = min(image.height, image.width * 3 / 4) * share
        width = height * 4 / 3
        left, top = draw.uniform(0, image.width - width), draw.uniform(0, image.height - height)
        box = (left, top, left + width, top + height)
        crop = image.resize((500, 375), Image.Resampling.BICUBIC, box)
        files = []
        for quality in (85, 90, 93, 95, 97, 98):
            file = io.BytesIO()
            crop.save(file, "JPEG", quality=quality)
            files.append(file.getvalue())
        nearest = min(files, key=lambda data: abs(len(data) - 110_000))
        (folder / "all" / f"{i:04}.jpg").write_bytes(nearest)


class Blur:
    """The paper's blur on a PIL image."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        """The image, blurred with probability `p`."""
        if random.random() >= self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


class Solarise:
    """The paper's solarisation on a PIL image."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        """The image, solarised with probability `p`."""
        return ImageOps.solarize(image) if random.random() < self.p else image


class PerImage:
    """Both views of a PIL image, composed from torchvision's transforms as the paper does."""

    def __init__(self) -> None:
        from torchvision import transforms as t

        jitter = t.RandomApply([t.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        ends = [t.ToTensor(), t.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
        self.views = [
            t.Compose(
                [
                    t.RandomResizedCrop(224, interpolation=t.InterpolationMode.BICUBIC),
                    t.RandomHorizontalFlip(),
                    jitter,
                    t.RandomGrayscale(0.2),
                    Blur(blur),
                    Solarise(solarise),
                    *ends,
                ]
            )
            for blur, solarise in ((1.0, 0.0), (0.1, 0.2))
        ]

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        """The two views of an image."""
        return self.views[0](image), self.views[1](image)


def original_epoch(folder: Path, batch_size: int) -> int:
    """Run one epoch of the original pipeline; return the number of images in its batches."""
    from torchvision.datasets import ImageFolder

    loader = torch.utils.data.DataLoader(
        ImageFolder(str(folder), PerImage()),
        batch_size,
        shuffle=True,
        num_workers=2,
        drop_last=True,
    )
    return sum(len(view1) for (view1, _), _ in loader)


def our_loader(folder: Path, batch_size: int, memory_budget: int | None) -> Loader:
    views = TwoViews(224, preset="paper")
    source = open_source(str(folder))
    return Loader(source, views, batch_size, seed=0, workers=2, memory_budget=memory_budget)


def our_epoch(folder: Path, batch_size: int, epoch: int, loader: Loader | None = None) -> int:
    """Run one epoch of our pipeline; return the number of images in its batches.

    Every image is decoded again, unless a `loader` is given that has them in memory.
    """
    loader = loader or our_loader(folder, batch_size, 0)
    return sum(len(view1) for view1, _ in loader.epoch(epoch))


def crops_epoch(folder: Path, batch_size: int, epoch: int) -> int:
    """`our_epoch` up to the workers' crops: the input of a device that finishes the views."""
    views = TwoViews(224, preset="paper")
    views.finish = lambda crops1, crops2, key, position: (crops1, crops2)  # type: ignore
    source = open_source(str(folder))
    loader = Loader(source, views, batch_size, seed=0, workers=2, memory_budget=0)
    return sum(len(view1) for view1, _ in loader.epoch(epoch))


def photographs(images: int, repeats: int, batch_size: int = 50) -> dict[str, Any]:
    """Images per second of each pipeline; the pipelines take turns."""
    rates: dict[str, list[float]] = {
        "original": [],
        "ours": [],
        "ours, decoded in memory": [],
        "our crops alone": [],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder, images)
        sizes = [file.stat().st_size for file in folder.rglob("*.jpg")]
        held = our_loader(folder, batch_size, None)
        for repeat in range(repeats + 1):
            for way, run in (
                ("original", lambda: original_epoch(folder, batch_size)),
                ("ours", lambda: our_epoch(folder, batch_size, repeat)),  # noqa: B023
                ("ours, decoded in memory", lambda: our_epoch(folder, batch_size, repeat, held)),  # noqa: B023
                ("our crops alone", lambda: crops_epoch(folder, batch_size, repeat)),  # noqa: B023
            ):
                start = time.perf_counter()
                done = run()
                if repeat:  # the first round warms up the disk cache and the imports
                    rates[way].append(done / (time.perf_counter() - start))
    medians = {way: statistics.median(values) for way, values in rates.items()}
    return {
        "images": images,
        "mean_bytes": statistics.mean(sizes),
        "batch_size": batch_size,
        "images_per_second": medians,
        "every_round": rates,
        "times_original": medians["ours"] / medians["original"],
    }


def first_batch(source: Path) -> dict[str, Any]:
    """Seconds from the start of Python to the first batch, and peak memory in MiB."""
    with tempfile.TemporaryDirectory() as cache:  # empty: nothing was prepared before
        env = os.environ | {"HF_DATASETS_CACHE": cache}
        start = time.time()
        told = subprocess.run(
            [sys.executable, "-c", FIRST_BATCH, str(source)],
            env=env, check=True, capture_output=True, text=True,
        )  # fmt: skip
    images, opened, first, main, worker = map(float, told.stdout.split())
    return {
        "images": int(images),
        "seconds_to_open": opened - start,
        "seconds_to_first_batch": first - start,
        "peak_mib_main": main,
        "peak_mib_workers": worker,
    }


def many_files(n: int, keep: Path | None) -> dict[str, Any]:
    """`first_batch` on n tiny files, a thousand per folder; on those in `keep` if it exists."""
    if keep and keep.is_dir():
        return first_batch(keep)
    rng = np.random.default_rng(0)
    tiny = []
    for _ in range(64):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
        tiny.append(file.getvalue())
    with tempfile.TemporaryDirectory() as temporary:
        root = keep or Path(temporary)
        for start in range(0, n, 1000):
            folder = root / f"{start // 1000:05}"
            folder.mkdir(parents=True)
            for i in range(min(1000, n - start)):
                with open(f"{folder}/{i:04}.png", "wb") as file:
                    file.write(tiny[i % 64])
        return first_batch(root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parquet", type=Path, help="folder of Parquet files, such as CIFAR-10's")
    parser.add_argument("--images", type=int, default=500, help="photographs to make")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that are counted")
    parser.add_argument("--files", type=int, default=1_000_000, help="tiny files to make")
    parser.add_argument("--keep", type=Path, help="where the tiny files stay for the next time")
    parser.add_argument("--skip", nargs="*", default=[], help="photographs, parquet, files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()

    results: dict[str, Any] = {}
    if "photographs" not in args.skip:
        results["photographs"] = photographs(args.images, args.repeats)
    if "parquet" not in args.skip:
        if args.parquet:
            results["parquet"] = first_batch(args.parquet)
        else:
            print("parquet: skipped, --parquet names no folder")
    if "files" not in args.skip:
        results["files"] = many_files(args.files, args.keep)

    print(f"{'measurement':<44}{'value':>10}{'wanted':>10}")
    for name, value, wanted in table(results):
        print(f"{name:<44}{value:>10}{wanted:>10}")
    command = " ".join(["python", "benchmarks/loading.py", *sys.argv[1:]])
    for path in (args.parquet, args.keep, args.out):  # paths mean nothing on another machine
        command = command.replace(str(path), "FOLDER")
    about = {
        "command": command,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "load_average": os.getloadavg(),
        "versions": {
            "barlow": barlow.__version__,
            "torch": torch.__version__,
            "pillow": PIL.__version__,
            "python": platform.python_version(),
        },
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"loading-{date.today().isoformat()}.json"
    # Measurements may be made one at a time, so each records how it was made.
    record = json.loads(path.read_text()) if path.exists() else {}
    record |= {name: {**result, "about": about} for name, result in results.items()}
    path.write_text(json.dumps(record, indent=2) + "\n")


def table(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of name, value and target."""
    rows = []
    if photos := results.get("photographs"):
        for way, rate in photos["images_per_second"].items():
            rows.append((f"photographs, {way}: images/s", f"{rate:.0f}", ""))
        rows.append(("photographs, ours / original", f"{photos['times_original']:.2f}", "2.5"))
    for name, limit in (("parquet", "15"), ("files", "60")):
        if found := results.get(name):
            what = f"{name}, {found['images']} images"
            rows.append((f"{what}: s to open", f"{found['seconds_to_open']:.1f}", ""))
            rows.append((f"{what}: s to batch", f"{found['seconds_to_first_batch']:.1f}", limit))
            rows.append((f"{what}: peak MiB", f"{found['peak_mib_main']:.0f}", "1024"))
            worker = f"{found['peak_mib_workers']:.0f}"
            rows.append((f"{what}: peak MiB, workers' own", worker, ""))
    return rows


if __name__ == "__main__":
    main()
