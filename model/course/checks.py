"""Checks of the exercises of notebooks 1 and 4 to 7. Each prints "right: …" or "not yet: …"."""

from collections.abc import Callable
from typing import Any

from model.course.command_line import accepted
from model.serving.machine import cores


async def check_scale_hello(scale_hello: Callable[[int], Any]) -> None:
    """Notebook 1: does `scale_hello(3)` run three replicas?"""
    handle = scale_hello(3)
    if handle is None:
        return print("not yet: scale_hello returns nothing; return what serve.run returns")
    responses = [handle.remote() for _ in range(120)]
    replicas = {await response for response in responses}
    if len(replicas) != 3:
        return print(f"not yet: {len(replicas)} replicas responded, and 3 should run")
    print("right: three replicas responded")


def check_waited(waited: Callable[[list[tuple[float, float, float]]], float]) -> None:
    """Notebook 4: the right percentile, of latencies from when requests were due."""
    prompt = [(float(i), float(i), i + 0.1 + i / 1000) for i in range(20)]
    late = [(i / 10, float(i), i + 0.5) for i in range(20)]
    cases = [
        (prompt, 0.118, "all sent when due"),
        (late, 0.9 * 18 + 0.5, "sent late: users wait from when they were due"),
        (late[::-1], 0.9 * 18 + 0.5, "they need not be in order"),
        (prompt * 5, 0.118, "a hundred requests: the 95th"),
    ]
    for requests, expected, what in cases:
        found = waited(requests)
        if found is None:
            return print("not yet: waited returns nothing")
        if abs(found - expected) > 1e-6:
            return print(f"not yet: {found:.3g} in place of {expected:.3g} ({what})")
    print("right: four cases of four")


def check_batches(batches: Callable[[int, int, int], list[int]]) -> None:
    """Notebook 5: shared out as the batcher does it."""
    cases = [(8, 2, 16), (9, 2, 16), (1, 4, 16), (40, 2, 16), (0, 3, 16), (10, 4, 2)]
    for waiting, free, largest in cases:
        found = batches(waiting, free, largest)
        if found is None:
            return print("not yet: batches returns nothing")
        expected = min(waiting, free * largest)
        fair = not found or max(found) - min(found) <= 1
        if sum(found) != expected or len(found) != min(waiting, free) or not fair:
            return print(
                f"not yet: {waiting} waiting, {free} free, at most {largest} each gives {found}"
            )
    print("right: six cases of six")


def check_low_latency(low_latency: Callable[[int], list[str]]) -> None:
    """Notebook 5: do the options start one replica with all cores that does not wait?"""
    available = cores()
    config = accepted(low_latency, available)
    if isinstance(config, str):
        return print(f"not yet: {config}")
    replicas = config.replicas
    if replicas is None:
        return print("not yet: without Ray there is no replica")
    if (replicas.num_replicas, config.threads, replicas.cpus) != (1, available, available):
        return print(
            f"not yet: these start {replicas.num_replicas or 'more or fewer'} replicas with "
            f"{config.threads} torch threads that reserve {replicas.cpus:g} cores each, "
            f"of {available}"
        )
    if config.batching.where != "off" and config.batching.wait_s > 0:
        return print(f"not yet: a batch waits up to {1000 * config.batching.wait_s:g} ms to fill")
    print("right: one replica with all cores, which does not wait")


def check_replicas_needed(replicas_needed: Callable[[float, float, float], int]) -> None:
    """Notebook 7: utilisation, rounded up."""
    cases = [(100, 0.02, 1, 2), (100, 0.02, 0.7, 3), (1000, 0.01, 0.8, 13), (1, 0.01, 0.5, 1)]
    for rate, image_s, share, expected in cases:
        found = replicas_needed(rate, image_s, share)
        if found is None:
            return print("not yet: replicas_needed returns nothing")
        if found != expected or not isinstance(found, int):
            return print(
                f"not yet: {rate} images a second of {image_s} s each, busy {share:.0%} of the "
                f"time, take {expected} replicas, not {found!r}"
            )
    print("right: four cases of four")


def check_container_cpus(container_cpus: Callable[[int, float], int]) -> None:
    """Notebook 7: the replicas, KServe and Ray fit, and the number is whole."""
    for replicas, each, expected in ((2, 1, 3), (3, 0.5, 3), (1, 1, 2), (4, 2, 9)):
        found = container_cpus(replicas, each)
        if found is None:
            return print("not yet: container_cpus returns nothing")
        if found != expected or not isinstance(found, int):
            return print(
                f"not yet: for {replicas} replicas of {each} CPUs {found!r} in place of {expected}"
            )
    print("right: four cases of four")
