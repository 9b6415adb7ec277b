"""AlexNet behind FastAPI and uvicorn: `python -m model.loadtest.peers.fastapi_server`."""

import argparse
import asyncio
import multiprocessing
import signal
import socket
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from multiprocessing.connection import wait
from multiprocessing.synchronize import Barrier

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from model.loadtest.peers import command_line, kserve_model


def application(options: argparse.Namespace, all_ready: Barrier) -> FastAPI:
    """One worker's application: requests one at a time, in a thread beside the event loop.

    It is ready when every worker has reached `all_ready`.
    """
    thread = ThreadPoolExecutor(max_workers=1)

    async def run(function, *args):
        return await asyncio.get_running_loop().run_in_executor(thread, function, *args)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.model = await run(kserve_model.load_model, options)
        await run(all_ready.wait)
        yield

    app = FastAPI(lifespan=lifespan)

    @app.get(command_line.HEALTH)
    async def ready() -> Response:
        return Response()

    @app.post(command_line.PREDICT)
    async def predict(request: Request) -> JSONResponse:
        [response] = await run(kserve_model.predict_all, app.state.model, [await request.json()])
        return JSONResponse(response)

    return app


def serve(options: argparse.Namespace, all_ready: Barrier, listener: socket.socket) -> None:
    """Be one worker."""
    config = uvicorn.Config(application(options, all_ready), log_level="warning")
    uvicorn.Server(config).run([listener])


def main() -> None:
    """Serve until SIGINT or SIGTERM, or until a worker ends.

    uvicorn's own `workers` share one listening socket, from which one worker may take all
    connections. Linux shares them out when each worker has a socket of its own.
    """
    options = command_line.options("model.loadtest.peers.fastapi_server")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    address = (command_line.HOST, options.port)
    if sys.platform == "linux":
        listeners = [socket.create_server(address, reuse_port=True) for _ in range(options.workers)]
    else:
        listeners = [socket.create_server(address)] * options.workers
    spawn = multiprocessing.get_context("spawn")
    all_ready = spawn.Barrier(options.workers)
    workers = [spawn.Process(target=serve, args=(options, all_ready, own)) for own in listeners]
    try:
        for worker in workers:
            worker.start()
        wait([worker.sentinel for worker in workers])
    except KeyboardInterrupt:
        pass
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


if __name__ == "__main__":
    main()
