"""What several processes cost: measured on this machine, and calculated up to 1,024 devices.

    python benchmarks/scaling.py CIFAR10_FOLDER      # two processes beside one; writes results/
    python benchmarks/scaling.py --calculate         # the table of docs/scaling.md

Measured: images per second, from the metrics of whole trainings through the command line; one
process with all threads and two with half of them each take turns. Calculated: floating-point
operations and bytes of a step in the paper's setting, divided by rates that are given.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from barlow.run import Run

# ResNet-50 at 224 pixels, three layers of 8,192, batch 2,048 (Zbontar et al. 2021, section 2.2).
BATCH, WIDTH = 2048, 8192
ENCODER_PRODUCTS = 4.09e9  # multiply-adds per image, forward
ENCODER_PARAMETERS, ENCODER_CHANNELS, ENCODER_NORMS = 23.5e6, 26_560, 53
PROJECTOR_PARAMETERS = 2048 * WIDTH + 2 * WIDTH**2


def throughput(data: str, devices: int, steps: int) -> float:
    """Images per second of a training, without its start-up and its first steps."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        options = {
            "recipe": "cifar10-cpu",
            "out": out,
            "devices": devices,
            "limit": 128 * steps,
            "epochs": 1,
            "log-every": 4,
            "validation-limit": 2,
        }
        command = [sys.executable, "-m", "barlow", "pretrain", data]
        command += [f"--{name}={value}" for name, value in options.items()]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return statistics.median(row["images_per_second"] for row in Run(out).metrics()[1:])


def measure(data: str, repeats: int, steps: int, out: Path) -> None:
    found: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        for devices, speeds in found.items():
            speeds.append(throughput(data, devices, steps))
    one, two = (statistics.median(speeds) for speeds in found.values())
    print(f"one process  {one:8.1f} images/s  {found[1]}")
    print(f"two processes{two:8.1f} images/s  {found[2]}")
    print(f"two beside one: {two / one:.2f}")
    result = {
        "date": date.today().isoformat(),
        "command": " ".join(["python", "benchmarks/scaling.py", "CIFAR10_FOLDER", *sys.argv[2:]]),
        "images_per_second": found,
        "two_beside_one": two / one,
    }
    out.mkdir(exist_ok=True)
    (out / f"scaling-{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n")


def ring(size: float, devices: int) -> float:
    """Bytes that each of `devices` devices sends in a ring all-reduce of `size` bytes."""
    return 2 * size * (devices - 1) / devices


def calculate(operations_a_second: float, bytes_a_second: float, latency: float) -> None:
    print(
        "| devices | images each | compute ms | gradients MB | embeddings MB | batch norm KB "
        "| exchange ms | efficiency |"
    )
    print("|--:|--:|--:|--:|--:|--:|--:|--:|")
    whole = BATCH * 2 * 3 * 2 * (ENCODER_PRODUCTS + PROJECTOR_PARAMETERS)
    whole += 2 * 4 * BATCH**2 * WIDTH  # the loss in its "samples" form, forward and backward
    for devices in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        compute = whole / devices / operations_a_second
        gradients = ring(4 * (ENCODER_PARAMETERS + PROJECTOR_PARAMETERS), devices)
        # All-gather of the other devices' embeddings, and of the statistics of both embeddings.
        others = (devices - 1) / devices
        embeddings = 2 * BATCH * WIDTH * 4 * others + 5 * WIDTH * 4 * (devices - 1)
        embeddings += ring(2 * WIDTH * 4, devices)  # sums for backward through the normalisation
        # For two views: mean and variance of each channel forward, two sums per channel backward.
        channels = ENCODER_CHANNELS + 2 * WIDTH
        norms = 2 * (2 * channels * 4 * (devices - 1) + ring(2 * channels * 4, devices))
        # The gradients' all-reduce overlaps with the backward pass (two thirds of the computation).
        calls = 2 * 2 * (ENCODER_NORMS + 2) + 4 if devices > 1 else 0
        waits = (embeddings + norms) / bytes_a_second + calls * latency
        hidden = max(0.0, gradients / bytes_a_second - compute * 2 / 3)
        step = compute + waits + hidden
        print(
            f"| {devices:,} | {BATCH // devices:,} | {1e3 * compute:,.1f} | {gradients / 1e6:,.0f} "
            f"| {embeddings / 1e6:,.0f} | {norms / 1e3:,.0f} | {1e3 * (waits + hidden):,.1f} "
            f"| {compute / step:.0%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", help="folder with CIFAR-10 as Parquet files")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--calculate", action="store_true", help="print the calculated table")
    parser.add_argument("--operations", type=float, default=1.2e14, help="of a device a second")
    parser.add_argument("--bytes", type=float, default=2.5e10, help="a device sends a second")
    parser.add_argument("--latency", type=float, default=3e-5, help="seconds of a collective")
    options = parser.parse_args()
    if options.calculate:
        calculate(options.operations, options.bytes, options.latency)
    elif not options.data or not Path(options.data).exists():
        print("skipped: give a folder with CIFAR-10 as Parquet files")
    else:
        measure(options.data, options.repeats, options.steps, options.out)


if __name__ == "__main__":
    main()
