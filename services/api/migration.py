"""Bringing every shard to the newest schema, and every partition of a new cluster to a shard.

Apart from :mod:`services.api.schema`, because a replica only looks: alembic is a sixth of what it
would have to load before it is back.
"""

from collections.abc import Sequence
from contextlib import AsyncExitStack

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from services.api.engine import open_engine
from services.api.partition import PARTITIONS
from services.api.schema import (
    HEAD,
    TABLES,
    SchemaError,
    check_placement,
    owned_partitions,
    unusable,
)

STEP_TIMEOUT_S = 60.0
"""Of one step of a migration, or of waiting for another run."""

MIGRATION_LOCK = 5_072_611_364
"""Key of the advisory lock that lets one migration run at a time; any number will do."""

# Attached or not: a partition that a move has detached is still somebody's data.
_TABLES_PRESENT = text(
    r"SELECT relname FROM pg_class WHERE relkind = 'r' AND relname ~ '^user_scores_p\d{3}$'"
)


def configuration(connection: Connection | None = None) -> Config:
    """Alembic's, for the revisions of this package."""
    config = Config()
    config.set_main_option("script_location", "services.api:migrations")
    config.attributes["connection"] = connection
    return config


async def migrate(shard_urls: Sequence[str]) -> None:
    """
    Bring every shard to the newest revision, and place the partitions of a cluster without any.

    Safe to run at any time and from several places at once.

    Raises:
        SchemaError: If a shard cannot be used or is of a later version, or the shards' partitions
            contradict each other.
    """
    async with AsyncExitStack() as stack:
        shards = []
        for number, url in enumerate(shard_urls):
            engine = open_engine(
                url, statement_timeout_s=STEP_TIMEOUT_S, lock_timeout_s=STEP_TIMEOUT_S
            )
            stack.push_async_callback(engine.dispose)
            try:
                shards.append(await stack.enter_async_context(engine.connect()))
            except (OSError, SQLAlchemyError) as error:
                name = f"Shard {number} of SHARD_URLS ({engine.url.host})"
                raise unusable(name, error) from error
        # Of the session: it ends with the connection, whatever happens. The first shard's stands
        # for all of them, so that two runs cannot wait for each other.
        await shards[0].execute(text("SELECT pg_advisory_lock(:key)"), {"key": MIGRATION_LOCK})
        for number, shard in enumerate(shards):
            try:
                await shard.run_sync(lambda sync: command.upgrade(configuration(sync), "head"))
            except CommandError as error:
                raise SchemaError(
                    f"Shard {number} of SHARD_URLS has a schema revision that this version does "
                    f"not know; it knows up to {HEAD}: use the version that made it, or a later one."
                ) from error
            await shard.commit()
        await _place(shards)


async def _place(shards: Sequence[AsyncConnection]) -> None:
    """Spread the partitions of a cluster that has none: remainder modulo number of shards."""
    present: set[int] = set()
    for shard in shards:
        present |= {int(name[-3:]) for name in (await shard.scalars(_TABLES_PRESENT)).all()}
    missing = sorted(set(range(PARTITIONS)) - present)
    if missing and present:
        raise SchemaError(
            f"{len(missing)} of {PARTITIONS} partitions are on none of the {len(shards)} shards; "
            "is a shard missing from SHARD_URLS?"
        )
    for remainder in missing:
        for table in TABLES:
            await shards[remainder % len(shards)].execute(
                text(
                    f"CREATE TABLE {table}_p{remainder:03} PARTITION OF {table} "
                    f"FOR VALUES WITH (MODULUS {PARTITIONS}, REMAINDER {remainder})"
                )
            )
    # Together and last: a shard that cannot create its own leaves the others without any.
    for shard in shards:
        await shard.commit()
    check_placement([await owned_partitions(shard) for shard in shards])
