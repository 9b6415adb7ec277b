"""The server as a simulation: what a load would come to, with nothing started.

A request passes the gate, its front (KServe's process), waits there for a place in a batch, is
worked on by a replica, and its answer passes the front again. Each front has a gate, a batcher
and replicas of its own. Left out are the clients' network, and that replicas and front share the
cores of a machine: the service times put in are those measured while all replicas are busy.
"""

import math
import random
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import simpy

QUEUED = 256  # requests that may wait at a front: the servers' --max_queued_requests
REFUSAL_S = 0.001  # until a client of a closed loop that was refused asks again


@dataclass(frozen=True)
class Service:
    """How long a request's parts take, in seconds."""

    front_s: float  # CPU of the front, to read a request; one at a time
    fixed_s: float = 0.0  # of a replica for a batch, whatever its size
    picture_s: float = 0.0  # and for each picture in it
    cv: float = 0.0  # standard deviation / mean of a batch's time: 0 constant, 1 exponential
    answer_s: float = 0.0  # CPU of the front, to write an answer
    call_s: float = 0.0  # CPU of the front for a batch: the call of a replica
    hop_s: float = 0.0  # that a batch is on its way besides, there and back
    measured: Mapping[int, float] | None = None  # pictures -> seconds; overrides the two above

    def seconds(self, pictures: int) -> float:
        """A replica's mean time for a batch; between sizes that were measured interpolated."""
        if not self.measured:
            return self.fixed_s + pictures * self.picture_s
        sizes = sorted(self.measured)
        found = np.interp(pictures, sizes, [self.measured[size] for size in sizes])
        return float(found) * max(1.0, pictures / sizes[-1])

    def taken_s(self, pictures: int) -> float:
        """How long a replica is taken by a batch, from the front's point of view."""
        return self.call_s + self.hop_s + self.seconds(pictures)

    def alone_s(self, pictures: int = 1) -> float:
        """The latency of a request in a batch of so many, with nothing else on its way."""
        return self.front_s + self.taken_s(pictures) + self.answer_s

    def front_cpu_s(self, pictures: int) -> float:
        """CPU of the front for a request, in batches of so many."""
        return self.front_s + self.call_s / pictures + self.answer_s


@dataclass(frozen=True)
class Setting:
    """A system, and its load: `rate` requests a second at random, or so many `clients`, each of
    which asks again as soon as it has its answer. Each request holds one picture."""

    replicas: int  # of all fronts together, dealt out evenly
    size: int = 16  # the most pictures in a batch; 1: no batches
    wait_s: float = 0.005  # as Batcher's
    limit: float | None = None  # requests inside a front; None: as options.most_inside
    fronts: int = 1
    rate: float | None = None
    clients: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.fronts <= self.replicas or self.size < 1:
            raise ValueError("each front needs a replica, and a batch a picture")
        if not (self.rate or 0) + (self.clients or 0) > 0 or self.rate and self.clients:
            raise ValueError("give either a rate or a number of clients, above 0")


@dataclass(frozen=True)
class Outcome:
    """What a simulation came to, counted in its window as load.Run does."""

    throughput: float  # answers a second
    refused: float  # share of the requests
    mean_ms: float  # latency of the answered; so are the quantiles
    p50_ms: float
    p95_ms: float
    p99_ms: float
    under_way: float  # requests inside, mean over time
    batch: float  # pictures in a batch, mean
    replicas_busy: float  # share of the time, mean over all replicas
    front_busy: float

    def littles_law(self) -> float:
        """Requests under way / (throughput x mean latency): near 1, or it was not steady."""
        expected = self.throughput * self.mean_ms / 1e3
        return self.under_way / expected if expected else math.nan


