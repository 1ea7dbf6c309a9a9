"""Files from strangers, damaged in ways that hypothesis finds: read, or refused in one line; no traceback, no hang.

The examples are the same in every run, and their number is bounded: benchmarks/soak.py takes thousands.
"""

import tempfile
from pathlib import Path

import pytest

pytest.importorskip("hypothesis", reason="needs hypothesis, of the extra dev")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import damaged, targets

TARGETS = targets()
PIECES = st.one_of(
    st.binary(max_size=12),
    st.sampled_from(
        [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"9" * 30, b"[" * 60, b"\n", b"&a *a", b"\\u0000"]
    ),
)
EDITS = st.lists(st.tuples(st.integers(0, 5), st.floats(0, 1), PIECES), min_size=1, max_size=4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_read_or_refused(name):
    target = TARGETS[name]

    @settings(derandomize=True, max_examples=30, deadline=5000, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(target.wholes), EDITS)
    def attempt(whole: bytes, edits: list[tuple[int, float, bytes]]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            target.attempt(damaged(whole, edits), Path(folder))

    attempt()


@pytest.mark.parametrize("name", TARGETS)
def test_whole_files_are_read(name, tmp_path):
    """Else this would be a test of nothing: a refusal of a whole file is raised here, and fails."""
    target = TARGETS[name]
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(TARGETS["images"].wholes[0])
    for whole in target.wholes:
        file = tmp_path / target.name
        file.write_bytes(whole)
        target.use(file)
