"""An HTTP server inside a process that decides itself when it ends."""

import asyncio
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from shared.settings import SettingsError

KEEP_ALIVE_S = 75
"""Longer than Nginx keeps a connection to us (60 s): so it is Nginx that closes, never a race."""

BACKLOG = 1024
"""Connections the kernel accepts for us while the loop is busy."""


class HttpServer(uvicorn.Server):
    """uvicorn, deaf to signals: set ``should_exit`` to have it drain and return."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        grace_s: int,
        protocol: Callable[..., asyncio.Protocol] = HttpToolsProtocol,
        keep_alive_s: int = KEEP_ALIVE_S,
    ) -> None:
        """
        Args:
            grace_s: Seconds for requests in flight once it is told to end.
            protocol: Makes what serves a connection; uvicorn calls it as it calls its own.
            keep_alive_s: Seconds a connection may wait for its next request.
        """
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,  # type: ignore[arg-type]  # it asks for a class, and only calls it
                lifespan="off",
                ws="none",
                timeout_keep_alive=keep_alive_s,
                timeout_graceful_shutdown=grace_s,
                # Nginx logs each request; uvicorn's own line has the token of the query string.
                access_log=False,
                log_config=None,
                server_header=False,
                date_header=False,
                proxy_headers=False,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no handlers: uvicorn's own raise the signal again before our clean-up."""
        yield


def listen(
    name: str, host: str, port: int, *, send_buffer_bytes: int | None = None
) -> socket.socket:
    """
    A socket that listens; bound before anything is started that would have to be undone.

    Args:
        name: The variable that the port came from.
        send_buffer_bytes: The kernel's of each connection; None for its own choice.

    Raises:
        SettingsError: If it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise SettingsError(f"{name}: cannot listen on {host}:{port}: {reason}.") from None
    if send_buffer_bytes is not None:  # accept() inherits it
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    return listening
