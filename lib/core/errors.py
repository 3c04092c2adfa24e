"""The one exception for mistakes a user can mend, and how a script reports it."""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """Bad input (file, config key, flag). The message is one sentence saying what to do."""

    def __str__(self) -> str:
        # KeyError subclasses would otherwise print the repr of their message.
        return str(self.args[0]) if self.args else ""


def exit_on_user_error(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a script's main(): a UserError, or a full disk, prints `error: ...` on stderr and gives
    exit code 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            what = f"cannot write {error.filename}" if error.filename else "cannot write"
            print(f"error: {what} ({error.strerror}): make room for it", file=sys.stderr)
            return 2

    return wrapped
