"""What the notebooks share: counts, numbers and sources as a reader is to see them."""

import math

import pytest

from model.basics import kserve_server, ray_server
from model.course import execute, loads, parallel, show
from model.course.parallel import Response


def responses(*spans: tuple[float, float]) -> list[Response]:
    """One response for each span in which it was worked on (start, end), all of one worker."""
    return [Response(0, end, "a", start, end) for start, end in spans]


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([(0, 1), (1, 2), (2, 3)], 0),  # one after the other
        ([(0, 10), (1, 2), (3, 4)], 2),  # the third overlaps the first, not its neighbour
        ([(3, 4), (0, 10), (1, 2)], 2),  # in any order
        ([(0, 1), (0, 1)], 2),  # begun together, as in a batch
        ([(0, 2), (1, 3), (2, 4)], 2),  # the third begins as the first ends, within the second
        ([(0, 1)], 0),
    ],
)
def test_a_request_overlaps_with_any_other_in_work(spans, expected):
    """Not with its neighbour in the order of starts alone."""
    assert parallel.overlaps(responses(*spans)) == expected


def test_lanes_and_names_of_workers():
    """Replicas are numbered as they are seen; requests as they were sent."""
    names = parallel.numbered(["b", "a", "b"], {"c": "replica 1"})
    assert names == {"c": "replica 1", "b": "replica 2", "a": "replica 3"}
    assert parallel.lanes(responses((0, 1), (1, 2)), names) == {"replica 3": [(0, 1, 1), (1, 2, 2)]}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1052.6, "1050"),
        (12345.6, "12300"),
        (0.9571, "0.957"),
        (41.5, "41.5"),
        (0.000012345, "0.0000123"),
        (46.0, "46"),
        (0.0, "0"),
        (math.inf, "inf"),
        (math.nan, "nan"),
        (1234567, "1234567"),
        ("1e3", "1e3"),
    ],
)
def test_numbers_as_a_person_would_write_them(value, expected):
    """Three significant digits and no exponent; what is no float stays as it is."""
    assert show.rounded(value) == expected


def test_tables_and_predictions_round_alike(capsys):
    """In a table's cells, and beside a prediction."""
    assert show.table([{"a": 1052.6, "b": "x"}]).data == "| a | b |\n|---|---|\n| 1050 | x |"
    show.compare(None, 1052.6, "ms")
    show.compare(900, "three")
    assert capsys.readouterr().out == (
        "no prediction yet; measured: 1050 ms\nyou predicted 900; measured: three\n"
    )


def test_the_difference_of_two_files():
    """With their names at its head, as a fence that is coloured."""
    text = show.diff(kserve_server, ray_server).data
    assert text.startswith("```diff\n--- kserve_server.py") and "\n+++ ray_server.py" in text
    assert "+from ray import serve" in text
    folded = show.diff(kserve_server, ray_server, kserve_server.AlexNetModel).data
    assert "-class AlexNetModel(Model): ..." in folded and "softmax" not in folded


def test_where_the_time_of_requests_went():
    """Each part from one moment to the next, the mean over the requests in milliseconds."""
    moments = ["x-received", "x-read", "x-started", "x-preprocessed", "x-finished"]
    one = {"sent": 0, "done": 2.1} | {m: str(i / 10) for i, m in enumerate(moments, start=1)}
    two = one | {"done": 0.7}
    parts = loads.parts([one, two])
    assert list(parts) == list(loads.PARTS)
    assert [round(ms) for ms in parts.values()] == [100, 100, 100, 100, 100, 900]


def test_what_an_operator_sees():
    """From one snapshot of the metrics to the next, over all models and outcomes."""
    metrics = {
        "inference_requests_total a answered": 10.0,
        "inference_requests_total a rejected": 1.0,
        "inference_requests_total b answered": 4.0,
        "inference_requests_in_flight a": 2.0,
        "inference_replicas a": 1.0,
        "inference_batch_size_count a": 5.0,
        "inference_batch_size_sum a": 10.0,
    }
    later = metrics | {
        "inference_requests_total a answered": 16.0,
        "inference_requests_total b answered": 5.0,
        "inference_requests_in_flight a": 5.0,
        "inference_batch_size_count a": 7.0,
        "inference_batch_size_sum a": 20.0,
    }
    seen = loads.operator_sees([(100.0, metrics), (102.0, later), (103.0, later)])
    assert seen == {
        "requests a second": [(2.0, 5.0), (3.0, 0.0)],
        "replicas": [(2.0, 1.0), (3.0, 1.0)],
        "requests in flight": [(2.0, 5.0), (3.0, 5.0)],
        "mean size of a batch": [(2.0, 5.0)],
    }


def test_notebooks_are_found_and_progress_leaves_one_line():
    """From wherever it is started; of a line that was written over the last version stays."""
    assert (execute.NOTEBOOKS / "01_architecture.ipynb").exists()
    assert execute.last_lines("load: 1\rload: 2\r\ndone") == "load: 2\ndone"