class _Front:
    """A gate, the one CPU of a front, a batcher as Batcher is, and replicas."""

    def __init__(
        self,
        env: simpy.Environment,
        service: Service,
        setting: Setting,
        replicas: int,
        draw: random.Random,
    ) -> None:
        self.env, self.service, self.setting = env, service, setting
        self.replicas, self.draw = replicas, draw
        queued = QUEUED + replicas * setting.size
        self.limit = queued if setting.limit is None else setting.limit
        self.seconds = [service.seconds(n) for n in range(setting.size + 1)]
        self.inside, self.free_at = 0, 0.0
        self.waiting: deque[simpy.Event] = deque()
        self.busy, self.in_work = 0, 0  # replicas, and the pictures that they have
        self.expected, self.turn = 0, 0  # as Batcher's; the number of the timer that counts
        self.levels = [(0.0, 0)]  # (moment, requests inside from then on)
        self.times: list[tuple[float, float]] = []  # (due, done) of each answered
        self.refused: list[float] = []  # when
        self.batches: list[tuple[float, float, int]] = []  # (start, end, pictures)
        self.turns: list[tuple[float, float]] = []  # (start, end) of the front's work

    def request(self) -> Iterator[simpy.Event]:
        """A request's way through; returns whether it was let in. To be refused costs nothing."""
        due = self.env.now
        if self.inside >= self.limit:
            self.refused.append(due)
            return False
        self._step(+1)
        if self.service.front_s:
            yield self.env.timeout(self._on_cpu(self.service.front_s))
        answer = self.env.event()
        self.waiting.append(answer)
        self._seal()
        yield answer
        if self.service.answer_s:
            yield self.env.timeout(self._on_cpu(self.service.answer_s))
        self._step(-1)
        self.times.append((due, self.env.now))
        return True

    def _step(self, change: int) -> None:
        self.inside += change
        self.levels.append((self.env.now, self.inside))

    def _on_cpu(self, seconds: float) -> float:
        """First come, first served: whoever comes knows how long until its turn is over."""
        start = max(self.env.now, self.free_at)
        self.free_at = start + seconds
        self.turns.append((start, self.free_at))
        return self.free_at - self.env.now

    def _seal(self, patient: bool = True) -> None:
        """As Batcher._seal, where its rules are explained."""
        self.turn += 1  # a timer that was set before does not count any more
        while self.waiting and self.busy < self.replicas:
            waiting = len(self.waiting)
            here = max(waiting, self.expected) + self.in_work
            share = min(self.setting.size, math.ceil(here / self.replicas))
            if patient and waiting < min(share, self.expected):
                timer = self.env.timeout(self.setting.wait_s, self.turn)
                timer.callbacks.append(self._waited)
                return
            batch = [self.waiting.popleft() for _ in range(min(share, waiting))]
            seconds, cv = self.seconds[len(batch)], self.service.cv
            if cv:  # a gamma distribution of mean 1
                seconds *= self.draw.gammavariate(cv**-2, cv**2)
            seconds += self.service.hop_s
            if self.service.call_s:
                seconds += self._on_cpu(self.service.call_s)
            self.busy += 1
            self.in_work += len(batch)
            self.expected -= len(batch)
            self.batches.append((self.env.now, self.env.now + seconds, len(batch)))
            self.env.timeout(seconds, batch).callbacks.append(self._answer)

    def _waited(self, timer: simpy.Event) -> None:
        if timer.value == self.turn:
            self._seal(patient=False)

    def _answer(self, work: simpy.Event) -> None:
        for answer in work.value:
            answer.succeed()
        self.busy -= 1
        self.in_work -= len(work.value)
        self.expected = len(self.waiting) + len(work.value)
        self._seal()


def simulate(
    service: Service, setting: Setting, seconds: float = 60, warmup_s: float = 10, seed: int = 0
) -> Outcome:
    """Run the system, empty at first, and count what comes in the `seconds` after the warm-up.

    The same seed gives the same outcome. ValueError: a request would take no time at all.
    """
    if service.seconds(1) <= 0:
        raise ValueError("a replica's time must be above 0: give picture_s or fixed_s")
    env, end, draw = simpy.Environment(), warmup_s + seconds, random.Random(seed)
    share, more = divmod(setting.replicas, setting.fronts)
    counts = [share + (i < more) for i in range(setting.fronts)]
    fronts = [_Front(env, service, setting, count, draw) for count in counts]

    def arrivals():
        while True:
            yield env.timeout(draw.expovariate(setting.rate))
            if env.now >= end:
                return
            env.process(fronts[draw.randrange(len(fronts))].request())

    def client(front):
        while env.now < end:
            if not (yield from front.request()):
                yield env.timeout(REFUSAL_S)

    if setting.rate:
        env.process(arrivals())
    for i in range(setting.clients or 0):
        env.process(client(fronts[i % len(fronts)]))
    env.run()  # until the last answer
    return _outcome(fronts, setting, warmup_s, end)


