import io
import os
import random
import subprocess
import time

import numpy as np
import pytest
import torch
from PIL import Image

import barlow
from barlow.data import Source, open_source
from barlow.data.fingerprints import file_state
from barlow.data.source import Table, hash_of
from barlow.embeddings import parts, read_embeddings, writing
from barlow.embeddings.images import fingerprint_of_images, thumbnails
from barlow.embeddings.search import search_and_show
from barlow.embeddings.table import Rows, open_table, write_table
from barlow.embeddings.writing import write_embeddings
from barlow.errors import UserError
from barlow.evaluation.features import extract
from barlow.progress import Reporter


class Heard(Reporter):
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


@pytest.fixture
def write(encoder_folder, tmp_path, monkeypatch):
    """Writes embeddings in parts of 8 images; returns the file and what was said."""
    monkeypatch.setattr(parts, "_IMAGES", 8)

    def run(source, out="e.parquet", **options):
        heard = Heard()
        out = tmp_path / out
        write_embeddings(
            str(encoder_folder), str(source), str(out), batch_size=4, reporter=heard, **options
        )
        return out, heard.lines

    return run


def test_the_file_has_every_image_in_the_order_of_the_source(write, photos, encoder):
    folder = photos(21)
    file, lines = write(folder)
    source = open_source(str(folder), in_chans=1)
    expected, _ = extract(encoder, source)
    found = read_embeddings(file)
    assert found.ids == list(source.ids)
    assert found.labels == ["cat"] * 10 + ["dog"] * 11
    torch.testing.assert_close(torch.from_numpy(found.embeddings), expected, atol=1e-5, rtol=1e-4)
    assert open_table(file).columns()["path"][20] == str(folder / "dog" / "0020.png")
    assert lines[0].startswith("21 images embedded")
    assert set(os.listdir(file.parent)) == {"photos", "e.parquet"}


def test_it_is_what_embed_gives_in_memory(write, photos, encoder_folder):
    folder = photos(10)
    file, _ = write(folder)
    found = barlow.embed(encoder_folder, str(folder), batch_size=4)
    assert found.ids == read_embeddings(file).ids
    assert found.labels == read_embeddings(file).labels
    assert np.allclose(found.embeddings, read_embeddings(file).embeddings, atol=1e-5)


def test_images_that_cannot_be_read_are_left_out_and_listed(write, photos):
    folder = photos(40)
    whole, _ = write(folder, "whole.parquet")
    for i in (3, *range(8, 16), 39):  # one, a whole part, the last
        next(folder.rglob(f"{i:04}.png")).write_bytes(b"no image")
    file, lines = write(folder, max_broken=0.3)
    bad = {3, *range(8, 16), 39}
    good = [i for i in range(40) if i not in bad]
    expected, found = read_embeddings(whole), read_embeddings(file)
    assert found.ids == [expected.ids[i] for i in good]
    assert np.allclose(found.embeddings, expected.embeddings[good], atol=1e-5)
    assert lines[1].startswith("10 image(s) cannot be read")
    listed = (file.parent / "e.skipped.csv").read_text().splitlines()
    assert listed[0] == "id,reason"
    assert listed[1] == "cat/0003.png,not an image"
    assert len(listed) == 11


@pytest.fixture
def odd_names(photos):
    """40 photos of which the second has a name that is no UTF-8, and the third, broken, too."""
    folder = photos(40)
    for number, name in ((1, b"0001\xff.png"), (2, b"0002\xfe.png")):
        cat = os.path.join(os.fsencode(folder), b"cat")
        os.rename(os.path.join(cat, b"%04d.png" % number), os.path.join(cat, name))
    with open(os.path.join(cat, b"0002\xfe.png"), "wb") as file:
        file.write(b"no image")
    return folder


def test_images_whose_names_are_no_text_are_embedded_as_any(odd_names, encoder_folder):
    found = barlow.embed(encoder_folder, str(odd_names))
    assert len(found.ids) == 39
    assert found.ids[1].startswith("cat/0001")
    "".join(found.ids).encode()


