"""What joins the Ray cluster of a server of ours: its token, its address, another frontend."""

import re
import secrets

from model.loadtest.server_process import ServerProcess


def fresh_token() -> dict[str, str]:
    """The environment of a cluster and of those who may join it."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def ray_address(server: ServerProcess) -> str:
    """host:port of the Ray cluster that a server of ours has started, as its log says."""
    return re.search(r"Ray at (\S+),", server.log.read_text())[1]


def another_frontend(server: ServerProcess, *options: str) -> ServerProcess:
    """One more KServe process in front of the replicas of a server that has a `fresh_token`.

    options: those that the server was started with, of batches and of the number of replicas.
    Raises KeyError when the server was started without such a token.
    """
    environ = server.process.environ()
    token = {name: environ[name] for name in fresh_token()}
    join = ("--address", ray_address(server))
    return ServerProcess("model.serving.frontend", *join, *options, **token)
