"""One cluster for the whole run, started as its users start it."""

import os
import random
from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.cluster import Basic, Client, Cluster, Scoreboard
from tests.compose.stack import Stack
from tests.valkey import Valkey

_users = count()


def pytest_addoption(parser: pytest.Parser) -> None:
    """What the contract is tested on."""
    parser.addoption(
        "--cluster",
        choices=["local", "compose", "basic"],
        default="local",
        help="one of `scoreboard up`, the containers of docker-compose.scale.yml, or `scoreboard basic`",
    )


@pytest.fixture(scope="session")
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scoreboard]:
    """Two API replicas, two gateways, two shards, on a free port; the tests share it."""
    folder = tmp_path_factory.mktemp("cluster") / "home"
    if request.config.getoption("--cluster") == "compose":
        yield request.getfixturevalue("stack")
        return
    basic = request.config.getoption("--cluster") == "basic"
    cluster = Basic(folder) if basic else Cluster(folder)
    cluster.up()
    yield cluster
    cluster.down()


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The same in containers."""
    stack = Stack(tmp_path_factory.mktemp("stack") / "home")
    try:
        stack.up(api=2, gateway=2)
        yield stack
    finally:
        stack.down()


@pytest.fixture(scope="session")
async def lone_valkey(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Valkey]:
    """A Valkey that is no cluster's: channels have no databases, so its boards concern nobody."""
    server = Valkey(tmp_path_factory.mktemp("lone-valkey"))
    await server.start()
    yield server
    await server.kill()


@pytest.fixture
async def redis(lone_valkey: Valkey) -> AsyncIterator[Redis]:
    """An empty Redis of the test's own."""
    async with Redis.from_url(lone_valkey.url) as redis:
        await redis.flushall()
        yield redis


@pytest.fixture
async def client(cluster: Scoreboard) -> AsyncIterator[Client]:
    """An HTTP client of the cluster."""
    async with cluster.client() as client:
        yield client


@pytest.fixture
def user(request: pytest.FixtureRequest) -> str:
    """A user that no other test has: quota and score are untouched."""
    return f"{request.node.originalname}-{next(_users)}"[-255:]


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster of the test's own, not started; stopped if it was."""
    cluster = Cluster(tmp_path / 'the "home"')
    yield cluster
    cluster.command("down")


@pytest.fixture
def seed() -> int:
    """Of what the test leaves to chance: printed, and the same again with `SEED=N`."""
    seed = int(os.environ.get("SEED", random.SystemRandom().randrange(2**32)))
    print(f"SEED={seed}")
    return seed
