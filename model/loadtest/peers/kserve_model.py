"""The models of this course as the servers in this folder call them, one request or a batch."""

import argparse

import torch
from fastapi import HTTPException
from kserve import Model
from kserve.errors import InvalidInput

from model.alexnet.model import AlexNetModel
from model.loadtest.pays.timed_model import TimedModel
from model.loadtest.peers.command_line import NAME


def load_model(options: argparse.Namespace) -> Model:
    """The model, ready; to be called in the thread that will run it, as torch's threads are."""
    if options.model == "timed":
        return TimedModel(NAME)
    torch.set_num_threads(options.threads)
    model = AlexNetModel(NAME, device="cpu", precision=options.precision)
    model.load()
    return model


def predict_all(model: Model, requests: list[dict]) -> list[dict]:
    """The V1 responses to several V1 requests, from one call of predict_batch.

    One request that is invalid has all of them answered with an error.
    """
    try:
        inputs = [model.preprocess(request) for request in requests]
    except InvalidInput as error:
        raise HTTPException(400, str(error)) from None
    return [model.postprocess(result) for result in model.predict_batch(inputs)]
