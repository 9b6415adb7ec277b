"""An hour of load and faults, in half a minute; and what it says of processes that grow."""

import re

import pytest

from model.faults import endurance
from model.faults.experiment import NotTested
from model.faults.servers import HALVES, ours
from model.loadtest.workload import Workload


class Process:
    """As much of a psutil.Process as is asked for."""

    def cmdline(self) -> list[str]:
        """Ray's controller."""
        return ["ray::ServeController", "x"]


def seen(of_a_minute, files=lambda minute: 40):
    """What snapshots of one process over half an hour return: its MB and its files by minute."""
    process = Process()
    return [(10.0 * i, {process: (of_a_minute(i / 6), files(i / 6))}) for i in range(180)]


@pytest.mark.parametrize(
    "mb, says",
    [
        (
            lambda minute: 100,
            r"100 MB, [+-]0\.0 ± 0\.0 MB an hour; least of each .*; open files 40 at first",
        ),
        (lambda minute: 100 + minute / 3, r"\+20\.0 ± 0\.0 MB an hour \*\*grows\*\*"),
        (lambda minute: 100 + minute // 1 % 2, r"MB, [+-]\d\.\d ± \d\.\d MB an hour;"),
    ],
)
def test_what_grows(mb, says):
    """More than 10 MB an hour."""
    _, (title, fact) = endurance.growth(seen(mb)).items()
    assert title == "ray::ServeController 1"
    assert re.search(says, fact), fact


def test_open_files_are_told():
    """Those at the beginning, at the end, and the most of a minute."""
    _, fact = endurance.growth(seen(lambda minute: 1, lambda minute: 40 + (minute > 20))).values()
    assert "open files 40 at first, 41 at last, 41 at most" in fact


def test_the_least_memory_of_each_ten_minutes():
    """A queue comes and goes; what is there without it is told beside the slope."""
    _, fact = endurance.growth(
        seen(lambda minute: 150 + minute // 10 + 90 * (minute % 10 > 2))
    ).values()
    assert "least of each 10 minutes 150, 151, 152; open" in fact, fact


def test_a_process_that_comes_or_goes_is_only_counted():
    """A replica that was replaced cannot grow for long."""
    values = seen(lambda minute: 1)
    values[7] = (values[7][0], {})
    assert endurance.growth(values) == {"processes that came or went": "1"}


def test_a_fault_that_cannot_be_injected_does_not_end_the_hours():
    """It says so where its evidence would be."""

    def nobody_there() -> str:
        raise NotTested("there is no replica")

    assert endurance._or_say_why_not(nobody_there) == "NOT DONE: there is no replica"
    assert endurance._or_say_why_not(lambda: "one gone") == "one gone"


def test_an_hour_has_faults():
    """A kill every five minutes, a version every twenty; too short a time has none, and says so."""
    steps = list(endurance._faults(None, 3600, ("--topology", "ingress")))
    faults = [step.name for step in steps]
    assert (faults.count("a replica killed"), faults.count("another version")) == (12, 3)
    changes = [step.inject.args[0].args for step in steps if step.name == "another version"]
    assert all(args[1:3] == ("--topology", "ingress") for args in changes)  # as it was started
    assert changes[0] != changes[1] and changes[0] == changes[2]
    with pytest.raises(ValueError, match="0.083 hours or more"):
        endurance.endurance(None, None, 0.05)


@pytest.mark.long
@pytest.mark.alone
def test_half_a_minute(monkeypatch):
    """Two kills and a redeploy, beside clients that give up and bad requests: nobody notices."""
    monkeypatch.setattr(endurance, "KILL_EVERY_S", 14)
    monkeypatch.setattr(endurance, "REDEPLOY_EVERY_S", 28)
    monkeypatch.setattr(endurance, "LOOK_EVERY_S", 1)
    monkeypatch.setattr(endurance, "MALFORMED_EVERY_S", 2)
    with ours(*HALVES) as server:
        found = endurance.endurance(server, Workload.drawn(16), 26 / 3600)
    assert (found.failed, found.rejected, found.run.wrong) == (0, 0, 0), found.run.errors
    assert [fault.name for fault in found.faults].count("a replica killed") == 2
    assert "another version" in {fault.name for fault in found.faults}
    assert int(found.facts["evidence: requests given up"]) > 0
    assert re.fullmatch(
        r"\d+ got 4\d\d(, \d+ got 4\d\d)*", found.facts["evidence: malformed requests"]
    )
    assert "KServe's process 1" in found.facts
