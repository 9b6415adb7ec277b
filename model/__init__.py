"""AlexNet, served by KServe: in the server's own process, or in Ray Serve replicas."""


class CannotStart(RuntimeError):
    """Why a server cannot start, in a sentence for whoever started it."""
