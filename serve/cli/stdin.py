"""Text from arguments and from standard input, which must be UTF-8."""

import os
import stat
import sys

from serve.exceptions import WrongUsage


def piped() -> str | None:
    """Return the text that is piped or redirected into this command, or None.

    A terminal is not read, nor a stdin that is neither pipe nor file, such as a service's.
    """
    mode = os.fstat(0).st_mode if sys.stdin else 0
    return read() if stat.S_ISFIFO(mode) or stat.S_ISREG(mode) else None


def read() -> str:
    """Return the text on standard input.

    Raises:
        WrongUsage: it is not UTF-8.
    """
    data = sys.stdin.buffer.read()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise WrongUsage(
            f"stdin is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}"
        ) from None


def joined(argument: str | None, piped: str | None) -> str | None:
    """Return the argument and the piped text, with an empty line between."""
    return "\n\n".join(filter(None, [require_utf8(argument), piped])) or None


def require_utf8(argument: str | None) -> str | None:
    """Return an argument.

    Raises:
        WrongUsage: it is not UTF-8. Python lets other bytes pass as surrogates.
    """
    try:
        (argument or "").encode()
    except UnicodeEncodeError as error:
        raise WrongUsage(f"an argument is not UTF-8, from character {error.start} on") from None
    return argument
