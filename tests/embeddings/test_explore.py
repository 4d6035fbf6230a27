import importlib.util
import io
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from barlow.cli import main
from barlow.embeddings.explore import draw_map
from barlow.errors import UserError


@pytest.fixture
def embedded(photos, encoder_folder, tmp_path):
    def make(n):
        file = tmp_path / "e.parquet"
        assert main(["embed", str(encoder_folder), str(photos(n)), "--out", str(file)]) == 0
        return file

    return make


@pytest.mark.slow
def test_the_map_is_drawn_once_and_served_on_this_machine_alone(embedded, command):
    file = embedded(30)
    drawn = draw_map(str(file))
    table = pq.read_table(drawn)
    assert table["id"].to_pylist() == pq.read_table(file)["id"].to_pylist()
    assert table["label"].to_pylist()[0] == "cat"
    places = np.stack([table["projection_x"], table["projection_y"]], 1)
    assert np.isfinite(places).all()
    assert len(np.unique(places, axis=0)) == 30
    for row, neighbours in enumerate(table["neighbors"].to_pylist()):
        assert neighbours["ids"][0] == row
        assert len(set(neighbours["ids"])) == 15
        assert neighbours["distances"] == sorted(neighbours["distances"])
    pictures = [image["bytes"] for image in table["image"].to_pylist()]
    for picture, path in zip(pictures, table["path"].to_pylist(), strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(picture)))[..., 0], Image.open(path))

    before = drawn.stat().st_mtime_ns
    arguments = command("explore", file, "--port", "5917")
    arguments["env"]["PYTHONUNBUFFERED"] = "1"
    with subprocess.Popen(
        **arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            found = (re.search(r"http://[\w.]+:\d+", line) for line in process.stdout)
            address = next(match[0] for match in found if match)
            assert address.startswith("http://127.0.0.1:")
            assert b"<html" in fetched(address)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert drawn.stat().st_mtime_ns == before, "drawn already"


def fetched(address, seconds=60):
    """The page, once the server that has just said its address answers."""
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(address, timeout=seconds) as page:
                return page.read()
        except urllib.error.URLError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def test_too_few_images_are_refused(embedded):
    with pytest.raises(UserError, match="5 images: a map needs 20 or more"):
        draw_map(str(embedded(5)))


def test_without_the_extra_the_command_to_install_it_is_said(embedded, monkeypatch):
    file = embedded(5)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install embedding-atlas"):
        draw_map(str(file))
