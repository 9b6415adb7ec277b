"""Each exercise's check tells a stub and a wrong solution from a right one."""

import contextlib
import inspect
import re
import textwrap
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import nbformat
import pytest
from kserve import InferInput, InferOutput, InferRequest, InferResponse, Model

from model.basics import ray_server
from model.course import checks, checks_faults
from model.course.checks_own import check_choose
from model.course.solution import file_of
from model.loadtest import records
from model.loadtest.pays.measure import RECORDS
from notebooks import solutions
from tests.test_notebooks import PATHS, run, without

CHECK = r"^(?:await |\w+ = )?check_(\w+)\("  # the line of a cell that calls one
# Exercises that are a function, with a wrong solution each.
WRONG = {
    "waited": "def waited(requests):\n    return sorted(a - sent for _, sent, a in requests)[18]",
    "lone_client": "def lone_client(cores):\n    return ray_server.Replica.options(num_replicas=1)",
    "choose": "def choose(ms, saved, clients):\n"
    "    if clients == 1:\n        return 'plain KServe'\n"
    "    return 'model.serving, KServe in each of two replicas'",
    "replicas_needed": "def replicas_needed(rate, s, share):\n    return round(rate * s)",
}
# Exercises on a live server: what makes the solution wrong otherwise than what stands there, and
# how the cell begins that writes it, where it is a file.
LIVE = {
    "scale_hello": [("num_replicas=replicas", "num_replicas=2")],
    "pipeline": [
        ("self.double.remote(await self.double.remote(number))", "self.double.remote(number)"),
        ("self.double.remote(await self.double.remote(number))", "self.double.remote(2 * number)"),
    ],
    "sentiment": [("sum(", "len("), ("raise InvalidInput", "raise ValueError")],
    "client": [
        ("times.append((sent, time.monotonic()))", "times.append((sent, sent))"),
        ("while (sent := time.monotonic()) < until:", "for sent in [time.monotonic()]:"),
    ],
    "ongoing": [("max_ongoing_requests=16", "max_ongoing_requests=8")],
    # As it stands it does not retry; one that waits for ever has a test of its own.
    "resilient": [
        ("return await asyncio.wait_for(self.handle.healthy.remote(), 5)", "return self.ready"),
    ],
    "serve_batch": [],
    "gathering": [],
    "tickets": [
        ("raise InvalidInput", "raise ValueError"),
        ("isinstance(texts, list) and texts", "texts"),
        ('return {"predictions": labels}', "return labels"),
    ],
    "batched_tickets": [
        ("def predict_batch", "def predict_batches"),
        (
            "labels = iter(self.predict([text for texts in inputs for text in texts]))\n"
            "        return [[next(labels) for _ in texts] for texts in inputs]",
            "return [self.predict(texts) for texts in inputs]",
        ),
        (
            "self.predict([text for texts in inputs for text in texts])",
            "self.pipeline.predict([text for texts in inputs for text in texts]).tolist()",
        ),
    ],
    "three_steps": [
        ("num_replicas=2", "num_replicas=1"),
        (
            'handle = serve.run(Replica.bind("custom-model"))\n'
            '    model = RayModel("custom-model", handle)\n'
            "    model.load()\n"
            "    ModelServer()",
            'model = SentimentModel("custom-model")\n    model.load()\n    ModelServer(workers=2)',
        ),
    ],
    "placed": [
        ("max_replicas_per_node=1, ", ""),
        ("max_replicas_per_node=1", "max_replicas_per_node=2"),
        ("app = ", "application = "),
    ],
}
# What these say as they stand, and to other mistakes, has tests of its own: a server is not started
# and loaded for that.
IN_SHORT = {"serve_batch", "gathering"}
# Cells that no exercise needs, left to test_notebooks: from the one that begins so, up to the one
# that begins so, or to the end.
LEFT_OUT = {
    "02_kserve_model": [("images = ", "from pathlib import Path"), ("large = ", None)],
    "03_ray_serve": [
        ("from model.basics import", "folder = "),
        ("with ServerProcess(", "%%writefile {folder}/my_server.py"),
        ("answers = ", None),
    ],
    "04_latency_and_throughput": [
        ("work = ", "stock = "),
        ("clients, loads = ", "folder = "),
        ("loads.clear()", "plain.stop()"),
    ],
    "05_tuning": [
        ("torch.set_num_threads(", "best = "),
        ("stock = ", "folder.mkdir("),
        ('times = measure("one call a batch")', "plain.stop()"),
    ],
    "06_keep_serving": [("killed = ", "folder = "), ("auto = ", None)],
    "07_beyond_one_machine": [("times, rows = ", "server.stop()")],
    "08_your_own_model": [("from model.loadtest.overhead", "shutil.rmtree(")],
}
MEASURED = {  # checks that look the answer up in what was measured
    "choose": lambda choose: check_choose(choose, records.read(RECORDS))
}
FILES = {
    "placed": "%%writefile {folder}/my_deployment.py",
    "sentiment": "%%writefile {folder}/sentiment.py",
    "three_steps": "%%writefile {folder}/my_server.py",
    "serve_batch": "%%writefile {folder}/my_server.py",
    "gathering": "%%writefile {folder}/gathering.py",
    "tickets": "%%writefile {folder}/tickets.py",
    "batched_tickets": "%%writefile {folder}/batched_tickets.py",
    "ongoing": "%%writefile {folder}/my_server.py",
    "resilient": "%%writefile {folder}/my_server.py",
}


