"""Which of the servers a model needs, from what was measured."""

from collections.abc import Iterable

from model.loadtest.pays.measure import SERVERS
from model.loadtest.summary import summary

KEY = ("variant", "ms", "shared", "clients")
PLAIN = "plain KServe"
ENOUGH = 0.9  # of the best throughput


def rows(measured: Iterable[dict]) -> list[dict]:
    """Medians over the rounds, a row for each server, model and number of clients."""
    return summary(measured, KEY)


def throughputs(measured: Iterable[dict]) -> dict[tuple[float, float, int], dict[str, float]]:
    """Requests a second of each server, by model and number of clients: (ms, shared, clients)."""
    cases: dict[tuple, dict[str, float]] = {}
    for row in rows(measured):
        case = cases.setdefault((row["ms"], row["shared"], row["clients"]), {})
        case[row["variant"]] = row["throughput"]
    return cases


def advice(measured: Iterable[dict]) -> list[dict]:
    """For each model and number of clients: the simplest server that is fast enough.

    That is the first in the order of SERVERS with at least 0.9 times the throughput of the best.
    Returns ms, shared, clients, the choice, `plain`: plain KServe's requests a second, and
    `ratios`: each server's throughput against that.
    """
    cases, found = throughputs(measured), []
    for ms, shared, clients in sorted(cases, key=lambda case: (case[1], case[0], case[2])):
        rates = cases[ms, shared, clients]
        best = max(rates.values())
        choice = next(name for name in SERVERS if rates.get(name, 0) >= ENOUGH * best)
        plain = rates.get(PLAIN, float("nan"))
        ratios = {name: rates[name] / plain for name in SERVERS if name in rates}
        about = {"ms": ms, "shared": shared, "clients": clients, "plain": plain}
        found.append(about | {"choice": choice, "ratios": ratios})
    return found


def table_of(measured: Iterable[dict]) -> list[dict]:
    """The advice as rows of a table: a line for each model and number of clients."""
    return [
        {
            "ms a request": case["ms"],
            "a batch saves": f"{case['shared']:.0%}",
            "clients": case["clients"],
            "plain KServe, requests/s": case["plain"],
            **{f"{name}: times that": r for name, r in case["ratios"].items() if name != PLAIN},
            "simplest within 10 % of the best": case["choice"],
        }
        for case in advice(measured)
    ]
