"""One gateway process, from its settings to its end. The only module that creates things."""

import asyncio
import logging
import resource
import signal
import socket
import sys
from collections.abc import Coroutine, Iterable
from contextlib import aclosing
from typing import Any

import structlog
import uvloop
from picows import WSCloseCode, WSProtocolError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from services.gateway import metrics
from services.gateway.caps import AcceptRate, Caps
from services.gateway.clients import RECEIVE_ONLY, Clients, deflated, frame
from services.gateway.feed import Feed
from services.gateway.handshake import Door
from services.gateway.leases import Leases
from services.gateway.settings import GatewaySettings
from services.gateway.streams import event
from shared.board import Board, live_message
from shared.edge import Edge
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

SEND_BUFFER_BYTES = 16 * 1024
"""The kernel's, a connection. Holds the largest board (10 names of 255 characters) and some twenty
usual ones; by default it grows to megabytes, where boards would grow old unseen."""

FILES_RESERVED = 1000
"""Beside the clients: requests in flight (500, and 256 just accepted), Redis, operations. They must
never run out: out of files, aiofastnet 1.2 fails in its own error handling and spins."""

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
        door = listen("PORT", settings.host, settings.port)
        operations = listen("OPERATIONS_PORT", settings.host, settings.operations_port)
    except SettingsError as error:
        exit_with(error)
    logging.getLogger("picows").addFilter(_ours_to_mend)
    door.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # accept() inherits it
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings, door, operations))


def _ours_to_mend(record: logging.LogRecord) -> bool:
    """Leave out what a client did wrong: it got its close code, and could fill the log.

    For the contract a frame too long to be read is a frame like any other. picows would close with
    1009, but asks its exception only after it has logged it; there is no other place to say so.
    """
    error = sys.exception()
    if isinstance(error, WSProtocolError) and error.args[0] == WSCloseCode.MESSAGE_TOO_BIG:
        error.args = (WSCloseCode.POLICY_VIOLATION, RECEIVE_ONLY)
    return not str(record.msg).startswith("WS parser error")


def _connections_max(wanted: int) -> int:
    """As many as the limit of open files allows, which is raised as far as it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + FILES_RESERVED
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        log.warning("connections.limited", wanted=wanted, open_files_max=hard)
    return min(wanted, max(allowed - FILES_RESERVED, allowed // 2))


async def serve(settings: GatewaySettings, door: socket.socket, operations: socket.socket) -> None:
    """Run the gateway on two bound sockets: until a signal, then drained, or until a second one."""
    caps = Caps(
        total=_connections_max(settings.connections_max),
        per_user=settings.connections_per_user_max,
        per_address=settings.connections_per_address_max,
    )
    sockets: Clients = Clients(caps, "websocket")
    compressed: Clients = Clients(caps, "websocket-deflate")
    streams: Clients = Clients(caps, "sse")
    verifier = TokenVerifier(settings)
    loop = asyncio.get_running_loop()
    redis = open_redis(settings.redis_url, timeout_s=REDIS_TIMEOUT_S)

    def publish(board: Board) -> None:
        message = live_message(board)
        metrics.BOARD_BYTES.set(len(message))
        sockets.publish(frame(message))
        if settings.compression:
            compressed.publish(frame(deflated(message), compressed=True))
        streams.publish(event(board.position, message))

    feed = Feed(redis, publish)
    leases = Leases(redis, caps)
    entrance = Door(
        sockets,
        compressed,
        streams,
        caps,
        AcceptRate(settings.handshakes_per_second_max, loop.time()),
        Edge(settings.trusted_proxies),
        settings.allowed_origins,
        settings.compression,
        verifier.verify,
    )
    metrics.CONNECTIONS.set_function(lambda: entrance.connections)
    metrics.CONNECTIONS_MAX.set(caps.total)
    metrics.STALLED.set_function(lambda: sum(kind.stalled for kind in entrance.kinds))
    metrics.USERS.set_function(lambda: caps.users)
    metrics.OPENINGS.set_function(lambda: len(entrance.openings))
    metrics.BOARD_AGE_S.set_function(lambda: feed.age_s)
    metrics.FEED_CONNECTED.set_function(lambda: feed.subscribed)

    def readiness() -> str | None:
        if sockets.draining:
            return "draining"
        if feed.board is None:
            return "no board yet"
        if feed.age_s > BOARD_AGE_MAX_S:
            return f"the board is unconfirmed since {feed.age_s:.0f} s"
        return None

    jobs: list[Coroutine[Any, Any, None]] = [
        *(job for kind in entrance.kinds for job in (kind.broadcast(), kind.keep_time())),
        feed.follow(),
        feed.compare(),
        leases.keep(),
        measure_loop(),
    ]
    if verifier.key_set is not None:
        jobs.append(verifier.key_set.follow())

    signals = _signals()

    async def drain(_request: Request) -> Response:
        if not sockets.draining:
            sockets.draining = True  # At once: asked again, it is no second signal.
            signals.put_nowait(signal.SIGTERM)
        return JSONResponse({"status": "draining"}, 202)

    async with aclosing(redis), asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(job) for job in jobs]
        inside = HttpServer(
            Starlette(
                routes=[*operations_routes(readiness), Route("/drain", drain, methods=["POST"])]
            ),
            grace_s=OPERATIONS_SHUTDOWN_S,
        )
        tasks.create_task(inside.serve([operations]))
        server = await entrance.open(door)
        log.info("gateway.started", port=settings.port, operations_port=settings.operations_port)
        await signals.get()
        log.info("gateway.draining", connections=entrance.connections)
        server.close()
        draining = tasks.create_task(_drain(entrance.kinds, settings.drain_seconds))
        again = tasks.create_task(signals.get())
        await asyncio.wait({draining, again}, return_when=asyncio.FIRST_COMPLETED)
        log.info("gateway.stopped", connections=entrance.connections)
        inside.should_exit = True
        while pending := [task for task in (*running, draining, again) if not task.done()]:
            for task in pending:
                task.cancel()
            await asyncio.wait(pending, timeout=CANCEL_AGAIN_S)


async def _drain(everyone: Iterable[Clients], window_s: float) -> None:
    await asyncio.gather(*(clients.drain(window_s) for clients in everyone))


def _signals() -> asyncio.Queue[signal.Signals]:
    received: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, received.put_nowait, number)
    return received
