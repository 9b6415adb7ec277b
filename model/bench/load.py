"""Loads a server as many clients would, checks every answer, and records what was measured.

A closed loop has N clients, each of which sends its next request when the last is answered: it
finds how much a server can do. In an open loop requests come at a rate of their own, whether the
server keeps up or not: it finds how long a user waits at that rate.

A process of its own sends the requests, so that the caller's work does not disturb it and its CPU
time can be told apart. It imports neither torch nor KServe nor Ray, and ends with its caller.
"""

import asyncio
import contextlib
import gc
import itertools
import json
import math
import os
import pickle
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import psutil

from model import shapes

if TYPE_CHECKING:  # it brings KServe, which the generator's process does without
    from model.bench.server import ServerProcess

RIGHT, REFUSED, LOST, UNSENT = "right", "connection refused", "connection lost", "never sent"
WRONG = ("wrong label", "not the reference's label")
PAUSE_S = 0.05  # of a closed-loop client that finds no server: else it would ask without end


@dataclass
class Workload:
    """Requests, encoded once, and what a right answer to each is.

    pictures: encoded. labels: the right one for each. reference: V1 predictions for each picture,
    which its answers are compared with; None: only the labels are. each: pictures in a request;
    there are as many requests as pictures, the i-th holds the i-th picture and those that follow.
    """

    pictures: list[bytes]
    labels: list[str]
    reference: list[list[dict]] | None = None
    each: int = 1
    bodies: list[bytes] = field(init=False, repr=False)  # V1, JSON

    def __post_init__(self) -> None:
        from model.bench.client import v1_body  # not above: see ServerProcess

        requests = [[self.pictures[j] for j in self._of(i)] for i in range(len(self.pictures))]
        self.bodies = [json.dumps(v1_body(pictures)).encode() for pictures in requests]

    def _of(self, request: int) -> list[int]:
        """The numbers of a request's pictures."""
        return [i % len(self.pictures) for i in range(request, request + self.each)]

    @classmethod
    def drawn(cls, count: int = 64, each: int = 1) -> "Workload":
        """`count` different pictures of about 100 kB, the labels in turn."""
        labels = [shapes.LABELS[i % len(shapes.LABELS)] for i in range(count)]
        pictures = [shapes.jpeg(label, seed) for seed, label in enumerate(labels)]
        return cls(pictures, labels, each=each)

    def referenced(self, server: "ServerProcess") -> "Workload":
        """The same; what `server` answers now, asked one at a time, is the reference."""
        from model.bench.client import v1

        return replace(self, reference=[v1(server, [picture])[0] for picture in self.pictures])

    def judge(self, request: int, body: bytes) -> tuple[str, float]:
        """RIGHT or what is wrong with an answer, and its distance from the reference.

        The distance is the largest difference of a label's probability; a label that the answer
        does not name is taken to have the probability of the least likely that it names.
        """
        try:
            predictions = json.loads(body)["predictions"]
            pairs = zip(self._of(request), predictions, strict=True)
            outcomes = [self._judge(picture, prediction) for picture, prediction in pairs]
        except (ValueError, LookupError, TypeError):
            return "unreadable answer", 0.0
        worst = next((outcome for outcome, _ in outcomes if outcome != RIGHT), RIGHT)
        return worst, max(distance for _, distance in outcomes)

    def _judge(self, picture: int, prediction: list[dict]) -> tuple[str, float]:
        expected = self.reference[picture] if self.reference else []
        found = {entry["label"]: entry["probability"] for entry in prediction}
        top, least = prediction[0]["label"], min(found.values())
        apart = [abs(it["probability"] - found.get(it["label"], least)) for it in expected]
        if top != self.labels[picture]:
            outcome = WRONG[0]
        else:
            outcome = WRONG[1] if expected and top != expected[0]["label"] else RIGHT
        return outcome, max(apart, default=0.0)


class Sample(NamedTuple):
    """One request. Times are seconds since the load began."""

    due: float  # when it was to be sent; in a closed loop, when its client was free
    sent: float  # when its client turned to it: connecting, where that is needed, comes after
    done: float  # when its answer was read, or given up
    outcome: str  # RIGHT, or the kind of error
    headers: dict[str, str]  # the answer's x-…, with keep_headers