def test_images_whose_names_are_no_text_are_written_and_seen(odd_names, write, encoder_folder):
    file, lines = write(odd_names)
    table = open_table(file)
    assert lines[1].startswith("1 image(s) cannot be read")
    assert "cat/0002" in (file.parent / "e.skipped.csv").read_text()
    columns = table.columns([0, 1])
    assert columns["path"] == [str(odd_names / "cat" / "0000.png"), None]
    assert set(thumbnails(table, [0, 1])) == {0, 1}
    query = os.fsdecode(os.path.join(os.fsencode(odd_names), b"cat", b"0001\xff.png"))
    page = file.with_suffix(".html")
    found = search_and_show(str(encoder_folder), [query], str(file), 1, str(page))
    assert found.lines[0][0].endswith(r"0001\xff.png")
    assert columns["id"][1] in page.read_text()


def test_a_fingerprint_is_of_sizes_and_times_in_the_order_of_the_images(photos):
    images = open_source(str(photos(21)), in_chans=1)
    states = [file_state(file) for file in images.records]
    before = fingerprint_of_images(images)
    assert before == hash_of([images.fingerprint, *states])
    os.utime(images.records[20], (1, 1))
    assert fingerprint_of_images(images) != before


class Ids(list):
    asked = 0

    def __getitem__(self, index):
        self.asked += 1
        return super().__getitem__(index)

    def __iter__(self):
        return map(self.__getitem__, range(len(self)))


@pytest.mark.parametrize("sort", [list, sorted])
def test_pictures_of_some_rows_are_found_without_asking_for_every_id(tmp_path, sort):
    """Every third image could not be read; the file is the source's order, or of the ids'."""
    pixels = np.arange(200, dtype=np.uint8)[:, None, None] * np.ones((200, 4, 4), np.uint8)
    ids = Ids(f"{i * 37 % 200:03}" for i in range(200))
    rows = sort(ids[i] for i in range(200) if i % 3)
    x = np.zeros((len(rows), 2), np.float32)
    file, about = tmp_path / "e.parquet", {"features": 2, "dtype": "float32", "labelled": False}
    with open(file, "wb") as binary:
        write_table(binary, [Rows(rows, [None] * len(rows), None, x)], about={}, **about)
    ids.asked = 0
    found = thumbnails(open_table(file), [0, 50, 51, 52], Source("x", Table(pixels, ids), 1))
    if sort is list:
        assert ids.asked < 50
    for row, picture in found.items():
        assert Image.open(io.BytesIO(picture)).getpixel((0, 0)) == ids.index(rows[row])
    assert set(found) == {0, 50, 51, 52}


def test_too_many_images_that_cannot_be_read_stop_it(write, photos):
    folder = photos(40)
    for path in sorted(folder.rglob("*.png"))[::4]:
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="more than the 5% that max_broken allows"):
        write(folder)
    file, _ = write(folder, max_broken=0.5)  # goes on
    assert open_table(file).images == 30


@pytest.fixture
def interrupted(write, photos, tmp_path, monkeypatch):
    """40 photos, the last but one broken, embedded but for the last of five parts."""
    folder = photos(40)
    sorted(folder.rglob("*.png"))[38].write_bytes(b"no image")
    with monkeypatch.context() as patch:
        patch.setattr(writing, "join", lambda *_: pytest.fail("stopped here"))
        with pytest.raises(pytest.fail.Exception):
            write(folder)
    *done, last = sorted((tmp_path / "e.parquet.part").glob("*.safetensors"))
    last.unlink()
    return folder, done


def test_only_what_is_missing_is_computed(write, interrupted):
    folder, done = interrupted
    assert len(done) == 4
    whole, _ = write(folder, "whole.parquet")
    file, _ = write(folder)
    assert file.read_bytes() == whole.read_bytes()


def test_of_what_is_left_a_larger_share_may_be_broken(write, interrupted):
    file, _ = write(interrupted[0])  # 1 of 8, but 1 of 40 in all
    assert open_table(file).about["skipped"] == 1


def test_what_a_kill_while_joining_leaves_is_removed(write, interrupted, tmp_path):
    (tmp_path / "e.parquet.part" / ".whole.parquet.1.part").write_bytes(b"half a file")
    write(interrupted[0])
    assert not (tmp_path / "e.parquet.part").exists()


def test_a_damaged_part_is_named(write, interrupted):
    folder, done = interrupted
    done[2].write_bytes(done[2].read_bytes()[:50])
    with pytest.raises(UserError, match=f"{done[2].name} is damaged"):
        write(folder)


