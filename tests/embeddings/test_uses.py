"""Search, duplicates and anomalies through the command line, and the pages they write."""

import base64
import csv
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from barlow.cli import main
from barlow.embeddings import read_embeddings
from barlow.embeddings.anomalies import find_anomalies
from barlow.embeddings.search import search
from barlow.embeddings.sheet import Card, Listing, write_sheet
from barlow.embeddings.table import Rows, write_table
from barlow.errors import UserError


@pytest.fixture
def embedded(photos, encoder_folder, tmp_path):
    """30 photos, one of them twice, and their embeddings."""
    folder = photos(30)
    twin = folder / "dog" / "twin.png"
    twin.write_bytes((folder / "cat" / "0004.png").read_bytes())
    file = tmp_path / "e.parquet"
    assert main(["embed", str(encoder_folder), str(folder), "--out", str(file)]) == 0
    return folder, file


class Images(HTMLParser):
    """The images of a page, and everything it would fetch."""

    def __init__(self, file):
        super().__init__()
        self.images, self.fetched = [], []
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "img":
            self.images.append((attrs["alt"], attrs["src"]))
        self.fetched += [
            v for k, v in attrs.items() if k in ("src", "href") and not v.startswith("data:")
        ]


def pixels(source):
    data = base64.b64decode(source.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("L"))


def test_an_image_finds_itself_and_its_twin(embedded, encoder_folder):
    folder, file = embedded
    (hits,) = search(str(encoder_folder), [str(folder / "cat" / "0004.png")], str(file), top=3)
    assert {hit.id for hit in hits[:2]} == {"cat/0004.png", "dog/twin.png"}
    assert [round(hit.similarity, 4) for hit in hits[:2]] == [1, 1]
    assert hits[2].similarity < hits[1].similarity
    assert {hit.label for hit in hits[:2]} == {"cat", "dog"}
    assert hits[0].path == str(folder / hits[0].id)


def test_an_id_in_the_file_is_a_query_too(embedded, encoder_folder):
    folder, file = embedded
    queries = ["dog/0020.png", str(folder / "dog" / "0020.png")]
    by_id, by_image = search(str(encoder_folder), queries, str(file), top=31)
    assert [hit.id for hit in by_id[:5]] == [hit.id for hit in by_image[:5]]
    assert by_id[0].id == "dog/0020.png"


def test_search_prints_a_table_and_writes_a_page(embedded, encoder_folder, tmp_path, capsys):
    folder, file = embedded
    query, page = folder / "cat" / "0004.png", tmp_path / "found.html"
    arguments = [str(encoder_folder), str(query), "--in", str(file), "--top", "4"]
    assert main(["search", *arguments, "--html", str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-6].split() == ["query", "rank", "similarity", "label", "image"]
    assert [line.split()[1] for line in lines[-5:-1]] == ["1", "2", "3", "4"]
    found = Images(page)
    assert found.fetched == []
    assert found.images[0][0] == str(query)
    original = np.asarray(Image.open(query))
    for alt, source in found.images[:3]:
        assert np.array_equal(pixels(source), original), alt
    assert len(found.images) == 5


def test_images_that_are_gone_are_missing_from_the_page_alone(embedded, encoder_folder, tmp_path):
    folder, file = embedded
    (folder / "dog" / "0020.png").unlink()
    page = tmp_path / "found.html"
    arguments = [str(encoder_folder), "dog/0020.png", "--in", str(file), "--top", "2"]
    assert main(["search", *arguments, "--html", str(page)]) == 0
    assert len(Images(page).images) == 1
    assert "no image" in page.read_text()


def test_thumbnails_of_a_source_that_is_no_folder(encoder_folder, tmp_path):
    from barlow.data import open_source

    file, page = tmp_path / "e.parquet", tmp_path / "found.html"
    source = ["mnist5k::test", "--limit", "40"]
    assert main(["embed", str(encoder_folder), *source, "--out", str(file)]) == 0
    assert read_embeddings(file).ids[7] == "test:7"
    arguments = [str(encoder_folder), "test:7", "--in", str(file), "--html", str(page)]
    assert main(["search", *arguments]) == 0
    name, picture = Images(page).images[0]
    assert name == "test:7"
    digits = open_source("mnist5k", "test", in_chans=1)
    assert np.array_equal(pixels(picture), digits[7][0].numpy())


def test_search_with_another_encoder_is_refused(embedded, encoder, tmp_path, capsys):
    import copy

    from barlow.share import save_encoder

    other = copy.deepcopy(encoder)
    with torch.no_grad():
        other.conv1[0].weight.view(-1)[0] += 1e-3
    save_encoder(other, tmp_path / "other")
    _, file = embedded
    capsys.readouterr()
    assert main(["search", str(tmp_path / "other"), "cat/0001.png", "--in", str(file)]) == 2
    assert "from another encoder than" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("query", "message"),
    [("nothing.png", "neither a file nor an id"), ("TEXT", "cannot be read: not an image")],
)
def test_a_query_that_is_no_image_is_refused(embedded, encoder_folder, tmp_path, query, message):
    (tmp_path / "text.png").write_text("no image")
    query = query.replace("TEXT", str(tmp_path / "text.png"))
    with pytest.raises(UserError, match=message):
        search(str(encoder_folder), [query], str(embedded[1]))


