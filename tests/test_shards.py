"""The statement that adds to scores, and the map of partitions, on real shards."""

import asyncio
import re
from collections.abc import AsyncIterator, Sequence

import asyncpg
import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import inspect
from sqlalchemy.ext.asyncio import create_async_engine

from services.api import migration, schema
from services.api.partition import PARTITIONS, partition_of
from services.api.shards import Limit, Moved, NoOwner, Operation, Recorded, Refusal, Shards
from services.api.submission import SCORE_MAX
from services.api.writes import NotWritten, Writes
from tests.cluster import Cluster, eventually


@pytest.fixture
async def shards(cluster: Cluster) -> AsyncIterator[Shards]:
    """The shards of the cluster, as an API replica has them."""
    async with Shards.connect(cluster.shard_urls) as shards:
        await shards.check()
        yield shards


def users_on(shards: Shards, shard: int, user: str, count: int) -> list[str]:
    """Users of that shard."""
    users = (f"{user}-{number}" for number in range(10_000))
    found = [one for one in users if shards.shard_of(one) == shard]
    return found[:count]


def scores(outcomes: Sequence[object]) -> list[object]:
    """The score of each recorded outcome, and the others as they are."""
    return [one.score if isinstance(one, Recorded) else one for one in outcomes]


async def test_a_batch_adds_each_increment_in_turn(shards: Shards, user: str) -> None:
    """Of one user several; each answer says the score right after it."""
    ana, ben = users_on(shards, 0, user, 2)
    batch = [Operation(ana, "1", 5), Operation(ben, "1", 7), Operation(ana, "2", 3)]
    outcomes = await shards.record(0, batch)

    assert scores(outcomes) == [5, 7, 8]
    latest = [one.latest.score for one in outcomes if isinstance(one, Recorded)]
    assert latest == [8, 7, 8]


async def test_a_replayed_batch_adds_nothing(shards: Shards, user: str) -> None:
    """And answers as the first time, whatever has been added since."""
    ana, ben = users_on(shards, 0, user, 2)
    batch = [Operation(ana, "1", 5), Operation(ben, "1", 7)]
    await shards.record(0, batch)
    await shards.record(0, [Operation(ana, "2", 100)])
    again = await shards.record(0, [*batch, Operation(ben, "2", 1), Operation(ana, "1", 6)])

    assert scores(again) == [5, 7, 8, Refusal.KEY_REUSED]
    assert (await shards.scores_of([ana]))[ana].score == 105


async def test_a_score_too_high_is_refused_alone(shards: Shards, user: str) -> None:
    """Its neighbours in the batch are added, of other users and of the same."""
    ana, ben = users_on(shards, 0, user, 2)
    outcomes = await shards.record(
        0,
        [
            Operation(ana, "1", SCORE_MAX),
            Operation(ben, "1", 1),
            Operation(ana, "2", SCORE_MAX),
            Operation(ana, "3", 1),
        ],
    )

    assert scores(outcomes) == [SCORE_MAX, 1, Refusal.SCORE_TOO_HIGH, Refusal.SCORE_TOO_HIGH]


async def test_a_user_of_another_shard_is_not_added_here(shards: Shards, user: str) -> None:
    """PostgreSQL itself refuses what is not the shard's; the others in the batch are added."""
    (here,), (there,) = users_on(shards, 0, user, 1), users_on(shards, 1, user, 1)
    outcomes = await shards.record(0, [Operation(there, "1", 1), Operation(here, "1", 1)])

    assert scores(outcomes) == [Moved(), 1]
    assert there not in await shards.scores_of([there])