@dataclass
class Run:
    """What one load measured; all times in seconds.

    The window is what follows the warm-up, whose requests only prepare. A closed loop counts the
    requests done within it: some began before it, as many go on after it, so that Little's law
    holds. An open loop counts those due within it, however late they are done: else the slowest
    would drop out. Errors are counted over the whole run, warm-up and end included.
    """

    seconds: float  # length of the window
    requests: int  # counted, whatever became of them
    sent: int  # in the whole run
    errors: dict[str, int]  # kind -> how many in the whole run; none is left out
    wrong: int  # those of the errors that are answers with a wrong label
    throughput: float  # right answers a second, done within the window
    latencies: list[float] = field(repr=False)  # from due to done, of the right answers counted
    # The same requests from sent to done. In an open loop that is the wrong way: while the server
    # stalls, what waits for a connection is not sent yet, so that a stall seems to concern only
    # as many requests as there are connections (coordinated omission).
    latencies_from_sent: list[float] = field(repr=False)
    under_way: float  # requests sent and not done: mean over the window, by counting
    expected_under_way: float  # the same by Little's law: rate of requests x mean time of each
    distance: float  # the largest from the reference in the whole run
    client_cpu: float  # cores that the generator used in the window
    cpu: dict[str, float]  # the same of each group watched
    began: float  # since 1970
    samples: list[Sample] = field(repr=False)  # of the whole run, in the order they were done
    # With keep_headers, of the right answers counted: x-…, and `sent` and `done`, since 1970.
    headers: list[dict] = field(repr=False)

    def quantile(self, q: float, from_sent: bool = False) -> float:
        """The latency that a share `q` of the right answers keeps; nan if there are none."""
        latencies = self.latencies_from_sent if from_sent else self.latencies
        return float(np.quantile(latencies, q)) if latencies else math.nan

    def littles_law(self) -> float:
        """Requests under way, counted / expected: near 1, or the load was not steady."""
        return self.under_way / self.expected_under_way if self.expected_under_way else math.nan


def closed_loop(url: str, work: Workload, clients: int, seconds: float, **more) -> Run:
    """Load `url` (of V1 predict) with `clients` that each wait for an answer before they go on.

    more: `warmup_s` (2) before the `seconds` that are measured; `timeout_s` (30) of a request,
    and for all that is not done at the end; `keep_headers` (False); `watch`: process id -> name
    of a group of processes, whose CPU time is measured too. Whatever goes wrong with a request is
    counted. ValueError: not to be done like this; RuntimeError: the generator itself failed.
    """
    return _generate(_Load(url, work, clients, None, seconds, **more))


def open_loop(
    url: str, work: Workload, rate: float, seconds: float, *, connections: int = 256, **more
) -> Run:
    """Load `url` with `rate` requests a second at random moments (Poisson).

    connections: at most so many requests are under way; what is due beyond them is sent late.
    more: as for `closed_loop`, and `seed` (0) of the moments. asyncio's clock sends a request up
    to 1 ms after it is due, which counts as latency.
    """
    return _generate(_Load(url, work, connections, rate, seconds, **more))


def _generate(load: "_Load") -> Run:
    """Run the load in a process of its own, which an exception here (an interrupt) ends."""
    process = subprocess.run(
        [sys.executable, "-c", "from model.bench import load; load._main()"],
        input=pickle.dumps(load),
        capture_output=True,
        timeout=load.end + load.timeout_s + 30,
        start_new_session=True,  # an interrupt in the notebook is for the caller only
    )
    if process.returncode:
        raise RuntimeError(f"the load generator failed: {process.stderr.decode()[-2000:]}")
    return pickle.loads(process.stdout)


def _main() -> None:
    load = pickle.load(sys.stdin.buffer)
    gc.disable()  # a collection would hold up requests
    sys.stdout.buffer.write(pickle.dumps(asyncio.run(load.run())))


