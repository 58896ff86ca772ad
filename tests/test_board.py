"""The board as a value: its order and its forms."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.board import Board, Score, Standing, best, decode_board, live_message, top_answer


def test_higher_first_then_earlier_then_code_point() -> None:
    """The contract's order; the last by code point, where UTF-16 would differ."""
    rows = [
        Score("late", 5, 20),
        Score("\U0001f600", 5, 10),
        Score("\ufffd", 5, 10),
        Score("low", 4, 1),
        Score("high", 6, 99),
    ]

    assert [row.user_id for row in best(rows)] == ["high", "\ufffd", "\U0001f600", "late", "low"]


def test_ten_at_most() -> None:
    """The eleventh is not on the board."""
    assert len(best(Score(str(n), n, n) for n in range(1, 12))) == 10


BOARD = Board(epoch=3, version=7, standings=(Standing("a/b", 5), Standing('"é😀', 2)))


def test_a_client_sees_event_and_rows_and_no_other_field() -> None:
    """Compact, in UTF-8."""
    assert live_message(BOARD).decode() == (
        '{"event":"scoresUpdate","topScores":[{"userId":"a/b","score":5,"rank":1},'
        '{"userId":"\\"é😀","score":2,"rank":2}]}'
    )


def test_nobody_has_scored() -> None:
    """An empty list, not a missing one."""
    assert top_answer(()) == b'{"status":"success","message":"Top scores","topScores":[]}'


@given(st.text())
def test_any_text_is_a_board_or_a_value_error(text: str) -> None:
    """A channel may carry anything; a reader survives it."""
    with contextlib.suppress(ValueError):
        decode_board(text)


@pytest.mark.parametrize(
    "text", ["{}", "[]", "1", '{"epoch":1}', '{"epoch":1,"version":1,"topScores":[{}]}']
)
def test_other_json_is_no_board(text: str) -> None:
    """It is refused as a whole."""
    with pytest.raises(ValueError, match="not a board"):
        decode_board(text)
