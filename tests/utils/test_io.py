"""Downloads, against a server on this machine."""

from __future__ import annotations

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from core.errors import UserError
from utils.io import download

CONTENT = bytes(range(256)) * 5000


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT at /good, with ranges; other paths misbehave in one way each."""

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range")))
        body, status, headers = CONTENT, 200, {}
        if self.path.endswith(".md5sum"):
            body = server.md5.encode()
            status = 200 if body else 404
        elif self.path == "/page":
            body, headers = b"<html>quota</html>", {"Content-Type": "text/html; charset=utf-8"}
        elif self.path == "/absent":
            body, status = b"", 404
        length = len(body)
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and self.path != "/norange":
            start = int(asked[1])
            if start >= len(body):
                status, body, length = 416, b"", 0
                headers["Content-Range"] = f"bytes */{len(CONTENT)}"
            else:
                status, body = 206, body[start:]
                length = len(body)
        if self.path == "/cut" and not asked:
            body = body[:300_000]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.md5 = [], ""
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def accept(path):
    assert path.stat().st_size == len(CONTENT)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_file_arrives_whole_and_under_its_name_alone(server, tmp_path):
    server.md5 = f"{hashlib.md5(CONTENT).hexdigest()}  R-50.pkl"
    download(f"{server.url}/good", tmp_path / "new/R-50.pkl", accept)
    assert (tmp_path / "new/R-50.pkl").read_bytes() == CONTENT
    assert names(tmp_path / "new") == ["R-50.pkl"]


@pytest.mark.parametrize("resume_at", ["/good", "/norange"])
def test_an_interrupted_download_goes_on_where_it_stopped(server, tmp_path, resume_at):
    path = tmp_path / "R-50.pkl"
    with pytest.raises(UserError, match=rf"/cut .*\d+ bytes are kept.*put the file at {path}"):
        download(f"{server.url}/cut", path, accept)
    assert names(tmp_path) == [".R-50.pkl.part"]
    kept = (tmp_path / ".R-50.pkl.part").stat().st_size
    assert kept > 200_000
    download(f"{server.url}{resume_at}", path, accept)
    assert server.requests[-2] == (resume_at, f"bytes={kept}-")
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["R-50.pkl"]


def test_a_complete_part_needs_no_second_download(server, tmp_path):
    (tmp_path / ".R-50.pkl.part").write_bytes(CONTENT)
    download(f"{server.url}/good", tmp_path / "R-50.pkl", accept)
    assert names(tmp_path) == ["R-50.pkl"]


def test_a_wrong_sum_a_page_or_an_absent_file_leave_nothing(server, tmp_path):
    path = tmp_path / "R-50.pkl"
    server.md5 = "0" * 32
    with pytest.raises(UserError, match="its MD5 sum is .* not 000"):
        download(f"{server.url}/good", path, accept)
    with pytest.raises(UserError, match="web page instead of the file"):
        download(f"{server.url}/page", path, accept)
    with pytest.raises(UserError, match=f"404.*put the file at {path}"):
        download(f"{server.url}/absent", path, accept)
    assert names(tmp_path) == []


def test_a_file_that_does_not_load_is_deleted(server, tmp_path):
    def refuse(path):
        raise UserError("it holds no weights")

    with pytest.raises(UserError, match=r"unusable and was deleted \(it holds no weights\)"):
        download(f"{server.url}/good", tmp_path / "R-50.pkl", refuse)
    assert names(tmp_path) == []


def test_offline_says_which_file_to_put_where(tmp_path):
    path = tmp_path / "R-50.pkl"
    with pytest.raises(UserError, match=f"no connection.*put the file at {path}") as error:
        download("http://127.0.0.1:9/R-50.pkl", path, accept)
    assert "\n" not in str(error.value)
