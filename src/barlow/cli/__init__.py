"""The command `barlow`; the only part of the package that parses arguments or prints."""

import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from barlow.cli.exit_status import DONE, run_and_report
from barlow.cli.options import (
    add_options,
    call_with_options,
    command_parser,
    help_of,
    new_parser,
    parse,
    peek,
    settings_defaults,
)
from barlow.cli.terminal import log_to_stderr, print_table, reporter
from barlow.errors import UserError, one_line

if TYPE_CHECKING:
    from barlow.progress import Reporter
    from barlow.settings import Settings

Command = Callable[[list[str]], None]  # given the arguments after its name

_IN_BATCHES = ("pretrain", "evaluate", "transfer", "predict", "embed")  # commands with --batch-size


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments after `barlow`; default: those of this process.

    Returns:
        Exit status: 0 for success, 2 for a user's mistake, 1 for anything else.
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
    log_to_stderr()
    return run_and_report(partial(_run, name, rest), in_batches=name in _IN_BATCHES)


def _run(name: str, argv: list[str]) -> None:
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {name!r}: {hint}")
    COMMANDS[name](argv)


def _pretrain(argv: list[str]) -> None:
    """Pretrain an encoder on unlabelled images."""
    from barlow.settings import Settings, recipe_names

    parser = command_parser(_pretrain)
    parser.add_argument("--out", type=str, required=True, help="folder of the run")
    names = ", ".join(recipe_names())
    parser.add_argument("--recipe", type=str, help=f"recipe of defaults: {names}, or a YAML file")
    parser.add_argument("--quiet", action="store_true", help="print warnings only")
    parser.add_argument("--verbose", action="store_true", help="print every row of metrics.csv")
    add_options(parser, Settings, settings_defaults(argv))
    values = parse(parser, argv)
    out, progress = values.pop("out"), reporter(values.pop("quiet"), values.pop("verbose"))
    del values["recipe"]
    _train(Settings(**values), out, progress)
    _write_page(out, progress)


def _evaluate(argv: list[str]) -> None:
    """Evaluate an encoder, with or without labels, beside baselines such as random weights."""
    from barlow.evaluation.protocols import PROTOCOLS, evaluate, protocol_named

    given = peek(argv, "--protocol")
    function = protocol_named(given or "linear")
    first = (function.__doc__ or "").splitlines()[0]
    parser = new_parser(f"evaluate --protocol {given}" if given else "evaluate", first)
    text = (
        f"{', '.join(PROTOCOLS)}: `barlow evaluate --protocol NAME --help` lists all of its options"
    )
    parser.add_argument("--protocol", type=str, default="linear", help=text)
    add_options(parser, function)
    print_table(evaluate(**parse(parser, argv)))


def _transfer(argv: list[str]) -> None:
    """Evaluate one encoder on several labelled sources, in one table."""
    from barlow.evaluation.transfer import transfer

    print_table(call_with_options(_transfer, transfer, argv))


def _compare(argv: list[str]) -> None:
    """Compare two evaluated runs, or several seeds of each, on the same test images."""
    from barlow.evaluation.compare import compare

    print_table(call_with_options(_compare, compare, argv))


def _predict(argv: list[str]) -> None:
    """Classify images with a classifier saved by `barlow evaluate --out`."""
    from barlow.evaluation.classifier import predict

    print(f"{call_with_options(_predict, predict, argv)} images classified")


def _embed(argv: list[str]) -> None:
    """Compute the representation of every image of a source, into one Parquet file."""
    from barlow.embeddings.writing import write_embeddings

    parser = command_parser(_embed)
    add_options(parser, write_embeddings, exclude="reporter")
    write_embeddings(**parse(parser, argv), reporter=reporter())


def _search(argv: list[str]) -> None:
    """Find the images most similar to given ones."""
    from barlow.embeddings.search import search_and_show

    parser = command_parser(_search)
    add_options(parser, search_and_show, exclude="file")
    parser.add_argument("--in", type=str, required=True, help="file written by barlow embed")
    values = parse(parser, argv)
    print_table(search_and_show(file=values.pop("in"), **values))


def _duplicates(argv: list[str]) -> None:
    """Find near-duplicate images."""
    from barlow.embeddings.duplicates import find_duplicates

    print_table(call_with_options(_duplicates, find_duplicates, argv))


