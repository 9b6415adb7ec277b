"""What Ray's state API says of a cluster: its nodes and the actors of Serve, by role.

`python -m model.course.ray_state HOST:PORT` prints the actors by node, as JSON: in a process of its
own, since Ray reads the token of a cluster once, from the environment it is started with.
"""

import json
import os
import subprocess
import sys

from ray.util.state import list_actors, list_nodes

from model.faults.nodes import Nodes


def actors(address: str) -> dict[int, str]:
    """The role of each living actor of Serve, by process id."""
    roles: dict[int, str] = {}
    replicas: dict[str, int] = {}
    for actor in sorted(_living(address), key=lambda actor: actor.pid):
        if actor.class_name == "ServeController":
            roles[actor.pid] = "Serve controller"
        elif actor.class_name == "ProxyActor":
            roles[actor.pid] = "HTTP proxy"
        elif actor.class_name.startswith("ServeReplica:"):
            application = actor.class_name.split(":")[1]
            replicas[application] = replicas.get(application, 0) + 1
            roles[actor.pid] = f"replica {replicas[application]} of {application}"
    return roles


def actors_by_node(cluster: Nodes) -> dict[str, list[str]]:
    """The living nodes of a cluster and the actors of Serve on each, for figures.processes.

    Raises RuntimeError when the cluster does not answer.
    """
    command = [sys.executable, "-m", "model.course.ray_state", cluster.address]
    env = os.environ | cluster.env
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    if ran.returncode:
        raise RuntimeError(f"the cluster does not say where its actors run: {ran.stderr[-1000:]}")
    return json.loads(ran.stdout)


def _living(address: str) -> list:
    return list_actors(address, filters=[("state", "=", "ALIVE")], limit=1000)


def _main(address: str) -> None:
    roles, living = actors(address), _living(address)
    found = {}
    alive = [node for node in list_nodes(address) if node.state == "ALIVE"]
    for node in sorted(alive, key=lambda node: (not node.is_head_node, node.node_ip)):
        here = sorted(roles[actor.pid] for actor in living if actor.node_id == node.node_id)
        found["head node" if node.is_head_node else f"worker at {node.node_ip}"] = here
    print(json.dumps(found))


if __name__ == "__main__":
    _main(sys.argv[1])
