"""The training loop: two views, a loss, a step; readable from top to bottom."""

import logging
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from barlow import address, record
from barlow.accumulate import accumulate, split_micro_batches
from barlow.assembly import TrainingParts, assemble
from barlow.batch_norm import exact_batch_norm
from barlow.checkpoint import load_last
from barlow.command import evaluate_command
from barlow.encoders import spec_of
from barlow.errors import TrainingError, UserError, is_out_of_memory
from barlow.lock import exclusive
from barlow.loss_terms import Means, check_weights
from barlow.model import BarlowTwins
from barlow.progress import Reporter, describe, log_to, reporting
from barlow.ranks import (
    StopVote,
    any_rank,
    broadcast,
    convert_sync_batch_norm,
    create_fabric,
    disable_buffer_broadcast,
    divide_threads,
    flush_denormals,
    launch,
    local_world_size,
    on_main_rank,
    require_equal,
    without_input_cast,
)
from barlow.run import Run, open_run
from barlow.schedule import Schedule
from barlow.settings import Settings
from barlow.signals import requeue, stop_on_signals
from barlow.tracking import tracked
from barlow.validation import collapse_warning, epochs_between_validations, validate

if TYPE_CHECKING:
    from lightning_fabric import Fabric

log = logging.getLogger(__name__)


