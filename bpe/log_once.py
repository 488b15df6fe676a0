"""Log each warning once, even if the file that causes it is read several times."""

import functools
import logging


@functools.lru_cache(maxsize=1024)
def warn_once(log: logging.Logger, message: str) -> None:
    """Log a warning unless the same message was logged before."""
    log.warning("%s", message)
