import hashlib
import os
import threading
from pathlib import Path

import numpy as np

from barlow.data import fingerprints
from barlow.data.fingerprints import content_hash, file_state, file_states
from barlow.data.source import Source, Table


def test_many_files_are_asked_at_a_time_in_order(tmp_path, monkeypatch):
    files = [str(tmp_path / f"{i:02}.png") for i in range(80)]
    for i, file in enumerate(files):
        Path(file).write_bytes(bytes(i))
    Path(files[3]).unlink()
    source = Source("list", Table(files, files), 1)
    digest = hashlib.sha256(b"80 1")
    for file in files:
        digest.update(os.fsencode(f"{file} {file_state(file)}\n"))
    expected = digest.hexdigest()[:16]
    assert content_hash(source) == expected
    assert list(file_states(source)) == [file_state(file) for file in files]
    together = threading.Barrier(4, timeout=5)

    def met(file):
        together.wait()
        return file_state(file)

    monkeypatch.setattr(fingerprints, "_TOGETHER", 1)
    monkeypatch.setattr(fingerprints, "file_state", met)
    assert content_hash(source) == expected


def test_an_image_in_memory_has_no_file_and_no_state():
    pixels = [np.zeros((4, 4), np.uint8)] * 3
    assert list(file_states(Source("arrays", Table(pixels, ["0", "1", "2"]), 1))) == ["", "", ""]
