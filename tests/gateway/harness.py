"""A gateway and a Valkey as processes, and what it takes to talk to them."""

import asyncio
import itertools
import json
import os
import re
import signal
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from redis.asyncio import Redis
from websockets.asyncio.client import ClientConnection, connect

from shared.leaderboard import BOARD_KEY, CHANNEL
from shared.token import mint
from tests.cluster import eventually, free_port
from tests.openapi import check_close, check_live_message

SECRET = "a-secret-that-only-these-tests-use"

REQUEST_TIMEOUT_S = 5.0

START_S_MAX = 15.0

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
"""RFC 6455's own example of a handshake's key."""

UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": KEY,
}


def token(user: str = "ana", ttl_s: float = 3600) -> str:
    """A valid token."""
    return mint(SECRET, user, ttl_s)


class Scores:
    """Writes and announces boards the way the leaderboard script does, but on command."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self._versions = itertools.count(1)
        self._epoch = int(time.time() * 1e6)

    def board(self, score: int, *, user: str = "ana", epoch: int | None = None) -> str:
        """The next board: one user with one score."""
        rows = [{"userId": user, "score": score, "rank": 1}]
        position = {"epoch": epoch or self._epoch, "version": next(self._versions)}
        return json.dumps({**position, "topScores": rows})

    def later(self) -> None:
        """Go on in an epoch after the one the leaderboard script has begun meanwhile."""
        self._epoch = int(time.time() * 1e6)

    async def keep(self, board: str) -> None:
        """Store the board without a word."""
        await self.redis.hset(BOARD_KEY, "message", board)

    async def announce(self, score: int, *, user: str = "ana") -> None:
        """Store and publish the next board."""
        board = self.board(score, user=user)
        await self.keep(board)
        await self.redis.publish(CHANNEL, board)

    async def publish(self, board: str) -> None:
        """Publish a board that is stored nowhere."""
        await self.redis.publish(CHANNEL, board)


@dataclass
class Answer:
    """An HTTP answer; header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class Gateway:
    """A gateway process."""

    def __init__(
        self,
        redis_url: str,
        log: Path,
        settings: Mapping[str, str],
        module: Sequence[str] = ("services.gateway",),
    ) -> None:
        self.port = free_port()
        self.operations_port = free_port()
        self._log = log
        self._module = module
        self._environment = {
            "PATH": os.environ["PATH"],
            "PORT": str(self.port),
            "OPERATIONS_PORT": str(self.operations_port),
            "REDIS_URL": redis_url,
            "JWT_SECRET": SECRET,
            "LOG_LEVEL": "debug",
            **settings,
        }
        self.process: asyncio.subprocess.Process

    async def start(self) -> None:
        """Start; returns when it listens."""
        with self._log.open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", *self._module), env=self._environment, stdout=log
            )

        async def listens() -> bool:
            try:
                return (await self.operations("/livez")).status == 200
            except OSError:
                return False

        await eventually(listens, within_s=START_S_MAX, what="the gateway listens")

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    async def exit_status(self, within_s: float = REQUEST_TIMEOUT_S) -> int:
        """Wait for the end."""
        async with asyncio.timeout(within_s):
            return await self.process.wait()

    @property
    def log(self) -> str:
        """All it has said."""
        return self._log.read_text()

    def connect(self, bearer: str | None = None) -> connect:
        """A client; its token is in the query."""
        bearer = token() if bearer is None else bearer
        return connect(f"ws://127.0.0.1:{self.port}/scores/live?token={bearer}", compression=None)

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        """Ask the clients' port."""
        return await ask(self.port, path, headers or {})

    async def operations(self, path: str, method: str = "GET") -> Answer:
        """Ask the operations port."""
        return await ask(self.operations_port, path, {"Connection": "close"}, method)

    def stream(
        self, bearer: str | None = None, headers: Mapping[str, str] | None = None
    ) -> "AbstractAsyncContextManager[EventStream]":
        """An event stream; its token is in a header."""
        authorization = {"Authorization": f"Bearer {token() if bearer is None else bearer}"}
        return stream(self.port, authorization | dict(headers or {}))

    async def metric(self, name: str, **labels: str) -> float:
        """The value of ``scoreboard_gateway_<name>``; 0 where there is none yet."""
        text = (await self.operations("/metrics")).body.decode()
        inside = ",".join(f'{label}="{value}"' for label, value in labels.items())
        series = f"scoreboard_gateway_{name}" + (f"{{{inside}}}" if inside else "")
        found = re.search(rf"^{re.escape(series)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    async def ready(self) -> None:
        """Wait until it can serve."""

        async def is_ready() -> bool:
            return (await self.operations("/readyz")).status == 200

        await eventually(is_ready, within_s=START_S_MAX, what="the gateway is ready")

    async def counts_with_others(self) -> None:
        """Wait until it has its share of the caps in Redis."""

        async def is_shared() -> bool:
            return await self.metric("caps_shared") == 1

        await eventually(is_shared, within_s=START_S_MAX, what="the caps are shared")


@asynccontextmanager
async def running_gateway(
    redis_url: str, log: Path, *, module: Sequence[str] = ("services.gateway",), **settings: str
) -> AsyncIterator[Gateway]:
    """A gateway for as long as the block."""
    gateway = Gateway(redis_url, log, settings, module)
    try:
        await gateway.start()
        yield gateway
    finally:
        if gateway.process.returncode is None:
            gateway.signal(signal.SIGKILL)
            await gateway.process.wait()


async def ask(port: int, path: str, headers: Mapping[str, str], method: str = "GET") -> Answer:
    """One request on its own connection."""
    async with asyncio.timeout(REQUEST_TIMEOUT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            lines = [f"{method} {path} HTTP/1.1", "Host: gateway"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            writer.write("\r\n".join([*lines, "", ""]).encode())
            return await read_answer(reader)
        finally:
            writer.close()


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """An answer, with its body if it says how long that is."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    fields = dict(line.split(": ", 1) for line in head[1:] if line)
    headers = {name.lower(): value for name, value in fields.items()}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Answer(int(head[0].split()[1]), headers, body)


@dataclass
class Event:
    """A server-sent event."""

    id: str
    data: str

    @property
    def position(self) -> tuple[int, ...]:
        """Epoch and version."""
        return tuple(map(int, self.id.split("-")))


class EventStream:
    """A client of the event stream, which reads it as the standard says.

    Attributes:
        answer: What the gateway answered; only 200 begins a stream.
        retry_ms: What it was last told to wait before it reconnects.
        comments: How many it was sent.
    """

    def __init__(self, answer: Answer, reader: asyncio.StreamReader) -> None:
        self.answer = answer
        self._reader = reader
        self.retry_ms: int | None = None
        self.comments = 0

    async def event(self, within_s: float = REQUEST_TIMEOUT_S) -> Event:
        """The next event. Raises EOFError where the stream has ended."""
        fields: dict[str, str] = {}
        async with asyncio.timeout(within_s):
            while line := (await self._reader.readuntil(b"\n")).decode():
                name, _, value = line.rstrip("\n").partition(": ")
                if line == "\n" and "data" in fields:
                    return Event(fields["id"], fields["data"])
                if line.startswith(":"):
                    self.comments += 1
                elif name == "retry":
                    self.retry_ms = int(value)
                else:
                    fields[name] = value
        raise EOFError

    async def score(self, within_s: float = REQUEST_TIMEOUT_S) -> int:
        """The score on the next board, which has one row."""
        return score_of((await self.event(within_s)).data)

    async def ends_within(self, seconds: float) -> bool:
        """Whether the gateway ends the stream in that time."""
        try:
            async with asyncio.timeout(seconds):
                await self.ended()
        except TimeoutError:
            return False
        return True

    async def ended(self) -> None:
        """Wait until the gateway has ended the stream, whatever it sends before."""
        with suppress(EOFError):
            while True:
                await self.event()


@asynccontextmanager
async def stream(port: int, headers: Mapping[str, str]) -> AsyncIterator[EventStream]:
    """Ask for an event stream."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = ["GET /scores/live/sse HTTP/1.1", "Host: gateway", "Accept: text/event-stream"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            answer = await read_answer(reader)
        yield EventStream(answer, reader)
    finally:
        writer.close()


def score_of(message: str | bytes) -> int:
    """The score on a board of one row, and that the message is as described."""
    text = message if isinstance(message, str) else message.decode()
    check_live_message(text)
    (row,) = json.loads(text)["topScores"]
    score: int = row["score"]
    return score


async def next_score(client: ClientConnection, within_s: float = REQUEST_TIMEOUT_S) -> int:
    """The score of the next board."""
    async with asyncio.timeout(within_s):
        return score_of(await client.recv())


async def closed(client: ClientConnection) -> tuple[int, str]:
    """Wait for the gateway to close the connection; code and reason, as described, or 1006."""
    async with asyncio.timeout(REQUEST_TIMEOUT_S):
        await client.wait_closed()
    assert client.close_code is not None
    reason = client.close_reason or ""
    if client.close_code != 1006:
        check_close(client.close_code, reason)
    return client.close_code, reason


class RawClient:
    """A client that sends whatever bytes it likes, and reads only when told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, port: int, receive_bytes: int | None = None) -> Self:
        """Connect and say nothing; ``receive_bytes`` sizes the kernel's buffer."""
        sock = socket.socket()
        if receive_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        return cls(*await asyncio.open_connection(sock=sock, limit=1024))

    @classmethod
    async def connect(
        cls, port: int, receive_bytes: int | None = None, bearer: str | None = None
    ) -> Self:
        """Complete a handshake."""
        client = await cls.open(port, receive_bytes)
        lines = [f"GET /scores/live?token={bearer or token()} HTTP/1.1", "Host: gateway"]
        lines += [f"{name}: {value}" for name, value in UPGRADE.items()]
        client.writer.write("\r\n".join([*lines, "", ""]).encode())
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        return client

    def send(self, first_byte: int, payload: bytes = b"", *, masked: bool = True) -> None:
        """Send one frame; the mask is zero."""
        mask = b"\0\0\0\0" if masked else b""
        bit = 0x80 if masked else 0
        if len(payload) < 126:
            length = bytes([bit | len(payload)])
        else:
            length = bytes([bit | 126]) + struct.pack("!H", len(payload))
        self.writer.write(bytes([first_byte]) + length + mask + payload)

    async def frame(self) -> tuple[int, bytes]:
        """The next frame: opcode and payload."""
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            first, length = await self.reader.readexactly(2)
            assert first & 0x80, "the gateway sends no fragments"
            if length == 126:
                (length,) = struct.unpack("!H", await self.reader.readexactly(2))
            return first & 0x0F, await self.reader.readexactly(length)

    async def close_code(self) -> int:
        """Skip to the close frame; its code."""
        while True:
            opcode, payload = await self.frame()
            if opcode == 0x8:
                return int.from_bytes(payload[:2], "big")

    async def ended(self) -> None:
        """Wait until the gateway has closed the connection."""
        with suppress(ConnectionResetError):
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                assert await self.reader.read() == b""
        self.writer.close()
