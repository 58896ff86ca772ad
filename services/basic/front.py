"""The one public port: HTTP by uvicorn, and who asks for the live board is handed to the gateway's door.

What Nginx sees to in a cluster is seen to here: how long a request may be and take, who may keep a
connection, how much may be under way, and that whatever is refused has the contract's shape.
"""

import asyncio
from collections.abc import Collection
from http import HTTPStatus
from typing import Any, cast

import httptools
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from services.api.endpoints import BODY_BYTES_MAX
from services.api.exchange import OTHER
from services.api.metrics import REQUESTS
from services.gateway.handshake import (
    BAD_REQUEST,
    HEAD_TOO_LARGE,
    PATH,
    STREAM_PATH,
    VERSION_NOT_SUPPORTED,
    Door,
    Opening,
    Refused,
    answer_head,
    hand_on,
)
from shared.answers import OVERLOADED, RETRY_AFTER_OVERLOADED_S, error_body
from shared.edge import new_request_id
from shared.server import HttpProtocol

LINE_BYTES_MAX = 9 * 1024
"""Of a request's first line, and of a header: a cookie of 8 KB passes, and the longest token has 6."""

HEAD_BYTES_MAX = 4 * LINE_BYTES_MAX

RECEIVE_S = 5.0
"""For all of a request, from its first byte, and for the first one from when its client connects."""

LINGER_S = 5.0
"""For which a client that was refused may go on talking: closed on it, it might not see why."""

SEND_S = 10.0
"""For which a client may leave an answer untaken."""

KEEP_ALIVE_S = 30
"""Between two requests of a connection."""

CONNECTIONS_MAX = 2048
"""Of HTTP. One more ends one that waits for its client: most only might ask again."""

UNDER_WAY_MAX = 512
"""Requests; the next one is refused before it costs anything. Work for a tenth of a second."""

PIPELINED_MAX = 16
"""Requests on a connection that wait for the answer to the one before; a client that sends more
is not waited for."""

PATHS = (PATH, STREAM_PATH)

BODY_TOO_LARGE = error_body("Request body too large")
URI_TOO_LONG = error_body("URI too long")
NOT_IMPLEMENTED = error_body("Not implemented")

UPGRADING = frozenset({b"connection", b"upgrade", b"http2-settings"})
"""Headers that offer another protocol; a server may ignore the offer (RFC 9110, section 7.8)."""

WITH_BODY = frozenset({b"content-length", b"transfer-encoding"})


class _Live(Exception):
    """The request is for the live board."""


class _Impatient(Exception):
    """The client has sent more requests than anybody answers at a time."""


