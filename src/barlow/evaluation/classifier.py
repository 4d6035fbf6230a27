"""A saved classifier: writing, loading and predicting."""

import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from barlow.atomic import write_atomically, write_csv, write_text
from barlow.data import Preprocess, Source, eval_batches, open_source, preprocess_of
from barlow.distributed import rank
from barlow.errors import UserError
from barlow.evaluation.features import select_device, with_progress

log = logging.getLogger(__name__)

_VERSION = 1


class Classifier(nn.Module):
    """An encoder and a linear layer on its representation.

    Args:
        encoder: `(N, C, H, W) -> (N, F)`, with `num_features` and `preprocess`.
        classes: names of the classes.

    Example:
        >>> import barlow
        >>> encoder = barlow.create_encoder("resnet18", image_size=32)
        >>> Classifier(encoder, ["cat", "dog"])(torch.zeros(4, 3, 32, 32)).shape
        torch.Size([4, 2])
    """

    def __init__(self, encoder: nn.Module, classes: list[str]) -> None:
        super().__init__()
        self.encoder = encoder
        self.classes = classes
        features = encoder.num_features
        assert isinstance(features, int)
        self.head = nn.Linear(features, len(classes))

    @property
    def preprocess(self) -> Preprocess:
        """The preprocessing of the encoder."""
        return preprocess_of(self.encoder)

    def forward(self, images: Tensor) -> Tensor:
        """Preprocessed images `(N, C, H, W)` to logits `(N, classes)`."""
        scores: Tensor = self.head(self.encoder(images))
        return scores


def save_classifier(classifier: Classifier, folder: str | Path) -> None:
    """Write a classifier as a folder: `encoder/`, which timm loads, and the layer on top of it.

    Args:
        classifier: with an encoder from `create_encoder` or `load_encoder`.
        folder: created if needed.

    Raises:
        UserError: if the folder holds something else already.
    """
    from safetensors.torch import save

    from barlow.share import save_encoder

    folder = Path(folder)
    require_classifier_folder(folder)
    save_encoder(classifier.encoder, folder / "encoder")
    head = {k: v.detach().cpu().contiguous() for k, v in classifier.head.state_dict().items()}
    write_atomically(folder / "head.safetensors", lambda f: f.write(save(head)))
    # Written last, so that a folder with this file is complete.
    metadata = {
        "version": _VERSION,
        "classes": classifier.classes,
        "preprocess": preprocess_of(classifier.encoder).to_dict(),
    }
    write_text(folder / "classifier.json", json.dumps(metadata, indent=2) + "\n")


def keep_classifier(classifier: Classifier, folder: str) -> None:
    """`save_classifier` at the end of an evaluation: a full disk must not cost its result."""
    if rank():
        return  # the first rank saves it for all
    try:
        save_classifier(classifier, folder)
    except (OSError, UserError) as error:
        log.warning("could not save the classifier: %s", error)


def require_classifier_folder(folder: Path) -> None:
    """Raise the errors of `save_classifier` before hours of work, without writing anything.

    Raises:
        UserError: if the folder holds anything but a classifier.
        OSError: if nothing can be written there.
    """
    other = folder.exists() and not (folder / "classifier.json").exists()
    if other and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not a saved classifier: give a new folder")
    try:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def load_classifier(folder: str | Path) -> Classifier:
    """Load what `save_classifier` wrote, in eval mode; nothing in it is executed.

    Raises:
        UserError: if there is no complete classifier.
    """
    from safetensors.torch import load_file

    from barlow.share import load_encoder

    folder = Path(folder)
    if not (folder / "classifier.json").exists():
        raise UserError(
            f"no classifier in {folder}: make one with `barlow evaluate ENCODER "
            f"--train SOURCE --out {folder}`"
        )
    try:
        metadata = json.loads((folder / "classifier.json").read_text())
        if metadata["version"] != _VERSION:
            raise UserError(f"{folder} was written by another version of barlow: create it again")
        classifier = Classifier(load_encoder(folder / "encoder"), list(metadata["classes"]))
        classifier.encoder.preprocess = Preprocess(**metadata["preprocess"])
        classifier.head.load_state_dict(load_file(folder / "head.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the classifier in {folder} is damaged: {error}") from error
    return classifier.eval()


def predict(
    model: str,
    source: str,
    out: str,
    *,
    batch_size: int = 256,
    limit: int | None = None,
    accelerator: str = "auto",
) -> int:
    """Classify images with a saved classifier and write the predictions as a table.

    Args:
        model: folder of a classifier, as saved by `barlow evaluate --out`.
        source: source of the images, labelled or not; `::split` at its end picks one split.
        out: CSV file to write: for each image its id, class and the probability of that class, then
            the probability of every class in a column of its name.
        batch_size: images per batch.
        limit: use only the first N images.
        accelerator: device type: auto, cpu, cuda or mps.

    Returns:
        The number of images written. Images that cannot be read are left out and logged.

    Raises:
        UserError: if there is no such classifier, source or accelerator, `out` does not end in
            .csv, or more than 5 % of the images cannot be read.
    """
    if Path(out).suffix.lower() != ".csv":
        raise UserError(f"predictions are written as CSV: name the file {Path(out).stem}.csv")
    device = select_device(accelerator)
    classifier = load_classifier(model).to(device)
    in_chans = preprocess_of(classifier.encoder).in_chans
    images = open_source(source, in_chans=in_chans, limit=limit)
    written = 0

    def predictions() -> Iterator[list[str]]:
        nonlocal written
        for scores, rows in scores_of(classifier, images, batch_size):
            best = scores.argmax(1).tolist()
            for row, c, shares in zip(rows.tolist(), best, scores.softmax(1).tolist(), strict=True):
                cells = [f"{share:.4f}" for share in shares]
                yield [images.ids[row], classifier.classes[c], cells[c], *cells]
            written += len(rows)

    fixed = ["id", "class", "probability"]
    names = [f"probability of {c}" if c in fixed else c for c in classifier.classes]
    write_csv(Path(out), [*fixed, *names], predictions())
    for name, reason in images.skipped:
        log.warning("skipped %s: %s", name, reason)
    return written


def scores_of(
    classifier: Classifier, source: Source, batch_size: int = 256
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits `(B, classes)` on the CPU and their rows `(B,)` in the source, batch by batch."""
    classifier.eval()
    device = classifier.head.weight.device
    preprocess = preprocess_of(classifier.encoder)
    batches = eval_batches(source, preprocess, batch_size, device=device)
    what = f"classifying {len(source):,} images of {source.name}"
    for images, rows in with_progress(batches, what):
        with torch.inference_mode():
            yield classifier(images).float().cpu(), rows
