import pytest

from barlow.cli.options import add_options, new_parser, parse
from barlow.errors import UserError
from barlow.settings import Settings, load_recipe


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("epochs", "many", "epochs is 'many': give a value of type int"),
        ("lr", "fast", "lr is 'fast': give a value of type float"),
        ("projector", 16, r"projector is 16: give a value of type list\[int\]"),
        ("projector", ["a"], r"projector is \['a'\]: give a value of type list\[int\]"),
        ("encoder_args", None, r"encoder_args is None: give a value of type dict\[str, Any\]"),
        ("momentum", -0.1, "momentum is -0.1: give 0 or more, and less than 1"),
        ("momentum", 1, "momentum is 1: give 0 or more, and less than 1"),
        ("minutes", float("nan"), "minutes is nan: give more than 0"),
        ("lr", float("nan"), "lr is nan: it must not be negative"),
        ("limit", 0, "limit is 0: give 1 or more"),
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
