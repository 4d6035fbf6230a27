import os

import pytest

from barlow.atomic import UNFINISHED, write_atomically, write_csv, write_text


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "before")

    def fail(file):
        file.write(b"half of")
        raise ValueError("no second half")

    with pytest.raises(ValueError, match="no second half"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["a.json"]


def test_two_writers_of_one_process_number_do_not_share_a_file(tmp_path):
    """In containers every process may have number 1; here both are this one."""
    path = tmp_path / "a.json"

    def write(file):
        file.write(b"first")
        assert len(list(tmp_path.glob(UNFINISHED))) == 1
        write_text(path, "second")

    write_atomically(path, write)
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a.json"]


def test_rows_that_end_in_an_error_are_no_csv_file(tmp_path):
    def rows():
        yield ["a.png", "cat, or dog"]
        raise ValueError("b.png cannot be read")

    with pytest.raises(ValueError, match=r"b\.png"):
        write_csv(tmp_path / "a.csv", ["id", "class"], rows())
    assert not os.listdir(tmp_path)
    write_csv(tmp_path / "a.csv", ["id", "class"], [["a.png", "cat, or dog"]])
    assert (tmp_path / "a.csv").read_bytes() == b'id,class\na.png,"cat, or dog"\n'
