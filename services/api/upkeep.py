"""What replicas do for their shards beside serving: old operations are removed, gauges are kept.

What removed operations carried is kept as a sum. One replica at a time does a shard, in steps so
small and so far apart that writers do not notice.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from datetime import datetime

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from services.api import metrics, schema
from services.api.engine import open_engine, sql
from services.api.shards import DATABASE_FAILURES, Shards

PERIOD_S = 600.0
"""Between two passes of a replica, give or take half of it, so that replicas do not meet. A pass
reads all of `score_ops`; a row that is removed some minutes late harms nobody."""

BATCH_ROWS = 200
"""Removed by one statement: a few milliseconds of one of the server's processors."""

STRETCH_BLOCKS = 128
"""Of 8 KB, looked at by one statement: a millisecond where there is nothing to remove."""

REST = 9.0
"""After each statement, as many times what it took: the job has at most a tenth of one session's
time."""

STATEMENT_TIMEOUT_S = 10.0
"""Of one step, on a shard that is busy with something else."""

EXPORT_PERIOD_S = 5.0
"""Between two looks at what the shards say of themselves: oftener than metrics are scraped."""

_PRUNE = sql("prune.sql")

# Also false where another replica is about to be done with it.
_DUE = """
    SELECT pruned_at IS NULL OR pruned_at < LOCALTIMESTAMP - make_interval(secs => $1)
    FROM upkeep
"""

_BLOCKS = """
    SELECT pg_relation_size(inhrelid) / current_setting('block_size')::bigint
    FROM pg_inherits
    WHERE inhparent = 'score_ops'::regclass AND inhrelid = to_regclass($1) AND NOT inhdetachpending
"""

_TRY_LOCK, _UNLOCK = "SELECT pg_try_advisory_lock($1)", "SELECT pg_advisory_unlock($1)"

_DONE = "UPDATE upkeep SET pruned_at = LOCALTIMESTAMP, oldest_operation_at = $1"

log = structlog.get_logger()


class Retention:
    """The job that removes operations older than some seconds."""

    def __init__(self, shard_urls: Sequence[str], seconds: float) -> None:
        """
        Args:
            seconds: How long an operation is kept. Its key means nothing after that.
        """
        self._urls = shard_urls
        self._seconds = seconds

    async def keep_pruned(self) -> None:
        """Prune every shard, for as long as the replica lives; one that is away delays no other."""
        async with asyncio.TaskGroup() as tasks:
            for shard in range(len(self._urls)):
                tasks.create_task(self._keep_pruned(shard))

    async def _keep_pruned(self, shard: int) -> None:
        while True:
            await asyncio.sleep(PERIOD_S * random.uniform(0.5, 1.5))  # noqa: S311 - no secret
            try:
                removed = await self.prune(shard, not_within_s=PERIOD_S / 2)
            except DATABASE_FAILURES as error:
                metrics.PRUNE_FAILURES.labels(shard).inc()
                log.warning("retention.failed", shard=shard, error=repr(error))
            else:
                if removed is not None:
                    log.info("retention.done", shard=shard, removed=removed)

    async def prune(self, shard: int, *, not_within_s: float = 0.0) -> int | None:
        """
        Remove every old operation of a shard, partition by partition.

        Args:
            not_within_s: Do nothing if the last pass, anybody's, ended less than this ago.

        Returns:
            How many were removed; None if somebody else is at it, or has been.
        """
        # An engine of its own: the connections of requests are few, and a pass may take minutes.
        engine = open_engine(
            self._urls[shard],
            statement_timeout_s=STATEMENT_TIMEOUT_S,
            lock_timeout_s=STATEMENT_TIMEOUT_S,
        )
        try:
            async with engine.connect() as connection:
                await connection.execution_options(isolation_level="AUTOCOMMIT")
                due = await connection.exec_driver_sql(_DUE, (not_within_s,))
                if not due.scalar_one():
                    return None
                # Lost in a crash, a step is done again: it need not wait for the disk.
                await connection.exec_driver_sql("SET synchronous_commit = off")
                return await self._pass(connection, shard)
        finally:
            await engine.dispose()

    async def _pass(self, connection: AsyncConnection, shard: int) -> int | None:
        removed, oldest = 0, []
        partitions = list(await schema.owned_partitions(connection))
        # In another order each time: a pass that is interrupted has not always the same ones left.
        random.shuffle(partitions)
        for partition in partitions:
            # For one partition at a time: who wants to move one waits for no more than that.
            # An error leaves the lock to the end of the session.
            taken = await connection.exec_driver_sql(_TRY_LOCK, (schema.PRUNE_LOCK,))
            if not taken.scalar_one():
                log.info("retention.yielded", shard=shard, removed=removed)
                return None
            count, oldest_at = await self._prune_partition(connection, shard, f"p{partition:03}")
            await connection.exec_driver_sql(_UNLOCK, (schema.PRUNE_LOCK,))
            removed += count
            if oldest_at is not None:
                oldest.append(oldest_at)
        await connection.exec_driver_sql(_DONE, (min(oldest, default=None),))
        return removed

    async def _prune_partition(
        self, connection: AsyncConnection, shard: int, partition: str
    ) -> tuple[int, datetime | None]:
        """How many were removed, and when the oldest of the others was written."""
        blocks = await connection.exec_driver_sql(_BLOCKS, (f"score_ops_{partition}",))
        end = blocks.scalar_one_or_none() or 0  # None: it has been moved away meanwhile.
        statement = _PRUNE.format(partition=partition)
        place, removed, oldest = (0, 0), 0, []
        while place[0] < end:
            stretch_end = (place[0] + STRETCH_BLOCKS, 0)
            began = time.monotonic()
            done = await connection.exec_driver_sql(
                statement, (place, stretch_end, self._seconds, BATCH_ROWS)
            )
            row = done.one()
            metrics.PRUNED.labels(shard).inc(row.removed)
            removed += row.removed
            if row.oldest_kept_at is not None:
                oldest.append(row.oldest_kept_at)
            place = row.last if row.removed == BATCH_ROWS else stretch_end
            await asyncio.sleep(REST * (time.monotonic() - began))
        return removed, min(oldest, default=None)


async def export(shards: Shards) -> None:
    """Show whether each shard answers, and how its last audit and its last pruning ended, for ever."""
    async with asyncio.TaskGroup() as tasks:
        for shard in range(shards.count):
            tasks.create_task(_export(shards, shard))


async def _export(shards: Shards, shard: int) -> None:
    while True:
        try:
            upkeep = await shards.upkeep(shard)
        except DATABASE_FAILURES as error:
            metrics.SHARD_UP.labels(shard).set(0)
            log.warning("upkeep.unknown", shard=shard, error=repr(error))
        else:
            metrics.SHARD_UP.labels(shard).set(1)
            metrics.AUDIT_FINISHED.labels(shard).set(upkeep.audited_at)
            metrics.AUDIT_DIFFERENCES.labels(shard).set(upkeep.differences)
            metrics.OLDEST_OPERATION.labels(shard).set(upkeep.oldest_operation_at)
        await asyncio.sleep(EXPORT_PERIOD_S)
