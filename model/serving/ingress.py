"""KServe's application inside every replica, with Ray Serve's HAProxy in front: what Ray Serve
runs with `--topology ingress`.
"""

import os
from pathlib import Path
from typing import Any

from prometheus_client import make_asgi_app
from ray import serve

from model.serving.application import Application, create_application
from model.serving.batched_model import BatchedModel
from model.serving.config import CannotStart, ServerConfig
from model.serving.errors import reason
from model.serving.garbage import collect_seldom, give_back_freed
from model.serving.ingress_grpc import GrpcMethods
from model.serving.metrics import REPLICAS, forget_the_dead, of_all, refresh
from model.serving.updates import Updates
from model.serving.upstream_ray import listen_on_loopback
from model.serving.worker_thread import WorkerThread

NOT_IDEMPOTENT = (
    "it is not idempotent, and HAProxy sends a request whose replica dies to another one: "
    "use --topology front"
)


@serve.ingress()
class IngressReplica(GrpcMethods):
    """A process with a copy of every model, and KServe's application around them.

    Limits and batches are each replica's own. HAProxy sends a request whose replica dies to another
    one, so models must not mind getting one twice.
    """

    def __init__(self, config: ServerConfig) -> None:
        """Load the models. Raises CannotStart, whose sentence is the last line of what Ray logs."""
        listen_on_loopback()
        self._config = config
        self._workers = {model.name: WorkerThread(model, config.threads) for model in config.models}
        timeout_s = config.limits.request_timeout_s
        self._models = [
            BatchedModel(name, worker, config.batching, timeout_s)
            for name, worker in self._workers.items()
        ]
        self._application: Application | None = None
        self._updates, self._draining, self._made = Updates(), False, False
        for model in self._models:
            if model.load() and not self._workers[model.name].description.idempotent:
                model.refuse(NOT_IDEMPOTENT)
            REPLICAS.labels(model.name).set(model.ready)
        if not any(model.ready for model in self._models):
            raise CannotStart("; ".join(self.failures()))

    def __serve_build_asgi_app__(self):
        """What Ray Serve hands requests to."""
        self._application = create_application(self._models, self._config)
        self._application.admission.draining = self._draining
        self.serve_grpc(self._application)
        collect_seldom()
        give_back_freed()
        folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        asgi = self._application.asgi
        return _WithMetricsOfAll(asgi, Path(folder)) if folder else asgi

    async def check_health(self) -> None:
        """Ray asks this again and again; a replica that raises three times is replaced."""
        refresh()
        for worker in self._loaded():
            await worker.check(self._config.limits.watchdog_timeout_s)

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """As Updates.obey; and while `draining` no model is ready, and each goes on answering.

        Ray also calls this once it has made the replica: CannotStart, which ends a new one, says
        which of the models in `required` could not be loaded. One that runs stays.
        """
        required = config.get("required", ())
        lost = [each.failure for each in self._models if each.failure and each.name in required]
        if lost and not self._made:
            raise CannotStart("; ".join(lost))
        self._made = True
        await self._updates.obey(config, self._reload)
        self._draining = config.get("draining", False)
        if self._application is not None:
            self._application.admission.draining = self._draining

    def _reload(self) -> None:
        """Each model, also after one that fails. Raises RuntimeError, which names those."""
        failed = []
        for model in self._models:
            if model.ready:
                try:
                    self._workers[model.name].reload()
                except Exception as error:
                    failed.append(f"{model.name}: {reason(error)}")
        if failed:
            raise RuntimeError("; ".join(failed))

    def _loaded(self) -> list[WorkerThread]:
        return [self._workers[model.name] for model in self._models if model.ready]

    def failures(self) -> list[str]:
        """Why models could not be loaded, which leaves the others serving."""
        return [model.failure for model in self._models if model.failure]

    def deployed(self) -> str:
        """The configuration with which the application was deployed last, as text."""
        return self._updates.deployed

    def reload_failure(self) -> str | None:
        """Why a model could not be loaded again when this was asked for last."""
        return self._updates.failure


class _WithMetricsOfAll:
    """An ASGI application whose `/metrics` adds up what all replicas on this machine count."""

    def __init__(self, app, folder: Path) -> None:
        """folder: where they count."""
        self._app, self._folder = app, folder
        self._metrics = make_asgi_app(of_all(folder))

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or scope["path"] != "/metrics":
            return await self._app(scope, receive, send)
        refresh()
        forget_the_dead(self._folder)
        await self._metrics(scope, receive, send)
