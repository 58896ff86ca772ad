"""The one public port: HTTP as an API replica has it, and who asks for the live board is handed on.

What Nginx sees to in a cluster is seen to here: how long a request may be and take, who may keep a
connection, and that whatever is refused has the contract's shape.
"""

import asyncio
from collections.abc import Collection, Mapping
from http import HTTPStatus
from typing import Any

import httptools
import structlog

from services.api.connection import BODY_BYTES_MAX, Connection
from services.api.exchange import Endpoint
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
from shared.answers import error_body
from shared.edge import new_request_id

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

PATHS = (PATH, STREAM_PATH)

BODY_TOO_LARGE = error_body("Request body too large")
URI_TOO_LONG = error_body("URI too long")
NOT_IMPLEMENTED = error_body("Not implemented")

UPGRADING = frozenset({b"connection", b"upgrade", b"http2-settings"})
"""Headers that offer another protocol; a server may ignore the offer (RFC 9110, section 7.8)."""

WITH_BODY = frozenset({b"content-length", b"transfer-encoding"})

log = structlog.get_logger()


class _Live(Exception):
    """The request is for the live board."""


class Front(Connection):
    """A connection until it asks for the live board."""

    def __init__(self, endpoints: Mapping[bytes, Endpoint], door: Door, **uvicorn_s: Any) -> None:
        """
        Args:
            door: Whom the live board is asked from.
        """
        super().__init__(endpoints, door.edge, **uvicorn_s)
        self._door = door
        self._is_refused = False
        self._is_receiving = False
        self._is_in_head = True
        self._received = 0  # bytes of the request, but for the piece in which it began
        self._receive_by: asyncio.TimerHandle | None = None
        self._send_by: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Tell of the first byte the kernel does not take: closing, too, waits for it to be taken.
        transport.set_write_buffer_limits(high=0)
        if len(self.connections) > CONNECTIONS_MAX:
            others = (one for one in self.connections if isinstance(one, Front) and one is not self)
            next((one for one in others if not one._is_busy()), self).transport.abort()
        self._receive_by = self.loop.call_later(RECEIVE_S, transport.close)

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
        self._send_by = self.loop.call_later(SEND_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._send_by is not None:
            self._send_by.cancel()
            self._send_by = None

    # What comes in.

    def data_received(self, data: bytes) -> None:
        if self._is_refused or self.transport.is_closing():
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
        if not self._is_receiving:
            return
        if self._is_in_head and self._received > HEAD_BYTES_MAX:
            raise _head_too_large() if self.headers else _uri_too_long()
        if self._receive_by is None:
            self._receive_by = self.loop.call_later(RECEIVE_S, self.transport.close)

    def _begin_without_upgrade(self, rest: bytes) -> None:
        """The parser takes what follows for another protocol's: have it begin anew, offered none."""
        head = self._head(UPGRADING)
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self.data_received(head + rest)

    def _end(self, reason: BaseException) -> None:
        """There is no other request on this connection: it is handed on, or refused."""
        if self._is_busy():  # What is under way is the last.
            self._be_deaf()
        elif isinstance(reason, _Live):
            self._hand_on()
        elif isinstance(reason, Refused):
            self._refuse(reason)
        elif str(reason) == "Invalid HTTP version":  # in the parser's words
            self._refuse(_version_not_supported())
        else:
            log.debug("request.unreadable", error=repr(reason))
            self._refuse(_bad_request())

    def _refuse(self, refusal: Refused) -> None:
        self._is_refused = True
        self._stop_waiting()
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(refusal.body)),
            "Connection": "close",
            "X-Request-ID": new_request_id(),
            **refusal.headers,
        }
        self.transport.write(answer_head(refusal.status, headers) + refusal.body)
        self.transport.write_eof()
        self._receive_by = self.loop.call_later(LINGER_S, self.transport.close)

    def _hand_on(self) -> None:
        self._stop_waiting()
        self.connections.discard(self)
        self._is_last = True
        self._wake()
        opening = Opening(self._door)
        opening.connection_made(self.transport)
        self.transport.set_protocol(opening)
        # As Nginx passes it on: nobody reads what a GET may have brought along.
        hand_on(self._head(WITH_BODY), self.transport, opening)

    def _head(self, without: Collection[bytes]) -> bytes:
        url = httptools.parse_url(self.url)
        target = b"%b?%b" % (url.path, url.query) if url.query else url.path
        lines = [b"%b %b HTTP/1.1" % (self.parser.get_method(), target)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] not in without]
        return b"\r\n".join([*lines, b"", b""])

    # Called by the parser.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_receiving = self._is_in_head = True
        self._received = 0

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        if self._is_deaf:
            return
        self._check_head()
        if httptools.parse_url(self.url).path in PATHS:
            raise _Live
        if not self.parser.should_upgrade():
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
            raise _bad_request()

    def on_body(self, body: bytes) -> None:
        if self._endpoint is not None and len(self._body) + len(body) > BODY_BYTES_MAX:
            raise _body_too_large()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_receiving = False
        if self._receive_by is not None:
            self._receive_by.cancel()
            self._receive_by = None
        if not self.parser.should_upgrade():
            super().on_message_complete()


def _bad_request() -> Refused:
    return Refused(HTTPStatus.BAD_REQUEST, BAD_REQUEST)


def _head_too_large() -> Refused:
    return Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, HEAD_TOO_LARGE)


def _uri_too_long() -> Refused:
    return Refused(HTTPStatus.REQUEST_URI_TOO_LONG, URI_TOO_LONG)


def _body_too_large() -> Refused:
    return Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, BODY_TOO_LARGE)


def _version_not_supported() -> Refused:
    return Refused(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, VERSION_NOT_SUPPORTED)
