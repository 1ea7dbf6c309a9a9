"""Small products are faster on one thread, and much faster where the machine is busy; blocks are small here."""

from collections.abc import Iterator

import pytest
import torch

from dino.curation import points


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(points, "BLOCK", 64)
