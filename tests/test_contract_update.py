"""POST /api/scores/update through Nginx: each row of the contract's table."""

import asyncio
import base64
import json

import httpx2 as httpx
import pytest

from services.api.submission import SCORE_MAX
from shared.token import mint
from tests.cluster import Answer, Client, Scoreboard

UPDATE = "/api/scores/update"


def error(status: int, message: str) -> tuple[int, dict[str, str]]:
    """The status and body of a refusal."""
    return status, {"status": "error", "message": message}


def of(answer: Answer) -> tuple[int, dict[str, str]]:
    """The status and body of an answer."""
    return answer.status, answer.json


UNAUTHORIZED = error(401, "Unauthorized")
INVALID_BODY = error(400, "Invalid request body")
INVALID_INCREMENT = error(400, "Invalid score increment")


async def test_an_increment_is_added(client: Client, user: str) -> None:
    """And the answer says the new score."""
    assert (await client.post(user, 5)).json == {
        "status": "success",
        "message": "Score updated",
        "newScore": 5,
    }
    assert (await client.post(user, 3)).json["newScore"] == 8


async def test_every_answer_says_what_is_left_of_the_quota(client: Client, user: str) -> None:
    """In the usual headers and in the draft's."""
    headers = (await client.post(user)).headers

    assert headers["X-RateLimit-Limit"] == "100"
    assert headers["X-RateLimit-Remaining"] == "99"
    assert headers["X-RateLimit-Reset"] == "3600"
    assert headers["RateLimit"] == '"update";r=99;t=3600'
    assert headers["RateLimit-Policy"] == '"update";q=100;w=3600'


async def test_every_answer_has_one_id_made_by_the_edge(client: Client, user: str) -> None:
    """A client's own is ignored."""
    answers = [
        await client.send(
            user,
            b'{"userId":"%s","scoreIncrement":1}' % user.encode(),
            **{"X-Request-ID": "f" * 32},
        ),
        await client.request("POST", UPDATE),
        await client.request("GET", "/api/nothing"),
        await client.request("GET", "/"),
    ]
    ids = [answer.headers["X-Request-ID"] for answer in answers]

    assert all(len(one) == 32 and one != "f" * 32 for one in ids), ids
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    "authorization",
    [
        pytest.param(None, id="none"),
        pytest.param("", id="empty"),
        pytest.param("Bearer", id="no token"),
        pytest.param("Bearer not.a.token", id="nonsense"),
        pytest.param("Basic YTpi", id="another scheme"),
    ],
)
async def test_without_a_token(client: Client, authorization: str | None) -> None:
    """401, whatever the body."""
    headers = {} if authorization is None else {"Authorization": authorization}
    answer = await client.request("POST", UPDATE, headers=headers, content=b"nonsense")

    assert of(answer) == UNAUTHORIZED
    assert answer.headers["WWW-Authenticate"] == "Bearer"


async def test_with_a_token_that_is_not_believed(
    client: Client, cluster: Scoreboard, user: str
) -> None:
    """Expired, of another key, unsigned: all the same answer."""
    header = base64.urlsafe_b64encode(b'{"alg":"none"}').rstrip(b"=").decode()
    payload = base64.urlsafe_b64encode(json.dumps({"sub": user, "exp": 4e9}).encode()).rstrip(b"=")
    for token in (
        cluster.token(user, ttl_s=-1),
        mint("x" * 32, user, 60),
        f"{header}.{payload.decode()}.",
    ):
        assert of(await client.post(user, token=token)) == UNAUTHORIZED


async def test_with_the_token_of_another_user(
    client: Client, cluster: Scoreboard, user: str
) -> None:
    """Nobody scores for somebody else, however alike the names; and it costs the other nothing."""
    twin = f"{user}\u030a"
    for other in (user.upper(), f" {user}", f"{user} ", twin):
        assert of(await client.post(other, token=cluster.token(user))) == UNAUTHORIZED
    assert (await client.post(user, 1)).json["newScore"] == 1
    assert (await client.post(user, 1)).headers["X-RateLimit-Remaining"] == "98"


