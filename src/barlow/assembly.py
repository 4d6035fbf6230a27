"""Builds the parts of a training from its settings: model, optimiser, views, loaders."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from barlow import address
from barlow.data import (
    Loader,
    Preprocess,
    Source,
    open_held_out,
    open_source,
    preprocess_of,
)
from barlow.data.decode import BrokenImage
from barlow.encoders import create_encoder, spec_of
from barlow.errors import UserError, one_line
from barlow.loss import BarlowTwinsLoss
from barlow.model import BarlowTwins
from barlow.muon import Muon
from barlow.optim import LARS, parameter_groups
from barlow.settings import Settings
from barlow.share.building import LoadedEncoder
from barlow.share.loading import load_with_projector
from barlow.share.projectors import start_projector
from barlow.views import TwoViews, draw_views

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class TrainingParts(NamedTuple):
    """The parts of a training, as its settings define them.

    Attributes:
        model: encoder, projector and loss.
        preprocess: what an image goes through before it reaches the trained encoder.
        optimizer: of the model's parameters.
        loader: this rank's views of the training images.
        validation: this rank's views of held-out images, if there are any.
    """

    model: BarlowTwins
    preprocess: Preprocess
    optimizer: Optimizer
    loader: Loader
    validation: Loader | None


def assemble(fabric: "Fabric", settings: Settings) -> TrainingParts:
    """Build the parts of a training on this rank; the settings' seed initialises the model."""
    torch.manual_seed(settings.seed)
    model, preprocess = build_model(settings)
    optimizer = build_optimizer(model, settings)
    views = build_views(settings, preprocess).to(fabric.device)
    loader = training_loader(fabric, settings, views)
    validation = validation_loader(fabric, settings, views)
    return TrainingParts(model, preprocess, optimizer, loader, validation)


def build_model(settings: Settings) -> tuple[BarlowTwins, Preprocess]:
    """Build encoder, projector and loss, and what an image goes through before the encoder.

    `encoder.origin` has a line on each part that does not start from random weights.
    """
    start, colours = _starting_encoder(settings)
    encoder = start.encoder
    _check_image_sizes(encoder, settings)
    size = settings.eval_size or settings.image_size
    preprocess = Preprocess(size, in_chans=settings.channels, **colours)
    encoder.preprocess = preprocess
    criterion = BarlowTwinsLoss(
        settings.lambd,
        scale=settings.loss_scale,
        off_diagonal_target=settings.off_diagonal_target,
        equal_batches=True,
    )
    model = BarlowTwins(encoder, settings.projector, criterion=criterion)
    if settings.init:
        lines = [start.origin, start_projector(model.projector, start.projector)]
        encoder.origin = "\n".join(line for line in lines if line)  # type: ignore[assignment]
    return model.to(memory_format=torch.channels_last), preprocess


def _starting_encoder(settings: Settings) -> tuple[LoadedEncoder, dict[str, Any]]:
    """The encoder that training starts from, and the `mean` and `std` that it was trained with.

    Without trained weights the dictionary is empty: `Preprocess` then takes its own defaults.
    """
    if settings.init:
        start = load_with_projector(settings.init)
        in_chans = spec_of(start.encoder).in_chans
        if in_chans != settings.channels:
            raise UserError(
                f"--init {settings.init} expects {in_chans} channel(s), but "
                f"--channels is {settings.channels}: the two must match"
            )
        preprocess = preprocess_of(start.encoder)
        return start, {"mean": preprocess.mean, "std": preprocess.std}
    encoder = create_encoder(
        settings.encoder,
        settings.image_size,
        settings.channels,
        settings.pretrained,
        stem=settings.stem,
        pool=settings.pool,
        stages=settings.stages,
        **settings.encoder_args,
    )
    if settings.pretrained and settings.channels == 3:
        config: Any = encoder.pretrained_cfg
        return LoadedEncoder(encoder), {"mean": config["mean"], "std": config["std"]}
    return LoadedEncoder(encoder), {}


