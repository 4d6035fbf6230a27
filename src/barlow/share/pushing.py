"""Uploading an encoder to the Hugging Face hub, with a model card."""

import re
import tempfile
from pathlib import Path
from typing import NamedTuple

from torch import nn

from barlow.atomic import write_text
from barlow.errors import UserError, one_line
from barlow.share.card import model_card
from barlow.share.loading import load_encoder
from barlow.share.timm_folder import halve_precision, require_timm_support, save_encoder


class Pushed(NamedTuple):
    """What was uploaded, or would be.

    Attributes:
        place: the model's address on the hub, or the local folder if `dry_run`.
        files: names and sizes in bytes.
        card: the text of `README.md`.
    """

    place: str
    files: dict[str, int]
    card: str


def push(
    encoder: str,
    repository: str,
    *,
    dry_run: bool = False,
    private: bool = False,
    license: str = "mit",
    half: bool = False,
) -> Pushed:
    """Upload an encoder to the Hugging Face hub, as a timm folder with a model card.

    Args:
        encoder: a run, whose data, settings, command and evaluations the card lists, or anything
            else that `load_encoder` takes.
        repository: OWNER/NAME; created if needed.
        dry_run: write the folder and show it, without uploading.
        private: make the repository private, if it is new.
        license: license of the weights, as abbreviated on the hub.
        half: store matrices and filters as float16, for half the bytes; loading converts them back
            to float32.

    Returns:
        What was uploaded, and where.

    Raises:
        UserError: if there is no such encoder, timm cannot represent it, the repository name is
            invalid, or the hub refuses.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"{repository!r} is not a repository name: give OWNER/NAME")
    module = load_encoder(encoder)
    require_timm_support(module)
    if half:
        halve_precision(module)
    card = model_card(module, encoder, repository, license)
    if dry_run:
        return _write(module, card, Path(tempfile.mkdtemp(prefix="barlow-push-")))
    with tempfile.TemporaryDirectory(prefix="barlow-push-") as folder:
        written = _write(module, card, Path(folder))
        return written._replace(place=_upload(folder, repository, private))


def _write(encoder: nn.Module, card: str, folder: Path) -> Pushed:
    save_encoder(encoder, folder)
    write_text(folder / "README.md", card)
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
    return Pushed(str(folder), files, card)


def _upload(folder: str, repository: str, private: bool) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Add an encoder of barlow-twins"
        )
    except Exception as error:  # from the hub or its HTTP client, or because there is no token
        raise UserError(
            f"cannot push to {repository}: {one_line(error, 300)}; to log in, run "
            "`hf auth login` or set HF_TOKEN"
        ) from error
    return f"{api.endpoint}/{repository}"
