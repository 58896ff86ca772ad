"""What a client gets for its opening request: a connection, or a refusal that says why.

picows is given a connection only once it is to be a WebSocket, and with a request of ours: what it
answers on its own is plain text that quotes the request, and it keeps what it was asked, the token
above all, as long as the connection.
"""

import asyncio
import logging
import random
import socket
import time
from base64 import b64decode
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import cast
from urllib.parse import parse_qsl

import aiofastnet
import httptools
import structlog
from picows import WSAutoPingStrategy, WSUpgradeResponse, WSUpgradeResponseWithListener
from picows.picows import WSProtocol  # type: ignore[attr-defined]  # not in its stub

from services.gateway import metrics
from services.gateway.caps import AcceptRate, Caps
from services.gateway.clients import Client, Clients, DeflatedClient
from services.gateway.streams import EventStream
from shared.answers import CHALLENGE, NOT_FOUND, OVERLOADED, UNAUTHORIZED, error_body
from shared.edge import Edge
from shared.server import BACKLOG
from shared.token import Claims, Unauthorized

PATH = b"/scores/live"
STREAM_PATH = b"/scores/live/sse"

SUBPROTOCOL = "scoreboard.v1"
"""Offered beside a token in ``Sec-WebSocket-Protocol`` so that there is something to agree on."""

TOKEN_SUBPROTOCOL = "bearer."  # noqa: S105 - a prefix

DEFLATE = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
"""The answer to whoever offers compression; both may be said unasked (RFC 7692, section 7.1.1)."""

VERSION = "13"
"""The only ``Sec-WebSocket-Version`` there is (RFC 6455)."""

KEY_BYTES = 16
"""Of a ``Sec-WebSocket-Key``, decoded."""

BAD_REQUEST = error_body("Bad request")
FORBIDDEN = error_body("Forbidden")
METHOD_NOT_ALLOWED = error_body("Method not allowed")
REQUEST_TIMEOUT = error_body("Request timeout")
UPGRADE_REQUIRED = error_body("Upgrade required")
TOO_MANY_CONNECTIONS = error_body("Too many connections")
HEAD_TOO_LARGE = error_body("Request header fields too large")
INTERNAL_ERROR = error_body("Internal server error")
VERSION_NOT_SUPPORTED = error_body("HTTP version not supported")

END_OF_HEAD = b"\r\n\r\n"

HEAD_BYTES_MAX = 16 * 1024
"""Of a request. Nginx passes on 9 KB a line; the longest token has 6."""

HANDSHAKE_TIMEOUT_S = 5.0

OPENINGS_MAX = 500
"""Connections that have not finished their request; one more ends the oldest of them. A request
takes a millisecond, so only those who never finish one pile up. See also ``FILES_RESERVED``."""

ACCEPTED_AT_ONCE = 256
"""Connections taken from the kernel before those already taken are served."""

RETRY_AFTER_S = (1, 5)
"""What a client is asked to wait where we are full, at random, so that not all come back at once."""

FRAME_BYTES_MAX = 1024
"""Of what is read of a frame, which bounds what a connection may make us keep. A client may send
nothing, but control frames hold up to 125 bytes. Whoever announces a frame up to this long and
never ends it has until the next pong is due."""

READ_BUFFER_BYTES = 2048
"""A WebSocket's, kept all its life: picows's least."""

log = structlog.get_logger()

_picows_log = logging.LoggerAdapter(logging.getLogger("picows"), {})
"""An adapter, because of a plain logger picows makes a child for every connection."""


class Refused(Exception):
    """The request ends with an HTTP answer.

    Attributes:
        status: Its status.
        body: Its JSON body.
        headers: Those beside the ones every answer has.
    """

    def __init__(
        self, status: HTTPStatus, body: bytes, headers: Mapping[str, str] | None = None
    ) -> None:
        self.status = status
        self.body = body
        self.headers = headers or {}


