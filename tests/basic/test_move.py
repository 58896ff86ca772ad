"""`scoreboard move`: from a basic installation to a cluster, as the README has it."""

import asyncio
import random
import re
import subprocess
from asyncio.subprocess import DEVNULL
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import asyncpg
import pytest

from services.api.audit import audit
from services.api.schema import TABLES
from tests.basic.users import rows_of, write_users
from tests.cluster import COMMAND, Basic, Client, Cluster, Json, eventually, receive_board
from tests.load import Load
from tests.proxies import Proxy, listening

README = Path(__file__).parents[2] / "README.md"

LONG = (pytest.mark.chaos, pytest.mark.timeout(600))

BOARD_S_MAX = 6.0
"""For a cluster to show what PostgreSQL has; Redis is rebuilt each second."""


class Way:
    """The README's commands, one after the other, for these two homes."""

    def __init__(self, basic: Basic, cluster: Cluster) -> None:
        section = README.read_text().partition("### The way to a cluster")[2]
        block = section.partition("```sh\n")[2].partition("```")[0]
        self._lines = iter(block.splitlines())
        self._places = {
            ".cluster": str(cluster.home),
            ".basic": str(basic.home),
            "8081": str(cluster.port),
            ".venv/bin/scoreboard": COMMAND,
        }

    def go(self, upto: str) -> str:
        """Run them up to the one that has this word; what that one says."""
        for line in self._lines:
            word = re.compile("|".join(map(re.escape, sorted(self._places, reverse=True))))
            done = subprocess.run(
                ["/bin/sh", "-ec", word.sub(lambda found: self._places[found[0]], line)],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, line + done.stderr
            if upto in line:
                return done.stdout.strip()
        raise EOFError(upto)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Cluster]:
    """Where the cluster will be; stopped if it was started."""
    cluster = Cluster(tmp_path / "cluster")
    yield cluster
    cluster.command("down")


@pytest.mark.parametrize(("users", "kills"), [(2_000, 1), pytest.param(100_000, 3, marks=LONG)])
async def test_users_are_moved_under_load(
    fresh_basic: Basic, target: Cluster, user: str, seed: int, users: int, kills: int
) -> None:
    """Every row, every acknowledged increment, every quota; and the board is the same."""
    chance = random.Random(seed)
    words = [COMMAND, "move", str(fresh_basic.home), "--home", str(target.home)]
    fresh_basic.up()
    way = Way(fresh_basic, target)
    way.go(upto="scoreboard up")
    await write_users(fresh_basic.shard_urls[0], users)
    # What clients are told to speak to.
    async with listening(Proxy(fresh_basic.port)) as place, fresh_basic.client() as old:
        assert [(await old.post(user, 1000, key=f"{n}")).status for n in range(99)] == [200] * 99
        await assert_needs_an_empty_cluster(target, fresh_basic)
        load = Load(target, [f"http://127.0.0.1:{place.port}"])
        async with load.running(f"{user}-load", users=10, pause_s=0.1):
            for _ in range(kills):
                killed = await asyncio.create_subprocess_exec(
                    *words, stderr=DEVNULL, stdout=DEVNULL
                )
                await asyncio.sleep(chance.uniform(0.5, 2.0))
                # Where it was quick, the next one has nothing to do.
                with suppress(ProcessLookupError):
                    killed.kill()
                await killed.wait()
            print(await asyncio.to_thread(way.go, upto="scoreboard move"))
            # Nothing is written any more at the old place, and nothing yet at the new one.
            for table in TABLES:
                kept, moved = [
                    await rows_of(place.shard_urls, table) for place in (fresh_basic, target)
                ]
                assert moved == kept
            async with target.client() as new, fresh_basic.live() as watcher:
                board = await receive_board(watcher)
                await eventually(partial(shows, new, board), within_s=BOARD_S_MAX, what="the board")
                assert await old.top() == board
                replayed = await new.post(user, 1000, key="7")
                last, refused = [await new.post(user, 1000) for _ in range(2)]
            place.aim(target.port)
    await load.assert_exact()
    findings = await audit(target.shard_urls, advanced=lambda: None)
    again = await asyncio.to_thread(target.command, "move", str(fresh_basic.home))
    await asyncio.to_thread(way.go, upto="scoreboard down")
    restarted = fresh_basic.command("basic", "--detach", f"--port={fresh_basic.port}").stderr

    assert (findings.users, findings.differences) == (users + 12, [])
    assert replayed.json["newScore"] == 8000
    assert (last.json["newScore"], refused.status) == (100_000, 429)
    assert "has been in use since an earlier move" in again.stderr
    assert "they were moved to a cluster" in restarted


async def assert_needs_an_empty_cluster(target: Cluster, basic: Basic) -> None:
    """One user is enough for it to be said, and then nothing has changed."""
    async with target.client() as new, basic.client() as old:
        assert (await new.post("early")).status == 200
        refused = await asyncio.to_thread(target.command, "move", str(basic.home))
        assert "of the cluster has users already" in refused.stderr
        assert refused.returncode == 1
        assert (await old.post("early")).status == 200
    for url in target.shard_urls:
        connection = await asyncpg.connect(url)
        await connection.execute("TRUNCATE user_scores, score_ops")
        await connection.close()


async def shows(client: Client, board: list[Json]) -> bool:
    """Whether GET answers this."""
    return await client.top() == board
