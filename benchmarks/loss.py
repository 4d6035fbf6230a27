"""Time and memory of the loss, forward and backward, beside its peers.

    python benchmarks/loss.py                # the table; writes benchmarks/results/loss-DATE.json
    python benchmarks/loss.py --repeats 3 --shapes 256x8192 --out quick.json
    python benchmarks/loss.py --processor-time                # on a machine that others use

Times are medians over interleaved repeats in one process, memory is the growth of a fresh
process's peak resident set, inputs excluded, outputs (the gradients) included. The floor is the
multiply-adds of the products that this loss needs over the rate of a large matrix product,
measured between the repeats.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from barlow.loss import BarlowTwinsLoss

SHAPES = [(256, 8192), (128, 2048), (2048, 8192), (4096, 2048)]  # (N, D)
LAMBD = 0.0051
# By what factor the best peer's time and memory should at least exceed ours; the other peers are
# slower or need more memory.
TARGETS = {
    (256, 8192): (40, 20),
    (128, 2048): (12, 8),
    (2048, 8192): (3, 2),
    (4096, 2048): (1, 2),
}

Loss = Callable[[Tensor, Tensor], Tensor]
clock = time.perf_counter


def original(z1: Tensor, z2: Tensor) -> Tensor:
    """The paper's code: the off-diagonal elements as a strided copy of the flattened matrix."""
    n, d = z1.shape
    norm = torch.nn.BatchNorm1d(d, affine=False)
    c = norm(z1).T @ norm(z2) / n
    rest = c.flatten()[1:].view(d - 1, d + 1)[:, :-1].reshape(-1)
    return (c.diagonal() - 1).square().sum() + LAMBD * rest.square().sum()


def solo_learn(z1: Tensor, z2: Tensor) -> Tensor:
    """solo-learn's loss: the difference from the identity, weighted through a boolean mask."""
    n, d = z1.shape
    norm = torch.nn.BatchNorm1d(d, affine=False)
    c = torch.einsum("ni,nj->ij", norm(z1), norm(z2)) / n
    identity = torch.eye(d)
    squares = (c - identity).square()
    squares[identity == 0] *= LAMBD
    return squares.sum()


def stable_pretraining(z1: Tensor, z2: Tensor) -> Tensor:
    """stable-pretraining's loss: the original, with unbiased deviations and plain arithmetic."""
    d = z1.shape[1]
    a = (z1 - z1.mean(0)) / (z1.std(0) + 1e-5)
    b = (z2 - z2.mean(0)) / (z2.std(0) + 1e-5)
    c = a.T @ b / len(z1)
    rest = c.flatten()[1:].view(d - 1, d + 1)[:, :-1].reshape(-1)
    return (c.diagonal() - 1).square().sum() + LAMBD * rest.square().sum()


def lightly() -> Loss:
    from lightly.loss import BarlowTwinsLoss  # slow import; the others' memory is measured without

    return BarlowTwinsLoss(LAMBD)


LOSSES: dict[str, Callable[[], Loss]] = {
    "barlow": lambda: BarlowTwinsLoss(LAMBD),
    "original": lambda: original,
    "lightly": lightly,
    "solo-learn": lambda: solo_learn,
    "stable-pretraining": lambda: stable_pretraining,
}


