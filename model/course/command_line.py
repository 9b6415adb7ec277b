"""What `python -m model.serving` makes of options, without starting it."""

from collections.abc import Callable
from typing import Any

from model.serving.cli import server_config
from model.serving.config import ServerConfig
from model.serving.machine import free_port


def accepted(exercise: Callable[..., list[str]], *arguments: Any) -> ServerConfig | str:
    """The configuration from the options that an exercise returns, or what is wrong with them."""
    options = exercise(*arguments)
    if options is None:
        return f"{exercise.__name__} returns nothing"
    if not isinstance(options, list) or not all(isinstance(word, str) for word in options):
        return 'return a list of strings, as in ["--threads", "1"]'
    try:
        return server_config([f"--http_port={free_port()}", f"--grpc_port={free_port()}", *options])
    except SystemExit as exit_:
        return str(exit_)


def refusal(*options: str) -> None:
    """Print what `python -m model.serving` says to options that it does not accept."""
    print(accepted(lambda: list(options)))
