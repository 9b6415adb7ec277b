"""One solution for each exercise; a test puts it in place of the stub and runs the check."""

import base64

from ray import serve


def scale_hello(replicas: int):
    """Notebook 1: the same class with other options; the name stays, so it is replaced."""
    small = Hello.options(num_replicas=replicas, ray_actor_options={"num_cpus": 0.5})  # noqa: F821
    return serve.run(small.bind(), name="hello", route_prefix="/hello")


def my_v2_body(pictures: list[bytes]) -> dict:
    """Notebook 2: one input with as many elements as pictures."""
    data = [base64.b64encode(picture).decode() for picture in pictures]
    image = {"name": "image", "shape": [len(data)], "datatype": "BYTES", "data": data}
    return {"inputs": [image]}


def busy_at_once(spans: list[tuple[float, float]]) -> int:
    """Notebook 3: the largest number is reached at some span's start; an end does not count."""
    return max(sum(start <= moment < end for start, end in spans) for moment, _ in spans)


def four_replicas() -> list[str]:
    """Notebook 3: a quarter of a core for each; the threads follow the cores, at least one."""
    return ["--num_replicas", "4", "--cpus_per_replica", "0.25"]


def clients_needed(rate: float, latency: float) -> int:
    """Notebook 4: Little's law. (Rounded first, as 0.1 and the like are not exact.)"""
    return int(-(-round(rate * latency, 9) // 1))


def waited(requests: list[tuple[float, float, float]]) -> float:
    """Notebook 4: from due to answered; when it was sent does not matter."""
    latencies = sorted(answered - due for due, _, answered in requests)
    return latencies[-(-95 * len(latencies) // 100) - 1]


def batches(waiting: int, free: int, largest: int) -> list[int]:
    """Notebook 5: each worker takes its even share of what is left."""
    found = []
    while waiting and free:
        found.append(min(largest, -(-waiting // free)))
        waiting, free = waiting - found[-1], free - 1
    return found


def low_latency(cores: int) -> list[str]:
    """Notebook 5: one replica gets all cores by default, and as many threads."""
    return ["--num_replicas", "1", "--batch_wait_ms", "0"]


def longest_gap(requests: list[tuple[float, bool]]) -> float:
    """Notebook 6: between right answers, in the order in which they were done."""
    done = sorted(when for when, right in requests if right)
    return max(later - sooner for sooner, later in zip(done, done[1:], strict=False))


def bounded(rate: float, wait_s: float) -> list[str]:
    """Notebook 6: as many as are answered in that time."""
    return ["--max_queued_requests", str(max(1, int(rate * wait_s)))]


def replicas_needed(rate: float, picture_s: float, share: float) -> int:
    """Notebook 7."""
    return int(-(-round(rate * picture_s / share, 9) // 1))


def container_cpus(replicas: int, cpus_per_replica: float) -> int:
    """Notebook 7."""
    return int(-(-replicas * cpus_per_replica // 1)) + 1
