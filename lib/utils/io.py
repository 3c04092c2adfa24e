"""Downloads that resume, take their name only when complete, and are verified."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import requests

from core.errors import UserError
from utils.progress import Progress

logger = logging.getLogger(__name__)

_TIMEOUT = (15, 60)  # seconds to connect, and between two pieces
_PIECE = 1 << 16
_KIB, _MIB = 1 << 10, 1 << 20


def download(url: str, path: Path, verify: Callable[[Path], None]) -> None:
    """Fetch a file; it stands at `path` only once it is complete and verified.

    What was fetched before a failure is kept as `.NAME.part` beside it, and the next call goes on
    from there. If the server has `URL.md5sum` (as Detectron's has), the sum is compared.

    Args:
        verify: raises UserError if the complete file (still under another name) is unusable.
    Raises:
        UserError: says what failed and which file to put where instead.
    """
    part = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _fetch(url, part)
        _verify_md5(url, part)
    except (requests.RequestException, OSError) as error:
        size = part.stat().st_size if part.is_file() else 0
        if not size:
            part.unlink(missing_ok=True)
        kept = f" ({size} bytes are kept)" if size else ""
        raise UserError(
            f"cannot download {url} ({_reason(error)}): try again{kept} or put the file at {path} "
            "yourself"
        ) from error
    try:
        verify(part)
    except UserError as error:
        part.unlink()
        raise UserError(
            f"what {url} gave is unusable and was deleted ({error}): fetch the file in a browser "
            f"and put it at {path}"
        ) from error
    os.replace(part, path)


def _fetch(url: str, part: Path) -> None:
    """Get the file, or the rest of it, into `part`."""
    have = part.stat().st_size if part.is_file() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    # Compressed transfer would make lengths incomparable.
    headers["Accept-Encoding"] = "identity"
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            if response.headers.get("Content-Range") == f"bytes */{have}":
                return  # it was complete already
            part.unlink()
            raise requests.RequestException("the file has changed on the server: try again")
        response.raise_for_status()
        if "text/html" in response.headers.get("Content-Type", ""):
            raise requests.RequestException("the server sent a web page instead of the file")
        resumed = response.status_code == requests.codes.partial_content
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
    size = part.stat().st_size
    if total is not None and size != total:
        raise requests.RequestException(f"the connection ended after {size} of {total} bytes")


def _verify_md5(url: str, part: Path) -> None:
    response = requests.get(f"{url}.md5sum", timeout=_TIMEOUT)
    expected = re.match(r"[0-9a-f]{32}\b", response.text.strip().lower())
    if not response.ok or expected is None:
        return  # not every server has sums
    digest = hashlib.md5(usedforsecurity=False)
    with part.open("rb") as file:
        while piece := file.read(_MIB):
            digest.update(piece)
    found = digest.hexdigest()
    if found != expected[0]:
        part.unlink()
        raise requests.RequestException(f"its MD5 sum is {found}, not {expected[0]}")


def _reason(error: Exception) -> str:
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    if isinstance(error, requests.Timeout):
        return "the server does not answer"
    return " ".join(str(error).split())
