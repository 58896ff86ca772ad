"""Who is let in, and what the others are told."""

import json
import re

import pytest

from shared.token import mint
from tests.gateway.harness import SECRET, UPGRADE, Gateway, RawClient, token
from tests.openapi import check_refusal

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
