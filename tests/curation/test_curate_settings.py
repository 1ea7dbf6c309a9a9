"""Settings of a curation: defaults that can work, and refusals that name the key."""

import logging

import pytest

from dino.config.describe import describe
from dino.config.read import dump, leaves, read
from dino.curation.clusters import default_counts
from dino.curation.settings import CurateConfig, check
from dino.errors import UserError

GIVEN = ["weights=somewhere", "data.root=images"]


def test_defaults_can_work_and_are_described():
    config = read(CurateConfig, None, GIVEN)
    check(config)
    for key in leaves(config):
        assert f"  {key} (" in describe(config)


def test_written_settings_are_read_back(tmp_path):
    config = read(CurateConfig, None, [*GIVEN, "clusters.counts=[30,5]", "duplicates.against=[a, b]"])
    (tmp_path / "config.yaml").write_text(dump(config))
    assert read(CurateConfig, tmp_path / "config.yaml") == config


def test_a_key_of_earlier_versions_is_read_and_its_new_name_told(caplog):
    with caplog.at_level(logging.INFO):
        assert read(CurateConfig, None, ["duplicates.likeness=0.5"]).duplicates.similarity == 0.5
    assert "duplicates.likeness is called duplicates.similarity now" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["weights="], "no weights to embed with"),
        (["rebalance.method=retrieval"], "needs images in rebalance.seeds"),
        (["rebalance.method=none_of_them"], "rebalance.method must be one of"),
        (["duplicates.near=2"], "duplicates.near must be at least 0 and at most 1, got 2"),
        (["duplicates.similarity=-1"], "duplicates.similarity must be at least 0 and at most 1"),
        (["clusters.counts=[10,0]"], r"clusters.counts must be at least 1, got \[10, 0\]"),
        (["clusters.resamplings=-1"], "clusters.resamplings must be at least 0"),
        (["rebalance.repeats=0"], "rebalance.repeats must be above 0"),
        (["rebalance.budget=0"], "rebalance.budget must be auto or at least 1"),
        (["rebalance.budget=many"], "rebalance.budget must be a whole number or 'auto'"),
        (["rebalance.method=retrieval", "rebalance.seeds=x", "rebalance.budget=3"], "budget is not for retrieval"),
        (["run.cpu_threads=0", "embed.batch_size=0"], "2 settings cannot be used"),
    ],
)
def test_what_cannot_work_is_told(settings, message):
    with pytest.raises(UserError, match=message):
        check(read(CurateConfig, None, [*GIVEN, *settings]))


@pytest.mark.parametrize(
    ("images", "counts"),
    [(1, [1]), (39, [1]), (100, [5, 4]), (10_000, [500, 45]), (10_000_000, [10_000, 200])],
)
def test_clusters_by_number_of_images(images, counts):
    assert default_counts(images) == counts
