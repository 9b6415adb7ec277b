"""Listens for HTTP and gRPC until a signal comes, in one process or with KServe's `--workers`."""

import asyncio
import functools
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

from kserve.logging import logger
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess
from uvicorn.supervisors.multiprocess import Process

from model.serving.application import Application, create_application
from model.serving.batched_model import BatchedModel
from model.serving.config import CannotStart, ServerConfig
from model.serving.ending import Ending, signals
from model.serving.garbage import collect_seldom, give_back_freed, leave_what_is_there
from model.serving.grpc_server import GrpcServer
from model.serving.http_server import HttpServer, uvicorn_config
from model.serving.machine import bound_socket, process_age

LOOK_S = 0.05  # a process that serves answers within that
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
        leave_what_is_there()
        collect_seldom()
        give_back_freed()
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
    application = create_application(models, config)
    started, ended = Future(), threading.Event()

    async def serve_grpc() -> None:
        try:
            rpc = await _grpc_server(application, config)
        except BaseException as error:  # raised again below
            started.set_exception(error)
            return
        started.set_result(None)
        await asyncio.to_thread(ended.wait)
        if rpc:
            await rpc.stop(config.grace_s)

    thread = threading.Thread(target=lambda: asyncio.run(serve_grpc()))
    thread.start()
    try:
        started.result()
        _Workers(functools.partial(_worker_application, models, config, wrap), config, ended).run()
    finally:
        ended.set()
        thread.join()


class _Workers(Multiprocess):
    """uvicorn's processes, and the ready line once each of them serves."""

    def __init__(self, factory: Callable, config: ServerConfig, ended: threading.Event) -> None:
        """factory: of the application, in each process. ended: set as they are told to end, for
        gRPC to end beside them."""
        endpoint = config.endpoint
        more = {"factory": True, "workers": endpoint.workers}
        how = _Listener if sys.platform == "linux" else bound_socket
        listener = how(endpoint.host, endpoint.http_port)
        super().__init__(uvicorn_config(factory, endpoint, config.grace_s, **more), [listener])
        self._server, self._ended, self._announced = config, ended, False
        self._ready: set[Process] = set()

    def run(self) -> None:
        """Until a signal. Raises CannotStart where a process cannot load what was loaded here."""
        super().run()
        if any(process.exitcode == STARTUP_FAILURE for process in self.processes):
            raise CannotStart("a process of --workers could not load its models: see above")

    def keep_subprocess_alive(self) -> None:
        """Twice a second. One that starts is left alone: uvicorn would wait for its answer, for as
        long as an import takes, or for a minute where it ends, and obey no signal meanwhile."""
        starting = [process for process in self.processes if process not in self._ready]
        self._ready.update(process for process in starting if process.is_ready(LOOK_S))
        if all(process.process.is_alive() for process in self.processes):
            if not self._ready.issuperset(self.processes):
                return
            if not self._announced:
                self._announced = True
                announce(self._server)
        super().keep_subprocess_alive()

    def terminate_all(self) -> None:
        self._ended.set()
        super().terminate_all()


class _Listener:
    """What becomes a socket of its own in each process that it is sent to; Linux shares out the
    connections.

    Of a socket that processes share, one may take all connections; and the process that started
    them has it, too: it would go on accepting while they end.
    """

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port

    def __reduce__(self) -> tuple:
        return bound_socket, (*self._address, True)


def _worker_application(models: list[BatchedModel], config: ServerConfig, wrap: Wrap | None):
    """What uvicorn calls in each process of `--workers`; ends it where a model does not load."""
    for model in models:
        if not model.load() and any(model.name == served.name for served in config.models):
            print(f"not served: {model.failure}", flush=True)
            sys.exit(STARTUP_FAILURE)
    leave_what_is_there()
    collect_seldom()
    give_back_freed()
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
