"""The wheel, turned by hand: no clock, no loop."""

from services.gateway.wheel import TICK_S, Wheel


class Item:
    """Something to be looked at."""

    slot = 0


def test_an_item_is_due_at_its_time_or_a_tick_later() -> None:
    """Never early: a token is valid until it expires."""
    for at in (100.0, 100.1, 100.49, 100.5, 107.3):
        wheel: Wheel[Item] = Wheel(100.0)
        item = Item()
        wheel.put(item, at)

        assert list(wheel.due(at)) == []
        assert list(wheel.due(at + TICK_S)) == [item]
        assert list(wheel.due(at + 60)) == []


def test_an_item_has_one_time_only() -> None:
    """Putting it again moves it, earlier or later."""
    wheel: Wheel[Item] = Wheel(0)
    item = Item()
    wheel.put(item, 10)
    wheel.put(item, 20)
    wheel.put(item, 5)

    assert list(wheel.due(6)) == [item]
    assert list(wheel.due(60)) == []


def test_an_item_dropped_while_others_are_looked_at_is_not_looked_at() -> None:
    """A connection may end while its neighbours are being closed."""
    wheel: Wheel[Item] = Wheel(0)
    items = [Item() for _ in range(10)]
    for item in items:
        wheel.put(item, 1)

    looked_at = 0
    for first in wheel.due(2):
        looked_at += 1
        for item in items:
            if item is not first:
                wheel.drop(item)

    assert looked_at == 1


def test_an_item_put_back_comes_again_later() -> None:
    """Even when its new time has passed already: one pass looks at it once."""
    wheel: Wheel[Item] = Wheel(0)
    item = Item()
    wheel.put(item, 1)

    for due in wheel.due(2):
        wheel.put(due, 0)

    assert list(wheel.due(3)) == [item]
