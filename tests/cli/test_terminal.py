from io import StringIO

import rich
from rich.console import Console

from barlow.cli.terminal import Bar


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
