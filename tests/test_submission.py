"""What a body may be: every line of the JSON table, read without a server."""

import pytest

from services.api.submission import (
    SCORE_MAX,
    InvalidBody,
    InvalidIncrement,
    InvalidKey,
    read_body,
    read_increment,
    read_key,
)


def increment_of(value: str) -> int:
    """The increment of a body that has ``value`` written for it."""
    body = f'{{"userId":"u1","scoreIncrement":{value}}}'.encode()
    return read_increment(read_body(body).increment, SCORE_MAX)


@pytest.mark.parametrize("value", [1, 2, SCORE_MAX])
def test_an_integer_in_range_is_the_increment(value: int) -> None:
    """From one to what the column holds."""
    assert increment_of(str(value)) == value


@pytest.mark.parametrize(
    "value",
    [
        "1.0",
        "1.5",
        "1e3",
        "1E400",
        "true",
        "null",
        "[1]",
        '"5"',
        '" 5 "',
        '"1_000"',
        "{}",
        "0",
        "-0",
        "-1",
        "2147483648",
        "9223372036854775808",
        "1" * 400,
    ],
)
def test_anything_else_is_no_increment(value: str) -> None:
    """Also what other languages would take for one."""
    with pytest.raises(InvalidIncrement):
        increment_of(value)


def test_a_missing_increment_is_no_increment() -> None:
    """Its absence is the increment's fault, not the body's."""
    with pytest.raises(InvalidIncrement):
        read_increment(read_body(b'{"userId":"u1"}').increment, SCORE_MAX)


def test_the_configured_maximum_is_allowed_and_one_more_is_not() -> None:
    """The limit is the last value that passes."""
    assert read_increment(10, 10) == 10
    with pytest.raises(InvalidIncrement):
        read_increment(11, 10)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"nonsense", id="no JSON"),
        pytest.param(b"[]", id="list"),
        pytest.param(b'"u1"', id="string"),
        pytest.param(b"null", id="null"),
        pytest.param(b"{}", id="no user"),
        pytest.param(b'{"userId":1}', id="number as user"),
        pytest.param(b'{"userId":null}', id="null as user"),
        pytest.param(b'{"userId":""}', id="empty user"),
        pytest.param(b'{"userId":"%s"}' % (b"u" * 256), id="256 characters"),
        pytest.param(rb'{"userId":"a\u0000b"}', id="NUL"),
        pytest.param(rb'{"userId":"\ud800"}', id="lone surrogate"),
        pytest.param(b'{"userId":"\xff"}', id="not UTF-8"),
        pytest.param('{"userId":"u1"}'.encode("utf-16"), id="UTF-16"),
        pytest.param(b'\xef\xbb\xbf{"userId":"u1"}', id="byte order mark"),
        pytest.param(b'{"userId":"u1","userId":"u1"}', id="a key twice"),
        pytest.param(rb'{"userId":"u1","user\u0049d":"u2"}', id="a key twice, once escaped"),
        pytest.param(
            b'{"userId":"u1","scoreIncrement":1,"scoreIncrement":2}', id="increment twice"
        ),
        pytest.param(b'{"userId":"u1","x":{"y":1,"y":2}}', id="a nested key twice"),
        pytest.param(b'{"userId":"u1","scoreIncrement":NaN}', id="NaN"),
        pytest.param(b'{"userId":"u1","scoreIncrement":Infinity}', id="Infinity"),
        pytest.param(b'{"userId":"u1","scoreIncrement":01}', id="leading zero"),
        pytest.param(b'{"userId":"u1","scoreIncrement":+1}', id="plus"),
        pytest.param(b'{"userId":"u1","scoreIncrement":0x10}', id="hexadecimal"),
        pytest.param(b'{"userId":"u1","scoreIncrement":%s}' % (b"1" * 5001), id="5,001 digits"),
        pytest.param(b"[" * 100_000, id="100,000 brackets"),
    ],
)
def test_other_bodies_are_refused(body: bytes) -> None:
    """Whatever Python's reader makes of them."""
    with pytest.raises(InvalidBody):
        read_body(body)


@pytest.mark.parametrize(
    "user_id", ["u", "u" * 255, "\U0001f600" * 255, "A\u030a", "\u202e", "' OR 1=1 --"]
)
def test_a_user_id_is_taken_as_it_is(user_id: str) -> None:
    """Up to 255 characters of any script, never normalised."""
    assert read_body(f'{{"userId":"{user_id}"}}'.encode()).user_id == user_id


def test_unknown_members_are_ignored() -> None:
    """A newer client may say more."""
    assert read_body(b'{"userId":"u1","scoreIncrement":1,"game":"x"}').increment == 1


@pytest.mark.parametrize(
    ("header", "key"), [("abc", "abc"), ('"abc"', "abc"), ("x" * 255, "x" * 255)]
)
def test_a_key_is_the_same_quoted_and_bare(header: str, key: str) -> None:
    """The draft quotes it, most clients do not."""
    assert read_key(header) == key


@pytest.mark.parametrize("header", ["", '""', "a b", "x" * 256, '"open', "caf\xe9", "a\tb"])
def test_other_keys_are_refused(header: str) -> None:
    """A key is 1 to 255 visible ASCII characters."""
    with pytest.raises(InvalidKey):
        read_key(header)
