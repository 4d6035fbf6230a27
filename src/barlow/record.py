"""What a training writes into its run, and what it does when it cannot write."""

import logging
from typing import TYPE_CHECKING, Any

import yaml
from torch import nn

from barlow.atomic import remove_unfinished, write_text
from barlow.checkpoint import save_checkpoint, save_last
from barlow.data import Source
from barlow.environment import environment
from barlow.errors import TrainingError, UserError, user_error_if_unreadable
from barlow.ranks import all_gather
from barlow.run import Run
from barlow.settings import Settings
from barlow.share import save_encoder

if TYPE_CHECKING:
    from lightning_fabric import Fabric

log = logging.getLogger(__name__)


def require_same_images(run: Run, images: Source) -> None:
    """Raise UserError unless the images are the ones that this run was trained on so far."""
    if not (starts := run.starts()):
        return
    with user_error_if_unreadable(run.starts_file):
        began = starts[-1]["data"]
        name, number, fingerprint = began["name"], began["images"], began["fingerprint"]
    if fingerprint != images.fingerprint:
        raise UserError(
            f"--out {run.path} was trained on {number} images of {name}, but these "
            f"{len(images)} are different: restore the original images, or start from its encoder "
            f"with --init {run.path} and another --out"
        )


def write_start(run: Run, settings: Settings, step: int, images: Source) -> None:
    """Record that a training starts or resumes at a step, and drop what was logged after it.

    Raises:
        UserError: if the folder cannot be written.
    """
    data = {"name": images.name, "images": len(images), "fingerprint": images.fingerprint}
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        for folder in (run.path, run.last_checkpoint.parent):
            remove_unfinished(folder)
        if not step:
            run.clear_untrained(settings)  # while config.yaml is still the old one
        write_text(run.config_file, yaml.safe_dump(settings.to_dict(), sort_keys=False))
        run.truncate_metrics(step)
        run.add_start({"step": step, "data": data, "environment": environment()})
    except OSError as error:
        raise UserError(
            f"cannot write to --out {run.path} ({error}): free up space, or use another folder"
        ) from error


def repair_finished(run: Run, settings: Settings, step: int) -> None:
    """In a finished run, drop a row cut off by a power failure, and update where its images are."""
    try:
        run.truncate_metrics(step)
        was = run.settings()
        if (settings.source, settings.validation) != (was.source, was.validation):
            write_text(run.config_file, yaml.safe_dump(settings.to_dict(), sort_keys=False))
    except (OSError, UserError) as error:
        log.warning("%s is left unchanged: %s", run.path, error)


def write_skipped(fabric: "Fabric", run: Run, images: Source) -> None:
    """Add the images that any rank could not read to the list; every rank must call it."""
    skipped = all_gather(fabric, images.skipped)
    if not (fabric.is_global_zero and skipped):
        return
    try:
        if new := run.add_skipped(skipped):
            log.warning("%d image(s) cannot be read, see %s", new, run.skipped_file)
    except OSError as error:
        log.warning("cannot write %s (%s): training continues", run.skipped_file, error)


def add_metrics(run: Run, rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Append rows to `metrics.csv`; returns the rows to try again next time."""
    try:
        run.add_metrics(rows)
    except OSError as error:
        log.warning("cannot write %s (%s): training continues", run.metrics_file, error)
        return rows
    return []


def save(run: Run, state: dict[str, Any], encoder: nn.Module, kept: int | None, last: bool) -> bool:
    """Save the state as the last checkpoint and, if `kept` is an epoch, as the one kept after it.

    Returns:
        Whether the state is saved.

    Raises:
        TrainingError: if the last save of the training fails; earlier ones are tried again later.
    """
    try:
        # The last checkpoint is written last: if the process is killed before that, the resumed
        # training writes the others again.
        if kept is not None:
            save_checkpoint(run.epoch_checkpoint(kept), state)
            save_encoder(encoder, run.encoder_folder)
        save_last(run.last_checkpoint, state)
        return True
    except OSError as error:
        if last:
            raise TrainingError(
                f"training is done but cannot be saved in {run.path} ({error}): free up space "
                "and run the same command again to resume from the last checkpoint"
            ) from error
        log.warning(
            "cannot save in %s (%s): training continues and will try again", run.path, error
        )
        return False
