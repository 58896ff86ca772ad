"""A gateway of two is drained: how fast those come back whom it sends away."""

import asyncio
import resource
from collections import Counter
from pathlib import Path

import pytest

from tests.gateway.harness import (
    UPGRADE,
    Gateway,
    Scores,
    running_gateway,
    token,
)
from tests.valkey import Valkey

CLIENTS = 5_000

WINDOW_S = 10.0

PEAK_MAX = 1.3
"""Reconnects of the busiest second, in those of a second if they were evenly spread."""

CLOSE, TEXT, PING = 0x88, 0x81, 0x89


class Watcher:
    """A client that reads boards and, once it is sent away, goes to another gateway at once.

    Attributes:
        boards: How many it was shown, by all gateways.
        codes: How its connections were closed; 1006 without a word.
        left_at: When it was sent away, on the loop's clock.
        back: Its way to the other gateway.
        newest: The last message.
    """

    def __init__(self, number: int, elsewhere: Gateway) -> None:
        self.bearer = token(f"user-{number}")
        self._elsewhere = elsewhere
        self.connection: Connection | None = None
        self.boards = 0
        self.codes: list[int] = []
        self.left_at: float | None = None
        self.back: asyncio.Task[None] | None = None
        self.newest = b""

    async def connect(self, gateway: Gateway) -> None:
        """Connect; boards may come later."""
        loop = asyncio.get_running_loop()
        _, self.connection = await loop.create_connection(
            lambda: Connection(self), "127.0.0.1", gateway.port
        )

    def sent_away(self, code: int) -> None:
        """By a close frame, or by none."""
        self.codes.append(code)
        loop = asyncio.get_running_loop()
        self.left_at = loop.time()
        self.back = loop.create_task(self.connect(self._elsewhere))


class Connection(asyncio.Protocol):
    """One of a watcher's."""

    _transport: asyncio.Transport

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._unread = b""
        self._over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        lines = [f"GET /scores/live?token={self._watcher.bearer} HTTP/1.1", "Host: x"]
        lines += [f"{name}: {value}" for name, value in UPGRADE.items()]
        transport.write("\r\n".join([*lines, "", ""]).encode())

    def data_received(self, data: bytes) -> None:
        self._unread += data
        if self._unread.startswith(b"HTTP/1.1 101 "):
            _, end, rest = self._unread.partition(b"\r\n\r\n")
            self._unread = rest if end else self._unread
        while len(self._unread) >= 2 and self._unread[0] in (CLOSE, TEXT, PING):
            length, start = self._unread[1], 2
            if length == 126:
                length, start = int.from_bytes(self._unread[2:4], "big"), 4
            if len(self._unread) < start + length:
                break
            kind, payload = self._unread[0], self._unread[start : start + length]
            self._unread = self._unread[start + length :]
            if kind == TEXT:
                self._watcher.boards += 1
                self._watcher.newest = payload
            elif kind == PING:
                self._transport.write(b"\x8a\x80\0\0\0\0")
            else:
                self._transport.write(b"\x88\x82\0\0\0\0" + payload[:2])
                self._end(int.from_bytes(payload[:2], "big"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(1006)

    def _end(self, code: int) -> None:
        if not self._over:
            self._over = True
            self._watcher.sent_away(code)

    def leave(self) -> None:
        """End it for good."""
        self._over = True
        self._transport.abort()


@pytest.mark.chaos
@pytest.mark.timeout(180)
async def test_everyone_is_sent_away_evenly_and_served_elsewhere(
    valkey: Valkey, scores: Scores, tmp_path: Path
) -> None:
    """No connection ends without a word, no second has many more reconnects than the others."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    settings = {"DRAIN_SECONDS": str(WINDOW_S), "CONNECTIONS_PER_ADDRESS_MAX": "100000"}
    async with (
        running_gateway(valkey.url, tmp_path / "log-0", **settings) as drained,
        running_gateway(valkey.url, tmp_path / "log-1", **settings) as other,
    ):
        await drained.ready()
        await other.ready()
        watchers = [Watcher(number, other) for number in range(CLIENTS)]
        for number, watcher in enumerate(watchers, start=1):
            await watcher.connect(drained)
            if number % 500 == 0:
                await asyncio.sleep(0.6)  # within the rate of new connections
        assert all(watcher.boards for watcher in watchers)

        drained.signal()
        assert await drained.exit_status(WINDOW_S + 10) == 0
        await asyncio.gather(*(watcher.back for watcher in watchers if watcher.back))
        await scores.announce(77_777)
        await asyncio.sleep(1)

        assert Counter(code for watcher in watchers for code in watcher.codes) == {1012: CLIENTS}
        assert await other.metric("transport_connections", transport="websocket") == CLIENTS
        assert all(b"77777" in watcher.newest for watcher in watchers)
        left = sorted(watcher.left_at for watcher in watchers if watcher.left_at is not None)
        busiest = max(sum(1 for at in left if since <= at < since + 1) for since in left[::50])
        for watcher in watchers:
            if watcher.connection is not None:
                watcher.connection.leave()
        print(f"busiest second: {busiest}, even: {CLIENTS / WINDOW_S:.0f}")
        assert busiest <= PEAK_MAX * CLIENTS / WINDOW_S
