"""Log lines as JSON on stdout, with the field names of the Elastic Common Schema (ECS 8).

No line ever carries a token, a body or a query string: who logs names the fields one by one.
"""

import logging
import sys
from contextvars import ContextVar

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Of the request that a line is about: whatever is logged on its way has it."""

ECS_VERSION = "8.17.0"

_FIELDS = {
    "event": "message",
    "level": "log.level",
    "timestamp": "@timestamp",
    "request_id": "http.request.id",
    "method": "http.request.method",
    "path": "url.path",
    "status": "http.response.status_code",
    "error": "error.message",
    "exception": "error.stack_trace",
}
"""Our short names, and what ECS calls them."""


def _about(_logger: WrappedLogger, _method: str, line: EventDict) -> EventDict:
    request_id = REQUEST_ID.get()
    return line if request_id is None else {"request_id": request_id, **line}


def _to_ecs(_logger: WrappedLogger, _method: str, line: EventDict) -> EventDict:
    return {_FIELDS.get(name, name): value for name, value in line.items()}


def configure_logging(*, service: str, level: str) -> None:
    """
    Send everything, also what libraries log, to stdout as JSON lines.

    Args:
        service: ``service.name`` of every line, such as ``scoreboard-api``.
        level: ``debug``, ``info``, ``warning`` or ``error``.
    """

    def identify(_logger: WrappedLogger, _method: str, line: EventDict) -> EventDict:
        return {**line, "service.name": service, "ecs.version": ECS_VERSION}

    common: list[Processor] = [
        _about,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        identify,
        _to_ecs,
    ]
    structlog.configure(
        processors=[*common, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stdout),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=common,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    # Libraries speak at warning and above: uvicorn's info lines carry `?token=` (measured), and
    # nobody reads asyncio's.
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
