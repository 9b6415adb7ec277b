"""AlexNet, served by KServe: in the server's own process, or in Ray Serve replicas."""


class CannotStart(RuntimeError):
    """Why a server cannot start, in a sentence for whoever started it."""


# The environment variable that names the folder where processes share weights.
SHARED = "MODEL_SHARED_FOLDER"

# The environment of a Ray cluster that is not to be reached from elsewhere. Made for Macs, by Ray.
STAY_ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