def _anomalies(argv: list[str]) -> None:
    """Find the images least similar to the training images, or to the rest of their file."""
    from barlow.embeddings.anomalies import find_anomalies

    print_table(call_with_options(_anomalies, find_anomalies, argv))


def _explore(argv: list[str]) -> None:
    """Show a map of all images in the browser (Embedding Atlas)."""
    from barlow.embeddings.explore import explore

    parser = command_parser(_explore)
    add_options(parser, explore, exclude="reporter")
    explore(**parse(parser, argv), reporter=reporter())


def _views(argv: list[str]) -> None:
    """Draw images and their two views, to see what the encoder will learn to ignore."""
    from barlow.assembly import draw_source_views
    from barlow.settings import Settings

    parser = command_parser(_views)
    parser.add_argument("--out", type=str, required=True, help="PNG file to write")
    parser.add_argument("--recipe", type=str, help="recipe to take sizes and views from")
    used = ("source", "image_size", "channels", "views", "view1", "view2", "limit", "seed")
    defaults = settings_defaults(argv)
    add_options(parser, Settings, defaults, only=used)
    values = parse(parser, argv)
    out = values.pop("out")
    del values["recipe"]
    print(draw_source_views(Settings(**defaults | values), Path(out)))


def _report(argv: list[str]) -> None:
    """Write a run as an HTML page, or compare several runs in one."""
    from barlow.report import write_report

    print(call_with_options(_report, write_report, argv))


def _watch(argv: list[str]) -> None:
    """Serve the live page of a run, on this machine only."""
    from barlow.report.watch import serve

    def started(address: str) -> None:
        print(f"barlow: {address} (press Ctrl-C to stop)", flush=True)

    parser = command_parser(_watch)
    add_options(parser, serve, only=("run", "port"))
    serve(**parse(parser, argv), started=started)


def _demo(argv: list[str]) -> None:
    """Pretrain and evaluate on 5,000 real digits, in a few minutes on a laptop."""
    from barlow.evaluation import evaluate
    from barlow.settings import Settings

    parser = command_parser(_demo)
    parser.add_argument("--out", type=str, default="runs/demo", help="folder of the run")
    out = parse(parser, argv)["out"]
    progress = reporter()
    _train(Settings.of("mnist5k", "demo"), out, progress)
    print("\nA linear classifier on the frozen encoder, 10 labels per class:\n")
    print_table(evaluate(out, "mnist5k", "mnist5k", labels_per_class=10, baseline="random"))
    _write_page(out, progress)
    print(f"\nThe run is in {out}; load its encoder with barlow.load_encoder({out!r})")


def _export(argv: list[str]) -> None:
    """Export an encoder for other programs: timm, safetensors, ONNX, torch.export."""
    from barlow.share.exporting import export

    done = call_with_options(_export, export, argv)
    print(f"wrote {done.path}")
    if done.difference is not None:
        print(f"its output differs from PyTorch's by at most {done.difference:.1e}")


def _push(argv: list[str]) -> None:
    """Upload an encoder to the Hugging Face hub, with a model card."""
    from barlow.share.pushing import push

    done = call_with_options(_push, push, argv)
    print(f"{done.place}\n")
    for name, size in done.files.items():
        print(f"{size:>12,} {name}")
    print(f"\n{done.card}")


COMMANDS: dict[str, Command] = {
    "pretrain": _pretrain,
    "evaluate": _evaluate,
    "transfer": _transfer,
    "compare": _compare,
    "predict": _predict,
    "embed": _embed,
    "search": _search,
    "duplicates": _duplicates,
    "anomalies": _anomalies,
    "explore": _explore,
    "views": _views,
    "export": _export,
    "push": _push,
    "report": _report,
    "watch": _watch,
    "demo": _demo,
}


def _train(settings: "Settings", out: str, progress: "Reporter") -> None:
    from barlow.pretraining import train

    train(settings, out, progress)


def _write_page(out: str, progress: "Reporter") -> None:
    from barlow.ranks import is_main_process
    from barlow.report import write_report

    if not is_main_process():
        return
    try:
        progress.say(f"wrote the run's page to {write_report([out])}")
    except Exception as error:  # the training succeeded, with or without its page
        progress.warn(f"warning: cannot write the run's page: {one_line(error)}")


def _overview() -> str:
    lines = [f"  {name:<10} {help_of(command)}" for name, command in COMMANDS.items()]
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
