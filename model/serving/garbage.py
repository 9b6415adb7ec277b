"""Memory that a server has no use for any more: how often it is looked for, and given back."""

import ctypes
import gc
import threading
import time

COLLECT_AFTER = 10_000  # objects more than at the last look; Python's own number is 700
GIVE_BACK_EVERY_S = 60.0


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


def give_back_freed() -> None:
    """Have a thread return freed memory to the system once a minute, as long as the process lives.

    glibc keeps what lies between things that are in use: after a queue of images that was a hundred
    megabytes, and looked like a leak. It takes some milliseconds. Elsewhere nothing is done.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim  # Python's lock is not held meanwhile
    except (AttributeError, OSError, TypeError):
        return

    def now_and_then() -> None:
        while True:
            time.sleep(GIVE_BACK_EVERY_S)
            trim(0)

    threading.Thread(target=now_and_then, name="gives memory back", daemon=True).start()
