"""Holding a port and running the application on it until asked to stop.

The port is taken before any model is loaded, so that a busy one is known at once, and listened on
after, so that a client is refused rather than kept waiting. The first Ctrl-C lets running answers
finish, the second does not wait.
"""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from serve.exceptions import Failure, WrongUsage

if TYPE_CHECKING:
    from fastapi import FastAPI

    from serve.api.logs import LogFormat

DRAIN_SECONDS = 30  # for running answers after the first Ctrl-C


def bind_socket(host: str, port: int) -> socket.socket:
    """Binds, without listening yet.

    Raises:
        WrongUsage: The host is not an address of this machine.
        Failure: Another program has the port.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise WrongUsage(f"host {host!r} has no address: {error.strerror}") from None
    taken = socket.socket(family, socket.SOCK_STREAM)
    # Else the port of a server just stopped stays busy for a minute.
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind(address)
    except PermissionError:
        taken.close()
        raise Failure(
            f"port {port} is the system's: use one above 1023, as in --port 8000"
        ) from None
    except OSError as error:
        taken.close()
        raise Failure(
            f"cannot listen on {host}:{port}: {error.strerror}. If another program has the port, "
            f"stop it or choose another: pellucid serve --port {port + 1 if port < 65535 else 8000}"
        ) from None
    return taken


def url_of(taken: socket.socket) -> str:
    """The URL of a bound port, as a client on this machine can use it."""
    host, port = taken.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, str(host))
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    return not (record.exc_info and record.exc_info[0] is asyncio.CancelledError)


def run(
    app: "FastAPI",
    taken: socket.socket,
    *,
    log_format: "LogFormat",
    on_ready: Callable[[], None],
    on_stop: Callable[[], None],
) -> bool:
    """Serves until Ctrl-C or SIGTERM.

    Args:
        app: The application.
        taken: From `take_port`.
        log_format: "text" or "json", see `logs.py`.
        ready: Called once connections are accepted.
        stopping: Called when asked to stop, before waiting for running answers.

    Returns:
        Whether it came to an orderly end: running answers were finished.
    """
    import uvicorn

    from serve.api import logs

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                on_ready()

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit:  # what is cut off now is cut off on purpose: no tracebacks
                logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            else:
                app.state.is_draining = True
                # What does not end in time is cut off, which needs a line and no traceback.
                logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
                on_stop()
            super().handle_exit(sig, frame)

    server = Server(
        uvicorn.Config(
            app,
            lifespan="off",
            log_config=logs.config(log_format),
            server_header=False,
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
    )
    # uvicorn raises the signal again after it has stopped: SIGTERM shall then not kill us.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[taken])
    return not server.force_exit
