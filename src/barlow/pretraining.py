"""The training loop: two views, a loss, a step; readable from top to bottom."""

import logging
import math
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor, nn
from torch.optim import Optimizer

from barlow import address
from barlow.checkpoint import load_last, save_checkpoint, save_last, write_text
from barlow.data import Loader, Preprocess, Source, open_held_out, open_source
from barlow.encoders import create_encoder, spec_of
from barlow.errors import TrainingError, UserError
from barlow.loss import BarlowTwinsLoss
from barlow.model import BarlowTwins
from barlow.optim import LARS, parameter_groups, warmup_cosine
from barlow.ranks import create_fabric, share_threads, synchronised, synchronised_batch_norm
from barlow.run import Run, open_run
from barlow.settings import Settings
from barlow.share import load_encoder, save_encoder
from barlow.signals import stop_on_signals
from barlow.views import TwoViews

if TYPE_CHECKING:
    from lightning_fabric import Fabric

log = logging.getLogger(__name__)

TERMS = ("loss", "invariance", "redundancy", "diagonal_error", "off_diagonal_rms")


class Reporter:
    """Told how a training goes on; this one says nothing, the command line's draws a bar."""

    def start(self, step: int, steps: int) -> None:
        """The training begins at `step` of `steps`."""

    def step(self, step: int) -> None:
        """So many steps are done."""

    def row(self, row: dict[str, float]) -> None:
        """A row was added to `metrics.csv`."""

    def end(self) -> None:
        """The training is over, well or not."""


