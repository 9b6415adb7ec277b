"""Changes a running server without a pause: `python -m model.serving.redeploy --help`"""

from model.serving.lifecycle import cleaning_up, run


def main() -> None:
    """Deploy the models of a running server anew, with these options, and wait until it is done.

    Give all options that the replicas are to have: what is left out returns to its default; only
    the class of a model stays as it is when none is named. Ray Serve changes what differs:
    another number of replicas is started or drained; replicas that are to be made otherwise are
    replaced in turn, each new one before the next old one goes; `--reload` has each load its model
    again. The server in front goes on. Its own options are as it was started: `--batching`, the
    limits, the ports. (With `--topology ingress` the ports, `--drain_s` and HAProxy's time limits
    are; everything else belongs to the replicas. Models that are not named stay as they are.)

    A model whose new version cannot be loaded (a model may check itself in `load`, and raise) is
    deployed as it was before: the old replicas go on, and this command ends with status 1. What it
    cannot bring back is a file that was changed: a replica reads the model's files as it starts.
    """
    from model.serving.cli import redeploy_config  # here, so that a signal is obeyed from now on

    config, named, reload = redeploy_config()

    import time
    from dataclasses import replace

    from ray import serve

    from model.serving.config import APPLICATION, CannotStart
    from model.serving.deployment import State, deploy, deploy_again, deployed
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
        there = [model for old in before.values() if old for model in old.config.models]
        if not named:
            loaded = {model.name: model for model in there}
            for model in config.models:
                if model.name not in loaded:
                    raise CannotStart(f"no server has a model {model.name!r}: name its class")
            models = [replace(loaded[m.name], arguments=m.arguments) for m in config.models]
            config = replace(config, models=tuple(models))
        updated = {model.name for model in config.models}
        if config.topology == "ingress":  # all models of the server are in one application
            new = {model.name: model for model in config.models}
            if not there:
                print(
                    "no replica says which models there are: those named here are all", flush=True
                )
            kept = [new.pop(model.name, model) for model in there]  # in the order that they have
            config = replace(config, models=(*kept, *new.values()))
        now = time.time()
        # A model that is not named, and could not be loaded before, need not be now.
        required = {name for old in before.values() if old for name in old.state.required}
        required |= updated
        state = State(
            reload_at=now if reload else 0, deployed_at=now, required=tuple(sorted(required))
        )
        results = deploy(config, state)
        failed = {name: why for name, why in results.items() if isinstance(why, Exception)}
        outcomes = []
        for name, why in failed.items():
            print(f"{name}: {why}; deploying its old version again", flush=True)
            try:
                deploy_again(name, before[name])
                outcomes.append(f"{name}: {why}. It goes on as it was before")
            except CannotStart as error:
                outcomes.append(f"{name}: {why}; and {error}")
        if outcomes:
            raise CannotStart("; ".join(outcomes))
        for name, handle in results.items() if reload else ():
            told = handle.broadcast("reload_failure").results(timeout_s=60, return_exceptions=True)
            for failure in told:
                if isinstance(failure, str):
                    what = "what failed" if name == APPLICATION else "it"
                    raise CannotStart(
                        f"{name} could not be loaded again ({failure}): {what} goes on as it was"
                    )
    print(config.describe(), flush=True)


if __name__ == "__main__":
    run(main)
