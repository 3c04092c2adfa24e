"""Downloads that resume, take their name only when complete, and are verified."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlparse

import requests

from core.errors import UserError
from utils.progress import Progress

logger = logging.getLogger(__name__)

_TIMEOUT = (15, 60)  # seconds to connect, and between two pieces
_PIECE = 1 << 16
_KIB, _MIB = 1 << 10, 1 << 20


def download(url: str, path: Path, verify: Callable[[Path], object]) -> None:
    """Fetch a file, unless it is there; it stands at `path` only once complete and verified.

    A connection that breaks is taken up again for as long as each one brings something. What was
    fetched before a failure is kept as `.NAME.part` beside it, and the next call goes on from
    there. Several processes may ask for the same file: one fetches it, the others wait. If the
    server has `URL.md5sum` (as Detectron's has), the sum is compared.

    Args:
        verify: raises UserError if the complete file (still under another name) is unusable.
    Raises:
        UserError: says what failed and which file to put where instead.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(part):
            if path.is_file():
                part.unlink(missing_ok=True)
                return
            _fetch_all(url, part)
            _verify_md5(url, part)
            _verify_content(url, path, part, verify)
            os.replace(part, path)
    except (requests.RequestException, OSError) as error:
        size = _size(part)
        if not size:
            part.unlink(missing_ok=True)
        kept = f" ({size} bytes are kept)" if size else ""
        raise UserError(
            f"cannot download {url} ({_reason(error)}): try again{kept} or put the file at {path} "
            "yourself"
        ) from error


@contextlib.contextmanager
def _alone(part: Path) -> Iterator[None]:
    """Let one process at a time work on a file; what it then finds may be done already."""
    with part.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _fetch_all(url: str, part: Path) -> None:
    """Get the file into `part`, in as many connections as it takes."""
    while True:
        before = _size(part)
        try:
            return _fetch(url, part)
        except requests.RequestException as error:
            if _size(part) <= before:
                raise
            logger.warning("%s: %s; going on", url, _reason(error))


def _fetch(url: str, part: Path) -> None:
    """Get the file, or the rest of it, into `part`, in one connection."""
    have = _size(part)
    # Compressed transfer would make lengths incomparable.
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        content_range = response.headers.get("Content-Range", "")
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            if content_range == f"bytes */{have}":
                return  # it was complete already
            raise _start_again(part, "the file has changed on the server")
        response.raise_for_status()
        if "text/html" in response.headers.get("Content-Type", ""):
            raise requests.RequestException("the server sent a web page instead of the file")
        resumed = response.status_code == requests.codes.partial_content
        if resumed and not content_range.startswith(f"bytes {have}-"):
            raise _start_again(part, "the server sent another piece than asked for")
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        logger.info(
            "downloading %s%s%s",
            url,
            f" ({total / _MIB:.1f} MiB)" if total else "",
            f", going on after {have / _MIB:.1f} MiB" if have else "",
        )
        with (
            part.open("ab" if resumed else "wb") as file,
            Progress((total or 0) // _KIB, "KiB") as progress,
        ):
            for piece in response.iter_content(_PIECE):
                file.write(piece)
                progress.advance(len(piece) // _KIB)
    size = _size(part)
    if total is not None and size != total:
        raise requests.RequestException(f"the connection ended after {size} of {total} bytes")


def _start_again(part: Path, reason: str) -> requests.RequestException:
    part.write_bytes(b"")
    return requests.RequestException(reason)


def _verify_md5(url: str, part: Path) -> None:
    if urlparse(url).query:
        return  # no address of a plain file, so there is none of its sum
    response = requests.get(f"{url}.md5sum", timeout=_TIMEOUT)
    expected = re.match(r"[0-9a-f]{32}\b", response.text.strip().lower())
    if not response.ok or expected is None:
        logger.info("%s has no MD5 sum to compare with", url)
        return
    digest = hashlib.md5(usedforsecurity=False)
    with part.open("rb") as file:
        while piece := file.read(_MIB):
            digest.update(piece)
    found = digest.hexdigest()
    if found != expected[0]:
        raise _start_again(part, f"its MD5 sum is {found}, not {expected[0]}")


def _verify_content(url: str, path: Path, part: Path, verify: Callable[[Path], object]) -> None:
    try:
        verify(part)
    except UserError as error:
        part.unlink()
        raise UserError(
            f"what {url} gave is unusable and was deleted ({error}): fetch the file in a browser "
            f"and put it at {path}"
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    if isinstance(error, requests.Timeout):
        return "the server does not answer"
    return " ".join(str(error).split())
