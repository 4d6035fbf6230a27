"""Exact search in a file of embeddings: seconds and memory beside pyarrow, NumPy and FAISS.

    python benchmarks/search.py [FOLDER] [--images 1000000] [--features 512]

Writes a file of random embeddings into FOLDER (default: a temporary one), as float32 and as
float16, and searches it for one image while the file is in the operating system's page cache.
Prints a table and writes `benchmarks/results/search-DATE.json`.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from barlow.embeddings.layout import EMBEDDING
from barlow.embeddings.neighbours import nearest
from barlow.embeddings.table import Rows, group_size, open_table, write_table
from barlow.environment import environment
from barlow.tables import text_table

TOP = 20


def write(file: Path, images: int, features: int, dtype: str) -> None:
    """Write random vectors, the same ones every time."""
    random = np.random.default_rng(0)
    size = group_size(features, dtype)

    def groups() -> Iterator[Rows]:
        for start in range(0, images, size):
            n = min(size, images - start)
            x = random.standard_normal((n, features), np.float32).astype(dtype)
            ids = [f"row:{start + i}" for i in range(n)]
            yield Rows(ids, [None] * n, None, x)

    with file.open("wb") as out:
        write_table(out, groups(), features=features, dtype=dtype, labelled=False, about={})


def timed(action: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """The result of the action, and the seconds of its fastest run."""
    fastest, value = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        value = action()
        fastest = min(fastest, time.perf_counter() - start)
    return value, fastest


def query(features: int) -> torch.Tensor:
    return torch.randn(1, features, generator=torch.Generator().manual_seed(1))


def ours(file: Path, repeats: int) -> tuple[list[int], float]:
    """Our search, including opening the file."""

    def action() -> list[int]:
        table = open_table(file)
        return nearest(table, query(table.features), TOP)[1][0].tolist()

    return timed(action, repeats)


def with_pyarrow(file: Path, repeats: int) -> tuple[list[int], float]:
    """Decode the column as usual, then take one product; all vectors must fit into memory."""
    import pyarrow.parquet as pq

    def action() -> list[int]:
        column = pq.read_table(file, columns=[EMBEDDING], memory_map=True).column(0)
        width = column.type.list_size
        x = np.concatenate([part.flatten().to_numpy() for part in column.chunks])
        x = x.reshape(-1, width).astype(np.float32, copy=False)
        cosine = x @ query(width)[0].numpy() / np.linalg.norm(x, axis=1)
        best = np.argpartition(-cosine, TOP)[:TOP]
        return best[np.argsort(-cosine[best])].tolist()

    return timed(action, repeats)


def with_faiss(file: Path, repeats: int) -> tuple[list[int], float, float]:
    """Search with FAISS's exact index; also returns the seconds it takes to fill."""
    import faiss

    table = open_table(file)
    start = time.perf_counter()
    index = faiss.IndexFlatIP(table.features)
    for _, block in table.blocks():
        index.add(F.normalize(block).numpy())
    built = time.perf_counter() - start
    normal = F.normalize(query(table.features)).numpy()
    rows, seconds = timed(lambda: index.search(normal, TOP)[1][0].tolist(), repeats)
    return rows, seconds, built


def _status(field: str) -> float:
    """A field of /proc/self/status in MiB; NaN on systems other than Linux."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(found[0]) / 2**10 if found else float("nan")


def _memory(file: Path, answer: Any) -> None:
    table = open_table(file)
    query(table.features) @ query(table.features).T  # sets up what a first product needs
    before = _status("VmRSS")
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # forget the peak so far
    nearest(table, query(table.features), TOP)
    answer.put(_status("VmHWM") - before)


def memory(file: Path) -> float:
    """MiB that a search adds to its process; the file is not memory-mapped."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_memory, args=(file, answer))
    process.start()
    mib = float(answer.get())
    process.join()
    return mib


def measure(file: Path, repeats: int) -> list[dict[str, Any]]:
    """Measure all ways to search one file."""
    expected, seconds = ours(file, repeats)
    rows = [{"name": "barlow search", "seconds": seconds, "mib": memory(file), "remark": ""}]
    if file.stat().st_size < 0.4 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        found, seconds = with_pyarrow(file, 1)
        assert found == expected
        rows.append({"name": "pyarrow and NumPy", "seconds": seconds, "remark": "all in memory"})
        try:
            found, seconds, built = with_faiss(file, repeats)
            assert found == expected
            remark = f"all in memory; {built:.1f} s to fill the index"
            rows.append({"name": "FAISS IndexFlatIP", "seconds": seconds, "remark": remark})
        except ImportError:
            print("faiss is not installed: pip install faiss-cpu")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="where the file may be kept")
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    record: dict[str, Any] = {
        "command": " ".join(["python benchmarks/search.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "environment": environment(),
        "images": args.images,
        "features": args.features,
        "load_before": os.getloadavg()[0],
        "files": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for dtype in ("float32", "float16"):
            file = folder / f"random-{args.images}x{args.features}-{dtype}.parquet"
            if not file.exists():
                write(file, args.images, args.features, dtype)
            record["files"][dtype] = rows = measure(file, args.repeats)
            lines = [[f"{args.images} x {args.features} {dtype}", "seconds", "MiB", ""]]
            lines += [
                [
                    r["name"],
                    f"{r['seconds']:.3f}",
                    f"{r['mib']:.0f}" if "mib" in r else "",
                    r["remark"],
                ]
                for r in rows
            ]
            print(text_table(lines), "\n")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"search-{date.today().isoformat()}.json"
    file.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
