"""`runs` starts the entry points; what reads their output lies in launching.py."""

from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("launching")

from launching import Runs  # noqa: E402  # its assertions are rewritten only if it is imported after


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Starts pre-trainings; at the end, whatever a failed test left running is killed."""
    starter = Runs(tmp_path_factory.mktemp("home"))
    yield starter
    starter.stop_all()
