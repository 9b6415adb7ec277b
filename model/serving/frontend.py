"""KServe in front of applications that run already: `python -m model.serving.frontend --help`"""

from model.serving.lifecycle import cleaning_up, run


def main() -> None:
    """Serve until SIGTERM or Ctrl-C; the applications stay, and several may stand in front of one.

    It runs on a node of the Ray cluster. Give the options that the applications were deployed
    with: `--batching` and `--max_replicas` count here too.
    """
    from model.serving.cli import frontend_config  # here, so that a signal is obeyed from now on

    config = frontend_config()

    from ray import serve
    from ray.serve.exceptions import RayServeException

    from model.serving.config import CannotStart
    from model.serving.ray_cluster import Cluster
    from model.serving.replica_pool import ReplicaPool
    from model.serving.start import serve_backends

    print(config.listing(), flush=True)
    with cleaning_up(), Cluster(config.cluster):
        backends = {}
        for name in (model.name for model in config.models):
            try:
                handle = serve.get_app_handle(name)
            except RayServeException:
                raise CannotStart(
                    f"no application {name!r} runs on the Ray cluster at {config.cluster.address}: "
                    "deploy it first, or name another"
                ) from None
            backends[name] = ReplicaPool(name, handle, config.limits)
        serve_backends(backends, config)


if __name__ == "__main__":
    run(main)
