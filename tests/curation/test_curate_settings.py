"""Settings of a curation: defaults that can work, and refusals that name the key."""

import pytest

from dino.config.read import describe, dump, leaves, read
from dino.curation.pipeline import default_counts
from dino.curation.settings import CurateConfig, check
from dino.errors import UserError

GIVEN = ["weights=somewhere", "data.root=images"]


def test_defaults_can_work_and_are_described():
    config = read(CurateConfig, None, GIVEN)
    check(config)
    assert config.weights == "somewhere"
    for key, _ in leaves(CurateConfig):
        assert f"  {key} (" in describe(CurateConfig)


def test_written_settings_are_read_back(tmp_path):
    config = read(CurateConfig, None, [*GIVEN, "clusters.counts=[30,5]", "duplicates.against=[a, b]"])
    (tmp_path / "config.yaml").write_text(dump(config))
    assert read(CurateConfig, tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["weights="], "no weights to embed with"),
        (["rebalance.method=retrieval"], "needs images in rebalance.seeds"),
        (["rebalance.method=none_of_them"], "rebalance.method must be one of"),
        (["duplicates.near=2"], "duplicates.near must lie between 0 and 1"),
        (["duplicates.likeness=-1"], "duplicates.likeness must lie between 0 and 1"),
        (["duplicates.neighbours=0"], "duplicates.neighbours must be at least 1"),
        (["clusters.counts=[10,0]"], "clusters.counts must be above 0"),
        (["clusters.resamplings=-1"], "clusters.resamplings must not be negative"),
        (["rebalance.repeats=0"], "rebalance.repeats must be above 0"),
        (["rebalance.smoothing=1.5"], r"rebalance.smoothing must lie in \[0, 1\]"),
        (["rebalance.budget=0"], "rebalance.budget must be at least 1"),
        (["rebalance.budget=many"], "rebalance.budget must be int or 'auto'"),
        (
            ["rebalance.method=retrieval", "rebalance.seeds=x", "rebalance.budget=3"],
            "rebalance.budget is not for retrieval",
        ),
        (["run.cpu_threads=0"], "run.cpu_threads must be at least 1"),
    ],
)
def test_what_cannot_work_is_told(settings, said):
    with pytest.raises(UserError, match=said):
        check(read(CurateConfig, None, [*GIVEN, *settings]))


@pytest.mark.parametrize(
    ("images", "counts"),
    [(1, [1]), (39, [1]), (100, [5, 4]), (10_000, [500, 45]), (10_000_000, [10_000, 200])],
)
def test_clusters_by_number_of_images(images, counts):
    assert default_counts(images) == counts