async def test_the_sum_of_the_operations_is_the_score(
    cluster: Cluster, shards: Shards, user: str
) -> None:
    """After concurrent batches from two replicas, some of them twins of each other."""
    users = users_on(shards, 0, user, 10)
    batches = [[Operation(one, str(n), n) for one in users] for n in range(1, 30)]
    async with Shards.connect(cluster.shard_urls) as other:
        await other.refresh_owners()
        replicas = [Writes(shards), Writes(other)]
        await asyncio.gather(
            *(replica.submit(one) for replica in replicas for batch in batches for one in batch)
        )
    connection = await asyncpg.connect(cluster.shard_urls[0])
    rows = await connection.fetch(
        """
        SELECT held.score, sum(kept.delta)::integer AS total, max(kept.score) AS last
        FROM user_scores AS held JOIN score_ops AS kept USING (user_id)
        WHERE user_id = ANY ($1) GROUP BY user_id, held.score
        """,
        users,
    )
    await connection.close()

    assert [tuple(row.values()) for row in rows] == [(sum(range(30)),) * 3] * len(users)


async def test_what_was_spent_is_counted_from_the_operations(shards: Shards, user: str) -> None:
    """For when Redis is away."""
    ana, ben = users_on(shards, 0, user, 2)
    assert await shards.spent(0, [ana], 3600) == {}
    await shards.record(0, [Operation(ana, "1", 1), Operation(ana, "2", 1)])
    spent = await shards.spent(0, [ana, ben, ana], 3600)

    assert {user_id: one.count for user_id, one in spent.items()} == {ana: 2}
    assert 0 <= spent[ana].newest_s <= spent[ana].oldest_s < 60
    assert await shards.spent(0, [ana], 0) == {}


async def test_a_limit_holds_over_concurrent_batches(
    cluster: Cluster, shards: Shards, user: str
) -> None:
    """Of two replicas; a recorded operation is answered as before, and others are not limited."""
    ana, ben = users_on(shards, 0, user, 2)
    limit = Limit(10, 3600)
    limited = [Operation(ana, str(number), 1, limit) for number in range(18)]
    async with Shards.connect(cluster.shard_urls) as other:
        await other.refresh_owners()
        replicas = [Writes(shards), Writes(other)]
        answers = await asyncio.gather(
            *(replicas[number % 2].submit(one) for number, one in enumerate(limited))
        )
    outcomes = scores(answers)
    assert outcomes.count(Refusal.OVER_LIMIT) == 8
    assert sorted(one for one in outcomes if isinstance(one, int)) == list(range(1, 11))

    first = next(
        one for one, answer in zip(limited, answers, strict=True) if isinstance(answer, Recorded)
    )
    again = [first, Operation(ana, "new", 1, limit)]
    mixed = await shards.record(0, [*again, Operation(ben, "1", 1, limit), Operation(ana, "x", 1)])
    assert scores(mixed) == [outcomes[limited.index(first)], Refusal.OVER_LIMIT, 1, 11]


async def test_the_same_operation_twice_in_a_batch(shards: Shards, user: str) -> None:
    """Is sent once; with another increment it is refused."""
    (ana,) = users_on(shards, 0, user, 1)
    writes = Writes(shards)
    await writes.submit(Operation(ana, "0", 1))  # So that what follows is one batch.
    deltas = (5, 5, 6, 5)
    outcomes = await asyncio.gather(*(writes.submit(Operation(ana, "1", one)) for one in deltas))

    assert scores(outcomes) == [6, 6, Refusal.KEY_REUSED, 6]


async def test_a_row_that_somebody_holds_stops_its_own_user_only(
    cluster: Cluster, shards: Shards, user: str
) -> None:
    """Whoever is in the same batch is done at once, and the user is once the row is free."""
    ana, *others = users_on(shards, 0, user, 20)
    writes = Writes(shards)
    await asyncio.gather(*(writes.submit(Operation(one, "0", 1)) for one in (ana, *others)))
    holder = await asyncpg.connect(cluster.shard_urls[0])
    hold = holder.transaction()
    await hold.start()
    await holder.execute("SELECT FROM user_scores WHERE user_id = $1 FOR UPDATE", ana)
    held = asyncio.create_task(writes.submit(Operation(ana, "1", 1)))
    neighbours = (writes.submit(Operation(one, "1", 1)) for one in others)

    assert scores(await asyncio.gather(*neighbours)) == [2] * len(others)
    assert not held.done()
    await hold.rollback()
    await holder.close()
    assert scores([await held]) == [2]