async def test_the_hundred_and_first_is_too_many(
    client: Client, cluster: Scoreboard, user: str
) -> None:
    """By the token's subject, over both replicas; nothing is added, and others are not concerned."""
    answers = await asyncio.gather(*(client.post(user) for _ in range(101)))
    refused = [answer for answer in answers if answer.status != 200]

    assert [of(answer) for answer in refused] == [error(429, "Too many requests")]
    assert 3590 < int(refused[0].headers["Retry-After"]) <= 3600
    assert refused[0].headers["X-RateLimit-Remaining"] == "0"
    assert max(a.json["newScore"] for a in answers if a.status == 200) == 100
    assert (await client.post(f"{user}-other")).status == 200


async def test_a_malformed_body_spends_quota(client: Client, user: str) -> None:
    """The limit comes before the body."""
    assert of(await client.send(user, b"nonsense")) == INVALID_BODY
    answer = await client.post(user, 0)

    assert of(answer) == INVALID_INCREMENT
    assert answer.headers["X-RateLimit-Remaining"] == "98"


@pytest.mark.parametrize(
    "increment",
    [
        pytest.param("", id="absent"),
        *(
            pytest.param(f',"scoreIncrement":{value}', id=value[:12])
            for value in [
                "1.0",
                "1e3",
                "true",
                '"5"',
                "null",
                "[1]",
                "0",
                "-1",
                "2147483648",
                "1" * 400,
            ]
        ),
    ],
)
async def test_an_increment_that_is_none(client: Client, user: str, increment: str) -> None:
    """400, and the score stays."""
    body = f'{{"userId":"{user}"{increment}}}'.encode()

    assert of(await client.send(user, body)) == INVALID_INCREMENT
    assert (await client.post(user, 1)).json["newScore"] == 1


async def test_a_score_fits_its_column(client: Client, user: str) -> None:
    """The increment that would lift it over is refused, and a smaller one is not."""
    assert (await client.post(user, SCORE_MAX - 1)).status == 200
    assert of(await client.post(user, 2)) == INVALID_INCREMENT
    assert (await client.post(user, 1)).json["newScore"] == SCORE_MAX


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"nonsense", id="no JSON"),
        pytest.param(b"[]", id="no object"),
        pytest.param(b'{"scoreIncrement":1}', id="no user"),
        pytest.param(b'{"userId":"","scoreIncrement":1}', id="empty user"),
        pytest.param(b'{"userId":"%s","scoreIncrement":1}' % (b"u" * 256), id="long user"),
        pytest.param(rb'{"userId":"\u0000","scoreIncrement":1}', id="NUL"),
        pytest.param(rb'{"userId":"\ud800","scoreIncrement":1}', id="surrogate"),
        pytest.param(b'{"userId":"a","userId":"a","scoreIncrement":1}', id="key twice"),
        pytest.param(b"[" * 3000, id="deep"),
        pytest.param(b'{"userId":"\xff","scoreIncrement":1}', id="not UTF-8"),
    ],
)
async def test_a_body_that_is_none(client: Client, user: str, body: bytes) -> None:
    """400, not 401: whose it is cannot be read."""
    assert of(await client.send(user, body)) == INVALID_BODY


@pytest.mark.parametrize("user_id", ["\U0001f600" * 255, "' OR 1=1 --", 'a/b\\c"d', "\u202e"])
async def test_any_text_can_be_a_user(client: Client, user_id: str) -> None:
    """It is stored and shown as it is."""
    first = (await client.post(user_id, 1)).json["newScore"]

    assert (await client.post(user_id, 1)).json["newScore"] == first + 1


