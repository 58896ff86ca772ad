"""The two endpoints: each reads as the contract's order of checks."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import blake2s

from services.api.allowance import Allowance
from services.api.batch import Overloaded
from services.api.exchange import Answer, Endpoint, Exchange, Refused
from services.api.roles import Allowances, Announcer, TopReader, TopUnavailable
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
from services.api.writes import NotWritten, Writes
from shared.answers import CHALLENGE, RETRY_AFTER_OVERLOADED_S
from shared.board import top_answer
from shared.token import Claims, TokenVerifier, Unauthorized

TOP_FRESH_S = 1
"""For how long a cache may show the board: the specification's CDN, at most a second behind."""

UPDATE, TOP = "/api/scores/update", "/api/scores/top"

METHODS = {UPDATE: ("POST",), TOP: ("GET", "HEAD")}


@dataclass(frozen=True, slots=True)
class Api:
    """What the endpoints work with; made once by the composition root."""

    verifier: TokenVerifier
    update_quota: Allowances
    top_quota: Allowances
    writes: Writes
    announcer: Announcer
    top: TopReader
    score_increment_max: int


def endpoints(api: Api) -> Mapping[bytes, Endpoint]:
    """What answers, by path."""
    return {
        path.encode(): Endpoint(path, tuple(map(str.encode, METHODS[path])), partial(handle, api))
        for path, handle in ((UPDATE, update_score), (TOP, top_scores))
    }


def _unauthorized() -> Refused:
    return Refused(401, "Unauthorized", [(b"www-authenticate", CHALLENGE.encode())])


def overloaded() -> Refused:
    """Too busy to start."""
    return Refused(503, "Service overloaded", [(b"retry-after", b"%d" % RETRY_AFTER_OVERLOADED_S)])


def _too_many() -> Refused:
    return Refused(429, "Too many requests")


def _not_written() -> Refused:
    return Refused(500, "Internal server error after retries")


async def update_score(api: Api, exchange: Exchange) -> Answer:
    """POST /api/scores/update: token, whose token, quota, body, write."""
    claims = _authenticate(api.verifier, exchange)
    submission = _read_submission(exchange)
    if isinstance(submission, Submission) and submission.user_id != claims.subject:
        raise _unauthorized()
    allowance = await _count(exchange, api.update_quota, claims.subject)
    if not allowance.allowed:
        raise _too_many()
    if isinstance(submission, Refused):
        raise submission
    operation = _operation(exchange, submission, api.score_increment_max, allowance.at_write)
    try:
        outcome = await api.writes.submit(operation)
    except Overloaded:
        raise overloaded() from None
    except NotWritten:
        raise _not_written() from None
    if outcome is Refusal.SCORE_TOO_HIGH:
        raise Refused(400, "Invalid score increment")
    if outcome is Refusal.KEY_REUSED:
        raise Refused(409, "Idempotency key reused")
    if outcome is Refusal.OVER_LIMIT:
        # Others of the client's requests have used it up since this one was counted.
        await _count(exchange, api.update_quota, claims.subject, is_over=True)
        raise _too_many()
    # Also of a replay: its first answer may have been lost before the board had it.
    await api.announcer.announce(outcome.latest)
    return Answer(
        200, b'{"status":"success","message":"Score updated","newScore":%d}' % outcome.score
    )


async def top_scores(api: Api, exchange: Exchange) -> Answer:
    """GET /api/scores/top: quota, board."""
    try:
        client = f"user:{_authenticate(api.verifier, exchange).subject}"
    except Refused:  # Public: a token only says whose quota it is.
        client = f"address:{exchange.address}"
    allowance = await _count(exchange, api.top_quota, client)
    if not allowance.allowed:
        raise _too_many()
    try:
        body = top_answer(await api.top.read())
    except (Overloaded, TopUnavailable):
        raise overloaded() from None
    etag = f'"{blake2s(body, digest_size=12).hexdigest()}"'
    cached = f"public, max-age={TOP_FRESH_S}, s-maxage={TOP_FRESH_S}"
    headers = [(b"etag", etag.encode()), (b"cache-control", cached.encode())]
    known = exchange.header(b"if-none-match")
    if etag in known or known.strip() == "*":
        return Answer(304, b"", headers)
    return Answer(200, body, headers)


def _authenticate(verifier: TokenVerifier, exchange: Exchange) -> Claims:
    scheme, _, token = exchange.header(b"authorization").partition(" ")
    try:
        if scheme.lower() != "bearer":
            raise Unauthorized
        return verifier.verify(token.strip())
    except Unauthorized:
        raise _unauthorized() from None


def _read_submission(exchange: Exchange) -> Submission | Refused:
    """The body if its ``userId`` can be read, else why not: that costs quota before it is said."""
    media_type = exchange.header(b"content-type", "application/json").partition(";")[0]
    if media_type.strip().lower() != "application/json":
        return Refused(415, "Unsupported media type")
    if exchange.body is None:
        return Refused(413, "Request body too large")
    try:
        return read_body(exchange.body)
    except InvalidBody:
        return Refused(400, "Invalid request body")


async def _count(
    exchange: Exchange, quota: Allowances, client: str, *, is_over: bool = False
) -> Allowance:
    """Count the request, and have the answer say what is left; nothing, where it is known to be over."""
    try:
        allowance = await quota.spend(client, exchange.request_id)
    except Overloaded:
        raise overloaded() from None
    except (NoOwner, *DATABASE_FAILURES):  # Redis is away, and the shard could not count it.
        raise _not_written() from None
    if is_over:
        allowance = allowance._replace(allowed=False, remaining=0)
    exchange.quota_headers = allowance.headers(quota.name)
    return allowance


def _operation(
    exchange: Exchange, submission: Submission, increment_max: int, limit: Limit | None
) -> Operation:
    """The increment, under the client's key or the edge's id; the prefix keeps the two apart."""
    try:
        delta = read_increment(submission.increment, increment_max)
        key = exchange.headers.get(b"idempotency-key")
        op_id = (
            f"r:{exchange.request_id}" if key is None else f"k:{read_key(key.decode('latin-1'))}"
        )
    except InvalidIncrement:
        raise Refused(400, "Invalid score increment") from None
    except InvalidKey:
        raise Refused(400, "Invalid idempotency key") from None
    return Operation(submission.user_id, op_id, delta, limit)
