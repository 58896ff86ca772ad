"""The description of the WebSocket: of the form AsyncAPI 3.0 demands, and its own examples hold."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from services.gateway.clients import Close
from shared.board import BOARD_SIZE, Board, Standing, live_message
from tests.openapi import (
    ASYNCAPI,
    OPENAPI,
    check_close,
    check_live_message,
    check_refusal,
    check_schema,
    resolve,
)

LIVE = ASYNCAPI["channels"]["live"]

# What AsyncAPI 3.0 requires and what it allows in the objects that the document has. Fields that it
# allows and the document does not use are left out: who wants one looks it up and adds it here.
OBJECTS: dict[str, tuple[set[str], set[str]]] = {
    "root": (
        {"asyncapi", "info"},
        {"servers", "defaultContentType", "channels", "operations", "components"},
    ),
    "info": ({"title", "version"}, {"description"}),
    "server": ({"host", "protocol"}, {"pathname", "description", "security"}),
    "channel": (set(), {"address", "title", "description", "servers", "messages", "bindings"}),
    "ws": (set(), {"method", "query", "headers", "bindingVersion"}),
    "operation": ({"action", "channel"}, {"title", "description", "messages"}),
    "message": (set(), {"name", "title", "summary", "contentType", "payload", "examples"}),
    "example": (set(), {"name", "summary", "headers", "payload"}),
    "httpApiKey": ({"type", "name", "in"}, {"description"}),
    "http": ({"type", "scheme"}, {"bearerFormat", "description"}),
    "components": (set(), {"schemas", "messages", "securitySchemes"}),
}


def objects() -> Iterator[tuple[str, dict[str, Any]]]:
    """The document's objects with the names that ``OBJECTS`` has for them."""
    yield "root", ASYNCAPI
    yield "info", ASYNCAPI["info"]
    yield "components", ASYNCAPI["components"]
    yield from (("server", server) for server in ASYNCAPI["servers"].values())
    for channel in ASYNCAPI["channels"].values():
        yield "channel", channel
        yield "ws", channel["bindings"]["ws"]
    yield from (("operation", operation) for operation in ASYNCAPI["operations"].values())
    for message in ASYNCAPI["components"]["messages"].values():
        yield "message", message
        yield from (("example", example) for example in message["examples"])
    for scheme in ASYNCAPI["components"]["securitySchemes"].values():
        yield scheme["type"], scheme


def references(node: Any) -> Iterator[str]:
    """Every ``$ref`` at or below the node."""
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from references(child)


def test_the_document_is_asyncapi_3_0() -> None:
    """Every object has the fields AsyncAPI 3.0 requires and none that it does not know."""
    assert ASYNCAPI["asyncapi"] == "3.0.0"
    for name, value in objects():
        required, optional = OBJECTS[name]
        fields = {field for field in value if not field.startswith("x-")}
        assert required <= fields <= required | optional, name


def test_every_reference_resolves() -> None:
    """No reference leads nowhere."""
    for reference in references(ASYNCAPI):
        assert resolve(ASYNCAPI, {"$ref": reference}), reference


def test_the_server_only_sends() -> None:
    """The one operation sends the one message of the one channel, and nothing is received."""
    (operation,) = ASYNCAPI["operations"].values()
    assert operation["action"] == "send"
    assert operation["channel"] == {"$ref": "#/channels/live"}
    assert operation["messages"] == [{"$ref": "#/channels/live/messages/scoresUpdate"}]
    assert LIVE["address"] == "/scores/live"
    assert set(LIVE["messages"]) == {"scoresUpdate"}


def test_the_binding_is_a_websocket_s() -> None:
    """The handshake is a GET whose query and headers are objects of known properties."""
    binding = LIVE["bindings"]["ws"]
    assert binding["method"] == "GET"
    for part in ("query", "headers"):
        assert binding[part]["type"] == "object"
        assert binding[part]["properties"]


def test_every_carriage_of_the_token_is_a_security_scheme() -> None:
    """The three ways to send the token are in the binding and among the server's schemes."""
    schemes = [resolve(ASYNCAPI, node) for node in ASYNCAPI["servers"]["scoreboard"]["security"]]
    binding = LIVE["bindings"]["ws"]
    named = {scheme["name"] for scheme in schemes if scheme["type"] == "httpApiKey"}
    bearer = {"Authorization" for scheme in schemes if scheme["type"] == "http"}
    carriages = {*binding["query"]["properties"], *binding["headers"]["properties"]}
    assert named | bearer == carriages
    assert len(schemes) == len(carriages)


