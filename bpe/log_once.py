"""Logging a warning once, however often the file that causes it is read."""

import functools
import logging


@functools.lru_cache(maxsize=1024)
def warn_once(log: logging.Logger, message: str) -> None:
    """Log a warning, unless the same one was logged before."""
    log.warning("%s", message)
