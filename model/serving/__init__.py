"""Serves any `kserve.Model`, in Ray Serve replicas or in process: `python -m model.serving --help`

The way of a request, in the order of the calls:
http.py or grpc_server.py -> dataplane.py -> batched_model.py -> batcher.py -> replica_pool.py
-> (routing.py chooses) replica.py, which is a worker_thread.py -> the model's own class.
With `--in_process` a worker_thread.py stands where replica_pool.py does, and nothing follows.
With `--topology ingress` all of that is inside each replica, ingress.py, and HAProxy chooses one.
"""
