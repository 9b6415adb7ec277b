"""AlexNet in a worker of Triton's Python backend, which triton_server.py starts."""

import numpy as np
import triton_python_backend_utils as triton

from model.loadtest.peers import command_line, without_kserve


class TritonPythonModel:
    """What Triton asks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model, once a worker."""
        options = command_line.given()
        self.classifier = without_kserve.Classifier(options.precision, options.threads)

    def execute(self, requests: list) -> list:
        """Answer all requests of a batch in one forward pass."""
        found = [triton.get_input_tensor_by_name(r, "image").as_numpy()[:, 0] for r in requests]
        labels, probabilities = self.classifier.predict(np.concatenate(found).tolist())
        encoded = np.array([label.encode() for label in labels], np.object_)
        of_all = {"label": encoded, "probability": np.array(probabilities, np.float32)}
        ends = np.cumsum([len(images) for images in found])[:-1]
        parts = {
            name: np.split(values.reshape(-1, without_kserve.TOP), ends)
            for name, values in of_all.items()
        }
        return [
            triton.InferenceResponse([triton.Tensor(name, part[i]) for name, part in parts.items()])
            for i in range(len(requests))
        ]
