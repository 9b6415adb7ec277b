"""Does each promise's test fail without the code that keeps it? `python -m tests.taken_out`

Each edit is made in a tree of its own of the last commit, where the promise's test is to fail. Code
that can be taken out with the test still green is code that nothing tests. About ten minutes; the
last edit takes the bound on memory away, and needs 16 GB.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from model.loadtest.against import tree_of
from model.loadtest.tables import print_row

TESTS = "tests/test_promises.py"
WITHIN_S = 600


class Edit(NamedTuple):
    """Removes the code behind a promise."""

    what: str  # that is
    file: str  # of the serving layer
    old: str  # text in it, which is there once
    new: str
    test: str  # which is to fail


EDITS = {
    "a bad request gets a 4xx": Edit(
        "what a model raises in a replica keeps its kind",
        "errors.py",
        "    if kind is None:\n        return InferenceError",
        "    if True:\n        return InferenceError",
        f"{TESTS}::test_malformed_requests",
    ),
    "slow senders block nobody else": Edit(
        "a place is taken once the body is here",
        "http.py",
        'body = await self._read(dict(scope["headers"]), receive, arriving)',
        "place = controller or self  # which has no in_flight\n"
        "                place.in_flight = getattr(place, 'in_flight', 0) + 1\n"
        '                body = await self._read(dict(scope["headers"]), receive, arriving)\n'
        "                place.in_flight -= 1",
        f"{TESTS}::test_slow_senders",
    ),
    "clients that give up take no time from the others": Edit(
        "a client that goes away cancels its request",
        "http.py",
        "exchange.gone = True\n                task.cancel()",
        "pass",
        f"{TESTS}::test_clients_that_give_up",
    ),
    "overload leaves as many answers as without it": Edit(
        "a limit on what is admitted",
        "admission.py",
        "return self.in_flight >= self.limit",
        "return False",
        "tests/test_reliability.py::test_overload",
    ),
    "no request is lost with a replica": Edit(
        "retries",
        "replica_pool.py",
        "ATTEMPTS = 3 ",
        "ATTEMPTS = 1 ",
        f"{TESTS}::test_killed_replicas",
    ),
    "every admitted request gets a response, however many replicas are lost": Edit(
        "no attempt is made on a replica that is dead",
        "replica_pool.py",
        "while now() < deadline:",
        "while False:",
        "tests/test_replica_pool.py::test_no_attempt_is_spent_on_a_replica_that_is_dead",
    ),
    "a request that crashes replicas takes no other with it": Edit(
        "the last attempt of each request of a batch is made alone",
        "replica_pool.py",
        "if any_crashed and attempts == ATTEMPTS - 1 and len(requests) > 1:",
        "if False:",
        f"{TESTS}::test_poison",
    ),
    "a server that is told to end loses nothing": Edit(
        "connections that are made at the end are taken",
        "http_server.py",
        "[asyncio.create_task(self._take(connection)) for connection in made]",
        "[connection.close() for connection in made] and []",
        "tests/test_lifecycle.py::test_no_connection_is_lost_when_http_stops",
    ),
    "a server that is told to end loses nothing, over gRPC": Edit(
        "calls get UNAVAILABLE before gRPC ends",
        "grpc_server.py",
        "await asyncio.sleep(LAST_CALLS_S)",
        "self._admission.stopping = False",
        "tests/test_grpc_server.py::test_who_calls_as_it_ends_is_told_so",
    ),
    "an update that fails changes nothing": Edit(
        "the old version is deployed again",
        "redeploy.py",
        "        for name, why in failed.items():\n            print(",
        "        for name, why in ():\n            print(",
        f"{TESTS}::test_an_update_that_fails",
    ),
    "several frontends share the replicas evenly": Edit(
        "replicas are asked how busy they are",
        "replica_pool.py",
        'more["shared"] = now - self._others_seen < SHARED_S',
        'more["shared"] = False',
        f"{TESTS}::test_two_frontends",
    ),
    "the memory of large bodies is bounded": Edit(
        "bodies give way to others",
        "receiving.py",
        "self._receiving.make_room()",
        "pass",
        f"{TESTS}::test_large_bodies",
    ),
}


def without(edit: Edit) -> tuple[bool, str]:
    """Run the test without the code: whether it failed, and in a line with what.

    Raises ValueError where the text is not there, RuntimeError where the test itself cannot run.
    """
    with tree_of("HEAD") as tree:
        file = tree / "model" / "serving" / edit.file
        text = file.read_text()
        if text.count(edit.old) != 1:
            raise ValueError(f"{edit.file} does not have, once: {edit.old}")
        file.write_text(text.replace(edit.old, edit.new))
        try:
            ran = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", edit.test],
                cwd=tree,
                env=os.environ | {"PYTHONPATH": str(tree)},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=WITHIN_S,
            )
        except subprocess.TimeoutExpired:
            return True, f"it did not end within {WITHIN_S} s"
    *_, last = ran.stdout.splitlines() or [""]
    if not re.search(r"\d (passed|failed)", last) or "error" in last:
        raise RuntimeError(f"{edit.test} cannot run: {ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    lines = [line[1:].strip() for line in ran.stdout.splitlines() if line.startswith("E  ")]
    return ran.returncode == 1, lines[0][:160] if lines else last


def main() -> None:
    """Print a row for each promise; exit with status 1 if a test passes without its code."""
    parser = argparse.ArgumentParser(prog="python -m tests.taken_out", description=__doc__)
    parser.add_argument("promises", nargs="*", help="the beginnings of their names; default: all")
    args = parser.parse_args()
    chosen = {
        name: edit
        for name, edit in EDITS.items()
        if not args.promises or name.startswith(tuple(args.promises))
    }
    if not chosen:
        parser.error(f"there is no such promise; there are: {'; '.join(EDITS)}")
    kept = 0
    for i, (name, edit) in enumerate(chosen.items()):
        failed, how = without(edit)
        kept += not failed
        row = {"promise": name, "taken out": edit.what, "test": Path(edit.test).name}
        row |= {"it fails": "yes" if failed else "**no**", "with": how.replace("|", "\\|")}
        print_row(row, header=i == 0)
    sys.exit(kept > 0)


if __name__ == "__main__":
    main()
