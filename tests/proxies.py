"""A TCP proxy that fails on purpose."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


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
            async with asyncio.TaskGroup() as directions:
                directions.create_task(_pump(reader, upstream[1], flowing))
                directions.create_task(_pump(upstream[0], writer, flowing))
        except (asyncio.CancelledError, ExceptionGroup):
            pass
        finally:
            self._connections.discard(task)
            for end in (writer, upstream[1]):
                end.transport.abort()


async def _pump(
    source: asyncio.StreamReader, sink: asyncio.StreamWriter, flowing: asyncio.Event
) -> None:
    while data := await source.read(65536):
        await flowing.wait()
        sink.write(data)
        await sink.drain()
    raise ConnectionResetError


@asynccontextmanager
async def proxy_to(port: int) -> AsyncIterator[Proxy]:
    """A proxy in front of a port of this machine."""
    proxy = Proxy(port)
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
