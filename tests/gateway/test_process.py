"""The gateway as a process: how it starts, what it says, how it ends."""

import asyncio
import signal
import socket
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Subprotocol

from tests.cluster import eventually
from tests.gateway.harness import (
    SECRET,
    UPGRADE,
    Gateway,
    RawClient,
    Scores,
    closed,
    next_score,
    running_gateway,
    token,
)
from tests.valkey import Valkey

CLIENTS = 120
"""Enough that a drain at the least pace takes a second."""


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        pytest.param({}, "REDIS_URL", id="nothing"),
        pytest.param({"REDIS_URL": "redis://x"}, "JWT_SECRET", id="no secret"),
        pytest.param({"REDIS_URL": "x", "JWT_SECRET": SECRET}, "REDIS_URL", id="wrong url"),
        pytest.param(
            {"REDIS_URL": "redis://x", "JWT_SECRET": SECRET, "DRAIN_SECONDS": "soon"},
            "DRAIN_SECONDS",
            id="wrong number",
        ),
    ],
)
async def test_a_wrong_setting_is_named_in_one_sentence(
    settings: dict[str, str], named: str
) -> None:
    """An operator sees what to change, not a traceback."""
    status, said = await start_in_vain(settings)

    assert status == 1
    assert said.startswith(f"{named} ")
    assert said.count("\n") == 1


async def test_a_taken_port_is_named_in_one_sentence() -> None:
    """The same for what only the machine can know."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, said = await start_in_vain(
            {"REDIS_URL": "redis://x", "JWT_SECRET": SECRET, "PORT": port}
        )

    assert status == 1
    assert said == f"PORT: cannot listen on 127.0.0.1:{port}: Address already in use.\n"


async def start_in_vain(settings: dict[str, str]) -> tuple[int, str]:
    """Exit status and all output of a gateway that cannot start."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.gateway"),
        env=settings,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


