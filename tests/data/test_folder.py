"""A folder as it is on a disk: with links, and with names in any bytes."""

import os
import sys
from pathlib import Path

import pytest

from barlow.data import open_held_out, open_source
from barlow.data.folder import walk
from barlow.errors import UserError

from .conftest import write_folder

LATIN = "caf\udce9.png"  # b"caf\xe9.png"


def test_a_link_to_a_folder_whose_name_begins_alike_is_followed(tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", ["1.png"])
    root = write_folder(tmp_path / "photos2020", ["2.png"])
    (root / "older").symlink_to(tmp_path / "photos", target_is_directory=True)
    assert list(open_source(str(root)).ids) == ["2.png", "older/1.png"]


def test_a_link_back_is_not_followed_whatever_the_source_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_folder(tmp_path / "photos", ["a/1.png", "a/b/2.png"])
    (root / "a" / "b" / "back").symlink_to(root, target_is_directory=True)
    (root / "a" / "b" / "up").symlink_to("..", target_is_directory=True)
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    for source in (str(root), "photos", "./photos/../photos", "link"):
        assert list(open_source(source).ids) == ["a/1.png", "a/b/2.png"]


def test_a_link_from_another_place_back_to_the_splits_is_not_followed(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos", ["train/1.png", "val/2.png"])
    more = write_folder(tmp_path / "more", ["3.png"])
    (root / "train" / "more").symlink_to(more, target_is_directory=True)
    (more / "back").symlink_to(root, target_is_directory=True)
    (more / "train").symlink_to(root / "train", target_is_directory=True)
    assert list(open_source(str(root), "train").ids) == ["train/1.png", "train/more/3.png"]


def test_names_that_are_no_text_are_opened_as_they_are_and_told_as_text(tmp_path: Path) -> None:
    broken = f"{LATIN[:4]}/2.png"
    root = write_folder(tmp_path / "images", [f"{LATIN[:4]}/{LATIN}", broken, "tea/3.png"])
    (root / broken).write_bytes(b"")
    source = open_source(str(root), max_broken=1)
    assert list(source.ids) == [r"caf\xe9/2.png", r"caf\xe9/caf\xe9.png", "tea/3.png"]
    assert source.classes == [r"caf\xe9", "tea"]
    assert source[1].shape == (3, 20, 24)
    source.skip(0, "empty")
    assert source.skipped == [(r"caf\xe9/2.png", "empty")]
    assert os.fsencode(source.records[1]).endswith(b"caf\xe9.png")


def test_images_of_formats_that_are_not_read_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path, ["1.png"])
    for name in ("2.HEIC", "3.heic", "deep.dng", "notes.txt"):
        (tmp_path / name).touch()
    assert list(open_source(str(tmp_path)).ids) == ["1.png"]
    assert caplog.messages == [
        f"{tmp_path}: unsupported formats left out: 2 .heic, 1 .dng; convert them to JPEG or PNG"
    ]
    (tmp_path / "1.png").unlink()
    with pytest.raises(UserError, match=r"of its 4 files is a supported .*: 2 \.heic, 1 \.dng"):
        open_source(str(tmp_path))


def test_names_in_other_letters_stay_as_they_are(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "images", ["été.png", "木.png"])
    assert list(open_source(str(root)).ids) == ["été.png", "木.png"]


def test_a_folder_that_may_not_be_read_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_folder(tmp_path / "photos", ["a/1.png", "lost+found/2.png"])
    scandir = os.scandir

    def guarded(path: str) -> object:
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", guarded)
        assert list(open_source(str(root)).ids) == ["a/1.png"]
    assert "lost+found is left out: Permission denied" in caplog.text
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="photos cannot be read"):
        open_source(str(root))


def test_a_link_to_what_is_walked_anyway_is_not_followed(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos", ["2026/1.png", ".store/2.png"])
    (root / "latest").symlink_to("2026", target_is_directory=True)
    (root / "kept").symlink_to(".store", target_is_directory=True)
    (root / "loop").symlink_to("loop")
    assert list(open_source(str(root)).ids) == ["2026/1.png", "kept/2.png"]


@pytest.mark.parametrize(
    ("others", "splits"), [(["bus", "car"], ["train"]), (["cars"], ["dev", "test"])]
)
def test_a_class_may_be_called_like_a_split(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, others: list[str], splits: list[str]
) -> None:
    names = [f"{name}/1.png" for name in sorted(others + splits)]
    root = write_folder(tmp_path / "vehicles", names)
    source = open_source(str(root), "train")
    assert list(source.ids) == names
    assert source.classes == sorted(others + splits)
    assert open_held_out(str(root)) is None
    assert f"treating {', '.join(splits)} as a class" in caplog.text


@pytest.mark.parametrize(
    "splits", [["train/1.png", "test/2.png"], ["train/cat/1.png", "train/dog/2.png"]]
)
def test_what_stands_beside_splits_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, splits: list[str]
) -> None:
    root = write_folder(tmp_path / "photos", [*splits, "more/3.png"])
    assert "more/3.png" not in open_source(str(root)).ids
    assert "left out: more" in caplog.text


def test_images_beside_a_lone_test_folder_are_trained_on_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_folder(tmp_path / "photos", ["1.png", "2.png", "test/3.png"])
    for split in ("train", None):
        assert list(open_source(str(root), split).ids) == ["1.png", "2.png", "test/3.png"]
    assert "treating test as a class, not a split, beside 1.png, 2.png" in caplog.text


def test_an_image_beside_a_split_for_training_is_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_folder(tmp_path / "photos", ["preview.png", "train/1.png"])
    assert list(open_source(str(root), "train").ids) == ["train/1.png"]
    assert "left out: preview.png" in caplog.text


@pytest.mark.parametrize("beside", ["cat/1.png", "1.png"])
@pytest.mark.parametrize("metadata", [False, True])
def test_test_images_are_not_trained_on_for_want_of_others(
    tmp_path: Path, beside: str, metadata: bool
) -> None:
    root = write_folder(tmp_path / "photos", [beside, "test/cat/2.png"])
    if metadata:
        (root / "test" / "metadata.csv").write_text("file_name\ncat/2.png\n")
    for split in ("train", None):
        with pytest.raises(UserError, match=r"no training split: move them into .*photos/train"):
            open_source(str(root), split)
    for source, split in ((f"{root}::test", "train"), (str(root), "test")):
        assert list(open_source(source, split).ids) == ["test/cat/2.png"]


def test_linked_folders_are_walked_in_linear_time(tmp_path: Path) -> None:
    calls = []
    for number in (100, 200):
        root = tmp_path / str(number)
        for i in range(number):
            (root / "store" / f"{i}").mkdir(parents=True)
            (root / "links").mkdir(exist_ok=True)
            (root / "links" / f"{i}").symlink_to(root / "store" / f"{i}", target_is_directory=True)
        count = 0

        def profile(*_: object) -> None:
            nonlocal count
            count += 1

        sys.setprofile(profile)
        try:
            assert list(walk(root / "links")) == []
        finally:
            sys.setprofile(None)
        calls.append(count)
    assert calls[1] < 2.2 * calls[0]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_beside_folders_without_images_is_a_split(tmp_path: Path, split: str) -> None:
    root = write_folder(tmp_path / "photos", [f"{split}/1.png"])
    (root / "notes").mkdir()
    (root / "notes" / "a.txt").write_text("text")
    assert list(open_source(f"{root}::{split}").ids) == [f"{split}/1.png"]
