"""A pool of connections to one shard, whose sessions are durable, in UTC, and give up in time."""

from importlib.resources import files

from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

POOL_CONNECTIONS = 4
"""A replica's connections to a shard: one writes, the others read the top and count operations."""

POOL_WAIT_S = 0.25
CONNECT_TIMEOUT_S = 0.5

LOCK_TIMEOUT_S = 0.1
"""A row is held for as long as a commit takes; whoever holds it longer must not stop a batch."""

STATEMENT_TIMEOUT_S = 0.5
"""What a statement of a request may take before it counts as failed; on both sides of the
connection, so that a statement nobody waits for any more ends as well."""


def sql(name: str) -> str:
    """The statement in that file of the folder ``sql``."""
    return files("services.api").joinpath("sql", name).read_text(encoding="utf-8")


def open_engine(
    url: str,
    *,
    statement_timeout_s: float = STATEMENT_TIMEOUT_S,
    lock_timeout_s: float = LOCK_TIMEOUT_S,
) -> AsyncEngine:
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
                "lock_timeout": f"{lock_timeout_s * 1000:.0f}",
                # `record.sql` relies on seeing what was committed while it waited for a row.
                "default_transaction_isolation": "read committed",
                # A plan made for each batch's own parameters is the same one, 200 µs later.
                "plan_cache_mode": "force_generic_plan",
                # A compiled plan never pays for statements this short.
                "jit": "off",
            },
        },
    )
