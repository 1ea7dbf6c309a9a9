"""report.html opens offline, shows what it was given, and runs nothing that a name might smuggle in."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino.models import VisionTransformer, ViTSpec
from dino.report import charts, pictures
from dino.report import page as report
from dino.report.page import Picture, Status, Table

EVIL = "<script>alert('x')</script> & \"quotes\" <img src=x onerror=alert(1)>"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text, self.open = "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def written(tmp_path) -> str:
    """A page with something hostile in every place that takes text."""
    sections = [
        Picture(EVIL + " picture", EVIL, png("red")),
        Table(EVIL + " table", EVIL, [EVIL + " column", "1-NN"], [[EVIL + " row", "83.1 ± 1.3 %"]]),
        Picture("Attention", "…", png("blue")),
    ]
    facts = {EVIL + " fact": EVIL + " value", "images": "1,797"}
    report.write(tmp_path / "report.html", EVIL + " title", facts, sections, "run: {name: " + EVIL + "}")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_every_text_is_shown_and_none_is_markup(written):
    page = Page(written)
    assert not {"script", "iframe", "object", "embed", "link", "form"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    for place in ("picture", "table", "column", "row", "fact", "value", "title"):
        assert f"{EVIL} {place}" in page.text
    assert "run: {name: " + EVIL in page.text


def test_nothing_is_loaded_from_anywhere(written):
    page = Page(written)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "srcset", "data", "poster", "action"):
            assert value.startswith("data:"), (tag, name, value)
    lowered = written.lower()
    for trace in ("http:", "https:", "url(", "@import", "src='", 'src="/', "file:"):
        assert trace not in lowered, trace


def test_pictures_are_embedded_as_given_in_order(written):
    sources = [value for tag, name, value in Page(written).attributes if (tag, name) == ("img", "src")]
    assert [base64.b64decode(source.split("base64,")[1]) for source in sources] == [png("red"), png("blue")]
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_page_is_well_formed_and_says_its_encoding(written):
    page = Page(written)
    assert written.startswith("<!doctype html>")
    assert ("meta", "charset", "utf-8") in page.attributes
    assert page.tags.count("h1") == 1
    assert "83.1 ± 1.3 %" in page.text


def test_a_page_without_sections_or_settings(tmp_path):
    report.write(tmp_path / "report.html", "run", {}, [])
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.text.startswith("run")
    assert "details" not in page.tags


def test_an_earlier_page_is_replaced_only_by_a_whole_one(tmp_path):
    path = tmp_path / "report.html"
    report.write(path, "first", {}, [], "")
    with pytest.raises(TypeError):
        report.write(path, "second", {}, [Picture("broken", "no bytes", None)], "")
    assert "first" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]


class TestStatus:
    def page(self, folder: Path, status: Status | None) -> str:
        report.write(folder / "report.html", "run", {}, [], "", status)
        return (folder / "report.html").read_text(encoding="utf-8")

    @pytest.mark.parametrize("refresh", [0, 20])
    def test_state_verdict_and_advice_are_text(self, tmp_path, refresh):
        status = Status(EVIL + " state", EVIL + " verdict", EVIL + " advice", False, refresh, 1_700_000_000)
        page = Page(self.page(tmp_path, status))
        for place in ("state", "verdict", "advice"):
            assert f"{EVIL} {place}" in page.text
        assert "img" not in page.tags
        assert not [name for _, name, _ in page.attributes if name.startswith("on")]
        assert page.tags.count("script") == (1 if refresh else 0)  # the page's own, that tells its age

    def test_only_a_live_page_is_opened_again(self, tmp_path):
        """By the browser, after as many seconds as it says."""
        live = Page(self.page(tmp_path, Status("running", refresh=35, written=1_700_000_000)))
        assert ("meta", "http-equiv", "refresh") in live.attributes
        assert ("meta", "content", "35") in live.attributes
        for status in (None, Status("finished")):
            ended = self.page(tmp_path, status)
            assert not [value for tag, name, value in Page(ended).attributes if (tag, name) == ("meta", "http-equiv")]
            assert "<script" not in ended

    @pytest.mark.parametrize(("is_good", "kind"), [(True, "badge good"), (False, "badge bad")])
    def test_a_verdict_shows_by_its_colour_whether_it_is_good(self, tmp_path, is_good, kind):
        page = Page(self.page(tmp_path, Status("running", "a verdict", is_good=is_good)))
        assert ("span", "class", kind) in page.attributes

    def test_without_a_verdict_there_is_one_badge_and_no_advice(self, tmp_path):
        page = Page(self.page(tmp_path, Status("running")))
        assert [value for tag, name, value in page.attributes if (tag, name) == ("span", "class")] == ["badge"]
        assert "advice" not in [value for _, name, value in page.attributes if name == "class"]


class Fabricated:
    """Stands for a network: patch features that the test has made."""

    patch_size = 4

    def __init__(self, features: torch.Tensor):
        self.features = features

    def forward_features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"x_norm_patchtokens": self.features}


def opened(content: bytes) -> np.ndarray:
    """(H, W, 3) of a PNG."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


