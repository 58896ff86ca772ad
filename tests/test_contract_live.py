"""ws /scores/live through Nginx, and the agreement of everyone who shows the board."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator

import pytest
import websockets

from services.api.shards import Shards
from tests.cluster import Client, Json, Scoreboard, receive_board, receive_until
from tests.openapi import check_close, check_live_message, check_refusal
from tests.test_contract_top import leading_score

LAST_CLIENT_S_MAX = 0.05
"""From the 200 to the last client, on an idle machine: the objective."""


async def refusal_of(url: str, **options: object) -> websockets.Response:
    """The HTTP answer to a handshake that must not succeed."""
    with pytest.raises(websockets.InvalidStatus) as refused:
        async with websockets.connect(url, proxy=None, **options):  # type: ignore[arg-type]
            pass
    response = refused.value.response
    check_refusal(
        response.status_code, dict(response.headers.raw_items()), bytes(response.body or b"")
    )
    return response


async def test_the_board_comes_at_once_and_then_whenever_it_changes(
    cluster: Scoreboard, client: Client, user: str
) -> None:
    """The first is what GET says."""
    async with cluster.live() as socket:
        assert await receive_board(socket) == await client.top()
        score = await leading_score(client)
        await client.post(user, score)
        board = await receive_until(socket, lambda rows: any(row["userId"] == user for row in rows))

    assert board == await client.top()


async def test_a_token_may_come_in_three_ways(cluster: Scoreboard) -> None:
    """In the query, the header, or a subprotocol that is not echoed."""
    url, token = f"ws://127.0.0.1:{cluster.port}/scores/live", cluster.token("watcher")
    async with websockets.connect(f"{url}?token={token}", proxy=None) as socket:
        await receive_board(socket)
    async with cluster.live() as socket:
        await receive_board(socket)
    protocols = [websockets.Subprotocol("scoreboard.v1"), websockets.Subprotocol(f"bearer.{token}")]
    async with websockets.connect(url, subprotocols=protocols, proxy=None) as socket:
        assert socket.subprotocol == "scoreboard.v1"
        await receive_board(socket)


async def test_the_board_comes_as_events_too(
    cluster: Scoreboard, client: Client, user: str
) -> None:
    """Through Nginx, as soon as it changes."""
    bearer = {"Authorization": f"Bearer {cluster.token('watcher')}"}
    async with client.http.stream("GET", "/scores/live/sse", headers=bearer) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        assert re.fullmatch("[0-9a-f]{32}", response.headers["X-Request-ID"])
        lines = response.aiter_lines()
        assert await next_event(lines) == await client.top()
        score = await leading_score(client)
        assert (await client.post(user, score)).status == 200
        async with asyncio.timeout(5):
            board = await next_event(lines)
            while user not in [row["userId"] for row in board]:
                board = await next_event(lines)
        assert board == await client.top()
    refused = await client.request("GET", "/scores/live/sse")
    posted = await client.request("POST", "/scores/live/sse", headers=bearer)
    assert (refused.status, refused.json["message"]) == (401, "Unauthorized")
    assert (posted.status, posted.headers["Allow"]) == (405, "GET")


async def next_event(lines: AsyncIterator[str]) -> list[Json]:
    """The board of the next event."""
    async for line in lines:
        if line.startswith("data: "):
            check_live_message(line.removeprefix("data: "))
            rows: list[Json] = json.loads(line.removeprefix("data: "))["topScores"]
            return rows
    raise EOFError


async def test_without_one_valid_token_there_is_no_handshake(cluster: Scoreboard) -> None:
    """None, two, or one that is not believed: 401."""
    url, token = f"ws://127.0.0.1:{cluster.port}/scores/live", cluster.token("watcher")
    bearer = {"Authorization": f"Bearer {token}"}
    for address, headers in (
        (url, {}),
        (f"{url}?token=nonsense", {}),
        (f"{url}?token={token}&token={token}", {}),
        (f"{url}?token={token}", bearer),
        (f"{url}?token={cluster.token('watcher', ttl_s=-1)}", {}),
    ):
        response = await refusal_of(address, additional_headers=headers)
        assert response.status_code == 401
        assert response.body == b'{"status":"error","message":"Unauthorized"}'


async def test_a_request_that_is_no_handshake(cluster: Scoreboard, client: Client) -> None:
    """Is refused in the contract's shape as well."""
    bearer = {"Authorization": f"Bearer {cluster.token('watcher')}"}
    posted = await client.request("POST", "/scores/live", headers=bearer, content=b"{}")
    plain = await client.request("GET", "/scores/live", headers=bearer)
    with_body = await client.request("GET", "/scores/live", content=b"{}")

    assert (posted.status, posted.headers["Allow"]) == (405, "GET")
    assert posted.json == {"status": "error", "message": "Method not allowed"}
    assert (plain.status, plain.headers["Upgrade"]) == (426, "websocket")
    assert (with_body.status, with_body.json["message"]) == (401, "Unauthorized")


@pytest.mark.parametrize("message", ["hello", b"hello"])
async def test_a_client_may_not_send(cluster: Scoreboard, message: str | bytes) -> None:
    """Receive-only: the connection ends with 1008."""
    async with cluster.live() as socket:
        await socket.send(message)
        with pytest.raises(websockets.ConnectionClosed):
            while True:
                await receive_board(socket)

    assert (socket.close_code, socket.close_reason) == (1008, "receive-only")
    check_close(1008, "receive-only")


async def test_a_token_that_expires_ends_the_connection(cluster: Scoreboard) -> None:
    """With 4401, within a second of its time."""
    token = cluster.token("watcher", ttl_s=2)
    expires = time.time() + 2
    url = f"ws://127.0.0.1:{cluster.port}/scores/live?token={token}"
    async with websockets.connect(url, proxy=None) as socket:
        with pytest.raises(websockets.ConnectionClosed):
            while True:
                await receive_board(socket)

    assert socket.close_code == 4401
    assert time.time() - expires < 1.5


async def test_everyone_agrees(cluster: Scoreboard, client: Client, user: str) -> None:
    """PostgreSQL, GET on all replicas and the WebSockets of all gateways; and soon enough."""
    gateways = cluster.replicas("gateway")
    (host, port), (other_host, other_port) = gateways[0], gateways[-1]
    async with (
        cluster.live(host=host, port=port) as one,
        cluster.live(host=other_host, port=other_port) as other,
    ):
        for socket in (one, other):
            await receive_board(socket)
        delays = []
        for _ in range(5):
            score = await leading_score(client)
            assert (await client.post(f"{user}-{score}", score)).status == 200
            answered = time.monotonic()

            async def shown(socket: websockets.ClientConnection, score: int = score) -> object:
                return await receive_until(
                    socket, lambda rows: any(row["score"] == score for row in rows)
                )

            boards = await asyncio.gather(shown(one), shown(other))
            delays.append(time.monotonic() - answered)
            gets = [await client.top() for _ in range(4)]
            async with Shards.connect(cluster.shard_urls) as shards:
                truth = [(row.user_id, row.score) for row in await shards.top()]
            assert all(board == boards[0] for board in [*boards, *gets])
            assert [(row["userId"], row["score"]) for row in gets[0]] == truth
    print(f"200 to last client: {[f'{delay * 1000:.1f} ms' for delay in delays]}")
