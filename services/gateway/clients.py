"""All connections: who is shown what, and who is closed when and why.

A broadcast is one ``send`` a client, and everything else here exists to keep it that way. The frame
is built once and its bytes are shared. There is no queue of boards, only two sets of clients: those
who have the newest board and those who wait for it. One who cannot take it is in neither, and is
shown the newest board once it can be, never an older one after it. A queue a client would hold
boards nobody wants to see any more, and would need a limit and a second way to fall behind.

Nothing here waits for a client. The socket is written to as long as the kernel takes the bytes;
when it stops, the transport keeps the rest of that one frame and says so (``pause_writing``).

A pass touches nothing of a client: memory that nobody looked at since the pass before is not in the
cache. So the frame is written straight to the file, by its number, past picows and the transport,
which have nothing of the client's in hand unless it is paused.
"""

import asyncio
import os
import random
import zlib
from contextlib import suppress
from enum import IntEnum
from itertools import islice
from typing import Protocol, cast

from picows import WSCloseCode, WSFrame, WSListener, WSMsgType, WSTransport

from services.gateway import metrics
from services.gateway.caps import Caps, Counted
from services.gateway.wheel import TICK_S, Timed, Wheel

PING_EVERY_S = 20.0
"""Between pings, and how long a pong may take. Proxies drop what is silent for 60 s."""

STALL_MAX_S = 10.0
"""How long a client may take nothing. Behind Nginx that is noticed only when Nginx's buffers are
full (250 boards with `sndbuf=32k` on its `listen`, 5,500 without), so it has been away for much
longer, and reconnecting shows it the newest board at once."""

CLOSE_TIMEOUT_S = 3.0
"""How long a client may take to answer a close before it is cut off."""

CONTROL_FRAMES_PER_S = 10
"""Pings and pongs a client may send; a well-behaved one sends one in some seconds."""

SLICE = 500
"""Clients served before others get the loop: about 3 ms of sending."""

DRAIN_PER_S_MIN = 100
"""Closes a second that no remaining gateway notices, so a smaller one need not take the window."""

DRAIN_STEP_S = 0.1

DRAIN_LATE_MAX = 1.25
"""Times the window, on a machine too busy to keep the pace; whoever is left then is closed at once."""

REST, REST_S_MAX = 3.0, 0.1
"""After a pass the gateway rests for so many times as long as it took, up to so many seconds. Whoever
is behind us has the same boards to carry, Nginx and the clients, often on the same processors: with
less rest boards grew old in Nginx's buffers."""

TEXT, COMPRESSED = 0x81, 0x40
"""First byte of a frame that is a whole text message, and the bit of compression in it."""

SHORT_BYTES_MAX = 125
"""Of a payload whose length stands in the second byte; a longer one's stands in two more."""


class Close(IntEnum):
    """Why the gateway ends a connection; the contract tells clients what to do about each."""

    NORMAL = 1000
    PROTOCOL_ERROR = 1002
    RECEIVE_ONLY = 1008
    RESTART = 1012
    STALLED = 1013
    TOKEN_EXPIRED = 4401
    TOO_MANY_CONNECTIONS = 4429


RECEIVE_ONLY = "receive-only"
"""What is said with the code, to whoever has to mend the client."""

CLOSE_CODES_RECEIVABLE = frozenset({*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)})
"""What a peer may send: the rest is reserved, or not for the wire (RFC 6455, section 7.4)."""


class Shown(Counted, Timed, Protocol):
    """A connection of either kind, as :class:`Clients` needs it.

    Attributes:
        file: The number of its open file.
        shown: The board it had when it was last passed over.
        paused_at: Since when it takes nothing; None while it does.
    """

    file: int
    shown: bytes | None
    paused_at: float | None

    def send(self, data: bytes) -> None:
        """Have the transport send it; whatever the kernel does not take pauses the client."""

    def check(self, now: float) -> None:
        """Do what is due by now."""

    def close(self, code: Close, reason: str) -> None:
        """End it, and say why."""


