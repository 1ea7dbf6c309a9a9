"""report.html opens offline, shows what it was given, and runs nothing that a name might smuggle in."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from dino.evaluation import pictures, report
from dino.evaluation.report import Picture, Table
from dino.models import VisionTransformer, ViTSpec

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


def test_a_page_without_sections(tmp_path):
    report.write(tmp_path / "report.html", "run", {}, [], "")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    Page(text)
    assert "<h1>run</h1>" in text


def test_an_earlier_page_is_replaced_only_by_a_whole_one(tmp_path):
    path = tmp_path / "report.html"
    report.write(path, "first", {}, [], "")
    with pytest.raises(TypeError):
        report.write(path, "second", {}, [Picture("broken", "no bytes", None)], "")
    assert "first" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]


class TestPictures:
    def opened(self, content: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))

    def test_crops_are_shown_as_they_are(self):
        """Two images of three views: each tile holds the pixels of its view, in reading order."""
        views = [
            [torch.full((3, 8, 8), 40 * row + 10 * column, dtype=torch.uint8) for column in range(3)] for row in (1, 2)
        ]
        sheet = self.opened(pictures.crop_sheet(views))
        assert sheet.shape[1] > 1.3 * sheet.shape[0]
        step_y, step_x = sheet.shape[0] / 2, sheet.shape[1] / 3
        for row in (1, 2):
            for column in range(3):
                found = sheet[int((row - 0.5) * step_y), int((column + 0.5) * step_x)]
                assert found.tolist() == [40 * row + 10 * column] * 3

    @pytest.mark.parametrize("channels", [1, 2, 3, 5])
    def test_crops_of_any_channels_and_sizes(self, channels):
        views = [[torch.zeros(channels, size, size, dtype=torch.uint8) for size in (16, 16, 8)]]
        assert self.opened(pictures.crop_sheet(views)).shape[2] == 3

    def test_attention_has_a_column_for_the_image_the_mean_and_each_head(self):
        torch.manual_seed(0)
        backbone = VisionTransformer(ViTSpec(16, 2, 2, 4, 16)).eval()
        shown = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
        sheet = self.opened(pictures.attention_sheet(backbone, shown / 255, shown))
        assert sheet.shape[1] / sheet.shape[0] == pytest.approx(4 / 3, abs=0.02)  # 1 + 1 + 2 columns, 3 rows

    @pytest.mark.parametrize("lines", [1, 2, 50])
    def test_curves_of_metrics_that_some_lines_lack(self, lines):
        metrics = [{"step": step, "loss/dino": 1.0 / (step + 1), "never": None} for step in range(lines)]
        metrics[0]["optim/lr"] = 0.1
        names = {"loss/dino": "loss", "optim/lr": "learning rate", "absent": "absent"}
        assert self.opened(pictures.curves(metrics, names)).std() > 0

    def test_bars(self):
        rows = [("raw pixels", 52.5, 1.2), ("pre-trained", 84.0, 0.0)]
        assert self.opened(pictures.bars({"one": rows, "other": rows}, "accuracy", {"chance": 10.0})).std() > 0
        assert self.opened(pictures.bars({"one": rows}, "accuracy", {})).std() > 0
