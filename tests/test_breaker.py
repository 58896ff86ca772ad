"""The breaker and the retry budget, driven by hand."""

import random

from services.api.breaker import Breaker, RetryBudget


class Clock:
    """Stands until it is moved."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def make(clock: Clock) -> Breaker:
    """Opens after three failures for 1 s; a trial may take 10 s."""
    return Breaker(failures_max=3, rest_s=1, trial_s=10, clock=clock)


def test_a_breaker_opens_after_failures_in_a_row() -> None:
    """Of one batch or of several; a success in between begins anew."""
    breaker = make(Clock())
    breaker.failed(tries=2)
    breaker.succeeded()
    breaker.failed(tries=1)
    breaker.failed(tries=1)
    assert (breaker.is_closed, breaker.is_open, breaker.admits()) == (True, False, True)
    breaker.failed(tries=1)

    assert (breaker.is_closed, breaker.is_open, breaker.admits()) == (False, True, False)


def test_after_its_rest_one_tries_for_all() -> None:
    """And closes it, or opens it again with a single failure."""
    clock = Clock()
    breaker = make(clock)
    breaker.failed(tries=3)
    clock.now_s += 1
    assert not breaker.is_open
    assert [breaker.admits() for _ in range(3)] == [True, False, False]
    breaker.failed(tries=1)
    assert (breaker.is_open, breaker.admits()) == (True, False)
    clock.now_s += 1
    assert [breaker.admits() for _ in range(2)] == [True, False]
    breaker.succeeded()

    assert breaker.is_closed
    assert [breaker.admits() for _ in range(2)] == [True, True]
    breaker.failed(tries=2)
    assert breaker.is_closed


def test_a_trial_that_nobody_hears_of_is_made_again() -> None:
    """Its client may have gone before it was sent."""
    clock = Clock()
    breaker = make(clock)
    breaker.failed(tries=3)
    clock.now_s += 1
    assert breaker.admits()
    clock.now_s += 9
    assert not breaker.admits()
    clock.now_s += 1
    assert breaker.admits()


def test_the_reserve_is_spent_first_and_once() -> None:
    """Then ten first tries pay for one retry."""
    budget = RetryBudget(share=0.1, reserve=3, saved_max=100)
    assert [budget.spend(1) for _ in range(4)] == [True, True, True, False]
    budget.save(9)
    assert not budget.spend(1)
    budget.save(1)
    assert [budget.spend(1) for _ in range(2)] == [True, False]


def test_a_batch_is_tried_again_as_a_whole_or_not_at_all() -> None:
    """What is refused costs nothing."""
    budget = RetryBudget(share=0.1, reserve=30, saved_max=100)

    assert [budget.spend(31), budget.spend(20), budget.spend(11), budget.spend(10)] == [
        False,
        True,
        False,
        True,
    ]


def test_what_is_saved_is_bounded() -> None:
    """A long calm pays for no storm."""
    budget = RetryBudget(share=0.1, reserve=30, saved_max=1500)
    budget.save(1_000_000)

    assert [budget.spend(1500), budget.spend(1)] == [True, False]


def test_retries_never_exceed_their_share_whatever_fails() -> None:
    """Of batches of any size, at any moment of a long run."""
    rng = random.Random(4)
    budget = RetryBudget(share=0.1, reserve=30, saved_max=1500)
    first_tries = retries = 0
    for _ in range(20_000):
        size = rng.choice((1, 1, 1, 5, 40, 500))
        budget.save(size)
        first_tries += size
        for _ in range(3):
            if rng.random() < 0.5 or not budget.spend(size):
                break
            retries += size
        assert retries <= 0.1 * first_tries + 30 + 1e-6
    assert retries > 0.09 * first_tries
