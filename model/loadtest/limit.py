"""The upper bound: what the model's own work allows where no server is in the way.

One bare process a core, each with one torch thread, reads requests, runs the model on batches and
writes responses, and does nothing else: no HTTP, no queue, no Ray. No server of this model on this
machine can be faster.
"""

import json
import os
import subprocess
import sys
import time

from model.loadtest.workload import Workload
from model.serving.machine import cores

BATCHES = (8, 16, 32)
IMAGES = 64
FAILED = "a bare process of the model has failed, see its message above"


def limit(
    precision: str = "float32",
    memory_format: str = "channels_last",
    batches: tuple[int, ...] = BATCHES,
    seconds: float = 2.0,
    processes: int | None = None,
) -> dict[int, float]:
    """Images a second that all processes do together, for each size of a batch.

    precision, memory_format: as AlexNetModel's. processes: one a core if not given. seconds: for
    each size. Raises RuntimeError when a process fails.
    """
    order = json.dumps([precision, memory_format, batches, seconds])
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "model.loadtest.limit", order],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            text=True,
        )
        for _ in range(processes or cores())
    ]
    try:
        for worker in workers:
            if worker.stdout.readline() != "ready\n":
                raise RuntimeError(FAILED)
        rates = dict.fromkeys(batches, 0.0)
        for size in batches:  # all at once, so that they share the machine
            for worker in workers:
                worker.stdin.write(f"{size}\n")
                worker.stdin.flush()
            rates[size] = sum(_rate(worker.stdout.readline()) for worker in workers)
    finally:
        for worker in workers:
            worker.terminate()
            worker.communicate()
    return rates


def _rate(line: str) -> float:
    """What a bare process says; nothing when it has ended."""
    if not line:
        raise RuntimeError(FAILED)
    return float(line)


def one_alone(precision: str = "float32", memory_format: str = "channels_last") -> float:
    """Seconds that one image takes in a process that does nothing else, in a batch of one: mean."""
    return 1 / limit(precision, memory_format, batches=(1,), processes=1)[1]


def main() -> None:
    """Be one bare process: say when ready, then for each size read write a line with its rate."""
    from model.alexnet.model import AlexNetModel  # here, so that `limit` does not import torch

    precision, memory_format, batches, seconds = json.loads(sys.argv[1])
    model = AlexNetModel("bare", precision=precision, memory_format=memory_format)
    model.load()
    requests = [json.loads(body) for body in Workload.drawn(IMAGES).bodies]

    def answer(some: list[dict]) -> None:
        for result in model.predict_batch([model.preprocess(request) for request in some]):
            model.postprocess(result)

    for size in batches:
        answer(requests[:size])
    print("ready", flush=True)
    for line in sys.stdin:
        size, done, began = int(line), 0, time.perf_counter()
        while (now := time.perf_counter()) < began + seconds:
            first = done % (IMAGES - size + 1)
            answer(requests[first : first + size])
            done += size
        print(done / (now - began), flush=True)


if __name__ == "__main__":
    main()
