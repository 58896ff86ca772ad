"""TCP proxies that fail on purpose."""

import asyncio
import random
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar
from urllib.parse import urlsplit

End = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Proxy:
    """Relays to one address until told to stop relaying.

    Attributes:
        port: Where it listens, on 127.0.0.1.
    """

    def __init__(self, upstream_port: int) -> None:
        self._upstream_port = upstream_port
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._connections: set[asyncio.Task[None]] = set()
        self.port = 0

    def freeze(self) -> None:
        """Connections that exist stay open and carry nothing any more; new ones work."""
        self._flowing.clear()
        self._flowing = asyncio.Event()
        self._flowing.set()

    def cut(self) -> None:
        """Connections that exist end."""
        for connection in self._connections:
            connection.cancel()

    def aim(self, upstream_port: int) -> None:
        """Connections that come now are relayed there; those that exist end."""
        self._upstream_port = upstream_port
        self.cut()

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        flowing = self._flowing
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            upstream = await asyncio.open_connection("127.0.0.1", self._upstream_port)
        except OSError:
            writer.close()
            return
        try:
            await self._exchange((reader, writer), upstream, flowing)
        except (asyncio.CancelledError, ExceptionGroup, EOFError, OSError):
            pass
        finally:
            self._connections.discard(task)
            for end in (writer, upstream[1]):
                end.transport.abort()

    async def _exchange(self, client: End, server: End, flowing: asyncio.Event) -> None:
        """Carry both directions until one of them ends."""
        async with asyncio.TaskGroup() as directions:
            directions.create_task(_pump(client[0], server[1], flowing))
            directions.create_task(_pump(server[0], client[1], flowing))


async def _pump(
    source: asyncio.StreamReader, sink: asyncio.StreamWriter, flowing: asyncio.Event
) -> None:
    while data := await source.read(65536):
        await flowing.wait()
        sink.write(data)
        await sink.drain()
    raise ConnectionResetError


class Fate(Enum):
    """What becomes of a connection at a commit."""

    PASS = "goes on"
    CUT_BEFORE = "ends before the server is told to commit"
    CUT_AFTER = "ends after the server has committed, before the client hears of it"


@dataclass
class _Session:
    """What a proxy knows of one connection to PostgreSQL.

    Attributes:
        counting: Names of the prepared statements whose commits are cut.
        commits: Whether the next Sync commits such a statement.
        in_transaction: Whether the server said so last; a Sync then commits nothing.
        counted: Whether the transaction has run such a statement.
        deaf: Whether the client hears nothing any more.
    """

    counting: set[bytes] = field(default_factory=set)
    commits: bool = False
    in_transaction: bool = False
    counted: bool = False
    deaf: bool = False


class CommitCutter(Proxy):
    """Relays to PostgreSQL, and ends a share of the connections at the commit of one statement.

    It follows the messages of the protocol (PostgreSQL documentation, chapter 54): a prepared
    statement that commits by itself with the Sync after it, or a COMMIT.

    Attributes:
        share: Of the commits, how many are cut, half of them before and half after.
        fates: What became of each commit, in order.
    """

    def __init__(self, upstream_port: int, *, statement: str, share: float, seed: int) -> None:
        """
        Args:
            statement: What is part of the statements whose commits are cut.
            share: Of those commits.
            seed: Of the choice; the same number of commits has the same fates.
        """
        super().__init__(upstream_port)
        self._statement = statement.encode()
        self.share = share
        self._random = random.Random(seed)
        self.fates: list[Fate] = []

    def _fate(self) -> Fate:
        chance = self._random.random()
        fate = (
            Fate.CUT_BEFORE
            if chance < self.share / 2
            else Fate.CUT_AFTER
            if chance < self.share
            else Fate.PASS
        )
        self.fates.append(fate)
        return fate

    async def _exchange(self, client: End, server: End, flowing: asyncio.Event) -> None:
        del flowing
        await _start_up(client, server)
        session = _Session()
        async with asyncio.TaskGroup() as directions:
            directions.create_task(self._statements(client[0], server[1], session))
            directions.create_task(self._answers(server[0], client[1], session))

    async def _statements(
        self, client: asyncio.StreamReader, server: asyncio.StreamWriter, session: _Session
    ) -> None:
        while True:
            kind, message = await _receive(client)
            body = message[5:]
            commits = False
            match kind:
                case b"P":  # Parse: a name and a statement.
                    name, statement, _ = body.split(b"\0", 2)
                    (session.counting.add if self._statement in statement else
                     session.counting.discard)(name)  # fmt: skip
                case b"B":  # Bind: of a portal and a statement.
                    if body.split(b"\0", 2)[1] in session.counting:
                        session.commits, session.counted = not session.in_transaction, True
                case b"S":
                    commits, session.commits = session.commits, False
                case b"Q":
                    commits = body.startswith(b"COMMIT") and session.counted
                    session.counted = False
            if commits:
                fate = self._fate()
                if fate is Fate.CUT_BEFORE:
                    raise ConnectionResetError
                session.deaf = fate is Fate.CUT_AFTER
            server.write(message)
            await server.drain()

    async def _answers(
        self, server: asyncio.StreamReader, client: asyncio.StreamWriter, session: _Session
    ) -> None:
        while True:
            kind, message = await _receive(server)
            if kind == b"Z":  # ReadyForQuery: what was to be committed is.
                session.in_transaction = message[5:] != b"I"
                if session.deaf:
                    raise ConnectionResetError
            if not session.deaf:
                client.write(message)
                await client.drain()


