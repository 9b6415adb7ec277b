"""AlexNet for servers beside which KServe cannot be imported: this is its network alone.

MLServer's protocol buffers have the names of KServe's, and one process cannot have both. The Python
that is built into Triton may be older than the standard library that it finds, and then lacks ssl.
"""

import pybase64
import torch

from model.alexnet import images
from model.alexnet.network import load_network

TOP = 5  # labels of an image, as AlexNetModel has it


class Classifier:
    """The network, ready."""

    def __init__(self, precision: str, threads: int) -> None:
        """precision: float32 or bfloat16. threads: torch's, of the thread that calls this."""
        torch.set_num_threads(threads)
        network, self.labels = load_network()
        self.dtype = getattr(torch, precision)
        self.network = network.to(self.dtype, memory_format=torch.channels_last)

    def predict(self, texts: list[str | bytes]) -> tuple[list[str], list[float]]:
        """The likeliest labels of each image and their probabilities, one image after the other.

        texts: the images, encoded, as base64.
        """
        decoded = [images.preprocess(pybase64.b64decode(text)) for text in texts]
        batch = torch.stack(decoded).to(self.dtype, memory_format=torch.channels_last)
        with torch.inference_mode():
            top = self.network(batch).float().softmax(dim=1).topk(TOP)
        return [self.labels[i] for i in top.indices.ravel().tolist()], top.values.ravel().tolist()
