"""Clients that behave badly: what they cost everybody else. Works on any KServe-compatible server.

Each experiment returns an Outcome; NotTested when its clients could not do what they were to do.
"""

import asyncio
import contextlib
import math
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import requests

from model.faults.experiment import NotTested
from model.faults.outcome import Outcome, by_outcome
from model.loadtest.generator import closed_loop, loading, open_loop
from model.loadtest.workload import JsonWorkload, Workload

CONNECTED_WITHIN_S = 30  # all slow senders
PATIENCE_S = 3  # of a client of a server that has too much to do
PLAIN = ("400", "404", "413", "415", "422")  # that is refused for what it is, not for when it comes
NO_V1 = {  # what is wrong with a body, for any model: the body
    "nothing in it": b"",
    "no JSON": b"not JSON",
    "half of a JSON": b'{"instances": [',
    "no object": b"[1, 2]",
    "no instances": b'{"texts": []}',
    "instances that are no list": b'{"instances": 7}',
    "not UTF-8": b'{"instances": ["\xff\xfe"]}',
    "deep": b'{"instances": ' + b"[" * 5000 + b"]" * 5000 + b"}",
}
NO_IMAGE = {  # for a model of images
    "an empty list": b'{"instances": []}',
    "an instance of another kind": b'{"instances": [null, {"nothing": true}]}',
    "no base64": b'{"instances": [{"image": {"b64": "?"}}]}',
    "no image": b'{"instances": [{"image": {"b64": "aGVsbG8="}}]}',
}
MALFORMED = NO_V1 | NO_IMAGE


def malformed(url: str, work: Workload | JsonWorkload, seconds: float = 5) -> Outcome:
    """Requests that no model can answer, beside those of eight clients, which it can.

    work: of images, or only what is malformed for any model is sent.
    """
    bodies = MALFORMED if isinstance(work, Workload) else NO_V1
    statuses = Counter()
    with loading(url, work, 8, seconds, warmup_s=0) as others:
        for body in bodies.values():
            time.sleep(seconds / 2 / len(bodies))
            statuses[status_of(url, body)] += 1
        beside = not others.done()
        run = others.result()
    if not beside:
        raise NotTested("the malformed requests took longer than the load beside them")
    plain, lost = sum(statuses[status] for status in PLAIN), sum(run.errors.values())
    return Outcome(
        promise="a bad request gets a 4xx, and affects no other",
        fault=f"{len(bodies)} malformed requests beside 8 clients",
        evidence=f"malformed requests sent: {statuses.total()}",
        requests=dict(statuses),
        found=f"{plain} of {len(bodies)} got a 4xx; {lost} of {run.sent} others lost",
        kept=plain == len(bodies) and run.sent > 0 == lost,
    )


def status_of(url: str, body: bytes, timeout_s: float = 30) -> str:
    """The status that a POST of JSON gets, or the kind of error that its client gets."""
    headers = {"Content-Type": "application/json"}
    try:
        return str(requests.post(url, data=body, headers=headers, timeout=timeout_s).status_code)
    except requests.RequestException as error:
        return type(error).__name__


def overload(url: str, work: Workload, seconds: float = 20) -> Outcome:
    """Three times as many requests arrive as can be answered; their clients wait three seconds."""
    calm = [closed_loop(url, work, clients, seconds / 4, warmup_s=1) for clients in (8, 32)]
    capacity = max(run.throughput for run in calm)
    if not capacity:
        raise NotTested(f"no right response to 8 clients or 32: {calm[0].errors}")
    rate = 3 * capacity
    connections = math.ceil(rate * PATIENCE_S) + 64  # or some would be sent later than they are due
    how = {"warmup_s": 2, "timeout_s": PATIENCE_S, "connections": connections}
    run = open_loop(url, work, rate, seconds, **how)
    in_time = sum(latency <= PATIENCE_S for latency in run.latencies)
    if in_time > 0.9 * run.requests:
        raise NotTested("nearly all were answered in time: it was no overload")
    goodput = in_time / seconds / capacity
    return Outcome(
        promise="overload leaves as many answers as without it",
        fault=f"3 times as many requests as can be answered, {rate:.0f} a second",
        evidence=f"requests without an answer: {run.sent - by_outcome(run)['answered']}",
        requests=by_outcome(run),
        found=f"{goodput:.2f} of its capacity is answered in time",
        kept=goodput >= 0.8,
        facts={"goodput": goodput},
    )


