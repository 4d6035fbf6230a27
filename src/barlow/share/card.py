"""The model card on the hub: what the model is, its data, training and results, and its use."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from torch import nn

from barlow import __version__
from barlow.command import command
from barlow.data import preprocess_of
from barlow.encoders import STEM_STRIDE, spec_of
from barlow.evaluation.result import Result
from barlow.run import Run
from barlow.settings import Settings

_PAPER = "[Barlow Twins](https://arxiv.org/abs/2103.03230) (Zbontar et al. 2021)"
_OF_A_NEW_ENCODER = ("encoder", "encoder_args", "stem", "pool", "stages", "pretrained")
_HALF = " (matrices and filters rounded to float16; loading converts them to float32)"
# Settings that say where and how often something was done, not what was done.
_OMITTED = {
    *("devices", "accelerator", "workers", "compile"),
    *("save_every", "save_minutes", "eval_every", "log_every", "track"),
}


def model_card(encoder: nn.Module, where: str, repository: str, license: str) -> str:
    """The text of `README.md`, with the metadata that the hub reads.

    Args:
        encoder: the encoder, with its `preprocess`.
        where: what it was loaded from; for a run, the card also lists settings and evaluations.
        repository: `OWNER/NAME` on the hub.
        license: license of the weights, as abbreviated on the hub.

    Returns:
        Markdown. Local paths are shortened to their last two parts.
    """
    run = Run(Path(where))
    settings = run.settings() if run.config_file.exists() else None
    parts = [
        _metadata(settings, license),
        f"# {repository.partition('/')[2]}\n",
        _summary(encoder, trained_here=settings is not None),
        _usage(repository, encoder),
    ]
    if settings:
        parts += [_data_section(settings), _training_section(run, settings), _results_section(run)]
    elif origin := getattr(encoder, "origin", ""):
        parts.append(f"## Origin\n{_with_public_path(str(origin), where)}\n")
    parts.append(f"## Licence\nThe weights: {license}. Written by barlow-twins {__version__}.\n")
    return "\n".join(parts)


def _metadata(settings: Settings | None, license: str) -> str:
    head: dict[str, object] = {
        "license": license,
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["barlow-twins", "self-supervised-learning", "timm"],
    }
    if settings and (hub_source := re.match(r"hf://([^:@]+)", settings.source)):
        head["datasets"] = [hub_source[1]]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n"


def _summary(encoder: nn.Module, trained_here: bool) -> str:
    spec, how = spec_of(encoder), preprocess_of(encoder)
    millions = sum(p.numel() for p in encoder.parameters()) / 1e6
    half = any(p.dtype == torch.float16 for p in encoder.parameters())
    size = how.image_size
    return (
        f"An image encoder{f', trained with {_PAPER}' if trained_here else ''}: {spec.name}"
        f"{_stem(spec.stem)}, {millions:.1f} million parameters{_HALF if half else ''}; "
        f"{how.in_chans} x {size} x {size} in, {encoder.num_features} features out.\n"
    )


def _stem(stem: str) -> str:
    if stem == "standard":
        return ""
    return f" with a 3x3 stride-{STEM_STRIDE[stem]} stem and no pooling"


def _usage(repository: str, encoder: nn.Module) -> str:
    imports, call = "import timm", "encoder({image})  # PIL image in, (1, F) out"
    if (spec := spec_of(encoder)).uses_feature_maps:
        imports += "\nimport torch\nfrom torch.nn.functional import adaptive_avg_pool2d"
        call = (
            f"[\n    adaptive_avg_pool2d(each, {spec.pool}).flatten(1)\n"
            "    for each in encoder.forward_intermediates(\n"
            f"        {{image}}, indices={encoder.kept_maps}, norm=True, intermediates_only=True\n"
            "    )\n]\nfeatures = torch.cat(features, 1)  # PIL image in, (1, F) out"
        )
    call = call.format(image="transform(image)[None]")
    return f"""## Use
```python
{imports}

encoder = timm.create_model("hf-hub:{repository}", pretrained=True, num_classes=0).eval()
data = timm.data.resolve_model_data_config(encoder)
transform = timm.data.create_transform(**data)
features = {call}
```
or, without timm's resizing in between,
```python
import barlow

encoder = barlow.load_encoder("hf://{repository}")
features = encoder(encoder.preprocess(image)[None])
```
"""


def _data_section(settings: Settings) -> str:
    text = f"`{public_path(settings.source)}`"
    if settings.limit:
        text += f", the first {settings.limit} images"
    if settings.init:
        text += f"; training started from `{public_path(settings.init)}`"
    elif settings.pretrained:
        text += "; training started from timm's supervised weights"
    return f"## Data\n{text}. The training itself used no labels.\n"


def _training_section(run: Run, settings: Settings) -> str:
    rows = [
        (field.name, _format_value(getattr(settings, field.name)))
        for field in dataclasses.fields(Settings)
        if field.name not in _OMITTED and _is_set(getattr(settings, field.name))
        if not (settings.init and field.name in _OF_A_NEW_ENCODER)
    ]
    text = _markdown_table([["setting", "value"], *rows])
    measured = run.metrics()
    if measured:
        last = measured[-1]
        text += (
            f"\n{last['step']:.0f} steps in {last['seconds'] / 60:,.0f} minutes; at the end the "
            f"invariance term was {last['invariance']:.4g}, the redundancy-reduction term "
            f"{last['redundancy']:.4g}.\n"
        )
    rerun = command(settings, "RUN", exclude=_OMITTED, format_path=public_path)
    return f"## Training\n```\n{rerun}\n```\n{text}"


def _results_section(run: Run) -> str:
    files = run.evaluation_files()
    if not files:
        return "## Results\nNot evaluated yet.\n"
    return "## Results\n" + "\n".join(_result_table(Result.load(file)) for file in files)


def _result_table(result: Result) -> str:
    options = ", ".join(
        f"{name} {_format_value(value)}"
        for name, value in result.settings.items()
        if name not in ("encoder", "train", "test", "batch_size") and _is_set(value)
    )
    sources = result.settings.get("sources", [])  # of a transfer; its row names begin with these
    data = [
        f"{part}: {split['images']} images of `{public_path(str(split['name']))}`"
        for part in ("train", "test")
        if not sources and (split := result.data.get(part))
    ]
    heading, *rows = result.cells()
    table = [heading, *([_row_name(name, sources), *cells] for name, *cells in rows)]
    return f"{_markdown_table(table)}\n{'. '.join([*data, options])}.\n"


def _row_name(name: str, sources: Sequence[str]) -> str:
    source = next((source for source in sources if name.startswith(f"{source}, ")), "")
    return public_path(source) + name.removeprefix(source)


def _is_set(value: object) -> bool:
    return value is not None and value is not False and value != {}


def _format_value(value: object) -> str:
    if isinstance(value, str):
        return public_path(value)
    if isinstance(value, list):
        return ", ".join(map(_format_value, value))
    return json.dumps(value)


def public_path(place: str) -> str:
    """A path in a form fit to publish: a local path is shortened to its last two parts.

    Example:
        >>> public_path("/home/me/photos/2026"), public_path("../acme/photos/2026")
        ('photos/2026', 'photos/2026')
        >>> public_path("hf://owner/name")
        'hf://owner/name'
    """
    return place if "://" in place else "/".join(Path(place).parts[-2:]).lstrip("/")


def _with_public_path(text: str, place: str) -> str:
    return text.replace(place, public_path(place))


def _markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line holds its headings."""
    written = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    ]
    written.insert(1, "|" + "---|" * len(lines[0]))
    return "\n".join(written) + "\n"