def notebooks() -> dict[str, list[nbformat.NotebookNode]]:
    """The cells of each notebook."""
    return {path.stem: nbformat.read(path, as_version=4).cells for path in PATHS}


def exercises(cells: list[nbformat.NotebookNode]) -> list[str]:
    """The names that the cells' checks are about, in order."""
    sources = [cell.source for cell in cells if cell.cell_type == "code"]
    return [name for source in sources for name in re.findall(CHECK, source, re.M)]


def live(cells: list[nbformat.NotebookNode]) -> list[str]:
    """The exercises of the cells that run on a live server."""
    return list(dict.fromkeys(name for name in exercises(cells) if name in LIVE))


def test_every_exercise_has_its_solution():
    """And each notebook an exercise; none is left over here."""
    found = {stem: exercises(cells) for stem, cells in notebooks().items()}
    assert all(found.values()), found
    written = [name for name, thing in vars(solutions).items() if inspect.isfunction(thing)]
    assert sorted(sum(found.values(), [])) == sorted(written) == sorted([*WRONG, *LIVE])


def defined(source: str, name: str):
    """The function of that name in a source."""
    namespace = {"ray_server": ray_server}
    exec(source, namespace)
    return namespace[name]


@pytest.mark.parametrize("name", WRONG)
def test_a_function(name, capsys):
    """As it stands in the notebook, wrongly, and rightly."""
    cells = sum(notebooks().values(), [])
    [stub] = [cell.source for cell in cells if cell.source.startswith(f"def {name}(")]
    right = inspect.getsource(getattr(solutions, name))
    check = MEASURED.get(name) or getattr(checks, f"check_{name}")
    for source, verdict in ((stub, "not yet"), (WRONG[name], "not yet"), (right, "right")):
        check(defined(source, name))
        assert capsys.readouterr().out.startswith(f"{verdict}: ")


def test_batches_are_read_from_whole_lines(tmp_path, capsys):
    """Another process may write its line, which begins with a date, right behind a number."""
    file = tmp_path / "my_server.py"
    file.write_text("")
    once = "requests in this batch: "
    log = f"{once}1\n{once}12026-11-27 05:23:06.813 kserve.trace\n\n{once}1\n"
    assert not checks.check_serve_batch(file, lambda: (log, 0))
    assert capsys.readouterr().out.startswith("not yet: ")
    assert checks.check_serve_batch(file, lambda: (f"{log}{once}16\n", 0))


def test_a_batch_that_is_taken_apart_or_not_answered(tmp_path, capsys):
    """Requests gathered, and then put through the network one by one, or answered wrongly."""
    file, log = tmp_path / "my_server.py", "requests in this batch: 16\n"
    once, each = "self.network(torch.cat(several))", "torch.cat([self.network(i) for i in several])"
    file.write_text(file_of("serve_batch").replace(once, each))
    assert not checks.check_serve_batch(file, lambda: (log, 0))
    assert "in a loop" in capsys.readouterr().out
    file.write_text(file_of("serve_batch"))
    assert not checks.check_serve_batch(file, lambda: (log, 3))
    assert capsys.readouterr().out.startswith("not yet: 3 requests ")
    assert checks.check_serve_batch(file, lambda: (log, 0))
    assert capsys.readouterr().out.startswith("right: ")
    file.write_text("def")
    assert not checks.check_serve_batch(file, lambda: (log, 0))
    assert capsys.readouterr().out.startswith("not yet: my_server.py, line 1: ")


def test_batches_that_are_gathered_in_front(tmp_path, capsys):
    """Several requests in a call, no more than fit, and a response to each."""
    file, one = tmp_path / "gathering.py", "requests in this batch: 1\n"
    file.write_text(file_of("gathering"))
    wrong = {
        "send_batches gathers nothing, each of 2": (one * 2, 0),
        "a batch had 17 requests": (one + "requests in this batch: 17\n", 0),
        "3 requests got no right response": ("requests in this batch: 16\n", 3),
    }
    for sentence, found in wrong.items():
        assert not checks.check_gathering(file, lambda found=found: found)
        assert capsys.readouterr().out.startswith(f"not yet: {sentence}")
    assert checks.check_gathering(file, lambda: (one + "requests in this batch: 16\n", 0))
    assert capsys.readouterr().out == "right: up to 16 requests in a batch, 8.5 on average\n"


