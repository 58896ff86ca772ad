"""A pool of connections to one shard, whose sessions are durable, in UTC, and give up in time."""

from importlib.resources import files

from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

POOL_CONNECTIONS = 4
"""A replica's connections to a shard: one writes, the others read the top and count operations."""

POOL_WAIT_S = 0.25
CONNECT_TIMEOUT_S = 1.0
LOCK_TIMEOUT_S = 0.5

STATEMENT_TIMEOUT_S = 1.0
"""What a statement of a request may take before it counts as failed; on both sides of the
connection, so that a statement nobody waits for any more ends as well."""


def sql(name: str) -> str:
    """The statement in that file of the folder ``sql``."""
    return files("services.api").joinpath("sql", name).read_text(encoding="utf-8")


def open_engine(url: str, *, statement_timeout_s: float) -> AsyncEngine:
    """An engine for the shard at ``url``; nothing is connected before it is needed."""
    return create_async_engine(
        make_url(url).set(drivername="postgresql+asyncpg"),
        pool_size=POOL_CONNECTIONS,
        max_overflow=0,
        pool_timeout=POOL_WAIT_S,
        connect_args={
            "timeout": CONNECT_TIMEOUT_S,
            "command_timeout": statement_timeout_s,
            "server_settings": {
                "application_name": "scoreboard",
                # `last_updated` has no zone of its own.
                "timezone": "UTC",
                # 200 means durable, whatever the database's default.
                "synchronous_commit": "on",
                "statement_timeout": f"{statement_timeout_s * 1000:.0f}",
                "lock_timeout": f"{LOCK_TIMEOUT_S * 1000:.0f}",
                # A compiled plan never pays for statements this short.
                "jit": "off",
            },
        },
    )
