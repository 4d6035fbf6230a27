"""What a mistake or a damaged file comes to: one line, and status 2."""

import pytest
import yaml

from barlow.cli import main
from barlow.run import Run
from barlow.settings import Settings


@pytest.fixture
def refused(capsys):
    """`refused(*arguments)`: the one line that the command line says before it exits with 2."""

    def run(*arguments):
        assert main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("barlow: ")
        assert err.count("\n") == 1
        return err

    return run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--momentum", "-1"], "momentum is -1.0: it must be at least 0 and less than 1"),
        (["--momentum", "1", "--optimizer", "adamw"], "momentum is 1.0"),
        (["--lr", "nan"], "--lr nan: expected a float"),
    ],
)
def test_a_number_that_no_optimiser_takes(tmp_path, refused, options, message):
    assert message in refused("pretrain", "mnist5k", "--out", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("encoder: resnet18  # für kleine Bilder\n".encode("latin-1"), "is not valid YAML: "),
        (b"momentum: fast\n", "momentum is 'fast'"),
        (b"seed: [1]\n", "--seed [1]: expected a int"),
    ],
)
def test_a_recipe_that_cannot_be_read(tmp_path, refused, recipe, message):
    (tmp_path / "mine.yaml").write_bytes(recipe)
    out = ["--out", tmp_path / "run"]
    assert message in refused("pretrain", "mnist5k", *out, "--recipe", tmp_path / "mine.yaml")
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_written(tmp_path, refused):
    export = ["export", "cifar10-small", "--format", "safetensors", "--out"]
    (tmp_path / "file").touch()
    message = refused(*export, tmp_path / "file" / "e.safetensors")
    assert f"cannot use {tmp_path / 'file'}" in message
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run")
    run.path.mkdir()
    run.config_file.write_text(yaml.safe_dump(Settings("mnist5k").to_dict()))
    return run


@pytest.mark.parametrize("command", [["report"], ["watch"], ["pretrain", "mnist5k", "--out"]])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text + "new_field: 1\n", "'new_field'"),
        (lambda text: text.replace("optimizer: lars", "optimizer: magic"), "optimizer is 'magic'"),
        (lambda text: text + "epochs: [", "while parsing"),
        (lambda text: "", ""),
        (lambda text: "[]", ""),
        (lambda text: "1: 2", ""),
    ],
)
def test_settings_of_another_version_or_damaged(run, refused, command, damage, message):
    run.config_file.write_text(damage(run.config_file.read_text()))
    line = refused(*command, run.path)
    assert f"{run.config_file} is damaged or was written by another version of barlow: " in line
    assert message in line


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.csv", b"step,epoch\nfew,1\n", "few"),
        ("metrics.csv", b"step,epoch\n1,1\n", "a row has no "),
        ("metrics.csv", b"step,epoch\n1,1,1\n", ""),
        ("metrics.csv", b"step,epoch\n\0\0\0\0", ""),
        ("starts.jsonl", b'{"time": ', ""),
        ("starts.jsonl", b"3\n", ""),
        ("skipped.csv", b"name\na.jpg\n", "'id'"),
        ("skipped.csv", b"id,reason\n\xe9,x\n", "codec"),
    ],
)
def test_what_a_training_wrote_is_damaged(run, refused, file, content, message):
    (run.path / file).write_bytes(content)
    line = refused("report", run.path)
    assert f"{run.path / file} is damaged or was written by another version of barlow: " in line
    assert message in line
    assert not run.report_file.exists()
