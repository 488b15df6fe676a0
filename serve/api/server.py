"""Bind a port and run the application on it until a signal stops it.

The port is bound before models are loaded, so that a busy port is reported at once. The server
listens only after loading, so that a client that connects earlier is refused instead of waiting.
The first Ctrl-C lets running requests finish; the second one cancels them.
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

DRAIN_SECONDS = 30  # time for running requests after the first Ctrl-C


def bind_socket(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to a port but does not listen yet.

    Raises:
        WrongUsage: The host has no address.
        Failure: The port needs root or another program uses it.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise WrongUsage(
            f"host {host!r} has no address ({error.strerror}); choose another with --host"
        ) from None
    bound = socket.socket(family, socket.SOCK_STREAM)
    # Without this the port of a stopped server stays busy for a minute.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except PermissionError:
        bound.close()
        raise Failure(f"port {port} needs root; choose one above 1023 with --port") from None
    except OSError as error:
        bound.close()
        raise Failure(
            f"cannot listen on {host}:{port}: {error.strerror}. If another program uses the port, "
            f"stop it or choose another: pellucid serve --port {port + 1 if port < 65535 else 8000}"
        ) from None
    return bound


def url_of(bound: socket.socket) -> str:
    """Return the URL of a bound port for a client on this machine."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, str(host))
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_not_cancellation(record: logging.LogRecord) -> bool:
    return not (record.exc_info and record.exc_info[0] is asyncio.CancelledError)


def run(
    app: "FastAPI",
    bound: socket.socket,
    *,
    log_format: "LogFormat",
    on_ready: Callable[[], None],
    on_stop: Callable[[], None],
) -> bool:
    """Serve until Ctrl-C or SIGTERM.

    Args:
        app: The application.
        bound: The socket from `bind_socket`.
        log_format: "text" or "json"; see `logs.py`.
        on_ready: Called when the server accepts connections.
        on_stop: Called at the first signal, before the server waits for running requests.

    Returns:
        Whether all running requests were finished.
    """
    import uvicorn

    from serve.api import logs

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                on_ready()

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit:  # the second signal cancels requests: no tracebacks
                logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            else:
                app.state.is_draining = True
                # uvicorn cancels requests that exceed the drain time: do not log their tracebacks.
                logging.getLogger("uvicorn.error").addFilter(_is_not_cancellation)
                on_stop()
            super().handle_exit(sig, frame)

    server = Server(
        uvicorn.Config(
            app,
            lifespan="on",
            log_config=logs.config(log_format),
            server_header=False,
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
    )
    # uvicorn raises the signal again after it has stopped; SIGTERM must not kill this process then.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[bound])
    return not server.force_exit
