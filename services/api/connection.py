"""A connection of an API replica: one request after the other, each answered by the same task.

The two endpoints are reached from uvicorn's parser, and their answers leave in one piece. What
uvicorn does for any application (a task, an event, a scope and a check of each header for every
request) took 45 of an update's 123 µs; every other path still goes its way, to Starlette.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote_to_bytes

import httptools
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from services.api.exchange import Answer, Endpoint, Exchange, answer, measure
from shared.edge import Edge

BODY_BYTES_MAX = 4096
"""The longest honest body is a user id of 255 characters, at most 12 bytes each as an escape."""


class Connection(HttpToolsProtocol):
    """
    uvicorn's protocol, with a shorter way to the endpoints.

    A request that comes before the one ahead of it is answered (pipelining) is not begun: the
    connection ends with that answer, which says so.
    """

    def __init__(self, endpoints: Mapping[bytes, Endpoint], edge: Edge, **uvicorn_s: Any) -> None:
        """
        Args:
            endpoints: By path.
            uvicorn_s: What uvicorn gives every protocol.
        """
        super().__init__(**uvicorn_s)
        self._endpoints = endpoints
        self._edge = edge
        # Of the request that is coming: headers as they were when its head was complete, since what
        # follows a body (trailers) must not pass for them.
        self._endpoint: Endpoint | None = None
        self._fields: Mapping[bytes, bytes] = {}
        self._body = b""
        # The exchange under way, and what the task waits for while there is none.
        self._exchange: Exchange | None = None
        self._arrival: asyncio.Future[None] | None = None
        self._is_last = False
        self._is_deaf = False
        self._rested_at = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.client is None:  # It has gone before it was accepted.
            transport.abort()
            return
        task = self.loop.create_task(self._serve())
        # uvicorn waits for these when it ends.
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.timeout_keep_alive_task is not None:  # It would keep all of it in memory.
            self.timeout_keep_alive_task.cancel()
        self._is_last = True
        self._wake()

    def shutdown(self) -> None:
        if self._exchange is None and self._endpoint is None:
            super().shutdown()
        else:
            self._is_last = True

    # One timer for all rests of a connection, where uvicorn makes and cancels one for each.

    def _unset_keepalive_if_required(self) -> None:
        """It goes on, and looks whether there was anything meanwhile."""

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        self._rested_at = self.loop.time()
        self.flow.resume_reading()
        if self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self._look_again(self.timeout_keep_alive)

    def timeout_keep_alive_handler(self) -> None:
        left = self._rested_at + self.timeout_keep_alive - self.loop.time()
        if self._is_busy():
            self._look_again(self.timeout_keep_alive)
        elif left > 0:
            self._look_again(left)
        else:
            super().timeout_keep_alive_handler()

    def _look_again(self, in_s: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(in_s, self.timeout_keep_alive_handler)

    def send_400_response(self, msg: str) -> None:
        if self._is_busy():  # What is under way gets its own answer, as the last.
            self._be_deaf()
        else:
            super().send_400_response(msg)

    # Called by the parser.

    def on_message_begin(self) -> None:
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._rested_at = self.loop.time()
        self._endpoint = None
        self._body = b""
        if self._is_busy():
            self._be_deaf()

    def on_headers_complete(self) -> None:
        if self._is_deaf:
            return
        path = self.url.partition(b"?")[0]
        endpoint = self._endpoints.get(path) or self._endpoints.get(_path(self.url))
        if endpoint is None:
            url, headers, expects = self.url, self.headers, self.expect_100_continue
            super().on_message_begin()
            self.url, self.expect_100_continue = url, expects
            self.headers += headers
            super().on_headers_complete()
            return
        self._endpoint, self._fields = endpoint, dict(reversed(self.headers))
        if self.expect_100_continue and self.parser.get_http_version() != "1.0":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        if self._is_deaf:
            return
        if self._endpoint is None:
            super().on_body(body)
        elif len(self._body) + len(body) <= BODY_BYTES_MAX:
            self._body += body
        else:  # What more comes of it is not read.
            self._begin(self._endpoint, None)
            self._be_deaf()

    def on_message_complete(self) -> None:
        if self._is_deaf:
            return
        if self._endpoint is None:
            super().on_message_complete()
        else:
            self._begin(self._endpoint, self._body)

    def _is_busy(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return self._exchange is not None or (cycle is not None and not cycle.response_complete)

    def _begin(self, endpoint: Endpoint, body: bytes | None) -> None:
        assert self.client is not None  # noqa: S101 - else there is no task that could answer
        self._exchange = Exchange(
            self.parser.get_method(), endpoint, self._fields, body, self.client[0], self._edge,
        )  # fmt: skip
        # A token is kept no longer than used.
        self._endpoint, self._fields, self.headers = None, {}, []
        if not self.parser.should_keep_alive() or self.parser.get_http_version() == "1.0":
            self._is_last = True
        self._wake()

    def _be_deaf(self) -> None:
        """Read nothing more; whatever is under way is the last."""
        self._is_deaf = self._is_last = True
        if self.cycle is not None:
            self.cycle.keep_alive = False
        self.flow.pause_reading()

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    async def _serve(self) -> None:
        """Answer what comes, until the connection ends or is to end."""
        while True:
            if self._exchange is None:
                if self._is_last:
                    return
                self._arrival = self.loop.create_future()
                await self._arrival
                continue
            exchange, started = self._exchange, time.perf_counter()
            try:
                done = await answer(exchange)
            except asyncio.CancelledError:  # The replica's time to end is over.
                self.transport.abort()
                raise
            if not self.transport.is_closing():
                self._write(exchange, done)
            measure(exchange, done.status, time.perf_counter() - started)
            self._exchange = None
            if self._is_last:
                self.transport.close()
            elif self.flow.write_paused:  # It asks, and takes no answers.
                await self.flow.drain()

    def _write(self, exchange: Exchange, done: Answer) -> None:
        extra = b"".join(b"%b: %b\r\n" % header for header in done.headers) if done.headers else b""
        if self._is_last:
            extra += b"connection: close\r\n"
        head = b"%bx-request-id: %b\r\n%b%b" % (
            STATUS_LINE[done.status], exchange.request_id.encode(), exchange.quota_headers, extra,
        )  # fmt: skip
        if done.status == 304:
            self.transport.write(head + b"\r\n")
        else:
            body = b"" if exchange.method == b"HEAD" else done.body
            self.transport.write(
                b"%bcontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
                % (head, len(done.body), body)
            )
        self.on_response_complete()


def _path(url: bytes) -> bytes:
    """Of a target in any form, decoded."""
    return unquote_to_bytes(httptools.parse_url(url).path or b"")
