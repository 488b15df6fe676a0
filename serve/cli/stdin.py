"""Text from arguments and from standard input, which must be UTF-8."""

import os
import stat
import sys

from serve.exceptions import WrongUsage


def piped() -> str | None:
    """Return the text that is piped or redirected to stdin, or None.

    Stdin is read only if it is a pipe or a file, not if it is a terminal or another device.
    """
    mode = os.fstat(0).st_mode if sys.stdin else 0
    return read() if stat.S_ISFIFO(mode) or stat.S_ISREG(mode) else None


def read() -> str:
    """Return the text on standard input.

    Raises:
        WrongUsage: the text is not UTF-8.
    """
    data = sys.stdin.buffer.read()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise WrongUsage(
            f"stdin is not UTF-8 (byte {data[error.start]:#04x} at offset {error.start}); "
            "convert it to UTF-8"
        ) from None


def joined(argument: str | None, piped: str | None) -> str | None:
    """Join the argument and the piped text by an empty line; return None if there is neither.

    Raises:
        WrongUsage: the argument is not UTF-8.
    """
    return "\n\n".join(filter(None, [require_utf8(argument), piped])) or None


def require_utf8(argument: str | None) -> str | None:
    """Return an argument unchanged, after a check that it is UTF-8.

    Raises:
        WrongUsage: the argument has bytes that are not UTF-8, which Python decoded as surrogates.
    """
    try:
        (argument or "").encode()
    except UnicodeEncodeError as error:
        raise WrongUsage(
            f"an argument is not UTF-8 from character {error.start} on; convert it to UTF-8"
        ) from None
    return argument