async def test_the_same_key_counts_once(client: Client, user: str) -> None:
    """And answers what the first one answered, also after others."""
    first = await client.post(user, 5, key="once")
    await client.post(user, 3)
    again = await client.post(user, 5, key="once")
    quoted = await client.post(user, 5, key='"once"')

    assert [a.json["newScore"] for a in (first, again, quoted)] == [5, 5, 5]
    assert (await client.post(user, 1)).json["newScore"] == 9


async def test_the_same_key_at_the_same_time_counts_once(client: Client, user: str) -> None:
    """Over both replicas."""
    answers = await asyncio.gather(*(client.post(user, 5, key="once") for _ in range(20)))

    assert {answer.json["newScore"] for answer in answers} == {5}
    assert (await client.post(user, 1)).json["newScore"] == 6


async def test_the_same_key_with_another_increment(client: Client, user: str) -> None:
    """Is a mistake of the client, and adds nothing."""
    await client.post(user, 5, key="once")

    assert of(await client.post(user, 6, key="once")) == error(409, "Idempotency key reused")
    assert (await client.post(user, 1)).json["newScore"] == 6


async def test_the_same_key_of_another_user(client: Client, user: str) -> None:
    """Has nothing to do with it."""
    await client.post(user, 5, key="once")

    assert (await client.post(f"{user}-other", 7, key="once")).json["newScore"] == 7


@pytest.mark.parametrize("key", ["", "a b", "x" * 256])
async def test_a_key_that_is_none(client: Client, user: str, key: str) -> None:
    """Is refused rather than ignored: its user relies on it."""
    assert of(await client.post(user, 1, key=key)) == error(400, "Invalid idempotency key")


async def test_the_rest_of_api_answers_in_the_same_shape(client: Client, user: str) -> None:
    """Whether the API or Nginx refuses."""
    assert of(await client.request("GET", "/api/nothing")) == error(404, "Not found")
    assert of(await client.request("GET", f"{UPDATE}/")) == error(404, "Not found")
    assert of(await client.request("GET", UPDATE)) == error(405, "Method not allowed")
    assert of(await client.request("DELETE", UPDATE)) == error(405, "Method not allowed")
    assert of(await client.send(user, b"x" * 5000)) == error(413, "Request body too large")
    unsupported = await client.send(user, b"a=b", **{"Content-Type": "text/plain"})
    assert of(unsupported) == error(415, "Unsupported media type")


@pytest.mark.parametrize(
    "path", ["/livez", "/readyz", "/metrics", "/docs", "/openapi.json", "/api"]
)
async def test_nothing_else_answers(client: Client, path: str) -> None:
    """Operations are for the inside."""
    answer = await client.request("GET", path)

    assert of(answer) == error(404, "Not found")


async def test_what_is_no_http_is_refused_in_the_same_shape(cluster: Scoreboard) -> None:
    """By Nginx, before it reaches anyone."""
    for head in (
        b"GET /api/scores/top HTTP/1.1\r\n\r\n",
        b"GET /api/scores/top HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 40_000 + b"\r\n\r\n",
        b"POST /api/scores/update HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", cluster.port)
        writer.write(head)
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        assert answer.startswith(b"HTTP/1.1 4"), answer
        assert b'{"status":"error","message":"' in answer


async def test_a_replica_alone_makes_its_own_ids_and_limits(cluster: Scoreboard, user: str) -> None:
    """Where no Nginx stands before it, as in development."""
    host, port = cluster.replicas("api")[0]
    async with httpx.AsyncClient(base_url=f"http://{host}:{port}") as http:
        headers = {
            "Authorization": f"Bearer {cluster.token(user)}",
            "Content-Type": "application/json",
        }
        big = await http.post(UPDATE, headers=headers, content=b"x" * 5000)
        named = await http.post(UPDATE, headers={**headers, "X-Request-ID": "mine"}, content=b"{}")

    assert (big.status_code, big.json()["message"]) == (413, "Request body too large")
    assert len(named.headers["X-Request-ID"]) == 32
