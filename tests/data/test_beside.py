"""Parquet and tar files beside images, and how a table is known again."""

import io
import json
import resource
import tarfile
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from barlow.data import open_held_out, open_source, shards
from barlow.errors import UserError

from .conftest import write_folder

Log = pytest.LogCaptureFixture


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def pngs(tmp_path: Path, number: int) -> list[bytes]:
    root = write_folder(tmp_path / "pngs", [f"{i}.png" for i in range(number)])
    return [path.read_bytes() for path in sorted(root.iterdir())]


def write_tar(path: Path, images: list[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, image in enumerate(images):
            member = tarfile.TarInfo(f"{i}.png")
            member.size = len(image)
            tar.addfile(member, io.BytesIO(image))


def test_parquet_without_images_leaves_a_folder_of_images_what_it_is(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos", ["a/1.png", "b/2.png"])
    pq.write_table(pa.table({"id": ["a"], "embedding": [[0.5]]}), root / "e.parquet")
    image = pa.array(pngs(tmp_path, 1))
    seen = pa.table({"image": image}).replace_schema_metadata({"barlow.embeddings": "1"})
    pq.write_table(seen, root / "map.parquet")
    assert list(open_source(str(root)).ids) == ["a/1.png", "b/2.png"]


def test_parquet_without_images_is_left_out_of_a_table(tmp_path: Path, caplog: Log) -> None:
    root = tmp_path / "table"
    root.mkdir()
    pq.write_table(pa.table({"image": pngs(tmp_path, 3)}), root / "b.parquet")
    pq.write_table(pa.table({"id": ["a"], "embedding": [[0.5]]}), root / "a.parquet")
    assert len(open_source(str(root))) == 3
    assert "a.parquet" in caplog.text


def test_a_tar_beside_more_images_is_no_shard(tmp_path: Path, caplog: Log) -> None:
    root = write_folder(tmp_path / "photos", ["a/1.png", "b/2.png"])
    write_tar(root / "backup.tar", pngs(tmp_path, 3))
    assert list(open_source(str(root)).ids) == ["a/1.png", "b/2.png"]
    assert "its images are read; left out: backup.tar" in caplog.text


def test_an_image_beside_shards_is_no_source(tmp_path: Path, caplog: Log) -> None:
    root = write_folder(tmp_path / "shards", ["preview.png"])
    write_tar(root / "0.tar", pngs(tmp_path, 3))
    assert len(open_source(str(root))) == 3
    assert "its tar files are read; left out: preview.png" in caplog.text


def test_shards_of_one_name_in_two_folders_have_ids_of_their_own(tmp_path: Path) -> None:
    for name in ("0.tar", "a/0.tar", "b/0.tar"):
        write_tar(tmp_path / "shards" / name, pngs(tmp_path, 1))
    ids = open_source(str(tmp_path / "shards")).ids
    assert list(ids) == ["0.tar/0.png", "a/0.tar/0.png", "b/0.tar/0.png"]
    assert list(open_source(str(tmp_path / "shards" / "a" / "0.tar")).ids) == ["0.tar/0.png"]


def test_shards_without_a_split_are_for_training(tmp_path: Path, caplog: Log) -> None:
    root = tmp_path / "shards"
    for name in ("photos-000.tar", "photos-test-000.tar"):
        write_tar(root / name, pngs(tmp_path, 1))
    train, test = open_source(str(root), "train"), open_held_out(str(root))
    assert list(train.ids) == ["photos-000.tar/0.png"]
    assert list(test.ids) == ["photos-test-000.tar/0.png"]
    assert len(open_source(str(root))) == 2
    assert not caplog.text
    write_tar(root / "photos-train-000.tar", pngs(tmp_path, 1))
    assert list(open_source(str(root), "train").ids) == ["photos-train-000.tar/0.png"]
    assert f"its splits are test, train; left out: {root}/photos-000.tar" in caplog.text


def test_tables_without_a_split_are_for_training(tmp_path: Path) -> None:
    root = tmp_path / "tables"
    root.mkdir()
    for name, number in (("photos", 3), ("test", 2)):
        pq.write_table(pa.table({"image": pngs(tmp_path, 3)[:number]}), root / f"{name}.parquet")
    assert len(open_source(str(root), "train")) == 3
    assert len(open_held_out(str(root))) == 2
    assert len(open_source(str(root))) == 5


def test_hidden_tar_and_parquet_files_are_left_out_and_links_followed(tmp_path: Path) -> None:
    root, more = tmp_path / "shards", tmp_path / "more"
    for path in (root / "0.tar", root / ".snapshot" / "0.tar", more / "1.tar"):
        write_tar(path, pngs(tmp_path, 1))
    (root / "._0.tar").write_bytes(b"what macOS leaves")
    (root / "more").symlink_to(more, target_is_directory=True)
    assert list(open_source(str(root)).ids) == ["0.tar/0.png", "more/1.tar/0.png"]
    table = tmp_path / "table"
    table.mkdir()
    (tmp_path / "elsewhere").mkdir()
    pq.write_table(pa.table({"image": pngs(tmp_path, 2)}), tmp_path / "elsewhere" / "a.parquet")
    (table / "data").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert len(open_source(str(table))) == 2


def test_a_shard_that_is_gone_says_so(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", pngs(tmp_path, 1))
    source = open_source(str(tmp_path / "0.tar"))
    (tmp_path / "0.tar").unlink()
    with pytest.raises(UserError, match=r"cannot read .*0\.tar \(No such file.*same command"):
        source[0]


def test_shards_are_looked_into_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(2):
        write_tar(tmp_path / "shards" / f"{i}.tar", pngs(tmp_path, 1))
    both, images = threading.Barrier(2), shards._images

    def waiting(file: Path) -> list:
        both.wait(2)
        return list(images(file))

    monkeypatch.setattr(shards, "_images", waiting)
    assert list(open_source(str(tmp_path / "shards")).ids) == ["0.tar/0.png", "1.tar/0.png"]


def test_a_full_disk_under_the_copy_of_a_table_says_so(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(2**20)
    pq.write_table(pa.table({"image": [noise]}), tmp_path / "a.parquet")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, hard))
    try:
        with pytest.raises(UserError, match=rf"too large.*copied to {tmp_path / 'cache'}; set"):
            open_source(str(tmp_path / "a.parquet"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_table_is_known_by_its_labels_and_by_all_its_images(tmp_path: Path) -> None:
    images = pngs(tmp_path, 9)
    features = {"info": {"features": {"image": {"_type": "Image"}}}}

    def fingerprint(name: str, rows: list[bytes], labels: list[str]) -> str:
        path = tmp_path / name / "a.parquet"
        path.parent.mkdir()
        structs = [{"bytes": row, "path": None} for row in rows]
        table = pa.table({"image": structs if name.startswith("hub") else rows, "label": labels})
        if name.startswith("hub"):
            table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        pq.write_table(table, path)
        return open_source(str(path)).fingerprint

    labels = list("aabbccdde")
    other = [*images[:2], images[2] + b"more", *images[3:]]
    for kind in ("plain", "hub"):
        first = fingerprint(f"{kind}1", images, labels)
        assert fingerprint(f"{kind}2", images, labels) == first
        assert fingerprint(f"{kind}3", images, labels[::-1]) != first
        assert fingerprint(f"{kind}4", other, labels) != first