async def test_a_drain_closes_everyone_with_1012_at_a_pace(
    valkey: Valkey, scores: Scores, tmp_path: Path
) -> None:
    """Not ready at once, nobody new, everyone told to come back, exit 0."""
    async with (
        running_gateway(valkey.url, tmp_path / "log", DRAIN_SECONDS="1") as gateway,
        AsyncExitStack() as stack,
    ):
        await gateway.ready()
        clients = await connected(gateway, stack)

        gateway.signal()
        ends = [asyncio.create_task(close_of(client)) for client in clients]

        async def is_unready() -> bool:
            return (await gateway.operations("/readyz")).status == 503

        await eventually(is_unready, within_s=1)
        with pytest.raises(ConnectionRefusedError):
            await gateway.get("/scores/live")
        times, codes = zip(*sorted([await end for end in ends]), strict=True)

        assert set(codes) == {1012}
        assert times[CLIENTS * 9 // 10] - times[CLIENTS // 10] > 0.5
        assert await gateway.exit_status() == 0


async def test_a_second_signal_ends_at_once(valkey: Valkey, scores: Scores, tmp_path: Path) -> None:
    """Whoever asks twice does not want to wait."""
    async with (
        running_gateway(valkey.url, tmp_path / "log", DRAIN_SECONDS="60") as gateway,
        AsyncExitStack() as stack,
    ):
        await gateway.ready()
        clients = await connected(gateway, stack)

        gateway.signal()
        gateway.signal(signal.SIGINT)

        assert await gateway.exit_status() == 0
        codes = [(await closed(client))[0] for client in clients]
        assert codes.count(1012) < CLIENTS / 2


async def connected(gateway: Gateway, stack: AsyncExitStack) -> list[ClientConnection]:
    """Clients of different users that have seen the board."""
    clients = [
        await stack.enter_async_context(gateway.connect(token(f"user-{number}")))
        for number in range(CLIENTS)
    ]
    for client in clients:
        await client.recv()
    return clients


async def close_of(client: ClientConnection) -> tuple[float, int]:
    """When the client was closed, and with which code."""
    code, _ = await closed(client)
    return asyncio.get_running_loop().time(), code


async def test_an_idle_gateway_ends_at_once(valkey: Valkey, scores: Scores, tmp_path: Path) -> None:
    """The drain takes only as long as there is someone to pace."""
    async with running_gateway(valkey.url, tmp_path / "log", DRAIN_SECONDS="60") as gateway:
        await gateway.ready()
        gateway.signal()

        assert await gateway.exit_status() == 0


async def test_a_drain_by_command(valkey: Valkey, scores: Scores, tmp_path: Path) -> None:
    """As by a signal; asked twice it does not end any earlier."""
    async with (
        running_gateway(valkey.url, tmp_path / "log", DRAIN_SECONDS="1") as gateway,
        AsyncExitStack() as stack,
    ):
        await gateway.ready()
        clients = await connected(gateway, stack)

        assert (await gateway.operations("/drain")).status == 405
        for _ in range(2):
            assert (await gateway.operations("/drain", "POST")).status == 202

        assert [(await closed(client))[0] for client in clients] == [1012] * CLIENTS
        assert await gateway.exit_status() == 0


@pytest.mark.parametrize(
    "connections",
    [pytest.param(200, id="few"), pytest.param(10_000, id="many", marks=pytest.mark.chaos)],
)
async def test_no_token_is_ever_kept(
    valkey: Valkey, scores: Scores, tmp_path: Path, connections: int
) -> None:
    """No living object has one, nor has a log, a metric or the body of an error."""
    testimony = tmp_path / "testimony"
    async with (
        running_gateway(
            valkey.url,
            tmp_path / "log",
            module=("tests.gateway.witness", str(testimony)),
            HANDSHAKES_PER_SECOND_MAX="1000000",
            CONNECTIONS_PER_ADDRESS_MAX="20000",
        ) as gateway,
        AsyncExitStack() as stack,
    ):
        await gateway.ready()
        url = f"ws://127.0.0.1:{gateway.port}/scores/live"
        clients = []
        for number in range(connections):
            clients.append(await RawClient.connect(gateway.port, bearer=token(f"user-{number}")))
            stack.callback(clients[-1].writer.close)
        for number in range(5):
            bearer = token(f"another-{number}")
            headers = {"Authorization": f"Bearer {bearer}"}
            await stack.enter_async_context(connect(url, additional_headers=headers))
            protocols = [Subprotocol("scoreboard.v1"), Subprotocol(f"bearer.{bearer}")]
            await stack.enter_async_context(connect(url, subprotocols=protocols))
            await stack.enter_async_context(gateway.stream(bearer))
        expired = token(ttl_s=-1)
        refused = [
            await gateway.get(f"{path}?token={bearer}{more}", UPGRADE)
            for bearer in (token("nobody"), expired)
            for path, more in (("/scores/live", f"&token={bearer}"), ("/elsewhere", ""))
        ]
        await scores.announce(1)

        gateway.signal(signal.SIGUSR1)
        await eventually(testimony.exists, within_s=30)

        assert testimony.read_bytes() == b"found:"
        metrics = (await gateway.operations("/metrics")).body.decode()
        assert f"gateway_connections {connections + 15}.0" in metrics
        for said in (metrics, gateway.log, str(refused)):
            assert "eyJ" not in said


async def test_no_token_is_ever_written(valkey: Valkey, scores: Scores, tmp_path: Path) -> None:
    """Neither to the log, however talkative, nor to a metric."""
    async with running_gateway(valkey.url, tmp_path / "log") as gateway:
        await gateway.ready()
        secret = token()
        url = f"ws://127.0.0.1:{gateway.port}/scores/live"
        async with connect(f"{url}?token={secret}") as client:
            await next_score(client)
        async with connect(url, additional_headers={"Authorization": f"Bearer {secret}"}):
            pass
        await gateway.get(f"/scores/live?token={secret}&token={secret}", UPGRADE)
        await gateway.get(f"/scores/live?token={secret}", UPGRADE | {"Sec-WebSocket-Key": "x"})
        await gateway.get(f"/elsewhere?token={secret}")
        metrics = await gateway.operations("/metrics")
        gateway.signal()
        await gateway.exit_status()

        assert "gateway.started" in gateway.log
        for part in secret.split("."):
            assert part not in gateway.log
            assert part.encode() not in metrics.body
