"""Deploys a learner's application on a cluster: `python -m model.course.placement ADDRESS FILE`.

In a process of its own, since Ray reads a cluster's token once, from the environment. The
application is what FILE calls `app`; it is deleted when stdin is closed.
"""

import contextlib
import logging
import os
import runpy
import sys
import threading
from typing import Any

import ray
from ray import serve

NAME = "placed"


def main(address: str, file: str) -> None:
    """Deploy it, and wait for the end of stdin. What is wrong with it ends the process: the last
    line of stderr says what it is."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    # As a main program, so that Ray sends its classes to the replicas, which cannot import it.
    application = runpy.run_path(file, run_name="__main__")["app"]
    over = threading.Event()
    threading.Thread(target=_deploy, args=(application, over), daemon=True).start()
    sys.stdin.read()
    over.set()
    serve.delete(NAME)
    os._exit(0)  # serve.run may still wait for a replica that finds no node


def _deploy(application: Any, over: threading.Event) -> None:
    try:
        serve.run(application, name=NAME, route_prefix=None)
    except Exception as error:
        if not over.is_set():
            print(f"{type(error).__name__}: {error}".splitlines()[0], file=sys.stderr, flush=True)
            with contextlib.suppress(Exception):  # what there is of it
                serve.delete(NAME)
            os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
