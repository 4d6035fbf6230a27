from pathlib import Path

import pytest

import barlow
from barlow.assembly import build_model
from barlow.cli.options import add_options, new_parser, parse
from barlow.errors import UserError
from barlow.settings import Settings, load_recipe


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("epochs", "many", "epochs is 'many': expected a value of type int"),
        ("lr", "fast", "lr is 'fast': expected a value of type float"),
        ("projector", 16, r"projector is 16: expected a value of type list\[int\]"),
        ("projector", ["a"], r"projector is \['a'\]: expected a value of type list\[int\]"),
        ("encoder_args", None, r"encoder_args is None: expected a value of type dict\[str, Any\]"),
        ("momentum", -0.1, "momentum is -0.1: it must be at least 0 and less than 1"),
        ("momentum", 1, "momentum is 1: it must be at least 0 and less than 1"),
        ("minutes", float("nan"), "minutes is nan: it must be greater than 0"),
        ("lr", float("nan"), "lr is nan: it must not be negative"),
        ("limit", 0, "limit is 0: it must be at least 1"),
    ],
)
def test_a_value_that_cannot_be_is_named(name, value, told):
    with pytest.raises(UserError, match=told):
        Settings.of("cifar10", **{name: value})


def test_yamls_texts_of_numbers_are_numbers(tmp_path):
    (tmp_path / "mine.yaml").write_text("lr: 1e-3\nweight_decay: 1e-6\n")
    settings = Settings.of("cifar10", tmp_path / "mine.yaml")
    assert (settings.lr, settings.weight_decay) == (1e-3, 1e-6)


def test_the_source_that_is_given_is_that_of_no_recipe(tmp_path):
    """A run's config.yaml is a recipe, and says what that run was trained on."""
    recipe = tmp_path / "config.yaml"
    recipe.write_text("source: others\nseed: 3\n")
    settings = Settings.of("mine", recipe)
    assert (settings.source, settings.seed) == ("mine", 3)
    parser = new_parser("pretrain", "")
    add_options(parser, Settings, load_recipe(recipe))
    assert parse(parser, ["mine"])["source"] == "mine"
    assert parse(parser, [])["source"] == "others"


def test_the_off_diagonal_target_is_that_of_the_loss(tmp_path):
    parser = new_parser("pretrain", "")
    add_options(parser, Settings)
    given = {
        "recipe": str(Path(__file__).parent / "digits.yaml"),
        "encoder_args": {"levels": [0, 0, 1, 1, 1, 1], "channels": [4, 4, 8, 8, 8, 16]},
        "projector": [16, 16],
        "batch_size": 32,
        "limit": 64,
        "validation_limit": 32,
        "epochs": 1,
        "accelerator": "cpu",
    }
    last = []
    for target in (0.0, -1.0):
        of_line = parse(parser, ["mnist5k", "--off-diagonal-target", f"{target}"])
        options = given | {"off_diagonal_target": of_line["off_diagonal_target"]}
        criterion = build_model(Settings.of("mnist5k", **options))[0].criterion
        assert criterion.off_diagonal_target == target
        last.append(barlow.pretrain("mnist5k", tmp_path / f"{target}", **options).metrics()[-1])
    zero, pulled = last
    # The network is near its start: next to (1 + C_ij)^2 the sum of C_ij^2 is small.
    for before in ("", "val_"):
        assert pulled[f"{before}redundancy"] > zero[f"{before}redundancy"] + 16 * 15 / 2
        sums = pulled[f"{before}invariance"] + 0.01 * pulled[f"{before}redundancy"]
        assert pulled[f"{before}loss"] == pytest.approx(sums, rel=1e-4)
