"""How often Python looks for garbage that reference counting does not free."""

import gc

THRESHOLD = 50_000
"""New objects between two collections. A request makes hundreds that reference counting frees: at
Python's 700 the collector looks in vain, for a twentieth of the CPU (454 to 432 µs a request)."""


def collect_seldom() -> None:
    """To be called once everything is there that stays: nothing of it is looked at again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(THRESHOLD)
