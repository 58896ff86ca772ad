"""Who is let in, and what the others are told."""

import asyncio
import json
import re
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key

from services.gateway.handshake import OPENINGS_MAX
from shared.token import mint
from tests.gateway.harness import (
    SECRET,
    UPGRADE,
    Gateway,
    RawClient,
    Scores,
    next_score,
    read_answer,
    running_gateway,
    token,
)
from tests.openapi import check_refusal
from tests.valkey import Valkey

LIVE = "/scores/live"
UNAUTHORIZED = b'{"status":"error","message":"Unauthorized"}'
PAIR = "scoreboard.v1, bearer."


@pytest.mark.parametrize(
    ("query", "headers", "echoed"),
    [
        pytest.param("?token={}", {}, None, id="query"),
        pytest.param("?x=1&token={}", {}, None, id="query among others"),
        pytest.param("", {"Authorization": "Bearer {}"}, None, id="header"),
        pytest.param("", {"Authorization": "bearer {}"}, None, id="header in lower case"),
        pytest.param("", {"Sec-WebSocket-Protocol": PAIR + "{}"}, "scoreboard.v1", id="protocol"),
        pytest.param(
            "?token={}",
            {"Sec-WebSocket-Protocol": "scoreboard.v1"},
            "scoreboard.v1",
            id="query and protocol",
        ),
        pytest.param("?token={}", {"Authorization": "Basic eDp5"}, None, id="query behind Basic"),
        pytest.param("?token={}", {"Connection": "keep-alive, Upgrade"}, None, id="Firefox"),
    ],
)
async def test_one_valid_token_is_accepted_wherever_it_stands(
    gateway: Gateway, query: str, headers: dict[str, str], echoed: str | None
) -> None:
    """Each way to carry the token works, and only the name of the protocol is echoed."""
    good = token()
    given = {name: value.format(good) for name, value in headers.items()}

    answer = await gateway.get(LIVE + query.format(good), UPGRADE | given)

    assert answer.status == 101
    assert answer.headers.get("sec-websocket-protocol") == echoed
    assert good not in str(answer.headers)


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        pytest.param("", {}, id="none"),
        pytest.param("?token=", {}, id="empty"),
        pytest.param("?token=%FF%00", {}, id="bytes"),
        pytest.param("?token=a.b.c", {}, id="not a token"),
        pytest.param("?token={}x", {}, id="bad signature"),
        pytest.param("?token={}&token={}", {}, id="twice in the query"),
        pytest.param("?token={}", {"Authorization": "Bearer {}"}, id="query and header"),
        pytest.param("?token={}", {"Sec-WebSocket-Protocol": PAIR + "{}"}, id="query and protocol"),
        pytest.param(
            "", {"Sec-WebSocket-Protocol": PAIR + "{}, bearer.{}"}, id="twice in the protocol"
        ),
        pytest.param("?Token={}", {}, id="other parameter"),
        pytest.param("", {"Authorization": "{}"}, id="header without scheme"),
    ],
)
async def test_any_other_token_is_refused_with_401(
    gateway: Gateway, query: str, headers: dict[str, str]
) -> None:
    """No token, two tokens or a bad one: always the same answer."""
    good = token()
    given = {name: value.replace("{}", good) for name, value in headers.items()}

    answer = await gateway.get(LIVE + query.replace("{}", good), UPGRADE | given)

    assert (answer.status, answer.body) == (401, UNAUTHORIZED)
    assert answer.headers["content-type"] == "application/json"
    check_refusal(answer.status, answer.headers, answer.body)


async def test_an_expired_token_is_refused_with_401(gateway: Gateway) -> None:
    """Expiry is checked at the handshake, too."""
    answer = await gateway.get(f"{LIVE}?token={mint(SECRET, 'ana', -1)}", UPGRADE)

    assert (answer.status, answer.body) == (401, UNAUTHORIZED)


@pytest.mark.filterwarnings("ignore::jwt.warnings.InsecureKeyLengthWarning")
@pytest.mark.parametrize("algorithm", ["none", "HS384", "HS512", "RS256"])
async def test_a_token_of_another_algorithm_is_refused_with_401(
    gateway: Gateway, algorithm: str
) -> None:
    """The key has one algorithm; what the token's header says changes nothing."""
    key: Any = {"none": None, "RS256": generate_private_key(65537, 2048)}.get(algorithm, SECRET)
    payload = {"sub": "ana", "exp": time.time() + 3600}
    bearer = jwt.encode(payload, key, algorithm=algorithm)

    answer = await gateway.get(f"{LIVE}?token={bearer}", UPGRADE)

    assert (answer.status, answer.body) == (401, UNAUTHORIZED)


