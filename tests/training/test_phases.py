"""Phases of other crop sizes: where they begin, that both data paths follow, and that a run can go on at any step."""

import pytest
import torch
from dino.training.artifacts import write_backbone
from PIL import Image
from test_dinov2_step import DINOV2, Reference
from test_loader import WAYS, batches
from test_step import build, packed, views_of_batch

from dino import load_backbone
from dino.config import read as configuration
from dino.config.schema import Phase
from dino.data import open_images
from dino.errors import UserError
from dino.methods.network import build_networks
from dino.run import RunDirectory
from dino.training.loader import Batches
from dino.training.phases import stretches, views_at
from dino.training.settings import load

STEPS, BOUNDARY = 6, 3
LATE = "{begin: 0.5, global_size: 24, local_size: 12}"
PHASED = {"train.steps": STEPS, "train.phases": f"[{LATE}]", "data.workers": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """64 images of noise."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for index in range(64):
        pixels = torch.randint(0, 256, (26, 30, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(root / f"{index:02d}.png")
    return root


def sizes(found: list) -> list[tuple[int, ...]]:
    """Of each step's crops."""
    return [tuple(crop.shape[-1] for crop in step[0]) for step in found]


def assert_equal(found: list, expected: list) -> None:
    assert sizes(found) == sizes(expected)
    for step, other in zip(found, expected, strict=True):
        for crops, others in zip(step, other, strict=True):
            assert all(torch.equal(*pair) for pair in zip(crops, others, strict=True))


@pytest.mark.parametrize(
    ("phases", "steps", "expected"),
    [
        ([], 10, [(0, 10, 16)]),
        ([(0.5, 24)], 10, [(0, 5, 16), (5, 10, 24)]),
        ([(0.25, 24), (0.9, 32)], 100, [(0, 25, 16), (25, 90, 24), (90, 100, 32)]),
        ([(0.9, 24)], 4, [(0, 4, 16), (4, 4, 24)]),  # too short a run for it
        ([(0.3, 24), (0.31, 32)], 10, [(0, 3, 16), (3, 3, 24), (3, 10, 32)]),  # both begin at the same step
    ],
)
def test_the_run_is_cut_where_phases_begin(phases, steps, expected, tiny):
    listed = ", ".join(f"{{begin: {begin}, global_size: {size}, local_size: {size // 2}}}" for begin, size in phases)
    config = tiny({"train.phases": f"[{listed}]", "train.steps": steps})
    found = stretches(config)
    assert [(one.start, one.stop, one.views.global_size) for one in found] == expected
    assert all(one.views.local_size * 2 == one.views.global_size for one in found)
    others = {name: value for name, value in vars(config.views).items() if name not in ("global_size", "local_size")}
    assert all(vars(one.views).items() >= others.items() for one in found)
    of_steps = [size for start, stop, size in expected for _ in range(start, stop)]
    assert [views_at(config, step).global_size for step in range(steps)] == of_steps
    assert views_at(config, steps).global_size == expected[-1][2]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_step_has_the_crops_of_its_phase(way, accumulation, accelerator, tiny, folder):
    """Those of a run that has these sizes throughout: nothing else changes with a phase."""
    common = {**WAYS[way], **PHASED, "train.accumulation": accumulation}
    found = batches(accelerator, tiny(common), folder, 0, STEPS)
    assert sizes(found) == [(16, 8)] * BOUNDARY + [(24, 12)] * (STEPS - BOUNDARY)
    early, late = {"train.phases": "[]"}, {"train.phases": "[]", "views.global_size": 24, "views.local_size": 12}
    assert_equal(found[:BOUNDARY], batches(accelerator, tiny(common | early), folder, 0, BOUNDARY))
    assert_equal(found[BOUNDARY:], batches(accelerator, tiny(common | late), folder, BOUNDARY, STEPS))


def test_several_phases(accelerator, tiny, folder):
    phases = f"[{{begin: 0.2, global_size: 20, local_size: 8}}, {LATE}]"
    found = batches(accelerator, tiny(PHASED | {"train.phases": phases}), folder, 0, STEPS)
    assert sizes(found) == [(16, 8), (20, 8), (20, 8), (24, 12), (24, 12), (24, 12)]


@pytest.mark.parametrize("start", [BOUNDARY - 1, BOUNDARY, BOUNDARY + 1])
@pytest.mark.parametrize(
    ("way", "workers"), [("resident", 0), ("workers cut", 0), ("workers cut", 1), ("workers", 0), ("workers", 1)]
)
def test_a_resumed_run_has_the_same_crops(way, workers, start, accelerator, tiny, folder):
    config = tiny({**WAYS[way], **PHASED})
    whole = batches(accelerator, config, folder, 0, STEPS)
    config.data.workers = workers
    assert_equal(batches(accelerator, config, folder, start, STEPS), whole[start:])


@pytest.mark.parametrize("way", WAYS)
def test_a_look_at_the_first_batches_takes_nothing_from_the_run(way, accelerator, tiny, folder):
    config = tiny({**WAYS[way], **PHASED})
    images = open_images(str(folder), "folder", 3)
    whole = batches(accelerator, config, folder, 0, STEPS)
    looked = Batches(config, images, accelerator, 1, STEPS, None)
    state = torch.get_rng_state()
    numbers, first = zip(*looked.first(4), strict=True)
    assert numbers == (1, 2, 3, 4)
    assert_equal(list(first), whole[1:5])
    assert len(list(looked.first(100))) == STEPS - 1
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(list(looked), whole[1:])


BAD = {
    "begins at the start": ("{begin: 0, global_size: 32, local_size: 16}", "between 0 and 1, got [0.0]"),
    "begins at the end": ("{global_size: 32, local_size: 16}", "between 0 and 1, got [1.0]"),
    "begins after the end": ("{begin: 1.5, global_size: 32, local_size: 16}", "between 0 and 1, got [1.5]"),
    "out of order": (
        "{begin: 0.8, global_size: 32, local_size: 16}, {begin: 0.5, global_size: 48, local_size: 16}",
        "one after the other, between 0 and 1, got [0.8, 0.5]",
    ),
    "global crops and patches": (
        "{begin: 0.5, global_size: 40, local_size: 16}",
        "train.phases[0].global_size=40 is not divisible by model.patch_size=16: use 32 or 48",
    ),
    "local crops and patches, second": (
        "{begin: 0.5, global_size: 32, local_size: 16}, {begin: 0.6, global_size: 48, local_size: 24}",
        "train.phases[1].local_size=24 is not divisible by model.patch_size=16: use 16 or 32",
    ),
    "smaller than a patch": (
        "{begin: 0.5, global_size: 32, local_size: 8}",
        "train.phases[0].local_size=8 is smaller than one patch",
    ),
    "too small": (
        "{begin: 0.5, global_size: 32, local_size: 1}",
        "train.phases[0].local_size must be at least 2, got 1",
    ),
    "no list": ("5", "train.phases must be a list of {begin: share, global_size: pixels, local_size: pixels}"),
    "unknown name": ("{begin: 0.5, size: 32}", "train.phases must be a list of {begin: share, global_size: pixels"),
}


@pytest.mark.parametrize("kind", BAD)
def test_phases_that_cannot_be_are_refused(kind):
    phases, said = BAD[kind]
    with pytest.raises(UserError) as error:
        load(None, [f"train.phases=[{phases}]", *(["model.patch_size=1"] if kind == "too small" else [])])
    assert said in str(error.value)


def test_local_sizes_of_phases_do_not_matter_without_local_crops():
    config = load(None, ["views.local_crops=0", "train.phases=[{begin: 0.5, global_size: 32, local_size: 1}]"])
    assert config.train.phases == [Phase(0.5, 32, 1)]


def test_config_with_phases_is_read_back_equal(tiny, tmp_path):
    config = tiny(PHASED | {"train.phases": f"[{{begin: 0.25, global_size: 20, local_size: 8}}, {LATE}]"})
    (tmp_path / "config.yaml").write_text(configuration.dump(config))
    again = load(tmp_path / "config.yaml")
    assert again == config
    assert again.train.phases == [Phase(0.25, 20, 8), Phase(0.5, 24, 12)]


def test_backbone_says_the_size_of_the_phase_that_it_reached(tiny, tmp_path):
    config = tiny(PHASED)
    _, teacher = build_networks(config)
    found = {}
    for step in (0, 1, BOUNDARY, BOUNDARY + 1, STEPS):
        write_backbone(RunDirectory(tmp_path), config, teacher.backbone, step, "images")
        found[step] = load_backbone(tmp_path).preprocess.image_size
    assert found == {0: 16, 1: 16, BOUNDARY: 16, BOUNDARY + 1: 24, STEPS: 24}
    assert load_backbone(tmp_path).spec.image_size == 16, "the grid of positions stays"


@pytest.mark.parametrize("position_size", [None, 32])
def test_steps_with_masks_go_on_at_another_size(position_size, accelerator, tiny):
    """Against the papers' equations: masks cover the new grid, positions are interpolated, schedules go on."""
    late = "[{begin: 0.2, global_size: 24, local_size: 12}]"
    changes = {"train.phases": late, "model.position_size": position_size or "none"}
    config = tiny(DINOV2 | changes)
    trainer = build(accelerator, config)
    reference = Reference(config, trainer.student, trainer.teacher)
    for number, side in enumerate((4, 4, 6)):
        of_step = tiny(DINOV2 | changes)
        of_step.views = views_at(config, number)
        views = views_of_batch(of_step, number)
        assert views[0].shape[-1] == 4 * side
        hidden = trainer.step.draw_masks(number, range(config.train.batch_size), (side, side)).hidden
        expected, norm = reference.step(number, views, hidden.unflatten(0, (2, -1)))
        found = trainer.step(number, packed(views))
        assert found.pop("health/gradient_norm").item() == pytest.approx(norm, rel=1e-4)
        assert {name: loss.item() for name, loss in found.items()} == pytest.approx(expected, rel=1e-5)
