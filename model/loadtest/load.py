"""One load test as the load generator's process runs it: clients, moments, what was measured."""

import asyncio
import contextlib
import errno
import gc
import itertools
import os
import pickle
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import psutil

from model.loadtest.connections import Connections
from model.loadtest.run import LOST, REFUSED, REJECTED, RIGHT, UNSENT, WRONG, Run, Sample
from model.loadtest.workload import Workload

AT_ONCE, AS_TOLD = "at once", "as told"
OWN = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL)  # what this machine lacks, not the server
MOST_FILES = 65_536
PAUSE_S = 0.05  # of a closed-loop client that cannot connect: it would try without end


def main() -> None:
    """Run the load that stdin holds, pickled; write a byte as it begins, then the pickled Run."""
    load = pickle.load(sys.stdin.buffer)
    gc.disable()  # a collection would hold up requests
    _open_as_many_files_as_may_be()
    sys.stdout.buffer.write(pickle.dumps(asyncio.run(load.run(_say_that_it_begins))))


def _open_as_many_files_as_may_be() -> None:
    """A connection is one, and some systems start programs with room for 256."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # only Unix has such a limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def _say_that_it_begins() -> None:
    sys.stdout.buffer.write(b"!")
    sys.stdout.buffer.flush()


def _pause(headers: dict[str, str]) -> float:
    """The seconds of a Retry-After; without one that is a number, a second."""
    said = headers.get("retry-after", "")
    return float(said) if said.isdecimal() else 1.0


@dataclass
class Load:
    """One run: its clients are tasks, which share connections.

    The fields are the arguments of `closed_loop` and `open_loop`; clients: of an open loop the
    number of connections; caller: the process with which this one ends.
    """

    url: str
    work: Workload
    clients: int
    rate: float | None  # None: a closed loop
    seconds: float
    warmup_s: float = 2
    timeout_s: float = 30
    seed: int = 0
    keep_headers: bool = False
    retry: str = ""  # of what is rejected: AT_ONCE, AS_TOLD by Retry-After, or not at all
    watch: Mapping[int, str] = field(default_factory=dict)
    caller: int = field(default_factory=os.getpid)

    def __post_init__(self) -> None:
        if not self.url.startswith("http://"):
            raise ValueError(f"{self.url!r} is no address of a server: http://host:port/path")
        if self.clients < 1 or self.seconds <= 0 or self.rate is not None and self.rate <= 0:
            raise ValueError("clients, connections, rate and seconds are numbers above 0")
        self.end = self.warmup_s + self.seconds
        if self.retry not in ("", AT_ONCE, AS_TOLD):
            raise ValueError(f"retry is {AT_ONCE!r} or {AS_TOLD!r}, or empty")
        self.numbers, self.samples, self.distance = itertools.count(), [], 0.0
        self.retries = 0
        self.level, self.changed, self.area = 0, 0.0, 0.0  # requests in flight; times seconds

    def now(self) -> float:
        """Seconds since the load began."""
        return time.monotonic() - self.zero

    async def run(self, begins: Callable[[], object]) -> Run:
        """Run all clients to their end, which `timeout_s` bounds. begins: is called as they do."""
        url = urlsplit(self.url)
        self.connections = Connections(url.hostname, url.port or 80)
        head = f"POST {url.path or '/'} HTTP/1.1\r\nHost: {url.netloc}\r\n"
        head += "Content-Type: application/json\r\nContent-Length: "
        self.texts = [f"{head}{len(body)}\r\n\r\n".encode() + body for body in self.work.bodies]
        watchman = asyncio.create_task(self._end_with_caller())
        self.began, self.zero = time.time(), time.monotonic()
        begins()
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
            until = min(self.end, sent) + self.timeout_s
            if sent >= until:
                self.samples.append(Sample(due, sent, sent, UNSENT, {}))
                continue
            number = next(self.numbers) % len(self.texts)
            self._step(+1)
            outcome, headers, body = await self._exchange(number, until)
            while outcome == REJECTED and self.retry:
                pause = _pause(headers) if self.retry == AS_TOLD else 0
                if self.now() + pause >= until:
                    break
                await asyncio.sleep(pause)
                self.retries += 1
                outcome, headers, body = await self._exchange(number, until)
            done = self._step(-1)
            if outcome == RIGHT:
                outcome, distance = self.work.judge(number, body)
                self.distance = max(self.distance, distance)
            kept = {k: v for k, v in headers.items() if self.keep_headers and k[:2] == "x-"}
            self.samples.append(Sample(due, sent, done, outcome, kept))
            if outcome in (REFUSED, LOST) and self.rate is None:
                await asyncio.sleep(PAUSE_S)

    async def _exchange(self, number: int, until: float) -> tuple[str, dict[str, str], bytes]:
        """Send a request and wait for its response: (outcome, headers, body)."""
        headers, body = {}, b""
        try:
            async with asyncio.timeout(until - self.now()):
                status, headers, body = await self.connections.exchange(self.texts[number])
            outcome = RIGHT if status == 200 else f"HTTP {status}"
        except TimeoutError:
            outcome = "timed out"
        except ConnectionRefusedError:
            outcome = REFUSED
        except (OSError, EOFError) as error:
            if getattr(error, "errno", None) in OWN:
                raise
            outcome = LOST
        except (ValueError, LookupError, asyncio.LimitOverrunError):
            outcome = "not HTTP/1.1"
        return outcome, headers, body

    def _step(self, change: int) -> float:
        """Count a request in or out; what was in flight until now goes into the integral."""
        now = self.now()
        within = min(now, self.end) - max(self.changed, self.warmup_s)
        self.area += self.level * max(0.0, within)
        self.level, self.changed = self.level + change, now
        return now

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
            in_flight=self.area / self.seconds,
            expected_in_flight=sum(s.done - s.sent for s in done) / self.seconds,
            distance=self.distance,
            client_cpu=used[os.getpid()] / self.seconds,
            cpu=cpu,
            headers=[
                s.headers | {"sent": self.began + s.sent, "done": self.began + s.done}
                for s in (right if self.keep_headers else ())
            ],
            began=self.began,
            samples=self.samples,
            retries=self.retries,
            warmup_s=self.warmup_s,
        )
