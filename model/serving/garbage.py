"""How often Python looks through a server's objects for garbage that refers to itself."""

import gc

COLLECT_AFTER = 10_000  # objects more than at the last look; Python's own number is 700


def collect_seldom() -> None:
    """Look less often: in the middle of requests each look finds what they still need.

    What has no reference left is freed at once all the same.
    """
    gc.set_threshold(COLLECT_AFTER)


def leave_what_is_there() -> None:
    """Have the garbage collector leave alone what is there already: it stays until the end.

    Looking through all that is imported takes a tenth of a second, each time in the middle of some
    requests. (Ray Serve does the same in its replicas.)
    """
    gc.collect()
    gc.freeze()
