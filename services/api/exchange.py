"""What every HTTP exchange has in common: an id, whom it is with, one shape, and being counted.

The edge makes the id. It is the same over Nginx's tries of one request, and stands for the
operation in the database, so a client's own must never be taken for it.
"""

import functools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple

import structlog
from prometheus_client import Counter, Histogram
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.api import metrics
from shared.answers import error_body
from shared.edge import Edge
from shared.log import REQUEST_ID

SERVER_ERROR = 500
"""From this status on it is our fault."""

OTHER = "other"
"""The label of paths and methods that are not ours: a client must not make labels up."""

Headers = Sequence[tuple[bytes, bytes]]

log = structlog.get_logger()


class Answer(NamedTuple):
    """What a client gets; length, type, id and quota are added to the headers."""

    status: int
    body: bytes
    headers: Headers = ()


class Refused(Exception):
    """The exchange ends here, with this answer."""

    def __init__(self, status: int, message: str, headers: Headers = ()) -> None:
        super().__init__(message)
        self.answer = Answer(status, error_body(message), headers)


class Exchange:
    """
    One request to an endpoint.

    Attributes:
        method: In upper case.
        headers: By name in lower case; of several with one name the first.
        body: All of it; None if it is longer than it may be.
        request_id: 32 hexadecimal digits.
        quota_headers: To be set by the endpoint: whole lines, which go into the answer, refused or
            not.
    """

    __slots__ = (
        "_edge", "_peer", "body", "endpoint", "headers", "method", "quota_headers", "request_id",
    )  # fmt: skip

    def __init__(
        self,
        method: bytes,
        endpoint: "Endpoint",
        headers: Mapping[bytes, bytes],
        body: bytes | None,
        peer: str,
        edge: Edge,
    ) -> None:
        self.method = method
        self.endpoint = endpoint
        self.headers = headers
        self.body = body
        self._peer, self._edge = peer, edge
        self.request_id = edge.request_id(peer, self.header(b"x-request-id"))
        self.quota_headers = b""

    @property
    def address(self) -> str:
        """The client's, as the load balancer saw it."""
        return self._edge.client_address(self._peer, self.header(b"x-real-ip"))

    def header(self, name: bytes, default: str = "") -> str:
        """The value as text."""
        value = self.headers.get(name)
        return default if value is None else value.decode("latin-1")


class Endpoint(NamedTuple):
    """What answers on a path."""

    path: str
    methods: tuple[bytes, ...]
    handle: Callable[[Exchange], Awaitable[Answer]]


async def answer(exchange: Exchange) -> Answer:
    """The one place where a refusal or a bug becomes an answer; ours is logged, with the id."""
    methods, path = exchange.endpoint.methods, exchange.endpoint.path
    if exchange.method not in methods:
        return Answer(405, error_body("Method not allowed"), [(b"allow", b", ".join(methods))])
    REQUEST_ID.set(exchange.request_id)
    try:
        return await exchange.endpoint.handle(exchange)
    except Refused as refused:
        answer = refused.answer
        say = log.warning if answer.status >= SERVER_ERROR else log.debug
        say("request.refused", path=path, status=answer.status, error=str(refused))
        return answer
    except Exception:
        # A bug. The client learns nothing of it but the id to ask about.
        log.exception("request.failed", path=path)
        return Answer(500, error_body("Internal server error"))


def measure(exchange: Exchange, status: int, seconds: float) -> None:
    """Count an exchange that is over."""
    _count(exchange.endpoint.path, exchange.method, status, seconds)


def the_rest(routes: Sequence[BaseRoute]) -> Starlette:
    """An application for what is no endpoint's; it refuses in the same shape."""
    app = Starlette(routes=routes, exception_handlers={HTTPException: _refuse})
    # `/livez/` is no path of ours; a redirect would make it one.
    app.router.redirect_slashes = False
    return app


async def _refuse(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101
    message = {404: "Not found", 405: "Method not allowed"}.get(error.status_code, error.detail)
    return Response(
        error_body(message), error.status_code, error.headers, media_type="application/json"
    )


class Others:
    """What is no endpoint's: another application answers, and it has an id and is counted as well."""

    def __init__(self, app: ASGIApp, edge: Edge) -> None:
        self._app = app
        self._edge = edge

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have the other application answer."""
        started = time.perf_counter()
        given = dict(reversed(scope["headers"])).get(b"x-request-id", b"").decode("latin-1")
        request_id = self._edge.request_id(scope["client"][0], given)
        REQUEST_ID.set(request_id)
        status: int | None = None

        async def send_stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", request_id.encode()))
            await send(message)

        try:
            await self._app(scope, receive, send_stamped)
        finally:
            route = getattr(scope.get("route"), "path", OTHER)
            _count(route, scope["method"].encode(), status, time.perf_counter() - started)


def _count(route: str, method: bytes, status: int | None, seconds: float) -> None:
    _counter(route, method if method in _METHODS else None, status).inc()
    _duration(route).observe(seconds)


_METHODS = frozenset({b"GET", b"HEAD", b"POST"})

# Looking a child up by its labels costs more than counting.


@functools.cache
def _counter(route: str, method: bytes | None, status: int | None) -> Counter:
    return metrics.REQUESTS.labels(route, OTHER if method is None else method.decode(), status)


@functools.cache
def _duration(route: str) -> Histogram:
    return metrics.REQUEST_SECONDS.labels(route)
