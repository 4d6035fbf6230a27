"""What a user types, and what comes back."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from PIL import Image

from barlow.checkpoint import load_checkpoint
from barlow.cli import COMMANDS, main
from barlow.data import open_source
from barlow.evaluation.protocols import PROTOCOLS

TINY = [
    f"--recipe={Path(__file__).parents[1] / 'digits.yaml'}",
    '--encoder-args={"levels": [0, 0, 1, 1, 1, 1], "channels": [4, 4, 8, 8, 8, 16]}',
    *("--projector", "16", "16", "--batch-size", "32", "--limit", "128", "--epochs", "2"),
    *("--validation-limit", "64", "--accelerator", "cpu"),
]


def barlow(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "barlow", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **options,
    )


@pytest.fixture
def here(capsys):
    """As `barlow`, in this process: nothing of what is loaded has to be loaded again."""

    def run(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run


def digits(number):
    images = open_source("mnist5k", "train", in_chans=1, limit=number)
    return [Image.fromarray(images[i][0].numpy()) for i in range(number)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    done = barlow("pretrain", "mnist5k", "--out", out, *TINY)
    assert done.returncode == 0, done.stderr
    return out, done


def test_pretraining_prints_first_and_last_row_where_the_encoder_is_and_what_next(run):
    out, done = run
    lines = done.stdout.splitlines()
    assert [line[:20] for line in lines[:2]] == ["barlow: epoch 1.00/2", "barlow: epoch 2.00/2"]
    assert re.search(r", k-NN on held-out images \d", lines[-3])
    assert lines[-3].endswith(f"the encoder is in {out / 'encoder'}")
    evaluation = f"barlow evaluate {out} --train mnist5k --baseline random"
    assert lines[-2] == f"barlow: next: {evaluation}"
    assert lines[-1] == f"barlow: wrote the run's page to {out / 'report.html'}"
    assert [line for line in done.stderr.splitlines() if "features of" not in line] == []
    assert (out / "encoder" / "model.safetensors").is_file()


def test_the_options_of_a_command_line_are_the_settings_of_the_run(run):
    config = yaml.safe_load((run[0] / "config.yaml").read_text())
    assert config["projector"] == [16, 16]
    assert config["limit"] == 128
    assert config["lambd"] == 0.01, "from the recipe"
    assert config["momentum"] == 0.9, "from the defaults"


def test_what_does_not_fit_in_memory_is_one_line(monkeypatch, here):
    monkeypatch.setitem(COMMANDS, "embed", lambda argv: torch.empty(10**15, dtype=torch.uint8))
    done = here("embed")
    assert (done.returncode, done.stdout) == (1, "")
    message = "out of memory: use a smaller --batch-size, or --limit the number of images"
    assert done.stderr == f"barlow: {message}\n"


def test_evaluation_prints_the_table_without_and_with(run, here):
    done = here(
        *("evaluate", run[0], "--train", "mnist5k", "--test", "mnist5k", "--baseline", "random"),
        *("--labels-per-class", 5, "--limit", 500, "--no-cache"),
    )
    assert done.returncode == 0, done.stderr
    assert "without pretraining" in done.stdout
    assert "with pretraining" in done.stdout
    assert list((run[0] / "evaluation").glob("*.json"))


def test_an_encoder_is_exported_and_evaluated_from_there(run, tmp_path, here):
    out = tmp_path / "e.safetensors"
    done = here("export", run[0], "--format", "safetensors", "--out", out)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"wrote {out}\n", "")
    again = here("export", run[0], "--format", "safetensors", "--out", out)
    assert (again.returncode, "already exists" in again.stderr) == (2, True)
    options = ["--train", "mnist5k", "--test", "mnist5k", "--limit", 100, "--no-cache"]
    assert here("evaluate", out, *options).returncode == 0


def test_what_was_recognised_in_a_file_of_another_project_is_said_beside_the_table(tmp_path, here):
    state = torchvision.models.resnet18().state_dict()
    torch.save({f"backbone.{k}": v for k, v in state.items()}, tmp_path / "weights.pth")
    out = tmp_path / "e.safetensors"
    done = here("export", tmp_path / "weights.pth", "--format", "safetensors", "--out", out)
    assert done.stdout == f"wrote {out}\n"
    assert done.stderr.count("\n") == 1
    assert "resnet18, 120 of 120 weights matched; left out: fc (2)" in done.stderr


def test_quiet_prints_nothing_and_verbose_every_row(tmp_path, here):
    short = [*TINY, "--epochs", "1", "--log-every", "1"]
    quiet = barlow("pretrain", "mnist5k", "--out", tmp_path / "quiet", "--quiet", *short)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    assert (tmp_path / "quiet" / "report.html").is_file()
    done = here("pretrain", "mnist5k", "--out", tmp_path / "verbose", "--verbose", *short)
    assert done.returncode == 0, done.stderr
    steps = [line.split("step ")[1].split(",")[0] for line in done.stdout.splitlines()[:4]]
    assert steps == ["1", "2", "3", "4"]
    both = here("pretrain", "mnist5k", "--out", tmp_path / "no", "--quiet", "--verbose", *short)
    assert both.returncode == 2
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_two_processes_print_what_one_would(run, tmp_path):
    done = barlow("pretrain", "mnist5k", "--out", tmp_path / "two", *TINY, "--devices", "2")
    assert done.returncode == 0, done.stderr
    assert [line[:20] for line in done.stdout.splitlines()] == [
        line[:20] for line in run[1].stdout.splitlines()
    ]
    assert [line for line in done.stderr.splitlines() if "features of" not in line] == []


def test_a_linear_classifier_is_kept_predicts_and_is_exported(run, tmp_path, here):
    model, few = tmp_path / "model", ["--limit", 100, "--no-cache"]
    assert here("evaluate", run[0], "--train", "mnist5k", "--out", model, *few).returncode == 0
    done = here("predict", model, "mnist5k::test", "--out", tmp_path / "p.csv", "--limit", 10)
    assert done.stdout == "10 images classified\n"
    done = here("export", model, "--format", "torch-export", "--out", tmp_path / "m.pt2")
    assert "its output differs from PyTorch's by at most " in done.stdout


def test_health_is_measured_on_images_without_labels(run, tmp_path, here):
    for i, digit in enumerate(digits(30)):
        digit.save(tmp_path / f"{i:02}.png")
    done = here(
        *("evaluate", run[0], "--train", tmp_path, "--protocol", "health"),
        *("--views", 2, "--baseline", "random,pixels", "--no-cache"),
    )
    assert done.returncode == 0, done.stderr
    heading, *lines = done.stdout.splitlines()
    for name in ("RankMe", "effective rank", "alpha-ReQ", "LiDAR", "uniformity", "alignment"):
        assert name in heading
    assert [line[:10].strip() for line in lines] == ["without pr", "raw pixels", "with pretr"]


@pytest.mark.parametrize(
    ("label", "number"), [("{0}", "top-1"), ("a{0}|b{1}", "mAP"), ("{0}.5", "R2")]
)
def test_labels_beside_a_folder_are_classes_tags_or_numbers(run, tmp_path, label, number, here):
    (tmp_path / "photos").mkdir()
    for i, digit in enumerate(digits(60)):
        digit.save(tmp_path / "photos" / f"{i:02}.png")
    labels = [f"{i:02}.png,{label.format(i % 3, i % 2)}" for i in range(60)]
    for name, lines in (("train", labels[:40]), ("test", labels[40:])):
        (tmp_path / f"{name}.csv").write_text("\n".join(["file,label", *lines]))
    done = here(
        *("evaluate", run[0], "--train", tmp_path / "photos", "--labels", tmp_path / "train.csv"),
        *("--test-labels", tmp_path / "test.csv", "--no-cache"),
    )
    assert done.returncode == 0, done.stderr
    assert f"validation {number}" in done.stdout.splitlines()[0]


def test_the_same_command_again_says_that_the_run_is_finished(run, here):
    done = here("pretrain", "mnist5k", "--out", run[0], *TINY)
    assert done.returncode == 0
    assert "is finished" in done.stdout


def started(command, **options):
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **options,
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_the_whole_group_leaves_the_loaders_workers_to_their_training(tmp_path, name):
    (tmp_path / "photos").mkdir()
    for i, digit in enumerate(digits(64)):
        digit.resize((100, 100)).save(tmp_path / "photos" / f"{i:02}.jpg")
    command = [sys.executable, "-m", "barlow", "pretrain", tmp_path / "photos", *TINY]
    command += ["--image-size", "96", "--limit", "64", "--epochs", "500", "--out", tmp_path / "run"]
    with started(command, start_new_session=True) as process:
        assert "epoch 1.00" in process.stdout.readline()
        asked = time.monotonic()
        os.killpg(process.pid, getattr(signal, name))
        _, stderr = process.communicate(timeout=60)
        assert time.monotonic() - asked < 10  # and the time that a process and workers take to end
        assert process.returncode == 1
    assert stderr.startswith(f"barlow: {name} at step"), stderr
    assert stderr.count("\n") == 1
    assert ": checkpoint saved;" in stderr
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["step"] >= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "mnist5k"], "required: out"),
        (["pretrain", "mnist5k", "--out", "OUT", "--epoch", "3"], "did you mean --epochs?"),
        (["pretrain", "mnist5k", "--out", "OUT", "--epochs", "many"], "epochs"),
        (["pretrain", "mnist5k", "--out", "OUT", "--recipe", "nope"], "unknown recipe 'nope'"),
        (["pretrain", "mnist5k", "--out", "OUT", "--batch-size", "1"], "at least 2 images"),
        (["pretrain", "mnist5k", "--out", "OUT", "--limit", "8"], "fewer than one batch of 256"),
        (["pretrain", "mnist5k", "--out", "OUT", "--encoder", "resnet19"], "resnet18"),
        (["pretrain", "nosuch", "--out", "OUT"], "unknown source 'nosuch'"),
        (["pretrain", "EMPTY", "--out", "OUT"], "no images in"),
        (["pretrain", "TEXTS", "--out", "OUT"], "no images in"),
        (["pretrain", "mnist5k", "--out", "TEXTS"], "contains other files but no run"),
        (["evaluate", "EMPTY", "--train", "mnist5k", "--test", "mnist5k"], "no encoder at"),
        (
            ["evaluate", "EMPTY", "--train", "mnist5k", "--protocol", "magic"],
            "use one of linear, knn",
        ),
        (
            ["evaluate", "EMPTY", "--train", "mnist5k", "--protocol=knn", "--epochs", "5"],
            "unknown option --epochs: see barlow evaluate --protocol knn --help",
        ),
    ],
)
def test_a_mistake_is_one_line_exits_2_and_writes_nothing(tmp_path, here, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.txt").write_text("mine")
    places = {"OUT": tmp_path / "out", "EMPTY": tmp_path / "empty", "TEXTS": tmp_path / "texts"}
    done = here(*(places.get(a, a) for a in arguments))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("barlow: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
    assert [p.name for p in (tmp_path / "texts").iterdir()] == ["notes.txt"]


def test_a_mistake_ends_the_process_with_status_2():
    done = barlow("pretrian")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "barlow: unknown command 'pretrian': did you mean 'pretrain'?\n"


def test_help_answers_without_loading_torch():
    code = "import sys, barlow.cli; barlow.cli.main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"  {name} " in done.stdout


def test_commands_and_options_are_those_that_people_have_in_their_scripts(capsys, monkeypatch):
    """surface.txt changes by a decision only: what is taken away breaks somebody's script."""
    monkeypatch.setenv("COLUMNS", "1000")  # no line of the help is wrapped
    lines = []
    for name in COMMANDS:
        variants = [["--protocol", p] for p in PROTOCOLS] if name == "evaluate" else [[]]
        for variant in variants:
            with pytest.raises(SystemExit):
                main([name, *variant, "--help"])
            options = re.findall(r"^ +(--[a-z0-9-]+)", capsys.readouterr().out, re.MULTILINE)
            lines.append(" ".join(["barlow", name, *variant[1:], *sorted(set(options))]))
    assert lines == (Path(__file__).parent / "surface.txt").read_text().splitlines()


def test_importing_the_package_loads_nothing():
    code = (
        "import sys, barlow; assert not {'torch', 'timm', 'numpy'} & set(sys.modules); dir(barlow)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_public_name_is_there():
    import barlow as package

    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018