@pytest.mark.parametrize("status, late_s, said", [(503, 0, "503"), (200, 0.5, "nothing for 0.2 s")])
def test_a_readiness_that_is_answered_late_is_none(status, late_s, said, monkeypatch):
    """The server may have waited for a replica that came meanwhile."""

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            time.sleep(late_s)
            with contextlib.suppress(OSError):
                self.send_response(status)
                self.end_headers()

        def log_message(self, *_):
            """Nothing."""

    monkeypatch.setattr(checks_faults, "PROBE_S", 0.2)
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        asked = SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", name="any")
        found = checks_faults._readiness(asked)
        server.shutdown()
        thread.join()
    assert found == said


def test_a_readiness_that_is_true(monkeypatch):
    """503 each time while there is no replica, and 200 later; nothing else is."""
    monkeypatch.setattr(checks_faults, "BACK_S", 0.1)
    wrong = checks_faults._what_is_wrong
    assert wrong(["503", "503"], lambda: "200") == ""
    for silent in (["503", "200"], ["500", "503"], ["503", "nothing for 8 s"]):
        assert [said for said in silent if said != "503"][0] in wrong(silent, lambda: "200")
    assert "says 503" in wrong(["503", "503"], lambda: "503")


def test_the_recipe_for_v2():
    """Notebook 8's: a model that takes V1, and V2 with texts in each of their forms, in batches and
    by itself."""
    cells = notebooks()["08_your_own_model"]
    [recipe] = [
        re.findall("```python\n(def.*?)```", c.source, re.S) for c in cells if "V2</s" in c.source
    ]

    class Upper(Model):
        """What is V1 only."""

        def preprocess(self, payload, headers=None):
            return payload["instances"]

        def predict(self, texts, headers=None):
            return [text.upper() for text in texts]

    names = {"Upper": Upper, "InferOutput": InferOutput, "InferResponse": InferResponse}
    exec(f"class Both(Upper):\n{textwrap.indent(recipe[0], '    ')}", names)
    model, given = names["Both"]("m"), ["a", "b"]
    v1 = {"instances": given}
    as_text = InferRequest("m", [InferInput("text", [2], "BYTES", given)])
    as_bytes = InferRequest("m", [InferInput("text", [2], "BYTES", [t.encode() for t in given])])
    inputs = [model.preprocess(payload) for payload in (v1, as_text, as_bytes)]
    for results in (model.predict_batch(inputs), [model.predict(pair) for pair in inputs]):
        first, *others = map(model.postprocess, results)
        assert first == {"predictions": ["A", "B"]}
        assert [list(other.outputs[0].as_numpy()) for other in others] == [["A", "B"]] * 2


def attempts(name: str) -> list[str]:
    """Cells that solve an exercise on a live server: wrongly, and at last rightly."""
    file = name in FILES
    source = file_of(name) if file else inspect.getsource(getattr(solutions, name))
    wrong = [source.replace(*change) for change in LIVE[name]]
    assert source not in wrong, "a change finds nothing to change"
    return [(f"{FILES[name]}\n" if file else "") + text for text in (*wrong, source)]


@pytest.mark.long
@pytest.mark.parametrize("stem", [s for s, cells in notebooks().items() if live(cells)])
def test_on_a_live_server(stem, traces, tmp_path_factory):
    """In its notebook: each as it stands, wrongly, and rightly, and what follows from that."""
    cells = []
    for cell in needed(stem):
        for name in live([cell]):
            check, (*wrong, right) = up_to_the_check(cell.source), attempts(name)
            stub = [] if name in IN_SHORT else [check]
            sources = [*stub, *(source for attempt in wrong for source in (attempt, check)), right]
            cells += map(nbformat.v4.new_code_cell, sources)
        cells.append(cell)
    notebook = nbformat.v4.new_notebook(cells=cells)
    executed = run(notebook, traces, tmp_path_factory.mktemp("exercises")).cells
    for name in live(cells):
        told = [verdict(cell) for cell in executed if name in exercises([cell])]
        verdicts = [sentence.partition(":")[0] for sentence in told]
        wrong = len(attempts(name)) - (name in IN_SHORT)
        assert verdicts == ["not yet"] * wrong + ["right"], (name, told)


def needed(stem: str) -> list[nbformat.NotebookNode]:
    """A notebook's cells of code, without those that LEFT_OUT names."""
    cells = notebooks()[stem]
    for first, end in LEFT_OUT.get(stem, []):
        cells = without(cells, first, end)
    return [cell for cell in cells if cell.cell_type == "code"]


def up_to_the_check(source: str) -> str:
    """A cell without what comes after its check, which test_notebooks has."""
    return source[: re.search(CHECK + ".*", source, re.M).end()]


def verdict(cell: nbformat.NotebookNode) -> str:
    """What the check of an exercise says; it may say before that a server runs."""
    text = "".join(output.get("text", "") for output in cell.outputs)
    return re.search(r"^(not yet|right):.*", text, re.MULTILINE)[0]
