"""Encoders and classifiers exported to files for other programs."""

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from barlow.atomic import write_atomically
from barlow.data import preprocess_of
from barlow.encoders import spec_of
from barlow.errors import UserError
from barlow.evaluation.classifier import Classifier, load_classifier
from barlow.share.architectures import torchvision_names
from barlow.share.loading import load_encoder
from barlow.share.timm_folder import halve_precision, require_timm_support, save_encoder

_TOLERANCE = 1e-4  # relative to the largest feature or score, or to 1 if that is larger


class Exported(NamedTuple):
    """A file or folder that was written.

    Attributes:
        path: where it is.
        difference: greatest difference between its output and PyTorch's; None if not a graph.
    """

    path: Path
    difference: float | None = None


def export(
    encoder: str | Path | nn.Module,
    format: Literal["timm", "safetensors", "onnx", "torch-export"],
    out: str,
    *,
    preprocess: bool = False,
    half: bool = False,
) -> Exported:
    """Export an encoder for other programs, or a classifier as a graph that returns class scores.

    Args:
        encoder: a run, anything else that `load_encoder` takes, or (onnx and torch-export only) a
            classifier saved by `barlow evaluate --out`.
        format: what to write: timm, a folder for timm and programs that load timm models;
            safetensors, the weights, under torchvision's names if it has the architecture, else
            timm's; onnx or torch-export, a graph for any batch size, compared with PyTorch before
            it is written.
        out: file or folder to write; must not exist yet.
        preprocess: onnx and torch-export only: include resizing, cropping and normalising in the
            graph, which then takes a batch of uint8 images (N, C, H, W) of any size instead of
            preprocessed float32 images.
        half: timm and safetensors only: store matrices and filters as float16, for half the bytes;
            loading converts them back to float32.

    Returns:
        The path written and, for a graph, its difference from PyTorch.

    Raises:
        UserError: if the format is unknown, cannot hold a classifier or does not take an option,
            `out` exists or has the wrong suffix, or a package for the format is missing.
        RuntimeError: if the graph does not compute the same as PyTorch; nothing is written then.
    """
    if format not in _FORMATS:
        raise UserError(f"unknown format {format!r}: use one of {', '.join(_FORMATS)}")
    path, chosen = Path(out), _FORMATS[format]
    if path.exists():
        raise UserError(f"{out} already exists: give another name")
    if chosen.suffix and path.suffix != chosen.suffix:
        raise UserError(
            f"a file of format {format} ends in {chosen.suffix}: name it {path.stem}{chosen.suffix}"
        )
    if preprocess and not chosen.is_graph:
        raise UserError(
            f"format {format} stores the preprocessing beside the weights: --preprocess works only "
            "with onnx and torch-export"
        )
    if half and chosen.is_graph:
        raise UserError(
            f"format {format} keeps full precision: --half works only with timm and safetensors"
        )
    if isinstance(encoder, nn.Module):
        module, inner = deepcopy(encoder), "its encoder attribute"
    else:
        module, inner = _load_encoder_or_classifier(encoder), f"{encoder}/encoder"
    if isinstance(module, Classifier) and not chosen.is_graph:
        raise UserError(
            f"format {format} takes only encoders, and this is a classifier: give {inner}, or "
            "export class scores as onnx or torch-export"
        )
    if half:
        halve_precision(module)
    return Exported(path, chosen.write(module.cpu().eval(), path, preprocess))


def _load_encoder_or_classifier(place: str | Path) -> nn.Module:
    is_classifier = (Path(place) / "classifier.json").exists()
    return load_classifier(place) if is_classifier else load_encoder(place)


def _write_timm(encoder: nn.Module, path: Path, _: bool) -> None:
    require_timm_support(encoder)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_encoder(encoder, beside)
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_safetensors(encoder: nn.Module, path: Path, _: bool) -> None:
    from safetensors.torch import save

    weights = {k: v.contiguous() for k, v in encoder.state_dict().items()}
    data = save(torchvision_names(weights), {"barlow": _metadata(encoder)})
    write_atomically(path, lambda file: file.write(data))