async def test_a_partition_attached_in_one_table_only_is_nobodys(
    cluster: Cluster, shards: Shards, user: str
) -> None:
    """As it is in the middle of a move; its users wait, and then get a clear answer."""
    (ana,) = users_on(shards, 0, user, 1)
    name = f"score_ops_p{partition_of(ana):03}"
    bound = f"FOR VALUES WITH (MODULUS {PARTITIONS}, REMAINDER {partition_of(ana)})"
    source = await asyncpg.connect(cluster.shard_urls[0])
    await source.execute(f"ALTER TABLE score_ops DETACH PARTITION {name} CONCURRENTLY")
    try:
        with pytest.raises(NotWritten):
            await Writes(shards).submit(Operation(ana, "1", 1))
        with pytest.raises(NoOwner):
            shards.shard_of(ana)
    finally:
        await source.execute(f"ALTER TABLE score_ops ATTACH PARTITION {name} {bound}")
        await source.close()
    assert scores([await Writes(shards).submit(Operation(ana, "1", 1))]) == [1]


async def test_a_partition_that_moves_is_followed(
    cluster: Cluster, shards: Shards, user: str
) -> None:
    """A router with the old map is refused by PostgreSQL, waits while nobody owns it, and goes on."""
    (ana,) = users_on(shards, 0, user, 1)
    name = f"p{partition_of(ana):03}"
    bound = f"FOR VALUES WITH (MODULUS {PARTITIONS}, REMAINDER {partition_of(ana)})"
    source, target = [await asyncpg.connect(url) for url in cluster.shard_urls]
    writes = Writes(shards)
    try:
        for table in schema.TABLES:
            await source.execute(
                f"ALTER TABLE {table} DETACH PARTITION {table}_{name} CONCURRENTLY"
            )
        parked = asyncio.create_task(writes.submit(Operation(ana, "1", 5)))
        await asyncio.sleep(0.2)
        assert not parked.done()
        with pytest.raises(NoOwner):
            shards.shard_of(ana)
        for table in schema.TABLES:
            await target.execute(f"CREATE TABLE {table}_{name} PARTITION OF {table} {bound}")

        assert scores([await parked]) == [5]
        assert shards.shard_of(ana) == 1
    finally:
        for table in schema.TABLES:
            await target.execute(f"DROP TABLE IF EXISTS {table}_{name}")
            await source.execute(f"ALTER TABLE {table} ATTACH PARTITION {table}_{name} {bound}")
        await source.close()
        await target.close()


async def test_migrating_again_changes_nothing(cluster: Cluster) -> None:
    """Also twice at the same time."""
    await asyncio.gather(*(migration.migrate(cluster.shard_urls) for _ in range(2)))
    async with Shards.connect(cluster.shard_urls) as shards:
        await shards.check()
        assert shards.is_complete


async def test_a_shard_that_is_missing_from_the_list_is_noticed(cluster: Cluster) -> None:
    """Its partitions are not laid out a second time."""
    with pytest.raises(
        schema.SchemaError, match="128 of 256 partitions are on none of the 1 shards"
    ):
        await migration.migrate(cluster.shard_urls[:1])


async def test_a_migration_waits_for_the_one_under_way(cluster: Cluster) -> None:
    """However long that takes, and then finds nothing to do."""
    holder = await asyncpg.connect(cluster.shard_urls[0])
    await holder.execute("SELECT pg_advisory_lock($1)", migration.MIGRATION_LOCK)
    waiting = asyncio.create_task(migration.migrate(cluster.shard_urls))
    done, _ = await asyncio.wait({waiting}, timeout=1)
    assert not done
    await holder.close()
    await waiting


def test_the_code_needs_the_newest_revision() -> None:
    """What a replica looks for is what a migration leads to."""
    script = ScriptDirectory.from_config(migration.configuration())

    assert script.get_current_head() == schema.HEAD


