"""What a client may submit: the body and the Idempotency-Key of POST /api/scores/update.

Pure. Anything that can be wrong with a submission is found here, so what comes below may trust
what it is given.
"""

import json
import re
from typing import Any, NamedTuple, Never

from shared.user_id import is_user_id

SCORE_MAX = 2**31 - 1
"""The column is PostgreSQL's INTEGER."""

IDEMPOTENCY_KEY_LENGTH_MAX = 255

# The draft makes it a quoted string (draft-ietf-httpapi-idempotency-key-header); most clients send
# it bare. Both mean the same key.
_KEY = re.compile(r'"([\x21\x23-\x5b\x5d-\x7e]+)"|([\x21\x23-\x5b\x5d-\x7e]+)')


class InvalidBody(Exception):
    """Not a JSON object, a key twice, or no ``userId`` that could be one."""


class InvalidIncrement(Exception):
    """``scoreIncrement`` is not an integer that may be added."""


class InvalidKey(Exception):
    """``Idempotency-Key`` is not 1 to 255 visible ASCII characters."""


class Submission(NamedTuple):
    """A body whose ``userId`` could be read; the increment may still be anything."""

    user_id: str
    increment: object


def read_body(body: bytes) -> Submission:
    """
    Read a JSON object with ``userId``; unknown members are ignored.

    Raises:
        InvalidBody: If it is anything else. A key twice is refused wherever it stands: another
            reader of the same bytes might believe the other value.
    """
    try:
        text = body.decode().strip(_WHITESPACE)
        members, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        raise InvalidBody from None
    if end != len(text) or not isinstance(members, dict) or not is_user_id(members.get("userId")):
        raise InvalidBody
    return Submission(user_id=members["userId"], increment=members.get("scoreIncrement"))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise InvalidBody
    return members


def _refuse_constant(_name: str) -> Never:
    """NaN and Infinity are Python's extensions, not JSON."""
    raise InvalidBody


_WHITESPACE = " \t\n\r"  # JSON's, which is less than Python's.

_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)


def read_increment(value: object, maximum: int) -> int:
    """
    Check what was given as ``scoreIncrement``: a JSON integer from 1 to ``maximum``.

    Raises:
        InvalidIncrement: If it is anything else; ``1.0``, ``true`` and ``"5"`` are.
    """
    if type(value) is not int or not 1 <= value <= maximum:
        raise InvalidIncrement
    return value


def read_key(header: str) -> str:
    """
    Read the value of ``Idempotency-Key``, quoted or bare.

    Raises:
        InvalidKey: If it is empty, too long, or has other than visible ASCII characters.
    """
    match = _KEY.fullmatch(header)
    key = match and (match[1] or match[2])
    if not key or len(key) > IDEMPOTENCY_KEY_LENGTH_MAX:
        raise InvalidKey
    return key
