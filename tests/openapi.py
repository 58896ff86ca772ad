"""Whether a real answer is one that the published descriptions allow.

The end-to-end tests hand over everything they receive; what they do not receive is not checked here.
"""

import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import yaml
from jsonschema import Draft202012Validator

OPENAPI: dict[str, Any] = yaml.safe_load(files("services.api").joinpath("openapi.yaml").read_text())
ASYNCAPI: dict[str, Any] = yaml.safe_load(
    files("services.gateway").joinpath("asyncapi.yaml").read_text()
)


def check_answer(
    method: str, path: str, status: int, headers: Mapping[str, str], body: bytes
) -> None:
    """
    Assert that the document has this answer: its status, its headers, its body.

    Args:
        path: With or without a query.
        headers: Names in any case.
        body: Decoded from any content encoding; empty for HEAD.
    """
    answer = f"{method} {path} -> {status} {body[:200]!r}"
    documented = _documented(method, path.partition("?")[0])
    assert str(status) in documented, f"{answer}: not one of {sorted(documented)}"
    response = resolve(OPENAPI, documented[str(status)])
    _check_headers(answer, response["headers"], headers)
    if method == "HEAD" or "content" not in response:
        assert body == b"", f"{answer}: has a body"
        return
    media_type = _lower(headers).get("content-type", "").partition(";")[0]
    assert media_type in response["content"], f"{answer}: is {media_type or 'of no media type'}"
    message = read_json(body)
    check_schema(OPENAPI, response["content"][media_type]["schema"], message)
    if "topScores" in message:
        _check_ranks(message["topScores"])


def check_live_message(text: str) -> None:
    """Assert that the WebSocket document has this message."""
    message = read_json(text)
    check_schema(ASYNCAPI, ASYNCAPI["components"]["messages"]["scoresUpdate"]["payload"], message)
    _check_ranks(message["topScores"])


def check_refusal(status: int, headers: Mapping[str, str], body: bytes) -> None:
    """Assert that the WebSocket document has this refusal of a handshake."""
    refusals = ASYNCAPI["channels"]["live"]["x-refusals"]
    assert str(status) in refusals, f"{status}: not one of {sorted(refusals)}"
    refusal = refusals[str(status)]
    check_schema(ASYNCAPI, refusal["payload"], read_json(body))
    _check_headers(f"refusal {status}", refusal["headers"], headers)


def check_close(code: int, reason: str) -> None:
    """Assert that the WebSocket document has this close code, and this reason if it has any."""
    closes = ASYNCAPI["channels"]["live"]["x-close-codes"]
    assert str(code) in closes, f"{code} {reason!r}: not one of {sorted(closes)}"
    assert reason in closes[str(code)].get("reasons", [reason]), f"{code} {reason!r}"


def read_json(text: str | bytes) -> Any:
    """JSON as the contract means it: no floats, no NaN, no key twice. Raises ValueError."""
    return json.loads(
        text, parse_float=_refuse, parse_constant=_refuse, object_pairs_hook=_unique_keys
    )


def resolve(document: Mapping[str, Any], node: Mapping[str, Any]) -> dict[str, Any]:
    """The node itself, or what its ``$ref`` into the same document names. Raises KeyError."""
    found: Any = node
    while "$ref" in found:
        pointer = found["$ref"].removeprefix("#/")
        found = document
        for step in pointer.split("/"):
            found = found[step.replace("~1", "/").replace("~0", "~")]
    return dict(found)


def check_schema(document: Mapping[str, Any], schema: Mapping[str, Any], value: Any) -> None:
    """Assert that the value has the schema, whose references lead into the document's components."""
    standalone = {**schema, "components": document["components"]}
    errors = [error.message for error in Draft202012Validator(standalone).iter_errors(value)]
    assert not errors, f"{value!r}: {'; '.join(errors)}"


def _documented(method: str, path: str) -> dict[str, Any]:
    elsewhere = OPENAPI["x-elsewhere"]
    if path not in OPENAPI["paths"]:
        return {**elsewhere["anywhere"], **elsewhere["unknownPath"]}
    # HTTP gives every GET its HEAD; the document does not repeat that.
    operation = OPENAPI["paths"][path].get({"HEAD": "get"}.get(method, method.lower()))
    if operation is None:
        return {**elsewhere["anywhere"], **elsewhere["unknownMethod"]}
    return {**elsewhere["anywhere"], **operation["responses"]}


def _check_headers(answer: str, documented: Mapping[str, Any], headers: Mapping[str, str]) -> None:
    received = _lower(headers)
    for name, reference in documented.items():
        header = resolve(OPENAPI, reference)
        text = received.get(name.lower())
        if text is None:
            assert not header.get("required"), f"{answer}: without {name}"
            continue
        is_integer = header["schema"].get("type") == "integer" and re.fullmatch(r"\d+", text)
        check_schema(OPENAPI, header["schema"], int(text) if is_integer else text)


def _check_ranks(standings: Sequence[Mapping[str, Any]]) -> None:
    assert [row["rank"] for row in standings] == list(range(1, len(standings) + 1))
    scores = [row["score"] for row in standings]
    assert scores == sorted(scores, reverse=True)
    assert len({row["userId"] for row in standings}) == len(standings), "a user twice"


def _lower(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): text for name, text in headers.items()}


def _refuse(text: str) -> None:
    raise ValueError(f"{text} in JSON")


def _unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    message = dict(pairs)
    if len(message) < len(pairs):
        raise ValueError(f"a key twice in {pairs!r}")
    return message
