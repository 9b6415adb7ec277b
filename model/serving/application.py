"""KServe's application with our limits around it, made by one function wherever it runs."""

import logging
from typing import NamedTuple

from kserve.logging import configure_logging, trace_logger
from kserve.logging import logger as kserve_logger
from kserve.model_repository import ModelRepository
from kserve.model_server import app
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from kserve.protocol.rest.server import RESTServer

from model.serving.admission import Admission
from model.serving.batched_model import BatchedModel
from model.serving.config import ApplicationConfig, ServerConfig
from model.serving.dataplane import ClosedRepository, StrictDataPlane
from model.serving.errors import add_handlers
from model.serving.http import HttpMiddleware
from model.serving.receiving import Receiving


class Application(NamedTuple):
    """What serves the models: over HTTP as an ASGI application, and what gRPC needs beside it."""

    asgi: HttpMiddleware
    dataplane: StrictDataPlane
    repository: ModelRepositoryExtension
    admission: Admission
    receiving: Receiving


def create_application(models: list[BatchedModel], config: ServerConfig) -> Application:
    """KServe's endpoints for these models, behind admission control, limits and metrics.

    models: loaded, or with a `failure`; nothing is known here of what is behind them, nor of who
    calls this. To be called once in a process, as KServe has one FastAPI application in each.
    """
    offers = config.application
    _set_up_logging(offers)
    registry = ModelRepository()
    for model in models:
        model.enable_latency_logging = offers.latency_log
        registry.update(model)
    admission = Admission([model.name for model in models], config.admission_limit)
    dataplane = StrictDataPlane(registry, admission)
    kind = ModelRepositoryExtension if offers.repository_api else ClosedRepository
    repository = kind(model_registry=registry)
    RESTServer(
        "kserve.model_server:app",
        dataplane,
        repository,
        config.endpoint.http_port,
        access_log_format=offers.access_log_format,
    ).create_application()  # adds its endpoints to `app`
    if not offers.access_log:  # KServe's middleware that writes to it
        app.user_middleware[:] = [
            m for m in app.user_middleware if m.cls.__name__ != "TimingMiddleware"
        ]
    add_handlers(app)
    receiving = Receiving(int(config.limits.max_body_memory_mb * 2**20))
    request_ids = config.topology == "front"
    asgi = HttpMiddleware(app, admission, receiving, config.limits, request_ids)
    return Application(asgi, dataplane, repository, admission, receiving)


def _set_up_logging(config: ApplicationConfig) -> None:
    """KServe's loggers; without access log neither KServe nor uvicorn writes lines a request."""
    if not kserve_logger.handlers:
        configure_logging(config.log_config_file)
    if not config.access_log:
        trace_logger.setLevel(logging.WARNING)
        access = logging.getLogger("uvicorn.access")
        access.handlers, access.propagate = [], False  # so uvicorn does not format them at all
