"""An API replica of the test's own: the real process, on any shards and any Redis."""

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2 as httpx

from tests.cluster import Cluster, eventually, free_port

START_S_MAX, STOP_S_MAX = 15.0, 15.0


@asynccontextmanager
async def api_replica(
    cluster: Cluster,
    log: Path,
    *,
    shard_urls: Sequence[str] = (),
    redis_url: str = "",
    **settings: str,
) -> AsyncIterator[str]:
    """
    The URL of a replica that is ready, on the cluster's shards and Redis unless others are given.

    Args:
        log: The file it writes to.
        settings: Of its environment.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environ = {
        **cluster.environ,
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "SHARD_URLS": ",".join(shard_urls or cluster.shard_urls),
        "REDIS_URL": redis_url or cluster.secret("redis_url"),
        "JWT_SECRET": cluster.secret("jwt_secret"),
        **settings,
    }
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "services.api", env=environ, stdout=output, stderr=output
        )

    async def is_ready() -> bool:
        assert process.returncode is None, f"it ended: see {log}"
        async with httpx.AsyncClient() as http:
            try:
                return (await http.get(f"{url}/readyz")).status_code == 200
            except httpx.TransportError:
                return False

    try:
        await eventually(is_ready, within_s=START_S_MAX, what="the replica is ready")
        yield url
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), STOP_S_MAX)