async def test_another_schema_is_refused(cluster: Cluster) -> None:
    """In one sentence that names the shard and the remedy."""
    plain = cluster.shard_urls[0].rpartition("/")[0] + "/template1"
    async with Shards.connect([plain]) as shards:
        with pytest.raises(
            schema.SchemaError, match=r"^Shard 0 has schema revision None, .* migrate"
        ):
            await shards.check()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (r":[^:@]+@", ":wrong@", "password authentication failed"),
        (r"@.*?/", "@127.0.0.1:1/", "[Cc]onnect"),
        (r"/[^/]*$", "/absent", 'database "absent" does not exist'),
    ],
    ids=["password", "port", "database"],
)
async def test_a_wrong_url_is_refused_by_its_place(
    cluster: Cluster, old: str, new: str, said: str
) -> None:
    """In one sentence, without the password."""
    url = re.sub(old, new, cluster.shard_urls[1])
    with pytest.raises(
        schema.SchemaError, match=f"^Shard 1 of SHARD_URLS .* cannot .*{said}"
    ) as why:
        await migration.migrate([cluster.shard_urls[0], url])
    assert "\n" not in str(why.value)
    assert "wrong" not in str(why.value)


async def test_a_later_schema_is_refused(cluster: Cluster) -> None:
    """A version that does not know it leaves it alone."""
    shard = await asyncpg.connect(cluster.shard_urls[1])
    try:
        await shard.execute("UPDATE alembic_version SET version_num = 'later'")
        with pytest.raises(schema.SchemaError, match=r"^Shard 1 of SHARD_URLS has a schema revis"):
            await migration.migrate(cluster.shard_urls)
    finally:
        await shard.execute("UPDATE alembic_version SET version_num = $1", schema.HEAD)
        await shard.close()


@pytest.mark.parametrize("setting", ["fsync", "full_page_writes"])
async def test_a_shard_that_could_lose_a_commit_is_refused(cluster: Cluster, setting: str) -> None:
    """200 means durable."""
    operator = await asyncpg.connect(cluster.shard_urls[1])

    async def configure(change: str) -> None:
        await operator.execute(change)
        await operator.execute("SELECT pg_reload_conf()")

    async def is_on(wanted: bool) -> bool:
        return (await operator.fetchval(f"SHOW {setting}") == "on") is wanted

    try:
        await configure(f"ALTER SYSTEM SET {setting} = off")
        await eventually(lambda: is_on(False), what=f"{setting} is off")
        async with Shards.connect(cluster.shard_urls) as shards:
            with pytest.raises(schema.SchemaError, match=f"^Shard 1 runs with {setting}=off"):
                await shards.check()
    finally:
        await configure(f"ALTER SYSTEM RESET {setting}")
        await eventually(lambda: is_on(True), what=f"{setting} is on")
        await operator.close()


@pytest.mark.parametrize("table", schema.TABLES)
async def test_the_table_is_the_specifications(cluster: Cluster, table: str) -> None:
    """Columns, types, defaults, key and index, letter by letter; operations beside it."""
    engine = create_async_engine(
        cluster.shard_urls[0].replace("postgresql://", "postgresql+asyncpg://")
    )
    async with engine.connect() as connection:
        columns = await connection.run_sync(lambda sync: inspect(sync).get_columns(table))
        indexes = await connection.exec_driver_sql(
            f"SELECT indexdef FROM pg_indexes WHERE tablename = '{table}' ORDER BY indexname"  # noqa: S608
        )
        definitions = [row[0] for row in indexes]
    await engine.dispose()
    described = {
        column["name"]: (str(column["type"]), column["nullable"], column["default"])
        for column in columns
    }
    assert described["user_id"] == ("VARCHAR(255)", False, None)
    if table == "user_scores":
        assert described["score"] == ("INTEGER", False, "0")
        assert described["last_updated"] == ("TIMESTAMP", False, "CURRENT_TIMESTAMP")
        assert definitions == [
            "CREATE INDEX idx_user_scores_score ON ONLY public.user_scores USING btree (score DESC)",
            "CREATE UNIQUE INDEX user_scores_pkey ON ONLY public.user_scores USING btree (user_id)",
        ]
    else:
        key = {"score_ops": "(user_id, op_id)", "score_ops_pruned": "(user_id)"}[table]
        assert [one.partition(" btree ")[2] for one in definitions] == [key]