def test_the_examples_are_allowed_messages() -> None:
    """The document allows the messages it shows."""
    for example in ASYNCAPI["components"]["messages"]["scoresUpdate"]["examples"]:
        check_live_message(json.dumps(example["payload"]))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('{"event":"scoresUpdate"}', id="a field less"),
        pytest.param('{"event":"scoresUpdate","topScores":[],"version":7}', id="a field more"),
        pytest.param('{"event":"update","topScores":[]}', id="another event"),
        pytest.param('{"event":"scoresUpdate","topScores":[],"topScores":[]}', id="a field twice"),
        pytest.param(
            '{"event":"scoresUpdate","topScores":[{"userId":"a","score":1.0,"rank":1}]}',
            id="float",
        ),
        pytest.param(
            '{"event":"scoresUpdate","topScores":[{"userId":"a","score":1,"rank":2}]}',
            id="no first rank",
        ),
        pytest.param(
            '{"event":"scoresUpdate","topScores":[{"userId":"","score":1,"rank":1}]}',
            id="no user",
        ),
    ],
)
def test_another_message_is_noticed(text: str) -> None:
    """A message other than the documented one fails the check."""
    with pytest.raises((AssertionError, ValueError)):
        check_live_message(text)


def test_what_the_gateway_sends_is_allowed() -> None:
    """The project's own message of a full and of an empty board is a documented one."""
    standings = tuple(Standing(f"user-{place}", 100 - place) for place in range(BOARD_SIZE))
    check_live_message(live_message(Board(epoch=1, version=1, standings=standings)).decode())
    check_live_message(live_message(Board(epoch=1, version=2, standings=())).decode())


def test_a_row_is_the_same_in_both_documents() -> None:
    """HTTP and WebSocket describe a standing alike."""
    http = OPENAPI["components"]["schemas"]
    live = ASYNCAPI["components"]["schemas"]["Standing"]
    row = {name: resolve(OPENAPI, node) for name, node in http["Standing"]["properties"].items()}
    assert without_words(live["properties"]) == without_words(row)
    assert live["required"] == http["Standing"]["required"]


def test_a_refusal_has_the_error_s_body_and_headers() -> None:
    """Among others a 401 with its challenge, a 426 with what to upgrade to, a 503 with its delay."""
    unauthorized = b'{"status":"error","message":"Unauthorized"}'
    overloaded = b'{"status":"error","message":"Service overloaded"}'
    check_refusal(400, {}, b'{"status":"error","message":"Bad request"}')
    check_refusal(401, {"www-authenticate": "Bearer"}, unauthorized)
    check_refusal(426, {"Upgrade": "websocket"}, b'{"status":"error","message":"Upgrade required"}')
    check_refusal(503, {"Retry-After": "1"}, overloaded)
    with pytest.raises(AssertionError):
        check_refusal(401, {}, unauthorized)
    with pytest.raises(AssertionError):
        check_refusal(503, {"Retry-After": "1"}, unauthorized)
    with pytest.raises(AssertionError):
        check_refusal(402, {"www-authenticate": "Bearer"}, unauthorized)


def test_the_close_codes_are_the_gateway_s() -> None:
    """The table has every code the gateway closes with, and each says when to come back."""
    # A normal close is the client's own, answered in kind.
    own = {str(int(code)) for code in Close if code is not Close.NORMAL}
    assert set(LIVE["x-close-codes"]) == own
    for close in LIVE["x-close-codes"].values():
        assert close["description"]
        assert close["reconnect"]
    check_close(1008, "receive-only")
    with pytest.raises(AssertionError):
        check_close(1008, "bye")
    with pytest.raises(AssertionError):
        check_close(1006, "")


def test_every_schema_is_closed() -> None:
    """No object that the gateway sends may have further fields."""
    for name, schema in ASYNCAPI["components"]["schemas"].items():
        assert schema["additionalProperties"] is False, name
        assert sorted(schema["required"]) == sorted(schema["properties"]), name
        with pytest.raises(AssertionError):
            check_schema(ASYNCAPI, schema, {})


def without_words(schemas: dict[str, Any]) -> dict[str, Any]:
    """The schemas without what is only for people."""
    return {
        name: {key: value for key, value in schema.items() if key != "description"}
        for name, schema in schemas.items()
    }
