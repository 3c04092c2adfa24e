"""Nothing in a weight file can run: every attempt is refused and leaves no trace."""

from __future__ import annotations

import functools
import io
import os
import pickle
import pickletools
import re
import subprocess
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from core.errors import UserError
from utils.detectron_weight_helper import load_detectron_weight
from utils.net import load_ckpt
from utils.weights import read_detectron_blobs

BLOBS = {"conv1_w": np.arange(6, dtype=np.float32).reshape(2, 3)}


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def calls(target):
    """What a pickle would do if it could: name -> an object that does it when it is loaded."""
    code = f"__import__('os').mkdir({str(target)!r})"
    inner = io.BytesIO()
    torch.save({"x": Call(os.mkdir, str(target))}, inner)
    nested = np.empty(1, dtype=object)
    nested[0] = Call(os.mkdir, str(target))
    return {
        "os.system": Call(os.system, f"mkdir {target}"),
        "os.mkdir": Call(os.mkdir, str(target)),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "subprocess": Call(subprocess.check_call, ["mkdir", str(target)]),
        "import": Call(__import__, "antigravity"),
        "getattr": Call(getattr, dict, "fromkeys"),
        "partial": Call(functools.partial, os.mkdir, str(target)),
        "open": Call(open, str(target), "w"),
        "torch.load": Call(torch.load, str(target)),
        "nested torch storage": Call(torch.storage._load_from_bytes, inner.getvalue()),
        "inside an object array": nested,
        "numpy.load": Call(np.load, str(target)),
    }


def stream(text: bytes) -> bytes:
    """A pickle written by hand, as no python writes it; checked to be well-formed."""
    list(pickletools.genops(text))
    return text


def by_hand(target):
    """Pickles of python 2 and of no python at all."""
    path = str(target).encode()
    return {
        "posix.system": stream(b"cposix\nsystem\n(S'mkdir %s'\ntR." % path),
        "__builtin__.eval": stream(b'c__builtin__\neval\n(S\'open("%s", "w")\'\ntR.' % path),
        "INST": stream(b"(S'mkdir %s'\nios\nsystem\n." % path),
        "dotted name": stream(b"\x80\x04\x8c\x05numpy\x8c\x17ndarray.__reduce_ex__.x\x93."),
        "getattr chain": stream(
            b"\x80\x02c__builtin__\ngetattr\nc__builtin__\n__import__\nU\x08__call__\x86R."
        ),
        "copy_reg": stream(b"ccopy_reg\n_reconstructor\n(c__main__\nX\nc__builtin__\nobject\nNtR."),
        "persistent id": stream(b"P0\n."),
        "numpy object scalar": stream(
            b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O8'\nI0\nI1\ntRS'x'\ntR."
        ),
    }


NAMES = list(calls("x"))
HAND_MADE = list(by_hand("x"))


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_that_calls(name, protocol, tmp_path):
    target, bad = tmp_path / "made", tmp_path / "bad.pkl"
    bad.write_bytes(pickle.dumps({"blobs": {**BLOBS, "x": calls(target)[name]}}, protocol))
    with pytest.raises(UserError, match=r"bad.pkl .*(is not data|object)") as error:
        read_detectron_blobs(bad)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.pkl"]


@pytest.mark.parametrize("name", HAND_MADE)
def test_a_pickle_that_no_python_writes(name, tmp_path):
    target, bad = tmp_path / "made", tmp_path / "bad.pkl"
    bad.write_bytes(by_hand(target)[name])
    with pytest.raises(UserError, match="bad.pkl is damaged or not") as error:
        read_detectron_blobs(bad)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.pkl"]


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.mkdir [{target}]",
        "!!python/object/apply:subprocess.check_call [[mkdir, {target}]]",
        "!!python/object/new:os.mkdir [{target}]",
        "MODEL: {{X: !!python/object/apply:eval [\"open('{target}', 'w')\"]}}",
        "MODEL: !!python/name:os.system ''",
        "MODEL: !!python/object/apply:builtins.getattr [!!python/module:os '', mkdir]",
    ],
)
def test_object_tags_in_the_config_inside_a_model(tag, tmp_path):
    target, bad = tmp_path / "made", tmp_path / "bad.pkl"
    content = {"blobs": BLOBS, "cfg": tag.format(target=target)}
    bad.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(UserError, match="the config inside .*bad.pkl cannot be read safely"):
        read_detectron_blobs(bad)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.pkl"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_calls(name, zipped, tmp_path):
    target, bad = tmp_path / "made", tmp_path / "bad.pth"
    content = {"model": {"weight": torch.zeros(2), "x": calls(target)[name]}}
    torch.save(content, bad, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="bad.pth is damaged or not a PyTorch .pth file") as error:
        load_ckpt(nn.Linear(2, 2), bad)
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.pth"]


def test_a_bare_pickle_named_as_a_checkpoint(tmp_path):
    target, bad = tmp_path / "made", tmp_path / "bad.pth"
    bad.write_bytes(pickle.dumps({"model": calls(target)["os.mkdir"]}, protocol=2))
    with pytest.raises(UserError, match="bad.pth is damaged or not a PyTorch"):
        load_ckpt(nn.Linear(2, 2), bad)
    assert not target.exists()


class Net(nn.Linear):
    @property
    def detectron_weight_mapping(self):
        return {"weight": "conv1_w", "bias": "conv1_b"}, []


GOOD = {"conv1_w": np.ones((2, 3), "f4"), "conv1_b": np.zeros(2, "f4")}


def spoilt(kind, suffix, folder):
    """A file that is no weights of `Net(3, 2)`, in one of many ways."""
    path = folder / f"weights{suffix}"
    if suffix == ".pkl":
        good = pickle.dumps({"blobs": GOOD}, protocol=2)
        other = pickle.dumps({"blobs": {"fc1_w": np.zeros(3, "f4")}}, protocol=2)
    else:
        file = io.BytesIO()
        torch.save({"model": Net(3, 2).state_dict()}, file)
        good = file.getvalue()
        file = io.BytesIO()
        torch.save({"model": nn.Conv2d(1, 2, 3).state_dict()}, file)
        other = file.getvalue()
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "hello")
        return path
    content = {
        "cut early": good[:20],
        "cut late": good[:-30],
        "empty": b"",
        "a page": b"<!DOCTYPE html><html><body>quota exceeded</body></html>",
        "an image": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        "text": b"MODEL:\n  TYPE: generalized_rcnn\n",
        "a list": pickle.dumps([1, 2], protocol=2),
        "another model": other,
    }[kind]
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize(
    "kind",
    ["cut early", "cut late", "empty", "a page", "an image", "text", "zip", "a list",
     "another model"],
)  # fmt: skip
def test_what_is_no_model_is_one_clear_sentence(kind, suffix, tmp_path):
    path = spoilt(kind, suffix, tmp_path)
    load = load_detectron_weight if suffix == ".pkl" else load_ckpt
    net = Net(3, 2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(UserError) as error:
        load(net, path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and len(message) < 400
    assert not re.search(r"Traceback|0x[0-9a-f]{6}", message)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
