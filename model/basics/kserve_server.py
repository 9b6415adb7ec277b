"""AlexNet behind KServe, in the server's process: `python -m model.basics.kserve_server --help`"""

import argparse
import base64
import io
import uuid

import torch
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer, model_server
from kserve.errors import InvalidInput
from PIL import Image, ImageOps
from torchvision.transforms import v2 as transforms

from model.alexnet.network import load_network


class AlexNetModel(Model):
    """V1: {"instances": [{"image": {"b64": …}}]} -> {"predictions": [[{"label", "probability"}]]}
    V2: image BYTES [N] or FP32 [N, 3, 224, 224] -> label BYTES [N, 5], probability FP32 [N, 5]"""

    def load(self) -> bool:
        self.network, self.labels = load_network()  # in eval mode
        steps = [transforms.PILToTensor(), transforms.Resize(256, max_size=50_000)]  # if very thin
        steps += [transforms.CenterCrop(224), transforms.ToDtype(torch.float32, scale=True)]
        steps.append(transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]))
        self.transform = transforms.Compose(steps)  # made once, not for each request
        self.ready = True
        return self.ready

    def preprocess(self, payload: dict | InferRequest, headers: dict | None = None) -> tuple:
        """The images of a request, float32 [N, 3, 224, 224]; and the request, if it is V2."""
        request = payload if isinstance(payload, InferRequest) else None
        try:
            if request:
                images = list(request.get_input_by_name("image").as_numpy())
            else:
                images = [instance["image"]["b64"] for instance in payload["instances"]]
        except Exception:  # whatever is wrong with it, the client sent it
            raise InvalidInput('send instances of {"image": {"b64": ...}}, or V2 image') from None
        if not images:
            raise InvalidInput("the request has no instances")
        return torch.stack([self.decode(image) for image in images]), request

    def decode(self, image) -> torch.Tensor:
        """An image, encoded (in JSON as base64 text) or preprocessed, to float32 [3, 224, 224]."""
        if getattr(image, "shape", None) == (3, 224, 224) and image.dtype == "float32":
            return torch.tensor(image)
        try:
            data = base64.b64decode(image, validate=True) if isinstance(image, str) else image
            # The formats are named because some that Pillow knows start other programs.
            upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data), formats=["JPEG", "PNG"]))
            return self.transform(upright.convert("RGB"))
        except Exception:  # Pillow raises nearly anything when a file is broken
            raise InvalidInput("send JPEG or PNG (base64 in JSON), or FP32 [3, 224, 224]") from None

    def predict(self, inputs: tuple, headers: dict | None = None) -> tuple:
        images, request = inputs
        with torch.inference_mode():
            probabilities, classes = self.network(images).softmax(dim=1).topk(5)
        return probabilities, classes, request

    def postprocess(self, result: tuple, headers: dict | None = None) -> dict | InferResponse:
        probabilities, classes, request = result
        labels = [self.labels[i] for i in classes.flatten().tolist()]
        numbers, shape = probabilities.flatten().tolist(), list(probabilities.shape)
        if request:
            outputs = [InferOutput("label", shape, "BYTES", labels)]
            outputs.append(InferOutput("probability", shape, "FP32", numbers))
            return InferResponse(request.id or str(uuid.uuid4()), self.name, outputs)
        top = [{"label": n, "probability": p} for n, p in zip(labels, numbers, strict=True)]
        return {"predictions": [top[i : i + 5] for i in range(0, len(top), 5)]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(parents=[model_server.parser])
    parser.set_defaults(model_name="custom-model")
    args, _ = parser.parse_known_args()
    model = AlexNetModel(args.model_name)
    model.load()
    ModelServer().start([model])
