"""Options from typed signatures: makes a parser from a dataclass or a function."""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

from barlow.errors import UserError, one_line

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


class Option(NamedTuple):
    """One option: a field of a dataclass, or a parameter of a function."""

    name: str
    type: Any
    default: Any  # inspect.Parameter.empty if the option is required
    help: str


# Required, but clearer as named options than as positional arguments.
_NAMED = ("train", "test", "format", "out")


def options_of(target: Callable[..., Any]) -> list[Option]:
    """The fields of a dataclass, or the parameters of a function, as options."""
    import docstring_parser

    hints = typing.get_type_hints(target)
    if dataclasses.is_dataclass(target):
        documented = docstring_parser.parse_from_object(target)
    else:
        documented = docstring_parser.parse(inspect.getdoc(target) or "")
    texts = {p.arg_name: p.description or "" for p in documented.params}
    options = []
    for name, parameter in inspect.signature(target).parameters.items():
        default = parameter.default
        if isinstance(target, type) and default is not parameter.empty:
            field = target.__dataclass_fields__[name]  # type: ignore[attr-defined]
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
        # Where a parameter takes a path or an object as well as a string, it is given the string.
        kind = hints[name]
        if isinstance(kind, types.UnionType) and str in typing.get_args(kind):
            kind = str if default is not None else str | None
        options.append(Option(name, kind, default, " ".join(texts.get(name, "").split())))
    return options


def new_parser(command: str, description: str) -> "ArgumentParser":
    """A parser that raises instead of exiting."""
    from jsonargparse import ArgumentParser

    return ArgumentParser(
        prog=f"barlow {command}",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
    )


def add_options(
    parser: "ArgumentParser",
    target: Callable[..., Any],
    defaults: dict[str, Any] | None = None,
    only: Iterable[str] | None = None,
    exclude: str | None = None,
) -> None:
    """Give a parser the options of a target, with other defaults or only some of them."""
    from jsonargparse import ActionYesNo

    for name, kind, default, text in options_of(target):
        if name == exclude or (only is not None and name not in only):
            continue
        value = (defaults or {}).get(name, default)
        flag = f"--{name.replace('_', '-')}"
        text = text.replace("%", "%%")
        if default is inspect.Parameter.empty:
            if value is not default:
                parser.add_argument(name, type=kind, nargs="?", default=value, help=text)
            elif kind == Sequence[str]:
                parser.add_argument(name, type=str, nargs="+", help=text)
            elif name in _NAMED:
                parser.add_argument(flag, type=kind, required=True, help=text)
            else:
                parser.add_argument(name, type=kind, help=text)
        elif kind is bool:
            parser.add_argument(flag, action=ActionYesNo(no_prefix="no-"), default=value, help=text)
        elif kind == list[int]:
            parser.add_argument(flag, type=int, nargs="+", default=value, help=text)
        elif kind == list[str]:
            parser.add_argument(flag, type=names, default=value, help=text)
        else:
            parser.add_argument(flag, type=kind, default=value, help=text)


def names(text: str | list[str]) -> list[str]:
    """Split names at commas; a list, which the parser also passes here, is returned unchanged.

    Example:
        >>> names("wandb, tensorboard")
        ['wandb', 'tensorboard']
    """
    if isinstance(text, list):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]


def parse(parser: "ArgumentParser", argv: list[str]) -> dict[str, Any]:
    """The values given, by name; for an unknown option, a UserError with the nearest known one."""
    from jsonargparse import ArgumentError

    try:
        return dict(parser.parse_args(argv).as_dict())
    except (ArgumentError, TypeError) as error:
        message = one_line(error)
        if bad := re.match(
            r"Parser key \"(\w+)\"[^:]*: (.*?)\.? (?:Got|Given) value: (.*)", message
        ):
            name, expected, value = bad.groups()
            expected = re.sub(r".* Union .*?(Expected a [^-]*) - .*", r"\1", expected)
            expected = re.sub(r"<class '(\w+)'>|typing\.", r"\1", expected)
            expected = re.sub(r"Expected a Literal\[(.*)\]", r"Expected one of \1", expected)
            message = f"--{name.replace('_', '-')} {value}: {expected[0].lower()}{expected[1:]}"
        known = [s for action in parser._actions for s in action.option_strings]
        for given in argv:
            flag = given.split("=")[0]
            if flag.startswith("--") and flag not in known:
                near = get_close_matches(flag, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"see {parser.prog} --help"
                message = f"unknown option {flag}: {hint}"
        raise UserError(message) from error


def peek(argv: list[str], flag: str) -> str | None:
    """The value of one option, before all of them are parsed."""
    for i, given in enumerate(argv):
        if given == flag and i + 1 < len(argv):
            return argv[i + 1]
        if given.startswith(f"{flag}="):
            return given.split("=", 1)[1]
    return None


def help_of(command: Callable[..., object]) -> str:
    """What a command does: the docstring of its function."""
    return (command.__doc__ or "").strip()


def command_parser(command: Callable[..., object]) -> "ArgumentParser":
    """The parser of a command, which is named like its function without the underscore."""
    return new_parser(command.__name__.removeprefix("_"), help_of(command))


def call_with_options(
    command: Callable[..., object], function: Callable[..., Any], argv: list[str]
) -> Any:
    """Call the function behind a command with the options made from its signature."""
    parser = command_parser(command)
    add_options(parser, function)
    return function(**parse(parser, argv))


def settings_defaults(argv: list[str]) -> dict[str, Any]:
    """The defaults of the settings, overridden by those of the recipe."""
    from barlow.settings import Settings, recipe_beside

    recipe = peek(argv, "--recipe")
    defaults = {name: value for name, _, value, _ in options_of(Settings)}
    given = ["epochs"] if peek(argv, "--epochs") else []
    return defaults | (recipe_beside(recipe, given) if recipe else {})
