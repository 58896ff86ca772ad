"""The board as server-sent events: the same rules as for WebSockets."""

import asyncio
import time
from pathlib import Path

import pytest

from services.gateway import clients, streams
from tests.cluster import eventually
from tests.gateway.harness import (
    Gateway,
    RawClient,
    Scores,
    running_gateway,
    score_of,
    stream,
    token,
)
from tests.gateway.test_live import impatient
from tests.openapi import check_refusal
from tests.valkey import Valkey

STREAM = "/scores/live/sse"


async def test_the_board_comes_at_once_and_then_each_newer_one(
    gateway: Gateway, scores: Scores
) -> None:
    """With its position as id and the WebSocket's message as data."""
    await scores.announce(40)
    async with gateway.stream() as client:
        assert client.answer.status == 200
        assert client.answer.headers["content-type"] == "text/event-stream"
        assert client.answer.headers["cache-control"] == "no-store"
        while score_of((first := await client.event()).data) != 40:
            pass
        assert client.retry_ms is not None
        assert 1000 <= client.retry_ms <= 3000
        await scores.announce(41)
        second = await client.event()
        async with gateway.connect() as websocket:
            assert await websocket.recv() == second.data
        assert first.position < second.position


@pytest.mark.parametrize(
    ("query", "headers", "status"),
    [
        pytest.param("?token={}", {}, 200, id="query"),
        pytest.param("", {"Authorization": "Bearer {}"}, 200, id="header"),
        pytest.param("", {}, 401, id="none"),
        pytest.param("?token={}", {"Authorization": "Bearer {}"}, 401, id="two"),
        pytest.param("?token=a.b.c", {}, 401, id="no token"),
    ],
)
async def test_the_token_s_rules_are_the_same(
    gateway: Gateway, query: str, headers: dict[str, str], status: int
) -> None:
    """Exactly one, valid."""
    good = token()
    given = {name: value.format(good) for name, value in headers.items()}

    answer = await gateway.get(STREAM + query.format(good), given)

    assert answer.status == status
    if status != 200:
        check_refusal(answer.status, answer.headers, answer.body)


async def test_an_older_board_is_never_shown(gateway: Gateway, scores: Scores) -> None:
    """Whatever order the channel has."""
    async with gateway.stream() as client:
        older, newer = scores.board(50), scores.board(51)
        await scores.publish(newer)
        while await client.score() != 51:
            pass
        await scores.publish(older)
        await scores.announce(52)
        assert await client.score() == 52


async def test_a_client_that_does_not_read_skips_boards(gateway: Gateway, scores: Scores) -> None:
    """It gets the newest when it does, and nobody waits for it."""
    boards = 200
    slow = await RawClient.open(gateway.port, receive_bytes=4096)
    slow.writer.write(f"GET {STREAM}?token={token()} HTTP/1.1\r\nHost: gateway\r\n\r\n".encode())
    async with gateway.stream() as fast:
        await fast.event()
        for score in range(100, 100 + boards):
            await scores.announce(score, user="u" * 255)
            assert await fast.score() == score
    assert await gateway.metric("stalled_clients") == 1

    shown: list[int] = []
    async with asyncio.timeout(5):
        while not shown or shown[-1] != 99 + boards:
            line = await slow.reader.readuntil(b"\n")
            if line.startswith(b"data: "):
                shown.append(score_of(line[6:]))
    assert shown == sorted(set(shown))
    assert len(shown) < boards / 2
    slow.writer.close()


async def test_the_stream_ends_with_the_token(gateway: Gateway) -> None:
    """Then a reconnect is answered 401, which ends the browser's attempts."""
    expires_at = int(time.time()) + 2
    async with gateway.stream(token(ttl_s=2)) as client:
        await client.ended()
    assert -0.1 < time.time() - expires_at < 1


async def test_a_drain_ends_streams_with_a_hint(
    valkey: Valkey, scores: Scores, tmp_path: Path
) -> None:
    """When to come back; a client reconnects by itself."""
    async with running_gateway(valkey.url, tmp_path / "log", DRAIN_SECONDS="0.5") as gateway:
        await gateway.ready()
        async with gateway.stream() as client:
            await client.event()
            client.retry_ms = None
            gateway.signal()
            await client.ended()
            assert client.retry_ms is not None
        assert await gateway.exit_status() == 0


async def test_whoever_goes_on_talking_is_cut_off(gateway: Gateway) -> None:
    """A second request on the connection is none."""
    client = await RawClient.open(gateway.port)
    request = f"GET {STREAM}?token={token()} HTTP/1.1\r\nHost: gateway\r\n\r\n".encode()
    client.writer.write(request)
    await client.reader.readuntil(b"data: ")
    client.writer.write(request)
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        async with asyncio.timeout(5):
            await client.reader.readuntil(b"never")
    client.writer.close()


async def test_an_idle_stream_has_heartbeats_and_a_deaf_one_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A comment now and then; whoever takes nothing for too long is cut off."""
    monkeypatch.setattr(streams, "PING_EVERY_S", 0.5)
    monkeypatch.setattr(streams, "STALL_MAX_S", 0.5)
    monkeypatch.setattr(streams, "CLOSE_TIMEOUT_S", 0.5)
    async with impatient(monkeypatch) as (door, port):
        door.streams.publish(streams.event((1, 1), b"{}"))
        async with stream(port, {"Authorization": f"Bearer {token()}"}) as client:
            assert (await client.event()).id == "1-1"
            deaf = await RawClient.open(port, receive_bytes=4096)
            deaf.writer.write(
                f"GET {STREAM}?token={token()} HTTP/1.1\r\nHost: gateway\r\n\r\n".encode()
            )

            async def is_stalled() -> bool:
                door.streams.publish(streams.event((1, 2), b"x" * 10_000))
                return door.streams.stalled == 1

            async def is_gone() -> bool:
                return len(door.streams) == 1

            await eventually(is_stalled)
            await eventually(is_gone)
            assert door.streams.stalled == 0
            deaf.writer.close()
            while client.comments < 2:
                door.streams.publish(streams.event((1, 3), b"{}"))
                await client.event()
                await asyncio.sleep(0.3)


def test_the_two_kinds_agree() -> None:
    """What a stream is sent is what a WebSocket is sent, and a line more."""
    message = '{"event":"scoresUpdate","topScores":[{"userId":"Zoë","score":3,"rank":1}]}'.encode()

    assert streams.event((7, 9), message) == b"id: 7-9\ndata: " + message + b"\n\n"
    assert clients.frame(message).endswith(message)
