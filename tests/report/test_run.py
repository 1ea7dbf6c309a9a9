"""The report of a run that is alive: what it shows of any pool, what it leaves alone, and how often it is renewed."""

import copy
import errno
import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from dino.training.artifacts import write_backbone
from PIL import Image
from torch import Tensor

from dino.config.auto import PoolFacts, resolve
from dino.config.schema import Config
from dino.data import Pool, UnreadableImage, open_images
from dino.models import build_backbone
from dino.report import run as reporting
from dino.report.run import Reporter, write_report
from dino.run import RunDirectory
from dino.training.settings import load

TINY = (
    *("views.preset=line_art", "views.global_size=8", "views.local_size=4", "views.local_crops=2", "train.steps=10000"),
    *("model.arch=vit_tiny", "model.patch_size=4", "model.embed_dim=32", "model.depth=2", "model.num_heads=2"),
    *("objective.prototypes=64", "train.batch_size=1"),
)
RESNET = ("model.arch=resnet18", "views.global_size=32", "views.local_size=16")
LOOKS = {"crops", "attention", "pca", "neighbours"}


class Blocks:
    """A pool of noise; images at `broken` cannot be read."""

    kind, labels = "folder", None

    def __init__(self, count: int, channels: int = 1, broken: tuple[int, ...] = ()):
        self.names = [f"{index}.png" for index in range(count)]
        self.channels, self.broken, self.asked = channels, broken, set()
        generator = torch.Generator().manual_seed(0)
        sizes = [(8 + index % 5, 12 - index % 3) for index in range(count)]
        self.pixels = [
            torch.randint(0, 256, (channels, *size), dtype=torch.uint8, generator=generator) for size in sizes
        ]

    def read(self, index: int) -> Tensor:
        self.asked.add(index)
        if index in self.broken:
            raise UnreadableImage("broken")
        return self.pixels[index]


class Run:
    """A run of a tiny network that has been prepared: its directory, config, backbone and reporter."""

    def __init__(self, folder: Path, images: Pool, *settings: str, is_main_process: bool = True):
        config = load(None, [*TINY, *settings])
        self.config: Config = resolve(config, PoolFacts(len(images.names), images.channels, images.kind))[0]
        self.directory = RunDirectory(folder)
        self.directory.prepare(self.config, 0)
        torch.manual_seed(0)
        self.backbone = build_backbone(self.config)
        self.reporter = Reporter(self.directory, self.config, images, is_main_process)

    def write(self, state: str = "running", alive: bool = True) -> dict[str, bytes]:
        return self.reporter.write(self.backbone, state, alive)

    def log(self, *lines: dict) -> None:
        with self.directory.metrics.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    @property
    def page(self) -> str:
        return self.directory.report.read_text(encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    def build(images: Pool | None = None, *settings: str, **options: bool) -> Run:
        return Run(tmp_path / "run", images or Blocks(12), *settings, **options)

    return build


@pytest.fixture
def text_only(monkeypatch):
    """Pages without pictures, which take most of the time."""
    monkeypatch.setattr(reporting, "_looks", lambda *_: {})
    monkeypatch.setattr(reporting.pictures, "curves", lambda *_: b"")


def line(step: int, **changes: object) -> dict:
    """A line of metrics.jsonl of a healthy run."""
    values = {
        "loss/dino": 3.1,
        "health/entropy_ratio": 0.7,
        "health/kl_to_center": 1.0,
        "health/prototypes_in_use": 0.6,
    }
    values |= {"health/rank_me": 20.0, "health/feature_std": 0.8, "optim/lr": 0.001, "health/verdict": "healthy"}
    return {"step": step, "epoch": step / 12, **values, "time/images_per_second": 2.0, "time/data_wait": 0.1, **changes}


def opened(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content)) as picture:
        return picture.convert("RGB")


