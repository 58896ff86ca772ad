"""An HTTP server inside a process that decides itself when it ends."""

from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

KEEP_ALIVE_S = 75
"""Longer than Nginx keeps a connection to us (60 s): so it is Nginx that closes, never a race."""

BACKLOG = 4096
"""Connections the kernel accepts for us while the loop is busy; it caps this at somaxconn."""


class Server(uvicorn.Server):
    """uvicorn, deaf to signals: set ``should_exit`` to have it drain and return."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no handlers: uvicorn's own raise the signal again before our clean-up."""
        yield


def http_server(app: ASGIApp, *, host: str, port: int, grace_s: int) -> Server:
    """
    A server for ``app``; ``await server.serve()`` runs it on the loop that is running.

    Args:
        grace_s: Seconds for requests in flight once it is told to end.
    """
    return Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            lifespan="off",
            ws="none",
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=grace_s,
            # Ours has the id of the request, and theirs the token in the query string.
            access_log=False,
            log_config=None,
            server_header=False,
            date_header=False,
            proxy_headers=False,
        )
    )
