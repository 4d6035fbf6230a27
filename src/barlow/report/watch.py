"""The live page of a run, served to this machine only."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

from barlow.errors import UserError

if TYPE_CHECKING:
    from barlow.report.analysis import Analysis
    from barlow.run import Run

_HERE = "127.0.0.1"


def serve(run: str, *, port: int = 8000, started: Callable[[str], None] = lambda _: None) -> None:
    """Serve the live page of a run on this machine until Ctrl-C; writes no files.

    The page refreshes itself.

    Args:
        run: folder of a run.
        port: port on this machine; 0 picks a free one.
        started: called with the address.

    Raises:
        UserError: if the folder is not a run, or the port is taken.
    """
    server = server_of(run, port)
    started(f"http://{_HERE}:{server.server_port}/")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def server_of(run: str, port: int = 0) -> ThreadingHTTPServer:
    """The server of `serve`, bound but not serving yet."""
    from barlow.report.facts import collect
    from barlow.run import Run

    folder = Run(Path(run))
    collect(folder)  # a wrong folder is an error now, not in the browser
    try:
        return ThreadingHTTPServer((_HERE, port), _handler(_Page(folder)))
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--port {port}: {error}; give another port, or 0 for any free one"
        ) from error


class _Page:
    """The current page; images are analysed again only when there is a new checkpoint."""

    def __init__(self, run: "Run") -> None:
        self._run = run
        self._analysis: Analysis | None = None
        self._analysed_at = 0.0
        self._analysing = threading.Lock()

    def version(self) -> str:
        """A text that changes whenever the page changes, used as its ETag."""
        files = [self._run.metrics_file, self._run.log_file, self._run.skipped_file]
        times = [_time(file) for file in [*files, *self._run.evaluation_files()]]
        return '"' + "-".join(f"{time:.3f}" for time in [*times, self._analysed_at]) + '"'

    def html(self) -> str:
        """The page; slow work is done in the background, for the next request."""
        from barlow.report.facts import collect
        from barlow.report.page import page

        if self._saved() > self._analysed_at and not self._analysing.locked():
            threading.Thread(target=self._analyse, daemon=True).start()
        return page(collect(self._run), self._analysis, live=self.version())

    def _saved(self) -> float:
        return _time(self._run.encoder_folder / "model.safetensors")

    def _analyse(self) -> None:
        from barlow.report import analyse_or_none

        with self._analysing:
            saved = self._saved()
            if saved > self._analysed_at:
                self._analysis = analyse_or_none(self._run) or self._analysis
                self._analysed_at = saved


def _handler(page: _Page) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # Against DNS rebinding: a page from elsewhere must not read this one by pointing a host
            # name of its own at this machine.
            host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
            if host not in (_HERE, "localhost"):
                self.send_error(403)
            elif self.path != "/":
                self.send_error(404)
            elif self.headers.get("If-None-Match") == page.version():
                self._answer(304, "", page.version())
            else:
                version, text = page.version(), page.html()
                self._answer(200, text, version)

        do_HEAD = do_GET

        def _answer(self, status: int, text: str, version: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-cache")
            self.send_header("ETag", version)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


def _time(file: Path) -> float:
    return file.stat().st_mtime if file.exists() else 0.0
