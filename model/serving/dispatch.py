"""When a batch is dispatched to a worker that is free, and how large it is: a rule that can be
replaced."""

from collections.abc import Callable
from dataclasses import dataclass

from model.serving.config import CannotStart
from model.serving.imports import imported


@dataclass(frozen=True)
class Waiting:
    """What a rule decides by, when requests wait and a worker is free. Sizes are in instances."""

    queued: int  # wait now
    expected: int  # those, and what the clients of the last batch, now answered, may send
    in_flight: int  # at other workers
    workers: int  # free or busy
    max_size: int  # of a batch
    waited: bool  # the rule has said 0 already, and nothing came for --batch_wait_ms since


Rule = Callable[[Waiting], int]  # how much to dispatch to one free worker now; 0: wait


def even_share(waiting: Waiting) -> int:
    """A worker's even share of the backlog; 0 as long as that is expected but not there."""
    backlog = waiting.expected + waiting.in_flight
    share = min(-(-backlog // waiting.workers), waiting.max_size)  # rounded up
    if waiting.queued < min(share, waiting.expected) and not waiting.waited:
        return 0
    return share


def load_rule(target: str | None, folder: str) -> Rule:
    """The rule at MODULE:FUNCTION, found from `folder` first; `even_share` where target is None.

    Raises CannotStart when there is no such function.
    """
    if target is None:
        return even_share
    module, colon, name = target.partition(":")
    if not (module and colon and name):
        raise CannotStart(f"--dispatch_rule {target}: give MODULE:FUNCTION, as in my_rule:greedy")
    try:
        rule = imported(target, folder)
    except CannotStart as error:
        raise CannotStart(f"--dispatch_rule {error}") from error
    if not callable(rule):
        raise CannotStart(f"--dispatch_rule {target}: that is no function")
    return rule
