"""Moving windows in memory, by a clock of their own."""

from limits import parse

from services.api.windows import Windows


class Clock:
    """Goes when it is told to."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def test_a_request_is_free_again_a_window_after_it_counted() -> None:
    """Each by itself: the window moves."""
    clock = Clock()
    windows = Windows(parse("2/minute"), clock=clock)
    first = windows.spend("ana")
    clock.seconds += 20
    second = windows.spend("ana")
    clock.seconds += 10
    refused = windows.spend("ana")
    clock.seconds += 30
    free = windows.spend("ana")

    assert (first.allowed, first.remaining, first.whole_in_s, first.retry_in_s) == (True, 1, 60, 0)
    assert (second.allowed, second.remaining, second.retry_in_s) == (True, 0, 40)
    assert (refused.allowed, refused.whole_in_s, refused.retry_in_s) == (False, 50, 30)
    assert (free.allowed, free.remaining) == (True, 0)


def test_a_window_is_no_longer_than_it_is() -> None:
    """Clients are told whole seconds, rounded up: of an hour at this time 3,601 would remain."""
    clock = Clock()
    clock.seconds = 3632.172
    assert clock.seconds + 3600 - clock.seconds > 3600
    windows = Windows(parse("1/hour"), clock=clock)

    assert windows.spend("ana").whole_in_s == 3600
    assert windows.spend("ana").retry_in_s == 3600


def test_what_was_used_before_counts() -> None:
    """In whatever order it comes, and only if nothing newer is known."""
    windows = Windows(parse("3/minute"), clock=Clock())
    windows.restore("ana", [10, 50])
    windows.restore("ana", [])

    assert windows.spend("ana").remaining == 0
    assert windows.spend("ana").retry_in_s == 10


def test_who_has_nothing_in_the_window_is_forgotten() -> None:
    """Nothing of them is missed."""
    clock = Clock()
    windows = Windows(parse("3/minute"), clock=clock)
    for number in range(100):
        windows.spend(f"user-{number}")
    clock.seconds += 60
    for number in range(100):
        windows.spend(f"other-{number}")

    assert len(windows) == 100
    assert windows.forgotten_until < clock.seconds


def test_who_is_one_too_many_is_forgotten_and_it_is_known_for_how_long_that_matters() -> None:
    """Whoever asked last is the last to go."""
    clock = Clock()
    windows = Windows(parse("3/minute"), clients_max=2, clock=clock)
    windows.spend("ana")
    clock.seconds += 1
    windows.spend("ben")
    windows.spend("ana")
    windows.spend("eva")

    assert "ben" not in windows
    assert {"ana", "eva"} == {one for one in ("ana", "eva") if one in windows}
    assert windows.forgotten_until == clock.seconds + 60


def test_a_window_of_many_does_not_grow() -> None:
    """What has ended is dropped, if not at once."""
    clock = Clock()
    windows = Windows(parse("64/second"), clock=clock)
    for _ in range(10_000):
        clock.seconds += 1 / 64
        assert windows.spend("ana").allowed
    assert len(windows._times["ana"]) <= 2 * 64 + 1
