"""One gateway process, from its settings to its end. The only module that creates things."""

import asyncio
import socket
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any

import structlog
import uvloop
from starlette.applications import Starlette

from services.gateway import metrics
from services.gateway.audience import SEND_BUFFER_BYTES, Audience
from services.gateway.feed import Feed
from services.gateway.leases import Leases
from services.gateway.settings import GatewaySettings
from shared.edge import Edge
from shared.ending import Ending
from shared.log import configure_logging
from shared.loop import measure_loop
from shared.operations import operations_routes
from shared.redis import open_redis
from shared.server import HttpServer, listen
from shared.settings import SettingsError, exit_with
from shared.token import TokenVerifier

BOARD_AGE_MAX_S = 5.0
"""A gateway whose board is unconfirmed for longer is not ready.

Readiness is for whoever has a choice: a gateway cut off from Redis must not get clients that a
connected one could serve. Where Redis is away from all of them none is ready, and that costs
nobody anything: connections stay, the last board stays, handshakes are still accepted (Nginx does
not ask), and liveness, which alone restarts, does not look at Redis.
"""

REDIS_TIMEOUT_S = 1.0
"""To connect, and to answer: a read is repeated each second anyhow."""

CANCEL_AGAIN_S = 2 * REDIS_TIMEOUT_S
"""A cancellation that meets a task amid an error of Redis may be lost on it (seen once in a drain
of 5,000 clients): the process would never end."""

OPERATIONS_SHUTDOWN_S = 2
"""How long the end waits for a scrape under way."""

log = structlog.get_logger()


def main() -> None:
    """Run until a signal; what cannot start ends with one sentence and status 1."""
    try:
        settings = GatewaySettings.from_environ()
        configure_logging(service="scoreboard-gateway", level=settings.log_level)
        door = listen("PORT", settings.host, settings.port, send_buffer_bytes=SEND_BUFFER_BYTES)
        operations = listen("OPERATIONS_PORT", settings.host, settings.operations_port)
    except SettingsError as error:
        exit_with(error)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings, door, operations))


async def serve(settings: GatewaySettings, door: socket.socket, operations: socket.socket) -> None:
    """Run the gateway on two bound sockets: until a signal, then drained, or until a second one."""
    verifier = TokenVerifier(settings)
    redis = open_redis(settings.redis_url, timeout_s=REDIS_TIMEOUT_S)
    audience = Audience(settings, Edge(settings.trusted_proxies), verifier.verify)
    feed = Feed(redis, audience.publish)
    metrics.BOARD_AGE_S.set_function(lambda: feed.age_s)
    metrics.FEED_CONNECTED.set_function(lambda: feed.subscribed)

    def readiness() -> str | None:
        if audience.draining:
            return "draining"
        if feed.board is None:
            return "no board yet"
        if feed.age_s > BOARD_AGE_MAX_S:
            return f"the board is unconfirmed since {feed.age_s:.0f} s"
        return None

    jobs: list[Coroutine[Any, Any, None]] = [
        *audience.jobs(),
        feed.follow(),
        feed.compare(),
        Leases(redis, audience.caps).keep(),
        measure_loop(),
    ]
    if verifier.key_set is not None:
        jobs.append(verifier.key_set.follow())

    ending = Ending()
    async with aclosing(redis), asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(job) for job in jobs]
        inside = HttpServer(
            Starlette(routes=[*operations_routes(readiness), ending.route]),
            grace_s=OPERATIONS_SHUTDOWN_S,
        )
        tasks.create_task(inside.serve([operations]))
        server = await audience.door.open(door)
        log.info("gateway.started", port=settings.port, operations_port=settings.operations_port)
        await ending.asked()
        log.info("gateway.draining", connections=len(audience))
        server.close()
        await ending.unless_asked_again(audience.drain())
        log.info("gateway.stopped", connections=len(audience))
        inside.should_exit = True
        while pending := [task for task in running if not task.done()]:
            for task in pending:
                task.cancel()
            await asyncio.wait(pending, timeout=CANCEL_AGAIN_S)