def test_parts_of_something_else_are_not_gone_on_with(write, interrupted, photos):
    with pytest.raises(UserError, match="unfinished embedding"):
        write(photos(9, "others"))


def test_a_finished_file_is_left_as_it_is(write, photos):
    folder = photos(9)
    file, _ = write(folder)
    before = file.stat().st_mtime_ns
    _, lines = write(folder)
    assert "is finished" in lines[0]
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize("change", ["images", "touched", "encoder", "half", "foreign"])
def test_a_file_of_something_else_is_not_overwritten(write, photos, tmp_path, change, monkeypatch):
    folder = photos(9)
    file, _ = write(folder)
    options = {}
    if change == "images":
        next(folder.rglob("*.png")).unlink()
        message = "other images"
    elif change == "touched":
        os.utime(next(folder.rglob("*.png")), (1, 1))
        message = "other images"
    elif change == "encoder":
        monkeypatch.setattr(writing, "fingerprint_of", lambda encoder: "another")
        message = "another encoder"
    elif change == "half":
        options, message = {"half": True}, "another precision"
    else:
        file.write_bytes(b"my own table")
        message = "cannot be read as Parquet"
    before = file.read_bytes()
    with pytest.raises(UserError, match=message):
        write(folder, **options)
    assert file.read_bytes() == before
    assert not (tmp_path / "e.parquet.part").exists()


def test_half_is_float32_rounded(write, photos):
    folder = photos(9)
    full, _ = write(folder)
    half, _ = write(folder, "half.parquet", half=True)
    expected = read_embeddings(full).embeddings.astype(np.float16).astype(np.float32)
    assert np.array_equal(read_embeddings(half).embeddings, expected)
    assert np.isfinite(expected).all()


def test_features_beyond_float16_are_refused_there():
    from barlow.embeddings.writing import _cast

    with pytest.raises(UserError, match="drop --half"):
        _cast(torch.tensor([[1e5]]), "float16")
    assert _cast(torch.tensor([[1e5]]), "float32") == 1e5


@pytest.mark.slow
def test_a_killed_process_goes_on_and_gives_the_same_bytes(tmp_path, command):
    torch.manual_seed(0)
    encoder = barlow.create_encoder("resnet10t", image_size=28, in_chans=1)
    encoder.preprocess = barlow.data.Preprocess(28, in_chans=1)
    barlow.share.save_encoder(encoder, tmp_path / "encoder")

    def arguments(out):
        return command("embed", tmp_path / "encoder", "mnist5k", "--out", tmp_path / out)

    done = subprocess.run(**arguments("whole.parquet"), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr

    folder = tmp_path / "e.parquet.part"
    for delay in (0, random.uniform(0, 0.5)):
        before = set(folder.glob("*.safetensors"))
        with subprocess.Popen(**arguments("e.parquet"), stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and set(folder.glob("*.safetensors")) <= before:
                time.sleep(0.005)
            time.sleep(delay)
            process.kill()
    kept = len(list(folder.glob("*.safetensors")))
    done = subprocess.run(**arguments("e.parquet"), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert kept, "something was there to go on from"
    assert not folder.exists()
    assert (tmp_path / "e.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


@pytest.mark.slow
def test_two_processes_give_the_same_file_as_one(tmp_path, encoder_folder, command):
    files = [tmp_path / f"{devices}.parquet" for devices in (1, 2)]
    for devices, file in enumerate(files, 1):
        arguments = ("embed", encoder_folder, "mnist5k", "--out", file, "--accelerator", "cpu")
        done = subprocess.run(
            **command(*arguments, "--devices", devices), capture_output=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert "5000 images embedded" in done.stdout
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["e.csv"], "name the file e.parquet"),
        (["e.parquet", "--batch-size", "0"], "batch size is 0"),
        (["e.parquet", "--devices", "0"], "devices is 0"),
        (["e.parquet", "--limit", "0"], "limit is 0"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    tmp_path, encoder_folder, arguments, message, capsys
):
    from barlow.cli import main

    out, *options = arguments
    status = main(["embed", str(encoder_folder), "mnist5k", "--out", str(tmp_path / out), *options])
    assert status == 2
    error = capsys.readouterr().err
    assert error.startswith("barlow: ")
    assert error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.iterdir())
