"""The parts of the simulated system: frontends with admission control and batcher, replicas."""

import heapq
import math
import random
from collections import deque
from collections.abc import Iterator, Sequence

import simpy

from model.capacity.scenario import Scenario, ServiceTimes

QUEUED = 256  # requests that may wait at a frontend: the servers' --max_queued_requests


class Replica:
    """Works on one batch at a time, first come, first served."""

    def __init__(self) -> None:
        self.free_at = 0.0  # when it has done all batches that have arrived
        self.occupied_until = 0.0  # when the response to the last of them is at its frontend
        self.calls: list[float] = []  # when each that is under way will be done

    def work(self, now: float, seconds: float) -> float:
        """Take a batch of so many seconds; returns in how many it is done, waiting included."""
        self.free_at = max(now, self.free_at) + seconds
        self.calls = [*(at for at in self.calls if at > now), self.free_at]
        return self.free_at - now

    def queue_length(self, now: float) -> int:
        """How many batches are here, whoever sent them."""
        return sum(at > now for at in self.calls)


class Frontend:
    """Admission control, one CPU, and a batcher that dispatches to replicas as Batcher does.

    It knows only its own batches: a replica that works on another frontend's is free to it. Where
    there are other frontends, a batch goes to a replica with the fewest, as routing.py has it.
    """

    def __init__(
        self,
        env: simpy.Environment,
        times: ServiceTimes,
        scenario: Scenario,
        replicas: Sequence[Replica],
        draw: random.Random,
    ) -> None:
        self.env, self.times, self.scenario = env, times, scenario
        self.replicas, self.draw = replicas, draw
        limit = QUEUED + len(replicas) * scenario.max_batch_size
        self.limit = limit if scenario.admission_limit is None else scenario.admission_limit
        self.seconds = [times.seconds(n) for n in range(scenario.max_batch_size + 1)]
        self.in_flight, self.cpu_free_at = 0, 0.0
        self.waiting: deque[simpy.Event] = deque()
        self.free, self.dispatched = list(range(len(replicas))), 0  # a heap of indices; images
        self.last: dict[int, Replica] = {}  # by index, where others use the replicas too
        self.predicted_arrivals, self.turn = 0, 0  # as Batcher's; number of the timer that counts
        # What was recorded:
        self.levels = [(0.0, 0)]  # (moment, requests in flight from then on)
        self.answered: list[tuple[float, float]] = []  # (due, done) of each
        self.rejected: list[float] = []  # when
        self.batches: list[tuple[float, int]] = []  # (dispatched, images)
        self.occupied: list[tuple[float, float]] = []  # (start, end) of a replica's time
        self.turns: list[tuple[float, float]] = []  # (start, end) of the CPU's work

    def request(self) -> Iterator[simpy.Event]:
        """A request's way through; returns whether it was admitted. A rejection costs nothing."""
        due = self.env.now
        if self.in_flight >= self.limit:
            self.rejected.append(due)
            return False
        self._step(+1)
        if self.times.frontend_s:
            yield self.env.timeout(self._on_cpu(self.times.frontend_s))
        response = self.env.event()
        self.waiting.append(response)
        self._dispatch()
        yield response
        if self.times.response_s:
            yield self.env.timeout(self._on_cpu(self.times.response_s))
        self._step(-1)
        self.answered.append((due, self.env.now))
        return True

    def _step(self, change: int) -> None:
        self.in_flight += change
        self.levels.append((self.env.now, self.in_flight))

    def _on_cpu(self, seconds: float) -> float:
        """First come, first served: whoever comes knows how long until its turn is over."""
        start = max(self.env.now, self.cpu_free_at)
        self.cpu_free_at = start + seconds
        self.turns.append((start, self.cpu_free_at))
        return self.cpu_free_at - self.env.now

    def _dispatch(self, may_wait: bool = True) -> None:
        """As Batcher._dispatch, where its rules are explained."""
        self.turn += 1  # a timer that was set before does not count any more
        while self.waiting and self.free:
            waiting = len(self.waiting)
            backlog = max(waiting, self.predicted_arrivals) + self.dispatched
            share = math.ceil(backlog / len(self.replicas))
            share = min(self.scenario.max_batch_size, share)
            if may_wait and waiting < min(share, self.predicted_arrivals):
                timer = self.env.timeout(self.scenario.batch_wait_s, self.turn)
                timer.callbacks.append(self._waited)
                return
            self._send([self.waiting.popleft() for _ in range(min(share, waiting))])

    def _waited(self, timer: simpy.Event) -> None:
        if timer.value != self.turn:
            return
        busy_s = self.cpu_free_at - self.env.now
        if busy_s > 0:  # an event loop takes what has arrived before it looks at its timers
            self.env.timeout(busy_s, self.turn).callbacks.append(self._waited)
        else:
            self._dispatch(may_wait=False)

    def _send(self, batch: list[simpy.Event]) -> None:
        """Send a batch to the first replica that has none of ours."""
        index = heapq.heappop(self.free)
        self.dispatched += len(batch)
        self.predicted_arrivals -= len(batch)
        self.batches.append((self.env.now, len(batch)))
        sent, way_s = self.env.now, self.times.hop_s / 2
        call_s = self._on_cpu(self.times.call_s) if self.times.call_s else 0.0

        def arrives(_: simpy.Event | None = None) -> None:
            replica, seconds, cv = self._replica(index), self.seconds[len(batch)], self.times.cv
            if cv:  # a gamma distribution of mean 1
                seconds *= self.draw.gammavariate(cv**-2, cv**2)
            back_s = replica.work(self.env.now, seconds) + way_s
            occupied = max(sent, replica.occupied_until), self.env.now + back_s
            replica.occupied_until = occupied[1]
            self.occupied.append(occupied)
            self.env.timeout(back_s, (index, batch)).callbacks.append(self._receive)

        if call_s + way_s:
            self.env.timeout(call_s + way_s).callbacks.append(arrives)
        else:
            arrives()

    def _replica(self, index: int) -> Replica:
        """The one that a batch with that index goes to."""
        if not self.scenario.shared_replicas or self.scenario.frontends == 1:
            return self.replicas[index]
        lengths = [replica.queue_length(self.env.now) for replica in self.replicas]
        idle = [r for r, n in zip(self.replicas, lengths, strict=True) if n == min(lengths)]
        if self.last.get(index) not in idle:
            self.last[index] = self.draw.choice(idle)
        return self.last[index]

    def _receive(self, response: simpy.Event) -> None:
        index, batch = response.value
        for one in batch:
            one.succeed()
        heapq.heappush(self.free, index)
        self.dispatched -= len(batch)
        self.predicted_arrivals = len(self.waiting) + len(batch)
        self._dispatch()
