"""The composition root of an API replica: the only module that creates things."""

import asyncio
import signal
import socket
from contextlib import AsyncExitStack
from functools import partial

import structlog
import uvloop
from starlette.applications import Starlette

from services.api.announcements import Announcements
from services.api.connection import Connection
from services.api.endpoints import Api, endpoints
from services.api.exchange import Others, the_rest
from services.api.quota import Quota, count_in_memory, count_operations
from services.api.schema import SchemaError, unwrapped
from services.api.settings import ApiSettings
from services.api.shards import Shards
from services.api.top import Top
from services.api.upkeep import Retention, export
from services.api.writes import Writes
from shared.edge import Edge
from shared.garbage import collect_seldom
from shared.leaderboard import Leaderboard
from shared.log import configure_logging
from shared.loop import measure_loop
from shared.operations import operations_routes
from shared.redis import open_redis
from shared.server import HttpServer, listen
from shared.settings import SettingsError, exit_with
from shared.token import TokenVerifier

REDIS_TIMEOUT_S = 0.25
"""For one answer of Redis: it takes part of a millisecond, and a score need not wait for it."""

GRACE_S = 10
"""For requests in flight when the replica is told to end; each ends within its own deadlines."""

log = structlog.get_logger()


def main() -> None:
    """Run one API replica until SIGTERM or SIGINT."""
    try:
        settings = ApiSettings.from_environ()
        configure_logging(service="scoreboard-api", level=settings.log_level)
        door = listen("PORT", settings.host, settings.port)
        with unwrapped():
            uvloop.run(serve(settings, door))
    except (SettingsError, SchemaError) as error:
        exit_with(error)


async def serve(settings: ApiSettings, door: socket.socket) -> None:
    """
    Connect everything, serve on ``door``, and let go of it in reverse order.

    Raises:
        SchemaError: If a shard is not as this version needs it.
    """
    async with AsyncExitStack() as stack:
        shards = await stack.enter_async_context(Shards.connect(settings.shard_urls))
        await shards.check()
        redis = open_redis(settings.redis_url, timeout_s=REDIS_TIMEOUT_S)
        stack.push_async_callback(redis.aclose)
        leaderboard = Leaderboard(redis)
        verifier = TokenVerifier(settings)
        announcements = Announcements(shards, leaderboard)
        writes = Writes(shards)
        retention = Retention(settings.shard_urls, settings.operation_retention)
        api = Api(
            verifier=verifier,
            update_quota=Quota(
                "update",
                settings.update_rate_limit,
                redis,
                count_operations(settings.update_rate_limit, shards),
            ),
            top_quota=Quota(
                "top",
                settings.top_rate_limit,
                redis,
                count_in_memory(settings.top_rate_limit),
            ),
            writes=writes,
            announcer=announcements,
            top=Top(shards, leaderboard),
            score_increment_max=settings.score_increment_max,
        )
        edge = Edge(settings.trusted_proxies)
        server = HttpServer(
            Others(operations(shards), edge),
            grace_s=GRACE_S,
            protocol=partial(Connection, endpoints(api), edge),
        )
        loop = asyncio.get_running_loop()
        for ending in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(ending, server.handle_exit, ending, None)
        # A background task that fails takes the replica down with it: better than half a replica.
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(announcements.keep_true()),
                tasks.create_task(shards.keep_complete()),
                tasks.create_task(retention.keep_pruned()),
                tasks.create_task(export(shards)),
                tasks.create_task(measure_loop()),
            ]
            if verifier.key_set is not None:
                background.append(tasks.create_task(verifier.key_set.follow()))
            collect_seldom()
            log.info("api.started", host=settings.host, port=settings.port)
            await server.serve([door])
            await writes.drain()
            await announcements.drain()
            for task in background:
                task.cancel()
        log.info("api.stopped")


def operations(shards: Shards) -> Starlette:
    """What only operators ask."""

    def readiness() -> str | None:
        # A shard that is away takes its own users with it, never the replica.
        return None if shards.is_known else "no shard has answered yet"

    return the_rest(operations_routes(readiness))
