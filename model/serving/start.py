"""Starts a server as its configuration says: in this process, or in front of Ray Serve replicas."""

from model.serving.backend import Backend, Unavailable
from model.serving.batched_model import BatchedModel
from model.serving.config import CannotStart, ServerConfig
from model.serving.lifecycle import cleaning_up
from model.serving.server import Wrap, serve_models


def start(config: ServerConfig, wrap: Wrap | None = None) -> None:
    """Serve all models of the configuration until SIGTERM or Ctrl-C.

    wrap: puts an ASGI application of one's own around ours; it sees each request first.
    Raises CannotStart when no model can be loaded, or when requests do not pass this process and
    there is something to put around it.
    """
    if wrap is not None and config.topology == "ingress":
        raise CannotStart(
            "with --topology ingress requests do not pass this process, which is to check them: "
            "leave --topology out"
        )
    print(config.listing(), flush=True)
    if config.replicas is None:
        _in_process(config, wrap)
    elif config.topology == "ingress":
        _behind_haproxy(config)
    else:
        _in_replicas(config, wrap)


def serve_backends(
    backends: dict[str, Backend], config: ServerConfig, wrap: Wrap | None = None
) -> None:
    """Serve models whose backends are there. backends: of each, by the model's name."""
    timeout_s = config.limits.request_timeout_s
    models = [
        BatchedModel(name, backend, config.batching, timeout_s)
        for name, backend in backends.items()
    ]
    serve_models(models, config, wrap)


def _in_process(config: ServerConfig, wrap: Wrap | None) -> None:
    from model.serving.worker_thread import WorkerThread

    backends = {model.name: WorkerThread(model, config.threads) for model in config.models}
    serve_backends(backends, config, wrap)


def _behind_haproxy(config: ServerConfig) -> None:
    """Start Ray, which runs all of it; this process waits for a signal."""
    from model.serving.haproxy import haproxy_variables

    with cleaning_up(), haproxy_variables(config.limits, config.endpoint) as folder:
        # Ray reads the variables as it is imported.
        from model.serving.ingress_server import serve_behind_haproxy
        from model.serving.ray_cluster import Cluster

        with Cluster.announced(config.cluster, config.applications):
            serve_behind_haproxy(config, folder)


def _in_replicas(config: ServerConfig, wrap: Wrap | None) -> None:
    """Start Ray or join it, and deploy each model as an application of its own."""
    from model.serving.deployment import deploy
    from model.serving.ray_cluster import Cluster
    from model.serving.replica_pool import ReplicaPool

    with cleaning_up(), Cluster.announced(config.cluster, config.applications):
        backends: dict[str, Backend] = {}
        for name, handle in deploy(config).items():
            if isinstance(handle, Exception):
                backends[name] = Unavailable(str(handle))
            else:
                backends[name] = ReplicaPool(name, handle, config.limits)
        serve_backends(backends, config, wrap)