async def test_another_path_is_404(gateway: Gateway) -> None:
    """There is one endpoint, and its path is exact."""
    for path in ("/", "/scores/live/", "/livez", "/metrics", "//scores/live"):
        answer = await gateway.get(f"{path}?token={token()}", UPGRADE)

        assert answer.status == 404
        assert json.loads(answer.body) == {"status": "error", "message": "Not found"}


async def test_a_plain_get_is_told_to_upgrade_once_it_is_authorized(gateway: Gateway) -> None:
    """Without a token it is 401, with one 426."""
    stranger = await gateway.get(LIVE)
    known = await gateway.get(f"{LIVE}?token={token()}")

    assert stranger.status == 401
    assert known.status == 426
    assert known.headers["upgrade"] == "websocket"
    assert json.loads(known.body) == {"status": "error", "message": "Upgrade required"}


@pytest.mark.parametrize(
    ("header", "value"),
    [
        pytest.param("Sec-WebSocket-Version", "8", id="old version"),
        pytest.param("Sec-WebSocket-Key", "c2hvcnQ=", id="short key"),
        pytest.param("Sec-WebSocket-Key", "\xe9", id="key not base64"),
        pytest.param("Upgrade", "h2c", id="other protocol"),
        pytest.param("Connection", "close", id="no upgrade"),
    ],
)
async def test_a_wrong_upgrade_is_refused_in_our_words(
    gateway: Gateway, header: str, value: str
) -> None:
    """The answer says what would do, and quotes nothing."""
    answer = await gateway.get(f"{LIVE}?token={token()}", UPGRADE | {header: value})

    assert answer.status == 426
    assert answer.headers["sec-websocket-version"] == "13"
    check_refusal(answer.status, answer.headers, answer.body)


async def test_the_request_id_is_nginx_s_or_a_new_one(gateway: Gateway) -> None:
    """Every answer carries one; a strange one is not repeated."""
    given = await gateway.get(LIVE, {"X-Request-ID": "0123456789abcdef0123456789abcdef"})
    made = await gateway.get(LIVE)
    strange = await gateway.get(f"{LIVE}?token={token()}", UPGRADE | {"X-Request-ID": "\xff<b>"})

    assert given.headers["x-request-id"] == "0123456789abcdef0123456789abcdef"
    assert re.fullmatch("[0-9a-f]{32}", made.headers["x-request-id"])
    assert strange.status == 101
    assert re.fullmatch("[0-9a-f]{32}", strange.headers["x-request-id"])


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        pytest.param("GET {} HTTP/1.0\r\nHost: x\r\n\r\n", 505, id="HTTP/1.0"),
        pytest.param("GET {} HTTP/1.1 x\r\nHost: x\r\n\r\n", 400, id="malformed line"),
        pytest.param("GET {} HTTP/1.1\r\n{}\r\n\r\n", 400, id="malformed header"),
        pytest.param("POST {} HTTP/1.1\r\nHost: x\r\n\r\n", 405, id="POST"),
        pytest.param("GET {} HTTP/1.1\r\nContent-Length: 2\r\n\r\n{{}}", 400, id="body"),
        pytest.param("GET {} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 400, id="chunked"),
        pytest.param("GET {} HTTP/1.1\r\nX: " + "x" * 20_000, 431, id="head that goes on"),
        pytest.param("\x16\x03\x01\x02\x00{}\r\n\r\n", 400, id="TLS"),
    ],
)
async def test_what_is_no_request_is_refused_in_our_words(
    gateway: Gateway, request_: str, status: int
) -> None:
    """And in none of the client's: its token may be among them."""
    secret = token()
    client = await RawClient.open(gateway.port)
    client.writer.write(request_.format(f"{LIVE}?token={secret}", secret).encode("latin-1"))

    answer = await read_answer(client.reader)
    await client.ended()

    assert answer.status == status
    assert secret not in str(answer)
    check_refusal(answer.status, answer.headers, answer.body)


async def test_a_request_that_never_ends_is_told_so(gateway: Gateway) -> None:
    """After five seconds, however many of its bytes come meanwhile."""
    begun = time.monotonic()
    client = await RawClient.open(gateway.port)
    client.writer.write(b"GET /scores/live HTTP/1.1\r\nHost:")
    drip = asyncio.create_task(drip_into(client))
    async with asyncio.timeout(8):
        answer = await read_answer(client.reader)
    drip.cancel()

    assert answer.status == 408
    assert 4.5 < time.monotonic() - begun < 6
    check_refusal(answer.status, answer.headers, answer.body)
    client.writer.close()