class TestPage:
    def test_before_the_first_log_point_it_shows_what_the_network_sees(self, run):
        made = run()
        assert made.write().keys() == LOOKS
        assert "none logged yet" in made.page
        assert made.page.count("data:image/png;base64,") == len(LOOKS)

    def test_a_live_page_renews_itself_and_one_of_a_run_that_has_ended_does_not(self, run, text_only):
        made = run()
        made.write("running", alive=True)
        assert 'http-equiv="refresh"' in made.page
        assert ">running<" in made.page
        made.write("stopped: time limit", alive=False)
        assert 'http-equiv="refresh"' not in made.page
        assert "<script" not in made.page
        assert ">stopped: time limit<" in made.page

    def test_what_is_healthy_is_said_in_a_word(self, run, text_only):
        made = run()
        made.log(*(line(step) for step in (2000, 3000, 4000)))
        made.write()
        assert ">healthy<" in made.page
        assert 'class="advice"' not in made.page

    def test_a_collapse_is_explained_with_the_way_out(self, run, text_only):
        made = run()
        ill = {"health/entropy_ratio": 1.0, "health/kl_to_center": 0.0}
        made.log(line(2000), line(3000, **ill), line(4000, **ill))
        made.write()
        assert ">collapsed: uniform<" in made.page
        assert "objective.teacher_temperature" in made.page.split('class="advice"')[1].split("</p>")[0]

    def test_figures_of_the_run(self, run, text_only):
        """1 image a step and 2 images a second: 6,000 steps are left, 50 minutes."""
        made = run()
        made.log(line(1000, **{"time/images_per_second": 0.5}), line(3000), line(4000))
        made.write()
        for said in (
            "12 from folder",
            "4,000 of 10,000 at batch 1",
            "about 50 min left",
            "2 images/s (median)",
            "3.1000",
        ):
            assert said in made.page, said
        assert "ln K = 4.16" in made.page

    def test_indicators_stand_beside_their_ranges(self, run, text_only):
        made = run()
        made.log(line(4000, **{"health/rank_me": 17.0}))
        made.write()
        row = made.page.split("RankMe of class tokens</td>")[1].split("</tr>")[0]
        assert ">17<" in row
        assert ">4 – 32<" in row

    def test_a_run_with_health_shows_its_curves_and_one_without_has_no_such_section(self, run, monkeypatch):
        monkeypatch.setattr(reporting, "_looks", lambda *_: {})
        made = run(None, "monitor.health_every=0")
        health = {name for name in line(0) if name.startswith("health/")}
        made.log(*({k: v for k, v in line(step).items() if k not in health} for step in (2000, 3000)))
        made.write()
        assert "<h2>Progress</h2>" in made.page
        assert "<h2>Health</h2>" not in made.page
        assert made.page.count("data:image/png;base64,") == 2  # progress, schedules
        made.log(line(4000))
        made.write()
        assert "<h2>Health</h2>" in made.page
        assert made.page.count("data:image/png;base64,") == 3

    def test_settings_and_readouts_are_shown_as_text(self, run, text_only):
        made = run(None, "run.dir=<b>bold</b>")
        rows = {"caption": "seen <once>", "columns": ["features"], "rows": [["<script>alert(1)</script>"]]}
        made.directory.results.write_text(json.dumps(rows))
        made.write("ended", alive=False)
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in made.page
        assert "&lt;b&gt;bold" in made.page
        assert "<b>" not in made.page
        assert "<script" not in made.page

    def test_of_a_run_that_has_ended_from_its_directory_alone(self, run, tmp_path):
        for index in range(3):
            (tmp_path / "images").mkdir(exist_ok=True)
            Image.new("L", (9, 9), 80 * index).save(tmp_path / "images" / f"{index}.png")
        images = open_images(str(tmp_path / "images"), "folder", 1)
        made = run(images, f"data.root={tmp_path / 'images'}", "data.kind=folder", "data.channels=1")
        made.log(line(10000))
        write_backbone(made.directory, made.config, made.backbone, 10000, "abc")
        write_report(made.directory)
        assert ">ended<" in made.page
        assert 'http-equiv="refresh"' not in made.page
        assert "Nearest neighbours" in made.page


