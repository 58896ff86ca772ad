"""The two endpoints: each reads as the contract's order of checks."""

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from hashlib import blake2s
from typing import NoReturn

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from services.api.announcements import Announcements
from services.api.batch import Overloaded
from services.api.quota import Allowance, Quota
from services.api.shards import DATABASE_FAILURES, Limit, NoOwner, Operation, Refusal
from services.api.submission import (
    InvalidBody,
    InvalidIncrement,
    InvalidKey,
    Submission,
    read_body,
    read_increment,
    read_key,
)
from services.api.top import Top, TopUnavailable
from services.api.writes import NotWritten, Writes
from shared.answers import CHALLENGE, RETRY_AFTER_OVERLOADED_S, error_body
from shared.board import top_answer
from shared.token import Claims, TokenVerifier, Unauthorized

BODY_BYTES_MAX = 4096
"""The longest honest body is a user id of 255 characters, at most 12 bytes each as an escape."""

SERVER_ERROR = 500
"""From this status on it is our fault."""

TOP_FRESH_S = 1
"""For how long a cache may show the board: the specification's CDN, at most a second behind."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Api:
    """What the endpoints work with; made once by the composition root."""

    verifier: TokenVerifier
    update_quota: Quota
    top_quota: Quota
    writes: Writes
    announcements: Announcements
    top: Top
    score_increment_max: int


class Refused(HTTPException):
    """The request ends here, with this status and message."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, message, dict(headers or {}))


def _unauthorized() -> Refused:
    return Refused(401, "Unauthorized", {"WWW-Authenticate": CHALLENGE})


def _overloaded() -> Refused:
    return Refused(503, "Service overloaded", {"Retry-After": str(RETRY_AFTER_OVERLOADED_S)})


def _not_written() -> Refused:
    return Refused(500, "Internal server error after retries")


async def update_score(request: Request) -> Response:
    """POST /api/scores/update: token, whose token, quota, body, write."""
    api: Api = request.app.state.api
    claims = _authenticate(api.verifier, request)
    submission = await _read_submission(request)
    if isinstance(submission, Submission) and submission.user_id != claims.subject:
        raise _unauthorized()
    limit = await _spend(request, api.update_quota, claims.subject)
    if isinstance(submission, Refused):
        raise submission
    operation = _operation(request, submission, api.score_increment_max, limit)
    try:
        outcome = await api.writes.submit(operation)
    except Overloaded:
        raise _overloaded() from None
    except NotWritten:
        raise _not_written() from None
    if outcome is Refusal.SCORE_TOO_HIGH:
        raise Refused(400, "Invalid score increment")
    if outcome is Refusal.KEY_REUSED:
        raise Refused(409, "Idempotency key reused")
    if outcome is Refusal.OVER_LIMIT:
        await _refuse_over_quota(request, api.update_quota, claims.subject)
    # Also of a replay: its first answer may have been lost before the board had it.
    await api.announcements.announce(outcome.latest)
    return _json(b'{"status":"success","message":"Score updated","newScore":%d}' % outcome.score)


async def top_scores(request: Request) -> Response:
    """GET /api/scores/top: quota, board."""
    api: Api = request.app.state.api
    try:
        client = f"user:{_authenticate(api.verifier, request).subject}"
    except Refused:  # Public: a token only says whose quota it is.
        client = f"address:{request.state.client_address}"
    await _spend(request, api.top_quota, client)
    try:
        body = top_answer(await api.top.read())
    except (Overloaded, TopUnavailable):
        raise _overloaded() from None
    etag = f'"{blake2s(body, digest_size=12).hexdigest()}"'
    headers = {
        "ETag": etag,
        "Cache-Control": f"public, max-age={TOP_FRESH_S}, s-maxage={TOP_FRESH_S}",
    }
    known = request.headers.get("if-none-match", "")
    if etag in known or known.strip() == "*":
        return Response(status_code=304, headers=headers)
    return _json(body, headers)


ROUTES = [
    Route("/api/scores/update", update_score, methods=["POST"]),
    Route("/api/scores/top", top_scores, methods=["GET"]),
]


def _authenticate(verifier: TokenVerifier, request: Request) -> Claims:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    try:
        if scheme.lower() != "bearer":
            raise Unauthorized
        return verifier.verify(token.strip())
    except Unauthorized:
        raise _unauthorized() from None


async def _read_submission(request: Request) -> Submission | Refused:
    """The body if its ``userId`` can be read, else why not: that costs quota before it is said."""
    media_type = request.headers.get("content-type", "application/json").partition(";")[0]
    if media_type.strip().lower() != "application/json":
        return Refused(415, "Unsupported media type")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_BYTES_MAX:
            return Refused(413, "Request body too large")
    try:
        return read_body(bytes(body))
    except InvalidBody:
        return Refused(400, "Invalid request body")


async def _spend(request: Request, quota: Quota, client: str) -> Limit | None:
    """Count the request; returns what the write has to keep to as well."""
    allowance = await _counted(quota.spend(client, request.state.request_id))
    request.state.quota_headers = allowance.headers(quota.name)
    if not allowance.allowed:
        raise Refused(429, "Too many requests")
    return allowance.at_write


async def _refuse_over_quota(request: Request, quota: Quota, client: str) -> NoReturn:
    """Others of the client's requests have used it up since this one was counted."""
    allowance = await _counted(quota.recount(client))
    request.state.quota_headers = allowance.headers(quota.name)
    raise Refused(429, "Too many requests")


async def _counted(counting: Awaitable[Allowance]) -> Allowance:
    try:
        return await counting
    except Overloaded:
        raise _overloaded() from None
    except (NoOwner, *DATABASE_FAILURES):  # Redis is away, and the shard could not count it.
        raise _not_written() from None


def _operation(
    request: Request, submission: Submission, increment_max: int, limit: Limit | None
) -> Operation:
    """The increment, under the client's key or the edge's id; the prefix keeps the two apart."""
    try:
        delta = read_increment(submission.increment, increment_max)
        key = request.headers.get("idempotency-key")
        op_id = f"r:{request.state.request_id}" if key is None else f"k:{read_key(key)}"
    except InvalidIncrement:
        raise Refused(400, "Invalid score increment") from None
    except InvalidKey:
        raise Refused(400, "Invalid idempotency key") from None
    return Operation(submission.user_id, op_id, delta, limit)


def _json(body: bytes, headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    return Response(body, status, headers, media_type="application/json")


_MESSAGES = {404: "Not found", 405: "Method not allowed"}
"""Of the statuses that Starlette itself answers with."""


async def refuse(request: Request, error: Exception) -> Response:
    """The one place where a refusal becomes an answer; ours is logged, with the request's id."""
    assert isinstance(error, HTTPException)  # noqa: S101
    say = log.warning if error.status_code >= SERVER_ERROR else log.debug
    say("request.refused", path=request.url.path, status=error.status_code, error=error.detail)
    message = _MESSAGES.get(error.status_code, error.detail)
    return _json(error_body(message), error.headers, error.status_code)
