"""Parquet that is read where it is: the same images, in an order by address, a few reads each."""

from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from barlow import address
from barlow.data import Loader
from barlow.data.decode import decode
from barlow.data.parquet import open_parquet
from barlow.data.remote import RowGroups, open_remote
from barlow.data.source import Source
from barlow.errors import UserError
from barlow.views import TwoViews

from .conftest import write_folder

ROWS = 70


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    root = write_folder(tmp_path / "images", [f"{i:03}.png" for i in range(ROWS)])
    pngs = [path.read_bytes() for path in sorted(root.iterdir())]
    made = []
    for number, some in enumerate((pngs[:40], pngs[40:])):
        made.append(str(tmp_path / f"train-{number:05}-of-00002.parquet"))
        table = pa.table({"id": list(range(len(some))), "image": some})
        pq.write_table(table, made[-1], row_group_size=7)
    return made


def remote(files: list[str], limit: int | None = None) -> Source:
    return Source("far", open_remote(fsspec.filesystem("file"), files, "far", "train"), limit=limit)


def test_every_image_is_the_one_of_the_downloaded_table(files: list[str]) -> None:
    far, near = remote(files), open_parquet(Path(files[0]).parent, lambda splits: ["train"])
    assert len(far) == len(near.records) == ROWS
    assert far.labels is None
    assert list(far.ids)[:2] == ["train:0", "train:1"]
    for i in (0, 6, 7, 39, 40, 69, 3):
        assert torch.equal(far[i], decode(near.records[i]))


@pytest.mark.parametrize("limit", [None, 25])
def test_workers_ranks_and_a_resumed_epoch_change_nothing(
    files: list[str], limit: int | None
) -> None:
    def batches(first_step: int = 0, **options) -> list[tuple]:
        views = TwoViews(16, preset="small")
        loader = Loader(remote(files, limit), views, 8, seed=1, **options)
        return list(loader.epoch(1, first_step))

    whole = batches(workers=0)
    assert len(whole) == (limit or ROWS) // 8
    for other in (batches(workers=2), [whole[0], *batches(1, workers=1)]):
        torch.testing.assert_close(other, whole, rtol=0, atol=0)
    ranks = [batches(workers=0, rank=rank, world_size=2) for rank in range(2)]
    for batch, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        joined = [torch.cat(view) for view in zip(*parts, strict=True)]
        torch.testing.assert_close(joined, list(batch), rtol=0, atol=0)


def test_an_epoch_fetches_every_row_group_once(
    files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("barlow.data.remote._MOST", 3)
    source = remote(files)
    fetched = []
    fetch = RowGroups._fetch
    monkeypatch.setattr(
        RowGroups, "_fetch", lambda self, group: fetched.append(group) or fetch(self, group)
    )
    for i in source.order(address.key(0, 0)).tolist():
        source.open(i)
    assert sorted(fetched) == list(range(11))  # six groups of the first file, five of the second
    assert len(source.records._kept) == 3
    fetched.clear()
    some = source.spread(20)
    assert [some[i].shape for i in range(len(some))] == [(3, 20, 24)] * 20
    assert len(set(fetched)) <= 3  # neighbours


@pytest.mark.parametrize("n", [1, 10, 20])
def test_blocks_take_any_order_and_samples_mix_within_a_few(n: int) -> None:
    starts = np.array([0, 4, 9, 15, 20])
    orders = [address.block_permutation(starts, n, 2, address.key(0, e)) for e in range(200)]
    for order in orders:
        assert order.sort().values.tolist() == list(range(n))
    assert len({tuple(order.tolist()) for order in orders}) > (0 if n == 1 else 150)
    if n == 20:
        firsts = torch.stack([order[0] for order in orders])
        assert len(firsts.unique()) == 20  # anything may come first
        blocks = np.searchsorted(starts, orders[0].numpy(), side="right")
        assert len(set(blocks[:8])) == 2


def test_a_connection_that_breaks_is_told_and_no_image_is_called_broken(files: list[str]) -> None:
    source = remote(files)
    Path(files[1]).unlink()
    assert source[0].shape == (3, 20, 24)
    with pytest.raises(UserError, match=r"00001.*run the same command again to resume") as one:
        source[69]
    with pytest.raises(UserError) as caught:
        list(Loader(source, TwoViews(16), 8, seed=0, workers=2).epoch(0))
    assert str(caught.value) == str(one.value)  # not wrapped in a worker's traceback
