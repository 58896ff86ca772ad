"""A client of Redis or Valkey, of one server or of a cluster, as ``REDIS_URL`` says.

For a cluster ``redis+cluster://:password@host:6379,host2:6379``: any of its nodes; the others are
asked of them.
"""

from typing import Any, cast
from urllib.parse import unquote, urlsplit

from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster
from redis.asyncio.client import PubSub
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

PORT = 6379

CONNECTIONS = 8
"""Of a process: each of its parts has one command under way at a time."""


def open_redis(url: str, *, timeout_s: float) -> Redis:
    """
    A client; nothing is sent yet, and nothing is tried again.

    Args:
        timeout_s: To connect, and to answer.

    Returns:
        For a cluster, what has the same commands, as far as their keys share a hash tag.
    """
    options: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        # Retrying is decided where it is known to be safe (redis-py would try 10 times).
        "retry": Retry(NoBackoff(), 0),
    }
    scheme, plus, _ = url.partition("+cluster://")
    if not plus:
        pool = BlockingConnectionPool.from_url(
            url, max_connections=CONNECTIONS, timeout=timeout_s, **options
        )
        return Redis.from_pool(pool)
    parts = urlsplit(url)
    user_info, _, hosts = parts.netloc.rpartition("@")
    username, _, password = user_info.partition(":")
    nodes = [urlsplit(f"//{host}") for host in hosts.split(",")]
    cluster = RedisCluster(
        startup_nodes=[ClusterNode(node.hostname or "", node.port or PORT) for node in nodes],
        username=unquote(username) or None,
        password=unquote(password) or None,
        ssl=scheme == "rediss",
        # One shard that is away must not take the others with it.
        require_full_coverage=False,
        **options,
    )
    return cast("Redis", cluster)


async def open_subscription(redis: Redis) -> PubSub:
    """A connection for channels, which of a cluster's nodes all have; any of them will do."""
    if not isinstance(redis, RedisCluster):
        return redis.pubsub()
    await redis.initialize()
    return redis.pubsub(node=redis.get_random_node())