_SSL_REQUEST = 80877103


async def _start_up(client: End, server: End) -> None:
    """The only messages without a type: an offer of encryption, and the start."""
    while True:
        length, code = struct.unpack("!II", head := await client[0].readexactly(8))
        server[1].write(head + await client[0].readexactly(length - 8))
        if code != _SSL_REQUEST:
            return
        client[1].write(await server[0].readexactly(1))


async def _receive(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """One message: its type, and all of it."""
    head = await reader.readexactly(5)
    return head[:1], head + await reader.readexactly(struct.unpack("!I", head[1:])[0] - 4)


@asynccontextmanager
async def proxy_to(port: int) -> AsyncIterator[Proxy]:
    """A proxy in front of a port of this machine."""
    async with listening(Proxy(port)) as proxy:
        yield proxy


P = TypeVar("P", bound=Proxy)


@asynccontextmanager
async def listening(proxy: P) -> AsyncIterator[P]:
    """The proxy, at work."""
    server = await asyncio.start_server(proxy.relay, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        proxy.cut()
        with suppress(TimeoutError):
            async with asyncio.timeout(2):
                await server.wait_closed()


def through(url: str, port: int) -> str:
    """The same database, reached through another port of this machine."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.replace(f":{parts.port}", f":{port}")).geturl()


@asynccontextmanager
async def cutting(
    shard_urls: Sequence[str], *, share: float, seed: int
) -> AsyncIterator[tuple[list[str], list[CommitCutter]]]:
    """The shards, each through a proxy that cuts a share of the commits of increments."""
    async with AsyncExitStack() as stack:
        cutters = []
        for shard, url in enumerate(shard_urls):
            cutter = CommitCutter(
                urlsplit(url).port or 0,
                statement="INSERT INTO score_ops",
                share=share,
                seed=seed + shard,
            )
            cutters.append(await stack.enter_async_context(listening(cutter)))
        urls = [through(url, cutter.port) for url, cutter in zip(shard_urls, cutters, strict=True)]
        yield urls, cutters


class UnreliableChannel(Proxy):
    """Relays to Redis, and loses, doubles or holds back half of what it publishes.

    Everything else passes: answers, and the confirmations of subscriptions and pings.

    Attributes:
        lost, doubled, late: How many messages met that fate.
        at_work: Whether it does so.
    """

    def __init__(self, upstream_port: int, *, seed: int) -> None:
        super().__init__(upstream_port)
        self._random = random.Random(seed)
        self.lost = self.doubled = self.late = 0
        self.at_work = True

    async def _exchange(self, client: End, server: End, flowing: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as directions:
            directions.create_task(_pump(client[0], server[1], flowing))
            directions.create_task(self._answers(server[0], client[1]))

    async def _answers(self, server: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        held = b""
        while True:
            reply = await _redis_reply(server)
            published = reply.split(b"\r\n", 3)[2:3] == [b"message"]
            if not published or not self.at_work:
                client.write(reply)
                continue
            match self._random.randrange(6):
                case 0:
                    self.lost += 1
                case 1:
                    self.doubled += 1
                    client.write(reply + reply)
                case 2 if not held:
                    self.late += 1
                    held = reply
                    continue
                case _:
                    client.write(reply)
            client.write(held)
            held = b""


async def _redis_reply(reader: asyncio.StreamReader) -> bytes:
    """One reply of either protocol of Redis, as it came."""
    line = await reader.readuntil(b"\r\n")
    kind, length = line[:1], line[1:-2]
    if kind in b"$=!" and length != b"-1":
        return line + await reader.readexactly(int(length) + 2)
    parts = {b"*": 1, b">": 1, b"~": 1, b"%": 2}.get(kind, 0) * int(
        length if kind in b"*>~%" else 0
    )
    return line + b"".join([await _redis_reply(reader) for _ in range(parts)])
