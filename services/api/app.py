"""The composition root of an API replica: the only module that creates things."""

import asyncio
import gc
import signal
import socket
from contextlib import AsyncExitStack
from functools import partial

import structlog
import uvloop
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from services.api.announcements import Announcements
from services.api.connection import Connection
from services.api.endpoints import Api, endpoints
from services.api.exchange import Others
from services.api.quota import Quota, count_in_memory, count_operations
from services.api.schema import SchemaError
from services.api.settings import ApiSettings
from services.api.shards import Shards
from services.api.top import Top
from services.api.upkeep import Retention, export
from services.api.writes import Writes
from shared.answers import error_body
from shared.edge import Edge
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

GC_THRESHOLD = 50_000
"""New objects between two collections. A request makes hundreds that reference counting frees: at
Python's 700 the collector looks in vain, for a twentieth of the CPU (454 to 432 µs a request)."""

log = structlog.get_logger()


def main() -> None:
    """Run one API replica until SIGTERM or SIGINT."""
    try:
        settings = ApiSettings.from_environ()
        configure_logging(service="scoreboard-api", level=settings.log_level)
        door = listen("PORT", settings.host, settings.port)
        uvloop.run(serve(settings, door))
    except (SettingsError, SchemaError) as error:
        exit_with(error)
    except ExceptionGroup as failures:
        wrong_schema = failures.subgroup(SchemaError)
        if wrong_schema is None:
            raise
        exit_with(wrong_schema.exceptions[0])


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
            announcements=announcements,
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
            gc.collect()
            gc.freeze()  # What is there by now stays: nothing of it needs to be looked at again.
            gc.set_threshold(GC_THRESHOLD)
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

    app = Starlette(
        routes=operations_routes(readiness), exception_handlers={HTTPException: _refuse}
    )
    # `/livez/` is no path of ours; a redirect would make it one.
    app.router.redirect_slashes = False
    return app


async def _refuse(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101
    message = {404: "Not found", 405: "Method not allowed"}.get(error.status_code, error.detail)
    return Response(
        error_body(message), error.status_code, error.headers, media_type="application/json"
    )
