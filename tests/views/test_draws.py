"""What chance decides has the published distributions, and depends on the key alone."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from material import keys_of, preset
from scipy import stats
from torchvision.transforms import v2

from dino.views import View
from dino.views.draws import SLOTS, _uniforms, draw_appearance, draw_geometry, sample_key

KEYS = keys_of(20_000)
UNLIKELY = 1e-4  # p of a test that a right draw fails; keys are fixed, so it passes for ever or never
EVERYTHING = View(
    32, (0.05, 0.4), flip=0.5, jitter=0.8, grey=0.2, blur=0.5, blur_sigma=(0.1, 2.0), solarize=0.2, affine=1, stroke=0.5
)


def boxes(scale: tuple[float, float], sizes: np.ndarray | tuple[int, int], keys: np.ndarray = KEYS) -> np.ndarray:
    """(B, 4) crops of images of one size, or of a size each."""
    sizes = np.broadcast_to(sizes, (len(keys), 2))
    return draw_geometry([View(8, scale)], keys, sizes).box[0]


def torchvision_boxes(scale: tuple[float, float], size: tuple[int, int], count: int) -> np.ndarray:
    crop, image = v2.RandomResizedCrop(8, scale), torch.empty(1, *size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = [crop.make_params([image]) for _ in range(count)]
    return np.array([(box["top"], box["left"], box["height"], box["width"]) for box in found])


class TestGenerator:
    def test_numbers_are_those_of_splitmix64(self):
        """Outputs of the authors' splitmix64.c for the seeds 1234567 and 0, as 53-bit fractions."""
        published = [
            6457827717110365317,
            3203168211198807973,
            9817491932198370423,
            4593380528125082431,
            16408922859458223821,
        ]
        found = _uniforms(np.array([1234567, 0], dtype=np.uint64), views=1)[0]
        assert found[0, :5].tolist() == [(value >> 11) / 2**53 for value in published]
        assert found[1, 0] == (0xE220A8397B1DCDAF >> 11) / 2**53

    def test_views_continue_the_sequence(self):
        """View v takes numbers 64 v to 64 v + 63 of its image's sequence, by the algorithm in exact integers."""
        key, mask = 0xFEDCBA9876543210, 2**64 - 1
        expected = []
        for count in range(1, 3 * SLOTS + 1):
            z = (key + count * 0x9E3779B97F4A7C15) & mask
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
            expected.append(((z ^ (z >> 31)) >> 11) / 2**53)
        assert _uniforms(np.array([key], dtype=np.uint64), views=3).flatten().tolist() == expected

    def test_keys_of_all_places_differ_and_their_bits_are_balanced(self):
        grid = [(seed, epoch, index) for seed in range(12) for epoch in range(12) for index in range(120)]
        keys = [sample_key(*place) for place in grid]
        assert len(set(keys)) == len(keys)
        bits = np.unpackbits(np.array(keys, dtype=np.uint64).view(np.uint8)).reshape(-1, 64)
        assert np.abs(bits.mean(axis=0) - 0.5).max() < 5 * 0.5 / len(keys) ** 0.5

    def test_global_random_states_are_neither_read_nor_changed(self):
        first = (draw_geometry([EVERYTHING], KEYS[:4], np.full((4, 2), 50)), draw_appearance([EVERYTHING], KEYS[:4]))
        torch.manual_seed(5)
        random.seed(5)
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
        again = (draw_geometry([EVERYTHING], KEYS[:4], np.full((4, 2), 50)), draw_appearance([EVERYTHING], KEYS[:4]))
        for one, other in zip(first, again, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002


class TestCrops:
    """Crops are those of torchvision's RandomResizedCrop, which DINO and DINOv2 use."""

    @pytest.mark.parametrize(
        ("size", "scale"),
        [
            ((224, 224), (0.4, 1.0)),
            ((375, 500), (0.05, 0.4)),
            ((500, 281), (0.08, 1.0)),
            ((60, 200), (0.3, 0.8)),  # about half of all end in the centre
            ((331, 83), (0.05, 0.4)),
        ],
    )
    def test_area_shape_and_place_are_distributed_as_in_torchvision(self, size, scale):
        ours, theirs = boxes(scale, size), torchvision_boxes(scale, size, 6000)

        def quantities(found: np.ndarray) -> dict[str, np.ndarray]:
            top, left, height, width = found.T.astype(float)
            return {
                "area": height * width / (size[0] * size[1]),
                "shape": np.log(width / height),
                "from top": top / np.maximum(size[0] - height, 1),
                "from left": left / np.maximum(size[1] - width, 1),
            }

        for name, values in quantities(ours).items():
            assert stats.ks_2samp(values, quantities(theirs)[name]).pvalue > UNLIKELY, name

    @pytest.mark.parametrize(
        ("size", "scale"), [((4, 4), (0.05, 0.4)), ((4, 4), (0.4, 1.0)), ((5, 7), (0.2, 0.7)), ((4, 9), (0.1, 0.6))]
    )
    def test_every_crop_of_a_tiny_image_is_as_frequent_as_in_torchvision(self, size, scale):
        ours, theirs = boxes(scale, size), torchvision_boxes(scale, size, 8000)
        kinds = sorted({*map(tuple, ours.tolist()), *map(tuple, theirs.tolist())})
        table = np.array([[(found == kind).all(axis=1).sum() for kind in kinds] for found in (ours, theirs)])
        rare = table.sum(axis=0) < 60  # chi² wants some ten of each
        table = np.concatenate([table[:, ~rare], table[:, rare].sum(axis=1, keepdims=True)], axis=1)
        table = table[:, table.sum(axis=0) > 0]
        assert table.shape[1] > 5
        assert stats.chi2_contingency(table).pvalue > UNLIKELY

    def test_a_crop_that_never_fits_is_torchvisions_largest_in_the_centre(self):
        generator = np.random.default_rng(0)
        sizes = [(side, int(side * generator.uniform(3, 9)) + 4) for side in generator.integers(1, 120, 40).tolist()]
        sizes += [(width, height) for height, width in sizes]
        for size in sizes:
            expected = torchvision_boxes((0.9, 1.0), size, 1)
            assert np.array_equal(boxes((0.9, 1.0), size, KEYS[:5]), expected.repeat(5, axis=0)), size

    @pytest.mark.parametrize("scale", [(0.05, 0.4), (0.4, 1.0), (1e-4, 1.0), (1.0, 1.0)])
    def test_crops_lie_inside_their_own_image_whatever_its_size(self, scale):
        generator = np.random.default_rng(0)
        sizes = np.exp(generator.uniform(0, np.log(5000), (len(KEYS), 2))).astype(int)
        top, left, height, width = boxes(scale, sizes).T
        assert min(top.min(), left.min()) >= 0
        assert min(height.min(), width.min()) >= 1
        assert (top + height <= sizes[:, 0]).all()
        assert (left + width <= sizes[:, 1]).all()

    def test_an_image_is_cut_alike_alone_and_among_others(self):
        sizes = np.random.default_rng(0).integers(4, 300, (30, 2))
        views = preset("line_art").views
        together = draw_geometry(views, KEYS[:30], sizes)
        for image in range(30):
            alone = draw_geometry(views, KEYS[image : image + 1], sizes[image : image + 1])
            for name, values in together._asdict().items():
                assert np.array_equal(values[:, image], getattr(alone, name)[:, 0]), name


class TestDistributions:
    @pytest.mark.parametrize("name", ["dino", "dinov2"])
    def test_colours_are_uniform_over_the_published_ranges(self, name):
        """Brightness and contrast 0.6 … 1.4, saturation 0.8 … 1.2, hue ±0.1 (main_dino.py, augmentations.py)."""
        drawn = draw_appearance(preset(name).views, KEYS)
        ranges = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
        for what, (low, high) in ranges.items():
            for values in getattr(drawn, what):
                assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > UNLIKELY, what

    def test_colours_are_changed_in_every_order_alike(self):
        orders = draw_appearance([EVERYTHING], KEYS).order[0]
        assert np.array_equal(np.sort(orders), np.tile(np.arange(4), (len(KEYS), 1)))
        kinds, counts = np.unique(orders, axis=0, return_counts=True)
        assert len(kinds) == 24
        assert stats.chisquare(counts).pvalue > UNLIKELY

    def test_sigma_is_uniform_where_there_is_a_blur_and_0_elsewhere(self):
        sigma = draw_appearance([replace(EVERYTHING, blur=0.3, blur_sigma=(0.5, 1.5))], KEYS).sigma[0]
        assert (sigma > 0).mean() == pytest.approx(0.3, abs=0.015)
        assert stats.kstest(sigma[sigma > 0], stats.uniform(0.5, 1.0).cdf).pvalue > UNLIKELY

    @pytest.mark.parametrize("strength", [1.0, 0.25])
    def test_affine_changes_are_uniform_and_as_large_as_documented(self, strength):
        """Rotate and shear by up to 10°, shift by up to 5 %, scale by up to 10 %, times the strength."""
        drawn = draw_geometry([replace(EVERYTHING, affine=strength)], KEYS, np.full((len(KEYS), 2), 50))
        limits = {"angle": np.radians(10), "shear": np.radians(10), "zoom": 0.1}
        found = {"angle": drawn.angle[0], "shear": drawn.shear[0], "zoom": drawn.zoom[0] - 1}
        for place, name in enumerate(("down", "right")):
            found[name], limits[name] = drawn.shift[0, :, place], 0.05
        for name, values in found.items():
            limit = strength * limits[name]
            assert stats.kstest(values, stats.uniform(-limit, 2 * limit).cdf).pvalue > UNLIKELY, name

    def test_strokes_change_both_ways_alike(self):
        stroke = draw_appearance([replace(EVERYTHING, stroke=0.3)], KEYS).stroke[0]
        assert stats.kstest(stroke, stats.uniform(-0.3, 0.6).cdf).pvalue > UNLIKELY

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
    def test_augmentations_are_as_frequent_as_asked_for(self, share):
        """Within four standard deviations, and exactly never and always."""
        view = replace(EVERYTHING, flip=share, jitter=share, grey=share, blur=share, solarize=share)
        drawn = draw_appearance([view], KEYS)
        flip = draw_geometry([view], KEYS, np.full((len(KEYS), 2), 50)).flip
        for chosen in (flip, drawn.jitter, drawn.grey, drawn.sigma > 0, drawn.solarize):
            assert chosen.mean() == pytest.approx(share, abs=4 * (share * (1 - share) / len(KEYS)) ** 0.5)


def columns(views: list[View], keys: np.ndarray) -> dict[str, np.ndarray]:
    """What is drawn of every view of images of 200×200, each (B,)."""
    found = draw_geometry(views, keys, np.full((len(keys), 2), 200))._asdict() | draw_appearance(views, keys)._asdict()
    top, left, height, width = found.pop("box").transpose(2, 0, 1).astype(float)
    found |= {"area": height * width, "shape": np.log(width / height)}
    found |= {"from top": top / (200 - height), "from left": left / (200 - width)}
    found["down"], found["right"] = found.pop("shift").transpose(2, 0, 1)
    found["first changed"] = found.pop("order")[..., 0]
    return {f"{name} of view {view}": row for name, values in found.items() for view, row in enumerate(values)}


class TestIndependence:
    @pytest.mark.parametrize("keys", [KEYS, np.arange(len(KEYS), dtype=np.uint64)], ids=["keys", "counted keys"])
    def test_nothing_drawn_tells_of_anything_else(self, keys):
        """No two draws are correlated: of one view, of different views, of neighbouring images."""
        view = replace(EVERYTHING, scale=(0.05, 0.3), blur=1.0)
        drawn = columns([view, view], keys)
        table = np.array(list(drawn.values()), dtype=float)
        with_next = np.concatenate([table[:, :-1], table[:, 1:]])
        correlation = np.corrcoef(with_next)[: len(table)] - np.eye(len(table), 2 * len(table))
        place = np.unravel_index(np.abs(correlation).argmax(), correlation.shape)
        pair = [list(drawn)[at % len(table)] for at in place]
        assert np.abs(correlation).max() < 5 / len(keys) ** 0.5, pair

    def test_draws_of_a_view_do_not_change_when_views_are_added(self):
        few, many = preset("dino", local_crops=0).views, preset("dino", local_crops=8).views
        sizes = np.full((len(KEYS), 2), 100)
        for one, other in (
            (draw_geometry(few, KEYS, sizes), draw_geometry(many, KEYS, sizes)),
            (draw_appearance(few, KEYS), draw_appearance(many, KEYS)),
        ):
            for name, values in one._asdict().items():
                assert np.array_equal(values, getattr(other, name)[: len(few)]), name

    @pytest.mark.parametrize(
        ("switch", "decides"),
        [
            ("flip", {"flip"}),
            ("jitter", {"jitter"}),
            ("grey", {"grey"}),
            ("blur", {"sigma"}),
            ("solarize", {"solarize"}),
            ("affine", {"angle", "shear", "down", "right", "zoom"}),
            ("stroke", {"stroke"}),
        ],
    )
    def test_switching_an_augmentation_off_changes_no_other_draw(self, switch, decides):
        before = columns([EVERYTHING, EVERYTHING], KEYS[:500])
        after = columns([EVERYTHING, replace(EVERYTHING, **{switch: 0.0})], KEYS[:500])
        changed = {name for name in before if not np.array_equal(before[name], after[name])}
        assert changed == {f"{name} of view 1" for name in decides}

    def test_views_of_one_kind_are_drawn_apart(self):
        drawn = columns([EVERYTHING] * 3, KEYS[:500])
        for one in range(3):
            for other in range(one):
                for name in columns([EVERYTHING], KEYS[:1]):
                    name = name.removesuffix(" of view 0")
                    assert not np.array_equal(drawn[f"{name} of view {one}"], drawn[f"{name} of view {other}"]), name

    def test_flat_orders_view_by_view(self):
        drawn = draw_geometry([EVERYTHING] * 3, KEYS[:5], np.full((5, 2), 60))
        flat = drawn.flat(slice(1, 3))
        for name, values in drawn._asdict().items():
            expected = [values[view, image] for view in (1, 2) for image in range(5)]
            assert np.array_equal(getattr(flat, name), expected), name
