"""Data sets of the Hugging Face hub: downloaded once, then read from the memory-mapped cache."""

from barlow.data.source import Table
from barlow.data.splits import Choose
from barlow.data.tables import table_of
from barlow.errors import UserError

PREFIX = "hf://"


def open_hub(name: str, choose: Choose) -> Table:
    """`owner/name` on the hub, or in its local cache when there is no network."""
    import datasets

    datasets.disable_progress_bars()
    try:
        splits = datasets.get_dataset_split_names(name)
    except Exception as error:
        raise UserError(f"cannot open {PREFIX}{name}: {_one_line(error)}") from None
    chosen = choose(splits)
    try:
        dataset = datasets.load_dataset(name, split="+".join(chosen))
    except Exception as error:
        raise UserError(f"cannot load {PREFIX}{name}: {_one_line(error)}") from None
    return table_of(dataset, PREFIX + name, "/".join(chosen))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
