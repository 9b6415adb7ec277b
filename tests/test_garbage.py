"""How often a server looks for garbage."""

import gc
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
