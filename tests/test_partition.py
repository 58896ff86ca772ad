"""The partition computed here is the one PostgreSQL puts the row in."""

import asyncpg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.api.partition import PARTITIONS, partition_of
from shared.user_id import is_user_id
from tests.cluster import Cluster

# What the server says of each id; drawn once by hypothesis, asked in one statement.
USER_IDS = st.lists(
    st.text(min_size=1, max_size=255).filter(is_user_id), min_size=200, max_size=200
)


async def mismatches(url: str, user_ids: list[str]) -> list[str]:
    """The ids that PostgreSQL would put elsewhere."""
    connection = await asyncpg.connect(url)
    try:
        rows = await connection.fetch(
            """
            SELECT user_id FROM unnest($1::varchar[], $2::integer[]) AS given (user_id, remainder)
            WHERE NOT satisfies_hash_partition(
                'user_scores'::regclass::oid, $3::integer, remainder, user_id)
            """,
            user_ids,
            [partition_of(user_id) for user_id in user_ids],
            PARTITIONS,
        )
        return [row["user_id"] for row in rows]
    finally:
        await connection.close()


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(user_ids=USER_IDS)
async def test_the_server_agrees(cluster: Cluster, user_ids: list[str]) -> None:
    """For texts of any script and every length modulo the hash's block of 12 bytes."""
    user_ids += ["x" * length for length in range(1, 40)]

    assert await mismatches(cluster.shard_urls[0], user_ids) == []


async def test_the_check_can_fail(cluster: Cluster) -> None:
    """Asked about a neighbouring partition, the server disagrees."""
    connection = await asyncpg.connect(cluster.shard_urls[0])
    try:
        agrees = await connection.fetchval(
            "SELECT satisfies_hash_partition('user_scores'::regclass::oid, $1::int, $2::int, 'u'::varchar)",
            PARTITIONS,
            (partition_of("u") + 1) % PARTITIONS,
        )
    finally:
        await connection.close()
    assert agrees is False
