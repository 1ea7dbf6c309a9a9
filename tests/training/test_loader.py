"""Batches are the same whichever way views are made, from whatever step on, and as each phase of a run has them."""

import multiprocessing
from contextlib import nullcontext
from unittest.mock import MagicMock, Mock

import pytest
import torch
from PIL import Image
from torch import Tensor

from dino import load_backbone
from dino.config.read import dump
from dino.config.schema import Phase
from dino.data import open_images
from dino.errors import UserError
from dino.methods.dino import build_networks
from dino.training.backbone_file import write_backbone
from dino.training.loader import Batches, ahead
from dino.training.phases import spans, views_at
from dino.training.settings import load

RESIDENT = {"data.cache": "device", "data.workers": 0}
CROPPED = {"data.cache": "none", "data.workers": 0}
WAYS = pytest.mark.parametrize("way", [RESIDENT, CROPPED], ids=["resident", "cropped by workers"])
STEPS, BOUNDARY = 6, 3
LATE = "{begin: 0.5, global_size: 24, local_size: 12}"
PHASED = {"train.steps": STEPS, "train.phases": f"[{LATE}]"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """64 images of several sizes and smooth content, so that a wrong crop would show."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for index in range(64):
        coarse = torch.rand(3, 4, 4, generator=generator)
        size = (20 + index % 7, 24 + index % 5)
        fine = torch.nn.functional.interpolate(coarse[None], size=size, mode="bilinear")[0]
        Image.fromarray((255 * fine).byte().permute(1, 2, 0).numpy()).save(root / f"{index:02d}.png")
    return root


def batches(accelerator, config, folder, start: int = 0, stop: int = 3) -> list[list[list[Tensor]]]:
    images = open_images(str(folder), "folder", 3)
    return list(Batches(config, images, accelerator, start, stop, None))


def sizes(steps: list) -> list[tuple[int, ...]]:
    """Of each step's crops."""
    return [tuple(crop.shape[-1] for crop in step[0]) for step in steps]


def flat(steps: list) -> list[Tensor]:
    """Every crop of every micro-batch of every step."""
    return [crops for step in steps for micro_batch in step for crops in micro_batch]


def assert_equal(steps: list, expected: list) -> None:
    assert sizes(steps) == sizes(expected)
    assert all(torch.equal(*pair) for pair in zip(flat(steps), flat(expected), strict=True))


@pytest.mark.parametrize("preset", ["line_art", "dino", "dinov2"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_both_ways_give_the_same_views_up_to_rounding(preset, accumulation, accelerator, tiny, folder):
    settings = {"views.preset": preset, "train.accumulation": accumulation}
    resident, cropped = (batches(accelerator, tiny(way | settings), folder) for way in (RESIDENT, CROPPED))
    assert [len(step) for step in resident] == [accumulation] * 3
    for crops, others in zip(flat(resident), flat(cropped), strict=True):
        assert crops.shape == others.shape
        assert crops.dtype == others.dtype == torch.uint8
        difference = (crops.float() - others.float()).abs()
        assert difference.mean() < 1
        assert difference.flatten(1).mean(dim=1).max() < 2  # of the worst single view


@WAYS
def test_indices_are_those_of_the_images(way, accelerator, tiny, folder):
    """Whole images, neither moved nor changed, show which they are."""
    settings = {"views.preset": "line_art", "views.affine": 0.0, "views.stroke": 0.0, "views.global_scale": [1.0, 1.0]}
    images = open_images(str(folder), "folder", 3)
    stream = Batches(tiny(way | settings | {"train.accumulation": 2}), images, accelerator, 0, 2, None)
    colours = torch.stack([images.read(index).float().mean(dim=(1, 2)) for index in range(64)])
    for step, micro_batches in enumerate(stream):
        first_views = torch.cat([crops[0][: len(crops[0]) // 2] for crops in micro_batches]).float().mean(dim=(2, 3))
        assert torch.cdist(first_views, colours).argmin(dim=1).tolist() == stream.indices(step)
        assert stream.names(step) == [images.names[index] for index in stream.indices(step)]


def test_broken_images_are_replaced_and_listed_alike(accelerator, tiny, folder, tmp_path):
    """Over one epoch, in which every image has its turn; without affine changes a CPU cuts in one way."""
    broken = (5, 6, 40, 63)  # the last is replaced by the first
    for index, path in enumerate(sorted(folder.iterdir())):
        (tmp_path / path.name).write_bytes(b"" if index in broken else path.read_bytes())
    images, settings = open_images(str(tmp_path), "folder", 3), {"views.preset": "line_art", "views.affine": 0.0}
    steps = []
    for way in (RESIDENT, CROPPED):
        stream = Batches(tiny(way | settings | {"data.max_unreadable": 0.1}), images, accelerator, 0, 8, None)
        steps.append(flat(list(stream)))
        assert stream.skipped.reasons.keys() == {images.names[index] for index in broken}
    assert all((one.int() - other.int()).abs().max() <= 1 for one, other in zip(*steps, strict=True))
    with pytest.raises(UserError, match=r"4 of 64 images \(6\.2%\) cannot be read"):  # before the first step
        Batches(tiny(RESIDENT), images, accelerator, 0, 3, None)


class TestPhases:
    @pytest.mark.parametrize(
        ("phases", "steps", "expected"),
        [
            ([], 10, [(0, 10, 16)]),
            ([(0.25, 24), (0.9, 32)], 100, [(0, 25, 16), (25, 90, 24), (90, 100, 32)]),
            ([(0.9, 24)], 4, [(0, 4, 16), (4, 4, 24)]),  # too short a run for it
            ([(0.3, 24), (0.31, 32)], 10, [(0, 3, 16), (3, 3, 24), (3, 10, 32)]),  # both begin at the same step
        ],
    )
    def test_divide_the_run_where_they_begin(self, phases, steps, expected, tiny):
        listed = ", ".join(f"{{begin: {at}, global_size: {size}, local_size: {size // 2}}}" for at, size in phases)
        config = tiny({"train.phases": f"[{listed}]", "train.steps": steps})
        assert [(span.start, span.stop, span.views.global_size) for span in spans(config)] == expected
        for span in spans(config):
            assert span.views.local_size * 2 == span.views.global_size
            same = {name for name, value in vars(config.views).items() if vars(span.views)[name] == value}
            assert vars(config.views).keys() - same <= {"global_size", "local_size"}
        of_steps = [size for start, stop, size in expected for _ in range(start, stop)]
        assert [views_at(config, step).global_size for step in range(steps)] == of_steps
        assert views_at(config, steps).global_size == expected[-1][2]

    @WAYS
    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_each_step_has_the_crops_of_its_phase(self, way, accumulation, accelerator, tiny, folder):
        """Those of a run that has these sizes throughout: nothing else changes with a phase."""
        common = {**way, **PHASED, "train.accumulation": accumulation}
        phased = batches(accelerator, tiny(common), folder, 0, STEPS)
        assert sizes(phased) == [(16, 8)] * BOUNDARY + [(24, 12)] * (STEPS - BOUNDARY)
        early = {"train.phases": "[]"}
        late = early | {"views.global_size": 24, "views.local_size": 12}
        assert_equal(phased[:BOUNDARY], batches(accelerator, tiny(common | early), folder, 0, BOUNDARY))
        assert_equal(phased[BOUNDARY:], batches(accelerator, tiny(common | late), folder, BOUNDARY, STEPS))

    @pytest.mark.parametrize("start", [BOUNDARY - 1, BOUNDARY, BOUNDARY + 1])
    @pytest.mark.parametrize("way", [RESIDENT, CROPPED, CROPPED | {"data.workers": 1}], ids=["resident", "0", "1"])
    def test_any_step_can_be_the_first(self, way, start, accelerator, tiny, folder):
        """With the crops of an uninterrupted run, whatever the number of workers; no two steps have the same."""
        whole = batches(accelerator, tiny(way | PHASED | {"data.workers": 0}), folder, 0, STEPS)
        assert_equal(batches(accelerator, tiny(way | PHASED), folder, start, STEPS), whole[start:])
        assert not torch.equal(whole[0][0][0], whole[1][0][0])

    @WAYS
    def test_a_look_at_the_first_batches_takes_nothing_from_the_run(self, way, accelerator, tiny, folder):
        config = tiny(way | PHASED)
        whole = batches(accelerator, config, folder, 0, STEPS)
        stream = Batches(config, open_images(str(folder), "folder", 3), accelerator, 1, STEPS, None)
        state = torch.get_rng_state()
        assert_equal(list(stream.between(1, 5)), whole[1:5])
        assert torch.equal(torch.get_rng_state(), state)
        assert_equal(list(stream), whole[1:])

    def test_are_read_back_equal(self, tiny, tmp_path):
        config = tiny(PHASED | {"train.phases": f"[{{begin: 0.25, global_size: 20, local_size: 8}}, {LATE}]"})
        (tmp_path / "config.yaml").write_text(dump(config))
        again = load(tmp_path / "config.yaml")
        assert again == config
        assert again.train.phases == [Phase(0.25, 20, 8), Phase(0.5, 24, 12)]

    def test_backbone_says_the_size_of_the_phase_that_it_reached(self, tiny, tmp_path):
        config = tiny(PHASED)
        _, teacher = build_networks(config)
        image_sizes = []
        for step in (0, BOUNDARY, BOUNDARY + 1, STEPS):
            write_backbone(tmp_path, config, teacher.backbone, step, "images")
            image_sizes.append(load_backbone(tmp_path).preprocess.image_size)
        assert image_sizes == [16, 16, 24, 24]
        assert load_backbone(tmp_path).spec.image_size == 16, "the grid of positions stays"


LARGE = "{begin: 0.5, global_size: 32, local_size: 16}"
BAD = [
    ("{begin: 0, global_size: 32, local_size: 16}", "between 0 and 1, got [0.0]"),
    ("{global_size: 32, local_size: 16}", "between 0 and 1, got [1.0]"),
    ("{begin: 0.8, global_size: 32, local_size: 16}, " + LARGE, "one after the other, between 0 and 1, got [0.8, 0.5]"),
    ("{begin: 0.5, global_size: 40, local_size: 16}", "train.phases[0].global_size=40 is not divisible by model."),
    (f"{LARGE}, {{begin: 0.6, global_size: 48, local_size: 24}}", "train.phases[1].local_size=24 is not divisible by"),
    ("{begin: 0.5, global_size: 32, local_size: 8}", "train.phases[0].local_size=8 is smaller than one patch"),
    ("{begin: 0.5, global_size: 32, local_size: 1}", "train.phases[0].local_size must be at least 2, got 1"),
    ("5", "train.phases must be a list of {begin, global_size, local_size}"),
    ("{begin: 0.5, size: 32}", "train.phases must be a list of {begin, global_size, local_size}"),
]


@pytest.mark.parametrize(("phases", "said"), BAD)
def test_phases_that_cannot_be_are_refused(phases, said):
    with pytest.raises(UserError) as error:
        load(None, [f"train.phases=[{phases}]"])
    assert said in str(error.value)


def test_local_sizes_of_phases_do_not_matter_without_local_crops():
    config = load(None, ["views.local_crops=0", "train.phases=[{begin: 0.5, global_size: 32, local_size: 1}]"])
    assert config.train.phases == [Phase(0.5, 32, 1)]


class TestAhead:
    """On a GPU views are made on a stream of their own; here by a stand-in for it that keeps a record."""

    def test_views_are_made_a_batch_before_they_are_taken_and_the_step_waits_for_them(self, monkeypatch):
        record, stream, step = [], Mock(name="stream"), Mock(name="step")
        stream.record_event.side_effect = lambda: record.append("ready") or f"event {record.count('ready') - 1}"
        step.wait_event.side_effect = lambda event: record.append(f"wait for {event}")
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda of: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: step)
        crops = [[Mock(name=f"crops {number}")] for number in range(3)]

        def views():
            for number, batch in enumerate(crops):
                record.append(f"made {number}")
                yield batch

        for number, batch in enumerate(ahead(views(), torch.device("cuda"))):
            record.append(f"taken {number}")
            assert batch is crops[number]
            batch[0].record_stream.assert_called_once_with(step)
        stream.wait_stream.assert_called_once_with(step)
        assert [entry for entry in record if entry != "ready"] == [
            *("made 0", "made 1", "wait for event 0", "taken 0"),
            *("made 2", "wait for event 1", "taken 1"),
            *("wait for event 2", "taken 2"),
        ]

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_views_are_closed_with_it(self, device, monkeypatch):
        for name in ("Stream", "stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, MagicMock())
        closed = []

        def views():
            try:
                while True:
                    yield [Mock()]
            finally:
                closed.append(True)

        batches = ahead(views(), torch.device(device))
        next(batches)
        batches.close()
        assert closed


@pytest.mark.slow
def test_workers_that_are_spawned_crop_as_those_that_are_forked(accelerator, tiny, folder):
    """As on macOS and Windows: what a worker needs is sent to it."""
    expected = batches(accelerator, tiny(CROPPED), folder, stop=1)
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        assert_equal(batches(accelerator, tiny(CROPPED | {"data.workers": 1}), folder, stop=1), expected)
    finally:
        multiprocessing.set_start_method(before, force=True)
