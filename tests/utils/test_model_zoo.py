"""Published models are found by the names of their configs, fetched once, and verified."""

from __future__ import annotations

import hashlib
import json
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

import download_model
from core.errors import UserError
from utils import model_zoo

STEM = "e2e_mask_rcnn_R-50-FPN_1x"
MODEL = pickle.dumps({"blobs": {"conv1_w": np.arange(40_000, dtype="f4")}}, protocol=2)


class Zoo(BaseHTTPRequestHandler):
    """Serves a model at every address of the table, dropping the first connection."""

    def do_GET(self):
        self.server.requests.append(self.path)
        body, status = MODEL, 200
        if self.path.endswith(".md5sum"):
            body = hashlib.md5(MODEL).hexdigest().encode()
        elif start := self.headers.get("Range"):
            first = int(start.removeprefix("bytes=").removesuffix("-"))
            body, status = MODEL[first:], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 206:
            span = f"bytes {first}-{len(MODEL) - 1}/{len(MODEL)}"
            self.send_header("Content-Range", span)
        self.end_headers()
        self.wfile.write(body[: 1 << 17] if status == 200 else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, cfg, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Zoo)
    server.requests = []
    monkeypatch.setattr(model_zoo, "BASE_URL", f"http://127.0.0.1:{server.server_address[1]}/")
    cfg.DATA_DIR = str(tmp_path / "data")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_table_is_detectrons(shared):
    published = json.loads((shared / "spec/model_zoo.json").read_text())
    with_file = {stem: entry for stem, entry in published.items() if entry.get("url")}
    models = model_zoo.zoo_models()
    assert models.keys() == with_file.keys()
    for stem, entry in with_file.items():
        assert models[stem].url == entry["url"]
        for key in ("box_ap", "mask_ap", "kp_ap", "prop_ar1000"):
            assert getattr(models[stem], key) == entry.get(key)


def test_a_name_becomes_a_file_once(server, tmp_path):
    path = model_zoo.local_weights(f"zoo://{STEM}")
    assert path == tmp_path / "data/detectron_models" / f"{STEM}.pkl"
    assert path.read_bytes() == MODEL
    address = "/" + model_zoo.zoo_models()[STEM].path
    assert server.requests == [address, address, f"{address}.md5sum"]  # it was dropped once
    assert model_zoo.local_weights(f"zoo://{STEM}.yaml") == path
    assert len(server.requests) == 3


def test_other_names_are_files(tmp_path):
    assert model_zoo.local_weights(tmp_path / "a.pkl") == tmp_path / "a.pkl"
    assert str(model_zoo.local_weights("models/b.pkl")) == "models/b.pkl"


def test_an_unknown_model_is_named_with_the_nearest():
    with pytest.raises(UserError, match=r"no model 'e2e_mask_rcnn_R50-FPN_1x' \(nearest: e2e_mask"):
        model_zoo.local_weights("zoo://e2e_mask_rcnn_R50-FPN_1x")


def test_offline_says_which_file_to_put_where(monkeypatch, cfg, tmp_path):
    cfg.DATA_DIR = str(tmp_path)
    monkeypatch.setattr(model_zoo, "BASE_URL", "http://127.0.0.1:9/")
    path = tmp_path / "detectron_models" / f"{STEM}.pkl"
    with pytest.raises(UserError, match=f"no connection.*put the file at {path}") as error:
        model_zoo.local_weights(f"zoo://{STEM}")
    assert "\n" not in str(error.value)


def test_the_script_fetches_where_it_is_told(server, tmp_path):
    assert download_model.main([f"{STEM}.yaml", "--output_dir", str(tmp_path / "models")]) == 0
    assert (tmp_path / "models" / f"{STEM}.pkl").read_bytes() == MODEL


def test_the_script_lists_models_and_results(capsys):
    assert download_model.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(model_zoo.zoo_models())
    assert next(line.split() for line in lines if line.startswith(f"{STEM} ")) == [
        STEM, "37.7", "33.9", "-", "-",
    ]  # fmt: skip


def test_the_script_wants_a_name(capsys):
    assert download_model.main([]) == 2
    assert capsys.readouterr().err.startswith("error: name a config")
