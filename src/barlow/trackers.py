"""Adapters: one class for each experiment tracker."""

import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import yaml
from PIL import Image

from barlow.run import Run
from barlow.settings import Settings

_PROJECT = "barlow-twins"


class Tracker(Protocol):
    """A run in an experiment tracker.

    Attributes:
        id: finds the run again when the training is resumed.
    """

    id: str

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Log values by name at a step."""

    def image(self, name: str, picture: Image.Image, step: int) -> None:
        """Log a picture at a step."""

    def end(self) -> None:
        """Close the run; nothing more will be logged."""


class _Wandb:
    def __init__(self, run: Run, settings: Settings, identity: str | None) -> None:
        import wandb

        self._image = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _PROJECT,
            name=run.path.resolve().name,
            id=identity,
            resume="allow",
            dir=run.path,
            config=settings.to_dict(),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.id = str(self._run.id)

    def log(self, row: Mapping[str, float], step: int) -> None:
        self._run.log(dict(row), step=step)

    def image(self, name: str, picture: Image.Image, step: int) -> None:
        self._run.log({name: self._image(picture)}, step=step)

    def end(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, run: Run, settings: Settings, identity: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.id = "tensorboard"
        self._writer = SummaryWriter(run.tensorboard_folder)
        if identity is None:
            text = yaml.safe_dump(settings.to_dict(), sort_keys=False)
            self._writer.add_text("settings", f"```\n{text}```")

    def log(self, row: Mapping[str, float], step: int) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)

    def image(self, name: str, picture: Image.Image, step: int) -> None:
        self._writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def end(self) -> None:
        self._writer.close()


class _Trackio:
    def __init__(self, run: Run, settings: Settings, identity: str | None) -> None:
        import trackio

        self.id = identity or f"{run.path.resolve().name}-{secrets.token_hex(3)}"
        # The module's `finish`: trackio would call the run's own again at exit, and print.
        self._image: Any = trackio.Image
        self._finish: Any = trackio.finish
        self._run = trackio.init(
            project=_PROJECT,
            name=self.id,
            resume="allow",
            config=settings.to_dict(),
            embed=False,
        )

    def log(self, row: Mapping[str, float], step: int) -> None:
        self._run.log(dict(row), step=step)

    def image(self, name: str, picture: Image.Image, step: int) -> None:
        self._run.log({name: self._image(picture)}, step=step)

    def end(self) -> None:
        self._finish()


class _MLflow:
    def __init__(self, run: Run, settings: Settings, identity: str | None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        # At first, both log which tables they create.
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._metric, place = Metric, run.path.resolve()
        server = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(server or f"sqlite:///{place / 'mlflow.db'}")
        if identity is None:
            found = self._client.get_experiment_by_name(_PROJECT)
            artifacts = None if server else (place / "mlartifacts").as_uri()
            experiment = (
                found.experiment_id
                if found
                else self._client.create_experiment(_PROJECT, artifact_location=artifacts)
            )
            identity = self._client.create_run(experiment, run_name=place.name).info.run_id
            params = [Param(k, str(v)) for k, v in settings.to_dict().items()]
            self._client.log_batch(identity, params=params)
        self.id = str(identity)
        self._client.update_run(self.id, status="RUNNING")

    def log(self, row: Mapping[str, float], step: int) -> None:
        now = round(time.time() * 1000)
        metrics = [self._metric(k, v, now, step) for k, v in row.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def image(self, name: str, picture: Image.Image, step: int) -> None:
        self._client.log_image(self.id, picture, artifact_file=f"{name}.png")

    def end(self) -> None:
        self._client.set_terminated(self.id)


# Tracker's name: the module it needs, and the adapter that opens a run in it.
OPENERS: dict[str, tuple[str, Callable[[Run, Settings, str | None], Tracker]]] = {
    "wandb": ("wandb", _Wandb),
    "tensorboard": ("tensorboard", _TensorBoard),
    "trackio": ("trackio", _Trackio),
    "mlflow": ("mlflow", _MLflow),
}
