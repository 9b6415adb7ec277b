"""Deploys a learner's application on a cluster: `python -m model.course.placement ADDRESS FILE`.

In a process of its own, since Ray reads a cluster's token once, from the environment. The
application is what FILE calls `app`; it is deleted when stdin is closed.
"""

import logging
import os
import runpy
import sys
import threading

import ray
from ray import serve

NAME = "placed"


def main(address: str, file: str) -> None:
    """Deploy it, and wait for the end of stdin; what is wrong with the file goes to stderr."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    # As a main program, so that Ray sends its classes to the replicas, which cannot import it.
    application = runpy.run_path(file, run_name="__main__")["app"]
    how = {"name": NAME, "route_prefix": None}
    threading.Thread(target=serve.run, args=(application,), kwargs=how, daemon=True).start()
    print("deployed", flush=True)
    sys.stdin.read()
    serve.delete(NAME)
    os._exit(0)  # serve.run may wait for a replica that finds no node


if __name__ == "__main__":
    main(*sys.argv[1:])
