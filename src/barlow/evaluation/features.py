"""Computing features: the encoder runs over each image once, and the result is cached."""

import contextlib
import copy
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from barlow.data import Source, eval_batches, preprocess_of
from barlow.data.decode import BrokenImage
from barlow.data.fingerprints import content_hash
from barlow.data.source import hash_of
from barlow.distributed import gather_objects, rank, world_size
from barlow.errors import UserError
from barlow.evaluation import feature_cache
from barlow.progress import log_if_slow
from barlow.ranks import (
    Devices,
    create_fabric,
    divide_threads,
    externally_launched,
    launch,
    local_world_size,
)

if TYPE_CHECKING:
    from lightning_fabric import Fabric

log = logging.getLogger(__name__)

_VERSION = 2  # of the computation in `Preprocess`


def features_of(
    encoder: nn.Module,
    source: Source,
    rows: Tensor | None = None,
    *,
    batch_size: int = 256,
    cache: Path | None = None,
    devices: int = 1,
) -> tuple[Tensor, Tensor]:
    """Run the frozen encoder over images, or read its features from the cache.

    The encoder is in eval mode meanwhile and nothing in it changes, not even the running statistics
    of batch norm.

    Args:
        encoder: `(N, C, H, W) -> (N, F)`, with its `preprocess`.
        source: the images.
        rows: which of them, int64; default all.
        batch_size: images at a time.
        cache: folder of cached features, or None for no cache. The key is a hash of the weights,
            the images and the preprocessing.
        devices: processes to start on this machine, which share the images; in a process group,
            the ranks share them in any case.

    Returns:
        Features `(M, F)` float32 on the CPU and the rows `(M,)` they belong to: those asked for,
        without those that could not be read.

    Raises:
        UserError: if the encoder has no `preprocess`, or its output is not finite or not `(N, F)`.
    """
    preprocess_of(encoder)
    rows = torch.arange(len(source)) if rows is None else rows
    part = source.part(rows)
    path = None
    if cache is not None:
        path = cache / f"{_fingerprint(encoder, part)}.safetensors"
        found = feature_cache.load(path)
        if found is not None and _more_to_read(part, found[1]):
            found = None
        # Either all ranks read the cache or all compute, as each machine may have its own folder.
        if all(gather_objects(found is not None)) and found is not None:
            return found[0], rows[found[1]]
    if devices > 1 and world_size() == 1 and not externally_launched():
        x, read = _extract_by_processes(encoder, part, batch_size, devices)
    else:
        x, read = _extract_together(encoder, part, batch_size)
    if path is not None and rank() == 0:
        feature_cache.save(path, x, read)
    return x, rows[read]


def warn_unread(source: Source, rows: Tensor, read: Tensor) -> None:
    """Warn of the rows of a source that are not among those that were read."""
    lost = rows[~torch.isin(rows, read)]
    if len(lost):
        log.warning(
            "%s: %d of %d images cannot be read and are skipped, first: %s",
            *(source.name, len(lost), len(rows), source.ids[int(lost[0])]),
        )


def _more_to_read(source: Source, read: Tensor) -> bool:
    """Whether an image that could not be read for the cache can be now, its size and time equal."""
    rows = torch.arange(len(source))
    for row in rows[~torch.isin(rows, read)].tolist():
        with contextlib.suppress(BrokenImage):
            source[row]
            return True
    return False


def _extract_together(encoder: nn.Module, source: Source, batch_size: int) -> tuple[Tensor, Tensor]:
    """`extract` with the images divided among the ranks; every rank gets all features."""
    rows = torch.arange(rank(), len(source), world_size())
    if len(rows) == len(source):
        return extract(encoder, source, batch_size)
    mine = (torch.empty(0), rows)
    if len(rows):
        x, read = extract(encoder, source.part(rows), batch_size)
        mine = (x, rows[read])
    found = gather_objects(mine)
    x, rows = torch.cat([x for x, _ in found]), torch.cat([r for _, r in found])
    order = rows.argsort()
    return x[order], rows[order]


def _extract_by_processes(
    encoder: nn.Module, source: Source, batch_size: int, devices: int
) -> tuple[Tensor, Tensor]:
    """`extract` with the images divided among processes that are started for it."""
    asked = Devices(device_of(encoder).type, devices)
    with tempfile.TemporaryDirectory() as folder:
        task = partial(
            _extract_share,
            asked=asked,
            # Each process moves it to its own device; if it were on a GPU, all would open it there.
            encoder=encoder if asked.accelerator == "cpu" else copy.deepcopy(encoder).cpu(),
            source=source,
            batch_size=batch_size,
            folder=folder,
            aloud=logging.getLogger("barlow.progress").isEnabledFor(logging.INFO),
        )
        launch(create_fabric(asked), task)
        shares = [torch.load(file, weights_only=True) for file in Path(folder).iterdir()]
    for row, reason in sorted(broken for share in shares for broken in share["broken"]):
        source.skip(row, reason)
    rows = torch.cat([share["rows"] for share in shares])
    if not len(rows):
        raise UserError(f"{source.name}: no image could be read")
    x = torch.cat([share["features"] for share in shares if len(share["rows"])])
    order = rows.argsort()
    return x[order], rows[order]


