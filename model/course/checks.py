"""Checks of the exercises of notebooks 1 and 4 to 7. Each prints "right: …" or "not yet: …"."""

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import serve

from model.course.checks_basics import cannot_start

BATCH = "requests in this batch: "  # what notebook 5's replicas print, and how many
LARGEST = 16


async def check_scale_hello(scale_hello: Callable[[int], Any]) -> None:
    """Notebook 1: does `scale_hello(3)` run three replicas?"""
    handle = scale_hello(3)
    if handle is None:
        return print("not yet: scale_hello returns nothing; return what serve.run returns")
    responses = [handle.remote() for _ in range(120)]
    replicas = {await response for response in responses}
    if len(replicas) != 3:
        return print(f"not yet: {len(replicas)} replicas responded, and 3 should run")
    print("right: three replicas responded")


async def check_pipeline(pipeline: Callable[[], Any]) -> None:
    """Notebook 1: two deployments in one application, of which one calls the other."""
    handle = pipeline()
    if handle is None:
        return print("not yet: pipeline returns nothing; return what serve.run returns")
    calls = await _calls_of_double()
    found = await handle.remote(5)
    if found != 20:
        return print(f"not yet: 5 gives {found!r}, not 20")
    applications = serve.status().applications
    if "pipeline" not in applications:
        return print(f"not yet: there is no application 'pipeline', but {', '.join(applications)}")
    parts = applications["pipeline"].deployments
    if len(parts) != 2:
        return print(f"not yet: the application has one deployment, {', '.join(parts)}")
    if (calls := await _calls_of_double() - calls) != 2:
        return print(f"not yet: 5 gives 20, but there were {calls} calls of Double, not 2")
    print(f"right: 5 gives 20, by way of {' and '.join(sorted(parts))}")


async def _calls_of_double() -> int:
    """How often Double has been called; 0 where there is none."""
    application = serve.status().applications.get("pipeline")
    if application is None or "Double" not in application.deployments:
        return 0
    return await serve.get_deployment_handle("Double", "pipeline").called.remote()


def check_waited(waited: Callable[[list[tuple[float, float, float]]], float]) -> None:
    """Notebook 4: the right percentile, of latencies from when requests were due."""
    prompt = [(float(i), float(i), i + 0.1 + i / 1000) for i in range(20)]
    late = [(i / 10, float(i), i + 0.5) for i in range(20)]
    cases = [
        (prompt, 0.118, "all sent when due"),
        (late, 0.9 * 18 + 0.5, "sent late: users wait from when they were due"),
        (late[::-1], 0.9 * 18 + 0.5, "they need not be in order"),
        (prompt * 5, 0.118, "a hundred requests: the 95th"),
    ]
    for requests, expected, what in cases:
        found = waited(requests)
        if found is None:
            return print("not yet: waited returns nothing")
        if abs(found - expected) > 1e-6:
            return print(f"not yet: {found:.3g} in place of {expected:.3g} ({what})")
    print("right: four cases of four")


def check_serve_batch(file: Path, run: Callable[[], tuple[str, int]]) -> bool:
    """Notebook 5: do replicas put several requests through the model, in one call?

    file: the learner's server. run: loads it; returns its log, in which each batch has a line, and
    the number of failed requests. Not called where the file says already that a batch has one
    request, or the network one call for each. Returns whether the server is right.
    """
    if (loaded := _loaded(file, run, _one_by_one)) is None:
        return False
    return _gathers(*loaded, "predict_together", "is there a pair for each?")


def check_gathering(file: Path, run: Callable[[], tuple[str, int]]) -> bool:
    """Notebook 5: do several requests reach a replica in one call?

    file: the learner's `GatheringModel`. run: as of check_serve_batch. Returns whether it is right.
    """
    if (loaded := _loaded(file, run)) is None:
        return False
    sizes = batch_sizes(loaded[0], BATCH)
    if max(sizes, default=0) > LARGEST:
        return _not_yet(f"a batch had {max(sizes)} requests, more than {LARGEST}")
    return _gathers(*loaded, "send_batches", "is each batch sent once?")


