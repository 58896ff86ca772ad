"""The public port of the one process: what Nginx sees to in a cluster."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from services.basic.bound import UNDER_WAY_MAX
from services.basic.front import CONNECTIONS_MAX, RECEIVE_S, SEND_S
from tests.cluster import Basic, eventually
from tests.faults import freeze

ANSWER_S_MAX = 10.0


class Connection:
    """Bytes to the port, and answers from it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, *pieces: bytes) -> None:
        """As they are."""
        self._writer.write(b"".join(pieces))

    async def answer(self) -> tuple[int, bytes]:
        """Status and body of the next answer."""
        async with asyncio.timeout(ANSWER_S_MAX):
            head = await self._reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            body = await self._reader.readexactly(int(length[1]) if length else 0)
        return int(head.split()[1]), body

    async def is_over(self) -> bool:
        """Whether the server has ended the connection."""
        try:
            async with asyncio.timeout(0.5):
                return await self._reader.read(1) == b""
        except TimeoutError:
            return False
        except ConnectionResetError:
            return True

    async def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        async with asyncio.timeout(ANSWER_S_MAX):
            return await self._reader.read()


@asynccontextmanager
async def connected(basic: Basic) -> AsyncIterator[Connection]:
    """A connection to the port."""
    reader, writer = await asyncio.open_connection("127.0.0.1", basic.port)
    try:
        yield Connection(reader, writer)
    finally:
        writer.transport.abort()


def update(basic: Basic, user: str, *headers: str) -> bytes:
    """The bytes of an increment by 1."""
    body = json.dumps({"userId": user, "scoreIncrement": 1})
    lines = [
        "POST /api/scores/update HTTP/1.1", "Host: board", "Content-Type: application/json",
        f"Authorization: Bearer {basic.token(user)}", f"Content-Length: {len(body)}", *headers,
    ]  # fmt: skip
    return "\r\n".join((*lines, "", body)).encode()


def score(answer: tuple[int, bytes]) -> int:
    """What an answer to an increment says."""
    status, body = answer
    assert status == 200, body
    return int(json.loads(body)["newScore"])


@pytest.mark.parametrize(
    "offer",
    [
        pytest.param(("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AA"), id="h2c"),
        pytest.param(("Connection: Upgrade", "Upgrade: websocket"), id="websocket"),
    ],
)  # fmt: skip
async def test_an_offer_of_another_protocol_is_ignored(
    basic: Basic, user: str, offer: tuple[str, ...]
) -> None:
    """And nothing of the request is lost; the connection goes on."""
    async with connected(basic) as connection:
        for number in (1, 2):
            connection.send(update(basic, user, *offer))
            assert score(await connection.answer()) == number


