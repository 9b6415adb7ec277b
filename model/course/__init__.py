"""What the notebooks share: showing code and numbers, processes by role, checks of exercises.

Two libraries print a line that tells a reader nothing, unless they are told before they are
imported: gRPC as a server starts, and Ray where ipywidgets is missing.
"""

import logging
import os
import warnings

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
warnings.filterwarnings("ignore", message="IProgress not found")
logging.getLogger("ray.widgets.util").setLevel(logging.WARNING)
