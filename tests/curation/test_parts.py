"""A pool clustered in parts: clusters of each part by themselves, joined above, and what it costs in balance."""

import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import worlds
from clouds import normal

from dino.curation import parts as parts_module
from dino.curation import points as points_module
from dino.curation import rebalance
from dino.curation.clusters import Clusters, cluster
from dino.curation.kmeans import kmeans, seeds
from dino.curation.points import Points
from dino.curation.settings import Clusters as Settings
from dino.curation.stage import Stage
from dino.data.sampler import effective_number
from dino.errors import UserError

CONCEPTS = 12


def accelerator(rank: int = 0) -> SimpleNamespace:
    return SimpleNamespace(
        is_main_process=rank == 0, wait_for_everyone=lambda: None, device=torch.device("cpu"), process_index=rank
    )


def pool(images: int = 1200) -> tuple[np.ndarray, np.ndarray]:
    """fp16 embeddings of twelve concepts, the largest half of all images and the smallest a fiftieth; and which."""
    frequencies = 1 / np.arange(1, CONCEPTS + 1)
    concept = np.random.default_rng(0).choice(CONCEPTS, images, p=frequencies / frequencies.sum())
    centers = 6 * normal(CONCEPTS, 16, 1)
    return (centers[torch.from_numpy(concept)] + normal(images, 16, 2)).numpy().astype(np.float16), concept


def settings(parts: int) -> Settings:
    return Settings(counts=[48, 12], resamplings=2, sample=5, iterations=20, precision="fp32", parts=parts)


def clustered(folder: Path, parts: int, indices: np.ndarray | None = None, seed: int = 0, name: str = "") -> Clusters:
    tokens, _ = pool()
    indices = np.arange(len(tokens)) if indices is None else indices
    how = settings(parts)
    stage = Stage(folder / f"clusters{name or parts}", [dataclasses.asdict(how), seed], accelerator())
    return cluster(stage, tokens, indices, how, seed, accelerator())


def test_every_image_is_in_a_cluster_of_its_part_whose_centroid_is_the_nearest_there(tmp_path):
    """And what is above joins the clusters of all parts."""
    tokens, _ = pool()
    indices = np.arange(0, len(tokens), 2)
    made = clustered(tmp_path, 4, indices)
    labels = made.levels[0]
    assert (labels[1::2] == -1).all()
    assert np.isnan(made.distances[1::2]).all()
    part = labels[indices] // 12
    assert sorted(set(part.tolist())) == [0, 1, 2, 3]
    assert np.bincount(part).tolist() == [150] * 4
    unit = tokens[indices].astype(float)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    squares = ((unit[:, None] - made.centroids[None].astype(float)) ** 2).sum(axis=2)
    squares[np.arange(48) // 12 != part[:, None]] = np.inf
    np.testing.assert_allclose(made.distances[indices], squares.min(axis=1), rtol=1e-3, atol=1e-5)
    own = squares[np.arange(len(indices)), labels[indices]]
    np.testing.assert_allclose(own, squares.min(axis=1), rtol=0, atol=1e-5)
    assert made.levels[1].shape == (48,)
    assert set(made.levels[1].tolist()) <= set(range(12))


def test_what_is_drawn_is_much_as_without_cutting(tmp_path):
    """As balanced over concepts, and as near to another seed's draws without cutting as these are to each other."""
    _, concept = pool()
    weights, effective = {}, {}
    for parts, seed in ((1, 0), (1, 1), (3, 0)):
        levels = clustered(tmp_path, parts, seed=seed).levels
        weights[parts, seed] = rebalance.hierarchical(levels, 300, 1.0)
        draws = np.bincount(concept, weights=weights[parts, seed], minlength=CONCEPTS)
        effective[parts, seed] = effective_number(draws)
    before = effective_number(np.bincount(concept))
    assert min(effective[1, 0], effective[1, 1]) > 1.15 * before
    assert effective[3, 0] > 0.95 * min(effective[1, 0], effective[1, 1])
    between_seeds, cut = (np.minimum(weights[1, 1], weights[other]).sum() / 300 for other in ((1, 0), (3, 0)))
    assert cut > between_seeds - 0.1


def test_parts_that_are_done_are_not_done_again(tmp_path, monkeypatch):
    """Killed after any part, it ends as if it had not been."""
    expected = clustered(tmp_path, 3, name="whole")
    whole, calls = parts_module.whole, []

    def mortal(*arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return whole(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(parts_module, "whole", mortal)
        with pytest.raises(KeyboardInterrupt):
            clustered(tmp_path, 3)
    titles = []

    def watched(own, counts, how, folder, title):
        titles.append(title)
        return whole(own, counts, how, folder, title)

    monkeypatch.setattr(parts_module, "whole", watched)
    made = clustered(tmp_path, 3)
    assert titles == ["part 3 of 3, ", "joining parts, "]
    for level, expected_level in zip(made.levels, expected.levels, strict=True):
        assert level.tolist() == expected_level.tolist()


@pytest.mark.parametrize("parts", [49, 1000])
def test_more_parts_than_clusters_are_refused(tmp_path, parts):
    with pytest.raises(UserError, match=rf"clusters.parts={parts} of 1,200 images and 48 clusters"):
        clustered(tmp_path, parts)


def test_first_centroids_are_sought_among_points_that_fit(monkeypatch):
    """However few these are, there is one for each cluster; where they are as many as before, it changes nothing."""
    from dino.curation import kmeans as kmeans_module

    points = Points(normal(600, 8))
    before = seeds(points, 20, 1)
    monkeypatch.setattr(kmeans_module, "SAMPLE_BYTES", 320 * 8 * 4)
    assert torch.equal(seeds(points, 20, 1), before)
    for fitting in (0, 50):
        monkeypatch.setattr(kmeans_module, "SAMPLE_BYTES", fitting * 8 * 4)
        few = seeds(points, 20, 1)
        assert len(few.unique(dim=0)) == 20
        assert kmeans(points, 20, 30, 1).objective < 1.2 * kmeans(points, 20, 30, initial=before).objective


def work(rank: int, processes: int, folder: Path) -> list[torch.Tensor]:
    import torch.distributed as dist

    points_module.BLOCK = 64
    here = accelerator(rank)
    if processes > 1:
        here.wait_for_everyone = dist.barrier
    tokens, _ = pool()
    stage = Stage(folder / f"of-{processes}", ["parts"], here)
    made = cluster(stage, tokens, np.arange(0, len(tokens), 3), settings(3), 0, here)
    return [torch.from_numpy(part) for part in (*made.levels, made.distances.view(np.int32), made.centroids)]


@pytest.mark.slow
def test_the_same_clusters_on_any_number_of_processes(tmp_path):
    results = worlds.run(functools.partial(work, folder=tmp_path), [2, 1], tmp_path)
    for of_rank in results[2]:
        assert all(torch.equal(one, other) for one, other in zip(of_rank, results[1][0], strict=True))