def pretrain(
    source: str,
    out: str | Path,
    *,
    recipe: str | Path | None = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> Run:
    """Pretrain an encoder with Barlow Twins on unlabelled images.

    Called again on an unfinished run, it goes on where that stopped.

    Args:
        source: where the images come from: a folder, Parquet files, or a name such as "cifar10".
        out: folder of the run; new, empty, or an unfinished run with the same settings.
        recipe: name of a shipped recipe or path of a YAML file; its values are the defaults.
        reporter: told of the progress.
        **settings: fields of `barlow.Settings`, such as `epochs=100` or `batch_size=256`.

    Returns:
        The run; `run.encoder()` is the trained encoder.

    Raises:
        UserError: if something asked for cannot be; nothing has been written then.
        TrainingError: if the loss is not finite any more, or a signal ended the training.

    Example:
        >>> import barlow, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = barlow.pretrain("mnist5k", f"{folder}/run", recipe="demo",
        ...                           epochs=1, limit=256, batch_size=64)
        ...     run.encoder().num_features > 0
        True
    """
    return train(Settings.of(source, recipe, **settings), out, reporter)


def train(settings: Settings, out: str | Path, reporter: Reporter | None = None) -> Run:
    """`pretrain` with settings that are already put together."""
    run, _ = open_run(out, settings)
    fabric = create_fabric(settings)
    try:
        fabric.launch(_train, settings, run, reporter)
    except Exception as error:
        raise _told_by_a_child(error) or error from None
    return run


def _train(fabric: "Fabric", settings: Settings, run: Run, reporter: Reporter | None) -> None:
    share_threads(settings.devices)
    torch.manual_seed(settings.seed)
    images = open_source(
        settings.source, "train", in_chans=settings.channels, limit=settings.limit
    )
    model, preprocess = _build_model(settings)
    optimizer = _build_optimizer(model, settings)
    views = _build_views(settings, preprocess).to(fabric.device)
    loader = _loader(fabric, settings, images, views, settings.batch_size)
    validation = _validation_loader(fabric, settings, views)
    steps = settings.epochs * loader.steps_per_epoch
    warmup = _warmup_steps(settings, loader.steps_per_epoch)

    means, step, seconds = Means(), 0, 0.0
    if state := load_last(run.last_checkpoint):
        step, seconds = state["step"], state["seconds"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        means.load_state_dict(state["means"])
        log.info("resuming %s at step %d of %d", run.path, step, steps)
    if step >= steps:
        log.info("%s is finished: %d steps are done", run.path, step)
        return
    main = fabric.is_global_zero
    if main:
        _start(run, settings, step)

    model.to(memory_format=torch.channels_last)
    if settings.sync_batch_norm and fabric.world_size > 1:
        model = synchronised(model, fabric.device)
    if settings.compile:
        model.compile()
    wrapped, optimizer = fabric.setup(model, optimizer)
    sync_on_cpu = (
        settings.sync_batch_norm and fabric.world_size > 1 and fabric.device.type == "cpu"
    )

    def checkpoint() -> dict[str, Any]:
        return {
            "format": 1,
            "step": step,
            "seconds": seconds,
            "settings": settings.to_dict(),
            "encoder": spec_of(model.encoder).to_dict(),
            "preprocess": preprocess.to_dict(),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "means": means.state_dict(),
        }

    def save(kept: int | None = None) -> None:
        means.check(step)
        if main:
            _save(run, checkpoint(), model.encoder, kept)

    reporter = reporter if main and reporter else Reporter()
    reporter.start(step, steps)
    tick = saved = logged = time.monotonic()
    logged_step = step
    with stop_on_signals() as stop, synchronised_batch_norm(sync_on_cpu):
        for epoch in range(step // loader.steps_per_epoch, settings.epochs):
            model.train()
            for view1, view2 in loader.epoch(epoch, first_step=step % loader.steps_per_epoch):
                factor = warmup_cosine(step, steps=steps, warmup=warmup, final=settings.final_lr)
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * factor
                # Dropout and the like: by address too, so that a resumed step is the same step.
                torch.manual_seed(address.key(settings.seed, step, fabric.global_rank))

                loss = wrapped(view1, view2)
                fabric.backward(loss)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

                means.add(model.criterion.terms)
                step += 1
                now = time.monotonic()
                seconds, tick = seconds + now - tick, now
                reporter.step(step)

                epoch_ends = step % loader.steps_per_epoch == 0
                if epoch_ends or step % settings.log_every == 0:
                    row = {
                        "step": step,
                        "epoch": step / loader.steps_per_epoch,
                        "seconds": seconds,
                        "images_per_second": (step - logged_step)
                        * settings.batch_size
                        / (now - logged),
                        "lr": optimizer.param_groups[0]["lr"],
                        **means.read(step),
                    }
                    if epoch_ends and validation and (epoch + 1) % settings.eval_every == 0:
                        row |= validate(model, validation)
                    if main:
                        run.add_metrics(row)
                        log.info(describe(row, settings.epochs))
                    reporter.row(row)
                    logged, logged_step = time.monotonic(), step
                if epoch_ends and (epoch + 1) % settings.save_every == 0 and step < steps:
                    save(kept=epoch + 1)
                    saved = now
                elif now - saved > 60 * settings.save_minutes:
                    save()
                    saved = now
                if _stop_asked(fabric, stop.signal):
                    save()
                    raise TrainingError(
                        f"{stop.signal or 'a signal'} at step {step} of {steps}: saved; "
                        "run the same command again to go on"
                    )
        save(kept=settings.epochs)
    reporter.end()
    log.info("finished %s: %d steps in %.0f s", run.path, steps, seconds)


class Means:
    """Means of the loss's terms since they were last read.

    The sums stay on the device, so that no step waits for the one before to finish.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # (5,), in the order of TERMS
        self._count = 0

    def add(self, terms: tuple[Tensor, ...]) -> None:
        """Add one step's terms."""
        values = torch.stack([t.detach().float() for t in terms])
        self._sums = values if self._sums is None else self._sums.to(values.device) + values
        self._count += 1

    def check(self, step: int) -> None:
        """Raise TrainingError if a term is not finite."""
        if self._sums is None:
            return
        for name, value in zip(TERMS, self._sums.tolist(), strict=True):
            if not math.isfinite(value):
                raise TrainingError(
                    f"{name} is {value} at step {step}: the run stops before its checkpoint is "
                    "touched; try a lower --lr, a longer --warmup-epochs or --precision 32"
                )

    def read(self, step: int) -> dict[str, float]:
        """The means; counting starts anew."""
        self.check(step)
        assert self._sums is not None
        means = dict(zip(TERMS, (self._sums / self._count).tolist(), strict=True))
        self._sums, self._count = None, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        """What a resumption needs."""
        return {"sums": self._sums, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._sums, self._count = state["sums"], state["count"]


@torch.no_grad()
def validate(model: BarlowTwins, loader: Loader) -> dict[str, float]:
    """The loss on held-out images, always with the same views: `val_loss` and its terms."""
    model.eval()
    means, steps = Means(), 0
    for view1, view2 in loader.epoch(0):
        model(view1, view2)
        means.add(model.criterion.terms)
        steps += 1
    model.train()
    return {f"val_{name}": value for name, value in means.read(steps).items()}


def describe(row: dict[str, float], epochs: int) -> str:
    """A row of `metrics.csv` as a line of a log."""
    parts = [
        f"epoch {row['epoch']:.2f}/{epochs}",
        f"step {row['step']:.0f}",
        f"loss {row['loss']:.4g}",
        f"invariance {row['invariance']:.4g}",
        f"redundancy {row['redundancy']:.4g}",
    ]
    if "val_loss" in row:
        parts.append(f"validation loss {row['val_loss']:.4g}")
    return ", ".join([*parts, f"{row['images_per_second']:.0f} images/s"])


def _build_model(settings: Settings) -> tuple[BarlowTwins, Preprocess]:
    if settings.init:
        encoder = load_encoder(settings.init)
    else:
        encoder = create_encoder(
            settings.encoder,
            settings.image_size,
            settings.channels,
            settings.pretrained,
            stem=settings.stem,
            **settings.encoder_args,
        )
    preprocess = Preprocess(settings.image_size, in_chans=settings.channels)
    encoder.preprocess = preprocess
    criterion = BarlowTwinsLoss(settings.lambd, scale=settings.loss_scale)
    return BarlowTwins(encoder, settings.projector, criterion=criterion), preprocess


def _build_optimizer(model: nn.Module, settings: Settings) -> Optimizer:
    # Linear scaling (paper, section 3); Adam's steps do not grow with the gradient.
    scale = 1.0 if settings.optimizer == "adamw" else settings.batch_size / 256
    groups = parameter_groups(
        model,
        lr=settings.lr * scale,
        lr_bias_norm=settings.lr_bias_norm * scale,
        weight_decay=settings.weight_decay,
    )
    groups = [g | {"base_lr": g["lr"]} for g in groups if g["params"]]
    if settings.optimizer == "lars":
        return LARS(groups, settings.lr, momentum=settings.momentum)
    for group in groups:
        del group["lars_exclude"]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, settings.lr, momentum=settings.momentum)
    return torch.optim.AdamW(groups, settings.lr, betas=(settings.momentum, 0.999))


def _build_views(settings: Settings, preprocess: Preprocess) -> TwoViews:
    return TwoViews(
        settings.image_size,
        preset=settings.view_preset,
        in_chans=settings.channels,
        mean=preprocess.mean,
        std=preprocess.std,
        view1=settings.view1,
        view2=settings.view2,
    )


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


def _validation_loader(fabric: "Fabric", settings: Settings, views: TwoViews) -> Loader | None:
    limit = settings.validation_limit
    if settings.validation:
        images = open_source(settings.validation, None, in_chans=settings.channels, limit=limit)
    else:
        held_out = open_held_out(settings.source, in_chans=settings.channels, limit=limit)
        if held_out is None:
            return None
        images = held_out
    batch_size = min(settings.batch_size, len(images))
    batch_size -= batch_size % fabric.world_size
    if batch_size < 2:
        return None
    return _loader(fabric, settings, images, views, batch_size)


def _warmup_steps(settings: Settings, steps_per_epoch: int) -> int:
    epochs = min(settings.warmup_epochs, settings.epochs / 10)
    return round(epochs * steps_per_epoch)


def _start(run: Run, settings: Settings, step: int) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    write_text(run.config_file, yaml.safe_dump(settings.to_dict(), sort_keys=False))
    run.forget_metrics_after(step)


def _save(run: Run, state: dict[str, Any], encoder: nn.Module, kept: int | None) -> None:
    try:
        save_last(run.last_checkpoint, state)
        if kept is not None:
            save_checkpoint(run.epoch_checkpoint(kept), state)
            save_encoder(encoder, run.encoder_folder)
    except OSError as error:
        log.warning("cannot save in %s (%s): training goes on and tries again", run.path, error)


def _stop_asked(fabric: "Fabric", signal: str | None) -> bool:
    """Whether any rank was told to stop; all ranks agree on the step."""
    if fabric.world_size == 1:
        return signal is not None
    asked = fabric.all_reduce(torch.tensor(float(signal is not None)), reduce_op="sum")
    return bool(asked > 0)


def _told_by_a_child(error: Exception) -> Exception | None:
    """The one-line error in the traceback that a spawned process left behind, if it is ours."""
    for kind in (UserError, TrainingError):
        told = re.search(rf"^{kind.__module__}\.{kind.__name__}: (.*)$", str(error), re.MULTILINE)
        if told:
            return kind(told[1])
    return None