class Request:
    """The head of an HTTP request.

    Attributes:
        path: Without the query.
        query: Without its question mark.
    """

    def __init__(self, head: memoryview) -> None:
        """
        Raises:
            Refused: If it is none that could become a connection.
        """
        self._target = b""
        self._headers: dict[bytes, list[str]] = {}
        parser = httptools.HttpRequestParser(self)
        try:
            parser.feed_data(head)
        except httptools.HttpParserUpgrade:
            pass
        except httptools.HttpParserError:
            raise Refused(HTTPStatus.BAD_REQUEST, BAD_REQUEST) from None
        if parser.get_method() != b"GET":
            allowed = {"Allow": "GET"}
            raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, METHOD_NOT_ALLOWED, allowed)
        if parser.get_http_version() != "1.1":
            raise Refused(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, VERSION_NOT_SUPPORTED)
        if self.header("Transfer-Encoding") or (self.header("Content-Length") or "0") != "0":
            raise Refused(HTTPStatus.BAD_REQUEST, BAD_REQUEST)
        self.path, _, self.query = self._target.partition(b"?")

    def on_url(self, url: bytes) -> None:
        """Called by the parser."""
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        self._headers.setdefault(name.lower(), []).append(value.decode("latin-1").strip())

    def lines(self, header: str) -> list[str]:
        """Each line with this header."""
        return self._headers.get(header.lower().encode(), [])

    def header(self, header: str) -> str | None:
        """What its lines say together."""
        return ", ".join(self.lines(header)) or None

    def elements(self, header: str) -> Iterator[str]:
        """The elements of a header that is a list, however many lines it came in."""
        for line in self.lines(header):
            for element in line.split(","):
                yield element.strip()


def presented_token(request: Request) -> str:
    """
    The one token of a request, from wherever it may stand.

    Raises:
        Unauthorized: If there is none, or more than one: two could belong to two users.
    """
    try:
        parameters = parse_qsl(request.query.decode("ascii"), keep_blank_values=True)
    except ValueError:
        raise Unauthorized from None
    tokens = [value for name, value in parameters if name == "token"]
    for value in request.lines("Authorization"):
        scheme, _, credentials = value.partition(" ")
        if scheme.lower() == "bearer":
            tokens.append(credentials.strip())
    tokens += [
        offered.removeprefix(TOKEN_SUBPROTOCOL)
        for offered in request.elements("Sec-WebSocket-Protocol")
        if offered.startswith(TOKEN_SUBPROTOCOL)
    ]
    if len(tokens) != 1:
        raise Unauthorized
    return tokens[0]


def websocket_key(request: Request) -> str:
    """
    The key of a WebSocket's handshake.

    Raises:
        Refused: If the request is no such handshake.
    """
    connection = {option.lower() for option in request.elements("Connection")}
    upgrade = {protocol.lower() for protocol in request.elements("Upgrade")}
    key = request.header("Sec-WebSocket-Key") or ""
    try:
        decoded = b64decode(key, validate=True)
    except ValueError:
        decoded = b""
    if (
        "upgrade" not in connection
        or "websocket" not in upgrade
        or request.lines("Sec-WebSocket-Version") != [VERSION]
        or len(decoded) != KEY_BYTES
    ):
        wanted = {"Upgrade": "websocket", "Sec-WebSocket-Version": VERSION}
        raise Refused(HTTPStatus.UPGRADE_REQUIRED, UPGRADE_REQUIRED, wanted)
    return key


def offers_deflate(request: Request) -> bool:
    """Whether one of the offered extensions is a permessage-deflate that ours can answer."""
    for offer in request.elements("Sec-WebSocket-Extensions"):
        name, *parameters = (part.strip().lower() for part in offer.split(";"))
        # One that demands a smaller window than we compress with is not for us.
        if name == "permessage-deflate" and not any(
            parameter.startswith("server_max_window_bits") for parameter in parameters
        ):
            return True
    return False


