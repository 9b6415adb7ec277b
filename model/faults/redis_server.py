"""A Redis server, in which Ray's head keeps what the next head must know."""

import secrets
import shutil
import subprocess

import psutil

from model.serving.machine import WITH_PARENT, free_port

# Written so because Ray rewrites 127.0.0.1 to this machine's own address.
HOST = "127.0.0.01"


class Redis:
    """A Redis server on loopback; ends with `stop` or the `with` block.

    `address` (host:port) and `password` are what Ray's head needs.
    """

    def __init__(self) -> None:
        """Start it; raises FileNotFoundError where `redis-server` is missing."""
        if not (server := shutil.which("redis-server")):
            raise FileNotFoundError("redis-server is not installed (Debian's package has the name)")
        self.address, self.password = f"{HOST}:{free_port()}", secrets.token_hex(16)
        port = self.address.split(":")[1]
        self._process = psutil.Popen(
            [*WITH_PARENT, server, "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        # By way of stdin: the password is in no command line, and nothing is written to disk.
        settings = f'bind {HOST}\nport {port}\nrequirepass {self.password}\nsave ""\n'
        self._process.stdin.write(settings.encode())
        self._process.stdin.close()

    def stop(self) -> None:
        """End it; what it kept is gone."""
        self._process.terminate()
        self._process.wait(10)

    def __enter__(self) -> "Redis":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
