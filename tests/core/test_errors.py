"""What a script says and returns when something fails that its user can mend."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from core.errors import UserError, exit_on_user_error
from utils.weights import atomic_write


def test_a_mistake_is_one_sentence_and_exit_code_2(capsys):
    @exit_on_user_error
    def main():
        raise UserError("give --dataset")

    assert main() == 2
    assert capsys.readouterr().err == "error: give --dataset\n"


def test_a_script_without_a_return_value_succeeds():
    assert exit_on_user_error(lambda: None)() == 0


def test_a_full_disk_is_said_with_the_file(tmp_path, capsys):
    @exit_on_user_error
    def main():
        with atomic_write(tmp_path / "detections.pkl"), Path("/dev/full").open("wb") as full:
            full.write(b"more than there is room for")

    assert main() == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: cannot write {tmp_path / 'detections.pkl'} (No space left")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_other_failures_keep_their_traceback():
    @exit_on_user_error
    def main():
        raise PermissionError(errno.EACCES, "Permission denied", "somewhere")

    with pytest.raises(PermissionError):
        main()
