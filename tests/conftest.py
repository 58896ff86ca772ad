"""One cluster for the whole run, started as its users start it."""

from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path

import pytest

from tests.cluster import Client, Cluster

_users = count()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two API replicas, two gateways, two shards, on a free port; the tests share it."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster") / "home")
    cluster.up()
    yield cluster
    cluster.down()


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[Client]:
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
    cluster = Cluster(tmp_path / "home")
    yield cluster
    cluster.command("down")