def embeddings(n: int, d: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    shared, own1, own2 = torch.randn(3, n, d, generator=random)
    return (shared + own1).requires_grad_(), (shared + own2).requires_grad_()


def seconds(loss: Loss, z1: Tensor, z2: Tensor) -> float:
    z1.grad = z2.grad = None
    start = clock()
    loss(z1, z2).backward()
    return clock() - start


def product_rate() -> float:
    """Floating-point operations per second of a large matrix product, the best of three."""
    x, best = torch.randn(2048, 2048), float("inf")
    for _ in range(3):
        start = clock()
        x @ x
        best = min(best, clock() - start)
    return 2 * 2048**3 / best


def operations(n: int, d: int) -> float:
    """Operations of the products in the cheaper form; its two Gram matrices are symmetric."""
    gram = 10 / 16 if n >= 256 else 1
    return 2 * min((2 * gram + 2) * n * n * d, 3 * n * d * d)


def times(n: int, d: int, repeats: int) -> tuple[dict[str, list[float]], float]:
    z1, z2 = embeddings(n, d)
    losses, rate = {name: create() for name, create in LOSSES.items()}, 0.0
    found: dict[str, list[float]] = {name: [] for name in losses}
    for repeat in range(repeats + 1):  # the first one warms up
        rate = max(rate, product_rate())
        for name, loss in losses.items():
            # A fast loss runs a few times in a row, as in training, so that its cache is not cold.
            for _ in range(5 if name == "barlow" and n * d < 2**22 else 1):
                took = seconds(loss, z1, z2)
                if repeat:
                    found[name].append(took)
    return found, rate


def memory(name: str, n: int, d: int) -> int:
    """Extra bytes at the peak of one forward and backward, in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", name, str(n), str(d)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(run.stdout)


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def print_memory_of(name: str, n: int, d: int) -> None:
    loss = LOSSES[name]()
    # Tiny runs first, so that libraries and threads have allocated what they keep.
    seconds(loss, *embeddings(48, 64))
    seconds(loss, *embeddings(64, 48))
    z1, z2 = embeddings(n, d)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    seconds(loss, z1, z2)
    print(resident("VmHWM") - before)


def measure(shapes: list[tuple[int, int]], repeats: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for n, d in shapes:
        found, rate = times(n, d, repeats)
        floor = operations(n, d) / rate
        for name, took in found.items():
            rows.append(
                {
                    "n": n,
                    "d": d,
                    "loss": name,
                    "median_seconds": statistics.median(took),
                    "least_seconds": min(took),
                    "repeats": len(took),
                    "extra_bytes": statistics.median(memory(name, n, d) for _ in range(3)),
                    "floor_seconds": floor,
                    "product_rate": rate,
                }
            )
    return rows


def as_table(rows: list[dict]) -> str:
    lines = [
        "| N, D | loss | median ms | least ms | MiB | times barlow's time | memory | floor ms |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for n, d in dict.fromkeys((row["n"], row["d"]) for row in rows):
        here = [row for row in rows if (row["n"], row["d"]) == (n, d)]
        ours = here[0]
        for row in here:
            lines.append(
                f"| {n}, {d} | {row['loss']} | {1e3 * row['median_seconds']:.1f} "
                f"| {1e3 * row['least_seconds']:.1f} | {row['extra_bytes'] / 2**20:.1f} "
                f"| {row['median_seconds'] / ours['median_seconds']:.1f} "
                f"| {row['extra_bytes'] / ours['extra_bytes']:.1f} "
                f"| {1e3 * row['floor_seconds']:.1f} |"
            )
    lines += ["", "| N, D | best peer's time | target | best peer's memory | target |"]
    lines += ["|---|--:|--:|--:|--:|"]
    for (n, d), (time_target, memory_target) in TARGETS.items():
        ours, *peers = [row for row in rows if (row["n"], row["d"]) == (n, d)] or [None]
        if ours is None:
            continue
        time_ratio = min(p["median_seconds"] for p in peers) / ours["median_seconds"]
        memory_ratio = min(p["extra_bytes"] for p in peers) / ours["extra_bytes"]
        lines.append(
            f"| {n}, {d} | {time_ratio:.1f}x | {time_target}x "
            f"| {memory_ratio:.1f}x | {memory_target}x |"
        )
    return "\n".join(lines)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shapes", nargs="*", metavar="NxD", help="default: all of the table")
    parser.add_argument("--memory-of", nargs=3, metavar=("LOSS", "N", "D"))
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="one thread, and the processor's time instead of the wall's: for a busy machine",
    )
    options = parser.parse_args()
    if options.memory_of:
        name, n, d = options.memory_of
        print_memory_of(name, int(n), int(d))
        return
    date = datetime.date.today().isoformat()
    if options.processor_time:
        global clock
        clock = time.process_time
        torch.set_num_threads(1)
    shapes = SHAPES
    if options.shapes:
        shapes = [(int(n), int(d)) for n, d in (shape.split("x") for shape in options.shapes)]
    rows = measure(shapes, options.repeats)
    print(as_table(rows))
    out = options.out or Path(__file__).parent / "results" / f"loss-{date}.json"
    record = {
        "date": date,
        "command": " ".join(["python", "benchmarks/loss.py", *sys.argv[1:]]),
        "machine": {"processor": processor(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rows": rows,
    }
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