@dataclass
class Door:
    """What a request is decided with.

    Attributes:
        compress: Whether those who offer compression get it.
        origins: Where a browser's page may come from, in lower case; none: from anywhere.
        openings: The connections that have not finished their request, the oldest first.
        received: Where all of them read to.
    """

    sockets: Clients
    deflated: Clients
    streams: Clients
    caps: Caps
    rate: AcceptRate
    edge: Edge
    origins: Collection[str]
    compress: bool
    verify: Callable[[str], Claims]

    def __post_init__(self) -> None:
        self.openings: dict[Opening, None] = {}
        self.received = memoryview(bytearray(HEAD_BYTES_MAX))

    async def open(self, listening: socket.socket) -> asyncio.Server:
        """Serve what comes in on a socket."""
        loop = asyncio.get_running_loop()
        server = await aiofastnet.create_server(
            loop, lambda: Opening(self), sock=listening, backlog=ACCEPTED_AT_ONCE
        )
        listening.listen(BACKLOG)
        return server

    @property
    def kinds(self) -> tuple[Clients, ...]:
        """All connections."""
        return self.sockets, self.deflated, self.streams

    @property
    def connections(self) -> int:
        """How many there are."""
        return sum(map(len, self.kinds))

    @property
    def full(self) -> bool:
        """Whether nobody can be shown a board now."""
        return (
            self.sockets.newest is None
            or self.sockets.draining
            or self.connections >= self.caps.total
            or not self.rate.has_room(self.sockets.now())
        )

    def admit(self, request: Request) -> Claims:
        """
        Who may connect, to either path.

        The order is by cost to us: a full gateway refuses before it spends a signature check on
        anyone, since what filled it is likely a storm of reconnects.

        Raises:
            Refused: If the request cannot become a connection.
        """
        if request.path not in (PATH, STREAM_PATH):
            raise Refused(HTTPStatus.NOT_FOUND, NOT_FOUND)
        if self.full:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, OVERLOADED, _later())
        if self.origins and any(
            origin.lower() not in self.origins for origin in request.lines("Origin")
        ):
            raise Refused(HTTPStatus.FORBIDDEN, FORBIDDEN)
        try:
            return self.verify(presented_token(request))
        except Unauthorized:
            challenge = {"WWW-Authenticate": CHALLENGE}
            raise Refused(HTTPStatus.UNAUTHORIZED, UNAUTHORIZED, challenge) from None


def _later() -> dict[str, str]:
    return {"Retry-After": str(random.randint(*RETRY_AFTER_S))}  # noqa: S311


