"""Downloads, against a server on this machine."""

from __future__ import annotations

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from core.errors import UserError
from utils.download import download
from utils.weights import read_detectron_blobs

CONTENT = bytes(range(256)) * 5000
DROP = 4 << 16  # bytes that come before a connection breaks


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
        elif self.path == "/wrong":
            body = bytes(len(CONTENT))
        elif self.path == "/absent":
            body, status = b"", 404
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and self.path == "/once":
            body, status = b"", 503
        elif asked and self.path != "/norange":
            start = int(asked[1])
            if start >= len(body):
                status, headers["Content-Range"] = 416, f"bytes */{len(body)}"
                body = b""
            else:
                start = 0 if self.path == "/elsewhere" else start
                status, body = 206, body[start:]
                headers["Content-Range"] = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        drops = self.path in ("/drops", "/once")
        self.wfile.write(body[:DROP] if drops else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.md5 = [], ""
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def accept(path):
    """As weight files are read, but cheap."""
    assert path.stat().st_size == len(CONTENT)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_file_arrives_whole_and_under_its_name_alone(server, tmp_path):
    server.md5 = f"{hashlib.md5(CONTENT).hexdigest()}  R-50.pkl"
    download(f"{server.url}/good", tmp_path / "new/R-50.pkl", accept)
    assert (tmp_path / "new/R-50.pkl").read_bytes() == CONTENT
    assert names(tmp_path / "new") == ["R-50.pkl"]


def test_a_connection_that_drops_is_taken_up_again(server, tmp_path):
    server.md5 = hashlib.md5(CONTENT).hexdigest()
    download(f"{server.url}/drops", tmp_path / "R-50.pkl", accept)
    assert (tmp_path / "R-50.pkl").read_bytes() == CONTENT
    ranges = [asked for path, asked in server.requests if path == "/drops"]
    assert ranges == [None, *(f"bytes={n}-" for n in range(DROP, len(CONTENT), DROP))]
    assert names(tmp_path) == ["R-50.pkl"]


@pytest.mark.parametrize("resume_at", ["/good", "/norange", "/elsewhere"])
def test_an_interrupted_download_goes_on_where_it_stopped(server, tmp_path, resume_at):
    path = tmp_path / "R-50.pkl"
    with pytest.raises(UserError, match=rf"/once .*{DROP} bytes are kept.*put the file at {path}"):
        download(f"{server.url}/once", path, accept)
    assert names(tmp_path) == [".R-50.pkl.part"]
    if resume_at == "/elsewhere":  # what came does not fit: nothing can be kept
        with pytest.raises(UserError, match="another piece than asked for"):
            download(f"{server.url}{resume_at}", path, accept)
        assert names(tmp_path) == []
        return
    download(f"{server.url}{resume_at}", path, accept)
    assert server.requests[-2] == (resume_at, f"bytes={DROP}-")
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["R-50.pkl"]


def test_several_at_once_fetch_a_file_once(server, tmp_path):
    threads = [
        threading.Thread(
            target=download, args=(f"{server.url}/good", tmp_path / "R-50.pkl", accept)
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path for path, _ in server.requests].count("/good") == 1
    assert (tmp_path / "R-50.pkl").read_bytes() == CONTENT
    assert names(tmp_path) == ["R-50.pkl"]


def test_wrong_bytes_are_never_taken(server, tmp_path):
    path = tmp_path / "R-50.pkl"
    server.md5 = hashlib.md5(CONTENT).hexdigest()
    with pytest.raises(UserError, match="its MD5 sum is"):
        download(f"{server.url}/wrong", path, accept)
    assert names(tmp_path) == []
    server.md5 = ""  # a server without sums: the reader decides
    with pytest.raises(UserError, match=f"unusable and was deleted .*put it at {path}"):
        download(f"{server.url}/wrong", path, read_detectron_blobs)
    assert names(tmp_path) == []


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
