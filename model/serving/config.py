"""What a server is started with, as frozen values: cli.py makes them, everybody else reads them."""

from dataclasses import dataclass, field
from typing import Literal

DEFAULT_TARGET = "model.alexnet.model:AlexNetModel"  # what is served when no model is named
DEFAULT_NAME = "custom-model"
APPLICATION = "kserve"  # with `--topology ingress`: there is one, whatever it serves


class CannotStart(RuntimeError):
    """Why a server cannot start, in a sentence for whoever started it."""


@dataclass(frozen=True)
class ModelConfig:
    """One model to serve."""

    name: str  # in URLs and metrics; also of the Ray Serve application
    target: str = DEFAULT_TARGET  # MODULE:CLASS
    arguments: tuple[tuple[str, str], ...] = ()  # of the class's constructor, as typed
    folder: str = ""  # where MODULE is looked for first; "": only where Python always looks


@dataclass(frozen=True)
class BatchingConfig:
    """Where requests that wait become a batch, and how large it gets and how long it waits."""

    where: Literal["off", "replica", "frontend"] = "frontend"
    max_size: int = 16  # instances
    wait_s: float = 0.005
    rule: str | None = None  # MODULE:FUNCTION that says when and how much; None: even_share


@dataclass(frozen=True)
class LimitsConfig:
    """How much a server takes on, and how long anybody waits; times in seconds."""

    max_queued_requests: int = 256
    overload_status: int = 503  # or 429, of a request that finds the queue full
    max_body_mb: float = 64.0
    max_body_memory_mb: float = 512.0  # of all bodies that arrive or are worked on
    request_timeout_s: float = 60.0
    per_attempt_timeout_s: float = 20.0  # of one replica, before the request goes to another
    watchdog_timeout_s: float = 60.0  # of one step of a batch, before the replica is replaced


@dataclass(frozen=True)
class EndpointConfig:
    """Where and how a server listens."""

    host: str = "127.0.0.1"
    http_port: int = 8080
    grpc_port: int | None = 8081  # None: no gRPC
    grpc_max_receive_bytes: int = 64 * 2**20
    grpc_max_send_bytes: int = 8 * 2**20
    certificate: tuple[str, str] | None = None  # files of the key and of the certificate
    drain_s: float = 0.0  # after SIGTERM: not ready, and goes on answering
    workers: int = 1  # processes with a copy of the model each; in process only
    event_loop: str = "auto"
    keep_alive_s: int = 65

    @property
    def host_of_address(self) -> str:
        """The host as it stands before a port: IPv6 in brackets."""
        return f"[{self.host}]" if ":" in self.host else self.host


@dataclass(frozen=True)
class ApplicationConfig:
    """What KServe's application offers and logs, wherever it runs."""

    repository_api: bool = False
    access_log: bool = False
    access_log_format: str | None = None
    latency_log: bool = False
    log_config_file: str | None = None


@dataclass(frozen=True)
class ReplicaConfig:
    """What Ray Serve runs for each model."""

    num_replicas: int | None = 1  # None: as the load asks for, between the two below
    min_replicas: int = 1
    max_replicas: int = 1
    target_requests: float = 8.0  # instances in the frontend for each replica there should be
    upscale_delay_s: float = 3.0
    downscale_delay_s: float = 30.0
    max_replicas_per_node: int | None = None
    cpus: float = 1.0
    gpus: float | None = None  # None: an equal part of those of the cluster
    max_ongoing_requests: int = 64


@dataclass(frozen=True)
class ClusterConfig:
    """Which Ray cluster; the ports are those of a cluster of our own, 0 for any free one."""

    address: str | None = None  # host:port of a cluster that runs; None: one of our own
    node_address: str | None = None
    dashboard: int | None = None
    proxy: int | None = None
    haproxy: EndpointConfig | None = None  # where Ray Serve's HAProxy listens; None: nowhere
    num_cpus: int = 1


@dataclass(frozen=True)
class ServerConfig:
    """All of it. `replicas` is None for a server that holds its models in its own process."""

    models: tuple[ModelConfig, ...]
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    application: ApplicationConfig = field(default_factory=ApplicationConfig)
    threads: int = 1  # OMP_NUM_THREADS of each process that holds a model
    replicas: ReplicaConfig | None = None
    topology: Literal["front", "ingress"] = "front"  # KServe in front of replicas, or in each
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    @property
    def applications(self) -> dict[str, tuple[ModelConfig, ...]]:
        """What Ray Serve runs: the name of each application, and the models in its replicas."""
        if self.topology == "ingress":
            return {APPLICATION: self.models}
        return {model.name: (model,) for model in self.models}

    @property
    def admission_limit(self) -> int:
        """Requests that may be in flight for one model: those worked on, and the queue.

        In one replica, where KServe is in each.
        """
        if self.replicas is None or self.topology == "ingress":
            return self.limits.max_queued_requests + self.batching.max_size
        batches = self.batching.where == "frontend"
        each = self.batching.max_size if batches else self.replicas.max_ongoing_requests
        return self.limits.max_queued_requests + self.replicas.max_replicas * each

    @property
    def grace_s(self) -> float:
        """How long requests in flight may take once the server is told to end: all that they may,
        and a second for what is told to those that are too late."""
        return self.limits.request_timeout_s + 1

    def describe(self) -> str:
        """What is served, and how, for the line that a server prints when it is ready."""
        models = ", ".join(f"{model.name} ({model.target})" for model in self.models)
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        if self.replicas is None:
            place = f"in this process with {threads}"
        else:
            few, most = self.replicas.num_replicas, self.replicas.max_replicas
            count = str(most) if few else f"{self.replicas.min_replicas} to {most}"
            place = f"{count} replica{'s' if most > 1 else ''} of {threads}"
            place += ", KServe in each" if self.topology == "ingress" else ""
        where = self.batching.where
        if self.topology == "ingress" and where == "frontend":
            where = "replica"  # which is where KServe is
        return f"{models}; {place}, batching {where}"

    def listing(self) -> str:
        """Every value, in one line for the log."""
        parts = [f"model={m.name}={m.target} {dict(m.arguments)}" for m in self.models]
        places = (self.endpoint, self.application, self.replicas, self.cluster)
        for part in (self.batching, self.limits, *places):
            if part is not None:
                parts += [f"{name}={value}" for name, value in vars(part).items()]
        return f"options: {' '.join(parts)} threads={self.threads} topology={self.topology}"