def _extract_share(
    fabric: "Fabric",
    asked: Devices,
    encoder: nn.Module,
    source: Source,
    batch_size: int,
    folder: str,
    aloud: bool,
) -> None:
    divide_threads(local_world_size(asked))
    if aloud:  # a new process does not have the parent's logging configuration
        logging.basicConfig(format="barlow: %(message)s")
        logging.getLogger("barlow.progress").setLevel(logging.INFO)
    rows = torch.arange(fabric.global_rank, len(source), fabric.world_size)
    share = source.part(rows)
    share.max_broken = 1.0  # whether too many are broken is checked over all shares
    found = list(_features(encoder.to(fabric.device), share, batch_size))
    read = torch.cat([rows[:0], *(rows[at] for _, at in found)])
    unread = rows[~torch.isin(rows, read)].tolist()
    content = {
        "features": torch.cat([y for y, _ in found]) if found else None,
        "rows": read,
        "broken": [(row, why) for row, (_, why) in zip(unread, share.skipped, strict=True)],
    }
    torch.save(content, Path(folder) / str(fabric.global_rank))


def extract(encoder: nn.Module, source: Source, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """`features_of` without cache, for all images of a source."""
    x, read = torch.empty(0), list[Tensor]()
    for y, rows in _features(encoder, source, batch_size):
        if not read:  # one tensor from the start, as joining batches would take twice the memory
            x = torch.empty(len(source), y.shape[1])
        start = sum(len(rows) for rows in read)
        x[start : start + len(rows)] = y
        read.append(rows)
    if not read:
        raise UserError(f"{source.name}: no image could be read")
    indices = torch.cat(read)
    return x[: len(indices)], indices


def _features(
    encoder: nn.Module, source: Source, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    spec = getattr(encoder, "spec", None)
    by = f" with {spec.name}" if spec else ""
    return with_progress(
        stream_features(encoder, source, batch_size),
        f"computing features of {len(source):,} images of {source.name}{by}",
    )


def with_progress(
    batches: Iterable[tuple[Tensor, Tensor]], what: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches, whose second part is their rows; the first rank logs the progress."""
    if rank():
        yield from batches
        return
    each = f" (process 1 of {world_size()})" if world_size() > 1 else ""
    with log_if_slow(what + each) as reached:
        for batch in batches:
            yield batch
            reached(f"{int(batch[1][-1]) + 1:,} done")


def stream_features(
    encoder: nn.Module, source: Source, batch_size: int = 256
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the features of one batch of images after another; `eval_batches` decodes them.

    The encoder is in eval mode meanwhile.

    Yields:
        Features `(B, F)` float32 on the CPU and the rows `(B,)` of the source they belong to.
    """
    preprocess = preprocess_of(encoder)
    device = device_of(encoder)
    with evaluating(encoder):
        for images, rows in eval_batches(source, preprocess, batch_size, device=device):
            with torch.inference_mode():
                y = encoder(images).float().cpu()
            if y.ndim != 2:
                raise UserError(
                    f"the encoder returned shape {tuple(y.shape)} for {len(rows)} images, expected "
                    "(images, features): create it with pooling and without a classifier"
                )
            if not y.isfinite().all():
                raise UserError(
                    "the encoder's features are not finite: its training diverged; use an earlier "
                    "checkpoint or train with a lower learning rate"
                )
            yield y, rows


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set eval mode; afterwards, or after an error, restore the mode of every submodule."""
    was_training = [submodule for submodule in module.modules() if submodule.training]
    module.eval()
    try:
        yield
    finally:
        for submodule in was_training:
            submodule.training = True


def device_of(encoder: nn.Module) -> torch.device:
    """The device of an encoder; the CPU if it has no weights."""
    return next((p.device for p in encoder.parameters()), torch.device("cpu"))


def resolve_encoder(encoder: str | Path | nn.Module, accelerator: str) -> nn.Module:
    """Return a module unchanged; load anything else onto a device of the accelerator."""
    if isinstance(encoder, nn.Module):
        return encoder
    from barlow.share import load_encoder

    device = select_device(accelerator)
    return load_encoder(encoder).to(device)


def select_device(accelerator: str) -> torch.device:
    """A device of an accelerator; each process that torchrun or SLURM started has its own.

    Raises:
        UserError: if this machine has no such accelerator.
    """
    device = create_fabric(Devices(accelerator)).device
    if device.type == "cuda":
        torch.cuda.set_device(device)  # collectives gather objects on the current device
    return device


def cache_folder() -> Path:
    """Where features are cached: $BARLOW_CACHE, by default ~/.cache/barlow/features."""
    return Path(os.environ.get("BARLOW_CACHE") or "~/.cache/barlow/features").expanduser()


def _fingerprint(encoder: nn.Module, source: Source) -> str:
    return hash_of([fingerprint_of(encoder), content_hash(source)])


def fingerprint_of(encoder: nn.Module) -> str:
    """A hash of an encoder: its modules, its weights and its preprocessing."""
    digest = hashlib.sha256()
    # The modules' repr too, as two encoders may share all weights and differ in an activation.
    digest.update(f"{_VERSION}\n{encoder}\n{encoder.preprocess}".encode())
    spec = getattr(encoder, "spec", None)
    if spec is not None and spec.uses_feature_maps:  # the repr does not say which maps are used
        digest.update(f"\n{spec.pool} {spec.stages}".encode())
    for name, value in encoder.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
