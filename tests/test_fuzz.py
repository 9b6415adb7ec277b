"""What no client should send, made up by Hypothesis: every response is right or a plain refusal."""

from collections.abc import Iterator

import pytest
import torch

from tests.conftest import BOTH, ROOT
from tests.fuzz import WAYS, fuzz

pytestmark = pytest.mark.long

COUNT = 100  # requests in each way; `python -m tests.fuzz` sends 2,500
SLACK = 300e6  # bytes; allocators keep what the largest images needed


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The server has the other cores while the model in this process works on small images."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@BOTH
def test_a_server_withstands_it(server, local, one_thread):
    """Nothing breaks, no process ends, memory stays, and each way has responses of both sorts."""
    fuzz(server, local.classify, COUNT // 3, number=1)
    before = server.memory()
    statuses = fuzz(server, local.classify, COUNT)
    assert server.memory() < before + SLACK
    for way in WAYS:
        assert statuses[way].total() >= COUNT
        good = statuses[way]["200"] + statuses[way]["OK"]
        refused = statuses[way]["400"] + statuses[way]["INVALID_ARGUMENT"]
        assert good > COUNT / 50 and refused > COUNT / 5, statuses
    assert not (ROOT / ".hypothesis").exists()
