"""What a connected client sees, and what ends its connection."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from websockets.asyncio.client import connect
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

from services.gateway import clients
from services.gateway.audience import SEND_BUFFER_BYTES
from services.gateway.caps import AcceptRate, Caps
from services.gateway.handshake import Door
from shared.board import Score
from shared.edge import Edge
from shared.leaderboard import Leaderboard
from shared.token import TokenSettings, TokenVerifier
from tests.cluster import eventually
from tests.gateway.harness import (
    SECRET,
    UPGRADE,
    Gateway,
    RawClient,
    Scores,
    ask,
    closed,
    next_score,
    running_gateway,
    score_of,
    token,
)
from tests.openapi import check_refusal
from tests.valkey import Valkey

TEXT, BINARY, CONTINUATION, CLOSE, PING, PONG = 0x81, 0x82, 0x80, 0x88, 0x89, 0x8A


async def test_the_current_board_comes_first_and_then_each_newer_one(
    gateway: Gateway, scores: Scores
) -> None:
    """A client need not wait for a change to see the board."""
    await scores.announce(10)
    async with gateway.connect() as early:
        # The gateway may not have heard of it yet.
        while await next_score(early) != 10:
            pass
        await scores.announce(11)
        assert await next_score(early) == 11
        async with gateway.connect() as late:
            assert await next_score(late) == 11
            await scores.announce(12)
            assert await next_score(late) == await next_score(early) == 12


async def test_the_leaderboard_s_own_announcement_arrives(gateway: Gateway, scores: Scores) -> None:
    """The gateway reads what the leaderboard script writes, with names as they are."""
    leaderboard = Leaderboard(scores.redis)
    await leaderboard.discard()
    await leaderboard.rebuild([Score("Zoë \"'/", 3, 1)], {})

    async with gateway.connect() as client:
        expected = (
            '{"event":"scoresUpdate","topScores":[{"userId":"Zoë \\"\'/","score":3,"rank":1}]}'
        )
        async with asyncio.timeout(2):
            while await client.recv() != expected:
                pass
    scores.later()


async def test_an_older_or_repeated_board_is_never_shown(gateway: Gateway, scores: Scores) -> None:
    """Whatever order the channel has, clients see boards in the order of their positions."""
    dropped = await gateway.metric("boards_dropped_total")
    older, newer = scores.board(20), scores.board(21)
    async with gateway.connect() as client:
        await next_score(client)
        await scores.publish(newer)
        assert await next_score(client) == 21
        for board in (older, newer, scores.board(22, epoch=1), "no board", "[]"):
            await scores.publish(board)
        await scores.announce(23)
        assert await next_score(client) == 23
    assert await gateway.metric("boards_dropped_total") == dropped + 3


async def test_a_client_that_does_not_read_gets_the_newest_board_when_it_does(
    gateway: Gateway, scores: Scores
) -> None:
    """Boards are skipped for it alone; nothing old is shown after something new."""
    boards = 200
    slow = await RawClient.connect(gateway.port, receive_bytes=4096)
    async with gateway.connect() as fast:
        await next_score(fast)
        for score in range(100, 100 + boards):
            await scores.announce(score, user="u" * 255)
            assert await next_score(fast) == score
    assert await gateway.metric("stalled_clients") == 1

    shown: list[int] = []
    while not shown or shown[-1] != 99 + boards:
        shown.append(score_of((await slow.frame())[1]))

    assert shown == sorted(set(shown))
    assert len(shown) < boards / 2
    assert await gateway.metric("stalled_clients") == 0
    slow.writer.close()


@pytest.mark.parametrize(
    ("first_byte", "payload", "masked", "code"),
    [
        pytest.param(TEXT, b"hello", True, 1008, id="text"),
        pytest.param(BINARY, b"", True, 1008, id="empty binary"),
        pytest.param(0x01, b"first of", True, 1008, id="fragment"),
        pytest.param(CONTINUATION, b"rest", True, 1002, id="continuation of nothing"),
        pytest.param(TEXT, b"x" * 2000, True, 1008, id="oversized"),
        pytest.param(TEXT, b"hello", False, 1002, id="unmasked"),
        pytest.param(0xC1, b"hello", True, 1002, id="reserved bit"),
        pytest.param(0x83, b"hello", True, 1002, id="reserved opcode"),
        pytest.param(0x09, b"", True, 1002, id="fragmented ping"),
        pytest.param(PING, b"x" * 126, True, 1002, id="long ping"),
        pytest.param(CLOSE, b"x", True, 1002, id="close with half a code"),
        pytest.param(CLOSE, b"\x03\xee", True, 1002, id="close with a reserved code"),
        pytest.param(CLOSE, b"\x03\xe8\xff\xff", True, 1007, id="close with a reason not UTF-8"),
        pytest.param(CLOSE, b"", True, 1000, id="close without a code"),
        pytest.param(CLOSE, b"\x03\xe9bye", True, 1001, id="close"),
        pytest.param(CLOSE, b"\x11\x94", True, 4500, id="close of an application"),
    ],
)
async def test_every_frame_but_a_control_frame_closes_the_connection(
    gateway: Gateway, first_byte: int, payload: bytes, masked: bool, code: int
) -> None:
    """Clients only receive; what breaks the protocol is told so, and a close is echoed."""
    client = await RawClient.connect(gateway.port)

    client.send(first_byte, payload, masked=masked)

    assert await client.close_code() == code
    if first_byte != CLOSE:
        client.send(CLOSE, code.to_bytes(2, "big"))
    await client.ended()


async def test_receive_only_is_said(gateway: Gateway) -> None:
    """The reason tells a developer what is wrong."""
    for message in ("hello", b"x" * 2000, "x" * 2_000_000):
        async with gateway.connect() as client:
            await client.send(message)

            assert await closed(client) == (1008, "receive-only")


async def test_a_ping_is_answered_and_a_flood_of_them_is_not(gateway: Gateway) -> None:
    """A client may ask whether we are there, not keep us busy."""
    client = await RawClient.connect(gateway.port)
    await client.frame()

    client.send(PING, b"there?")
    assert await client.frame() == (PONG & 0x0F, b"there?")
    for _ in range(1000):
        client.send(PING)

    assert await client.close_code() == 1008
    client.writer.close()


async def test_a_flood_from_a_client_that_does_not_read_is_not_kept(gateway: Gateway) -> None:
    """Unanswerable pings, and what follows a close, take no memory."""
    client = await RawClient.connect(gateway.port, receive_bytes=4096)
    for _ in range(2000):
        client.send(PING, b"x" * 125)
        client.send(TEXT, b"x" * 1000)
    async with gateway.connect() as other:
        await next_score(other)
    client.writer.close()


async def test_the_connection_ends_within_a_second_of_the_token(gateway: Gateway) -> None:
    """A token is believed until it expires, not until the client goes."""
    bearer = token(ttl_s=2)
    expires_at = int(time.time()) + 2
    async with gateway.connect(bearer) as client:
        assert (await closed(client))[0] == 4401
    assert -0.1 < time.time() - expires_at < 1


@asynccontextmanager
async def impatient(
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[tuple[Door, int]]:
    """Clients served in this process with shorter patience, and the port they are served on."""
    monkeypatch.setattr(clients, "PING_EVERY_S", 0.5)
    monkeypatch.setattr(clients, "STALL_MAX_S", 0.5)
    monkeypatch.setattr(clients, "CLOSE_TIMEOUT_S", 0.5)
    caps = Caps(total=10, per_user=10, per_address=10)
    everyone: clients.Clients = clients.Clients(caps, "websocket")
    deflated: clients.Clients = clients.Clients(caps, "websocket-deflate")
    streams: clients.Clients = clients.Clients(caps, "sse")
    everyone.publish(clients.frame(b"{}"))
    settings = TokenSettings.from_environ({"JWT_SECRET": SECRET})
    with socket.create_server(("127.0.0.1", 0)) as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        rate = AcceptRate(100, asyncio.get_running_loop().time())
        verify = TokenVerifier(settings).verify
        entrance = Door(everyone, deflated, streams, caps, rate, Edge(()), (), False, verify)
        server = await entrance.open(door)
        jobs = [
            asyncio.create_task(job)
            for kind in entrance.kinds
            for job in (kind.keep_time(), kind.broadcast())
        ]
        yield entrance, door.getsockname()[1]
        for job in jobs:
            job.cancel()
        server.close()


async def test_boards_are_compressed_once_for_all_who_offer_it(
    gateway: Gateway, scores: Scores
) -> None:
    """With no context, so that each can be read without the ones before."""
    url = f"ws://127.0.0.1:{gateway.port}/scores/live?token={token()}"
    async with connect(url) as one, connect(url) as two, gateway.connect() as plain:
        assert one.response is not None
        assert "permessage-deflate" in one.response.headers["Sec-WebSocket-Extensions"]
        for score in range(60, 63):
            await scores.announce(score, user="u" * 200)
            for client in (one, two, plain):
                while await next_score(client) != score:
                    pass
        await one.send("hello")
        assert await closed(one) == (1008, "receive-only")
        await two.ping()
    assert await gateway.metric("transport_connections", transport="websocket-deflate") == 0


@pytest.mark.parametrize(
    ("offer", "accepted"),
    [
        pytest.param("permessage-deflate", True, id="Firefox"),
        pytest.param("permessage-deflate; client_max_window_bits", True, id="Chrome"),
        pytest.param("x, permessage-deflate;server_no_context_takeover", True, id="second"),
        pytest.param("permessage-deflate; server_max_window_bits=10", False, id="small window"),
        pytest.param(
            "permessage-deflate; server_max_window_bits=10, permessage-deflate", True, id="choice"
        ),
        pytest.param("x-webkit-deflate-frame", False, id="another"),
    ],
)
async def test_compression_is_agreed_on(gateway: Gateway, offer: str, accepted: bool) -> None:
    """Nothing is answered that the client did not offer."""
    headers = UPGRADE | {"Sec-WebSocket-Extensions": offer}
    answer = await gateway.get(f"/scores/live?token={token()}", headers)

    assert answer.status == 101
    assert ("sec-websocket-extensions" in answer.headers) is accepted


async def test_a_client_that_answers_no_ping_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection whose other end vanished without a word does not stay; others do."""
    async with impatient(monkeypatch) as (_, port):
        vanished = await RawClient.connect(port)
        async with connect(f"ws://127.0.0.1:{port}/scores/live?token={token()}") as healthy:
            assert await vanished.close_code() == 1013
            assert await healthy.recv() == "{}"
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1.5):
                    await healthy.recv()
        vanished.writer.close()


