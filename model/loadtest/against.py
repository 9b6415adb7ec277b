"""This commit's default server beside another commit's: `python -m model.loadtest.against COMMIT`.

Both are started from their own trees with the same environment, loaded in turn, and stopped; in
each round the order is reversed, so that the machine's drift meets both alike. What is printed are
ratios, this commit / the other: the median of the rounds, the least and the largest.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tqdm import tqdm

from model.loadtest import records
from model.loadtest.server_process import ServerProcess
from model.loadtest.summary import interleaved
from model.loadtest.tables import print_row
from model.loadtest.workload import Workload

ROOT = Path(__file__).parents[2]


@contextmanager
def tree_of(commit: str) -> Iterator[Path]:
    """A folder with the files of a commit, while the block lasts. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory(prefix="tree-") as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def compare(
    other: Path, commands: tuple[str, str], clients: list[int], rounds: int, seconds: float
) -> dict[str, list[tuple[float, float]]]:
    """Measure both servers, in turn.

    other: the tree of the other commit. commands: module and options, of this commit's server and
    of the other's. clients: of the loads, each of `seconds`. Returns for each quantity the pairs
    (this commit's, the other's), one a round.
    """
    work, found = Workload.drawn(), defaultdict(list)
    places = [(ROOT, commands[0]), (other, commands[1])]
    for number in tqdm(range(rounds), desc="rounds", file=sys.stdout):
        first = 0 if number % 2 == 0 else 1
        with ExitStack() as stack:
            servers: dict[int, ServerProcess] = {}
            for i in (first, 1 - first):
                folder, (module, *options) = places[i][0], places[i][1].split()
                server = ServerProcess(module, *options, folder=folder, PYTHONPATH=str(folder))
                servers[i] = stack.enter_context(server)
            values = [
                {"ready, s": s.seconds_to_ready, "memory, GB": s.memory() / 1e9}
                for _, s in sorted(servers.items())
            ]
            for count in clients:
                halves = interleaved((first, 1 - first), 2)
                measured = defaultdict(list)
                for _, i in halves:
                    how = {"clients": count, "seconds": seconds / 2, "warmup_s": 1}
                    record = records.measure(servers[i], str(i), work, **how)
                    if record["errors"]:
                        raise RuntimeError(f"requests failed: {record['error_kinds']}")
                    measured[i].append(record)
                for i, runs in measured.items():
                    for name in ("throughput", "p50_ms", "p95_ms"):
                        mean = statistics.mean(run[name] for run in runs)
                        values[i][f"{count} clients, {name}"] = mean
        for name in values[0]:
            found[name].append((values[0][name], values[1][name]))
    return found


def main() -> None:
    """Measure, and print the machine and a table."""
    parser = argparse.ArgumentParser(prog="python -m model.loadtest.against", description=__doc__)
    parser.add_argument("commit", help="the other commit")
    parser.add_argument("--this", default="model.serving", help="module and options here")
    parser.add_argument("--other", default="model.serving", help="module and options there")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="of a load, in two halves")
    args = parser.parse_args()
    with tree_of(args.commit) as tree:
        pairs = compare(tree, (args.this, args.other), args.clients, args.rounds, args.seconds)
    print(json.dumps(records.machine()))
    for i, (name, values) in enumerate(pairs.items()):
        here, there = (statistics.median(column) for column in zip(*values, strict=True))
        ratios = sorted(ours / theirs for ours, theirs in values)
        row = {"what": name, "this commit": here, args.commit[:7]: there}
        row |= {"ratio": statistics.median(ratios), "least": ratios[0], "largest": ratios[-1]}
        shown = {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()}
        print_row(shown, header=i == 0)


if __name__ == "__main__":
    main()
