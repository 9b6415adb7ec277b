"""How often a server looks for garbage, and what becomes of freed memory."""

import gc
import platform
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest

from model.serving.garbage import COLLECT_AFTER, collect_seldom, leave_what_is_there


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """It is afterwards as it was."""
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


class Circle:
    """Refers to itself."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_is_found_later_but_it_is():
    """Between Python's own number of objects and ours it stays."""
    usual = gc.get_threshold()[0]
    collect_seldom()
    gc.collect()
    circle = weakref.ref(Circle())
    kept = [[] for _ in range(2 * usual)]
    assert circle()
    kept += [[] for _ in range(COLLECT_AFTER)]
    assert not circle()


def test_what_is_there_stays_where_it_is():
    """The collector does not look at it any more."""
    there = [[]]
    assert any(found is there for found in gc.get_objects())
    leave_what_is_there()
    assert not any(found is there for found in gc.get_objects())


FREED = """
import time
import psutil
from model.serving import garbage
garbage.GIVE_BACK_EVERY_S = 0.05
bodies = [b"x" * 100_000 for _ in range(1000)]
kept, bodies = bodies[::10], None
before = psutil.Process().memory_info().rss
garbage.give_back_freed()
end = time.monotonic() + 20
while psutil.Process().memory_info().rss > before - 50e6 and time.monotonic() < end:
    time.sleep(0.05)
print(before - psutil.Process().memory_info().rss)
"""


def test_freed_memory_is_given_back():
    """Also what lies between things that are in use."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc keeps freed memory so, and can be told to give it back")
    ran = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, timeout=60)
    assert int(ran.stdout) > 50e6, ran.stderr
