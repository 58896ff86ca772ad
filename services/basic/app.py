"""The composition root: the API's and the gateway's parts in one process, with memory for Redis."""

import asyncio
import socket
from contextlib import AsyncExitStack
from functools import partial

import structlog
import uvloop
from prometheus_client import REGISTRY
from starlette.applications import Starlette

from services.api import metrics as api_metrics
from services.api.endpoints import Api, endpoints
from services.api.exchange import Others, the_rest
from services.api.schema import SchemaError, unwrapped
from services.api.shards import Shards
from services.api.upkeep import Retention, export
from services.api.writes import Writes
from services.basic.board import LocalBoard
from services.basic.bound import bounded
from services.basic.front import CONNECTIONS_MAX, KEEP_ALIVE_S, Front
from services.basic.page import page_routes
from services.basic.quota import LocalQuota, UpdateQuota
from services.basic.settings import BasicSettings
from services.gateway import metrics
from services.gateway.audience import FILES_RESERVED, SEND_BUFFER_BYTES, Audience
from shared.edge import Edge
from shared.ending import Ending
from shared.garbage import collect_seldom
from shared.log import configure_logging
from shared.loop import measure_loop
from shared.operations import operations_routes
from shared.server import HttpServer, listen
from shared.settings import SettingsError, exit_with
from shared.token import TokenVerifier

GRACE_S = 10
"""For requests in flight when it is told to end; each ends within its own deadlines."""

OPERATIONS_SHUTDOWN_S = 2
"""How long the end waits for a scrape under way."""

BOARD_AGE_MAX_S = 5.0
"""A board that PostgreSQL has not confirmed for longer is shown, but not called ready."""

OF_REDIS = (api_metrics.REDIS_UP, metrics.FEED_CONNECTED, metrics.CAPS_SHARED)
"""Metrics that would say that it is away."""

log = structlog.get_logger()


def main() -> None:
    """Run until SIGTERM or SIGINT; what cannot start ends with one sentence and status 1."""
    try:
        settings = BasicSettings.from_environ()
        configure_logging(service="scoreboard-basic", level=settings.log_level)
        door = listen("PORT", settings.host, settings.port, send_buffer_bytes=SEND_BUFFER_BYTES)
        operations = listen("OPERATIONS_PORT", settings.host, settings.operations_port)
        with unwrapped():
            uvloop.run(serve(settings, door, operations))
    except (SettingsError, SchemaError) as error:
        exit_with(error)


async def serve(settings: BasicSettings, door: socket.socket, operations: socket.socket) -> None:
    """
    Serve clients on one socket and operators on the other, until a signal, then drained.

    Raises:
        SchemaError: If the database is not as this version needs it.
    """
    async with AsyncExitStack() as stack:
        urls = [settings.database_url]
        shards = await stack.enter_async_context(Shards.connect(urls))
        await shards.check()
        verifier = TokenVerifier(settings)
        edge = Edge(settings.trusted_proxies)
        reserved = FILES_RESERVED + CONNECTIONS_MAX
        audience = Audience(settings, edge, verifier.verify, files_reserved=reserved)
        board = LocalBoard(shards, audience.publish)
        metrics.BOARD_AGE_S.set_function(lambda: board.age_s)
        metrics.BOARD_VERSION.set_function(lambda: board.board.version if board.board else 0)
        for one in OF_REDIS:
            REGISTRY.unregister(one)
        writes = Writes(shards)
        api = Api(
            verifier=verifier,
            update_quota=UpdateQuota(settings.update_rate_limit, shards),
            top_quota=LocalQuota("top", settings.top_rate_limit),
            writes=writes,
            announcer=board,
            top=board,
            score_increment_max=settings.score_increment_max,
        )
        server = HttpServer(
            Others(the_rest(page_routes()), edge),
            grace_s=GRACE_S,
            protocol=partial(Front, bounded(endpoints(api)), audience.door),
            keep_alive_s=KEEP_ALIVE_S,
        )
        ending = Ending()

        def readiness() -> str | None:
            if audience.draining:
                return "draining"
            if board.board is None:
                return "no board yet"
            if board.age_s > BOARD_AGE_MAX_S:
                return f"the board is unconfirmed since {board.age_s:.0f} s"
            return None

        inside = HttpServer(
            Starlette(routes=[*operations_routes(readiness), ending.route]),
            grace_s=OPERATIONS_SHUTDOWN_S,
        )
        # A background task that fails takes the process down with it: better than half of one.
        async with asyncio.TaskGroup() as tasks:
            background = [
                *map(tasks.create_task, audience.jobs()),
                tasks.create_task(board.keep_true()),
                tasks.create_task(shards.keep_complete()),
                tasks.create_task(Retention(urls, settings.operation_retention).keep_pruned()),
                tasks.create_task(export(shards)),
                tasks.create_task(measure_loop()),
            ]
            if verifier.key_set is not None:
                background.append(tasks.create_task(verifier.key_set.follow()))
            collect_seldom()
            tasks.create_task(inside.serve([operations]))
            serving = tasks.create_task(server.serve([door]))
            log.info("basic.started", port=settings.port, operations_port=settings.operations_port)
            await ending.asked()
            log.info("basic.draining", connections=len(audience))
            server.should_exit = True
            await ending.unless_asked_again(_everyone_gone(audience, serving))
            server.force_exit = True
            await serving
            await writes.drain()
            inside.should_exit = True
            for task in background:
                task.cancel()
        log.info("basic.stopped")


async def _everyone_gone(audience: Audience, serving: asyncio.Task[None]) -> None:
    await audience.drain()
    await asyncio.wait((serving,))