class Opening(asyncio.BufferedProtocol):
    """A connection until its request is answered; then another protocol has it, or it ends.

    What it reads is overwritten once it is answered. Freed memory is handed out as it is: of 3,000
    clients' tokens 2,813 were left in what picows keeps a connection.
    """

    _transport: asyncio.Transport

    def __init__(self, door: Door) -> None:
        self._door = door
        self._head = bytearray()
        self._request_id = ""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        openings = self._door.openings
        if len(openings) >= OPENINGS_MAX:
            oldest = next(iter(openings))
            oldest._decided()
            oldest._transport.abort()
        openings[self] = None
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(
            HANDSHAKE_TIMEOUT_S, self._refuse, Refused(HTTPStatus.REQUEST_TIMEOUT, REQUEST_TIMEOUT)
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self._decided()

    def _decided(self) -> None:
        self._door.openings.pop(self, None)
        self._head[:] = bytes(len(self._head))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def get_buffer(self, sizehint: int) -> memoryview:
        # One for all: what is in it is read before another connection's turn comes.
        return self._door.received

    def buffer_updated(self, nbytes: int) -> None:
        received = self._door.received[:nbytes]
        if self._timer is not None:  # else it was refused, and goes on talking
            self._head += received
            self._read()
        received[:] = bytes(nbytes)

    def _read(self) -> None:
        end = self._head.find(END_OF_HEAD)
        if max(end, len(self._head) if end < 0 else 0) > HEAD_BYTES_MAX:
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            self._refuse(Refused(status, HEAD_TOO_LARGE))
        elif end >= 0:
            end += len(END_OF_HEAD)
            with memoryview(self._head) as head:
                self._answer(head[:end], bytes(head[end:]))

    def _answer(self, head: memoryview, rest: bytes) -> None:
        peer = str(self._transport.get_extra_info("peername")[0])
        edge = self._door.edge
        try:
            request = Request(head)
            self._request_id = edge.request_id(peer, request.header("X-Request-ID"))
            claims = self._door.admit(request)
            address = edge.client_address(peer, request.header("X-Real-IP"))
            if request.path == PATH:
                self._open_websocket(request, rest, claims, address)
            else:
                self._open_stream(request, claims, address)
        except Refused as refusal:
            self._refuse(refusal)
        except Exception:
            self._request_id = edge.request_id(peer, self._request_id)
            log.exception("handshake.failed", request_id=self._request_id)
            self._refuse(Refused(HTTPStatus.INTERNAL_SERVER_ERROR, INTERNAL_ERROR))

    def _open_websocket(self, request: Request, rest: bytes, claims: Claims, address: str) -> None:
        key = websocket_key(request)
        headers = {"X-Request-ID": self._request_id}
        if SUBPROTOCOL in request.elements("Sec-WebSocket-Protocol"):
            headers["Sec-WebSocket-Protocol"] = SUBPROTOCOL
        expires_at = _on_the_loop_s_clock(claims)
        if self._door.compress and offers_deflate(request):
            headers["Sec-WebSocket-Extensions"] = DEFLATE
            client: Client = DeflatedClient(
                self._door.deflated, claims.subject, address, expires_at
            )
        else:
            client = Client(self._door.sockets, claims.subject, address, expires_at)
        self._accept("websocket")
        response = WSUpgradeResponse.create_101_response(headers)
        protocol = _websocket(WSUpgradeResponseWithListener(response, client))
        protocol.connection_made(self._transport)
        self._transport.set_protocol(protocol)
        hand_on(
            b"GET / HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %b\r\n\r\n%b" % (key.encode(), rest),
            self._transport,
            protocol,
        )

    def _open_stream(self, request: Request, claims: Claims, address: str) -> None:
        streams = self._door.streams
        stream = EventStream(streams, claims.subject, address, _on_the_loop_s_clock(claims))
        if not streams.join(stream):
            streams.leave(stream)
            raise Refused(HTTPStatus.TOO_MANY_REQUESTS, TOO_MANY_CONNECTIONS, _later())
        self._accept("sse")
        headers = {
            "Content-Type": "text/event-stream",
            "Cache-Control": "no-store",
            # Nginx would wait for more to send on.
            "X-Accel-Buffering": "no",
            "Connection": "close",
            "X-Request-ID": self._request_id,
        }
        # Let in by `admit`. Without it a page of another origin could connect, but not read.
        if origin := request.header("Origin"):
            headers |= {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        self._transport.set_protocol(stream)
        stream.begin(self._transport, answer_head(HTTPStatus.OK, headers))

    def _accept(self, transport: str) -> None:
        self._decided()
        self._door.rate.take()
        metrics.HANDSHAKES.labels("accepted", transport).inc()

    def _refuse(self, refusal: Refused) -> None:
        self._decided()
        metrics.HANDSHAKES.labels(refusal.status.name.lower(), "none").inc()
        self._request_id = self._request_id or self._door.edge.request_id("", None)
        log.debug("handshake.refused", status=refusal.status.value, request_id=self._request_id)
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(refusal.body)),
            "Connection": "close",
            "X-Request-ID": self._request_id,
            **refusal.headers,
        }
        self._transport.write(answer_head(refusal.status, headers) + refusal.body)
        self._transport.close()


def hand_on(
    data: bytes, transport: asyncio.BaseTransport, protocol: asyncio.BufferedProtocol
) -> None:
    """Have a protocol receive what came before the transport was its own."""
    unread = memoryview(data)
    while unread and not transport.is_closing():
        buffer = memoryview(protocol.get_buffer(-1))
        taken = min(len(buffer), len(unread))
        buffer[:taken] = unread[:taken]
        protocol.buffer_updated(taken)
        unread = unread[taken:]


def _on_the_loop_s_clock(claims: Claims) -> float:
    """When the token expires, on the clock that nobody sets."""
    return asyncio.get_running_loop().time() + claims.expires_at - time.time()


def answer_head(status: HTTPStatus, headers: Mapping[str, str]) -> bytes:
    """The head of an HTTP answer."""
    lines = [f"HTTP/1.1 {status.value} {status.phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _websocket(answer: WSUpgradeResponseWithListener) -> WSProtocol:
    """picows's side of one connection, the way its own ``ws_create_server`` makes it."""
    return WSProtocol(
        None,  # host and port, of a client
        None,  # path, of a client
        False,  # is a client
        lambda _request: answer,
        _picows_log,
        True,  # disconnect on an exception
        None,  # timeout of the handshake: it is over
        # Our own pings are cheaper, and stop for a client that takes nothing.
        False,  # pings
        20,  # between pings
        20,  # for a pong
        WSAutoPingStrategy.PING_WHEN_IDLE,
        False,  # pongs
        FRAME_BYTES_MAX,
        None,  # headers, of a client
        READ_BUFFER_BYTES,
    )
