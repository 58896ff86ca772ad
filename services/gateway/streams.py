"""The board as server-sent events, for clients that cannot use WebSockets.

Everything said in ``clients.py`` holds here: one string of bytes for all, no queue, no task, and
newest wins. What differs is the protocol: a client cannot answer, and reconnects by itself.
"""

import asyncio
import random
import socket

from services.gateway import metrics
from services.gateway.clients import CLOSE_TIMEOUT_S, PING_EVERY_S, STALL_MAX_S, Clients, Close

HEARTBEAT = b":\n\n"
"""A comment: it keeps proxies from dropping what is silent, and finds the dead."""

RETRY_S = (1.0, 3.0)
"""What a client waits before it reconnects, at random, so that a restart brings no crowd."""

UNACKNOWLEDGED_MAX_MS = 30_000
"""A client that vanished without a word answers no ping; its kernel acknowledges nothing."""


def event(position: tuple[int, int], message: bytes) -> bytes:
    """A board as an event: its epoch and version as ``id``, the WebSocket's message as ``data``."""
    return b"id: %d-%d\ndata: %b\n\n" % (*position, message)


class EventStream(asyncio.Protocol):
    """One connection.

    Attributes:
        subject: The user.
        address: The client's.
        counted: Whether it counts against the caps.
        expires_at: When the token expires, on the loop's clock.
        file: The number of its open file.
        shown: The board it had when it was last passed over.
        paused_at: Since when the client takes nothing; None while it does.
        slot: The wheel's.
    """

    __slots__ = (
        "_clients",
        "_ended",
        "_heartbeat_at",
        "_transport",
        "address",
        "counted",
        "expires_at",
        "file",
        "paused_at",
        "shown",
        "slot",
        "subject",
    )

    _transport: asyncio.Transport

    def __init__(self, clients: Clients, subject: str, address: str, expires_at: float) -> None:
        self._clients = clients
        self.subject = subject
        self.address = address
        self.counted = False
        self.expires_at = expires_at
        self.file = -1
        self.shown: bytes | None = None
        self.paused_at: float | None = None
        self.slot = 0
        self._ended = False
        self._heartbeat_at = 0.0

    def begin(self, transport: asyncio.Transport, head: bytes) -> None:
        """Answer the request, which was let in, and send the board."""
        self._transport = transport
        sock: socket.socket = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MAX_MS)
        transport.write(head + _retry())
        # As a WebSocket's: at most one board waits here.
        transport.set_write_buffer_limits(high=0, low=0)
        self._heartbeat_at = self._clients.now() + random.uniform(0.5, 1) * PING_EVERY_S  # noqa: S311
        self.file = sock.fileno()
        self._clients.wheel.put(self, self._due())
        self._clients.serve(self)

    def data_received(self, data: bytes) -> None:
        """A client has nothing to say after its request."""
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self._clients.leave(self)

    def pause_writing(self) -> None:
        self.paused_at = self._clients.now()
        self._clients.stalled += 1
        self._clients.pass_over(self)
        if not self._ended:
            self._clients.wheel.put(self, self._due())

    def resume_writing(self) -> None:
        self.paused_at = None
        self._clients.stalled -= 1
        if not self._ended:
            self._clients.serve(self)

    def send(self, data: bytes) -> None:
        """Have the transport send it."""
        self._transport.write(data)

    def refuse(self) -> None:
        """Its user or its address has too many."""
        self.close(Close.TOO_MANY_CONNECTIONS, "too many connections")

    def close(self, code: Close, reason: str) -> None:
        """End the stream; when to come back is all that a client can be told."""
        if self._ended:
            return
        self._ended = True
        self._clients.pass_over(self)
        metrics.CLOSES.labels(int(code)).inc()
        if self.paused_at is None:
            self._transport.write(b": %b\n%b" % (reason.encode(), _retry()))
        self._transport.close()
        self._clients.wheel.put(self, self._clients.now() + CLOSE_TIMEOUT_S)

    def check(self, now: float) -> None:
        """Do what is due by now."""
        if self._ended:
            self._transport.abort()
        elif now >= self.expires_at:
            self.close(Close.TOKEN_EXPIRED, "token expired")
        elif self.paused_at is not None and now >= self.paused_at + STALL_MAX_S:
            self.close(Close.STALLED, "stalled")
        else:
            if self.paused_at is None and now >= self._heartbeat_at:
                self._heartbeat_at = now + PING_EVERY_S
                self._transport.write(HEARTBEAT)
            self._clients.wheel.put(self, self._due())

    def _due(self) -> float:
        at = self._heartbeat_at if self.paused_at is None else self.paused_at + STALL_MAX_S
        return min(at, self.expires_at)


def _retry() -> bytes:
    return b"retry: %d\n\n" % int(random.uniform(*RETRY_S) * 1000)  # noqa: S311
