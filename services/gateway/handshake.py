"""What a client gets for its opening request: a connection, or a refusal that says why.

Decided before picows looks at the request any closer, because what picows answers on its own is
plain text that quotes the request and the error.
"""

import asyncio
import re
import time
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from urllib.parse import parse_qsl
from uuid import uuid4

import structlog
from picows import WSUpgradeRequest, WSUpgradeResponse, WSUpgradeResponseWithListener

from services.gateway import metrics
from services.gateway.clients import Client, Clients
from shared.answers import (
    CHALLENGE,
    NOT_FOUND,
    OVERLOADED,
    RETRY_AFTER_OVERLOADED_S,
    UNAUTHORIZED,
    error_body,
)
from shared.token import Claims, Unauthorized

PATH = b"/scores/live"

SUBPROTOCOL = "scoreboard.v1"
"""Offered beside a token in ``Sec-WebSocket-Protocol`` so that there is something to agree on."""

TOKEN_SUBPROTOCOL = "bearer."  # noqa: S105 - a prefix

VERSION = "13"
"""The only ``Sec-WebSocket-Version`` there is (RFC 6455)."""

KEY_BYTES = 16
"""Of a ``Sec-WebSocket-Key``, decoded."""

UPGRADE_REQUIRED = error_body("Upgrade required")
INTERNAL_ERROR = error_body("Internal server error")

_REQUEST_ID = re.compile(r"[0-9A-Za-z._-]{1,64}")

log = structlog.get_logger()


class Refused(Exception):
    """The handshake ends with an HTTP answer.

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


def decide(
    request: WSUpgradeRequest, *, accepting: bool, verify: Callable[[str], Claims]
) -> Claims:
    """
    Who may connect.

    The order is by cost to us: a full gateway refuses before it spends a signature check on
    anyone, since what filled it is likely a storm of reconnects.

    Raises:
        Refused: If the request cannot become a connection.
    """
    path, _, query = request.path.partition(b"?")
    if path != PATH:
        raise Refused(HTTPStatus.NOT_FOUND, NOT_FOUND)
    if not accepting:
        wait = {"Retry-After": str(RETRY_AFTER_OVERLOADED_S)}
        raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, OVERLOADED, wait)
    try:
        claims = verify(presented_token(query, request))
    except Unauthorized:
        challenge = {"WWW-Authenticate": CHALLENGE}
        raise Refused(HTTPStatus.UNAUTHORIZED, UNAUTHORIZED, challenge) from None
    _require_upgrade(request)
    return claims


def presented_token(query: bytes, request: WSUpgradeRequest) -> str:
    """
    The one token of a request, from wherever it may stand.

    Raises:
        Unauthorized: If there is none, or more than one: two could belong to two users.
    """
    try:
        parameters = parse_qsl(query.decode("ascii"), keep_blank_values=True)
    except ValueError:
        raise Unauthorized from None
    tokens = [value for name, value in parameters if name == "token"]
    for value in request.headers.getall("Authorization", ()):
        scheme, _, credentials = value.partition(" ")
        if scheme.lower() == "bearer":
            tokens.append(credentials.strip())
    tokens += [
        offered.removeprefix(TOKEN_SUBPROTOCOL)
        for offered in _elements(request, "Sec-WebSocket-Protocol")
        if offered.startswith(TOKEN_SUBPROTOCOL)
    ]
    if len(tokens) != 1:
        raise Unauthorized
    return tokens[0]


def _require_upgrade(request: WSUpgradeRequest) -> None:
    connection = {option.lower() for option in _elements(request, "Connection")}
    upgrade = {protocol.lower() for protocol in _elements(request, "Upgrade")}
    try:
        key = b64decode(request.headers.get("Sec-WebSocket-Key", ""), validate=True)
    except ValueError:
        key = b""
    if (
        "upgrade" not in connection
        or "websocket" not in upgrade
        or request.headers.getall("Sec-WebSocket-Version", ()) != [VERSION]
        or len(key) != KEY_BYTES
    ):
        wanted = {"Upgrade": "websocket", "Sec-WebSocket-Version": VERSION}
        raise Refused(HTTPStatus.UPGRADE_REQUIRED, UPGRADE_REQUIRED, wanted)


def _elements(request: WSUpgradeRequest, header: str) -> Iterator[str]:
    """The elements of a header that is a list, however many lines it came in."""
    for value in request.headers.getall(header, ()):
        for element in value.split(","):
            yield element.strip()


def request_id(request: WSUpgradeRequest) -> str:
    """Nginx's own for this request; a new one where there is no Nginx in front."""
    given = request.headers.get("X-Request-ID", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid4().hex


class Handshake:
    """What picows calls for every request."""

    def __init__(self, clients: Clients, verify: Callable[[str], Claims]) -> None:
        self._clients = clients
        self._verify = verify

    def __call__(self, request: WSUpgradeRequest) -> WSUpgradeResponseWithListener:
        """The answer, never an exception: picows would send its text to the client."""
        identity = {"X-Request-ID": request_id(request)}
        try:
            return self._accept(request, identity)
        except Refused as refusal:
            return _refuse(refusal, identity)
        except Exception:
            log.exception("handshake.failed", request_id=identity["X-Request-ID"])
            return _refuse(Refused(HTTPStatus.INTERNAL_SERVER_ERROR, INTERNAL_ERROR), identity)

    def _accept(
        self, request: WSUpgradeRequest, identity: dict[str, str]
    ) -> WSUpgradeResponseWithListener:
        claims = decide(request, accepting=self._clients.accepting, verify=self._verify)
        headers = identity.copy()
        if SUBPROTOCOL in _elements(request, "Sec-WebSocket-Protocol"):
            headers["Sec-WebSocket-Protocol"] = SUBPROTOCOL
        # picows compares the whole header with "upgrade": Firefox says "keep-alive, Upgrade".
        request.headers["Connection"] = "upgrade"
        request.headers["Upgrade"] = "websocket"
        # Deadlines run on the loop's clock, which nobody sets.
        expires_at = asyncio.get_running_loop().time() + claims.expires_at - time.time()
        metrics.HANDSHAKES.labels("accepted").inc()
        return WSUpgradeResponseWithListener(
            WSUpgradeResponse.create_101_response(headers),
            Client(self._clients, claims.subject, expires_at),
        )


def _refuse(refusal: Refused, identity: dict[str, str]) -> WSUpgradeResponseWithListener:
    metrics.HANDSHAKES.labels(refusal.status.name.lower()).inc()
    log.debug("handshake.refused", status=refusal.status.value, request_id=identity["X-Request-ID"])
    headers = {"Content-Type": "application/json", **identity, **refusal.headers}
    return WSUpgradeResponseWithListener(
        WSUpgradeResponse.create_error_response(refusal.status, refusal.body, headers), None
    )
