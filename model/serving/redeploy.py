"""Changes a running server without a pause: `python -m model.serving.redeploy --help`"""

from model.serving.lifecycle import cleaning_up, run


def main() -> None:
    """Deploy the models of a running server anew, with these options, and wait until it is done.

    Give all options that the replicas are to have: what is left out returns to its default; only
    the class of a model stays as it is when none is named. Ray Serve changes what differs:
    another number of replicas is started or drained; replicas that are to be made otherwise are
    replaced in turn, each new one before the next old one goes; `--reload` has each load its model
    again. The server in front goes on. Its own options are as it was started: `--batching`, the
    limits, the ports.

    A model whose new version cannot be loaded (a model may check itself in `load`, and raise) is
    deployed as it was before: the old replicas go on, and this command ends with status 1.
    """
    from model.serving.cli import redeploy_config  # here, so that a signal is obeyed from now on

    config, named, reload = redeploy_config()

    import time
    from dataclasses import replace

    from ray import serve

    from model.serving.config import CannotStart
    from model.serving.deployment import deploy, deployed
    from model.serving.ray_cluster import Cluster

    with cleaning_up(), Cluster(config.cluster):
        running = serve.status().applications
        handles = {}
        for name in config.applications:
            if name not in running:
                raise CannotStart(
                    f"no server runs {name!r} on the cluster at {config.cluster.address}"
                )
            handles[name] = serve.get_app_handle(name)
        before = {name: deployed(handle) for name, handle in handles.items()}
        if not named:
            loaded = {m.name: m for old in before.values() if old for m in old.models}
            for model in config.models:
                if model.name not in loaded:
                    raise CannotStart(f"no server has a model {model.name!r}: name its class")
            models = [replace(loaded[m.name], arguments=m.arguments) for m in config.models]
            config = replace(config, models=tuple(models))
        results = deploy(config, time.time() if reload else 0)
        failed = {name: why for name, why in results.items() if isinstance(why, Exception)}
        for name, why in failed.items():
            print(f"{name}: {why}; its old version is deployed again", flush=True)
            if before[name] is None or isinstance(
                deploy(before[name], only=[name])[name], Exception
            ):
                raise CannotStart(f"{name}: {why}; and its old version cannot be deployed again")
        if failed:
            each = "; ".join(f"{name}: {why}" for name, why in failed.items())
            raise CannotStart(f"{each}. It goes on as it was before")
        for name, handle in results.items() if reload else ():
            told = handle.broadcast("reload_failure").results(timeout_s=60, return_exceptions=True)
            for failure in told:
                if isinstance(failure, str):
                    raise CannotStart(f"{name} goes on as it was: {failure}")
    print(config.describe(), flush=True)


if __name__ == "__main__":
    run(main)
