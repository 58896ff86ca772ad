"""The audit: whether every score is the sum of its operations."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncConnection

from services.api import schema
from services.api.engine import open_engine, sql
from services.api.partition import PARTITIONS

STATEMENT_TIMEOUT_S = 300.0
"""For one partition: a 256th of all operations is read and sorted by user."""

LOCK_TIMEOUT_S = 10.0
"""For a partition that vacuum shortens or that is being moved. Nobody waits for the audit."""

_AUDIT = sql("audit.sql")
_REPORT = "UPDATE upkeep SET audited_at = LOCALTIMESTAMP, users = $1, differences = $2"


@dataclass(frozen=True, slots=True)
class Difference:
    """A user whose score is not the sum of the operations.

    Attributes:
        shard: The shard's place in SHARD_URLS.
        score: None where there are operations and no score.
        total: The sum of the operations, removed ones included.
    """

    user_id: str
    shard: int
    score: int | None
    total: int


@dataclass(frozen=True, slots=True)
class Findings:
    """What an audit found.

    Attributes:
        users: How many were compared.
        differences: In the order of shards and partitions.
    """

    users: int
    differences: Sequence[Difference]


async def audit(shard_urls: Sequence[str], advanced: Callable[[], None]) -> Findings:
    """
    Compare every user's score with the sum of the operations, and leave each shard its result.

    Each partition is compared in one snapshot, so that the result holds under load; shards are
    read side by side.

    Args:
        advanced: Called after each of the 256 partitions.

    Raises:
        SchemaError: If a shard has another schema, or partitions are missing or move meanwhile.
    """
    async with AsyncExitStack() as stack:
        shards = []
        for url in shard_urls:
            engine = open_engine(
                url, statement_timeout_s=STATEMENT_TIMEOUT_S, lock_timeout_s=LOCK_TIMEOUT_S
            )
            stack.push_async_callback(engine.dispose)
            shard = await stack.enter_async_context(engine.connect())
            # A snapshot a statement, and none kept: the audit does not hold vacuum up.
            shards.append(await shard.execution_options(isolation_level="AUTOCOMMIT"))
        for number, shard in enumerate(shards):
            await schema.check(shard, f"Shard {number}")
        owned = await _owned(shards)
        audits = [
            asyncio.create_task(_audit_shard(number, shard, owned[number], advanced))
            for number, shard in enumerate(shards)
        ]
        try:
            found = await asyncio.gather(*audits)
        finally:  # After one has failed the others still use their connections.
            for one in audits:
                one.cancel()
            await asyncio.gather(*audits, return_exceptions=True)
        if await _owned(shards) != owned:
            raise schema.SchemaError("Partitions were moved during the audit: run it again.")
        for shard, findings in zip(shards, found, strict=True):
            await shard.exec_driver_sql(_REPORT, (findings.users, len(findings.differences)))
    return Findings(
        users=sum(findings.users for findings in found),
        differences=[one for findings in found for one in findings.differences],
    )


async def _owned(shards: Sequence[AsyncConnection]) -> list[set[int]]:
    owned = [await schema.owned_partitions(shard) for shard in shards]
    schema.check_placement(owned)
    if missing := PARTITIONS - sum(map(len, owned)):
        raise schema.SchemaError(
            f"{missing} of {PARTITIONS} partitions are attached on none of the {len(shards)} "
            "shards: one is missing from SHARD_URLS, or a partition is being moved."
        )
    return owned


async def _audit_shard(
    number: int, shard: AsyncConnection, partitions: set[int], advanced: Callable[[], None]
) -> Findings:
    users = 0
    differences = []
    for partition in sorted(partitions):
        result = await shard.exec_driver_sql(_AUDIT.format(partition=f"p{partition:03}"))
        row = result.one()
        users += row.users
        differences += [
            Difference(user_id, number, score, total)
            for user_id, score, total in zip(
                row.user_ids or (), row.scores or (), row.totals or (), strict=True
            )
        ]
        advanced()
    return Findings(users, differences)
