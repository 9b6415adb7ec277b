"""Which replica gets a call, and how many replicas there should be: what Ray asks us for both."""

import asyncio
import random

from ray.serve.request_router import RequestRouter

PROBE_WITHIN_S = 0.1


class AssignedReplicaRouter(RequestRouter):
    """Sends a batch to the replica that the batcher assigned to it; other calls to the least busy.

    The batcher knows which replica is idle. Ray's own router would have to guess: it counts a
    call as under way until some time after its result is there. Where other frontends use the
    replicas too, each is asked how busy it is, and one of the least busy gets the batch: the one of
    the last time, if it is among them, so that frontends keep out of each other's way.
    """

    def initialize_state(self, **_):
        """Which replica the batches with an index went to last."""
        self._last = {}

    async def choose_replicas(self, candidate_replicas, pending_request=None):
        """Groups of replicas in order; of a group Ray takes the one with the shortest queue."""
        said = pending_request.kwargs if pending_request else {}
        index = said.get("worker_index")
        if index is None or not candidate_replicas:
            return [candidate_replicas]
        if said.get("shared"):
            idle = {replica.replica_id: replica for replica in await least_busy(candidate_replicas)}
            chosen = self._last.get(index)
            self._last[index] = chosen if chosen in idle else random.choice([*idle])
            return [[idle[self._last[index]]]]
        in_order = sorted(candidate_replicas, key=lambda replica: replica.replica_id.unique_id)
        return [[in_order[index % len(in_order)]]]


async def least_busy(replicas):
    """Those with the fewest calls under way, whoever made them; all where none can say."""
    asked = (replica.get_queue_len(deadline_s=PROBE_WITHIN_S) for replica in replicas)
    told = await asyncio.gather(*asked, return_exceptions=True)
    known = [length for length in told if isinstance(length, int)]
    if not known:
        return replicas
    return [r for r, length in zip(replicas, told, strict=True) if length == min(known)]


def scale_by_backlog(context):
    """Ray's autoscaling policy for requests that wait in the frontends, where Ray sees none.

    Each replica reports what it was told of the backlog of each frontend. Returns how many replicas
    there should be, and nothing to remember.
    """
    backlog = sum(
        max(told.values(), default=0)
        for name, told in (context.aggregated_metrics or {}).items()
        if name.startswith("backlog")
    )
    return backlog / context.config.get_target_ongoing_requests(), {}
