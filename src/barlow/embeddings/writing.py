"""Embeddings of any number of images, written to one file by any number of processes."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from barlow.atomic import write_csv
from barlow.data import Source, open_source, preprocess_of
from barlow.embeddings.images import fingerprint_of_images
from barlow.embeddings.parts import Part, Skipped, begin, join, parts_of
from barlow.embeddings.table import open_table
from barlow.errors import UserError
from barlow.evaluation.features import fingerprint_of, stream_features
from barlow.progress import Reporter, reporting
from barlow.ranks import Devices, create_fabric, divide_threads, launch, local_world_size
from barlow.share import load_encoder

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_VERSION = 1  # of the file format
# Metadata that must agree in two files of the same embeddings, and the message if it differs.
_SAME = {
    "version": "were written by another program or version",
    "encoder": "come from another encoder",
    "images": "come from other images",
    "dtype": "have another precision",
}


def write_embeddings(
    encoder: str,
    source: str,
    out: str,
    *,
    half: bool = False,
    batch_size: int = 256,
    limit: int | None = None,
    max_broken: float = 0.05,
    accelerator: str = "auto",
    devices: int = 1,
    reporter: Reporter | None = None,
) -> None:
    """Compute the representation of every image of a source and write them to a Parquet file.

    Call it again after an interruption to resume.

    Args:
        encoder: a run, a checkpoint, a timm folder, or anything else that `load_encoder` takes.
        source: source of the images; `::split` at its end picks one split.
        out: Parquet file to write: id, path, label (if any) and embedding of each image.
        half: write float16 instead of float32, for half the file size.
        batch_size: images per batch, on each device.
        limit: use only the first N images.
        max_broken: largest share of unreadable images.
        accelerator: device type: auto, cpu, cuda or mps.
        devices: processes on this machine, one per device.
        reporter: receives progress updates.

    Raises:
        UserError: if there is no such encoder or source, `out` holds something else, or too many
            images cannot be read.
    """
    if Path(out).suffix != ".parquet":
        raise UserError(
            f"embeddings are written as Parquet: name the file {Path(out).stem}.parquet"
        )
    for name, value in (("batch size", batch_size), ("devices", devices)):
        if value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1")
    asked = Devices(accelerator, devices)
    task = partial(
        _write,
        asked=asked,
        encoder=encoder,
        open_images=partial(open_source, source, limit=limit, max_broken=max_broken),
        out=Path(out),
        dtype="float16" if half else "float32",
        batch_size=batch_size,
        reporter=reporter,
    )
    # The timeout is long because processes wait for each other only at the end, after their parts.
    launch(create_fabric(asked, timedelta(days=7)), task)


def _write(
    fabric: "Fabric",
    asked: Devices,
    encoder: str,
    open_images: Callable[..., Source],
    out: Path,
    dtype: str,
    batch_size: int,
    reporter: Reporter | None,
) -> None:
    reporter = reporter if fabric.is_global_zero and reporter else Reporter()
    divide_threads(local_world_size(asked))
    model = load_encoder(encoder)
    images = open_images(in_chans=preprocess_of(model).in_chans)
    about = {
        "version": _VERSION,
        "encoder": fingerprint_of(model),
        "images": fingerprint_of_images(images),
        "dtype": dtype,
        "source": images.name,
        "limit": len(images),
        "preprocess": preprocess_of(model).to_dict(),
    }
    folder = out.with_name(f"{out.name}.part")
    if out.exists():
        _require_same_embeddings(out, about)
        shutil.rmtree(folder, ignore_errors=True)
        reporter.say(f"{out} is finished: it already has the embeddings of these images")
        return
    begin(folder, {**about, "batch_size": batch_size})
    parts = parts_of(len(images), batch_size, folder)
    # Parts are assigned by number alone: ranks need not agree on which files already exist.
    mine = parts[fabric.global_rank :: fabric.world_size]
    todo = [part for part in mine if not part.file.exists()]
    model.to(fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    start, done = time.monotonic(), len(mine) - len(todo)
    with reporting(reporter, done, len(mine), "part"):
        skipped = sum(len(part.skipped()) for part in set(mine) - set(todo))
        for part, x, rows, broken in _compute_parts(model, images, todo, batch_size, skipped):
            part.save(_cast(x, dtype), rows, broken)
            reporter.step(done := done + 1)
        fabric.barrier()
    if not fabric.is_global_zero:
        return
    count = join(parts, images, out, about)
    seconds = time.monotonic() - start
    reporter.say(f"{count} images embedded in {seconds:.0f} s: {out}")
    if images.skipped:
        listed = out.with_suffix(".skipped.csv")
        write_csv(listed, ["id", "reason"], images.skipped)
        reporter.say(f"{len(images.skipped)} image(s) cannot be read, see {listed}")


def _compute_parts(
    model: nn.Module, images: Source, todo: Sequence[Part], batch_size: int, skipped: int
) -> Iterator[tuple[Part, Tensor, Tensor, Skipped]]:
    """Compute one part after another; the next one's images are read while this one is encoded."""
    if not todo:
        return
    rows = torch.cat([torch.arange(part.start, part.stop) for part in todo])
    source = images.part(rows)
    source.max_broken = max(0.0, images.max_broken * len(images) - skipped) / len(source)
    listed = 0  # how many of the source's broken images belong to earlier parts

    def complete(part: Part) -> tuple[Part, Tensor, Tensor, Skipped]:
        nonlocal listed
        read = torch.cat([at for _, at in found]) if found else torch.empty(0, dtype=torch.int64)
        x = torch.cat([y for y, _ in found]) if found else torch.empty(0, 0)
        good = set(read.tolist())
        missing = [row for row in range(part.start, part.stop) if row not in good]
        reasons = [reason for _, reason in source.skipped[listed : listed + len(missing)]]
        listed += len(missing)
        return part, x, read, list(zip(missing, reasons, strict=True))

    waiting = iter(todo)
    part, found = next(waiting), list[tuple[Tensor, Tensor]]()
    for y, at in stream_features(model, source, batch_size):
        while rows[at[0]] >= part.stop:
            yield complete(part)
            part, found = next(waiting), []
        found.append((y, rows[at]))
    yield complete(part)
    found = []
    for part in waiting:  # parts of which no image could be read
        yield complete(part)


def _cast(x: Tensor, dtype: str) -> Tensor:
    x = x.to(getattr(torch, dtype))
    if not x.isfinite().all():
        raise UserError("some features are too large for float16: drop --half")
    return x


def _require_same_embeddings(out: Path, about: dict[str, Any]) -> None:
    found = open_table(out).about
    for key, what in _SAME.items():
        if found.get(key) != about[key]:
            raise UserError(f"the embeddings in {out} {what}: give another --out, or remove it")
