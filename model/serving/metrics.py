"""What a server tells at `/metrics` beside KServe's own times of preprocess, predict, postprocess.

It is counted in KServe's process, also when replicas do the work. (Where replicas gather batches
themselves, nothing is known here of their batches and of what waits there.)
"""

from prometheus_client import Counter, Gauge, Histogram

REQUESTS = Counter(
    "inference_requests",
    "Requests for predictions, each counted once, by what became of it",
    ["model", "outcome"],  # answered, invalid (4xx), rejected (503), failed, abandoned
)
RETRIES = Counter(
    "inference_retries", "Requests sent to another replica, by the reason", ["model", "reason"]
)
IN_FLIGHT = Gauge(
    "inference_requests_in_flight", "Requests admitted and not yet answered", ["model"]
)
ADMISSION_LIMIT = Gauge(
    "inference_admission_limit", "Requests that may be in flight; more are rejected", ["model"]
)
BODY_BYTES = Gauge(
    "inference_body_bytes", "Bytes of request bodies that arrive or are worked on, over HTTP"
)
QUEUED = Gauge("inference_requests_queued", "Requests in flight that wait for a worker", ["model"])
REPLICAS = Gauge("inference_replicas", "Replicas that run", ["model"])
BATCH_SIZE = Histogram(
    "inference_batch_size",
    "Instances in a batch",
    ["model"],
    buckets=[1, 2, 4, 8, 12, 16, 32, 64],
)
