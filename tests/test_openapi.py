"""The HTTP API's description is a valid document, true to the routes; its examples hold."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from services.api.endpoints import METHODS
from services.api.submission import SCORE_MAX, InvalidKey, read_body, read_increment, read_key
from shared.board import BOARD_SIZE
from shared.user_id import USER_ID_LENGTH_MAX
from tests.openapi import OPENAPI, check_answer, check_schema, resolve

UPDATE = "/api/scores/update"
TOP = "/api/scores/top"

OPERATIONS = {
    (method.upper(), path): operation
    for path, operations in OPENAPI["paths"].items()
    for method, operation in operations.items()
}

Answer = tuple[str, str, int, dict[str, str], bytes]


def headers_of(response: dict[str, Any]) -> dict[str, str]:
    """The headers of a documented response, with the values of the document's examples."""
    documented = {name: resolve(OPENAPI, header) for name, header in response["headers"].items()}
    values = {
        name: str(header["schema"].get("const", header.get("example")))
        for name, header in documented.items()
        if header.get("required")
    }
    return values | {"content-type": "application/json"}


def example_answers() -> Iterator[Answer]:
    """Every answer that the document gives as an example."""
    elsewhere = OPENAPI["x-elsewhere"]
    places = [
        ("GET", "/api/nothing", elsewhere["unknownPath"]),
        ("DELETE", UPDATE, elsewhere["unknownMethod"]),
        ("PUT", "/api/nothing", elsewhere["anywhere"]),
        *((*place, operation["responses"]) for place, operation in OPERATIONS.items()),
    ]
    for method, path, responses in places:
        for status, reference in responses.items():
            response = resolve(OPENAPI, reference)
            content = response.get("content", {}).get("application/json", {"examples": {"": {}}})
            for example in content["examples"].values():
                body = json.dumps(example["value"]).encode() if example else b""
                yield method, path, int(status), headers_of(response), body


def updated() -> Answer:
    """The document's example of a successful update."""
    return next(answer for answer in example_answers() if answer[1:3] == (UPDATE, 200))


def test_the_document_is_openapi_3_1() -> None:
    """The document has the form that OpenAPI 3.1 demands, and all its references resolve."""
    OpenAPIV31SpecValidator(OPENAPI).validate()


def test_the_paths_are_the_routes() -> None:
    """Every route is documented and every documented operation is a route."""
    routes = {
        (method, path) for path, methods in METHODS.items() for method in set(methods) - {"HEAD"}
    }
    assert set(OPERATIONS) == routes


@pytest.mark.parametrize(
    "answer", [pytest.param(a, id=f"{a[0]} {a[1]} {a[2]}") for a in example_answers()]
)
def test_an_example_is_an_allowed_answer(answer: Answer) -> None:
    """The document allows the answers it shows."""
    check_answer(*answer)


def test_the_example_of_an_update_is_allowed() -> None:
    """The request the document shows has the schema the document demands, and the code reads it."""
    content = OPENAPI["paths"][UPDATE]["post"]["requestBody"]["content"]["application/json"]
    for example in content["examples"].values():
        check_schema(OPENAPI, content["schema"], example["value"])
        submission = read_body(json.dumps(example["value"]).encode())
        assert submission.user_id == example["value"]["userId"]
        assert read_increment(submission.increment, SCORE_MAX)


def test_the_limits_are_the_code_s() -> None:
    """The longest user id, the highest score and the longest board are those of the code."""
    schemas = OPENAPI["components"]["schemas"]
    assert schemas["UserId"]["maxLength"] == USER_ID_LENGTH_MAX
    assert schemas["Score"]["maximum"] == SCORE_MAX
    assert schemas["TopScores"]["properties"]["topScores"]["maxItems"] == BOARD_SIZE


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("5f0c9d1e", id="bare"),
        pytest.param('"5f0c9d1e"', id="quoted"),
        pytest.param('"' + "k" * 255 + '"', id="longest"),
        pytest.param("", id="empty"),
        pytest.param('""', id="quoted empty"),
        pytest.param('"5f0c', id="half quoted"),
        pytest.param("two words", id="a space"),
        pytest.param("k" * 256, id="too long"),
        pytest.param('"' + "k" * 256 + '"', id="quoted too long"),
    ],
)
def test_the_idempotency_key_is_the_code_s(key: str) -> None:
    """The document and the code agree on what is an idempotency key."""
    schema = OPENAPI["components"]["parameters"]["IdempotencyKey"]["schema"]
    try:
        read_key(key)
    except InvalidKey:
        with pytest.raises(AssertionError):
            check_schema(OPENAPI, schema, key)
    else:
        check_schema(OPENAPI, schema, key)


