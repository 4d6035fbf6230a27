"""Labels of lists, shards and tables: some may be missing, and no class is made up."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from barlow.data import open_source
from barlow.data.source import Source
from barlow.evaluation.task import open_task

from .conftest import write_folder


def listed(root: Path, labels: list) -> Source:
    """Images with labels of metadata.jsonl; `...` for a line without a label."""
    names = [f"{i:02}.png" for i in range(len(labels))]
    write_folder(root, names)
    rows = [
        {"file_name": name} if label is ... else {"file_name": name, "label": label}
        for name, label in zip(names, labels, strict=True)
    ]
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(str(root))


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        ([0, 1, 0], ["0", "1"], [0, 1, 0]),
        ([False, True, False], ["False", "True"], [0, 1, 0]),
        ([10, 2, 9], ["2", "9", "10"], [2, 0, 1]),
        ([20240131, 20240229, 20240131], ["20240131", "20240229"], [0, 1, 0]),
        ([10**20, 3, 3], ["3", str(10**20)], [1, 0, 0]),
        (["dog", None, "cat"], ["cat", "dog"], [1, -1, 0]),
        ([..., 3, float("nan")], ["3"], [-1, 0, -1]),
    ],
)
def test_metadata_names_the_classes_that_are_there(
    tmp_path: Path, labels: list, classes: list[str], numbers: list[int]
) -> None:
    source = listed(tmp_path, labels)
    assert source.classes == classes
    assert source.labels is not None
    assert source.labels.tolist() == numbers


def test_metadata_without_any_label_has_none(tmp_path: Path) -> None:
    source = listed(tmp_path, [None, ..., ""])
    assert (source.labels, source.classes) == (None, None)


def test_whole_numbers_align_by_name_between_sources(tmp_path: Path) -> None:
    listed(tmp_path / "train", [1, 10, 1, 10])
    listed(tmp_path / "test", [10, None, 1])
    task = open_task(str(tmp_path / "train"), str(tmp_path / "test"))
    assert task.names == ["1", "10"]
    assert task.test.rows.tolist() == [0, 2]
    assert task.test.y.tolist() == [1, 0]


def test_null_in_a_shard_is_no_class(tmp_path: Path) -> None:
    image = (write_folder(tmp_path / "images", ["1.png"]) / "1.png").read_bytes()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, label in enumerate([None, 0, "newt"]):
            content = json.dumps({"label": label}).encode()
            for name, data in ((f"{i}.json", content), (f"{i}.png", image)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    source = open_source(str(tmp_path / "a.tar"))
    assert source.classes == ["0", "newt"]
    assert source.labels.tolist() == [-1, 0, 1]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    image = (write_folder(tmp_path / "images", ["1.png"]) / "1.png").read_bytes()

    def make(values: pa.Array, name: str = "label") -> Source:
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"image": [image] * len(values), name: values}), path)
        return open_source(str(path))

    return make


@pytest.mark.parametrize(
    ("values", "classes", "numbers"),
    [
        (pa.array(["dog", None, "cat", ""]), ["cat", "dog"], [1, -1, 0, -1]),
        (pa.array([10, None, 9, 10]), ["9", "10"], [1, -1, 0, 1]),
        (pa.array([float("nan"), 0.5, None]), ["0.5"], [-1, 0, -1]),
        (pa.array([10.0, None, 3.0]), ["3", "10"], [1, -1, 0]),
        (pa.array([True, None, False]), ["False", "True"], [1, -1, 0]),
    ],
)
def test_null_in_a_table_is_no_class(
    table, values: pa.Array, classes: list[str], numbers: list[int]
) -> None:
    source = table(values)
    assert source.classes == classes
    assert source.labels.tolist() == numbers


@pytest.mark.parametrize("values", [pa.array([[1, 2], [3]]), pa.nulls(2), pa.nulls(2, pa.string())])
def test_a_table_of_lists_or_of_nothing_but_null_has_no_labels(table, values: pa.Array) -> None:
    source = table(values, "labels")
    assert len(source) == 2
    assert (source.labels, source.classes) == (None, None)


def test_null_among_named_classes_is_no_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import ClassLabel, Dataset, Features, Image

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    image = (write_folder(tmp_path / "images", ["1.png"]) / "1.png").read_bytes()
    rows = {"image": [{"bytes": image, "path": None}] * 4, "label": [1, None, 0, -1]}
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    assert source.classes == ["a", "b"]
    assert source.labels.tolist() == [1, -1, 0, -1]


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_whole_numbers_with_gaps_are_the_classes_of_those_without(
    tmp_path: Path, ending: str
) -> None:
    root = write_folder(tmp_path, ["1.png", "2.png", "3.png"])
    csv = "file_name,label\n1.png,10.0\n2.png,\n3.png,3.0\n"
    rows = [{"file_name": "1.png", "label": 10.0}, {"file_name": "2.png"}]
    rows.append({"file_name": "3.png", "label": 3.0})
    text = csv if ending == "csv" else "\n".join(map(json.dumps, rows))
    (root / f"metadata.{ending}").write_text(text)
    source = open_source(str(root))
    assert source.classes == ["3", "10"]
    assert source.labels.tolist() == [1, -1, 0]


def test_spaces_around_a_label_are_no_part_of_it(tmp_path: Path) -> None:
    source = listed(tmp_path, ["cat ", "cat", " dog"])
    assert source.classes == ["cat", "dog"]
    assert source.labels.tolist() == [0, 0, 1]
    (tmp_path / "list.txt").write_text("00.png\tcat\n01.png\t cat\n")
    assert open_source(str(tmp_path / "list.txt")).classes == ["cat"]


def test_numbers_keep_their_zeros(tmp_path: Path) -> None:
    source = listed(tmp_path, ["10", "007", "7", "001"])
    assert source.classes == ["001", "007", "7", "10"]
    assert source.labels.tolist() == [3, 1, 2, 0]
