"""The health of a representation, measured without labels."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from barlow.address import HEALTH_VIEWS, key
from barlow.data import Preprocess, Source, open_source, preprocess_of
from barlow.data.decode import BrokenImage
from barlow.data.source import spread
from barlow.errors import UserError
from barlow.evaluation.baselines import with_baselines
from barlow.evaluation.features import (
    cache_folder,
    device_of,
    evaluating,
    features_of,
    resolve_encoder,
    warn_unread,
)
from barlow.evaluation.result import Result, Row
from barlow.evaluation.spectrum import (
    alignment,
    alpha_req,
    effective_rank,
    lidar,
    mean_off_diagonal,
    rankme,
    spectrum,
    uniformity,
)
from barlow.run import Run
from barlow.settings import default_preset
from barlow.views import TwoViews

_PAIRS = 2_000  # images for uniformity, which compares all pairs of them
_VIEWED = 500  # images for LiDAR and alignment


def health(
    encoder: str | Path | nn.Module,
    train: str,
    *,
    baseline: str | None = None,
    images: int = 5_000,
    views: int = 10,
    preset: str | None = None,
    seed: int = 0,
    batch_size: int = 256,
    cache: bool = True,
    accelerator: str = "auto",
    devices: int = 1,
) -> Result:
    """Measure a representation without labels: RankMe, LiDAR, uniformity, alignment and others.

    Args:
        encoder: a run, a checkpoint, a timm folder, anything else that `load_encoder` takes, or a
            module with a `preprocess` attribute.
        train: source of the images, labelled or not (its training split, if it has splits;
            "SOURCE::test" gives the test split).
        baseline: also measure, in the same table: "random" (the same architecture, untrained),
            "pixels", "supervised" (timm's weights, downloaded), or several, separated by commas.
        images: maximum number of images, spread evenly over the source.
        views: number of views of each of 500 images, for LiDAR and alignment; at least 2.
        preset: preset of these views; default: the views of the run, else "small" up to 64 pixels
            and "paper" above.
        seed: random seed of the views and the random baseline.
        batch_size: images per batch.
        cache: cache features in $BARLOW_CACHE (default: ~/.cache/barlow/features).
        accelerator: device type: auto, cpu, cuda or mps. A module stays on its device.
        devices: processes on this machine that share the images, one per device.

    Returns:
        The numbers of `barlow.evaluation.spectrum`; each row's `chosen` has the spectrum.

    Raises:
        UserError: if there are fewer than three images, or an option is out of range.
    """
    if views < 2 or images < 3:
        raise UserError(
            f"health of {images} images with {views} views: give at least 3 images and 2 views"
        )
    module = resolve_encoder(encoder, accelerator)
    source = open_source(train, "train", in_chans=preprocess_of(module).in_chans)
    chosen = source.spread(images)
    if len(chosen) < 3:
        raise UserError(f"{train} has {len(chosen)} images: health needs three or more")
    folder = cache_folder() if cache else None
    rows = list[Row]()
    for name, make in with_baselines(module, baseline):
        one = make(seed)
        two_views = _two_views(encoder, preprocess_of(one), preset)
        x, read = features_of(one, chosen, batch_size=batch_size, cache=folder, devices=devices)
        if not rows:
            warn_unread(chosen, torch.arange(len(chosen)), read)
        drawn = _features_of_views(one, chosen.spread(_VIEWED), two_views, views, seed)
        rows.append(_row(name, x, drawn))
    data = {"name": train, "images": len(chosen), "fingerprint": chosen.fingerprint}
    return Result("health", tuple(rows), data={"train": data})


def _row(name: str, x: Tensor, drawn: Tensor) -> Row:
    values = {
        "features": float(x.shape[1]),
        "RankMe": rankme(x),
        "effective rank": effective_rank(x),
        "alpha-ReQ": alpha_req(x),
        "LiDAR": lidar(drawn),
        "uniformity": uniformity(x[spread(len(x), _PAIRS)]),
        "alignment": alignment(drawn[:, 0], drawn[:, 1]),
        "off-diagonal": mean_off_diagonal(x),
    }
    return Row(name, values, chosen={"spectrum": [float(f"{v:.6g}") for v in spectrum(x).tolist()]})


def _two_views(
    encoder: str | Path | nn.Module, preprocess: Preprocess, preset: str | None
) -> TwoViews:
    """The views of the preset asked for, else those of the run, else those of a default preset."""
    changes: dict[str, Any] = {}
    if preset is None:
        preset = default_preset(preprocess.image_size)
        if not isinstance(encoder, nn.Module) and (run := Run(Path(encoder))).config_file.exists():
            settings = run.settings()
            preset = settings.view_preset
            changes = {"view1": settings.view1, "view2": settings.view2}
    return TwoViews(
        preprocess.image_size,
        preset,
        in_chans=preprocess.in_chans,
        mean=preprocess.mean,
        std=preprocess.std,
        **changes,
    )


def _features_of_views(
    encoder: nn.Module, source: Source, two_views: TwoViews, views: int, seed: int
) -> Tensor:
    """Features of V views of each image, `(N, V, F)`; first and second views alternate."""
    device = device_of(encoder)
    found = []
    with evaluating(encoder):
        for start in range(0, len(source), 100):
            images, position = [], []
            for i in range(start, min(start + 100, len(source))):
                try:
                    images.append(source[i])
                    position.append(i)
                except BrokenImage as error:
                    source.skip(i, str(error))
            if not images:
                continue
            at = torch.tensor(position)
            of_batch: list[Tensor] = []
            for pair in range((views + 1) // 2):
                stream = key(seed, HEALTH_VIEWS, pair)
                crops = two_views.crop(images, stream, at)
                for view in two_views.finish(*crops, stream, at):  # (n, C, S, S)
                    with torch.inference_mode():
                        of_batch.append(encoder(view.to(device)).float().cpu())
            found.append(torch.stack(of_batch[:views], 1))  # (n, V, F)
    return torch.cat(found).clone()
