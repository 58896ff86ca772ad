"""The way to a cluster: all that PostgreSQL knows of the users, moved to the cluster's shards.

Nothing is acknowledged that the cluster does not have: from when the copy begins no increment is
written, and from when it is complete PostgreSQL itself refuses whoever still writes to the old place.
A move that fails or is killed before that is undone, and the old place goes on.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from services.api import schema
from services.api.engine import open_engine, sql
from services.api.partition import PARTITIONS
from services.api.quota import open_gap
from services.api.schema import TABLES, SchemaError
from services.basic.settings import MoveSettings
from shared.redis import open_redis

STATEMENT_TIMEOUT_S = 3600.0
"""For the copy of one partition."""

LOCK_TIMEOUT_S = 30.0
"""For increments under way, or a partition that is being pruned; and at the end for readers."""

REDIS_TIMEOUT_S = 5.0
"""It is asked once, and without its answer nothing is moved."""

PIECES_MAX = 8
"""Of a copy, read before they are written; a piece is what the network brings at once."""

_FINGERPRINT = sql("fingerprint.sql")

# Readers go on. Whoever writes waits until the tables have no partition any more.
_FENCE = f"LOCK TABLE {', '.join(TABLES)} IN EXCLUSIVE MODE"


@dataclass(frozen=True, slots=True)
class Moved:
    """What has been moved."""

    users: int
    operations: int


@dataclass(frozen=True, slots=True)
class _Place:
    """A PostgreSQL, its driver, and the partitions it has attached."""

    name: str
    driver: Any
    partitions: set[int]


async def move(settings: MoveSettings, advanced: Callable[[], None]) -> Moved:
    """
    Move every user to the cluster, with scores, operations and their sums.

    Ends what an earlier move, killed at its very end, has left to do.

    Args:
        advanced: Called after each of the 256 partitions.

    Raises:
        SchemaError: If the cluster has users, or either side is not as it should be. Nothing has
            changed then.
    """
    async with AsyncExitStack() as stack:
        redis = open_redis(settings.redis_url, timeout_s=REDIS_TIMEOUT_S)
        stack.push_async_callback(redis.aclose)
        source = await _open(stack, settings.database_url, "The database")
        shards = [
            await _open(stack, url, f"Shard {number}")
            for number, url in enumerate(settings.shard_urls)
        ]
        owners = _owners(shards)
        is_begun = not source.partitions
        if not is_begun:
            await _check_untouched(source, shards)
        # The job that removes old operations waits.
        await source.driver.execute("SELECT pg_advisory_lock($1)", schema.PRUNE_LOCK)
        departure = source.driver.transaction()
        arrivals = [shard.driver.transaction() for shard in shards]
        for transaction in (departure, *arrivals):
            await transaction.start()
        if not is_begun:
            await source.driver.execute(_FENCE)
        users = operations = 0
        for partition in range(PARTITIONS):
            copied = await _copy_partition(source, owners[partition], f"p{partition:03}")
            users += copied["users"]
            operations += copied["operations"]
            advanced()
        if not is_begun:
            await _detach(source)
        # Redis has counted none of it: updates count from their operations, too, for one window.
        await open_gap(redis, "update", settings.update_rate_limit.get_expiry())
        # The old place first: if this ends in between, none has them, and another move goes on.
        for transaction in (departure, *arrivals):
            await transaction.commit()
    return Moved(users, operations)


async def _open(stack: AsyncExitStack, url: str, name: str) -> _Place:
    engine = open_engine(
        url, statement_timeout_s=STATEMENT_TIMEOUT_S, lock_timeout_s=LOCK_TIMEOUT_S
    )
    stack.push_async_callback(engine.dispose)
    try:
        connection: AsyncConnection = await stack.enter_async_context(engine.connect())
    except (OSError, SQLAlchemyError) as error:
        raise schema.unusable(name, error) from error
    await schema.check(connection, name)
    partitions = await schema.owned_partitions(connection)
    await connection.rollback()
    raw = await connection.get_raw_connection()
    return _Place(name, raw.driver_connection, partitions)


def _owners(shards: Sequence[_Place]) -> Mapping[int, _Place]:
    schema.check_placement([shard.partitions for shard in shards])
    owners = {partition: shard for shard in shards for partition in shard.partitions}
    if missing := PARTITIONS - len(owners):
        raise SchemaError(f"{missing} of {PARTITIONS} partitions are on none of the shards.")
    return owners


async def _check_untouched(source: _Place, shards: Sequence[_Place]) -> None:
    if missing := PARTITIONS - len(source.partitions):
        raise SchemaError(f"{missing} of {PARTITIONS} partitions are not in the database.")
    for shard in shards:
        if await shard.driver.fetchval("SELECT EXISTS (SELECT FROM user_scores)"):
            raise SchemaError(f"{shard.name} of the cluster has users already: it must have none.")


async def _copy_partition(source: _Place, target: _Place, partition: str) -> Mapping[str, int]:
    """Returns the partition's fingerprint, which is the same on both sides now."""
    fingerprint = _FINGERPRINT.format(partition=partition)
    wanted: Mapping[str, int] = await source.driver.fetchrow(fingerprint)
    held = await target.driver.fetchrow(fingerprint)
    if not held["users"]:
        for table in TABLES:
            name = f"{table}_{partition}"
            rows = _rows(source.driver, name)
            await target.driver.copy_to_table(name, source=rows, format="binary")
        held = await target.driver.fetchrow(fingerprint)
    if held != wanted:
        raise SchemaError(
            f"{target.name} of the cluster differs in {partition}: it has users of its own, or has been "
            "in use since an earlier move."
        )
    return wanted


async def _rows(driver: Any, table: str) -> AsyncIterator[bytes]:
    """A table as COPY has it, as fast as it is taken."""
    pieces: asyncio.Queue[bytes] = asyncio.Queue(PIECES_MAX)
    reading = asyncio.create_task(driver.copy_from_table(table, output=pieces.put, format="binary"))
    try:
        while not reading.done() or not pieces.empty():
            getting = asyncio.create_task(pieces.get())
            await asyncio.wait((reading, getting), return_when=asyncio.FIRST_COMPLETED)
            if getting.done():
                yield getting.result()
            else:
                getting.cancel()
        reading.result()
    finally:
        reading.cancel()


async def _detach(source: _Place) -> None:
    for table in TABLES:
        for partition in range(PARTITIONS):
            await source.driver.execute(
                f"ALTER TABLE {table} DETACH PARTITION {table}_p{partition:03}"
            )