class Front(HttpProtocol):
    """A connection until it asks for the live board."""

    def __init__(self, door: Door, **uvicorn: Any) -> None:
        """
        Args:
            door: Of the gateway.
            uvicorn: What uvicorn gives a protocol.
        """
        super().__init__(**uvicorn)
        self._door = door
        self._app = self.app
        self._refused = False
        self._receiving = False
        self._in_head = True
        self._received = 0  # bytes of the request, but for the piece in which it began
        self._body_bytes = 0
        self._receive_by: asyncio.TimerHandle | None = None
        self._send_by: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._bare = transport
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS_MAX:
            others = (one for one in self.connections if isinstance(one, Front) and one is not self)
            next((one for one in others if one.is_idle), self).transport.abort()
        self._receive_by = self.loop.call_later(RECEIVE_S, transport.close)

    @property
    def _answering(self) -> RequestResponseCycle | None:
        """The answer that is under way."""
        cycle = cast("RequestResponseCycle | None", self.cycle)  # of the first request none yet
        return None if cycle is None or cycle.response_complete else cycle

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being done for the client."""
        return self._answering is None

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _stop_waiting(self) -> None:
        for timer in (self._receive_by, self._send_by):
            if timer is not None:
                timer.cancel()
        self._receive_by = self._send_by = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_by = self.loop.call_later(SEND_S, self._bare.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._send_by is not None:
            self._send_by.cancel()
            self._send_by = None

    # What comes in

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self._received += len(data)
        try:
            self.parser.feed_data(data)
            self._check_what_is_incomplete()
        except httptools.HttpParserUpgrade as upgrade:
            self._begin_without_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            self._end(error.__context__ or error)
        except Refused as refusal:
            self._end(refusal)

    def _check_what_is_incomplete(self) -> None:
        if not self._receiving:
            return
        if self._in_head and self._received > HEAD_BYTES_MAX:
            raise _head_too_large() if self.headers else _uri_too_long()
        if self._receive_by is None:
            self._receive_by = self.loop.call_later(RECEIVE_S, self._bare.close)

    def _begin_without_upgrade(self, rest: bytes) -> None:
        """The parser takes what follows for another protocol's: have it begin anew, offered none."""
        head = self._head(UPGRADING)
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self.data_received(head + rest)

    def _end(self, reason: BaseException) -> None:
        """No other request on this connection: it is handed over, or refused."""
        if isinstance(reason, _Live) and self.is_idle:
            self._hand_over()
        elif isinstance(reason, _Live | _Impatient) or not self._is_first_in_line():
            self._bare.abort()  # Answers come in the order of the requests, or not at all.
        elif isinstance(reason, Refused):
            self._refuse(reason)
        elif str(reason) == "Invalid HTTP version":
            self._refuse(_version_not_supported())
        else:
            self._refuse(Refused(HTTPStatus.BAD_REQUEST, BAD_REQUEST))

    def _is_first_in_line(self) -> bool:
        """Whether no answer to an earlier request, nor the beginning of one to this, is under way."""
        answering = self._answering
        if answering is None:
            return True
        is_this = answering.scope is self.scope and not self.pipeline
        return is_this and not answering.response_started

    def _refuse(self, refusal: Refused) -> None:
        self._refused = True
        self._stop_waiting()
        if (answering := self._answering) is not None:  # Its endpoint need not know.
            answering.disconnected = True
            answering.message_event.set()
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(refusal.body)),
            "Connection": "close",
            "X-Request-ID": new_request_id(),
            **refusal.headers,
        }
        self.transport.write(answer_head(refusal.status, headers) + refusal.body)
        self.transport.write_eof()
        self._receive_by = self.loop.call_later(LINGER_S, self._bare.close)

    def _hand_over(self) -> None:
        self._stop_waiting()
        self.connections.discard(self)
        # As Nginx passes it on: nobody reads what a GET may have brought along.
        head = self._head(WITH_BODY)
        opening = Opening(self._door)
        opening.connection_made(self._bare)
        self._bare.set_protocol(opening)
        hand_on(head, self._bare, opening)

    def _head(self, without: Collection[bytes]) -> bytes:
        url = httptools.parse_url(self.url)
        target = b"%b?%b" % (url.path, url.query) if url.query else url.path
        lines = [b"%b %b HTTP/1.1" % (self.parser.get_method(), target)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] not in without]
        return b"\r\n".join([*lines, b"", b""])

    # Called by the parser

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._receiving = self._in_head = True
        self._received = self._body_bytes = 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._check_head()
        if httptools.parse_url(self.url).path in PATHS:
            raise _Live
        if self.parser.should_upgrade():
            return
        if len(self.pipeline) >= PIPELINED_MAX:
            raise _Impatient
        self.app = self._app if len(self.tasks) < UNDER_WAY_MAX else _overloaded
        super().on_headers_complete()

    def _check_head(self) -> None:
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise _version_not_supported()
        if len(self.url) > LINE_BYTES_MAX:
            raise _uri_too_long()
        hosts = 0
        for name, value in self.headers:
            if len(name) + len(value) > LINE_BYTES_MAX:
                raise _head_too_large()
            if name == b"host":
                hosts += 1
            elif name == b"content-length" and int(value) > BODY_BYTES_MAX:
                raise _body_too_large()
            elif name == b"transfer-encoding" and value.lower() != b"chunked":
                raise Refused(HTTPStatus.NOT_IMPLEMENTED, NOT_IMPLEMENTED)
        if hosts > 1 or (not hosts and version == "1.1") or b"%00" in self.url:
            raise Refused(HTTPStatus.BAD_REQUEST, BAD_REQUEST)

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > BODY_BYTES_MAX:
            raise _body_too_large()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._receiving = False
        if self._receive_by is not None:
            self._receive_by.cancel()
            self._receive_by = None
        if not self.parser.should_upgrade():
            super().on_message_complete()


async def _overloaded(scope: Scope, receive: Receive, send: Send) -> None:
    status = HTTPStatus.SERVICE_UNAVAILABLE.value
    REQUESTS.labels(OTHER, OTHER, status).inc()
    headers = {"Retry-After": str(RETRY_AFTER_OVERLOADED_S), "X-Request-ID": new_request_id()}
    answer = Response(OVERLOADED, status, headers, media_type="application/json")
    await answer(scope, receive, send)


def _head_too_large() -> Refused:
    return Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, HEAD_TOO_LARGE)


def _uri_too_long() -> Refused:
    return Refused(HTTPStatus.REQUEST_URI_TOO_LONG, URI_TOO_LONG)


def _body_too_large() -> Refused:
    return Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, BODY_TOO_LARGE)


def _version_not_supported() -> Refused:
    return Refused(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, VERSION_NOT_SUPPORTED)
