"""What a deployment's `user_config` asks of its replicas, which go on meanwhile."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from model.serving.errors import reason

logger = logging.getLogger("ray.serve")  # in a replica it writes to the replica's log file


class Updates:
    """One replica's: whether it is to load its models again, and how it was deployed last."""

    def __init__(self) -> None:
        self.deployed = ""  # the configuration, as text
        self.failure: str | None = None  # why loading again failed, when it was asked for last
        self._reload_at: float | None = None

    async def obey(self, config: dict[str, Any], reload: Callable[[], None]) -> None:
        """config: {"reload_at": a moment}; a later one than before asks for `reload`; and in
        `deployed`, how the application was deployed.

        Ray calls the replica with this also once it is made. Where loading fails it goes on with
        what it has: Ray would end it, and all others with it.
        """
        moment, self.deployed = config["reload_at"], config.get("deployed", "")
        if self._reload_at is not None and moment > self._reload_at:
            self.failure = None
            try:
                await asyncio.get_running_loop().run_in_executor(None, reload)
            except Exception as error:
                logger.exception("the model could not be loaded again")
                self.failure = reason(error)
        self._reload_at = max(moment, self._reload_at or moment)
