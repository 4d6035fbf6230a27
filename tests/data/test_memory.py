"""How much memory decoded images may take."""

import os
from pathlib import Path

import pytest

from barlow.data.memory import default_budget


@pytest.mark.parametrize("limit", [None, "max\n", "9223372036854771712\n", "1000000\n"])
def test_a_containers_limit_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None
) -> None:
    file = tmp_path / "memory.max"
    if limit is not None:
        file.write_text(limit)
    monkeypatch.setattr("barlow.data.memory._LIMITS", (str(file), str(tmp_path / "none")))
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    expected = 1_000_000 if limit == "1000000\n" else machine
    assert default_budget() == expected // 4
    assert default_budget(2) == expected // 8