def build_optimizer(model: nn.Module, settings: Settings) -> Optimizer:
    """Build the optimiser; the schedule multiplies each group's `base_lr` by its factor."""
    # Linear scaling (paper, section 2.2), but not for Adam and Muon, whose steps do not grow with
    # the gradient.
    scale = 1.0 if settings.optimizer in ("adamw", "muon") else settings.batch_size / 256
    lr, lr_bias_norm = settings.rates
    groups = parameter_groups(
        model,
        lr=lr * scale,
        lr_bias_norm=lr_bias_norm * scale,
        weight_decay=settings.weight_decay,
    )
    groups = [g | {"base_lr": g["lr"]} for g in groups if g["params"]]
    if settings.optimizer == "lars":
        return LARS(
            groups,
            lr,
            momentum=settings.momentum,
            eta=settings.lars_eta,
            clip=settings.lars_clip,
        )
    if settings.optimizer == "muon":
        return Muon(groups, lr, momentum=settings.momentum)
    for group in groups:
        del group["lars_exclude"]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr, momentum=settings.momentum)
    return torch.optim.AdamW(groups, lr, betas=(settings.momentum, 0.999))


def build_views(settings: Settings, preprocess: Preprocess) -> TwoViews:
    """The two view distributions, normalised like the images that the encoder will see later."""
    return TwoViews(
        settings.image_size,
        preset=settings.view_preset,
        in_chans=settings.channels,
        mean=preprocess.mean,
        std=preprocess.std,
        view1=settings.view1,
        view2=settings.view2,
    )


def training_images(settings: Settings) -> Source:
    """The images to train on."""
    return open_source(
        settings.source,
        "train",
        in_chans=settings.channels,
        limit=settings.limit,
        max_broken=settings.max_broken,
    )


def validation_images(settings: Settings) -> Source | None:
    """The images that the validation loss is computed on, if there are any."""
    if settings.validation:
        images = open_source(settings.validation, "test", in_chans=settings.channels)
    elif found := open_held_out(settings.source, in_chans=settings.channels):
        images = found
    else:
        return None
    images.max_broken = settings.max_broken
    return images.spread(settings.validation_limit)


def training_loader(fabric: "Fabric", settings: Settings, views: TwoViews) -> Loader:
    """This rank's part of the training images."""
    images = training_images(settings)
    return _loader(fabric, settings, images, views, settings.batch_size)


def validation_loader(fabric: "Fabric", settings: Settings, views: TwoViews) -> Loader | None:
    """This rank's part of the images that the validation loss is computed on, if there are any."""
    images = validation_images(settings)
    if images is None:
        return None
    batch_size = min(settings.batch_size, len(images))
    batch_size -= batch_size % fabric.world_size
    if batch_size < 2 * fabric.world_size:
        return None
    return _loader(fabric, settings, images, views, batch_size)


def draw_source_views(settings: Settings, out: Path, count: int = 8) -> Path:
    """Draw a picture of some of a source's images and their two views.

    Args:
        settings: only those of the source, the sizes, the views and the seed are used.
        out: PNG file to write.
        count: images to show, spread over the source.

    Returns:
        The file.

    Raises:
        UserError: if none of the images can be read.
    """
    images = open_source(settings.source, "train", in_chans=settings.channels, limit=settings.limit)
    rows = torch.linspace(0, len(images) - 1, min(count, len(images))).long().tolist()
    preprocess = Preprocess(settings.image_size, in_chans=settings.channels)
    shown = []
    for row in rows:
        with suppress(BrokenImage):
            shown.append(images[row])
    if not shown:
        raise UserError(f"{images.name}: none of {len(rows)} images could be read")
    return draw_views(shown, build_views(settings, preprocess), out, address.key(settings.seed))


@torch.no_grad()
def _check_image_sizes(encoder: nn.Module, settings: Settings) -> None:
    """Raise UserError if the encoder cannot process images of the sizes in the settings."""
    encoder.eval()
    try:
        for size in (settings.image_size, settings.eval_size or settings.image_size):
            encoder(torch.zeros(1, settings.channels, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"encoder {settings.init or settings.encoder} cannot process images of {size} pixels "
            f"({one_line(error)}): use another size, such as "
            f"{max(32, round(size / 32) * 32)}"
        ) from error
    encoder.train()


def _loader(
    fabric: "Fabric", settings: Settings, images: Source, views: TwoViews, batch_size: int
) -> Loader:
    return Loader(
        images,
        views,
        batch_size,
        seed=settings.seed,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        device=fabric.device,
        workers=settings.workers,
    )
