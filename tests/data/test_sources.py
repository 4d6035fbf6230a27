"""One string finds the images, their splits and their labels, or says what is wrong."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from barlow.data import open_held_out, open_source
from barlow.data.folder import Paths
from barlow.errors import UserError

Make = Callable[..., Path]


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


def shades(source: str, split: str | None = None) -> list[int]:
    images = open_source(source, split)
    return [int(images[i][0, 0, 0]) for i in range(len(images))]


def test_the_digits_are_split_by_class_and_always_alike() -> None:
    train, test = open_source("mnist5k", "train", in_chans=1), open_held_out("mnist5k", in_chans=1)
    assert test is not None
    assert (len(train), len(test)) == (4000, 1000)
    assert torch.equal(train.labels.bincount(), torch.full((10,), 400))
    assert torch.equal(test.labels.bincount(), torch.full((10,), 100))
    pixels = {train[i].numpy().tobytes() for i in range(0, 4000, 7)}
    assert not pixels & {test[i].numpy().tobytes() for i in range(1000)}
    assert train.fingerprint == open_source("mnist5k::train", in_chans=1).fingerprint
    assert train.fingerprint != test.fingerprint
    assert len(open_source("mnist5k")) == 5000


def test_grey_digits_come_with_as_many_channels_as_asked() -> None:
    one, three = (open_source("mnist5k", "test", in_chans=c)[5] for c in (1, 3))
    assert (one.shape, three.shape) == ((1, 28, 28), (3, 28, 28))
    assert torch.equal(three, one.expand(3, -1, -1))


def test_the_first_images_of_a_limit_are_the_first_of_the_source() -> None:
    few, all_ = open_source("mnist5k", "test", limit=25), open_source("mnist5k", "test")
    assert len(few) == len(few.ids) == len(few.labels) == 25
    assert all(torch.equal(few[i], all_[i]) for i in range(25))
    with pytest.raises(IndexError):
        few[25]


def test_the_ids_of_a_limit_are_cut_once(folder: Make) -> None:
    root = str(folder(["1.png", "2.png", "3.png"]))
    few = open_source(root, limit=2)
    assert list(few.ids) == ["1.png", "2.png"]
    assert few.ids is few.ids
    assert isinstance(open_source(root, limit=3).ids, Paths)


def test_a_folder_of_any_depth_is_read_in_order_of_names(folder: Make) -> None:
    root = folder(["b.png", "a/deep/down/x.PNG", "a/c.png"])
    (root / "notes.txt").write_text("not an image")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "d.png").write_bytes(png(0))
    source = open_source(str(root), "train")
    assert list(source.ids) == ["a/c.png", "a/deep/down/x.PNG", "b.png"]
    assert source.labels is None
    assert source[1].shape == (3, 20, 24)
    assert open_held_out(str(root)) is None


def test_sub_folders_are_classes(folder: Make) -> None:
    root = folder(["dog/1.png", "cat/1.png", "cat/more/2.png"])
    source = open_source(str(root))
    assert source.classes == ["cat", "dog"]
    assert source.labels.tolist() == [0, 0, 1]


def test_a_folder_that_all_images_share_is_no_class(folder: Make) -> None:
    root = folder(["all/cat/1.png", "all/dog/1.png"])
    assert open_source(str(root)).classes == ["cat", "dog"]


def test_train_and_val_folders_are_splits_with_the_same_classes(folder: Make) -> None:
    root = folder(["train/cat/1.png", "train/dog/2.png", "val/dog/3.png"])
    train, held_out = open_source(str(root), "train"), open_held_out(str(root))
    assert held_out is not None
    assert list(train.ids) == ["train/cat/1.png", "train/dog/2.png"]
    assert train.classes == held_out.classes == ["cat", "dog"]
    assert held_out.labels.tolist() == [1]
    assert len(open_source(str(root))) == 3
    assert list(open_source(f"{root}::val").ids) == ["val/dog/3.png"]
    assert list(open_source(str(root), "test").ids) == ["val/dog/3.png"]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_only_split_is_for_training_alone(folder: Make, split: str) -> None:
    root = folder([f"{split}/cat/1.png", f"{split}/dog/2.png"])
    assert len(open_source(str(root), "train")) == 2
    assert open_held_out(str(root)) is None


def test_folders_linked_in_a_circle_are_walked_once(folder: Make) -> None:
    root = folder(["a/1.png"])
    (root / "a" / "back").symlink_to(root, target_is_directory=True)
    assert list(open_source(str(root)).ids) == ["a/1.png"]


def test_the_fingerprint_follows_what_is_in_the_folder(folder: Make) -> None:
    root = folder(["1.png", "2.png"])
    before = open_source(str(root)).fingerprint
    assert open_source(str(root)).fingerprint == before
    folder(["3.png"])
    assert open_source(str(root)).fingerprint != before


def write_parquet(path: Path, values: list[int], names: list[str] | None = None) -> None:
    from datasets import ClassLabel, Dataset, Features, Image, Value

    label = ClassLabel(names=names) if names else Value("int64")
    rows = {
        "img": [{"bytes": png(10 * value), "path": None} for value in values],
        "label": [value % 2 for value in values],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(rows, Features({"img": Image(), "label": label})).to_parquet(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "hub"
    write_parquet(root / "data" / "train-00000-of-00002.parquet", [0, 1], ["even", "odd"])
    write_parquet(root / "data" / "train-00001-of-00002.parquet", [2, 3, 4], ["even", "odd"])
    write_parquet(root / "data" / "test-00000-of-00001.parquet", [9], ["even", "odd"])
    return root


def test_parquet_in_the_hubs_layout_has_splits_and_class_names(hub: Path) -> None:
    train = open_source(str(hub), "train")
    assert shades(str(hub), "train") == [0, 10, 20, 30, 40]
    assert shades(f"{hub}::test") == shades(str(hub), "test") == [90]
    assert len(open_source(str(hub))) == 6
    assert train.classes == ["even", "odd"]
    assert train.labels.tolist() == [0, 1, 0, 1, 0]
    assert open_held_out(str(hub)).labels.tolist() == [1]
    one_file = str(hub / "data" / "test-00000-of-00001.parquet")
    assert shades(one_file, "train") == [90]


def test_parquet_without_images_lists_its_columns(hub: Path) -> None:
    from datasets import Dataset

    path = hub / "table.parquet"
    Dataset.from_dict({"height": [1.5], "name": ["a"]}).to_parquet(path)
    message = r"no image column .*found: height \(float64\), name \(string\)"
    with pytest.raises(UserError, match=message):
        open_source(str(path))


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def test_tar_shards_are_read_in_place(tmp_path: Path) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"things-train-{shard:04}.tar", "w") as tar:
            for i in (2 * shard, 2 * shard + 1):
                add(tar, f"{i:06}.png", png(10 * i))
                add(tar, f"{i:06}.cls", str(i).encode())
    with tarfile.open(tmp_path / "things-val-0000.tar", "w") as tar:
        add(tar, "a/000.json", json.dumps({"label": "newt"}).encode())
        add(tar, "a/000.png", png(200))
    train = open_source(str(tmp_path), "train")
    assert shades(str(tmp_path), "train") == [0, 10, 20, 30]
    assert train.labels.tolist() == [0, 1, 2, 3]
    assert train.ids[2] == "things-train-0001.tar/000002.png"
    assert open_held_out(str(tmp_path)).classes == ["newt"]
    assert shades(str(tmp_path / "things-val-0000.tar")) == [200]


def test_a_damaged_or_packed_shard_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b" + b"no tar at all" * 100)
    with pytest.raises(UserError, match=r"cannot read .*a\.tar as a tar file"):
        open_source(str(tmp_path))


def test_a_text_file_lists_paths_and_labels(folder: Make) -> None:
    root = folder(["x/1.png", "x/2.png", "x/3.png"])
    (root / "list.txt").write_text("x/2.png\tdog\nx/1.png\tcat\n")
    source = open_source(str(root / "list.txt"), "train")
    assert list(source.ids) == ["x/2.png", "x/1.png"]
    assert source.classes == ["cat", "dog"]
    assert source.labels.tolist() == [1, 0]
    (root / "plain.txt").write_text(f"# mine\n{root / 'x/3.png'}\n\n")
    plain = open_source(str(root / "plain.txt"))
    assert plain.labels is None
    assert torch.equal(plain[0], open_source(str(root))[2])


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_names_images_labels_and_splits(folder: Make, kind: str) -> None:
    root = folder(["1.png", "2.png", "3.png"])
    rows = [
        {"file_name": "2.png", "label": 10, "split": "train"},
        {"file_name": "1.png", "label": 2, "split": "train"},
        {"file_name": "3.png", "label": 2, "split": "test"},
    ]
    with (root / f"metadata.{kind}").open("w", newline="") as file:
        if kind == "csv":
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    train = open_source(str(root), "train")
    assert list(train.ids) == ["2.png", "1.png"]
    assert train.classes == ["2", "10"]
    assert train.labels.tolist() == [1, 0]
    assert open_held_out(str(root)).classes == ["2"]


def test_a_split_may_be_called_by_a_number(folder: Make) -> None:
    root = folder(["1.png", "2.png"])
    rows = [{"file_name": "1.png", "split": 1}, {"file_name": "2.png", "split": 2}]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert list(open_source(f"{root}::2").ids) == ["2.png"]


def test_rows_without_a_split_are_for_training(
    folder: Make, caplog: pytest.LogCaptureFixture
) -> None:
    root = folder(["1.png", "2.png", "3.png"])
    metadata = root / "metadata.csv"
    metadata.write_text("file_name,split\n1.png,\n2.png,test \n3.png,\n")
    assert list(open_source(str(root), "train").ids) == ["1.png", "3.png"]
    assert list(open_held_out(str(root)).ids) == ["2.png"]
    assert list(open_source(str(root)).ids) == ["1.png", "2.png", "3.png"]
    assert not caplog.text
    metadata.write_text("file_name,split\n1.png,\n2.png,train \n3.png,train\n")
    assert list(open_source(str(root), "train").ids) == ["2.png", "3.png"]
    assert "its splits are train; left out: 1.png" in caplog.text
    metadata.unlink()
    rows = [{"file_name": "1.png", "split": 0}, {"file_name": "2.png", "split": 1}]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert list(open_source(f"{root}::0").ids) == ["1.png"]


def test_metadata_may_stand_in_every_split(folder: Make) -> None:
    root = folder(["train/1.png", "test/2.png"])
    for split, name in (("train", "1.png"), ("test", "2.png")):
        (root / split / "metadata.csv").write_text(f"file_name,label\n{name},newt\n")
    assert list(open_source(str(root), "train").ids) == ["train/1.png"]
    assert list(open_held_out(str(root)).ids) == ["test/2.png"]


def test_torchvisions_data_sets_come_from_the_data_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BARLOW_DATA", str(tmp_path))
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, n in (("train", 12), ("t10k", 4)):
        pixels = np.arange(n, dtype=np.uint8).repeat(28 * 28)
        head = np.array([0x803, n, 28, 28], ">i4").tobytes()
        (raw / f"{split}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        labels = (np.arange(n) % 10).astype(np.uint8).tobytes()
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(
            np.array([0x801, n], ">i4").tobytes() + labels
        )
    train = open_source("fashion-mnist", "train", in_chans=1)
    assert shades("fashion-mnist", "train") == list(range(12))
    assert train.labels.tolist() == [*range(10), 0, 1]
    assert train.classes[0] == "T-shirt/top"
    assert len(open_source("fashion-mnist")) == 16


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("cifar1O", "unknown source 'cifar1O': .* did you mean cifar10"),
        ("photos", "no such file or folder; known names: mnist5k"),
        ("{tmp}/none/at/all", "does not exist; .* does"),
        ("{tmp}/empty", r"no images in .*empty: it is empty \(looked for .jpg"),
        ("{tmp}/texts", "none of its 2 files is a supported image"),
        ("{tmp}/texts/a.md", "an unsupported file type: expected .parquet, .tar, .txt"),
        ("{tmp}/list.txt", "paths are relative to the list"),
        ("{tmp}/void.txt", "lists no images"),
        ("{tmp}/comments.txt", "lists no images"),
        ("{tmp}/latin.txt", "latin.txt is not UTF-8 .*byte 3.: save it as UTF-8"),
        ("{tmp}/latin", "metadata.csv is not UTF-8 .*byte 13.: save it as UTF-8"),
        ("{tmp}/array", r"metadata.jsonl, line 2 is '\[1\]': expected a JSON object on one line"),
        ("{tmp}/cut", 'metadata.jsonl, line 1 is \'{"file_name": "a\': expected a JSON object'),
        ("{tmp}/wide", r"cannot read .*metadata.csv as CSV \(field larger.*: expected a header"),
        ("{tmp}/broken.parquet", "cannot read .*broken.parquet as Parquet"),
        ("mnist5k::dev", "mnist5k has no split 'dev'; found: train, test"),
        ("{tmp}/photos::train", "has no split 'train'; it has no splits"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(png(1))
    for name in "ab":
        (tmp_path / "texts" / f"{name}.md").write_text("text")
    (tmp_path / "list.txt").write_text("nowhere/a.png\n")
    (tmp_path / "void.txt").write_text("\n")
    (tmp_path / "comments.txt").write_text("# a.png\n\n# b.png\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9.png\n")
    for folder, name, content in (
        ("latin", "metadata.csv", b"file_name\ncaf\xe9.png\n"),
        ("array", "metadata.jsonl", b'{"file_name": "a.png"}\n[1]\n'),
        ("cut", "metadata.jsonl", b'{"file_name": "a'),
        ("wide", "metadata.csv", b"file_name\n" + b"a" * 200_000),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(content)
    (tmp_path / "broken.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=message) as caught:
        open_source(source.format(tmp=tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("most", "told"), [([4095], True), ([0, 4095], True), ([4095, 60000], False), ([16384], False)]
)
@pytest.mark.parametrize("kind", ["tif", "npy"])
def test_sixteen_bits_that_are_hardly_used_are_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, most: list[int], told: bool, kind: str
) -> None:
    for i, value in enumerate(most):
        pixels = np.linspace(0, value, 64).reshape(8, 8).astype(np.uint16)
        if kind == "npy":
            np.save(tmp_path / f"{i}.npy", pixels)
        else:
            Image.fromarray(pixels).save(tmp_path / f"{i}.tif")
    for _ in range(2):
        open_source(str(tmp_path))
    message = f"{tmp_path}: its brightest 16-bit value seen is 4095 of 65535"
    assert caplog.text.count(message) == told


def test_of_a_source_that_is_not_of_sixteen_bits_one_image_is_looked_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    Image.fromarray(np.full((8, 8), 4095, np.uint16)).save(tmp_path / "b.tif")
    open_source(str(tmp_path))
    assert not caplog.text
    (tmp_path / "a.png").write_text("no image")
    open_source(str(tmp_path))
    assert "is 4095 of 65535" in caplog.text


def test_what_cannot_be_downloaded_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BARLOW_DATA", str(tmp_path))

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", offline)
    with pytest.raises(UserError, match=r"cifar10 is not in .* cannot be downloaded .*BARLOW_DATA"):
        open_source("cifar10")
