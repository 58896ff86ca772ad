"""A connection of an API replica, by its bytes: uvicorn's server, our way to the endpoints."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
from starlette.responses import PlainTextResponse

from services.api.connection import BODY_BYTES_MAX, Connection
from services.api.exchange import Answer, Endpoint, Exchange
from shared.edge import Edge
from shared.server import HttpServer, listen

REQUESTS = 200

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def echo(exchange: Exchange) -> Answer:
    """Answers with the body, after a turn of the loop or the seconds asked for; or with a header."""
    await asyncio.sleep(float(exchange.header(b"x-rest", "0")))
    if wanted := exchange.header(b"x-echo"):
        return Answer(200, wanted.encode())
    return Answer(200, b"too long" if exchange.body is None else exchange.body)


@asynccontextmanager
async def serving(keep_alive_s: int = 75) -> AsyncIterator[tuple[HttpServer, Streams]]:
    """A server with an endpoint, and an application for the rest; and a client of it."""
    endpoints = {b"/echo": Endpoint("/echo", (b"GET", b"HEAD", b"POST"), echo)}
    door = listen("PORT", "127.0.0.1", 0)
    server = HttpServer(
        PlainTextResponse("the rest"),
        grace_s=1,
        protocol=partial(Connection, endpoints, Edge([])),
        keep_alive_s=keep_alive_s,
    )
    running = asyncio.create_task(server.serve([door]))
    reader, writer = await asyncio.open_connection(*door.getsockname())
    try:
        yield server, (reader, writer)
    finally:
        writer.close()
        server.should_exit = True
        await running


def post(body: bytes, *headers: str, path: str = "/echo", version: str = "1.1") -> bytes:
    """A request."""
    lines = [f"POST {path} HTTP/{version}", "Host: here", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def test_an_answer_leaves_in_one_piece() -> None:
    """Or else a process that is killed leaves half of one with Nginx."""
    async with serving() as (_, (reader, writer)):
        for _ in range(REQUESTS):
            writer.write(post(b"whole"))
            answer = await reader.read(65536)
            assert answer.endswith(b"\r\n\r\nwhole"), answer


async def test_a_request_may_come_in_pieces() -> None:
    """Byte by byte, chunked, or only once it is asked to go on."""
    async with serving() as (_, (reader, writer)):
        for byte in post(b"bytes"):
            writer.write(bytes([byte]))
            await writer.drain()
        assert (await reader.readuntil(b"bytes")).startswith(b"HTTP/1.1 200 ")
        writer.write(b"POST /echo HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"3\r\nchu\r\n3\r\nnks\r\n0\r\n\r\n")
        assert (await reader.readuntil(b"chunks")).startswith(b"HTTP/1.1 200 ")
        writer.write(b"POST /echo HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"5\r\nbody!\r\n0\r\nX-Echo: trailer\r\n\r\n")
        assert (await reader.readuntil(b"body!")).startswith(b"HTTP/1.1 200 ")
        head, body = post(b"asked", "Expect: 100-continue").split(b"\r\n\r\n")
        writer.write(head + b"\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await reader.readuntil(b"asked")).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("path", ["/echo", "/else"])
async def test_a_connection_that_rests_for_long_ends(path: str) -> None:
    """The last answer counts, and no request under way is cut off; one answer begins the count."""
    now = asyncio.get_running_loop().time
    async with serving(keep_alive_s=1) as (server, (reader, writer)):
        for _ in range(3):
            writer.write(post(b"rest", path=path))
            assert (await reader.readuntil(b"rest")).startswith(b"HTTP/1.1 200 ")
            await asyncio.sleep(0.6)
        writer.write(post(b"long", "X-Rest: 1.3"))
        assert (await reader.readuntil(b"long")).startswith(b"HTTP/1.1 200 ")
        answered = now()
        assert await reader.read() == b""
        assert 0.9 < now() - answered < 1.5
        assert server.server_state.connections == set()


@pytest.mark.parametrize(
    ("request_", "end"),
    [
        pytest.param(post(b"1", "Connection: close"), b"\r\n\r\n1", id="asked to"),
        pytest.param(
            post(b"1", "Connection: keep-alive", version="1.0"), b"\r\n\r\n1", id="HTTP/1.0"
        ),
        pytest.param(post(b"x" * (BODY_BYTES_MAX + 1)), b"\r\n\r\ntoo long", id="long body"),
        pytest.param(post(b"1") + post(b"2"), b"\r\n\r\n1", id="pipelined"),
        pytest.param(post(b"1") + b"\x01garbage", b"\r\n\r\n1", id="garbage behind it"),
        pytest.param(post(b"1") + post(b"", path="/"), b"\r\n\r\n1", id="the rest behind it"),
        pytest.param(post(b"", path="/") + post(b"2"), b"\r\n\r\nthe rest", id="behind the rest"),
    ],
)
async def test_a_connection_that_ends_says_so(request_: bytes, end: bytes) -> None:
    """One answer, which is whole; what was sent behind it was not done."""
    async with serving() as (_, (reader, writer)):
        writer.write(request_)
        answers = await asyncio.wait_for(reader.read(), 5)
        assert b"\r\nconnection: close\r\n" in answers
        assert answers.count(b"HTTP/1.1 ") == 1
        assert answers.endswith(end)


async def test_the_longest_body_is_taken() -> None:
    """And the connection goes on, also to what is no endpoint's and back."""
    async with serving() as (_, (reader, writer)):
        longest = b"x" * (BODY_BYTES_MAX - 1) + b"!"
        for path, end in (
            ("/echo", b"!"),
            ("/", b"the rest"),
            ("/%65cho", b"!"),
            ("http://here/echo?x#y", b"!"),
        ):
            writer.write(post(longest, path=path))
            assert (await reader.readuntil(end)).startswith(b"HTTP/1.1 200 ")
        writer.write(b"HEAD /echo HTTP/1.1\r\nHost: here\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).endswith(b"content-length: 0\r\n\r\n")


async def test_the_end_waits_for_a_request_that_is_coming() -> None:
    """And for no connection that is idle."""
    async with serving() as (server, (reader, writer)):
        writer.write(post(b"idle"))
        await reader.readuntil(b"idle")
        head, body = post(b"late").split(b"\r\n\r\n")
        writer.write(head + b"\r\n\r\n")
        await asyncio.sleep(0.1)
        server.should_exit = True
        await asyncio.sleep(0.2)  # uvicorn looks ten times a second.
        writer.write(body)
        answer = await asyncio.wait_for(reader.read(), 5)
        assert b"\r\nconnection: close\r\n" in answer
        assert answer.endswith(b"late")
