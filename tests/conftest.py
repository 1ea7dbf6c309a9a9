"""Shared by all tests: the real data sets, where they are at hand."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("DINO_TEST_DATA", REPOSITORY / "../shared/data"))


@pytest.fixture(scope="session")
def omniglot_zip() -> Path:
    """Omniglot's background set: 19,280 drawings."""
    return _present("omniglot_images_background.zip")


@pytest.fixture(scope="session")
def caltech_zip() -> Path:
    """Caltech-101: 8,677 photographs, shorter side at most 128."""
    return _present("caltech101_128px.zip")


def _present(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"needs the data in DINO_TEST_DATA: {name} is not there")
    return DATA / name