def _loaded(
    file: Path,
    run: Callable[[], tuple[str, int]],
    wrong: Callable[[str], str] = lambda source: "",
) -> tuple[str, int] | None:
    """What `run` returns; None where the file cannot run or its source is wrong: it says why."""
    source = file.read_text()
    try:
        compile(source, file.name, "exec")
        if not (why := wrong(source)):
            return run()
    except SyntaxError as error:
        why = f"{file.name}, line {error.lineno}: {error.msg}"
    except RuntimeError as error:
        why = cannot_start(error)
    _not_yet(why)
    return None


def _one_by_one(source: str) -> str:
    """Why a batch has one request, or is taken apart again, as a source says; or ""."""
    if re.search(r"^ *@serve\.batch\(.*max_batch_size=1\b", source, re.M):
        return "predict_together gathers nothing, max_batch_size is 1"
    in_a_loop = "self.network is called in a loop, once for each request"
    return in_a_loop if _network_in_a_loop(source) else ""


def _gathers(log: str, failed: int, method: str, hint: str) -> bool:
    """What a log says of the batches, of which the learner's method should make several."""
    if failed:
        return _not_yet(f"{failed} requests got no right response; {hint}")
    sizes = batch_sizes(log, BATCH)
    if max(sizes, default=0) > 1:
        mean = sum(sizes) / len(sizes)
        print(f"right: up to {max(sizes)} requests in a batch, {mean:.1f} on average")
        return True
    found = f"each of {len(sizes)} batches had one request" if sizes else "it was never called"
    return _not_yet(f"{method} gathers nothing, {found}")


def _not_yet(why: str) -> bool:
    print(f"not yet: {why}")
    return False


def _network_in_a_loop(source: str) -> bool:
    """Whether a source calls `self.network` in a loop or a comprehension: again and again."""
    return any(
        isinstance(node, ast.Call) and ast.unparse(node.func) == "self.network"
        for loop in ast.walk(ast.parse(source))
        for node in _repeated(loop)
    )


def _repeated(loop: ast.AST) -> set[ast.AST]:
    """What a loop or a comprehension does again and again; what it goes through is made once."""
    match loop:
        case ast.For(iter=once) | ast.AsyncFor(iter=once):
            return set(ast.walk(loop)) - set(ast.walk(once))
        case ast.While():
            return set(ast.walk(loop))
        case ast.ListComp(generators=[first, *_]) | ast.GeneratorExp(generators=[first, *_]):
            return set(ast.walk(loop)) - set(ast.walk(first.iter))
        case _:
            return set()


def batch_sizes(log: str, before: str) -> list[int]:
    """The numbers that stand behind the text `before`, each up to the end of its line.

    (Another process may write its line right behind a number; KServe's lines begin with a date.)
    """
    return [int(size) for size in re.findall(rf"{re.escape(before)}(\d+)$", log, re.MULTILINE)]


def check_lone_client(lone_client: Callable[[int], serve.Deployment]) -> None:
    """Notebook 5: is it one replica, which reserves all cores?"""
    for available in (2, 8):
        found = lone_client(available)
        if not isinstance(found, serve.Deployment):
            return print("not yet: lone_client returns no deployment")
        reserved = (found.ray_actor_options or {}).get("num_cpus", 1)
        if (found.num_replicas, reserved) != (1, available):
            return print(
                f"not yet: of {available} cores, each of {found.num_replicas} replicas reserves "
                f"{reserved:g}"
            )
    print("right: one replica, which reserves all cores")


def check_replicas_needed(replicas_needed: Callable[[float, float, float], int]) -> None:
    """Notebook 7: utilisation, rounded up."""
    cases = [(100, 0.02, 1, 2), (100, 0.02, 0.7, 3), (1000, 0.01, 0.8, 13), (1, 0.01, 0.5, 1)]
    for rate, image_s, share, expected in cases:
        found = replicas_needed(rate, image_s, share)
        if found is None:
            return print("not yet: replicas_needed returns nothing")
        if found != expected or not isinstance(found, int):
            return print(
                f"not yet: {rate} images a second of {image_s} s each, busy {share:.0%} of the "
                f"time, take {expected} replicas, not {found!r}"
            )
    print("right: four cases of four")
