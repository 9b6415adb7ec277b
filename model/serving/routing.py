"""Which replica gets a call, and how many replicas there should be: what Ray asks us for both."""

from ray.serve.request_router import RequestRouter


class AssignedReplicaRouter(RequestRouter):
    """Sends a batch to the replica that the batcher assigned to it; other calls to the least busy.

    The batcher knows which replica is idle. Ray's own router would have to guess: it counts a
    call as under way until some time after its result is there.
    """

    async def choose_replicas(self, candidate_replicas, pending_request=None):
        """Groups of replicas in order; of a group Ray takes the one with the shortest queue."""
        index = pending_request.kwargs.get("worker_index") if pending_request else None
        if index is None or not candidate_replicas:
            return [candidate_replicas]
        in_order = sorted(candidate_replicas, key=lambda replica: replica.replica_id.unique_id)
        return [[in_order[index % len(in_order)]]]


def scale_by_backlog(context):
    """Ray's autoscaling policy for requests that wait in the frontend, where Ray sees none.

    Returns how many replicas there should be, and nothing to remember.
    """
    backlogs = (context.aggregated_metrics or {}).get("backlog", {})
    return max(backlogs.values(), default=0) / context.config.get_target_ongoing_requests(), {}
