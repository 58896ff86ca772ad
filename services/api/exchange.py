"""What every HTTP exchange has in common: an id, whom it is with, and being counted.

The edge makes the id. It is the same over Nginx's tries of one request, and stands for the
operation in the database, so a client's own must never be taken for it.
"""

import time
from collections.abc import Sequence

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.api import metrics
from shared.answers import error_body
from shared.edge import Edge

_BUG = Response(error_body("Internal server error"), 500, media_type="application/json")

log = structlog.get_logger()


class Exchange:
    """ASGI middleware: sets ``request_id`` and ``client_address`` in the request's state.

    What an endpoint leaves there as ``quota_headers`` goes into its answer, refused or not.
    """

    def __init__(self, app: ASGIApp, trusted_proxies: Sequence[str]) -> None:
        self._app = app
        self._edge = Edge(trusted_proxies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stamp and measure an HTTP exchange; let everything else through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        peer = scope["client"][0]
        headers = Headers(scope=scope)
        request_id = self._edge.request_id(peer, headers.get("x-request-id"))
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["client_address"] = self._edge.client_address(peer, headers.get("x-real-ip"))
        status: int | None = None
        started = time.perf_counter()

        async def send_stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answered = MutableHeaders(scope=message)
                answered["X-Request-ID"] = request_id
                answered.update(state.get("quota_headers", {}))
            await send(message)

        try:
            with structlog.contextvars.bound_contextvars(request_id=request_id):
                try:
                    await self._app(scope, receive, send_stamped)
                except Exception:
                    # A bug. The client learns nothing of it but the id to ask about.
                    log.exception("request.failed", path=scope["path"])
                    if status is not None:
                        raise
                    await _BUG(scope, receive, send_stamped)
        finally:
            # Starlette's router leaves the route it chose; anything else is one label.
            route = getattr(scope.get("route"), "path", "other")
            metrics.REQUESTS.labels(route, _known_method(scope["method"]), status).inc()
            metrics.REQUEST_SECONDS.labels(route).observe(time.perf_counter() - started)


def _known_method(method: str) -> str:
    return method if method in ("GET", "HEAD", "POST") else "other"