def test_duplicates_lists_the_twins(embedded, tmp_path, capsys):
    folder, file = embedded
    out, page = tmp_path / "pairs.csv", tmp_path / "pairs.html"
    arguments = ["--threshold", "0.999999", "--out", str(out), "--html", str(page)]
    capsys.readouterr()
    assert main(["duplicates", str(file), *arguments]) == 0
    assert "1 pairs among 31 images, in 1 groups" in capsys.readouterr().out
    twins = [str(folder / "cat" / "0004.png"), str(folder / "dog" / "twin.png")]
    assert list(csv.reader(out.read_text().splitlines()))[1:] == [["1.0000", *twins, "1"]]
    assert [name for name, _ in Images(page).images] == twins


def test_groups_join_the_pairs_that_share_an_image(photos, encoder_folder, tmp_path, capsys):
    folder = photos(12)
    names = sorted(folder.rglob("*.png"))
    for copied in (5, 9):
        names[copied].write_bytes(names[1].read_bytes())
    names[11].write_bytes(names[7].read_bytes())
    file, out = tmp_path / "e.parquet", tmp_path / "pairs.csv"
    assert main(["embed", str(encoder_folder), str(folder), "--out", str(file)]) == 0
    capsys.readouterr()
    arguments = ["--threshold", "0.999999", "--out", str(out), "--top", "1"]
    assert main(["duplicates", str(file), *arguments]) == 0
    output = capsys.readouterr().out
    note = "4 pairs among 12 images, in 2 groups: keeping one image of each group would remove 3"
    assert note in output
    groups = {}
    for _, a, b, group in list(csv.reader(out.read_text().splitlines()))[1:]:
        groups.setdefault(group, set()).update((a, b))
    expected = [{str(names[i]) for i in some} for some in ((1, 5, 9), (7, 11))]
    assert sorted(groups.values(), key=len, reverse=True) == expected
    assert set(groups) == {"1", "2"}


def test_no_duplicates_are_none(photos, encoder_folder, tmp_path, capsys):
    file = tmp_path / "e.parquet"
    assert main(["embed", str(encoder_folder), str(photos(5)), "--out", str(file)]) == 0
    assert main(["duplicates", str(file), "--threshold", "1"]) == 0
    assert "0 pairs among 5 images" in capsys.readouterr().out


def test_anomalies_come_first(photos, encoder_folder, tmp_path, capsys):
    train, test = photos(20), photos(20, "test")
    strange = test / "cat" / "0003.png"
    Image.fromarray(np.full((24, 24), 255, np.uint8)).save(strange)
    files = {}
    for folder in (train, test):
        files[folder] = str(tmp_path / f"{folder.name}.parquet")
        arguments = [str(encoder_folder), str(folder), "--out", files[folder]]
        assert main(["embed", *arguments]) == 0
    capsys.readouterr()
    out, page = tmp_path / "distances.csv", tmp_path / "page.html"
    arguments = ["--train", files[train], "--top", "2", "--k", "1"]
    arguments += ["--out", str(out), "--html", str(page)]
    assert main(["anomalies", files[test], *arguments]) == 0
    first = capsys.readouterr().out.splitlines()[1]
    assert str(strange) in first
    lines = list(csv.reader(out.read_text().splitlines()))[1:]
    assert len(lines) == 20
    distances = [float(line[0]) for line in lines]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 10 * abs(distances[1]), "the others are in the training images"
    assert len(Images(page).images) == 4


