"""The limit: what the model's own work allows where no server stands in the way.

One bare process a core, each with one torch thread, decodes and labels pictures in batches, and
nothing else: no HTTP, no queue, no Ray. No server of this model on this machine can be faster.
"""

import json
import subprocess
import sys
import time

from model import shapes
from model.options import cores

BATCHES = (8, 16, 32)
PICTURES = 64


def limit(
    precision: str = "float32",
    layout: str = "channels_last",
    batches: tuple[int, ...] = BATCHES,
    seconds: float = 2.0,
    processes: int | None = None,
) -> dict[int, float]:
    """Pictures a second that all processes do together, for each size of a batch.

    processes: one a core if not given. seconds: for each size.
    """
    order = json.dumps([precision, layout, batches, seconds])
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "model.bench.limit", order],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(processes or cores())
    ]
    try:
        for worker in workers:
            worker.stdout.readline()  # it is ready
        rates = dict.fromkeys(batches, 0.0)
        for size in batches:  # all at once, so that they share the machine
            for worker in workers:
                worker.stdin.write(f"{size}\n")
                worker.stdin.flush()
            rates[size] = sum(float(worker.stdout.readline()) for worker in workers)
    finally:
        for worker in workers:
            worker.terminate()
            worker.communicate()
    return rates


def one_alone(precision: str = "float32", layout: str = "channels_last", threads: int = 1) -> float:
    """Seconds one picture takes in a process that does nothing else, at a batch of one: median."""
    from model.alexnet import AlexNetModel

    model = AlexNetModel("alone", threads=threads, precision=precision, layout=layout)
    model.load()
    times = []
    for picture in _pictures():
        began = time.perf_counter()
        model.classify([picture])
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def _pictures() -> list[bytes]:
    return [shapes.jpeg(shapes.LABELS[i % len(shapes.LABELS)], i) for i in range(PICTURES)]


def _main() -> None:
    """One bare process: a line when ready, then for each size read a line with its rate."""
    from model.alexnet import AlexNetModel

    precision, layout, batches, seconds = json.loads(sys.argv[1])
    model = AlexNetModel("bare", threads=1, precision=precision, layout=layout)
    model.load()
    pictures = [[picture] for picture in _pictures()]
    for size in batches:
        model.answer_all(pictures[:size])
    print("ready", flush=True)
    for line in sys.stdin:
        size, done, began = int(line), 0, time.perf_counter()
        while (now := time.perf_counter()) < began + seconds:
            at = done % (PICTURES - size + 1)
            model.answer_all(pictures[at : at + size])
            done += size
        print(done / (now - began), flush=True)


if __name__ == "__main__":
    _main()
