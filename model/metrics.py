"""What a server tells at `/metrics` beside KServe's own times of preprocess, predict, postprocess.

It is counted in KServe's process, also when replicas do the work. (But where replicas gather
batches themselves, nothing is known here of batches and of who waits for one.)
"""

from prometheus_client import Counter, Gauge, Histogram

REQUESTS = Counter(
    "inference_requests",
    "Requests for predictions, each counted once, by what became of it",
    ["outcome"],  # answered, invalid (4xx), refused (503), failed, abandoned (half sent)
)
RETRIES = Counter(
    "inference_retries", "Requests that were sent to another replica, by the reason", ["reason"]
)
INSIDE = Gauge("inference_requests_inside", "Requests that are being read, wait or are in work")
LIMIT = Gauge("inference_requests_limit", "How many may be inside; more are refused")
WAITING = Gauge("inference_requests_waiting", "Those of them that wait for a worker")
REPLICAS = Gauge("inference_replicas", "Replicas that run")
BATCH = Histogram(
    "inference_batch_pictures", "Pictures in a batch", buckets=[1, 2, 4, 8, 12, 16, 32, 64]
)
