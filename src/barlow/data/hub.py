"""Hugging Face data sets: downloaded once, or read remotely if they do not fit on the disk."""

import shutil
from pathlib import Path
from typing import Any

from barlow.data.parquet import table_of
from barlow.data.remote import open_remote
from barlow.data.source import Table
from barlow.data.splits import SplitChooser
from barlow.errors import UserError, one_line

PREFIX = "hf://"
_COPIES = 2  # `datasets` keeps both the files it downloads and the copy it converts them to


def open_hub(name: str, choose: SplitChooser) -> Table:
    """Open `owner/name` on the hub, or in the hub's local cache when there is no network."""
    import datasets
    from huggingface_hub import HfFileSystem

    datasets.disable_progress_bars()
    try:
        splits = datasets.get_dataset_split_names(name)
        builder = datasets.load_dataset_builder(name)
    except Exception as error:
        raise UserError(f"cannot open {PREFIX}{name}: {one_line(error, 300)}") from None
    chosen = choose(splits)
    try:
        missing = _missing_bytes(builder)
        if missing > (free := _free_bytes(Path(builder.cache_dir))):
            files = [file for split in chosen for file in builder.config.data_files[split]]
            if any(not file.endswith(".parquet") for file in files):
                raise UserError(
                    f"{PREFIX}{name} needs {missing / 1e9:.1f} GB of disk but "
                    f"{free / 1e9:.1f} GB are free, and only Parquet can be read remotely: set "
                    "HF_HOME to a larger disk"
                )
            return open_remote(HfFileSystem(), files, PREFIX + name, "/".join(chosen))
        dataset = datasets.load_dataset(name, split="+".join(chosen))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot load {PREFIX}{name}: {one_line(error, 300)}") from None
    return table_of(dataset, PREFIX + name, "/".join(chosen))


def _missing_bytes(builder: Any) -> int:
    """Bytes that `datasets` would write to store the data set locally; 0 if it already has."""
    from huggingface_hub import HfFileSystem

    if Path(builder.cache_dir).exists() or not builder.config.data_files:
        return 0
    system = HfFileSystem()
    files = {file for split in builder.config.data_files.values() for file in split}
    for folder in {file.rpartition("/")[0] for file in files}:
        system.ls(folder)  # one request caches the sizes of all its files
    total: int = _COPIES * sum(system.info(file)["size"] for file in files)
    return total


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
