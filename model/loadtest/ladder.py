"""The ladder: from a plain server to the fastest, one optimisation a step. `make bench` runs it.

Each round starts every server anew, in turn, loads it with few and with many clients, and stops
it; the next round takes them in the opposite order. Every run is a record in imgs/ladder.jsonl;
the table and imgs/ladder.png are made from those.
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure
from tqdm import tqdm

from model.loadtest import plots, records
from model.loadtest.client import with_reference
from model.loadtest.configurations import CONFIGURATIONS, DEFAULT, IN_EACH, IN_PROCESS, PEERS
from model.loadtest.limit import limit, one_alone
from model.loadtest.summary import interleaved, medians, summary
from model.loadtest.workload import Workload

IMGS = Path(__file__).parents[2] / "imgs"
CLIENTS = (8, 32)
# Loaded with one client and with 64 too.
TARGETS = ("plain", DEFAULT, "bfloat16", IN_EACH, IN_PROCESS)
LIMITS = {"limit float32": "float32", "limit bfloat16": "bfloat16"}  # name -> precision


def run(name: str, work: Workload, seconds: float = 3.0) -> list[dict]:
    """Measure a configuration, or an upper bound, once: its records.

    name: of CONFIGURATIONS, PEERS or LIMITS. The server is started, loaded with few and with many
    clients, and stopped.
    """
    about = records.machine() | {"variant": name}
    if precision := LIMITS.get(name):
        rates = limit(precision, batches=(16,), seconds=seconds)
        alone = {"alone_ms": 1000 * one_alone(precision)}
        return [about | {"kind": "limit", "throughput": rates[16]} | alone]
    configuration = (CONFIGURATIONS | PEERS)[name]
    if configuration.v2:
        work = replace(work, v2=True)
    with configuration.start() as server:
        more = {"seconds_to_ready": server.seconds_to_ready}
        how = {"seconds": seconds, "warmup_s": configuration.warmup_s}
        found = [about | {"kind": "health", "memory": server.memory()} | more]
        for count in (1, *CLIENTS, 64) if name in TARGETS else CLIENTS:
            record = records.measure(server, name, work, clients=count, **how)
            found.append(record | more)
        found[0] |= records.health_checks(server, work, clients=16)
    return found


def run_all(names: list[str], rounds: int, seconds: float, file: Path) -> list[dict]:
    """Run all that are named, in turn, `rounds` times; every record goes into `file` at once.

    names: as of `run`. seconds: of each load. Returns all records.
    """
    file.unlink(missing_ok=True)
    with CONFIGURATIONS["plain"].start() as reference:
        work = with_reference(Workload.drawn(), reference)
    steps = tqdm(list(interleaved(names, rounds)), file=sys.stdout, unit="run")
    for number, name in steps:
        steps.set_postfix_str(name)
        records.append(file, ({"round": number} | record for record in run(name, work, seconds)))
    return records.read(file)


def table(measured: list[dict]) -> str:
    """What was measured, in Markdown: a line for each configuration, medians of the rounds."""
    rows = {(r["variant"], r["clients"]): r for r in summary(_of("closed_loop", measured))}
    heads = " | ".join(f"{n} clients: requests/s | p50 ms | p99 ms" for n in CLIENTS)
    lines = [f"| configuration | {heads} | health check p99 ms | ready s | GB |"]
    lines.append("|---" * 10 + "|")
    for its in medians(_of("health", measured)):
        name = its["variant"]
        cells = [rows[name, n][key] for n in CLIENTS for key in ("throughput", "p50_ms", "p99_ms")]
        cells += [its["health_p99_ms"], its["seconds_to_ready"], its["memory"] / 1e9]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.3g}" for cell in cells) + " |")
    for (name, n), row in rows.items():
        if n not in CLIENTS:
            lines.append(f"\n{name}, {n} clients: {row['throughput']:.1f} a second, ")
            lines[-1] += f"p50 {row['p50_ms']:.1f} ms"
    for its in medians(_of("limit", measured)):
        lines.append(f"\n{its['variant']}: {its['throughput']:.0f} a second; ")
        lines[-1] += f"one image alone {its['alone_ms']:.1f} ms"
    return "\n".join(lines)


def figure(measured: list[dict]) -> Figure:
    """The ladder as a figure, from records of configurations and limits."""
    rows = summary(record for record in measured if record.get("clients") in CLIENTS)
    rows.sort(key=lambda row: list(CONFIGURATIONS | PEERS).index(row["variant"]))
    machine = f"{measured[0]['cpu']}, {measured[0]['cores']} cores"
    limits = {r["variant"]: r["throughput"] for r in medians(_of("limit", measured))}
    return plots.configurations(rows, CLIENTS, limits, f"Requests a second on {machine}")


def beside_peers() -> list[str]:
    """The limits, our own best and the peers that are installed.

    Those in bfloat16 only where that is faster on this machine.
    """
    installed = [name for name, peer in PEERS.items() if Path(peer.python).exists()]
    names = [*LIMITS, *installed]
    rates = {p: limit(p, batches=(16,), seconds=1)[16] for p in LIMITS.values()}
    if rates["bfloat16"] > rates["float32"]:
        return names
    return [name for name in names if "bfloat16" not in name]


def _of(kind: str, measured: Iterable[dict]) -> list[dict]:
    return [record for record in measured if record["kind"] == kind]


def main() -> None:
    """Run the ladder, print the table, draw the figure."""
    names = [*LIMITS, *CONFIGURATIONS, *PEERS]
    listed = "; ".join(names)
    parser = argparse.ArgumentParser(
        prog="python -m model.loadtest.ladder", description="Measures configurations of servers."
    )
    parser.add_argument("names", nargs="*", metavar="CONFIGURATION", help=f"of: {listed}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a load")
    parser.add_argument("--peers", action="store_true", help="the peers and our own best")
    parser.add_argument("--file", type=Path, help="default: imgs/ladder.jsonl, imgs/peers.jsonl")
    args = parser.parse_args()
    if unknown := set(args.names) - set(names):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {listed}")
    file = args.file or IMGS / ("peers.jsonl" if args.peers else "ladder.jsonl")
    chosen = args.names or (beside_peers() if args.peers else [*LIMITS, *CONFIGURATIONS])
    measured = run_all(chosen, args.rounds, args.seconds, file)
    print(table(measured))
    figure(measured).savefig(file.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
