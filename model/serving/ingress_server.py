"""The process that starts `--topology ingress`: it deploys, waits for a signal, and ends it."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import grpc
from kserve.logging import logger
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub
from ray import serve

from model.serving.config import APPLICATION, CannotStart, EndpointConfig, ServerConfig
from model.serving.deployment import deploy, deployed, is_starting, running
from model.serving.ending import Ending, signals
from model.serving.haproxy import servers, stop_listening
from model.serving.server import announce
from model.serving.upstream_ray import end_controller

TOLD_WITHIN_S = 5  # that the server drains, all replicas are
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def serve_behind_haproxy(config: ServerConfig, folder: Path) -> None:
    """Run KServe in the replicas, behind HAProxy, until SIGTERM or Ctrl-C.

    folder: of HAProxy's files. Raises CannotStart when no model can be loaded. However it ends,
    what is in flight is answered first: HAProxy serves before this process knows that it does.
    """
    try:
        handle = deploy(config)[APPLICATION]
        if isinstance(handle, CannotStart):
            raise handle
        for failure in handle.failures.remote().result(timeout_s=60):
            print(f"not served: {failure}", flush=True)
        asyncio.run(_until_told(config, folder))
    finally:
        logger.info("Stopping the model server")
        try:
            end_controller()
        except Exception as error:  # whatever Ray has: the server ends all the same
            logger.warning("Serve's controller goes on while the server ends: %s", error)
        stop_listening(folder, config.grace_s)


async def _until_told(config: ServerConfig, folder: Path) -> None:
    ending = Ending()
    with signals(ending.obey):
        announcement = asyncio.create_task(_announce(config, folder))
        await ending.asked.wait()
        announcement.cancel()
        if config.endpoint.drain_s and not ending.hurried:
            await asyncio.to_thread(_be_not_ready)
            await ending.drain(config.endpoint.drain_s)


def _be_not_ready() -> None:
    """Have the replicas say that they are not ready; they stay as they were deployed last."""
    try:
        last = deployed(serve.get_app_handle(APPLICATION), TOLD_WITHIN_S)
        if last is None:  # none of them runs
            return
        deploy(last.config, replace(last.state, draining=True), wait=False)
        until = time.monotonic() + TOLD_WITHIN_S
        while is_starting(APPLICATION) and time.monotonic() < until:
            time.sleep(0.05)
    except Exception as error:  # whatever Ray has: the server ends all the same
        logger.warning("the replicas stay ready while the server drains: %s", error)


async def _announce(config: ServerConfig, folder: Path) -> None:
    """Print the ready line once HAProxy knows every replica, and one answers."""
    while not await _is_ready(config.endpoint, folder):
        await asyncio.sleep(0.05)
    announce(config)


async def _is_ready(endpoint: EndpointConfig, folder: Path) -> bool:
    try:
        known = await asyncio.to_thread(_all_known, endpoint, folder)
        return known and await _answers_http(endpoint) and await _answers_grpc(endpoint)
    except Exception as error:  # whatever it is, it may be over soon
        logger.warning("cannot tell whether the server is ready: %s", error)
        await asyncio.sleep(1)
        return False


def _all_known(endpoint: EndpointConfig, folder: Path) -> bool:
    protocols = {"http"} if endpoint.grpc_port is None else {"http", "grpc"}
    return servers(folder, APPLICATION) == dict.fromkeys(protocols, running(APPLICATION))


async def _answers_http(endpoint: EndpointConfig) -> bool:
    try:
        reader, writer = await asyncio.open_connection(endpoint.host, endpoint.http_port)
    except OSError:
        return False
    writer.write(LIVE)
    line = await reader.readline()
    writer.close()
    return b" 200 " in line


async def _answers_grpc(endpoint: EndpointConfig) -> bool:
    if endpoint.grpc_port is None:
        return True
    address = f"{endpoint.host_of_address}:{endpoint.grpc_port}"
    async with grpc.aio.insecure_channel(address) as channel:
        try:
            await GRPCInferenceServiceStub(channel).ServerLive(pb.ServerLiveRequest(), timeout=5)
        except grpc.RpcError:
            return False
    return True