async def test_half_a_frame_ends_with_the_next_pong_that_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever announces a frame and never ends it can answer no ping."""
    async with impatient(monkeypatch) as (_, port):
        for half in (b"\x81", b"\x81\xfe\x03", b"\x89\xfd\0\0\0\0half"):
            client = await RawClient.connect(port)
            client.writer.write(half)
            assert await client.close_code() == 1013
            client.writer.close()


async def test_memory_returns(gateway: Gateway, scores: Scores) -> None:
    """Whatever clients have sent, or not read, or half said."""
    await scores.announce(700, user="u" * 255)
    resident: list[int] = []
    for _ in range(4):
        bad = [await RawClient.connect(gateway.port, receive_bytes=4096) for _ in range(100)]
        bad += [await RawClient.open(gateway.port) for _ in range(100)]
        for number, client in enumerate(bad):
            client.writer.write(
                (b"\x81\xff" + b"x" * 20_000, b"\x89\x80\0\0\0\0" * 5000)[number % 2]
            )
        await asyncio.sleep(0.2)
        for client in bad:
            client.writer.transport.abort()

        async def is_empty() -> bool:
            return await gateway.metric("connections") == await gateway.metric("openings") == 0

        await eventually(is_empty)
        status = Path(f"/proc/{gateway.process.pid}/status").read_text()  # noqa: ASYNC240
        resident.append(int(status.split("VmRSS:")[1].split()[0]))
    # The first round is what the allocator keeps for the next ones; kept, the others would be 7 MB.
    assert resident[-1] - resident[0] < 3 * 1024


@pytest.mark.parametrize("length", [0, 125, 126, 65_535])
def test_a_frame_is_what_another_implementation_reads(length: int) -> None:
    """Whole, unmasked, of that length."""
    client = ClientProtocol(parse_uri("ws://gateway"), state=State.OPEN)

    client.receive_data(clients.frame(b"x" * length))

    (read,) = client.events_received()
    assert isinstance(read, Frame)
    assert (read.opcode, read.fin, read.rsv1) == (Opcode.TEXT, True, False)
    assert read.data == b"x" * length


async def test_a_client_that_never_reads_is_closed_as_stalled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is told 1013 in case it comes back, and cut off in case it does not."""
    async with impatient(monkeypatch) as (door, port):
        everyone = door.sockets
        deaf, late, gone = [await RawClient.connect(port, receive_bytes=4096) for _ in range(3)]

        async def all_stall() -> bool:
            everyone.publish(clients.frame(b"x" * 10_000))
            return everyone.stalled == 3

        async def all_are_cut_off() -> bool:
            return len(everyone) == 0

        await eventually(all_stall)
        gone.writer.write_eof()
        assert await late.close_code() == 1013
        await eventually(all_are_cut_off)
        assert everyone.stalled == 0
        for client in (deaf, late, gone):
            client.writer.close()


async def test_limits_of_connections(valkey: Valkey, scores: Scores, tmp_path: Path) -> None:
    """A user's last connection too many is closed 4429; a full gateway answers 503 to all."""
    limits = {"CONNECTIONS_MAX": "4", "CONNECTIONS_PER_USER_MAX": "2"}
    async with running_gateway(valkey.url, tmp_path / "log", **limits) as gateway:
        await gateway.ready()
        async with gateway.connect(token("ana")) as one, gateway.connect(token("ana")) as two:
            async with gateway.connect(token("ana")) as three:
                assert (await closed(three))[0] == 4429
            await next_score(one)
            await next_score(two)
            async with gateway.connect(token("ben")), gateway.connect(token("cleo")):
                for query in ("", f"?token={token('dora')}"):
                    answer = await ask(gateway.port, f"/scores/live{query}", {})
                    assert answer.status == 503
                    check_refusal(answer.status, answer.headers, answer.body)
            async with gateway.connect(token("dora")) as next_one:
                await next_score(next_one)
