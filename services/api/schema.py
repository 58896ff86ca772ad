"""The schema of every shard: migrated to one revision, and every partition placed exactly once."""

import re
from collections.abc import Sequence
from contextlib import AsyncExitStack

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncConnection

from services.api.engine import open_engine
from services.api.partition import PARTITIONS

TABLES = ("user_scores", "score_ops")

STEP_TIMEOUT_S = 60.0
"""Of one step of a migration, or of waiting for another run."""

MIGRATION_LOCK = 5_072_611_364
"""Key of the advisory lock that lets one migration run at a time; any number will do."""

# In the middle of a move one table's partition may be attached and the other's not.
_OWNED = text(
    """
    SELECT pg_get_expr(child.relpartbound, child.oid) AS bound
    FROM pg_inherits JOIN pg_class child ON child.oid = inhrelid
    WHERE inhparent = ANY (CAST(:parents AS regclass[])) AND NOT inhdetachpending
    GROUP BY bound
    HAVING count(*) = :tables
    """
)

# Attached or not: a partition that a move has detached is still somebody's data.
_TABLES_PRESENT = text(
    r"SELECT relname FROM pg_class WHERE relkind = 'r' AND relname ~ '^user_scores_p\d{3}$'"
)


_REMAINDER = re.compile(r"remainder (\d+)")


class SchemaError(Exception):
    """A shard is not as this version needs it; the text is one line for a person."""


def _alembic(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", "services.api:migrations")
    config.attributes["connection"] = connection
    return config


def head() -> str:
    """The revision this version of the code needs."""
    revision = ScriptDirectory.from_config(_alembic()).get_current_head()
    assert revision is not None, "the package ships at least one revision"  # noqa: S101
    return revision


async def migrate(shard_urls: Sequence[str]) -> None:
    """
    Bring every shard to the newest revision, and place the partitions of a cluster without any.

    Safe to run at any time and from several places at once.

    Raises:
        SchemaError: If the shards' partitions contradict each other.
    """
    async with AsyncExitStack() as stack:
        shards = []
        for url in shard_urls:
            engine = open_engine(
                url, statement_timeout_s=STEP_TIMEOUT_S, lock_timeout_s=STEP_TIMEOUT_S
            )
            stack.push_async_callback(engine.dispose)
            shards.append(await stack.enter_async_context(engine.connect()))
        # Of the session: it ends with the connection, whatever happens. The first shard's stands
        # for all of them, so that two runs cannot wait for each other.
        await shards[0].execute(text("SELECT pg_advisory_lock(:key)"), {"key": MIGRATION_LOCK})
        for shard in shards:
            await shard.run_sync(lambda sync: command.upgrade(_alembic(sync), "head"))
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


def check_placement(claims: Sequence[set[int]]) -> None:
    """
    Check that no partition is attached on two shards.

    Raises:
        SchemaError: Naming the partition and the two shards, by their place in SHARD_URLS.
    """
    for number, claim in enumerate(claims):
        for other in range(number):
            if twice := claim & claims[other]:
                raise SchemaError(
                    f"Partition {min(twice)} is attached on shards {other} and {number}."
                )


async def owned_partitions(shard: AsyncConnection) -> set[int]:
    """The partitions whose every table a shard has attached, by its catalog: there is no other map."""
    tables = {"parents": list(TABLES), "tables": len(TABLES)}
    bounds = (await shard.scalars(_OWNED, tables)).all()
    return {int(match[1]) for bound in bounds if (match := _REMAINDER.search(bound))}


async def check(shard: AsyncConnection, name: str) -> None:
    """
    Check that a shard has this version's schema and keeps what it has acknowledged.

    Args:
        name: What the error calls the shard.

    Raises:
        SchemaError: If it does not.
    """
    revision = await shard.run_sync(
        lambda sync: MigrationContext.configure(sync).get_current_revision()
    )
    if revision != head():
        raise SchemaError(
            f"{name} has schema revision {revision}, this version needs {head()}; "
            "run `scoreboard migrate`."
        )
    for setting in ("fsync", "full_page_writes"):
        if (
            await shard.scalar(text("SELECT current_setting(:setting)"), {"setting": setting})
            != "on"
        ):
            raise SchemaError(
                f"{name} runs with {setting}=off: it could lose scores it has acknowledged."
            )
