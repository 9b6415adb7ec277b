"""The command line that all servers in this folder take, and the addresses they answer at."""

import argparse
import json
import os
import sys

from model.serving.machine import cores

HOST = "127.0.0.1"
NAME = "custom-model"
PREDICT = f"/v1/models/{NAME}:predict"  # this and the next as KServe has them
HEALTH = f"/v2/models/{NAME}/ready"
GIVEN = "PEER_OPTIONS"  # the environment variable by which workers get the command line


def options(module: str, argv: list[str] | None = None) -> argparse.Namespace:
    """What all servers take, from the command line of `module`. argv: default: sys.argv."""
    return parsed(parser(module), argv)


def parser(module: str) -> argparse.ArgumentParser:
    """Of the options that all servers take; a server may add its own."""
    all_take = argparse.ArgumentParser(
        prog=f"python -m {module}", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = all_take.add_argument
    add("--port", "--http_port", type=int, default=8080, help=f"of {HOST}")
    add("--grpc_port", type=int, help="not used where there is no gRPC")
    add("--workers", type=int, default=1, help="processes with a model each")
    add("--model", choices=["alexnet", "timed"], default="alexnet", help="timed: where it is V1")
    add("--precision", choices=["float32", "bfloat16"], default="float32")
    add("--threads", type=int, help="torch's threads a worker: cores / workers")
    add("--max_batch_size", type=int, default=16, help="requests, where it batches")
    add("--batch_wait_ms", type=float, default=2, help="for a batch to fill")
    return all_take


def parsed(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """The options, each with its value. argv: default: sys.argv."""
    found = parser.parse_args(argv)
    found.threads = found.threads or max(1, cores() // found.workers)
    return found


def for_workers() -> dict[str, str]:
    """This process's command line as environment variables, for workers that have another one."""
    return {GIVEN: json.dumps(sys.argv[1:])}


def given() -> argparse.Namespace:
    """The options that `for_workers` has passed on; the defaults where it has not."""
    return options(__name__, json.loads(os.environ.get(GIVEN, "[]")))
