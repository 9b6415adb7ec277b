"""Listens for HTTP and gRPC until a signal comes, in one process or with KServe's `--workers`."""

import asyncio
import functools
import gc
import socket
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

import uvicorn
from kserve.logging import logger
from uvicorn.supervisors import Multiprocess

from model.serving.application import Application, create_application
from model.serving.batched_model import BatchedModel
from model.serving.config import CannotStart, ServerConfig
from model.serving.ending import Ending, signals
from model.serving.grpc_server import GrpcServer
from model.serving.http_server import HttpServer, uvicorn_config
from model.serving.machine import bound_socket, process_age

Wrap = Callable[[Callable], Callable]  # an ASGI application around another

warnings.filterwarnings("ignore", message="ORJSONResponse is deprecated")  # KServe's affair


def serve_models(
    models: list[BatchedModel], config: ServerConfig, wrap: Wrap | None = None
) -> None:
    """Load the models and serve them until SIGTERM or Ctrl-C; requests in flight are finished.

    wrap: puts an ASGI application of one's own around ours; it sees each request first.
    Raises CannotStart when no model can be loaded. Those that can are served, without the others.
    """
    try:
        loaded = [model for model in models if model.load()]
        for model in models:
            if model.failure:
                print(f"not served: {model.failure}", flush=True)
        if not loaded:
            raise CannotStart("; ".join(model.failure for model in models))
        names = [model.name for model in loaded]
        config = replace(config, models=tuple(m for m in config.models if m.name in names))
        _leave_to_itself()
        if config.endpoint.workers > 1:
            _serve_with_workers(models, config, wrap)
        else:
            application = create_application(models, config)
            with asyncio.Runner(loop_factory=_loop_factory(config.endpoint.event_loop)) as runner:
                runner.run(_serve(application, config, wrap))
    finally:
        for model in models:
            model.stop()


def _loop_factory(event_loop: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Python's own event loop unless uvloop is asked for: it brought no gain that shows."""
    if event_loop != "uvloop":
        return None
    import uvloop

    return uvloop.new_event_loop


async def _serve(application: Application, config: ServerConfig, wrap: Wrap | None) -> None:
    """Both protocols on this event loop."""
    ending = Ending()
    with signals(ending.obey):
        asgi = wrap(application.asgi) if wrap else application.asgi
        http = HttpServer(uvicorn_config(asgi, config.endpoint, config.grace_s))
        rpc = await _grpc_server(application, config)
        announcement = asyncio.create_task(_announce(config))
        serving = asyncio.create_task(http.serve())
        waiting = asyncio.create_task(ending.asked.wait())
        await asyncio.wait((serving, waiting), return_when=asyncio.FIRST_COMPLETED)
        announcement.cancel()
        application.admission.draining = True
        await ending.drain(config.endpoint.drain_s)
        logger.info("Stopping the model server")
        http.should_exit = True
        await asyncio.gather(serving, *([rpc.stop(config.grace_s)] if rpc else []))
        waiting.cancel()


async def _grpc_server(application: Application, config: ServerConfig) -> GrpcServer | None:
    """Started; None where there is to be none."""
    if config.endpoint.grpc_port is None:
        return None
    rpc = GrpcServer(config.endpoint, config.grace_s, *application[1:])
    await rpc.start()
    return rpc


def _serve_with_workers(
    models: list[BatchedModel], config: ServerConfig, wrap: Wrap | None
) -> None:
    """HTTP in processes that load the models themselves; gRPC here, in a thread of its own."""
    factory = functools.partial(_worker_application, models, config, wrap)
    more = {"factory": True, "workers": config.endpoint.workers}
    workers = uvicorn_config(factory, config.endpoint, config.grace_s, **more)
    listener = bound_socket(config.endpoint.host, config.endpoint.http_port)
    listener.set_inheritable(True)
    application = create_application(models, config)
    started, ended = Future(), threading.Event()

    async def serve_grpc() -> None:
        try:
            rpc = await _grpc_server(application, config)
        except BaseException as error:  # raised again below
            started.set_exception(error)
            return
        started.set_result(None)
        announcement = asyncio.create_task(_announce(config))
        await asyncio.to_thread(ended.wait)
        announcement.cancel()
        if rpc:
            await rpc.stop(config.grace_s)

    thread = threading.Thread(target=lambda: asyncio.run(serve_grpc()))
    thread.start()
    try:
        started.result()
        _Workers(workers, [listener], ended).run()
    finally:
        ended.set()
        thread.join()


class _Workers(Multiprocess):
    """uvicorn's processes. `ended` is set as they are told to end, for gRPC to end beside them."""

    def __init__(
        self, config: uvicorn.Config, sockets: list[socket.socket], ended: threading.Event
    ) -> None:
        super().__init__(config, sockets)
        self._ended = ended

    def terminate_all(self) -> None:
        self._ended.set()
        super().terminate_all()


def _leave_to_itself() -> None:
    """Have the garbage collector leave alone what is there already: it stays until the end.

    Looking through all that is imported takes a tenth of a second, each time in the middle of some
    requests. (Ray Serve does the same in its replicas.)
    """
    gc.collect()
    gc.freeze()


def _worker_application(models: list[BatchedModel], config: ServerConfig, wrap: Wrap | None):
    """What uvicorn calls in each process of `--workers`."""
    for model in models:
        model.load()
    _leave_to_itself()
    asgi = create_application(models, config).asgi
    return wrap(asgi) if wrap else asgi


async def _announce(config: ServerConfig) -> None:
    """Print the ready line once a connection is taken."""
    while True:
        try:
            _, writer = await asyncio.open_connection(
                config.endpoint.host, config.endpoint.http_port
            )
        except OSError:
            await asyncio.sleep(0.05)
        else:
            writer.close()
            break
    announce(config)


def announce(config: ServerConfig) -> None:
    """Print that the server is ready, what it serves, and where."""
    endpoint = config.endpoint
    scheme = "https" if endpoint.certificate else "http"
    host = endpoint.host_of_address
    line = f"{config.describe()}; REST {scheme}://{host}:{endpoint.http_port}"
    if endpoint.grpc_port is not None:
        line += f", gRPC {host}:{endpoint.grpc_port}"
    print(f"ready after {process_age():.1f} s: {line}", flush=True)