def impatient(url: str, work: Workload, seconds: float = 20, clients: int = 60) -> Outcome:
    """Clients that give up after twice the time that four others wait, and send again at once.

    url: of V1 predict. work: of requests that take a while, of 8 images, say. Goodput is what is
    answered in time; it is compared with what those four get, who wait as long as it takes, and
    told beside it: with what as many get who wait. NotTested where that is twice as much or more:
    four are no load then.
    """
    few = closed_loop(url, work, 4, seconds / 2, warmup_s=2)
    if not few.latencies:
        raise NotTested(f"no right response to 4 clients: {few.errors}")
    many = closed_loop(url, work, clients, seconds / 2, warmup_s=2)
    if many.throughput > 2 * few.throughput:
        raise NotTested("4 clients do less than half of what the server can: send larger requests")
    wait_s = 2 * statistics.median(few.latencies)
    run = closed_loop(url, work, clients, seconds, warmup_s=2, timeout_s=wait_s)
    given_up = run.errors.get("timed out", 0)
    if not given_up:
        raise NotTested("no client gave up: the load was too small")
    goodput = run.throughput / few.throughput
    of_many = run.throughput / many.throughput if many.throughput else math.nan
    return Outcome(
        promise="clients that give up take no time from the others",
        fault=f"{clients} clients, each gives up after {wait_s:.1f} s and sends again",
        evidence=f"requests given up: {given_up}",
        requests=by_outcome(run),
        found=f"goodput {goodput:.2f} of that of 4 clients who wait, {of_many:.2f} of {clients}",
        kept=goodput >= 0.8,
        facts={
            "goodput": goodput,
            "patience_s": wait_s,
            "few": few.throughput,
            "of_many": of_many,
        },
    )


def slow_senders(url: str, work: Workload, seconds: float = 10, connections: int = 1000) -> Outcome:
    """Connections that send a byte of a body now and then, and ten ordinary clients beside them."""
    how = {"clients": 10, "seconds": seconds, "warmup_s": 2}
    before = closed_loop(url, work, **how)
    with trickling(url, connections) as slow:
        if slow.most < 0.9 * connections:
            few = f"only {slow.most} of {connections} connections were open at a time"
            raise NotTested(f"{few}: see ulimit -n, here and at the server")
        during = closed_loop(url, work, **how)
        left = slow.open
    after = closed_loop(url, work, **how)
    calm = max(run.quantile(0.99) for run in (before, after))
    ratio = during.quantile(0.99) / calm
    failed = sum(during.errors.values())
    return Outcome(
        promise="slow senders block nobody else",
        fault=f"{connections} connections that send one byte a second of a body",
        evidence=f"connections made: {slow.made}, open at the end: {left}, bytes sent: {slow.sent}",
        requests=by_outcome(during),
        found=f"p99 {ratio:.2f} times that without them",
        kept=ratio <= 1.5 and not failed,
        facts={"p99": ratio},
    )


@dataclass
class Trickle:
    """What slow senders have done so far."""

    open: int = 0  # connections, now
    most: int = 0  # of them at a time
    made: int = 0  # of them in all, those that were made again included
    sent: int = 0  # bytes of bodies


@contextmanager
def trickling(url: str, connections: int) -> Iterator[Trickle]:
    """In this block so many connections send V1 requests, one byte of the body a second each.

    One that the server closes is made again. The block begins when all are open, or after half a
    minute: see how many there are.
    """
    done, loop, seen = threading.Event(), asyncio.new_event_loop(), Trickle()
    thread = threading.Thread(
        target=loop.run_until_complete, args=[_all(url, connections, done, seen)]
    )
    thread.start()
    until = time.monotonic() + CONNECTED_WITHIN_S
    try:
        while seen.open < connections and thread.is_alive() and time.monotonic() < until:
            thread.join(0.1)
        yield seen
    finally:
        done.set()
        thread.join()
        loop.close()


async def _all(url: str, connections: int, done: threading.Event, seen: Trickle) -> None:
    tasks = [asyncio.create_task(_one(url, seen)) for _ in range(connections)]
    while not done.is_set():
        await asyncio.sleep(0.1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _one(url: str, seen: Trickle) -> None:
    """One slow sender."""
    parts = urlsplit(url)
    head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Length: 1000000\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    while True:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
            seen.open, seen.made = seen.open + 1, seen.made + 1
            seen.most = max(seen.most, seen.open)
            try:
                writer.write(head.encode())
                while True:
                    writer.write(b" ")
                    await writer.drain()
                    seen.sent += 1
                    await asyncio.sleep(1)
            finally:
                seen.open -= 1
                writer.close()
        await asyncio.sleep(1)