def pretrain(
    source: str,
    out: str | Path,
    *,
    recipe: str | Path | None = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> Run:
    """Pretrain an encoder with Barlow Twins on unlabelled images.

    Call it again on an interrupted run to resume it.

    Args:
        source: where the images come from: a folder, Parquet files, or a name such as "cifar10".
        out: folder of the run: new, empty, or a run to resume. Once that run has a checkpoint,
            settings that change the result must be the same; `epochs` and `minutes` may grow.
        recipe: name of a shipped recipe, or path to a YAML file; its values are the defaults.
        reporter: receives progress updates.
        **settings: fields of `barlow.Settings`, such as `epochs=100` or `batch_size=256`.

    Returns:
        The run; `run.encoder()` is the trained encoder.

    Raises:
        UserError: if an argument is invalid (nothing has been written then), or more than
            `max_broken` of the images turn out to be unreadable.
        TrainingError: if the loss is no longer finite, a step does not fit in memory, or a signal
            ended the training.

    Example:
        >>> import barlow, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = barlow.pretrain("mnist5k", f"{folder}/run", recipe="demo",
        ...                           epochs=1, limit=64, batch_size=32,
        ...                           validation_limit=64)
        ...     run.encoder().num_features
        2016
    """
    return train(Settings.of(source, recipe, **settings), out, reporter)


def train(settings: Settings, out: str | Path, reporter: Reporter | None = None) -> Run:
    """`pretrain` with settings that are already combined."""
    run = open_run(out, settings)
    reporter = tracked(reporter, settings, run)
    fabric = create_fabric(settings)
    launch(fabric, partial(_train, settings=settings, run=run, reporter=reporter))
    return run


def _train(fabric: "Fabric", settings: Settings, run: Run, reporter: Reporter | None) -> None:
    began = time.monotonic()
    reporter = reporter if fabric.is_global_zero and reporter else Reporter()
    divide_threads(local_world_size(settings))

    several = fabric.device.type == "cpu" and fabric.world_size > 1
    if several and settings.compile and settings.sync_batch_norm:
        raise UserError(
            "--compile cannot synchronise batch norm across several CPU processes: drop --compile, "
            "or add --no-sync-batch-norm"
        )
    with flush_denormals():  # set before the first product starts the threads that inherit it
        parts = assemble(fabric, settings)
        with exclusive(fabric, run.path):
            try:
                _loop(fabric, settings, run, reporter, parts, began)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                advice = _memory_advice(run, settings, fabric.world_size)
                raise TrainingError(f"a step does not fit in memory: try {advice}") from error


def _memory_advice(run: Run, settings: Settings, ranks: int) -> str:
    """The options that would lower memory use, of those that this run can still change."""
    if run.trained:
        return (
            f"more --devices, or another --out with --init {run.last_checkpoint} and --accumulate, "
            f"as {run.path} keeps its settings"
        )
    now, images, ways = settings.accumulate, settings.batch_size // ranks, list[str]()
    if more := [k for k in range(now + 1, images // 2 + 1) if images % k == 0]:
        parts = next((k for k in more if k >= 4 * now), more[-1])
        ways.append(f"--accumulate {parts} (about {now}/{parts} of the memory, same loss)")
    if settings.precision in ("32", "64"):
        ways.append("--precision bf16 (about half)")
    return ", ".join([*ways, "a smaller --batch-size"])


def _loop(
    fabric: "Fabric",
    settings: Settings,
    run: Run,
    reporter: Reporter,
    parts: TrainingParts,
    began: float,
) -> None:
    model, preprocess, optimizer, loader, validation = parts
    main, ranks = fabric.is_global_zero, fabric.world_size
    # Without held-out images, at least the health metrics are measured, on training images.
    watched = (validation or loader).source.spread(settings.validation_limit)
    validate_every = settings.eval_every or epochs_between_validations(
        len(loader.source), len(watched)
    )
    schedule = Schedule.of(settings, loader.steps_per_epoch)

    means, step, seconds = Means(), 0, 0.0
    if resumed := load_last(run.last_checkpoint):
        step, seconds = resumed["step"], resumed["seconds"]
    require_equal(fabric, step, f"the processes see checkpoints from different steps in {run.path}")
    if step:
        on_main_rank(fabric, partial(record.require_same_images, run, loader.source))
    if schedule.done(step, seconds):
        on_main_rank(fabric, partial(record.repair_finished, run, settings, step))
        reporter.say(f"{run.path} is finished: {step} steps done, nothing left to do")
        return
    on_main_rank(fabric, partial(record.write_start, run, settings, step, loader.source))

    model, wrapped, wrapped_optimizer = _set_up(fabric, settings, model, optimizer)
    dtype = next(model.parameters()).dtype
    if resumed:
        _restore(fabric, model, optimizer, means, resumed)
        resumed = None  # to free it: it is as large as model and optimiser
    vote = StopVote(fabric, step)

    def save(kept: int | None = None) -> bool:
        means.check(step)
        check_weights(model, step)
        if main:
            state = {
                "step": step,
                "seconds": seconds,
                "settings": settings.to_dict(),
                "encoder": spec_of(model.encoder).to_dict(),
                "preprocess": preprocess.to_dict(),
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "means": means.state_dict(),
                "precision": fabric.strategy.precision.state_dict(),
            }
            return record.save(run, state, model.encoder, kept, last=done)
        return False

    # The batch norm that torch.compile generates sums accurately by itself.
    exact = fabric.device.type == "cpu" and not settings.compile
    with (
        log_to(run.log_file, reporter) if main else nullcontext(),
        stop_on_signals() as stop,
        exact_batch_norm(exact, over_ranks=_synchronises(fabric, settings)),
        reporting(reporter, schedule.at(step, seconds), schedule.total, schedule.unit),
    ):
        if step:
            reporter.say(f"resuming {run.path} at {schedule.describe(step, seconds)}")
        elif main:
            for line in str(getattr(model.encoder, "origin", "")).splitlines():
                log.info(line)
                reporter.say(line)
        record.write_skipped(fabric, run, loader.source)
        saved_at = logged_at = time.monotonic()
        timed_until = began  # the time up to this moment is already in `seconds`
        logged_step, rows, warned = step, list[dict[str, float]](), False
        clock, done = seconds, False  # `clock` is the training time that all ranks agree on
        while not done:
            epoch = step // loader.steps_per_epoch
            model.train()
            for view1, view2 in loader.epoch(epoch, first_step=step % loader.steps_per_epoch):
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * schedule.factor(step, clock)
                # Dropout and the like are drawn by address too, so that a resumed step is the same.
                torch.manual_seed(address.key(settings.seed, step, fabric.global_rank))

                accumulate(
                    model,
                    wrapped if settings.accumulate == 1 else without_input_cast(fabric, wrapped),
                    split_micro_batches(view1.to(dtype), view2.to(dtype), settings.accumulate),
                    backward=fabric.backward,
                    no_sync=partial(fabric.no_backward_sync, wrapped, enabled=ranks > 1),
                    autocast=fabric.autocast,
                )
                wrapped_optimizer.step()
                wrapped_optimizer.zero_grad(set_to_none=True)

                means.add(model.criterion.terms)
                step += 1
                now = time.monotonic()
                seconds, timed_until = seconds + now - timed_until, now
                vote_due = vote.due(step)
                if schedule.by_clock and vote_due:
                    clock = broadcast(fabric, seconds)
                done = schedule.done(step, clock)
                reporter.step(schedule.at(step, seconds))

                epoch_ends = done or step % loader.steps_per_epoch == 0
                if epoch_ends or step % settings.log_every == 0:
                    means.check(step)
                    images = (step - logged_step) * settings.batch_size
                    row = {
                        "step": step,
                        "epoch": step / loader.steps_per_epoch,
                        "seconds": seconds,
                        "images_per_second": images / (now - logged_at),
                        "lr": optimizer.param_groups[0]["lr"],
                        **means.pop(),
                    }
                    if epoch_ends and (done or (epoch + 1) % validate_every == 0):
                        check_weights(model, step)
                        row |= validate(fabric, model, wrapped, validation, watched, preprocess)
                        if not warned and (warning := collapse_warning(row)):
                            warned = True
                            log.warning("%s", warning)
                    if main:
                        rows = record.add_metrics(run, [*rows, row])
                    text = describe(row, settings)
                    log.info(text)
                    reporter.row(row, text)
                    if epoch_ends:
                        record.write_skipped(fabric, run, loader.source)
                    logged_at, logged_step = time.monotonic(), step

                if done or (epoch_ends and (epoch + 1) % settings.save_every == 0):
                    save(kept=epoch + 1)
                    saved_at = time.monotonic()
                elif now - saved_at > 60 * settings.save_minutes:
                    save()
                    saved_at = time.monotonic()
                if done:
                    break
                if vote_due and any_rank(fabric, bool(stop.signal)):
                    saved = save()
                    requeue_asked = any_rank(fabric, stop.warned)
                    if not main:
                        return  # an error here would end the other processes before they are done
                    if requeue_asked and requeue():
                        reporter.say("SLURM will restart this job")
                    raise _interrupted(stop.signal, schedule.describe(step, seconds), saved)
                if vote_due:
                    vote.reschedule(step, now)
    measured = validation and "knn_top1" in row
    knn = f", k-NN on held-out images {row['knn_top1']:.1%}" if measured else ""
    reporter.say(
        f"finished: {step} steps in {seconds:.0f} s{knn}; the encoder is in {run.encoder_folder}"
    )
    evaluation = evaluate_command(str(run.path), settings.source, loader.source.labels)
    reporter.say(f"next: {evaluation}")


def _synchronises(fabric: "Fabric", settings: Settings) -> bool:
    """Whether batch norm takes its statistics over all ranks."""
    return settings.sync_batch_norm and fabric.world_size > 1


def _set_up(
    fabric: "Fabric", settings: Settings, model: BarlowTwins, optimizer: Optimizer
) -> tuple[BarlowTwins, Any, Any]:
    """The model on its device, and Fabric's wrappers of it and of the optimiser."""
    if _synchronises(fabric, settings):
        model = convert_sync_batch_norm(model, fabric.device)
    if settings.compile:
        model.compile()
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    if fabric.device.type == "cuda":  # DDP's first broadcast runs on a stream of its own
        torch.cuda.synchronize(fabric.device)
    if _synchronises(fabric, settings):
        disable_buffer_broadcast(wrapped)
    return model, wrapped, wrapped_optimizer


def _restore(
    fabric: "Fabric",
    model: BarlowTwins,
    optimizer: Optimizer,
    means: Means,
    state: dict[str, Any],
) -> None:
    """Load a checkpoint; called after `_set_up`, so that its tensors go to the model's device."""
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    means.load_state_dict(state["means"])
    if state["precision"]:  # empty if the training has no gradient scaler, as on a CPU
        fabric.strategy.precision.load_state_dict(state["precision"])


def _interrupted(signal: str | None, reached: str, saved: bool) -> TrainingError:
    """The error that ends a training which was asked to stop."""
    outcome = "checkpoint saved" if saved else "not saved, the last checkpoint is older"
    return TrainingError(
        f"{signal or 'a signal'} at {reached}: {outcome}; run the same command again to resume"
    )
