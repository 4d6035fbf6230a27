"""What trackers are told is what `metrics.csv` holds."""

import json
import struct
import time
from pathlib import Path

import pytest
import torch

import barlow
from barlow.checkpoint import load_checkpoint
from barlow.errors import UserError
from barlow.progress import Reporter
from barlow.run import METRICS

TINY = {
    "recipe": str(Path(__file__).parent / "digits.yaml"),
    "encoder_args": {"levels": [0, 0, 1, 1, 1, 1], "channels": [4, 4, 8, 8, 8, 16]},
    "projector": [16, 16],
    "batch_size": 32,
    "limit": 64,
    "validation_limit": 64,
    "epochs": 3,
    "log_every": 1,
    "save_every": 1,
    "accelerator": "cpu",
}


class StopAt(Reporter):
    """Ends a training after a step as a crash would."""

    class Crash(Exception):
        pass

    def __init__(self, at):
        self.at = at

    def step(self, step):
        if step == self.at:
            raise self.Crash


class Ear(Reporter):
    def __init__(self):
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def crashed_and_resumed(out, **settings):
    """A run that crashed at step 4 and was resumed at step 2: two rows were made twice."""
    with pytest.raises(StopAt.Crash):
        barlow.pretrain("mnist5k", out, **TINY, **settings, reporter=StopAt(4))
    time.sleep(1)  # wandb names its folders by the second
    ear = Ear()
    run = barlow.pretrain("mnist5k", out, **TINY, **settings, reporter=ear)
    return run, ear.warnings


def expected(run):
    """{name: [(step, value), ...]} of metrics.csv."""
    found = {}
    for row in run.metrics():
        for name, value in row.items():
            if name != "step":
                found.setdefault(name, []).append(
                    (int(row["step"]), pytest.approx(value, rel=1e-5))
                )
    return found


def expected_but_time(run):
    return {k: v for k, v in expected(run).items() if k not in ("seconds", "images_per_second")}


def of_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    scalars = {n: [(e.step, e.value) for e in events.Scalars(n)] for n in events.Tags()["scalars"]}
    return scalars, events.Tags()["images"]


def of_wandb(file):
    """History, configuration and id in an offline file: LevelDB's log format around protobuf."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts, records = file.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    history, config, identity = {}, {}, None
    for record in records:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            identity = record.run.run_id
            config |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
        if kind == "history":
            items = {
                i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item
            }
            step = items.pop("_step", record.history.step.num)
            for name, value in items.items():
                history.setdefault(name, []).append((step, value))
    return history, config, identity


def test_every_column_is_documented():
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    assert [name for name in METRICS if f"| `{name}` |" not in page] == []


def test_tensorboard_holds_the_numbers_of_metrics_csv_also_after_a_crash(tmp_path):
    pytest.importorskip("tensorboard")
    run, warnings = crashed_and_resumed(tmp_path / "run", track=["tensorboard"])
    assert warnings == []
    scalars, images = of_tensorboard(run.path / "tensorboard")
    assert {k: v for k, v in scalars.items() if k in expected_but_time(run)} == expected_but_time(
        run
    )
    assert set(scalars) == set(expected(run))
    assert images == ["views", "matrix_at_the_start", "matrix_at_the_end"]


def test_wandb_resumes_the_same_run_and_holds_the_numbers_of_metrics_csv(tmp_path):
    wandb = pytest.importorskip("wandb")
    run, warnings = crashed_and_resumed(tmp_path / "run", track=["wandb"])
    assert warnings == []
    wandb.teardown()  # its process writes behind; the end of ours would wait for it too
    parts = [of_wandb(file) for file in sorted(run.path.glob("wandb/offline-run-*/*.wandb"))]
    history = {}
    for part, config, identity in parts:
        assert identity == parts[0][2]
        assert config["lambd"] == 0.01
        for name, values in part.items():
            history.setdefault(name, []).extend(values)
    assert len(parts) == 2
    wanted = expected_but_time(run)
    assert {name: values for name, values in history.items() if name in wanted} == wanted
    assert {"views", "matrix_at_the_start", "matrix_at_the_end"} <= set(history)


@pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")
def test_mlflow_holds_the_numbers_of_metrics_csv(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run, warnings = crashed_and_resumed(tmp_path / "run", track=["mlflow"])
    assert warnings == []
    client = mlflow.MlflowClient(f"sqlite:///{run.path / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'barlow-twins'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.params["lambd"] == "0.01"
    assert found.info.status == "FINISHED"
    for name, values in expected_but_time(run).items():
        history = client.get_metric_history(found.info.run_id, name)
        assert [(m.step, m.value) for m in history] == values
    pictures = {f.path for f in client.list_artifacts(found.info.run_id)}
    assert pictures == {"views.png", "matrix_at_the_start.png", "matrix_at_the_end.png"}


def test_trackio_holds_the_numbers_of_metrics_csv(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    run, warnings = crashed_and_resumed(tmp_path / "run", track=["trackio"])
    assert warnings == []
    identity = json.loads((run.path / "trackers.json").read_text())["trackio"]
    logs = SQLiteStorage.get_logs("barlow-twins", identity)
    for name, values in expected_but_time(run).items():
        assert [(row["step"], row[name]) for row in logs if name in row] == values
    assert any("views" in row for row in logs)


def test_a_tracker_that_comes_later_gets_the_rows_before_too(tmp_path):
    pytest.importorskip("tensorboard")
    with pytest.raises(StopAt.Crash):
        barlow.pretrain("mnist5k", tmp_path / "run", **TINY, reporter=StopAt(4))
    run = barlow.pretrain("mnist5k", tmp_path / "run", **TINY, track=["tensorboard"])
    scalars, _ = of_tensorboard(run.path / "tensorboard")
    assert scalars["loss"] == expected(run)["loss"]


def test_tracking_does_not_change_a_bit_of_the_weights(tmp_path):
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    plain = barlow.pretrain("mnist5k", tmp_path / "plain", **TINY)
    told = barlow.pretrain("mnist5k", tmp_path / "told", **TINY, track=["wandb", "tensorboard"])
    expected, got = (load_checkpoint(r.last_checkpoint)["model"] for r in (plain, told))
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_tracker_that_fails_does_not_stop_the_training(tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    out.mkdir()
    barlow.pretrain("mnist5k", out, **TINY | {"epochs": 1})
    (out / "tensorboard").write_text("a file where the folder should be")
    ear = Ear()
    run = barlow.pretrain("mnist5k", out, **TINY, track=["tensorboard"], reporter=ear)
    assert run.metrics()[-1]["step"] == 6
    (warning,) = ear.warnings
    assert "tensorboard failed and is disabled from now on" in warning


def test_only_the_first_of_two_ranks_tells(tmp_path):
    pytest.importorskip("tensorboard")
    run = barlow.pretrain("mnist5k", tmp_path / "run", **TINY, track=["tensorboard"], devices=2)
    scalars, _ = of_tensorboard(run.path / "tensorboard")
    assert scalars["loss"] == expected(run)["loss"]


def test_a_tracker_that_is_unknown_or_not_installed_is_told_before_anything_is_written(
    tmp_path, monkeypatch
):
    import importlib.util

    with pytest.raises(UserError, match=r"track is 'wandbb': use any of wandb, tensorboard"):
        barlow.pretrain("mnist5k", tmp_path / "run", **TINY, track=["wandbb"])
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "wandb" else find(n))
    with pytest.raises(UserError, match=r"pip install wandb"):
        barlow.pretrain("mnist5k", tmp_path / "run", **TINY, track=["wandb"])
    assert not (tmp_path / "run").exists()
