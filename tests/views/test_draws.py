"""What chance decides has the published distributions, and depends on the key alone."""

import numpy as np
import pytest
import torch
from material import EVERYTHING, drawn, keys_of, plain, preset
from scipy import stats
from torchvision.transforms import v2

from dino.views import View
from dino.views.crop import draw_boxes
from dino.views.draws import SLOTS, STRIDE, Numbers, sample_key

KEYS = keys_of(20_000)
UNLIKELY = 1e-4  # p of a test that a right draw fails; keys are fixed, so it passes for ever or never


def boxes(scale: tuple[float, float], sizes: np.ndarray | tuple[int, int], keys: np.ndarray = KEYS) -> np.ndarray:
    """(B, 4) crops of images of one size, or of a size each."""
    sizes = np.broadcast_to(sizes, (len(keys), 2))
    return draw_boxes(Numbers(keys, range(1)), [View(8, scale)], sizes)[0]


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
        numbers = Numbers(np.array([1234567, 0], dtype=np.uint64), range(1)).table[0]
        assert numbers[0, :5].tolist() == [(value >> 11) / 2**53 for value in published]
        assert numbers[1, 0] == (0xE220A8397B1DCDAF >> 11) / 2**53

    def test_views_continue_the_sequence(self):
        """View v takes numbers 64 v to 64 v + 63 of its image's sequence, by the algorithm in exact integers."""
        key, mask = 0xFEDCBA9876543210, 2**64 - 1
        expected = []
        for count in range(1, 3 * 64 + 1):
            z = (key + count * 0x9E3779B97F4A7C15) & mask
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
            expected.append(((z ^ (z >> 31)) >> 11) / 2**53)
        keys = np.array([key], dtype=np.uint64)
        assert Numbers(keys, range(3)).table.flatten().tolist() == expected
        assert Numbers(keys, range(1, 3)).table.flatten().tolist() == expected[64:]
        assert Numbers(keys, range(1, 2))["flip"][0, 0] == expected[64 + 22]

    def test_no_two_names_share_a_number(self):
        numbers = np.arange(STRIDE)
        taken = np.concatenate([np.atleast_1d(numbers[slot]) for slot in SLOTS.values()])
        assert sorted(taken) == list(range(39))  # the numbers of old runs: to be kept

    def test_keys_of_all_positions_differ_and_their_bits_are_balanced(self):
        grid = [(seed, epoch, index) for seed in range(12) for epoch in range(12) for index in range(120)]
        keys = [sample_key(*place) for place in grid]
        assert len(set(keys)) == len(keys)
        bits = np.unpackbits(np.array(keys, dtype=np.uint64).view(np.uint8)).reshape(-1, 64)
        assert np.abs(bits.mean(axis=0) - 0.5).max() < 5 * 0.5 / len(keys) ** 0.5


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

    def test_no_crop_of_an_image_with_enough_pixels_is_enlarged(self):
        """But for rounding; and those of an image with fewer are."""
        spec = preset("dino", global_size=224, local_size=96)
        for sides, enlarged in (((600, 410), False), ((600, 300), True)):
            assert (sides[0] * sides[1] < spec.enough) == enlarged
            found = draw_boxes(Numbers(KEYS, range(5)), spec.views, np.tile(sides, (len(KEYS), 1)))
            least = found[..., 2:].min(axis=(1, 2)) / [view.size for view in spec.views]
            assert (least.min() < 0.99) == enlarged

    def test_an_image_is_cropped_alike_alone_and_among_others(self):
        sizes, views = np.random.default_rng(0).integers(4, 300, (30, 2)), preset("line_art").views
        together = draw_boxes(Numbers(KEYS[:30], range(5)), views, sizes)
        for image in range(30):
            alone = draw_boxes(Numbers(KEYS[image : image + 1], range(5)), views, sizes[image : image + 1])
            assert np.array_equal(together[:, image], alone[:, 0])


def is_uniform(values: np.ndarray, low: float, high: float) -> bool:
    return stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > UNLIKELY


