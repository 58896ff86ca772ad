"""GET /api/scores/top through Nginx."""

import asyncio

import pytest

from services.api.submission import SCORE_MAX
from tests.cluster import Client, Scoreboard

TOP = "/api/scores/top"


async def leading_score(client: Client) -> int:
    """Above all others, but for who has all that a column holds."""
    scores = [row["score"] for row in await client.top() if row["score"] < SCORE_MAX]
    return max(scores, default=0) + 10


async def test_the_top_shows_scores_in_order(client: Client, user: str) -> None:
    """Ranks from 1 without gaps; who scored is on it at once."""
    score = await leading_score(client)
    assert (await client.post(user, score)).status == 200
    rows = await client.top()

    row = next(row for row in rows if row["score"] == score)
    assert row == {"userId": user, "score": score, "rank": rows.index(row) + 1}
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) <= 10


async def test_on_equal_scores_who_was_first(client: Client, user: str) -> None:
    """Whatever the names, and on whatever shard."""
    score = await leading_score(client)
    users = [f"{user}-{letter}" for letter in "cab"]
    for one in users:
        await client.post(one, score)

    assert [row["userId"] for row in await client.top() if row["score"] == score] == users


async def test_a_board_that_has_not_changed_is_not_sent_again(client: Client) -> None:
    """ETag and Cache-Control let others hold it for a second."""
    first = await client.request("GET", TOP)
    again = await client.request("GET", TOP, headers={"If-None-Match": first.headers["ETag"]})

    assert first.headers["Cache-Control"] == "public, max-age=1, s-maxage=1"
    assert (again.status, again.body) == (304, b"")
    assert again.headers["ETag"] == first.headers["ETag"]


@pytest.mark.loopback
async def test_anyone_may_read_a_hundred_times_an_hour(cluster: Scoreboard) -> None:
    """By address; another address, or a token, has its own quota."""
    async with cluster.client("127.0.0.77") as client:
        answers = await asyncio.gather(*(client.request("GET", TOP) for _ in range(101)))
        refused = [answer for answer in answers if answer.status != 200]
        assert [answer.status for answer in refused] == [429]
        assert refused[0].json == {"status": "error", "message": "Too many requests"}
        assert int(refused[0].headers["Retry-After"]) > 3500
        await client.top()
        forged = {"X-Forwarded-For": "127.0.0.99", "X-Real-IP": "127.0.0.99"}
        assert (await client.request("GET", TOP, headers=forged)).status == 429
        bad = {"Authorization": "Bearer nonsense"}
        assert (await client.request("GET", TOP, headers=bad)).status == 429
    async with cluster.client("127.0.0.78") as client:
        assert (await client.request("GET", TOP)).status == 200


async def test_head_is_a_get_without_a_body(client: Client) -> None:
    """As HTTP has it."""
    answer = await client.request("HEAD", TOP)

    assert (answer.status, answer.body) == (200, b"")