class TestPictures:
    def test_crops_are_shown_as_they_are(self):
        """Two images of three views: each tile holds the pixels of its view, in reading order."""
        views = [
            [torch.full((3, 8, 8), 40 * row + 10 * column, dtype=torch.uint8) for column in range(3)] for row in (1, 2)
        ]
        sheet = opened(pictures.crop_sheet(views))
        assert sheet.shape[1] > 1.3 * sheet.shape[0]
        step_y, step_x = sheet.shape[0] / 2, sheet.shape[1] / 3
        for row in (1, 2):
            for column in range(3):
                found = sheet[int((row - 0.5) * step_y), int((column + 0.5) * step_x)]
                assert found.tolist() == [40 * row + 10 * column] * 3

    @pytest.mark.parametrize("channels", [1, 2, 3, 5])
    def test_crops_of_any_channels_and_sizes(self, channels):
        views = [[torch.zeros(channels, size, size, dtype=torch.uint8) for size in (16, 16, 8)]]
        assert opened(pictures.crop_sheet(views)).shape[2] == 3

    def test_attention_has_a_column_for_the_image_the_mean_and_each_head(self):
        torch.manual_seed(0)
        backbone = VisionTransformer(ViTSpec(16, 2, 2, 4, 16)).eval()
        shown = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
        sheet = opened(pictures.attention_sheet(backbone, shown / 255, shown))
        assert sheet.shape[1] / sheet.shape[0] == pytest.approx(4 / 3, abs=0.02)  # 1 + 1 + 2 columns, 3 rows

    def colours(self, features: torch.Tensor, grid: int, **options: bool) -> list[list[list[int]]]:
        """For each image the colour that each of its patches got, in reading order."""
        images = torch.zeros(len(features), 3, grid * 4, grid * 4)
        sheet = opened(pictures.pca_sheet(Fabricated(features), images, images.to(torch.uint8), **options))
        pairs = min(3, len(features))
        height, width = sheet.shape[0] / -(-len(features) // pairs), sheet.shape[1] / (2 * pairs)
        found = []
        for image in range(len(features)):
            top, left = image // pairs * height, (2 * (image % pairs) + 1) * width
            rows = [int(top + (y + 0.5) / grid * height) for y in range(grid)]
            columns = [int(left + (x + 0.5) / grid * width) for x in range(grid)]
            found.append([sheet[row, column].tolist() for row in rows for column in columns])
        return found

    @pytest.mark.parametrize("images", [1, 2, 3, 5])
    def test_two_kinds_of_patches_get_two_colours_the_same_in_every_image(self, images):
        generator = torch.Generator().manual_seed(0)
        kinds = torch.randint(0, 2, (images, 16), generator=generator)
        centres = 5 * torch.randn(2, 24, generator=generator)
        features = centres[kinds] + 0.001 * torch.randn(images, 16, 24, generator=generator)
        first = {0: [], 1: []}
        for colours, of in zip(self.colours(features, grid=4), kinds.tolist(), strict=True):
            for colour, kind in zip(colours, of, strict=True):
                first[kind].append(colour[0])  # red: the strongest component, which alone tells them apart
        assert max(first[0]) - min(first[0]) < 30
        assert max(first[1]) - min(first[1]) < 30
        assert abs(np.mean(first[0]) - np.mean(first[1])) > 200

    def test_three_components_are_three_colours(self):
        """Patches that differ along three axes, the first most: red, green and blue follow one axis each."""
        generator = torch.Generator().manual_seed(0)
        axes = torch.linalg.qr(torch.randn(20, 20, generator=generator)).Q[:3]
        places = torch.rand(2, 64, 3, generator=generator)
        features = (places * torch.tensor([30.0, 10.0, 3.0])) @ axes + 7
        colours = torch.tensor(self.colours(features, grid=8)).flatten(0, 1).double()
        correlation = np.corrcoef(torch.cat([places.flatten(0, 1), colours], dim=1).numpy().T)[:3, 3:]
        assert np.abs(np.diag(correlation)).min() > 0.95
        assert np.abs(correlation - np.diag(np.diag(correlation))).max() < 0.4

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_background_that_is_left_out_is_black_and_the_object_is_not(self, sign):
        """An object in the middle of each image; which way its features point is a matter of chance."""
        generator = torch.Generator().manual_seed(0)
        inside = torch.zeros(3, 8, 8, dtype=torch.bool)
        inside[:, 2:6, 1:7] = True
        inside[1, 4:, 2:5] = True  # one reaches the lower border
        features = 0.5 * torch.randn(3, 64, 16, generator=generator)
        features[inside.flatten(1)] += sign * 10
        for colours, of in zip(self.colours(features, 8, separate=True), inside.flatten(1).tolist(), strict=True):
            assert [colour == [0, 0, 0] for colour in colours] == [not of_object for of_object in of]

    @pytest.mark.parametrize("separate", [False, True])
    def test_patches_that_are_all_alike_are_no_error(self, separate):
        assert np.ptp(self.colours(torch.ones(2, 4, 8), grid=2, separate=separate)) == 0

    def test_neighbours_are_shown_in_the_order_given(self):
        """Beside images of other shapes; each row: image, gap, neighbours from left to right."""
        shapes = [(8, 8), (20, 8), (8, 30), (200, 200), (1, 1)]
        shades = [[10, 60, 110], [30, 80, 130]]
        made = []
        for row, values in enumerate(shades):
            of_row = enumerate(values, row)
            made.append([torch.full((1, *shapes[index % 5]), shade, dtype=torch.uint8) for index, shade in of_row])
        sheet = opened(pictures.neighbours_sheet([row[0] for row in made], [row[1:] for row in made]))
        height, width = sheet.shape[0] / 2, sheet.shape[1] / 4
        gap = []
        for row, values in enumerate(shades):
            found = [sheet[int((row + 0.5) * height), int((column + 0.5) * width)].tolist() for column in range(4)]
            gap.append(found.pop(1))
            assert found == [[shade] * 3 for shade in values]
        assert gap[0] == gap[1]

    def test_whole_images_are_shown_in_their_own_shape(self):
        """A wide image with a dark left and a bright right end: both are seen, above and below it is the background."""
        wide = torch.cat([torch.full((3, 10, 20), 0), torch.full((3, 10, 20), 255)], dim=2).to(torch.uint8)
        sheet = opened(pictures.neighbours_sheet([wide], [[wide]]))
        height, width = sheet.shape[0], sheet.shape[1] / 3
        left, right = sheet[height // 2, int(0.1 * width)], sheet[height // 2, int(0.9 * width)]
        assert (left.tolist(), right.tolist()) == ([0] * 3, [255] * 3)
        assert 180 < sheet[int(0.1 * height), int(0.5 * width)][0] < 240


class TestCharts:
    @pytest.mark.parametrize("levels", [{"chance": 10.0}, {}])
    def test_bars(self, levels):
        rows = [("raw pixels", 52.5, 1.2), ("pre-trained", 84.0, 0.0)]
        assert opened(charts.bars({"one": rows, "other": rows}, "accuracy", levels)).std() > 0
