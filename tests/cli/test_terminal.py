from io import StringIO

import pytest
import rich
from rich.console import Console

from barlow.cli import terminal
from barlow.cli.terminal import Bar, Lines


def test_a_path_with_brackets_is_shown_as_it_is_beside_the_bar(monkeypatch):
    screen = StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=screen, force_terminal=True, width=40))
    paths = ["/data/[raw]/1.jpg", "/data/[/x]/:cat:.jpg", f"/data/{'long' * 10}/1 2.jpg"]
    bar = Bar(verbose=False)
    bar.start(0, 10)
    for path in paths:
        bar.warn(f"warning: {path}")
    bar.end()
    for path in paths:
        assert f"barlow: warning: {path}\n" in screen.getvalue()


TERMS = {"loss": 12.0, "invariance": 7.0, "redundancy": 980.0, "images_per_second": 99.6}


def row(step, **measured):
    return TERMS | {"step": step, "epoch": step / 10} | measured


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when they are told to."""

    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(terminal, "time", clock)
    return clock


def test_a_log_has_the_first_row_each_look_at_held_out_images_and_a_sign_of_life(capsys, clock):
    lines = Lines(verbose=False)
    lines.start(0, 100)
    for step in range(1, 61):
        clock.now += 2
        lines.step(step)
        looked = {"val_loss": 1.0} if step == 3 else {"effective_rank": 5.0} if step == 5 else {}
        lines.row(row(step, **looked), f"row {step}")
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"barlow: row {step}" for step in (1, 3, 5, 20, 35, 50)]
    for step in (61, 62):
        clock.now += 50
        lines.step(step)
    assert capsys.readouterr().out == "barlow: step 61 of 100\n"


def test_a_bar_keeps_the_last_k_nn_in_sight(monkeypatch):
    screen = StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=screen, force_terminal=True, width=200))
    bar = Bar(verbose=False)
    bar.start(0, 10)
    bar.row(row(1, val_loss=1.0, knn_top1=0.5), "")
    bar.row(row(2), "")
    bar.end()
    assert "k-NN 50.0%, loss 12 = invariance 7" in screen.getvalue()