class Client(WSListener):
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
        "_close_by",
        "_control_frames",
        "_control_second",
        "_heard",
        "_ping_at",
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

    _transport: WSTransport

    def __init__(self, clients: "Clients", subject: str, address: str, expires_at: float) -> None:
        self._clients = clients
        self.subject = subject
        self.address = address
        self.counted = False
        self.expires_at = expires_at
        self.file = -1
        self.shown: bytes | None = None
        self.paused_at: float | None = None
        self.slot = 0
        self._close_by: float | None = None
        self._heard = True
        self._ping_at = 0.0
        self._control_frames = 0
        self._control_second = 0

    def on_ws_connected(self, transport: WSTransport) -> None:
        self._transport = transport
        # picows keeps what the handshake said as long as the connection; nobody reads it again.
        transport.request.headers.clear()
        transport.response.headers.clear()
        # Tell of the first byte the kernel does not take, and again when it has taken the last:
        # then at most one board waits here.
        transport.underlying_transport.set_write_buffer_limits(high=0, low=0)
        self.file = transport.underlying_transport.get_extra_info("socket").fileno()
        now = self._clients.now()
        # Clients that came together, after a restart, are not pinged together.
        self._ping_at = now + random.uniform(0.5, 1.0) * PING_EVERY_S  # noqa: S311
        if self._clients.join(self):
            self._clients.wheel.put(self, self._due())
            self._clients.serve(self)
        else:
            self.refuse()

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        ended = transport.close_handshake.sent if transport.is_close_frame_sent else None
        if ended is not None and self._close_by is None:
            # picows itself ended it, over a frame it could not accept.
            metrics.CLOSES.labels(cast("int", ended.code)).inc()
        self._close_by = self._clients.now()  # The file is closed next, and may be another's then.
        self._clients.leave(self)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        control = frame.msg_type in (WSMsgType.PING, WSMsgType.PONG, WSMsgType.CLOSE)
        metrics.FRAMES_RECEIVED.labels("control" if control else "data").inc()
        if frame.msg_type == WSMsgType.CLOSE:
            self._closed_by_client(frame.get_payload_as_bytes()[:2])
        elif self._close_by is not None:
            return
        elif frame.rsv1 or frame.rsv2 or frame.rsv3 or frame.msg_type == WSMsgType.CONTINUATION:
            self.close(Close.PROTOCOL_ERROR, "protocol error")
        elif frame.msg_type in (WSMsgType.PING, WSMsgType.PONG):
            self._control_frame(frame)
        else:
            self.close(Close.RECEIVE_ONLY, RECEIVE_ONLY)

    def _closed_by_client(self, payload: bytes) -> None:
        if self._close_by is None:
            code = int.from_bytes(payload, "big") if payload else Close.NORMAL
            valid = code in CLOSE_CODES_RECEIVABLE
            self._send_close(code if valid else Close.PROTOCOL_ERROR, "")
        self._transport.disconnect()

    def _control_frame(self, frame: WSFrame) -> None:
        second = int(self._clients.now())
        if second != self._control_second:
            self._control_second, self._control_frames = second, 0
        self._control_frames += 1
        if self._control_frames > CONTROL_FRAMES_PER_S:
            self.close(Close.RECEIVE_ONLY, "too many pings")
            return
        if frame.msg_type == WSMsgType.PONG and not self._heard:
            metrics.PONG_SECONDS.observe(self._clients.now() - self._ping_at + PING_EVERY_S)
        self._heard = True
        # A client that takes nothing would make us keep its pongs.
        if frame.msg_type == WSMsgType.PING and self.paused_at is None:
            self._transport.send_pong(frame.get_payload_as_bytes())

    def pause_writing(self) -> None:
        self.paused_at = self._clients.now()
        self._clients.stalled += 1
        self._clients.pass_over(self)
        if self._close_by is None:
            self._clients.wheel.put(self, self._due())

    def resume_writing(self) -> None:
        self.paused_at = None
        self._clients.stalled -= 1
        self._heard = True  # taking what was sent is as good as a pong
        if self._close_by is None:
            self._clients.serve(self)

    def send(self, data: bytes) -> None:
        """Have the transport send it."""
        self._transport.underlying_transport.write(data)

    def refuse(self) -> None:
        """Its user or its address has too many."""
        self.close(Close.TOO_MANY_CONNECTIONS, "too many connections")

    def close(self, code: Close, reason: str) -> None:
        """Start the closing handshake; the client has ``CLOSE_TIMEOUT_S`` to finish it."""
        if self._close_by is None:
            metrics.CLOSES.labels(int(code)).inc()
            self._send_close(code, reason)

    def _send_close(self, code: int, reason: str) -> None:
        self._clients.pass_over(self)
        self._close_by = self._clients.now() + CLOSE_TIMEOUT_S
        # picows takes any number here; its type names the registered ones only.
        self._transport.send_close(cast("WSCloseCode", int(code)), reason)
        self._clients.wheel.put(self, self._close_by)

    def check(self, now: float) -> None:
        """Do what is due by now."""
        if self._close_by is not None:
            self._transport.disconnect(graceful=False)
        elif now >= self.expires_at:
            self.close(Close.TOKEN_EXPIRED, "token expired")
        elif self.paused_at is not None and now >= self.paused_at + STALL_MAX_S:
            self.close(Close.STALLED, "stalled")
        elif self.paused_at is None and now >= self._ping_at and not self._heard:
            self.close(Close.STALLED, "no pong")
        else:
            if self.paused_at is None and now >= self._ping_at:
                self._heard = False
                self._ping_at = now + PING_EVERY_S
                self._transport.send_ping()
            self._clients.wheel.put(self, self._due())

    def _due(self) -> float:
        at = self._ping_at if self.paused_at is None else self.paused_at + STALL_MAX_S
        return min(at, self.expires_at)