async def drip_into(client: RawClient) -> None:
    """A byte now and then."""
    while True:
        await asyncio.sleep(0.2)
        client.writer.write(b"x")


async def test_unfinished_requests_take_no_place_of_others(gateway: Gateway) -> None:
    """The oldest of too many ends for the newest."""
    idle = [await RawClient.open(gateway.port) for _ in range(OPENINGS_MAX + 100)]
    async with gateway.connect() as client:
        await next_score(client)
    assert await gateway.metric("openings") <= OPENINGS_MAX

    for unfinished in idle[:50]:
        with pytest.raises((ConnectionResetError, EOFError)):
            await unfinished.reader.readexactly(1)
    for unfinished in idle:
        unfinished.writer.close()


async def test_a_page_of_another_origin_is_refused(
    valkey: Valkey, scores: Scores, tmp_path: Path
) -> None:
    """Where a list of origins is set; programs, which send none, are let in."""
    allowed = {"ALLOWED_ORIGINS": "https://scores.example, https://Other.example:8443"}
    async with running_gateway(valkey.url, tmp_path / "log", **allowed) as gateway:
        await gateway.ready()
        for origin, status in {
            "https://scores.example": 101,
            "https://SCORES.example": 101,
            "https://other.example:8443": 101,
            "https://other.example": 403,
            "http://scores.example": 403,
            "https://scores.example.evil.example": 403,
            "null": 403,
            "": 403,
        }.items():
            answer = await gateway.get(f"{LIVE}?token={token()}", UPGRADE | {"Origin": origin})
            assert answer.status == status, origin
            if status == 403:
                check_refusal(answer.status, answer.headers, answer.body)
        assert (await gateway.get(f"{LIVE}?token={token()}", UPGRADE)).status == 101
        # Also before anything is said of a token.
        assert (await gateway.get(LIVE, {"Origin": "https://evil.example"})).status == 403
        async with gateway.stream(headers={"Origin": "https://scores.example"}) as page:
            name = "access-control-allow-origin"
            assert page.answer.headers[name] == "https://scores.example"


async def test_more_than_the_rate_are_asked_to_come_later(
    valkey: Valkey, scores: Scores, tmp_path: Path
) -> None:
    """Before any work on a token; bad tokens do not use up the rate."""
    rate = {"HANDSHAKES_PER_SECOND_MAX": "3"}
    async with running_gateway(valkey.url, tmp_path / "log", **rate) as gateway:
        await gateway.ready()
        for _ in range(5):
            assert (await gateway.get(f"{LIVE}?token=bad", UPGRADE)).status == 401
        answers = [await gateway.get(f"{LIVE}?token={token()}", UPGRADE) for _ in range(9)]
        statuses = [answer.status for answer in answers]
        refused = [answer for answer in answers if answer.status == 503]
        assert 3 <= statuses.count(101) <= 5
        assert len(refused) == 9 - statuses.count(101)
        for answer in refused:
            check_refusal(answer.status, answer.headers, answer.body)
            assert 1 <= int(answer.headers["retry-after"]) <= 5
        await asyncio.sleep(1)
        assert (await gateway.get(f"{LIVE}?token={token()}", UPGRADE)).status == 101


async def test_only_a_trusted_proxy_names_the_client(
    valkey: Valkey, scores: Scores, tmp_path: Path
) -> None:
    """Else anybody could have any address, and any request id."""
    settings = {"CONNECTIONS_PER_ADDRESS_MAX": "2", "TRUSTED_PROXIES": "192.0.2.0/24"}
    named = {"X-Request-ID": "0123456789abcdef0123456789abcdef"}
    async with (
        running_gateway(valkey.url, tmp_path / "log", **settings) as gateway,
        AsyncExitStack() as stack,
    ):
        await gateway.ready()
        statuses = [
            (
                await stack.enter_async_context(
                    gateway.stream(token(f"user-{number}"), {"X-Real-IP": f"198.51.100.{number}"})
                )
            ).answer.status
            for number in range(3)
        ]
        assert statuses == [200, 200, 429]
        answer = await gateway.get(LIVE, named)
        assert answer.headers["x-request-id"] != named["X-Request-ID"]


async def test_half_a_handshake_disturbs_nobody(gateway: Gateway) -> None:
    """A request that never ends, and bytes that are none, leave the others alone."""
    half = await RawClient.open(gateway.port)
    half.writer.write(b"GET /scores/live HTTP/1.1\r\nHost:")
    noise = await RawClient.open(gateway.port)
    noise.writer.write(bytes(range(256)) * 100)

    answer = await gateway.get(f"{LIVE}?token={token()}", UPGRADE)

    assert answer.status == 101
    half.writer.close()
    noise.writer.close()