def _outcome(fronts: list[_Front], setting: Setting, begin: float, end: float) -> Outcome:
    def gathered(name: str, columns: int) -> np.ndarray:
        rows = [row for front in fronts for row in getattr(front, name)]
        return np.array(rows, float).reshape(-1, columns).T

    def within(start, stop):  # seconds of each span that lie in the window
        return np.clip(stop, begin, end) - np.clip(start, begin, end)

    due, done = gathered("times", 2)
    (refused,) = gathered("refused", 1)
    start, stop, pictures = gathered("batches", 3)
    levels = [np.array(front.levels).T for front in fronts]
    due_in, done_in = ((begin <= moments) & (moments < end) for moments in (due, done))
    counted = due_in if setting.rate else done_in
    latencies = 1e3 * (done - due)[counted]
    refusals = ((begin <= refused) & (refused < end)).sum()
    p50, p95, p99 = np.quantile(latencies, (0.5, 0.95, 0.99)) if counted.any() else [math.nan] * 3
    began = (begin <= start) & (start < end)
    window = end - begin
    return Outcome(
        throughput=float(done_in.sum() / window),
        refused=float(refusals / max(1, refusals + due_in.sum())),
        mean_ms=float(latencies.mean()) if counted.any() else math.nan,
        p50_ms=float(p50),
        p95_ms=float(p95),
        p99_ms=float(p99),
        under_way=float(sum((within(at[:-1], at[1:]) * n[:-1]).sum() for at, n in levels) / window),
        batch=float(pictures[began].mean()) if began.any() else math.nan,
        replicas_busy=float(within(start, stop).sum() / window / setting.replicas),
        front_busy=float(within(*gathered("turns", 2)).sum() / window / len(fronts)),
    )


def capacity(service: Service, setting: Setting) -> tuple[float, float]:
    """Requests a second that the fronts can take at most, and the replicas with full batches."""
    cpu_s = service.front_cpu_s(setting.size)
    replicas = setting.replicas * setting.size / service.taken_s(setting.size)
    return setting.fronts / cpu_s if cpu_s else math.inf, replicas


def one_front(service: Service, setting: Setting, requests: int = 20_000, seed: int = 0) -> Outcome:
    """As `simulate`, at the cost of one front: for systems that are large.

    Fronts have nothing in common, so one with its share of the replicas and of the load stands
    for all (what is left over when replicas are shared out is idle). The window holds about
    `requests` requests, and six times what a request takes in a full batch.
    """
    n = setting.fronts
    share = replace(
        setting,
        fronts=1,
        replicas=setting.replicas // n,
        rate=setting.rate and setting.rate / n,
        clients=setting.clients and -(-setting.clients // n),
    )
    rate = min(*capacity(service, share), share.rate or math.inf)
    way_s = service.alone_s(share.size)
    seconds = max(requests / rate, 6 * way_s)
    found = simulate(service, share, seconds, max(seconds / 4, 3 * way_s), seed)
    return replace(found, throughput=n * found.throughput, under_way=n * found.under_way)


# What queueing theory says of systems without batches: the tests hold `simulate` against it.


def erlang_b(servers: int, load: float) -> float:
    """Share of requests refused by servers without a queue. load: rate x service time."""
    share = 1.0
    for n in range(1, servers + 1):
        share = load * share / (n + load * share)
    return share


def erlang_c(servers: int, load: float) -> float:
    """Share of requests that wait (M/M/c), for service time / (servers - load) on average."""
    if load >= servers:
        return 1.0
    refused = erlang_b(servers, load)
    return refused / (1 - load / servers * (1 - refused))