class TestDistributions:
    def test_amounts_are_uniform_over_the_published_ranges(self):
        """Of colours and blur: main_dino.py, augmentations.py; of affine changes and strokes: as documented."""
        draws = drawn([plain(8, **EVERYTHING), plain(8, affine=0.25, stroke=0.125)], KEYS)
        ten, colours = np.radians(10), draws["jitter"]
        for name, low, high in [
            ("brightness", 0.6, 1.4),
            ("contrast", 0.6, 1.4),
            ("saturation", 0.8, 1.2),
            ("hue", -0.1, 0.1),
        ]:
            assert is_uniform(colours[name], low, high), name
        assert is_uniform(draws["blur"]["sigma"], 0.1, 2.0)
        affine, (down, right) = draws["affine"], draws["affine"]["shift"].T
        moves = [(affine["angle"], ten), (affine["shear"], ten), (affine["zoom"] - 1, 0.1), (down, 0.05), (right, 0.05)]
        for values, limit in [*moves, (draws["stroke"]["stroke"], 0.5)]:
            full, quarter = values.reshape(2, -1)  # of the two views
            assert is_uniform(full, -limit, limit)
            assert is_uniform(quarter, -limit / 4, limit / 4)

    def test_colours_are_changed_in_every_order_alike(self):
        orders = drawn([plain(8, jitter=0.8)], KEYS)["jitter"]["order"]
        assert np.array_equal(np.sort(orders), np.tile(np.arange(4), (len(KEYS), 1)))
        kinds, counts = np.unique(orders, axis=0, return_counts=True)
        assert len(kinds) == 24
        assert stats.chisquare(counts).pvalue > UNLIKELY

    def test_the_three_turns_are_as_likely(self):
        turns, counts = np.unique(drawn([plain(8, rotate=1.0)], KEYS)["rotate"]["turns"], return_counts=True)
        assert turns.tolist() == [1, 2, 3]
        assert stats.chisquare(counts).pvalue > UNLIKELY

    @pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9, 1.0])
    def test_augmentations_are_as_frequent_as_asked_for(self, probability):
        """Within four standard deviations, and exactly never and always."""
        names = ("flip", "jitter", "grey", "blur", "solarize", "vertical_flip", "rotate")
        always, sometimes = plain(8, **dict.fromkeys(names, 1.0)), plain(8, **dict.fromkeys(names, probability))
        draws = drawn([always, sometimes], KEYS)  # the first, so that they are drawn even at 0
        for name in names:
            applied = draws[name]["applied"].reshape(2, -1)[1]
            assert applied.mean() == pytest.approx(
                probability, abs=4 * (probability * (1 - probability) / len(KEYS)) ** 0.5
            )


def columns(views: list[View], keys: np.ndarray) -> dict[str, np.ndarray]:
    """What is drawn of every view of images of 200×200, each (B,)."""
    count = len(views)
    boxes = draw_boxes(Numbers(keys, range(count)), views, np.full((len(keys), 2), 200))
    top, left, height, width = boxes.transpose(2, 0, 1).astype(float)
    table = {"area": height * width, "shape": np.log(width / height)}
    table |= {"from top": top / (201 - height), "from left": left / (201 - width)}
    for name, draw in drawn(views, keys).items():
        for what, values in draw.items():
            per_view = values.reshape(count, len(keys), -1)
            if what == "order":
                per_view = per_view[..., :1]  # the first change
            for n in range(per_view.shape[-1]):
                table[f"{name} {what} {n}"] = per_view[..., n]
    return {f"{name} of view {view}": row for name, values in table.items() for view, row in enumerate(values)}


def cropped(**amounts: float) -> View:
    return View(32, (0.05, 0.3), amounts)


class TestIndependence:
    @pytest.mark.parametrize("keys", [KEYS, np.arange(len(KEYS), dtype=np.uint64)], ids=["keys", "counted keys"])
    def test_nothing_drawn_tells_of_anything_else(self, keys):
        """No two draws are correlated: of one view, of different views, of neighbouring images."""
        table_of = columns([cropped(**EVERYTHING)] * 2, keys)
        for view in range(2):
            del table_of[f"stroke applied 0 of view {view}"]  # always
        table = np.array(list(table_of.values()), dtype=float)
        with_next = np.concatenate([table[:, :-1], table[:, 1:]])
        correlation = np.corrcoef(with_next)[: len(table)] - np.eye(len(table), 2 * len(table))
        largest = np.unravel_index(np.abs(correlation).argmax(), correlation.shape)
        pair = [list(table_of)[index % len(table)] for index in largest]
        assert np.abs(correlation).max() < 5 / len(keys) ** 0.5, pair

    def test_draws_of_a_view_do_not_change_when_views_are_added(self):
        few = columns(list(preset("dino", local_crops=0).views), KEYS[:500])
        many = columns(list(preset("dino", local_crops=8).views), KEYS[:500])
        for name, values in few.items():
            assert np.array_equal(values, many[name]), name

    @pytest.mark.parametrize("switch", EVERYTHING)
    def test_switching_an_augmentation_off_changes_no_other_draw(self, switch):
        before = columns([cropped(**EVERYTHING)] * 2, KEYS[:500])
        after = columns([cropped(**EVERYTHING), cropped(**EVERYTHING | {switch: 0.0})], KEYS[:500])
        changed = {name for name in before if not np.array_equal(before[name], after[name])}
        assert changed
        assert all(name.startswith(switch) and name.endswith("of view 1") for name in changed)
