"""Parallel inference with KServe and Ray Serve.

The folders, from what a reader copies to what uses everything: `basics` (two programs in public
API), `alexnet` (the example), `serving` (any KServe model, in replicas or in process), `loadtest`,
`faults`, `capacity`, `course`.
"""

# The environment variable that names a folder where the processes of one server share weights.
SHARED_FOLDER = "MODEL_SHARED_FOLDER"
