"""A folder as it is on a disk: with links, and with names in any bytes."""

import os
from pathlib import Path

import pytest

from barlow.data import open_source

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


def test_names_in_other_letters_stay_as_they_are(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "images", ["été.png", "木.png"])
    assert list(open_source(str(root)).ids) == ["été.png", "木.png"]