async def test_a_connection_may_ask_for_the_board_after_something_else(
    basic: Basic, user: str
) -> None:
    """For events, and for a WebSocket as well."""
    token = basic.token(user)
    async with connected(basic) as connection:
        connection.send(update(basic, user))
        assert score(await connection.answer()) == 1
        connection.send(f"GET /scores/live/sse?token={token} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        assert (await connection.answer())[0] == 200
        async with asyncio.timeout(ANSWER_S_MAX):
            assert b"retry: " in await connection._reader.readline()
    async with connected(basic) as connection:
        connection.send(update(basic, user))
        assert score(await connection.answer()) == 2
        connection.send(
            f"GET /scores/live?token={token} HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\n"
            "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        assert (await connection.answer())[0] == 101


async def test_a_request_that_comes_too_early_is_not_begun(basic: Basic, user: str) -> None:
    """Whatever it is: the connection ends with the answer to the one before it."""
    token = basic.token(user)
    live = f"GET /scores/live/sse?token={token} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
    for number, early in enumerate((update(basic, user), b"what?\r\n\r\n", live), start=1):
        async with connected(basic) as connection:
            connection.send(update(basic, user), early)
            assert score(await connection.answer()) == number
            assert await connection.rest() == b""


async def test_a_body_without_an_end_is_refused(basic: Basic, user: str) -> None:
    """Whether it says how long it is or not."""
    for length in ("Content-Length: 4097", "Transfer-Encoding: chunked"):
        async with connected(basic) as connection:
            head = f"POST /api/scores/update HTTP/1.1\r\nHost: board\r\n{length}\r\n\r\n"
            connection.send(head.encode(), b"1001\r\n", b"x" * 4097, b"\r\n")
            assert (await connection.answer())[0] == 413
            assert await connection.rest() == b""


async def test_a_head_without_an_end_is_refused(basic: Basic) -> None:
    """As it would be if it had one."""
    for begin, status in ((b"GET /", 414), (b"GET / HTTP/1.1\r\nHost: a\r\nX: ", 431)):
        async with connected(basic) as connection:
            connection.send(begin)
            for _ in range(40):
                connection.send(b"x" * 1024)
                await asyncio.sleep(0.005)
            assert (await connection.answer())[0] == status


async def test_a_client_that_does_not_get_on_is_not_waited_for(basic: Basic, user: str) -> None:
    """Neither for a first byte, nor for the rest of a head or of a body."""
    whole = update(basic, user)
    began = asyncio.get_running_loop().time()

    async def seconds_until_the_end(begin: bytes) -> float:
        async with connected(basic) as connection:
            connection.send(begin)
            assert await connection.rest() == b""
        return asyncio.get_running_loop().time() - began

    took = await asyncio.gather(*map(seconds_until_the_end, (b"", whole[:40], whole[:-3])))
    assert all(RECEIVE_S - 0.5 < seconds < RECEIVE_S + 3 for seconds in took), took


async def test_connections_that_only_wait_make_room(basic: Basic, user: str) -> None:
    """There may be so many; who comes then is served, and somebody who is idle has to go."""
    async with AsyncExitStack() as stack:
        crowd = [
            await stack.enter_async_context(connected(basic)) for _ in range(CONNECTIONS_MAX + 20)
        ]
        crowd[-1].send(update(basic, user))
        assert score(await crowd[-1].answer()) == 1
        gone = await asyncio.gather(*(one.is_over() for one in crowd))

    assert 20 <= sum(gone) <= 40


def open_files(pid: int) -> int:
    """How many a process has."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.mark.chaos
async def test_a_client_that_takes_no_answer_is_not_kept(basic: Basic) -> None:
    """It goes on asking and reads nothing: in the end the answers have no place to wait."""
    pid = basic.process("basic")["pid"]
    with socket.create_connection(("127.0.0.1", basic.port)) as client:
        await asyncio.sleep(0.5)  # until it is accepted
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connected = open_files(pid)
        for _ in range(20):
            client.sendall(b"GET /board.js HTTP/1.1\r\nHost: a\r\n\r\n")
            await asyncio.sleep(0.05)
        await eventually(
            lambda: open_files(pid) < connected,
            within_s=SEND_S + 3,
            what="the connection has ended",
        )


async def test_what_is_too_much_is_refused_at_once(basic: Basic, user: str) -> None:
    """While PostgreSQL answers nothing, as many requests wait as may; the others do not."""
    heal = freeze(basic, "postgres-0")
    try:
        statuses = await asyncio.gather(
            *(_status(basic, f"{user}-{number}") for number in range(UNDER_WAY_MAX + 50))
        )
    finally:
        heal()
    assert statuses.count(503) >= 50
    assert set(statuses) <= {500, 503}
    await eventually(lambda: _served(basic, user), what="served again")


async def _status(basic: Basic, user: str) -> int:
    async with connected(basic) as connection:
        connection.send(update(basic, user))
        return (await connection.answer())[0]


async def _served(basic: Basic, user: str) -> bool:
    return await _status(basic, user) == 200


async def test_no_token_reaches_a_log(basic: Basic) -> None:
    """Whatever is wrong with the request that has it."""
    for head in (
        b"GET /scores/live?token=canary-of-a-token HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /%00?token=canary-of-a-token HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /api/scores/top?token=canary-of-a-token HTTP/3.7\r\n\r\n",
        b"GET /api/nothing?token=canary-of-a-token HTTP/1.1\r\nHost: a\r\n\r\n",
    ):
        async with connected(basic) as connection:
            connection.send(head)
            assert (await connection.answer())[0] >= 400

    assert [name for name, text in basic.logs().items() if "canary-of-a-token" in text] == []


async def test_a_page_that_has_not_changed_is_not_sent_again(basic: Basic) -> None:
    """A browser asks, and is told so."""
    async with basic.client() as client:
        first = await client.request("GET", "/live.js")
        again = await client.request(
            "GET", "/live.js", headers={"If-None-Match": first.headers["ETag"]}
        )

    assert (first.status, again.status, again.body) == (200, 304, b"")
    assert again.headers["Content-Security-Policy"] == first.headers["Content-Security-Policy"]
