"""One process and one PostgreSQL: what they remember, and how they begin, break and end."""

import asyncio
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import asyncpg
import pytest
import websockets

from services.api.audit import audit
from services.basic.board import COMPARE_EVERY_S
from tests.cluster import Basic, Json, eventually, receive_board, receive_until
from tests.faults import freeze
from tests.load import Load

SECOND_START_S_MAX = 10.0
"""Twice the objective of 5 s, for machines that do other things meanwhile. It is printed."""

BACK_S_MAX = 6.0

BOARD_S_MAX = COMPARE_EVERY_S + 1.0

LONG = (pytest.mark.chaos, pytest.mark.timeout(600))


async def execute(basic: Basic, statement: str, *arguments: object) -> None:
    """As somebody would who knows the database."""
    connection = await asyncpg.connect(basic.shard_urls[0])
    await connection.execute(statement, *arguments)
    await connection.close()


def is_back(basic: Basic, before: Json) -> bool:
    """Whether another process is ready in the place of the one before."""
    now = basic.process(before["name"])
    return bool(now["state"] == "ready" and now["pid"] != before["pid"])


async def test_the_table_is_the_specification_s(basic: Basic) -> None:
    """Its columns, its key and its index."""
    connection = await asyncpg.connect(basic.shard_urls[0])
    columns = await connection.fetch(
        """
        SELECT column_name, data_type, character_maximum_length, is_nullable, column_default
        FROM information_schema.columns WHERE table_name = 'user_scores' ORDER BY ordinal_position
        """
    )
    indexes = await connection.fetch(
        "SELECT indexdef FROM pg_indexes WHERE tablename = 'user_scores' ORDER BY indexname"
    )
    await connection.close()

    assert [tuple(column) for column in columns] == [
        ("user_id", "character varying", 255, "NO", None),
        ("score", "integer", None, "NO", "0"),
        ("last_updated", "timestamp without time zone", None, "NO", "CURRENT_TIMESTAMP"),
    ]
    assert [index[0].partition(" ON ONLY public.user_scores ")[2] for index in indexes] == [
        "USING btree (score DESC)",
        "USING btree (user_id)",
    ]


async def test_what_operators_are_shown(basic: Basic) -> None:
    """What both services have, and nothing of a Redis that is not there."""
    assert await basic.metric("scoreboard_shard_up", shard="0") == 1
    assert await basic.metric("scoreboard_gateway_board_version") >= 1
    port = basic.process("basic")["operations_port"]
    async with basic.client(url=f"http://127.0.0.1:{port}") as operator:
        shown = (await operator.request("GET", "/metrics")).body
    assert b"redis_up" not in shown


async def test_what_somebody_else_writes_is_on_the_board_as_well(basic: Basic, user: str) -> None:
    """And what was taken away is not: PostgreSQL has the last word."""
    async with basic.live() as socket:
        await receive_board(socket)
        insert = "INSERT INTO user_scores (user_id, score) VALUES ($1, 2000000000)"
        await execute(basic, insert, user)
        async with asyncio.timeout(BOARD_S_MAX):
            await receive_until(socket, lambda rows: user in [row["userId"] for row in rows])
        await execute(basic, "DELETE FROM user_scores WHERE user_id = $1", user)
        async with asyncio.timeout(BOARD_S_MAX):
            await receive_until(socket, lambda rows: user not in [row["userId"] for row in rows])