@dataclass
class _Load:
    """One run, in the generator's process: its clients are tasks, which share connections."""

    url: str
    work: Workload
    clients: int
    rate: float | None  # None: a closed loop
    seconds: float
    warmup_s: float = 2
    timeout_s: float = 30
    seed: int = 0
    keep_headers: bool = False
    watch: Mapping[int, str] = field(default_factory=dict)
    caller: int = field(default_factory=os.getpid)

    def __post_init__(self) -> None:
        if not self.url.startswith("http://"):
            raise ValueError(f"{self.url!r} is no address of a server: http://host:port/path")
        if self.clients < 1 or self.seconds <= 0 or self.rate is not None and self.rate <= 0:
            raise ValueError("clients, connections, rate and seconds are numbers above 0")
        self.end = self.warmup_s + self.seconds
        self.numbers, self.idle, self.samples, self.distance = itertools.count(), [], [], 0.0
        self.level, self.changed, self.area = 0, 0.0, 0.0  # requests under way; times seconds

    def now(self) -> float:
        """Seconds since the load began."""
        return time.monotonic() - self.zero

    async def run(self) -> Run:
        """Run all clients to their end, which `timeout_s` bounds."""
        url = urlsplit(self.url)
        self.host, self.port = url.hostname, url.port or 80
        head = f"POST {url.path or '/'} HTTP/1.1\r\nHost: {url.netloc}\r\n"
        head += "Content-Type: application/json\r\nContent-Length: "
        self.texts = [f"{head}{len(body)}\r\n\r\n".encode() + body for body in self.work.bodies]
        watchman = asyncio.create_task(self._end_with_caller())
        self.began, self.zero = time.time(), time.monotonic()
        moments = self._at_once() if self.rate is None else self._poisson()
        clients = [asyncio.create_task(self._client(moments)) for _ in range(self.clients)]
        await asyncio.sleep(self.warmup_s)
        before = self._cpu_times()
        await asyncio.sleep(self.end - self.now())
        after = self._cpu_times()
        await asyncio.gather(*clients)
        watchman.cancel()
        return self._result({pid: after[pid] - before[pid] for pid in before if pid in after})

    async def _end_with_caller(self) -> None:
        while os.getppid() == self.caller:
            await asyncio.sleep(0.5)
        os._exit(1)

    def _at_once(self) -> Iterator[float]:
        while (now := self.now()) < self.end:
            yield now

    def _poisson(self) -> Iterator[float]:
        moment, draw = 0.0, random.Random(self.seed)
        while (moment := moment + draw.expovariate(self.rate)) < self.end:
            yield moment

    async def _client(self, moments: Iterator[float]) -> None:
        """Take the next moment that no other client has taken, send a request then, and so on."""
        for due in moments:
            if (early := due - self.now()) > 0:
                await asyncio.sleep(early)
            sent = self.now()
            left = self.end + self.timeout_s - sent
            if left <= 0:
                self.samples.append(Sample(due, sent, sent, UNSENT, {}))
                continue
            number, headers = next(self.numbers) % len(self.texts), {}
            self._step(+1)
            try:
                async with asyncio.timeout(min(left, self.timeout_s)):
                    status, headers, body = await self._exchange(self.texts[number])
                outcome = RIGHT if status == 200 else f"HTTP {status}"
            except TimeoutError:
                outcome = "timed out"
            except ConnectionRefusedError:
                outcome = REFUSED
            except (OSError, EOFError):
                outcome = LOST
            except (ValueError, LookupError, asyncio.LimitOverrunError):
                outcome = "not HTTP/1.1"
            done = self._step(-1)
            if outcome == RIGHT:
                outcome, distance = self.work.judge(number, body)
                self.distance = max(self.distance, distance)
            kept = {k: v for k, v in headers.items() if self.keep_headers and k[:2] == "x-"}
            self.samples.append(Sample(due, sent, done, outcome, kept))
            if outcome in (REFUSED, LOST) and self.rate is None:
                await asyncio.sleep(PAUSE_S)

    def _step(self, change: int) -> float:
        """Count a request in or out; what was under way until now goes into the integral."""
        now = self.now()
        within = min(now, self.end) - max(self.changed, self.warmup_s)
        self.area += self.level * max(0.0, within)
        self.level, self.changed = self.level + change, now
        return now

    async def _exchange(self, text: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send a request over the connection used last, or a new one, and read the answer."""
        while self.idle:
            reader, writer = self.idle.pop()
            if not (reader.at_eof() or writer.is_closing()):
                break
            writer.close()  # the server has closed it unused: no request is lost
        else:
            reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(text)
            status, headers, body = await _read_answer(reader)
        except BaseException:
            writer.transport.abort()
            raise
        if headers.get("connection", "").lower() == "close":
            writer.close()
        else:
            self.idle.append((reader, writer))
        return status, headers, body

    def _cpu_times(self) -> dict[int, float]:
        """Seconds of CPU that the generator and each process watched have used so far."""
        times = {os.getpid(): time.process_time()}  # finer than what psutil reads
        for pid in self.watch:
            with contextlib.suppress(psutil.Error):  # it has ended
                used = psutil.Process(pid).cpu_times()
                times[pid] = used.user + used.system
        return times

    def _result(self, used: dict[int, float]) -> Run:
        """used: process id -> seconds of CPU in the window."""
        done = [s for s in self.samples if self.warmup_s <= s.done < self.end]
        due = [s for s in self.samples if self.warmup_s <= s.due < self.end]
        counted = done if self.rate is None else due
        right = [s for s in counted if s.outcome == RIGHT]
        errors = Counter(s.outcome for s in self.samples if s.outcome != RIGHT)
        cpu = dict.fromkeys(self.watch.values(), 0.0)
        for pid, group in self.watch.items():
            cpu[group] += used.get(pid, 0.0) / self.seconds
        return Run(
            seconds=self.seconds,
            requests=len(counted),
            sent=len(self.samples) - errors[UNSENT],
            errors=dict(errors),
            wrong=sum(errors[kind] for kind in WRONG),
            throughput=sum(s.outcome == RIGHT for s in done) / self.seconds,
            latencies=[s.done - s.due for s in right],
            latencies_from_sent=[s.done - s.sent for s in right],
            under_way=self.area / self.seconds,
            expected_under_way=sum(s.done - s.sent for s in done) / self.seconds,
            distance=self.distance,
            client_cpu=used[os.getpid()] / self.seconds,
            cpu=cpu,
            headers=[
                s.headers | {"sent": self.began + s.sent, "done": self.began + s.done}
                for s in (right if self.keep_headers else ())
            ],
            began=self.began,
            samples=self.samples,
        )


async def _read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (names in small letters) and body of an HTTP/1.1 answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
    parts = (line.partition(":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in parts}
    if headers.get("transfer-encoding", "").lower() != "chunked":
        body = await reader.readexactly(int(headers["content-length"]))
    else:
        body = b""
        while size := int((await reader.readline()).partition(b";")[0], 16):
            body += (await reader.readexactly(size + 2))[:-2]
        while await reader.readline() not in (b"\r\n", b""):
            pass  # headers may follow the last chunk
    return int(first.split()[1]), headers, body
