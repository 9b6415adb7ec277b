"""The ladder: from the plain server to the fastest, one lever a rung. `make bench` climbs it.

Each round starts every server anew, in turn, loads it with few and with many clients, and stops
it; the next round takes them in the opposite order. Every run is a record in imgs/ladder.jsonl;
the table and imgs/ladder.png are made from those.
"""

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure
from tqdm import tqdm

from model.bench import load, plots, results
from model.bench.limit import limit, one_alone
from model.bench.server import ServerProcess
from model.options import cores

IMGS = Path(__file__).parents[2] / "imgs"
CLIENTS = (8, 32)
N = min(cores(), 8)
PLAIN, RAY = "model.kserve_server", "model.ray_server"
STRAIGHT = "--threads 1 --layout contiguous --request_log on --batching"  # a straight port to Ray
LIKE_RAY = "--batching server --layout channels_last --request_log off"

DEFAULT = "no log lines: the default"
RUNGS = {  # name -> module, options; from "64 requests at a replica" on each adds one lever
    "plain": (PLAIN, ""),
    "plain, one thread": (PLAIN, "--threads 1"),
    f"plain, {N} workers": (PLAIN, f"--workers {N} --threads 1"),
    "1 replica": (RAY, f"--num_replicas 1 --max_ongoing_requests 5 {STRAIGHT} off"),
    f"{N} replicas": (RAY, f"--max_ongoing_requests 5 {STRAIGHT} off"),
    "64 requests at a replica": (RAY, f"{STRAIGHT} off"),
    "batches in the replica": (RAY, f"{STRAIGHT} replica"),
    "one call a batch": (RAY, f"{STRAIGHT} server"),
    "channels last": (RAY, "--request_log on"),
    DEFAULT: (RAY, ""),
    "bfloat16": (RAY, "--precision bfloat16"),
    "plain with the batcher": (PLAIN, f"--threads {N} {LIKE_RAY}"),
    f"plain, {N} workers, the batcher": (PLAIN, f"--workers {N} --threads 1 {LIKE_RAY}"),
}

BATCHES = "--max_batch_size 16 --batch_wait_ms"
PEERS = {  # other servers with the same model code, each at its best; `make peers`
    f"{server}, {workers} workers, {precision}": (
        f"model.bench.peers.{module}_server",
        f"--workers {workers} --precision {precision} {more}",
    )
    for precision in ("float32", "bfloat16")
    for server, module, workers, more in (
        ("LitServe", "litserve", 1, f"{BATCHES} 2"),
        ("LitServe", "litserve", N, f"{BATCHES} 2"),
        ("FastAPI", "fastapi", N, ""),
    )
}
PEERS_PYTHON = Path(__file__).parents[2] / ".venv-peers" / "bin" / "python"
TARGETS = ("plain", DEFAULT, "bfloat16")  # loaded with one client and with 64 too


def run(name: str, work: load.Workload, seconds: float = 3.0, warmup_s: float = 1.2) -> list[dict]:
    """Start the rung's server, load it with few and with many clients, stop it: the records."""
    about = results.machine() | {"variant": name}
    if name.startswith("limit "):
        precision = name.removeprefix("limit ")
        rates = limit(precision, batches=(16,), seconds=seconds)
        alone = {"alone_ms": 1000 * one_alone(precision)}
        return [about | {"kind": "limit", "throughput": rates[16]} | alone]
    module, options = (RUNGS | PEERS)[name]
    python = PEERS_PYTHON if name in PEERS else sys.executable
    with ServerProcess(module, *options.split(), python=python) as server:
        more = {"seconds_to_ready": server.seconds_to_ready}
        settings = {"seconds": seconds, "warmup_s": warmup_s}
        found = [about | {"kind": "health", "memory": server.memory()} | more]
        for count in (1, *CLIENTS, 64) if name in TARGETS else CLIENTS:
            record = results.measure(server, name, work, clients=count, **settings)
            found.append(record | more)
        found[0] |= results.health_checks(server, work, clients=16)
    return found


def figure(records: list[dict]) -> Figure:
    """The ladder as a figure, from records of rungs and limits."""
    rows = results.summary(record for record in records if record.get("clients") in CLIENTS)
    rows.sort(key=lambda row: list(RUNGS | PEERS).index(row["variant"]))
    machine = f"{records[0]['cpu']}, {records[0]['cores']} cores"
    return plots.rungs(rows, CLIENTS, limits(records), f"Requests a second on {machine}")


def limits(records: list[dict]) -> dict[str, float]:
    """The limit of each precision: the median of the rounds."""
    return {r["variant"]: r["throughput"] for r in results.medians(_of("limit", records))}


def table(records: list[dict]) -> str:
    """What was measured, in Markdown: a line for each rung, medians of the rounds."""
    rows = {(r["variant"], r["clients"]): r for r in results.summary(_of("closed_loop", records))}
    health = {r["variant"]: r for r in results.medians(_of("health", records))}
    heads = " | ".join(f"{n} clients: requests/s | p50 ms | p99 ms" for n in CLIENTS)
    lines = [f"| rung | {heads} | health check p99 ms | ready s | GB |", "|---" * 10 + "|"]
    for name, its in health.items():
        cells = [rows[name, n][key] for n in CLIENTS for key in ("throughput", "p50_ms", "p99_ms")]
        cells += [its["health_p99_ms"], its["seconds_to_ready"], its["memory"] / 1e9]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.3g}" for cell in cells) + " |")
    for (name, n), row in rows.items():
        if n not in CLIENTS:
            lines.append(f"\n{name}, {n} clients: {row['throughput']:.1f} a second, ")
            lines[-1] += f"p50 {row['p50_ms']:.1f} ms"
    for its in results.medians(_of("limit", records)):
        lines.append(f"\n{its['variant']}: {its['throughput']:.0f} a second; ")
        lines[-1] += f"one picture alone {its['alone_ms']:.1f} ms"
    return "\n".join(lines)


def _of(kind: str, records: list[dict]) -> list[dict]:
    return [record for record in records if record["kind"] == kind]


def climb(names: list[str], rounds: int, seconds: float, file: Path) -> list[dict]:
    """Measure the rungs named, in turn, `rounds` times; every record goes into `file` at once."""
    file.unlink(missing_ok=True)
    work = load.Workload.drawn()
    with ServerProcess(PLAIN) as reference:
        work = work.referenced(reference)
    steps = tqdm(list(results.interleaved(names, rounds)), file=sys.stdout, unit="rung")
    for number, name in steps:
        steps.set_postfix_str(name)
        results.append(file, ({"round": number} | record for record in run(name, work, seconds)))
    return results.read(file)


def main() -> None:
    """Climb, print the table, draw the figure."""
    limits = ["limit float32", "limit bfloat16"]
    names = [*limits, *RUNGS, *PEERS]
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("rungs", nargs="*", metavar="RUNG", help=f"of: {'; '.join(names)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a load")
    parser.add_argument("--peers", action="store_true", help="the peers and our own best")
    parser.add_argument("--file", type=Path, help="default: imgs/ladder.jsonl, imgs/peers.jsonl")
    args = parser.parse_args()
    if unknown := set(args.rungs) - set(names):
        parser.error(f"there is no rung {', '.join(unknown)}; there are {'; '.join(names)}")
    ours = [DEFAULT, "bfloat16"]
    usual = [*limits, *ours, *PEERS] if args.peers else [*limits, *RUNGS]
    file = args.file or IMGS / ("peers.jsonl" if args.peers else "ladder.jsonl")
    records = climb(args.rungs or usual, args.rounds, args.seconds, file)
    print(table(records))
    figure(records).savefig(file.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
