"""Every kind of source goes through the command line: looked at, and trained on."""

import csv
import hashlib
import io
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image

from barlow.cli import main

IMAGES = 12
SMALL = ["--image-size", "16"]


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def folder(root: Path) -> str:
    for i in range(IMAGES):
        path = root / "deep" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    return str(root)


def text_list(root: Path) -> str:
    folder(root)
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*.png"))
    (root / "list.txt").write_text("\n".join(names))
    return str(root / "list.txt")


def metadata(root: Path, kind: str) -> str:
    folder(root)
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*.png"))
    lines = ["file_name,label", *(f"{name},newt" for name in names)]
    if kind == "jsonl":
        lines = [json.dumps({"file_name": name, "label": "newt"}) for name in names]
    (root / f"metadata.{kind}").write_text("\n".join(lines) + "\n")
    return str(root)


def shards(root: Path) -> str:
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}-0000.tar", "w") as tar:
            for i in range(IMAGES):
                for name, content in ((f"{i}.png", png(i)), (f"{i}.cls", str(i % 2).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(root)


def parquet(root: Path) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (root / "data").mkdir(parents=True)
    for split in ("train", "test"):
        images = [{"bytes": png(i), "path": f"{i}.png"} for i in range(IMAGES)]
        table = pa.table({"image": images, "label": [i % 2 for i in range(IMAGES)]})
        pq.write_table(table, root / "data" / f"{split}-00000-of-00001.parquet")
    return str(root)


def fashion_mnist(root: Path) -> str:
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 28, 28), dtype=np.uint8)
    for split in ("train", "t10k"):
        for name, head, values in (
            ("images-idx3", [0x803, IMAGES, 28, 28], pixels),
            ("labels-idx1", [0x801, IMAGES], np.arange(IMAGES, dtype=np.uint8) % 10),
        ):
            content = np.array(head, ">i4").tobytes() + values.tobytes()
            (raw / f"{split}-{name}-ubyte").write_bytes(content)
    return "fashion-mnist"


def imagenette(root: Path) -> str:
    for split in ("train", "val"):
        for i in range(IMAGES):
            kind = ("n01440764", "n02102040")[i % 2]
            path = root / "imagenette2-320" / split / kind / f"{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(io.BytesIO(png(i))) as image:
                image.save(path, "JPEG")
    return "imagenette"


def bands(root: Path) -> str:
    for i in range(IMAGES):
        array = np.random.default_rng(i).integers(0, 65536, (5, 20, 24), dtype=np.uint16)
        np.save(root / f"{i}.npy", array)
    return str(root)


KINDS: dict[str, Callable[[Path], str]] = {
    "digits": lambda root: "mnist5k",
    "folder": folder,
    "list": text_list,
    "metadata.csv": lambda root: metadata(root, "csv"),
    "metadata.jsonl": lambda root: metadata(root, "jsonl"),
    "shards": shards,
    "parquet": parquet,
    "torchvision arrays": fashion_mnist,
    "torchvision files": imagenette,
}