class TestPools:
    @pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
    def test_of_a_few_images(self, run, count):
        looks = run(Blocks(count)).write()
        assert looks.keys() == LOOKS
        width, height = opened(looks["neighbours"]).size
        columns, rows = 2 + min(8, count - 1), count if count < 7 else 6
        assert width / height == pytest.approx(columns / rows, rel=0.03)

    def test_images_shown_are_spread_over_a_large_pool(self, run):
        images = Blocks(5000)
        run(images).write()
        assert len(images.asked) < 450, "the whole pool was read"
        assert np.histogram(sorted(images.asked), bins=10, range=(0, 5000))[0].min() > 20

    def test_unreadable_images_are_passed_over(self, run):
        """Every other image of the pool, among them the first and the last."""
        images = Blocks(41, broken=tuple(range(0, 41, 2)))
        looks = run(images).write()
        assert looks.keys() == LOOKS
        assert opened(looks["crops"]).size[1] > 5 * 80  # there are still six rows

    def test_a_pool_of_which_nothing_can_be_read(self, run):
        made = run(Blocks(8, broken=tuple(range(8))))
        assert made.write() == {}
        assert "What ran" in made.page

    def test_five_channels_from_arrays(self, run, tmp_path):
        (tmp_path / "bands").mkdir()
        generator = np.random.default_rng(0)
        for index in range(4):
            np.save(tmp_path / "bands" / f"{index}.npy", generator.integers(0, 256, (9, 11, 5)).astype(np.uint8))
        images = open_images(str(tmp_path / "bands"), "folder", 5)
        assert run(images, "data.channels=5", "views.preset=dino").write().keys() == LOOKS

    def test_a_resnet_has_no_attention_and_no_patches_of_its_own(self, run):
        made = run(Blocks(4), *RESNET)
        assert made.write().keys() == {"crops", "neighbours"}
        assert "class token looks" not in made.page
        assert "patches have in common" not in made.page

    def test_neighbours_are_the_nearest_by_cosine(self, run, monkeypatch):
        """Images of five shades; the network gives directions that turn with the shade: the next shade is nearest."""
        images = Blocks(5)
        images.pixels = [torch.full((1, 10, 10), shade, dtype=torch.uint8) for shade in (100, 20, 180, 60, 140)]
        made = run(images)

        def turned(inputs: Tensor) -> Tensor:
            angle = (inputs.mean(dim=(1, 2, 3)) + 1) * 60 * torch.pi / 180  # grows with the shade
            return torch.stack([angle.cos(), angle.sin()], dim=1) * torch.linspace(1, 9, len(inputs))[:, None]

        monkeypatch.setattr(made.backbone, "forward", turned)
        sheet = np.asarray(opened(made.write()["neighbours"]))
        middles = (np.arange(5) + 0.5) / 5 * sheet.shape[0], (np.arange(6) + 0.5) / 6 * sheet.shape[1]
        shades = [[int(sheet[int(y), int(x), 0]) for x in middles[1]] for y in middles[0]]
        for query, _, *found in shades:
            others = [shade for shade in (100, 20, 180, 60, 140) if shade != query]
            distances = [abs(shade - query) for shade in found]
            assert sorted(found) == sorted(others)
            assert distances == sorted(distances)


class TestLeftAlone:
    @pytest.mark.parametrize("settings", [(), RESNET], ids=["vit", "resnet"])
    @pytest.mark.parametrize("training", [True, False])
    def test_the_network_and_the_random_states_are_as_before(self, run, settings, training):
        """A teacher with BatchNorm takes statistics of every batch that it sees while it trains."""
        made = run(Blocks(12), *settings)
        made.backbone.train(training)
        weights = copy.deepcopy(made.backbone.state_dict())
        modes = {name: module.training for name, module in made.backbone.named_modules()}
        states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        made.write()
        assert [
            name for name, value in made.backbone.state_dict().items() if not torch.equal(value, weights[name])
        ] == []
        assert {name: module.training for name, module in made.backbone.named_modules()} == modes
        assert all(parameter.grad is None for parameter in made.backbone.parameters())
        assert torch.equal(torch.get_rng_state(), states[0])
        assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
        assert torch.is_grad_enabled()

    def test_also_where_it_fails(self, run, monkeypatch):
        made = run()
        made.backbone.train()
        monkeypatch.setattr(reporting, "_neighbours", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            made.write()
        assert made.backbone.training
        assert torch.is_grad_enabled()

    def test_other_processes_write_nothing(self, run):
        images = Blocks(12)
        made = run(images, is_main_process=False)
        assert not made.reporter.is_due()
        assert made.write("finished", alive=False) == {}
        assert not made.directory.report.exists()
        assert images.asked == set()

    def test_a_full_disk_costs_the_page_only(self, run, monkeypatch, caplog):
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        made = run()
        monkeypatch.setattr(reporting.report, "write", full)
        with caplog.at_level(logging.WARNING):
            assert made.write().keys() == LOOKS
        assert "report.html could not be written: No space left" in caplog.text


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1_700_000_000 + self.now


class TestHowOften:
    @pytest.mark.parametrize("takes", [0.01, 0.3, 1.0, 5.0, 60.0])
    def test_at_most_a_fiftieth_of_the_time_and_not_within_twenty_seconds(self, run, monkeypatch, takes):
        clock, made, written = Clock(), run(), []
        monkeypatch.setattr(reporting, "time", clock)

        def slow(*_: object) -> dict:
            clock.now += takes
            return {}

        monkeypatch.setattr(reporting, "_looks", slow)
        assert made.reporter.is_due(), "the first page comes at once"
        began = clock.now
        while len(written) < 6:
            clock.now += 0.5  # a step
            if made.reporter.is_due():
                written.append(clock.now)
                made.write()
                assert not made.reporter.is_due()
        gaps = np.diff(written)
        assert gaps.min() >= 20
        assert 5 * takes / (clock.now - takes - began) <= 0.021
        assert gaps.max() <= max(20, 51 * takes) + 1, "renewed later than need be"
        refresh = int(made.page.split('http-equiv="refresh" content="')[1].split('"')[0])
        assert gaps.max() - takes - 1 <= refresh <= gaps.max() + 1
