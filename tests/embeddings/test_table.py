import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from barlow.embeddings import read_embeddings, table
from barlow.embeddings.layout import find_plain_vectors
from barlow.embeddings.table import Rows, group_size, open_table, write_table
from barlow.errors import UserError


def write(path, x, group, about=None):
    n = len(x)
    groups = [
        Rows(
            [f"r{i}" for i in range(s, min(s + group, n))],
            [None] * min(group, n - s),
            [str(i % 3) for i in range(s, min(s + group, n))],
            x[s : s + group],
        )
        for s in range(0, n, group)
    ]
    with open(path, "wb") as file:
        write_table(
            file,
            groups,
            features=x.shape[1],
            dtype=str(x.dtype),
            labelled=True,
            about=about or {},
        )
    return path


@pytest.fixture(params=["float32", "float16"])
def vectors(request):
    def make(rows, features):
        return np.random.default_rng(0).standard_normal((rows, features)).astype(request.param)

    return make


@pytest.mark.parametrize(("rows", "features"), [(1, 1), (100, 7), (40_000, 3), (9_000, 600)])
def test_vectors_are_read_from_where_they_stand(tmp_path, vectors, rows, features):
    x = vectors(rows, features)
    file = write(tmp_path / "e.parquet", x, group_size(features, str(x.dtype)))
    opened = open_table(file)
    assert find_plain_vectors(opened.path, opened.parquet, opened.features) is not None
    assert torch.equal(opened.vectors(0, rows), torch.from_numpy(x).float())


def test_what_pyarrow_decodes_is_the_same(tmp_path, vectors):
    x = vectors(500, 12)
    file = write(tmp_path / "e.parquet", x, 200)
    column = pq.read_table(file).column("embedding").combine_chunks()
    assert column.type == pa.list_(pa.field("element", pa.from_numpy_dtype(x.dtype), False), 12)
    assert np.array_equal(column.flatten().to_numpy(zero_copy_only=False).reshape(500, 12), x)


def test_pandas_and_datasets_read_it(tmp_path):
    import datasets
    import pandas as pd

    x = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    file = write(tmp_path / "e.parquet", x, 20)
    frame = pd.read_parquet(file)
    assert np.array_equal(np.stack(frame["embedding"]), x)
    assert frame["label"].tolist()[:4] == ["0", "1", "2", "0"]
    found = datasets.Dataset.from_parquet(str(file), cache_dir=tmp_path).with_format("numpy")
    assert np.array_equal(found["embedding"][:], x)


@pytest.mark.parametrize("first", [0, 1, 250, 299, 499])
def test_blocks_begin_at_any_row(tmp_path, vectors, monkeypatch, first):
    monkeypatch.setattr(table, "_BLOCK_BYTES", 500)
    x = vectors(500, 12)
    opened = open_table(write(tmp_path / "e.parquet", x, 300))
    found = [(start, block.clone()) for start, block in opened.blocks(first)]
    assert found[0][0] == first
    assert torch.equal(torch.cat([b for _, b in found]), torch.from_numpy(x[first:]).float())


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "zstd"},
        {"column_encoding": {"embedding.list.element": "BYTE_STREAM_SPLIT"}},
        {"use_dictionary": True},
        {"data_page_size": 1000, "write_batch_size": 10},
        {"data_page_version": "2.0"},
    ],
)
def test_however_another_program_writes_it_the_vectors_are_the_same(tmp_path, options):
    x = np.random.default_rng(0).integers(0, 5, (500, 12)).astype(np.float32)
    file = write(tmp_path / "e.parquet", x, 200)
    options = {"compression": "none", "use_dictionary": False, **options}
    pq.write_table(pq.read_table(file), tmp_path / "other.parquet", **options)
    found = read_embeddings(tmp_path / "other.parquet")
    assert np.array_equal(found.embeddings, x)
    assert found.ids[-1] == "r499"


def test_a_table_of_lists_from_a_data_frame_is_read(tmp_path):
    import pandas as pd

    x = np.random.default_rng(0).standard_normal((30, 5))
    frame = pd.DataFrame({"id": [str(i) for i in range(30)], "embedding": list(x)})
    frame.to_parquet(tmp_path / "e.parquet")
    found = read_embeddings(tmp_path / "e.parquet")
    assert np.array_equal(found.embeddings, x.astype(np.float32))
    assert found.labels is None


def test_some_rows_in_any_order(tmp_path):
    x = np.zeros((500, 2), np.float32)
    opened = open_table(write(tmp_path / "e.parquet", x, 120))
    assert opened.columns([499, 0, 240, 120, 119])["id"] == ["r499", "r0", "r240", "r120", "r119"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file"),
        (b"PAR1 and then nothing", "cannot be read as Parquet"),
        ({"id": ["a"]}, "holds no embeddings"),
        ({"id": ["a"], "embedding": ["text"]}, "holds no embeddings"),
        (
            {"id": pa.array([], pa.string()), "embedding": pa.array([], pa.list_(pa.float32()))},
            "no",
        ),
    ],
)
def test_a_file_without_embeddings_is_refused(tmp_path, content, message):
    file = tmp_path / "e.parquet"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        pq.write_table(pa.table(content), file)
    with pytest.raises(UserError, match=message):
        open_table(file)


def test_embeddings_of_different_lengths_are_refused(tmp_path):
    pq.write_table(pa.table({"id": ["a", "b"], "embedding": [[1.0, 2.0], [1.0]]}), tmp_path / "e")
    with pytest.raises(UserError, match="different lengths"):
        list(open_table(tmp_path / "e").blocks())


def test_what_a_file_says_of_itself_is_read_back(tmp_path):
    x = np.zeros((3, 2), np.float32)
    write(tmp_path / "e.parquet", x, 3, {"encoder": "abc", "limit": 3})
    assert open_table(tmp_path / "e.parquet").about == {"encoder": "abc", "limit": 3}


def test_the_same_rows_are_the_same_bytes():
    x = np.ones((10, 2), np.float32)
    rows = [Rows([str(i) for i in range(10)], [None] * 10, None, x)]
    first, second = io.BytesIO(), io.BytesIO()
    for file in (first, second):
        write_table(file, rows, features=2, dtype="float32", labelled=False, about={"a": 1})
    assert first.getvalue() == second.getvalue()


def test_numbers_of_another_program_are_read_as_text(tmp_path):
    content = {"id": [7, 17, 27], "label": [0, 1, None], "embedding": [[1.0], [2.0], [3.0]]}
    pq.write_table(pa.table(content), tmp_path / "e.parquet")
    opened = open_table(tmp_path / "e.parquet")
    assert opened.columns() == {"id": ["7", "17", "27"], "label": ["0", "1", None]}
    assert opened.columns([1]) == {"id": ["17"], "label": ["1"]}
    assert opened.names([2]) == ["27"]
