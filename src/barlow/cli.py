"""The command `barlow`: parses, calls, prints; the only file that does."""

import dataclasses
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from barlow.errors import TrainingError, UserError
from barlow.progress import Reporter, describe

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from barlow.evaluation import Result
    from barlow.settings import Settings

DONE, FAILED, USER_MISTAKE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after `barlow`; default those of this process.

    Returns:
        0 done, 2 the user's mistake, 1 anything else.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return DONE
    if arguments[0] == "--version":
        from barlow import __version__

        print(__version__)
        return DONE
    name, *rest = arguments
    try:
        if name not in COMMANDS:
            near = get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
            raise UserError(f"no command {name!r}: {hint}")
        COMMANDS[name].run(rest)
    except UserError as error:
        return _fail(error, USER_MISTAKE)
    except TrainingError as error:
        return _fail(error, FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted", FAILED)
    except BrokenPipeError:
        return FAILED
    return DONE


def _pretrain(argv: list[str]) -> None:
    """Train an encoder on unlabelled images."""
    from barlow.settings import Settings, load_recipe, recipe_names

    parser = _parser("pretrain")
    defaults = {name: value for name, _, value, _ in _options(Settings)}
    if recipe := _peek(argv, "--recipe"):
        defaults |= load_recipe(recipe)
    parser.add_argument("--out", type=str, required=True, help="folder of the run")
    names = ", ".join(recipe_names())
    parser.add_argument("--recipe", type=str, help=f"default values: {names}, or a YAML file")
    _add_options(parser, Settings, defaults)
    values = _parse(parser, argv)
    out = values.pop("out")
    values.pop("recipe")
    _train(Settings(**values), out)


def _evaluate(argv: list[str]) -> None:
    """Measure what an encoder is worth, with and without pretraining."""
    from barlow.evaluation import evaluate

    parser = _parser("evaluate")
    _add_options(parser, evaluate)
    values = _parse(parser, argv)
    result = evaluate(**values)
    _print_result(result)


def _views(argv: list[str]) -> None:
    """Draw images and their two views, to see what the encoder will be asked to ignore."""
    from barlow.assembly import draw
    from barlow.settings import Settings, load_recipe

    parser = _parser("views")
    shown = ("source", "image_size", "channels", "views", "view1", "view2", "limit", "seed")
    defaults = {name: value for name, _, value, _ in _options(Settings)}
    if recipe := _peek(argv, "--recipe"):
        defaults |= load_recipe(recipe)
    parser.add_argument("--out", type=str, required=True, help="PNG file to write")
    parser.add_argument("--recipe", type=str, help="take sizes and views from a recipe")
    _add_options(parser, Settings, defaults, only=shown)
    values = _parse(parser, argv)
    out = values.pop("out")
    values.pop("recipe")
    print(draw(Settings(**values), Path(out)))


def _demo(argv: list[str]) -> None:
    """Pretrain and evaluate on 5,000 real digits, in a few minutes on a laptop."""
    from barlow.evaluation import evaluate
    from barlow.settings import Settings

    parser = _parser("demo")
    parser.add_argument("--out", type=str, default="runs/demo", help="folder of the run")
    out = _parse(parser, argv)["out"]
    _train(Settings.of("mnist5k", "demo"), out)
    print("\nA linear classifier on the frozen encoder, 10 labels a class:")
    result = evaluate(out, "mnist5k", "mnist5k", labels_per_class=10, baseline="random")
    _print_result(result)
    print(f"The run is in {out}; its encoder loads with barlow.load_encoder({out!r})")


def _train(settings: "Settings", out: str) -> None:
    from barlow.pretraining import train

    train(settings, out, _Bar() if sys.stdout.isatty() else _Lines())


class _Lines(Reporter):
    """One line an epoch, for logs."""

    def row(self, row: Mapping[str, float], epochs: int) -> None:
        if float(row["epoch"]).is_integer():
            self.say(describe(row, epochs))

    def say(self, text: str) -> None:
        print(f"barlow: {text}", flush=True)


class _Bar(Reporter):
    """A rich progress bar with the loss, its two terms, images a second and the time left."""

    def __init__(self) -> None:
        self._progress: Any = None

    def start(self, step: int, steps: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[terms]}"),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task("", completed=step, total=steps, terms="")
        self._progress.start()

    def step(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def row(self, row: Mapping[str, float], epochs: int) -> None:
        validation = f" (validation {row['val_loss']:.4g})" if "val_loss" in row else ""
        self._progress.update(
            self._task,
            terms=f"loss {row['loss']:.4g}{validation} = invariance {row['invariance']:.4g} + "
            f"lambd x redundancy {row['redundancy']:.4g}, {row['images_per_second']:.0f} images/s",
        )

    def say(self, text: str) -> None:
        (self._progress.console.print if self._progress else print)(f"barlow: {text}")

    def end(self) -> None:
        self._progress.stop()


def _print_result(result: "Result") -> None:
    from rich.console import Console

    Console().print(result.table())


class Command(NamedTuple):
    """A command: what it runs; the first line of that function's docstring is its help."""

    run: Callable[[list[str]], None]

    @property
    def help(self) -> str:
        """One line."""
        return inspect.getdoc(self.run) or ""


COMMANDS = {
    "pretrain": Command(_pretrain),
    "evaluate": Command(_evaluate),
    "views": Command(_views),
    "demo": Command(_demo),
}


def _overview() -> str:
    lines = [f"  {name:<10} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: barlow COMMAND ...",
            "",
            "Self-supervised pretraining of image encoders with Barlow Twins.",
            "",
            *lines,
            "",
            "barlow COMMAND --help lists a command's options.",
        ]
    )


def _fail(message: object, status: int) -> int:
    print(f"barlow: {' '.join(str(message).split())}", file=sys.stderr)
    return status


class _Option(NamedTuple):
    name: str
    type: Any
    default: Any  # inspect.Parameter.empty where one must be given
    help: str


def _options(target: Callable[..., Any]) -> list[_Option]:
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
        # Where a path or an object will do for a text, the command line gives the text.
        kind = hints[name]
        if isinstance(kind, types.UnionType) and str in typing.get_args(kind):
            kind = str if default is not None else str | None
        options.append(_Option(name, kind, default, " ".join(texts.get(name, "").split())))
    return options


def _parser(command: str) -> "ArgumentParser":
    from jsonargparse import ArgumentParser

    return ArgumentParser(
        prog=f"barlow {command}",
        description=COMMANDS[command].help,
        exit_on_error=False,
        allow_abbrev=False,
    )


def _add_options(
    parser: "ArgumentParser",
    target: Callable[..., Any],
    defaults: dict[str, Any] | None = None,
    only: Iterable[str] | None = None,
) -> None:
    from jsonargparse import ActionYesNo

    for name, kind, default, text in _options(target):
        if only is not None and name not in only:
            continue
        value = (defaults or {}).get(name, default)
        flag = f"--{name.replace('_', '-')}"
        text = text.replace("%", "%%")
        if value is inspect.Parameter.empty:
            positional = not name.startswith("t")
            if positional:
                parser.add_argument(name, type=kind, help=text)
            else:
                parser.add_argument(flag, type=kind, required=True, help=text)
        elif kind is bool:
            parser.add_argument(flag, action=ActionYesNo(no_prefix="no-"), default=value, help=text)
        elif kind == list[int]:
            parser.add_argument(flag, type=int, nargs="+", default=value, help=text)
        else:
            parser.add_argument(flag, type=kind, default=value, help=text)


def _parse(parser: "ArgumentParser", argv: list[str]) -> dict[str, Any]:
    from jsonargparse import ArgumentError

    try:
        return dict(parser.parse_args(argv).as_dict())
    except (ArgumentError, TypeError) as error:
        message = " ".join(str(error).split())
        if bad := re.match(r"Parser key \"(\w+)\"[^:]*: (.*?)\.? Got value: (.*)", message):
            name, expected, value = bad.groups()
            expected = re.sub(r"<class '(\w+)'>|typing\.", r"\1", expected)
            message = f"--{name.replace('_', '-')} {value}: {expected[0].lower()}{expected[1:]}"
        known = [s for action in parser._actions for s in action.option_strings]
        for given in argv:
            flag = given.split("=")[0]
            if flag.startswith("--") and flag not in known:
                near = get_close_matches(flag, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"see {parser.prog} --help"
                message = f"no option {flag}: {hint}"
        raise UserError(message) from error


def _peek(argv: list[str], flag: str) -> str | None:
    """The value of one option, before all of them are parsed."""
    for i, given in enumerate(argv):
        if given == flag and i + 1 < len(argv):
            return argv[i + 1]
        if given.startswith(f"{flag}="):
            return given.split("=", 1)[1]
    return None