def pretrain(source: str, out: Path, *more: str) -> list[str]:
    return [
        "pretrain", source, "--out", str(out), *SMALL, "--encoder", "resnet18", "--encoder-args",
        '{"channels": [8, 16, 24, 32], "layers": [1, 1, 1, 1]}', "--validation-limit", "16",
        "--projector", "8", "8", "--batch-size", "4", "--epochs", "1", "--limit", "8",
        "--workers", "0", *more,
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def no_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("BARLOW_DATA", str(tmp_path / "source"))


@pytest.mark.parametrize("kind", KINDS)
def test_any_source_is_looked_at_and_trained_on(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "source"
    root.mkdir()
    source = KINDS[kind](root)
    picture = tmp_path / "views.png"
    assert main(["views", source, "--out", str(picture), *SMALL, "--limit", "8"]) == 0
    with Image.open(picture) as grid:
        assert grid.width > 3 * 16
    assert main(pretrain(source, tmp_path / "run")) == 0
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


def test_multispectral_arrays_are_trained_on(tmp_path: Path) -> None:
    root = tmp_path / "source"
    root.mkdir()
    assert main(pretrain(bands(root), tmp_path / "run", "--channels", "5")) == 0


def every_kind(root: Path) -> dict[str, str]:
    """One image of every kind that can be read, and what cannot: name to reason."""
    colour = Image.open(io.BytesIO(png(0)))
    deep = np.random.default_rng(0).integers(0, 65536, (20, 24), dtype=np.uint16)
    turned = Image.Exif()
    turned[0x0112] = 6
    colour.save(root / "photo.jpg", exif=turned)
    colour.save(root / "plain.png")
    colour.save(root / "new.webp")
    colour.save(root / "scan.tiff")
    colour.convert("CMYK").save(root / "print.jpg")
    colour.convert("L").save(root / "grey.png")
    colour.convert("RGBA").save(root / "clear.png")
    colour.convert("P").save(root / "palette.png")
    colour.convert("1").save(root / "line.png")
    colour.save(root / "moving.gif", save_all=True, append_images=[colour.rotate(90)])
    Image.fromarray(deep).save(root / "deep.png")
    Image.fromarray(deep).save(root / "deep.tif")
    np.save(root / "array.npy", np.asarray(colour))
    (root / "empty.png").touch()
    (root / "text.jpg").write_text("no image")
    (root / "cut.png").write_bytes(png(1)[:300])
    # Its header says 20,000 x 20,000, and so does its checksum.
    head = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    checked = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    (root / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + checked + png(2)[33:])
    return {"empty.png": "empty", "text.jpg": "not an image", "bomb.png": "bomb", "cut.png": ""}


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_folder_of_every_kind_is_trained_on_and_what_is_broken_listed(
    tmp_path: Path, workers: str
) -> None:
    root = tmp_path / "source"
    root.mkdir()
    broken = every_kind(root)
    out = tmp_path / "run"
    line = pretrain(str(root), out, "--workers", workers, "--limit", "17", "--max-broken", "0.3")
    assert main(line) == 0
    with (out / "skipped.csv").open(newline="") as file:
        skipped = {row[0]: row[1] for row in list(csv.reader(file))[1:]}
    assert skipped.keys() == broken.keys()
    assert all(reason in skipped[name] for name, reason in broken.items())
    with (out / "metrics.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) >= 1


def test_more_broken_images_than_allowed_stop_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "source"
    root.mkdir()
    every_kind(root)
    assert main(pretrain(str(root), tmp_path / "run", "--limit", "17")) == 2
    assert "more than the 5% that max_broken allows" in capsys.readouterr().err


class Hub(BaseHTTPRequestHandler):
    """What the hub answers for one data set, `someone/things`."""

    files: dict[str, bytes]
    downloaded: list[str]  # whole files, not ranges of them
    commit = "0123456789" * 4

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api, files = "/api/datasets/someone/things", "/datasets/someone/things/resolve/"
        if path.startswith(f"{api}/tree/"):
            self.tree(path.removeprefix(f"{api}/tree/").partition("/")[2])
        elif path == api or path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": name} for name in self.files]
            self.send(json.dumps({"id": "someone/things", "sha": self.commit, "private": False,
                                  "tags": [], "siblings": siblings}).encode())  # fmt: skip
        elif path.startswith(files) and (name := path.split("/", 6)[6]) in self.files:
            self.send(self.files[name])
        else:
            kind = "EntryNotFound" if "someone/things" in path else "RepoNotFound"
            self.send(b"", 404, {"X-Error-Code": kind})

    def tree(self, folder: str) -> None:
        entries = [
            {"type": "file", "oid": self.tag(data), "size": len(data), "path": name}
            for name, data in self.files.items()
            if name.rpartition("/")[0] == folder
        ]
        if not folder:
            entries.append({"type": "directory", "oid": self.commit, "size": 0, "path": "data"})
        self.send(json.dumps(entries).encode())

    def tag(self, data: bytes) -> str:
        return hashlib.sha1(data).hexdigest()

    def send(self, data: bytes, status: int = 200, more: dict[str, str] | None = None) -> None:
        heads = {"X-Repo-Commit": self.commit, "ETag": f'"{self.tag(data)}"', **(more or {})}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            data, status = data[int(asked[1]) : int(asked[2]) + 1], 206
        elif self.command == "GET" and "/resolve/" in self.path and status == 200:
            Hub.downloaded.append(self.path)
        self.send_response(status)
        for name, value in (heads | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which `hf://someone/things` is a data set on this machine."""
    root = Path(parquet(tmp_path / "things"))
    Hub.downloaded = []
    Hub.files = {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*.parquet")}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
    }
    server.shutdown()
    thread.join()
    server.server_close()


# Several command lines in one process: most of a start is importing torch.
LINES = """
import json, sys
from barlow.cli import main
print(json.dumps([main(line) for line in json.loads(sys.argv[1])]))
"""
# A disk that is full, but for what the test writes.
NO_SPACE = """
import barlow.data.hub
barlow.data.hub._free_bytes = lambda folder: 0
"""


def commands(lines: list[list[str]], env: dict[str, str], before: str = "") -> tuple[Any, str]:
    """The status of each command, and what all of them said on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", before + LINES, json.dumps(lines)],
        **{"env": env, "capture_output": True, "text": True, "timeout": 240},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_a_hub_data_set_is_trained_on_and_one_that_is_not_there_is_the_users_mistake(
    tmp_path: Path, hub: dict[str, str]
) -> None:
    out = ["--out", str(tmp_path / "v.png"), *SMALL]
    lines = [pretrain("hf://someone/things", tmp_path / "run")]
    lines += [["views", name, *out] for name in ("hf://someone/things:test", "hf://someone/else")]
    statuses, output = commands(lines, hub)
    assert statuses == [0, 0, 2], output
    assert "cannot open hf://someone/else" in output
    assert "Traceback" not in output


def test_a_hub_data_set_larger_than_the_disk_is_read_where_it_is(
    tmp_path: Path, hub: dict[str, str]
) -> None:
    train = pretrain("hf://someone/things", tmp_path / "run", "--workers", "2")
    picture = ["views", "hf://someone/things:test", "--out", str(tmp_path / "v.png"), *SMALL]
    statuses, output = commands([train, picture], hub, NO_SPACE)
    assert statuses == [0, 0], output
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    assert not [path for path in Hub.downloaded if path.endswith(".parquet")]


@pytest.mark.parametrize("source", ["cifar1O", "/no/such/folder", "mnist5k::dev"])
def test_a_source_that_is_not_there_is_the_users_mistake(
    tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["views", source, "--out", str(tmp_path / "v.png")]) == 2
    output = capsys.readouterr().err.strip()
    assert source.partition("::")[0] in output
    assert "\n" not in output
