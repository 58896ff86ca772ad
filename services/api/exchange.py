"""What every HTTP exchange has in common: an id, whom it is with, one shape, and being counted.

The edge makes the id. It is the same over Nginx's tries of one request, and stands for the
operation in the database, so a client's own must never be taken for it.

The endpoints are reached without Starlette's layers: they took 65 of an update's 450 µs.
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
    One request.

    Attributes:
        request_id: 32 hexadecimal digits.
        address: The client's, as the load balancer saw it.
        headers: By name in lower case; of several with one name the first.
        quota_headers: To be set by the endpoint; they go into the answer, refused or not.
    """

    __slots__ = ("_receive", "address", "headers", "quota_headers", "request_id")

    def __init__(
        self, request_id: str, address: str, headers: Mapping[bytes, bytes], receive: Receive
    ) -> None:
        self.request_id = request_id
        self.address = address
        self.headers = headers
        self.quota_headers: Headers = ()
        self._receive = receive

    def header(self, name: bytes, default: str = "") -> str:
        """The value as text."""
        value = self.headers.get(name)
        return default if value is None else value.decode("latin-1")

    async def body(self, bytes_max: int) -> bytes | None:
        """All of the body; None if it is longer than that, or its client left in the middle."""
        body = bytearray()
        while True:
            message = await self._receive()
            body += message.get("body", b"")
            if len(body) > bytes_max or message["type"] != "http.request":
                return None
            if not message.get("more_body", False):
                return bytes(body)


class Endpoint(NamedTuple):
    """What answers on a path."""

    methods: tuple[str, ...]
    handle: Callable[[Exchange], Awaitable[Answer]]


class Exchanges:
    """The ASGI application: the endpoints by their paths, and another application for the rest."""

    def __init__(
        self, endpoints: Mapping[str, Endpoint], rest: ASGIApp, trusted_proxies: Sequence[str]
    ) -> None:
        self._endpoints = endpoints
        self._rest = rest
        self._edge = Edge(trusted_proxies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Identify, answer and measure one exchange."""
        started = time.perf_counter()
        exchange = self._identify(scope, receive)
        # Not taken back: uvicorn runs each exchange in a task, and so in a context, of its own.
        structlog.contextvars.bind_contextvars(request_id=exchange.request_id)
        route, status = OTHER, None
        try:
            endpoint = self._endpoints.get(scope["path"])
            if endpoint is None:
                status = await self._pass_on(scope, exchange, receive, send)
                route = getattr(scope.get("route"), "path", OTHER)
            else:
                route = scope["path"]
                answer = await _answer(endpoint, scope["method"], exchange, route)
                status = answer.status
                await _send(answer, exchange, send)
        finally:
            _counter(route, scope["method"], status).inc()
            _duration(route).observe(time.perf_counter() - started)

    def _identify(self, scope: Scope, receive: Receive) -> Exchange:
        peer = scope["client"][0]
        headers = dict(reversed(scope["headers"]))
        address = headers.get(b"x-real-ip", b"").decode("latin-1")
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        return Exchange(
            self._edge.request_id(peer, request_id),
            self._edge.client_address(peer, address),
            headers,
            receive,
        )

    async def _pass_on(
        self, scope: Scope, exchange: Exchange, receive: Receive, send: Send
    ) -> int | None:
        """Have the other application answer; returns the status, None if it did not come to that."""
        status: int | None = None

        async def send_stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", exchange.request_id.encode()))
            await send(message)

        await self._rest(scope, receive, send_stamped)
        return status


async def _answer(endpoint: Endpoint, method: str, exchange: Exchange, path: str) -> Answer:
    """The one place where a refusal or a bug becomes an answer; ours is logged, with the id."""
    if method not in endpoint.methods:
        allowed = ", ".join(endpoint.methods).encode()
        return Answer(405, error_body("Method not allowed"), [(b"allow", allowed)])
    try:
        return await endpoint.handle(exchange)
    except Refused as refused:
        answer = refused.answer
        say = log.warning if answer.status >= SERVER_ERROR else log.debug
        say("request.refused", path=path, status=answer.status, error=str(refused))
        return answer
    except Exception:
        # A bug. The client learns nothing of it but the id to ask about.
        log.exception("request.failed", path=path)
        return Answer(500, error_body("Internal server error"))


async def _send(answer: Answer, exchange: Exchange, send: Send) -> None:
    headers = [
        (b"x-request-id", exchange.request_id.encode()),
        *exchange.quota_headers,
        *answer.headers,
    ]
    if answer.status != 304:
        headers += [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(answer.body)),
        ]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


def the_rest(routes: Sequence[BaseRoute]) -> Starlette:
    """An application for what is no endpoint; it refuses in the same shape."""
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


# Looking a child up by its labels costs more than counting.


@functools.cache
def _counter(route: str, method: str, status: int | None) -> Counter:
    known = method if method in ("GET", "HEAD", "POST") else OTHER
    return metrics.REQUESTS.labels(route, known, status)


@functools.cache
def _duration(route: str) -> Histogram:
    return metrics.REQUEST_SECONDS.labels(route)
