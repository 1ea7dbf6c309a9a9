"""The report of a run that is alive: what it shows of any pool, what it leaves alone, and how often it is renewed."""

import copy
import errno
import io
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from dino.config.auto import PoolFacts, resolve
from dino.data import Pool, UnreadableImage, open_images
from dino.models.registry import build_backbone
from dino.report import looks
from dino.report import run as reporting
from dino.report.run import Reporter, write_report
from dino.run import RunDirectory
from dino.training.backbone_file import write_backbone
from dino.training.resume import prepare
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
        sizes = [(channels, 8 + index % 5, 12 - index % 3) for index in range(count)]
        self.pixels = [torch.randint(0, 256, size, dtype=torch.uint8, generator=generator) for size in sizes]

    def read(self, index: int, enough: float | None = None) -> Tensor:
        self.asked.add(index)
        if index in self.broken:
            raise UnreadableImage("broken")
        return self.pixels[index]


class Made:
    """A run of a tiny network that has been prepared: its directory, config, backbone and reporter."""

    def __init__(self, folder: Path, images: Pool | Blocks, *settings: str, is_main_process: bool = True):
        config = load(None, [*TINY, *settings])
        self.config, _ = resolve(config, PoolFacts(len(images.names), images.channels, images.kind))
        self.directory = RunDirectory(folder)
        prepare(self.directory, self.config, 0)
        torch.manual_seed(0)
        self.backbone = build_backbone(self.config)
        self.reporter = Reporter(self.directory, self.config, images, is_main_process)

    def write(self, state: str = "running", alive: bool = True) -> dict[str, bytes]:
        return self.reporter.write(self.backbone, state, alive)

    def page_after(self, *lines: dict, state: str = "running", alive: bool = True) -> str:
        """The page as it is once these lines are logged."""
        with self.directory.metrics.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        self.write(state, alive)
        return self.page

    @property
    def page(self) -> str:
        return self.directory.report.read_text(encoding="utf-8")


@pytest.fixture
def make(tmp_path):
    def build(images: Pool | Blocks | None = None, *settings: str, **options: bool) -> Made:
        return Made(tmp_path / "run", images or Blocks(12), *settings, **options)

    return build


@pytest.fixture
def text_only(monkeypatch):
    """Pages without pictures, which take most of the time."""
    monkeypatch.setattr(reporting.Looks, "sections", lambda *_: {})


def line(step: int, **changes: object) -> dict:
    """A line of metrics.jsonl of a healthy run."""
    health = {"entropy_ratio": 0.7, "kl_to_center": 1.0, "prototypes_in_use": 0.6, "rank_me": 20.0, "feature_std": 0.8}
    values = {f"health/{name}": value for name, value in health.items()} | {"health/verdict": "healthy"}
    values |= {"loss/dino": 3.1, "optim/lr": 0.001, "time/images_per_second": 2.0, "time/data_wait": 0.1}
    return {"step": step, "epoch": step / 12, **values, **changes}


def opened(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content)) as picture:
        return picture.convert("RGB")


