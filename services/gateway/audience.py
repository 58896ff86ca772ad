"""Everyone who is shown the board: three kinds of connections, their caps, the door they come in by."""

import asyncio
import logging
import resource
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import structlog
from picows import WSCloseCode, WSProtocolError

from services.gateway import metrics
from services.gateway.caps import AcceptRate, Caps
from services.gateway.clients import RECEIVE_ONLY, Clients, deflated, frame
from services.gateway.handshake import Door
from services.gateway.settings import LiveSettings
from services.gateway.streams import event
from shared.board import Board, live_message
from shared.edge import Edge
from shared.token import Claims

SEND_BUFFER_BYTES = 16 * 1024
"""The kernel's, a connection. Holds the largest board (10 names of 255 characters) and some twenty
usual ones; by default it grows to megabytes, where boards would grow old unseen."""

FILES_RESERVED = 1000
"""Beside the clients: requests in flight (500, and 256 just accepted), Redis, operations. They must
never run out: out of files, aiofastnet 1.2 fails in its own error handling and spins."""

log = structlog.get_logger()


class Audience:
    """
    The connections of one process.

    Attributes:
        caps: How many there may be, and whose.
        door: Who comes in.
    """

    def __init__(
        self,
        settings: LiveSettings,
        edge: Edge,
        verify: Callable[[str], Claims],
        files_reserved: int = FILES_RESERVED,
    ) -> None:
        """
        Args:
            files_reserved: Open files that are not for connections.
        """
        logging.getLogger("picows").addFilter(_ours_to_mend)
        self._compress = settings.compression
        self._drain_seconds = settings.drain_seconds
        self.caps = Caps(
            total=_connections_max(settings.connections_max, files_reserved),
            per_user=settings.connections_per_user_max,
            per_address=settings.connections_per_address_max,
        )
        self.door = Door(
            Clients(self.caps, "websocket"),
            Clients(self.caps, "websocket-deflate"),
            Clients(self.caps, "sse"),
            self.caps,
            AcceptRate(settings.handshakes_per_second_max, asyncio.get_running_loop().time()),
            edge,
            settings.allowed_origins,
            settings.compression,
            verify,
        )
        kinds = self.door.kinds
        metrics.CONNECTIONS.set_function(lambda: len(self))
        metrics.CONNECTIONS_MAX.set(self.caps.total)
        metrics.STALLED.set_function(lambda: sum(kind.stalled for kind in kinds))
        metrics.USERS.set_function(lambda: self.caps.users)
        metrics.OPENINGS.set_function(lambda: len(self.door.openings))

    def __len__(self) -> int:
        return self.door.connections

    @property
    def draining(self) -> bool:
        """Whether everyone is being sent away."""
        return self.door.sockets.draining

    def publish(self, board: Board) -> None:
        """Show everyone this board, which is newer than the one before."""
        message = live_message(board)
        metrics.BOARD_BYTES.set(len(message))
        self.door.sockets.publish(frame(message))
        if self._compress:
            self.door.deflated.publish(frame(deflated(message), compressed=True))
        self.door.streams.publish(event(board.position, message))

    def jobs(self) -> list[Coroutine[Any, Any, None]]:
        """What has to run as long as anyone is here."""
        return [job for kind in self.door.kinds for job in (kind.broadcast(), kind.keep_time())]

    async def drain(self) -> None:
        """Send everyone away, spread over ``DRAIN_SECONDS``."""
        await asyncio.gather(*(kind.drain(self._drain_seconds) for kind in self.door.kinds))


def _ours_to_mend(record: logging.LogRecord) -> bool:
    """Leave out what a client did wrong: it got its close code, and could fill the log.

    For the contract a frame too long to be read is a frame like any other. picows would close with
    1009, but asks its exception only after it has logged it; there is no other place to say so.
    """
    error = sys.exception()
    if isinstance(error, WSProtocolError) and error.args[0] == WSCloseCode.MESSAGE_TOO_BIG:
        error.args = (WSCloseCode.POLICY_VIOLATION, RECEIVE_ONLY)
    return not str(record.msg).startswith("WS parser error")


def _connections_max(wanted: int, reserved: int) -> int:
    """As many as the limit of open files allows, which is raised as far as it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + reserved
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        log.warning("connections.limited", wanted=wanted, open_files_max=hard)
    return min(wanted, max(allowed - reserved, allowed // 2))