def test_no_answer_may_have_further_fields() -> None:
    """Every object that the API sends is closed."""
    schemas = OPENAPI["components"]["schemas"]
    sent = {name for name, schema in schemas.items() if schema["type"] == "object"}
    for name in sent - {"ScoreUpdate"}:
        assert schemas[name]["additionalProperties"] is False, name
        assert sorted(schemas[name]["required"]) == sorted(schemas[name]["properties"]), name


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="no body"),
        pytest.param(b"{", id="not JSON"),
        pytest.param(b'{"status":"success","message":"Score updated"}', id="a field less"),
        pytest.param(
            b'{"status":"success","message":"Score updated","newScore":1,"rank":1}',
            id="a field more",
        ),
        pytest.param(
            b'{"status":"success","message":"Score updated","newScore":1,"newScore":1}',
            id="a field twice",
        ),
        pytest.param(b'{"status":"success","message":"Score updated","newScore":1.0}', id="float"),
        pytest.param(b'{"status":"success","message":"Updated","newScore":1}', id="other words"),
    ],
)
def test_another_body_is_noticed(body: bytes) -> None:
    """A 200 with a body other than the documented one fails the check."""
    method, path, status, headers, _ = updated()
    with pytest.raises((AssertionError, ValueError)):
        check_answer(method, path, status, headers, body)


@pytest.mark.parametrize(
    "name", headers_of(resolve(OPENAPI, {"$ref": "#/components/responses/TooManyUpdates"}))
)
def test_a_missing_header_is_noticed(name: str) -> None:
    """A 429 without any one of its headers fails the check."""
    answers = (a for a in example_answers() if a[1:3] == (UPDATE, 429))
    method, path, status, headers, body = next(answers)
    del headers[name]
    with pytest.raises(AssertionError):
        check_answer(method, path, status, headers, body)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("X-Request-ID", "mine", id="a client's own request id"),
        pytest.param("X-RateLimit-Remaining", "-1", id="a negative quota"),
        pytest.param("X-RateLimit-Reset", "59.5", id="a fraction of a second"),
        pytest.param("RateLimit", "limit=100", id="an older draft"),
        pytest.param("content-type", "text/html", id="a page"),
    ],
)
def test_another_header_is_noticed(name: str, value: str) -> None:
    """A 200 with a header that the document does not allow fails the check."""
    method, path, status, headers, body = updated()
    with pytest.raises(AssertionError):
        check_answer(method, path, status, headers | {name: value}, body)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        pytest.param("POST", UPDATE, 403, id="an undocumented status"),
        pytest.param("DELETE", UPDATE, 200, id="a method that is not there"),
        pytest.param("POST", "/api/scores/reset", 200, id="a path that is not there"),
    ],
)
def test_another_status_is_noticed(method: str, path: str, status: int) -> None:
    """An answer that no operation has fails the check."""
    *_, headers, body = updated()
    with pytest.raises(AssertionError):
        check_answer(method, path, status, headers, body)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([("ana", 5, 1), ("ben", 4, 3)], id="a gap"),
        pytest.param([("ana", 5, 1), ("ben", 5, 1)], id="a shared rank"),
        pytest.param([("ana", 5, 1), ("ben", 6, 2)], id="scores not falling"),
        pytest.param([("ana", 5, 1), ("ana", 4, 2)], id="a user twice"),
        pytest.param([(f"user-{rank}", 5, rank) for rank in range(1, 12)], id="eleven rows"),
        pytest.param([("x" * 256, 5, 1)], id="a user id too long"),
    ],
)
def test_a_wrong_board_is_noticed(rows: list[tuple[str, int, int]]) -> None:
    """A top 10 whose rows do not rank fails the check."""
    method, path, status, headers, _ = next(a for a in example_answers() if a[1:3] == (TOP, 200))
    standings = [{"userId": user, "score": score, "rank": rank} for user, score, rank in rows]
    body = json.dumps({"status": "success", "message": "Top scores", "topScores": standings})
    with pytest.raises(AssertionError):
        check_answer(method, path, status, headers, body.encode())


def test_head_is_the_get_without_its_body() -> None:
    """HEAD is allowed wherever GET is, with no body."""
    _, path, status, headers, body = next(a for a in example_answers() if a[1:3] == (TOP, 200))
    check_answer("HEAD", path, status, headers, b"")
    with pytest.raises(AssertionError):
        check_answer("HEAD", path, status, headers, body)