async def test_a_restart_forgets_nothing(basic: Basic, user: str) -> None:
    """Neither scores nor quotas nor keys. Clients are told, what is under way ends, and it is quick."""
    async with basic.client() as client:
        for number in range(40):
            assert (await client.post(user, 1, key=str(number))).status == 200
    async with basic.live() as socket:
        board = await receive_board(socket)
        async with basic.client() as client:
            heal = freeze(basic, "postgres-0")
            under_way = asyncio.create_task(client.post(f"{user}-late", 1))
            await asyncio.sleep(0.05)
            ending = asyncio.create_task(asyncio.to_thread(basic.down))
            await asyncio.sleep(0.2)
            heal()
            assert (await under_way).status == 200
        await ending
        with pytest.raises(websockets.ConnectionClosed):
            await socket.recv()
    began = time.monotonic()
    basic.up()
    took = time.monotonic() - began
    print(f"ready in {took:.1f} s")
    async with basic.client() as client, basic.live() as again:
        assert board == [
            row for row in await receive_board(again) if row["userId"] != f"{user}-late"
        ]
        assert await client.top()
        replayed = await client.post(user, 1, key="7")
        answers = await asyncio.gather(*(client.post(user) for _ in range(60)))

    assert socket.close_code == 1012
    assert took < SECOND_START_S_MAX
    assert (replayed.json["newScore"], replayed.headers["X-RateLimit-Remaining"]) == (8, "59")
    statuses = [answer.status for answer in answers]
    assert (statuses.count(200), statuses.count(429)) == (59, 1)
    assert max(answer.json.get("newScore", 0) for answer in answers) == 99


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=LONG)])
async def test_what_was_acknowledged_counts_whatever_is_killed(
    basic: Basic, user: str, seed: int, kills: int
) -> None:
    """SIGKILL at any moment, of the process or of PostgreSQL, under load."""
    chance = random.Random(seed)
    load = Load(basic)
    async with load.running(user, users=10 * kills, pause_s=0.02 * kills):
        for _ in range(kills):
            await asyncio.sleep(chance.uniform(0.1, 0.6))
            before = basic.process(chance.choice(["basic", "basic", "postgres-0"]))
            os.kill(before["pid"], signal.SIGKILL)
            back = partial(is_back, basic, before)
            await eventually(back, within_s=BACK_S_MAX, what=f"{before['name']} ready again")
    await load.assert_exact()
    findings = await audit(basic.shard_urls, advanced=lambda: None)
    print(f"{load.acknowledged.total()} acknowledged, {len(load.broken)} connections broken")

    assert findings.differences == []
    assert load.broken, "no kill was noticed by anyone"


async def test_a_database_that_is_there_already(basic: Basic, tmp_path: Path) -> None:
    """Is used, and no other is started. A proxy that is named is believed whom it speaks for."""
    url = basic.shard_urls[0]
    await execute(basic, "CREATE DATABASE given")
    given = {
        "DATABASE_URL": url.rpartition("/")[0] + "/given",
        "TRUSTED_PROXIES": "127.0.0.0/8",
        "TOP_RATE_LIMIT": "1/hour",
    }
    other = Basic(tmp_path / "home", given)
    try:
        other.up()
        async with other.client() as client:
            assert (await client.post("ana", 5)).json["newScore"] == 5
            reads = [
                await client.request("GET", "/api/scores/top", headers={"X-Real-IP": address})
                for address in ("192.0.2.1", "192.0.2.2", "192.0.2.1")
            ]
        assert [one["name"] for one in other.status()["processes"]] == ["migrate", "basic"]
        refused = other.command("scale", "api=2")
    finally:
        other.down()
    assert [read.status for read in reads] == [200, 200, 429]
    assert "is one process" in refused.stderr


def test_what_it_cannot_be_started_on(tmp_path: Path) -> None:
    """Is said in one sentence."""
    (tmp_path / "two" / "postgres-0").mkdir(parents=True)
    (tmp_path / "two" / "postgres-1").mkdir()
    two = Basic(tmp_path / "two").command("basic", "--port=1")
    nowhere = Basic(tmp_path / "one", {"DATABASE_URL": "mysql://a"}).command("basic")

    assert "lives on 2 shards: start them with `scoreboard up`" in two.stderr
    assert "DATABASE_URL must be a URL such as postgresql://" in nowhere.stderr
    assert "mysql" not in nowhere.stderr
