"""Checks of the exercises of notebooks 2 and 3: each serves the learner's file and sends requests.

Each prints "right: …" or "not yet: …".
"""

from pathlib import Path

import requests
from matplotlib.figure import Figure

from model.course import parallel, reviews
from model.faults.observe import replicas
from model.loadtest import plots
from model.loadtest.server_process import ServerProcess

TIMEOUT_S = 30
# Requests for notebook 2's text model and the scores it should give.
SCORED = [
    (["a wonderful film"], [1]),
    (["boring"], [-1]),
    (["wonderful but boring", "excellent cast excellent music", "a film"], [0, 2, 0]),
]
BAD = {
    "no instances": {"texts": ["a wonderful film"]},
    "an empty list of instances": {"instances": []},
    "an instance that is no dictionary": {"instances": ["a wonderful film"]},
    "an instance without text": {"instances": [{"review": "a wonderful film"}]},
    "a text that is a number": {"instances": [{"text": "a wonderful film"}, {"text": 5}]},
}


def check_sentiment(folder: Path) -> None:
    """Notebook 2: does `sentiment.py` in the folder give scores, and 400 for bad input?"""
    try:
        with ServerProcess("sentiment", folder=folder) as server:
            missing = _wrong_scores(server) or _wrong_errors(server)
    except RuntimeError as error:
        missing = cannot_start(error)
    right = f"right: the scores are there, in order; {len(BAD)} bad requests get a 400"
    print(f"not yet: {missing}" if missing else right)


def check_three_steps(folder: Path) -> Figure | None:
    """Notebook 3: do two replicas respond, behind the server that `my_server.py` starts?

    Returns the timeline of what its processes worked on.
    """
    try:
        with ServerProcess("my_server", folder=folder) as server:
            responses = reviews.send_at_once(server, 8)
            own = str(server.process.pid)
            of_ray = {str(replica.pid) for replica in replicas(server)}
    except RuntimeError as error:
        return print(f"not yet: {cannot_start(error)}")
    except requests.HTTPError as error:
        return print(f"not yet: a request gets {error.response.text[:300]}")
    workers = {response.worker for response in responses}
    overlap = parallel.overlaps(responses)
    if workers == {own}:
        print("not yet: the server's own process worked on all eight requests; start Ray Serve")
    elif not workers <= of_ray:
        print("not yet: processes that are no Ray Serve replicas worked on the requests")
    elif len(workers) != 2:
        print(f"not yet: the number of replicas that worked on eight requests is {len(workers)}")
    else:
        print(f"right: two replicas; {overlap} of eight requests began while another was at work")
    names = parallel.numbered(workers - {own}, {own: "the server"} if own in workers else {})
    return plots.timeline(parallel.lanes(responses, names), "Eight requests to your server")


def _wrong_scores(server: ServerProcess) -> str:
    """What is wrong with the responses to good requests, or nothing."""
    for texts, scores in SCORED:
        request = {"instances": [{"text": text} for text in texts]}
        response = requests.post(server.predict, json=request, timeout=TIMEOUT_S)
        if response.status_code != 200:
            return f"{texts} gets {response.status_code}: {response.text[:200]}"
        if response.text == "null":
            return "predict returns nothing"
        expected = {"predictions": [{"score": score} for score in scores]}
        if response.json() != expected:
            return f"{texts} gives {response.text[:200]}, not {expected}"
    return ""


def _wrong_errors(server: ServerProcess) -> str:
    """What is wrong with the responses to bad requests, or nothing."""
    for what, request in BAD.items():
        response = requests.post(server.predict, json=request, timeout=TIMEOUT_S)
        if response.status_code != 400:
            return f"the scores are right, but {what} gets {response.status_code}, not 400"
        sentence = response.json()["error"]
        if len(sentence.split()) < 3:
            return f"{what} gets a 400, but {sentence!r} helps nobody: write a sentence"
    return _wrong_scores(server)  # does it go on?


def cannot_start(error: RuntimeError) -> str:
    """Why a file does not start, in the last words of its log."""
    return f"the file does not start: {str(error).strip().splitlines()[-1]}"
