"""Models on the Hugging Face hub: only the files that are needed are downloaded, and only once."""

from pathlib import Path

from barlow.data.hub import PREFIX
from barlow.errors import UserError, one_line
from barlow.share.timm_folder import WEIGHTS_FILES

_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".tar")


def download(where: str) -> Path:
    """Download a model from the hub, or find it in the hub's local cache if there is no network.

    Args:
        where: `hf://OWNER/NAME[@REVISION][/FILE]`.

    Returns:
        A timm folder, or one file of weights.

    Raises:
        UserError: if there is no such model, there is neither network nor a cached copy, or it is
            unclear which file is meant.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    owner, _, rest = where.removeprefix(PREFIX).partition("/")
    name, _, file = rest.partition("/")
    name, _, revision = name.partition("@")
    if not owner or not name:
        raise UserError(f"{where} does not name a model: give {PREFIX}OWNER/NAME")
    repo, at = f"{owner}/{name}", revision or None
    try:
        names = HfApi().list_repo_files(repo, revision=at)
    except Exception as error:  # from the hub, its HTTP client or the operating system
        try:
            cached = Path(
                snapshot_download(repo, revision=at, local_files_only=True, allow_patterns=[])
            )
        except Exception:
            raise UserError(f"cannot download {where}: {one_line(error, 300)}") from error
        names = [str(p.relative_to(cached)) for p in cached.rglob("*") if p.is_file()]
    chosen = [file] if file else _choose(names, where)
    try:
        paths = [Path(hf_hub_download(repo, name, revision=at)) for name in chosen]
    except Exception as error:
        raise UserError(f"cannot download {where}: {one_line(error, 300)}") from error
    return paths[0] if len(paths) == 1 else paths[0].parent


def _choose(names: list[str], where: str) -> list[str]:
    """The files that make up a model: those of a timm folder, or the only file of weights."""
    if "config.json" in names and (known := [n for n in WEIGHTS_FILES if n in names]):
        return ["config.json", known[0]]
    weights = sorted(name for name in names if name.endswith(_SUFFIXES))
    if len(weights) != 1:
        which = ", ".join(weights[:8]) or "none"
        raise UserError(
            f"{where} has {len(weights)} weights files ({which}): "
            f"give one as {where.rstrip('/')}/FILE"
        )
    return weights
