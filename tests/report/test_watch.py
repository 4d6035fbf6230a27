"""`barlow watch` serves one page, to this machine, and writes nothing."""

import http.client
import threading
import time

import pytest

from barlow.errors import UserError
from barlow.report.watch import server_of


@pytest.fixture(scope="module")
def served(run):
    server = server_of(str(run.path))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def ask(server, path="/", method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


def test_it_answers_this_machine_only(served):
    assert served.server_address[0] == "127.0.0.1"


def test_the_page_is_served_and_again_only_when_it_has_changed(served, run):
    answer, body = ask(served)
    assert answer.status == 200
    assert b"<title>tiny" in body
    for _ in range(100):  # what the first page has looked at meanwhile makes one more
        answer, _ = ask(served)
        again, body = ask(served, **{"If-None-Match": answer.headers["ETag"]})
        if again.status == 304:
            break
        time.sleep(0.1)
    assert (again.status, body) == (304, b"")
    run.metrics_file.touch()
    answer, _ = ask(served, **{"If-None-Match": answer.headers["ETag"]})
    assert answer.status == 200
    answer, body = ask(served, method="HEAD")
    assert body == b""


@pytest.mark.parametrize(
    "path",
    ["/config.yaml", "/../config.yaml", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/log.txt"],
)
def test_no_file_is_served(served, path):
    answer, body = ask(served, path)
    assert answer.status == 404
    assert b"lambd" not in body
    assert b"root:" not in body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_it_is_read_only(served, method):
    assert ask(served, method=method)[0].status == 501


def test_a_page_from_elsewhere_cannot_read_it_under_another_name(served):
    assert ask(served, Host="evil.example:80")[0].status == 403


def test_it_writes_nothing(served, run):
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*")}
    ask(served)
    assert {p: p.stat().st_mtime_ns for p in run.path.rglob("*")} == before


def test_a_port_that_is_taken_is_the_users_to_mend(served, run):
    with pytest.raises(UserError, match=f"--port {served.server_port}: .*give another"):
        server_of(str(run.path), served.server_port)
