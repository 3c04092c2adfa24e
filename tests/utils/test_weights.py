"""Weight files are read without running code and written whole or not at all."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch

from core.errors import UserError
from utils.weights import atomic_write, read_detectron_blobs, read_torch_file, save_torch_file

BLOBS = {"conv1_w": np.arange(6, dtype=np.float32).reshape(2, 3), "conv1_b": np.zeros(2, "f4")}


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("bare", [True, False])
def test_blobs_of_any_protocol_and_form(tmp_path, protocol, bare):
    content = BLOBS if bare else {"blobs": BLOBS, "cfg": "MODEL: {}"}
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    blobs = read_detectron_blobs(path)
    assert blobs.keys() == BLOBS.keys()
    np.testing.assert_array_equal(blobs["conv1_w"], BLOBS["conv1_w"])


def test_a_pickle_of_python_2(tmp_path):
    # As python 2 with numpy 1 writes it, protocol 2: byte strings, numpy.core.
    raw = BLOBS["conv1_w"].tobytes()
    stream = (
        b"\x80\x02}U\x07conv1_wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
        b"U\x01b\x87R(K\x01K\x02K\x03\x86cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U" + bytes([len(raw)]) + raw + b"tbs."
    )
    path = tmp_path / "old.pkl"
    path.write_bytes(stream)
    np.testing.assert_array_equal(read_detectron_blobs(path)["conv1_w"], BLOBS["conv1_w"])


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_detectron_weights_in_place_of_a_checkpoint_are_told_where_they_belong(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"blobs": BLOBS}, 2))
    with pytest.raises(UserError, match=r"a\.pkl is not a PyTorch .*: .* --load_detectron"):
        read_torch_file(tmp_path / "a.pkl")


def test_code_in_a_weight_file_is_not_run(tmp_path):
    bad = tmp_path / "bad.pkl"
    bad.write_bytes(pickle.dumps({"blobs": {**BLOBS, "x": Malicious(tmp_path / "made")}}))
    with pytest.raises(UserError, match=r"bad.pkl .*mkdir, which is not data"):
        read_detectron_blobs(bad)
    torch.save({"model": Malicious(tmp_path / "made")}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="bad.pth is damaged or not a PyTorch"):
        read_torch_file(tmp_path / "bad.pth")
    assert not (tmp_path / "made").exists()


def test_missing_truncated_and_foreign_files_are_one_sentence(tmp_path):
    good = tmp_path / "good.pth"
    save_torch_file({"model": {"w": torch.zeros(1000)}}, good)
    (tmp_path / "cut.pth").write_bytes(good.read_bytes()[:2000])
    (tmp_path / "cut.pkl").write_bytes(pickle.dumps(BLOBS)[:-40])
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>quota exceeded</html>")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1, 2]))
    for read, name, message in (
        (read_torch_file, "absent.pth", "there is no weight file"),
        (read_torch_file, "cut.pth", "cut.pth is damaged .*copy or download it again"),
        (read_torch_file, "page.pth", "page.pth is not a PyTorch"),
        (read_torch_file, "empty.pth", "empty.pth is empty"),
        (read_detectron_blobs, "cut.pkl", "cut.pkl is damaged .*copy or download it again"),
        (read_detectron_blobs, "good.pth", "good.pth is not Detectron .pkl"),
        (read_detectron_blobs, "list.pkl", "holds no weights"),
    ):
        with pytest.raises(UserError, match=message) as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]
