"""One Valkey and one gateway for the tests that do not break them."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from tests.gateway.harness import Gateway, Scores, running_gateway
from tests.valkey import Valkey


@pytest_asyncio.fixture(scope="session")
async def valkey(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Valkey]:
    """A Valkey that stays up."""
    server = Valkey(tmp_path_factory.mktemp("valkey"))
    await server.start()
    yield server
    await server.kill()


@pytest_asyncio.fixture(scope="session")
async def scores(valkey: Valkey) -> AsyncIterator[Scores]:
    """Who announces boards on ``valkey``, and has announced one."""
    async with Redis.from_url(valkey.url) as redis:
        announcer = Scores(redis)
        await announcer.announce(1)
        yield announcer


@pytest_asyncio.fixture(scope="session")
async def gateway(
    valkey: Valkey, scores: Scores, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    """A gateway on ``valkey`` that has a board."""
    log = tmp_path_factory.mktemp("gateway") / "log"
    async with running_gateway(valkey.url, log, CONNECTIONS_PER_USER_MAX="1000") as process:
        await process.ready()
        yield process
