"""A network of virtual hosts on this machine, whose wires can be cut."""

import os
import subprocess
from pathlib import Path

import psutil


class Network:
    """Hosts on a network of their own: namespaces of Linux, wired to a bridge. It takes root.

    Ends with `end` or the `with` block.
    """

    def __init__(self) -> None:
        """Make the bridge; raises OSError where the tool `ip` is missing or does not succeed."""
        number = os.getpid() % 250
        self.bridge, self._subnet = f"ray-br{number}", f"10.213.{number}"
        self.head, self._hosts = f"{self._subnet}.1", 0
        _ip(f"link add {self.bridge} type bridge")
        _ip(f"addr add {self.head}/24 dev {self.bridge}")
        _ip(f"link set {self.bridge} up")

    def add(self) -> tuple[str, list[str]]:
        """Add a host; returns its address, and what to put before a command to run it there.

        Raises OSError as the constructor does.
        """
        self._hosts += 1
        wire, host = f"{self.bridge}-{self._hosts}", self._host(self._hosts)
        address = f"{self._subnet}.{self._hosts + 1}"
        _ip(f"netns add {host}")
        _ip(f"link add {wire} type veth peer name eth0 netns {host}")
        _ip(f"link set {wire} master {self.bridge}")
        _ip(f"link set {wire} up")
        for command in ("link set lo up", f"addr add {address}/24 dev eth0", "link set eth0 up"):
            _ip(f"-n {host} {command}")
        return address, ["ip", "netns", "exec", host]

    def cut(self, number: int) -> str:
        """Take the wire of a host down, numbered from 1 on: nothing arrives, nothing is closed.

        Returns the evidence, the state of the wire; RuntimeError when it is up still.
        """
        wire = f"{self.bridge}-{number}"
        _ip(f"link set {wire} down")
        state = Path(f"/sys/class/net/{wire}/operstate").read_text().strip()
        if state != "down":
            raise RuntimeError(f"the wire of host {number} is {state}")
        return f"the wire of host {number} is {state}"

    def sent(self) -> int:
        """Bytes that went over all wires so far, to hosts and from them."""
        counters = psutil.net_io_counters(pernic=True)
        wires = (n for name, n in counters.items() if name.startswith(self.bridge + "-"))
        return sum(n.bytes_sent + n.bytes_recv for n in wires)

    def _host(self, number: int) -> str:
        return f"{self.bridge}-host{number}"

    def end(self) -> None:
        """Remove the hosts, whose processes have ended, and the bridge.

        Raises OSError, once it has tried all, where something could not be removed.
        """
        hosts = range(1, self._hosts + 1)
        commands = [f"link del {self.bridge}-{number}" for number in hosts]
        commands += [f"netns del {self._host(number)}" for number in hosts]
        failures = []
        for command in (*commands, f"link del {self.bridge}"):
            try:
                _ip(command)
            except OSError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def _ip(command: str) -> None:
    ran = subprocess.run(["ip", *command.split()], capture_output=True, text=True, timeout=10)
    if ran.returncode:
        raise OSError(f"ip {command}: {ran.stderr.strip()}")