def _write_onnx(encoder: nn.Module, path: Path, preprocess: bool) -> float:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise UserError(
            f"format onnx needs the package {error.name}: pip install onnx onnxscript onnxruntime"
        ) from error

    graph, images, shapes = _traceable(encoder, preprocess)
    program = torch.onnx.export(
        graph,
        (images,),
        input_names=["images"],
        output_names=["scores" if isinstance(encoder, Classifier) else "features"],
        dynamic_shapes=(shapes,),
        external_data=False,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, {"barlow": _metadata(encoder)})
    data = model.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    difference = _greatest_difference(encoder, preprocess, run)
    write_atomically(path, lambda file: file.write(data))
    return difference


def _write_torch_export(encoder: nn.Module, path: Path, preprocess: bool) -> float:
    graph, images, shapes = _traceable(encoder, preprocess)
    program = torch.export.export(graph, (images,), dynamic_shapes=(shapes,))
    data = io.BytesIO()
    torch.export.save(program, data, extra_files={"barlow": _metadata(encoder)})
    data.seek(0)
    difference = _greatest_difference(encoder, preprocess, torch.export.load(data).module())
    write_atomically(path, lambda file: file.write(data.getvalue()))
    return difference


class _Format(NamedTuple):
    suffix: str  # empty for a folder
    write: Callable[[nn.Module, Path, bool], float | None]
    is_graph: bool


_FORMATS = {
    "timm": _Format("", _write_timm, is_graph=False),
    "safetensors": _Format(".safetensors", _write_safetensors, is_graph=False),
    "onnx": _Format(".onnx", _write_onnx, is_graph=True),
    "torch-export": _Format(".pt2", _write_torch_export, is_graph=True),
}


class _WithPreprocess(nn.Module):
    """Maps uint8 images of any size to features, or to class scores."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.preprocess = preprocess_of(encoder)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.encoder(self.preprocess.prepare(images))
        return features


def _traceable(encoder: nn.Module, preprocess: bool) -> tuple[nn.Module, Tensor, dict[int, Any]]:
    """A module to trace, example images for it, and which of their axes may have any length."""
    from torch.export import Dim

    images = next(_random_images(encoder, preprocess))
    shapes: dict[int, Any] = {0: Dim("batch")}
    if not preprocess:
        return encoder, images, shapes
    shapes |= {2: Dim("height", min=2), 3: Dim("width", min=2)}
    return _WithPreprocess(encoder).eval(), images, shapes


def _random_images(encoder: nn.Module, preprocess: bool) -> Iterator[Tensor]:
    """Random images in several batch sizes and, if the graph resizes them, several image sizes."""
    random, how = torch.Generator().manual_seed(0), preprocess_of(encoder)
    size = how.image_size
    for batch, height, width in (
        (3, size + 16, 2 * size),
        (1, size, size),
        (2, 2 * size, size - 1),
    ):
        shape = (batch, how.in_chans, height, width)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
        yield images if preprocess else how(images)


@torch.no_grad()
def _greatest_difference(
    encoder: nn.Module, preprocess: bool, run: Callable[[Tensor], Tensor]
) -> float:
    worst, prepare = 0.0, preprocess_of(encoder).prepare
    for images in _random_images(encoder, preprocess):
        features = encoder(prepare(images) if preprocess else images)
        difference = float((run(images) - features).abs().max())
        if not difference <= _TOLERANCE * max(1.0, float(features.abs().max())):
            raise RuntimeError(
                f"the exported graph differs from PyTorch by {difference:.2g} on images of shape "
                f"{tuple(images.shape)}; nothing was written"
            )
        worst = max(worst, difference)
    return worst


def _metadata(encoder: nn.Module) -> str:
    """The exported file's metadata: how to build the encoder again, and any class names."""
    description: dict[str, Any] = {"preprocess": preprocess_of(encoder).to_dict()}
    if isinstance(encoder, Classifier):
        description["classes"], encoder = encoder.classes, encoder.encoder
    return json.dumps({"encoder": spec_of(encoder).to_dict(), **description})