class DeflatedClient(Client):
    """One connection with permessage-deflate (RFC 7692).

    Neither side keeps a context from message to message, so one compressed board does for all, and
    a connection costs nothing more.
    """

    __slots__ = ()

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        data = frame.msg_type in (WSMsgType.TEXT, WSMsgType.BINARY)
        if data and frame.rsv1 and self._close_by is None:
            self.close(Close.RECEIVE_ONLY, RECEIVE_ONLY)
        else:
            super().on_ws_frame(transport, frame)


class Clients:
    """The connections of one kind in this process: WebSockets, deflated ones, or event streams.

    Attributes:
        newest: The newest board, byte for byte as all of them are sent it; None before the first.
        wheel: When to look at whom again.
        stalled: How many take nothing at the moment.
        draining: Set when the process is to end.
    """

    def __init__(self, caps: Caps, transport: str) -> None:
        """
        Args:
            transport: What metrics call the kind.
        """
        self._caps = caps
        self._pass_seconds = metrics.PASS_SECONDS.labels(transport)
        metrics.CONNECTIONS_OF.labels(transport).set_function(self.__len__)
        self.now = asyncio.get_running_loop().time
        self.wheel: Wheel[Shown] = Wheel(self.now())
        self.newest: bytes | None = None
        self.stalled = 0
        self.draining = False
        self._open: dict[Shown, None] = {}
        # By the number of their files, in the order in which they came, which is about the order of
        # what the kernel has of them.
        self._waiting: dict[int, Shown] = {}
        self._served: dict[int, Shown] = {}
        self._newer = asyncio.Event()
        self._left = asyncio.Event()

    def __len__(self) -> int:
        return len(self._open)

    def join(self, client: Shown) -> bool:
        """Take the client in; False when there are too many, and it must be closed."""
        self._open[client] = None
        return self._caps.join(client)

    def leave(self, client: Shown) -> None:
        """Forget the client."""
        self._open.pop(client, None)
        self.pass_over(client)
        self._caps.leave(client)
        if client.paused_at is not None:
            self.stalled -= 1
        self.wheel.drop(client)
        self._left.set()

    def serve(self, client: Shown) -> None:
        """Show the client the newest board, unless it has it, and from now on every newer one."""
        self._served[client.file] = client
        if self.newest is not None and client.shown is not self.newest:
            metrics.FRAMES_SENT.inc()
            client.send(self.newest)

    def pass_over(self, client: Shown) -> None:
        """Show the client nothing more: it can take nothing, or is about to go."""
        if self._served.get(client.file) is client:
            del self._served[client.file]
            client.shown = self.newest
        elif self._waiting.get(client.file) is client:
            del self._waiting[client.file]
            client.shown = None

    def publish(self, newest: bytes) -> None:
        """Show this to everyone, soon. Only ever called with a newer board."""
        self.newest = newest
        # Who waits already has waited for longest.
        self._waiting |= self._served
        self._served = {}
        self._newer.set()

    async def broadcast(self) -> None:
        """Serve the publications, in slices, so that a handshake never waits for a whole pass.

        A board that comes during a pass is what the rest of the pass shows; who had the one before
        waits for the next.
        """
        while True:
            await self._newer.wait()
            begun, left = self.now(), len(self._waiting)
            while self._waiting and left > 0:
                left -= self._show_some()
                await asyncio.sleep(0)
            if not self._waiting:
                self._newer.clear()
            metrics.FRAMES_SKIPPED.inc(self.stalled)
            seconds = self.now() - begun
            self._pass_seconds.observe(seconds)
            await asyncio.sleep(min(REST * seconds, REST_S_MAX))

    def _show_some(self) -> int:
        """Show the newest board to the next of those who wait; returns to how many."""
        newest = self.newest
        assert newest is not None  # noqa: S101 - nobody waits for none
        length, write = len(newest), os.write
        files = list(islice(self._waiting, SLICE))
        short = []
        for file in files:
            try:
                sent = write(file, newest)
            except OSError:
                sent = 0  # The kernel takes nothing, or the client is gone: the transport will see.
            if sent != length:
                short.append((file, sent))
        waiting, served = self._waiting, self._served
        for file in files:
            served[file] = waiting.pop(file)
        for file, sent in short:
            served[file].send(newest[sent:])
        metrics.FRAMES_SENT.inc(len(files))
        return len(files)

    async def keep_time(self) -> None:
        """Turn the wheel."""
        while True:
            await asyncio.sleep(TICK_S - self.now() % TICK_S)
            for seen, client in enumerate(self.wheel.due(self.now())):
                client.check(self.now())
                if seen % SLICE == SLICE - 1:
                    await asyncio.sleep(0)

    async def drain(self, window_s: float) -> None:
        """Close everyone, evenly over ``window_s`` seconds; returns when they have gone.

        They all reconnect, so the closes are paced for the gateways that remain. The steps
        jitter, or gateways that restart together would beat together.
        """
        self.draining = True
        clients = list(self._open)
        random.shuffle(clients)
        window_s = min(window_s, len(clients) / DRAIN_PER_S_MIN)
        start = self.now()
        closed = 0
        due = 0.0
        while closed < len(clients):
            step_s = random.uniform(0.5, 1.5) * DRAIN_STEP_S  # noqa: S311
            # As much as a step's, however late it comes: to catch up would be a crowd.
            due += len(clients) * step_s / max(window_s, step_s)
            late = self.now() - start >= DRAIN_LATE_MAX * window_s
            until = len(clients) if late else min(int(due), len(clients))
            for client in clients[closed:until]:
                if client in self._open:
                    client.close(Close.RESTART, "restart")
            closed = until
            if closed < len(clients):
                await asyncio.sleep(step_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S + 2 * TICK_S):
                while self._open:
                    self._left.clear()
                    await self._left.wait()


def frame(message: bytes, *, compressed: bool = False) -> bytes:
    """
    The message as a whole WebSocket frame of a server (RFC 6455, section 5.2).

    Args:
        message: At most 65,535 bytes; the largest board has a quarter of that.
        compressed: Whether it is what :func:`deflated` made.
    """
    first = TEXT | COMPRESSED if compressed else TEXT
    if len(message) <= SHORT_BYTES_MAX:
        return bytes([first, len(message)]) + message
    return bytes([first, SHORT_BYTES_MAX + 1]) + len(message).to_bytes(2, "big") + message


def deflated(message: bytes) -> bytes:
    """The message as permessage-deflate has it, with no context (RFC 7692, section 7.2.1)."""
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    data = deflate.compress(message) + deflate.flush(zlib.Z_SYNC_FLUSH)
    return data.removesuffix(b"\x00\x00\xff\xff")
