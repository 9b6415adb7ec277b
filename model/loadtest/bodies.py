"""The JSON bodies of prediction requests, in the form that a server of AlexNet takes."""

import base64


def v1_body(images: list[bytes]) -> dict:
    """The body of a V1 request for encoded images."""
    return {"instances": [{"image": {"b64": _base64(image)}} for image in images]}


def v2_body(images: list[bytes]) -> dict:
    """The body of a V2 (Open Inference Protocol) REST request for encoded images."""
    data = [_base64(image) for image in images]
    return {"inputs": [{"name": "image", "shape": [len(data)], "datatype": "BYTES", "data": data}]}


def _base64(image: bytes) -> str:
    return base64.b64encode(image).decode()
