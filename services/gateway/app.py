"""One gateway process, from its settings to its end. The only module that creates things."""

import asyncio
import logging
import resource
import signal
import socket
import sys
from collections.abc import Coroutine
from typing import Any

import structlog
import uvloop
from picows import WSCloseCode, WSProtocolError, ws_create_server
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from starlette.applications import Starlette

from services.gateway import metrics
from services.gateway.clients import RECEIVE_ONLY, Clients
from services.gateway.feed import Feed
from services.gateway.handshake import Handshake
from services.gateway.settings import GatewaySettings
from shared.log import configure_logging
from shared.loop import measure_loop
from shared.operations import operations_routes
from shared.server import BACKLOG, HttpServer, listen
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

FRAME_BYTES_MAX = 1024
"""Of what is read of a frame, which bounds what a connection may make us keep. A client may send
nothing, but control frames hold up to 125 bytes. Whoever announces a frame up to this long and
never ends it has until the next pong is due."""

HANDSHAKE_TIMEOUT_S = 5.0

READ_BUFFER_BYTES = 2048
"""A connection's, kept all its life: picows's least, and room for the usual request."""

SEND_BUFFER_BYTES = 16 * 1024
"""The kernel's, a connection. Holds the largest board (10 names of 255 characters) and some twenty
usual ones; by default it grows to megabytes, where boards would grow old unseen."""

FILES_RESERVED = 1000
"""Beside the clients: handshakes in flight, Redis, operations. They must never run out: out of
files, aiofastnet 1.2 fails in its own error handling and spins."""

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
    connections_max = _connections_max(settings.connections_max)
    clients = Clients(limit=connections_max, limit_per_user=settings.connections_per_user_max)
    verifier = TokenVerifier(settings)
    redis = Redis.from_url(
        settings.redis_url,
        socket_timeout=REDIS_TIMEOUT_S,
        socket_connect_timeout=REDIS_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),  # The feed does it again by itself.
    )
    feed = Feed(redis, clients.publish)
    metrics.CONNECTIONS.set_function(lambda: len(clients))
    metrics.CONNECTIONS_MAX.set(connections_max)
    metrics.STALLED.set_function(lambda: clients.stalled)
    metrics.BOARD_AGE_S.set_function(lambda: feed.age_s)
    metrics.FEED_CONNECTED.set_function(lambda: feed.subscribed)

    def readiness() -> str | None:
        if clients.draining:
            return "draining"
        if feed.board is None:
            return "no board yet"
        if feed.age_s > BOARD_AGE_MAX_S:
            return f"the board is unconfirmed since {feed.age_s:.0f} s"
        return None

    jobs: list[Coroutine[Any, Any, None]] = [
        clients.broadcast(),
        clients.keep_time(),
        feed.follow(),
        feed.compare(),
        measure_loop(),
    ]
    if verifier.key_set is not None:
        jobs.append(verifier.key_set.follow())

    signals = _signals()
    async with redis, asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(job) for job in jobs]
        inside = HttpServer(
            Starlette(routes=operations_routes(readiness)), grace_s=OPERATIONS_SHUTDOWN_S
        )
        tasks.create_task(inside.serve([operations]))
        server = await ws_create_server(
            Handshake(clients, verifier.verify),
            sock=door,
            backlog=BACKLOG,
            websocket_handshake_timeout=HANDSHAKE_TIMEOUT_S,
            # An adapter, because of a plain logger picows makes a child for every connection.
            logger_name=logging.LoggerAdapter(logging.getLogger("picows"), {}),
            # Ours are cheaper, and stop for a client that takes nothing.
            enable_auto_ping=False,
            enable_auto_pong=False,
            max_frame_size=FRAME_BYTES_MAX,
            read_buffer_init_size=READ_BUFFER_BYTES,
        )
        log.info("gateway.started", port=settings.port, operations_port=settings.operations_port)
        await signals.get()
        log.info("gateway.draining", connections=len(clients))
        server.close()
        draining = tasks.create_task(clients.drain(settings.drain_seconds))
        again = tasks.create_task(signals.get())
        await asyncio.wait({draining, again}, return_when=asyncio.FIRST_COMPLETED)
        log.info("gateway.stopped", connections=len(clients))
        inside.should_exit = True
        for task in (*running, draining, again):
            task.cancel()


def _signals() -> asyncio.Queue[signal.Signals]:
    received: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, received.put_nowait, number)
    return received