class TestPage:
    def test_before_the_first_log_point_it_shows_what_the_network_sees(self, make):
        made = make()
        assert made.write().keys() == LOOKS
        assert "none logged yet" in made.page
        assert made.page.count("data:image/png;base64,") == len(LOOKS)

    def test_a_live_page_renews_itself_and_one_of_a_run_that_has_ended_does_not(self, make, text_only):
        live = make().page_after()
        ended = make().page_after(state="stopped: time limit", alive=False)
        assert 'http-equiv="refresh"' in live
        assert ">running<" in live
        assert 'http-equiv="refresh"' not in ended
        assert ">stopped: time limit<" in ended

    def test_what_is_healthy_is_said_in_a_word_and_a_collapse_is_explained_with_the_way_out(self, make, text_only):
        healthy = make().page_after(line(2000), line(3000), line(4000))
        assert ">healthy<" in healthy
        assert 'class="advice"' not in healthy
        ill = {"health/entropy_ratio": 1.0, "health/kl_to_center": 0.0}
        collapsed = make().page_after(line(5000, **ill), line(6000, **ill))
        assert ">collapsed: uniform<" in collapsed
        assert "objective.teacher_temperature" in collapsed.split('class="advice"')[1].split("</p>")[0]

    def test_figures_of_the_run_and_indicators_beside_their_ranges(self, make, text_only):
        """1 image a step and 2 images a second: 6,000 steps are left, 50 minutes."""
        lines = (line(1000, **{"time/images_per_second": 0.5}), line(3000), line(4000, **{"health/rank_me": 17.0}))
        page = make().page_after(*lines)
        figures = ("12 from folder", "4,000 of 10,000 at batch 1", "about 50.0 minutes left", "2 images/s (median)")
        figures += ("3.1000", "4.16 where nothing is predicted")  # ln 64
        assert [figure for figure in figures if figure not in page] == []
        row = page.split("effective rank (RankMe)</td>")[1].split("</tr>")[0]
        assert ">17<" in row
        assert ">2 – 32<" in row

    def test_a_run_with_health_shows_its_curves_and_one_without_has_no_such_section(self, make, monkeypatch):
        monkeypatch.setattr(reporting.Looks, "sections", lambda *_: {})
        made = make(None, "monitor.health_every=0")
        plain = [{name: line(step)[name] for name in line(0) if "health/" not in name} for step in (2000, 3000)]
        page = made.page_after(*plain)
        assert "<h2>Progress</h2>" in page
        assert "<h2>Health</h2>" not in page
        plain = page.count("<svg")
        page = made.page_after(line(4000))
        assert "<h2>Health</h2>" in page
        assert page.count("<svg") == plain + 5  # the indicators of a line

    def test_how_often_neighbours_name_the_class_stands_beside_chance_and_an_untrained_network(self, make):
        """Dark and bright images, twice as many dark ones: even random weights tell them apart."""
        images = Blocks(12)
        images.pixels = [pixels // 4 + 190 * (index >= 8) for index, pixels in enumerate(images.pixels)]
        images.labels = SimpleNamespace(codes=np.array([0] * 8 + [1] * 4), classes=["dark", "bright"])
        made = make(images)
        assert made.write().keys() == LOOKS  # a table is no picture
        table = made.page.split("Do neighbours name the class?")[1].split("</table>")[0]
        assert [word in table for word in ("this backbone", "random weights", "66.7%")] == [True] * 3

    def test_the_page_says_how_the_backbone_is_loaded_once_there_is_one(self, make, text_only):
        made = make()
        made.write()
        assert "Use it" not in made.page
        write_backbone(made.directory.path, made.config, made.backbone, 10, "abc")
        made.write()
        assert f"dino.load_backbone(&#x27;{made.directory.path}&#x27;)" in made.page

    def test_settings_and_readouts_are_shown_as_text(self, make, text_only):
        made = make(None, "run.dir=<b>bold</b>")
        rows = {"caption": "seen <once>", "columns": ["features"], "rows": [["<script>alert(1)</script>"]]}
        made.directory.results.write_text(json.dumps(rows))
        page = made.page_after(state="ended", alive=False)
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
        assert "&lt;b&gt;bold" in page
        assert "<b>" not in page
        assert "<script" not in page

    def test_of_a_run_that_has_ended_from_its_directory_alone(self, make, tmp_path):
        (tmp_path / "images").mkdir()
        for index in range(3):
            Image.new("L", (9, 9), 80 * index).save(tmp_path / "images" / f"{index}.png")
        images = open_images(str(tmp_path / "images"), "folder", 1)
        made = make(images, f"data.root={tmp_path / 'images'}", "data.kind=folder", "data.channels=1")
        write_backbone(made.directory.path, made.config, made.backbone, 10000, "abc")
        write_report(made.directory)
        assert ">ended<" in made.page
        assert 'http-equiv="refresh"' not in made.page
        assert "Nearest neighbours" in made.page


class TestPools:
    @pytest.mark.parametrize("count", [1, 2, 3, 7])
    def test_of_a_few_images(self, make, count):
        looks = make(Blocks(count)).write()
        assert looks.keys() == LOOKS
        width, height = opened(looks["neighbours"]).size
        columns, rows = 2 + min(8, count - 1), min(count, 6)
        assert width / height == pytest.approx(columns / rows, rel=0.03)

    def test_images_shown_are_spread_over_a_large_pool(self, make):
        images = Blocks(5000)
        make(images).write()
        assert len(images.asked) < 450, "the whole pool was read"
        assert np.histogram(sorted(images.asked), bins=10, range=(0, 5000))[0].min() > 20

    def test_unreadable_images_are_passed_over(self, make):
        """Every other image of the pool, among them the first and the last; then all of them."""
        looks = make(Blocks(41, broken=tuple(range(0, 41, 2)))).write()
        assert looks.keys() == LOOKS
        assert opened(looks["crops"]).size[1] > 5 * 80  # there are still six rows
        made = make(Blocks(8, broken=tuple(range(8))))
        assert made.write() == {}
        assert "What ran" in made.page

    def test_five_channels_from_arrays(self, make, tmp_path):
        (tmp_path / "bands").mkdir()
        for index in range(4):
            bands = np.random.default_rng(index).integers(0, 256, (9, 11, 5))
            np.save(tmp_path / "bands" / f"{index}.npy", bands.astype(np.uint8))
        images = open_images(str(tmp_path / "bands"), "folder", 5)
        assert make(images, "data.channels=5", "views.preset=dino").write().keys() == LOOKS

    def test_a_resnet_has_no_attention_and_no_patches_of_its_own(self, make):
        made = make(Blocks(4), *RESNET)
        assert made.write().keys() == {"crops", "neighbours"}
        assert "class token looks" not in made.page
        assert "patches have in common" not in made.page

    def test_neighbours_are_the_nearest_by_cosine(self, make, monkeypatch):
        """Images of five shades; the network gives directions that turn with the shade: the next shade is nearest."""
        images, shades = Blocks(5), (100, 20, 180, 60, 140)
        images.pixels = [torch.full((1, 10, 10), shade, dtype=torch.uint8) for shade in shades]
        made = make(images, *RESNET)

        def turned(inputs: Tensor) -> dict[str, Tensor]:
            angle = (inputs.mean(dim=(1, 2, 3)) + 1) * 60 * torch.pi / 180  # grows with the shade
            directions = torch.zeros(len(inputs), made.backbone.embed_dim)
            directions[:, 0], directions[:, 1] = angle.cos(), angle.sin()
            directions *= torch.linspace(1, 9, len(inputs))[:, None]
            return {"x_norm_clstoken": directions, "x_norm_patchtokens": directions[:, None]}

        monkeypatch.setattr(made.backbone, "forward_features", turned)
        sheet = np.asarray(opened(made.write()["neighbours"]))
        rows, columns = ((np.arange(count) + 0.5) / count * sheet.shape[axis] for axis, count in enumerate((5, 6)))
        for query, _, *neighbours in sheet[rows.astype(int)[:, None], columns.astype(int), 0].tolist():
            assert sorted([query, *neighbours]) == sorted(shades)
            distances = [abs(shade - query) for shade in neighbours]
            assert distances == sorted(distances)


class TestLeftAlone:
    @pytest.mark.parametrize("settings", [(), RESNET], ids=["vit", "resnet"])
    @pytest.mark.parametrize("training", [True, False])
    def test_the_network_and_the_random_states_are_as_before(self, make, settings, training):
        """A teacher with BatchNorm takes statistics of every batch that it sees while it trains."""
        made = make(Blocks(12), *settings)
        made.backbone.train(training)
        weights = copy.deepcopy(made.backbone.state_dict())
        states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        made.write()
        after = made.backbone.state_dict()
        assert [name for name, value in after.items() if not torch.equal(value, weights[name])] == []
        assert all(module.training == training for module in made.backbone.modules())
        assert all(parameter.grad is None for parameter in made.backbone.parameters())
        assert torch.equal(torch.get_rng_state(), states[0])
        assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
        assert torch.is_grad_enabled()

    def test_also_where_it_fails(self, make, monkeypatch):
        made = make()
        made.backbone.train()
        monkeypatch.setattr(looks, "_neighbours_sheet", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            made.write()
        assert made.backbone.training
        assert torch.is_grad_enabled()

    def test_other_processes_write_nothing(self, make):
        images = Blocks(12)
        made = make(images, is_main_process=False)
        assert not made.reporter.is_due()
        assert made.write("finished", alive=False) == {}
        assert not made.directory.report.exists()
        assert images.asked == set()

    def test_a_full_disk_costs_the_page_and_not_the_run(self, make, monkeypatch, caplog):
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(reporting.page, "write", full)
        with caplog.at_level(logging.WARNING):
            assert make().write() == {}
        assert "report.html cannot be written (No space left on device)" in caplog.text


class Clock:
    """Time that passes only where a test says so."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic


@pytest.mark.parametrize("takes", [0.01, 1.0, 60.0])
def test_it_takes_at_most_a_fiftieth_of_the_time_and_comes_not_within_twenty_seconds(make, monkeypatch, takes):
    clock, made, written = Clock(), make(), []

    def slow(*_: object) -> dict:
        clock.now += takes
        return {}

    monkeypatch.setattr(reporting, "time", clock)
    monkeypatch.setattr(reporting.Looks, "sections", slow)
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


def test_neighbours_vote_as_a_classifier_of_scikit_learn_does():
    """Of overlapping clusters, each left out in turn; weights e^(cosine / 0.07)."""
    generator = np.random.default_rng(0)
    codes = np.arange(60) % 3
    tokens = generator.normal(size=(3, 5))[codes] + generator.normal(size=(60, 5))
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    right = 0
    for index in range(60):
        others = np.arange(60) != index
        model = KNeighborsClassifier(20, weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.07))
        right += model.fit(unit[others], codes[others]).predict(unit[[index]])[0] == codes[index]
    assert 0.4 < right / 60 < 0.95
    assert looks.name_the_class(tokens, codes) == pytest.approx(right / 60)


@pytest.mark.parametrize(
    ("image_size", "patch_size", "shown"), [(16, 4, 56), (224, 16, 224), (224, 14, 224), (96, 16, 224), (518, 14, 518)]
)
def test_patches_are_shown_at_a_size_that_has_at_least_fourteen_a_side(image_size, patch_size, shown):
    assert looks.size_to_look_at(image_size, patch_size) == shown