@pytest.mark.parametrize("train", [[], ["--train", "FILE"]])
def test_in_one_file_an_image_is_beside_another(embedded, train, tmp_path, capsys):
    file, page = str(embedded[1]), tmp_path / "page.html"
    capsys.readouterr()
    arguments = [a.replace("FILE", file) for a in train]
    assert main(["anomalies", file, *arguments, "--top", "31", "--html", str(page)]) == 0
    assert "nearest other" in capsys.readouterr().out
    names = [name for name, _ in Images(page).images]
    assert len(names) == 62
    assert all(one != other for one, other in zip(names[::2], names[1::2], strict=True))


def _vectors(file, x):
    rows = [Rows([str(i) for i in range(len(x))], [None] * len(x), None, np.float32(x))]
    with file.open("wb") as opened:
        write_table(opened, rows, features=2, dtype="float32", labelled=False, about={})
    return str(file)


@pytest.mark.parametrize("k", [1, 2, 9])
def test_in_one_file_the_distance_is_to_the_others(tmp_path, k):
    angle = np.linspace(0, 2, 6) ** 2
    x = np.stack([np.cos(angle), np.sin(angle)], 1)
    similar = np.sort(x @ x.T - 9 * np.eye(6), 1)[:, :0:-1]
    expected = np.sort(1 - similar[:, :k].mean(1))[::-1]
    found = find_anomalies(_vectors(tmp_path / "x.parquet", x), k=k)
    assert [float(line[0]) for line in found.lines] == pytest.approx(expected, abs=1e-4)


def test_copies_are_others_and_one_image_has_none(tmp_path):
    copies = _vectors(tmp_path / "copies.parquet", np.ones((7, 2)))
    for line in find_anomalies(copies, k=1).lines:
        assert line[1] != line[3]
        assert abs(float(line[0])) < 1e-4
    with pytest.raises(UserError, match="has one image: give --train"):
        find_anomalies(_vectors(tmp_path / "one.parquet", np.ones((1, 2))))


def test_anomalies_by_another_encoder_are_refused(tmp_path, capsys):
    for name in ("a", "b"):
        with (tmp_path / name).open("wb") as file:
            rows = [Rows(["1"], [None], None, np.ones((1, 2), np.float32))]
            about = {"encoder": name}
            write_table(file, rows, features=2, dtype="float32", labelled=False, about=about)
    assert main(["anomalies", str(tmp_path / "a"), "--train", str(tmp_path / "b")]) == 2
    assert "different encoders" in capsys.readouterr().err


def test_a_page_survives_any_name_and_holds_to_the_theme(tmp_path):
    page = tmp_path / "page.html"
    name = '<script>alert("1")</script>.png'
    image = io.BytesIO()
    Image.new("L", (4, 4)).save(image, "PNG")
    write_sheet(page, name, [(name, [Card(image.getvalue(), name, name), Card(None, "b", "c")])])
    text = page.read_text()
    assert "<script" not in text
    assert Images(page).images[0][0] == name
    assert re.search(r"prefers-color-scheme: dark", text)


def test_names_with_brackets_are_shown_as_they_are():
    written = io.StringIO()
    name = "/data/[raw]/[/x]:cat:.jpg"
    Console(file=written, width=200).print(Listing(["image"], [[name]], f"page: {name}").table())
    assert written.getvalue().count(name) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["duplicates", "FILE", "--threshold", "2"], "between -1 and 1"),
        (["duplicates", "none.parquet"], "no file none.parquet"),
        (["anomalies", "FILE", "--train", "FILE", "--k", "0"], "k is 0"),
        (["search", "ENCODER", "cat/0001.png", "--in", "FILE", "--top", "0"], "top is 0"),
        (["search", "ENCODER", "cat/0001.png"], "in"),
    ],
)
def test_a_mistake_is_one_line(embedded, encoder_folder, arguments, message, capsys):
    places = {"FILE": str(embedded[1]), "ENCODER": str(encoder_folder)}
    capsys.readouterr()
    assert main([places.get(a, a) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("barlow: ")
    assert error.count("\n") == 1
    assert message in error
