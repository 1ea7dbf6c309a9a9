"""The images of a run that goes on: the same wherever they lie now; what was changed in them is noticed."""

import os
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image
from test_best import SETTINGS

import dino
from dino.data import open_images
from dino.data.identity import difference, facts
from dino.errors import UserError
from dino.report.run import Reporter


@pytest.fixture
def folder(tmp_path):
    """24 pictures without compression, so that their files have the same size whatever they show."""
    generator = np.random.default_rng(0)
    for number in range(24):
        path = tmp_path / "pictures" / "ab"[number % 2] / f"{number:02d}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (12, 12), dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


def copied(folder):
    """Later, and elsewhere."""
    return shutil.copytree(folder, folder.parent / "elsewhere" / "others", copy_function=shutil.copyfile)


def zipped(folder, within="pictures"):
    """As `zip -r` does it: with the folder's own name before each."""
    archive = folder.parent / "pictures.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for path in folder.rglob("*.bmp"):
            opened.write(path, f"{within}/{path.relative_to(folder)}")
    return archive


def renamed(folder):
    (folder / "a" / "00.bmp").rename(folder / "a" / "other.bmp")


def removed(folder):
    (folder / "a" / "00.bmp").unlink()


def resized(folder):
    with Image.open(folder / "a" / "00.bmp") as picture:
        picture.resize((13, 12)).save(folder / "a" / "00.bmp")


def repainted(folder):
    """With nothing to tell it by, not even the time."""
    path = folder / "a" / "00.bmp"
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("move", [copied, zipped, lambda folder: folder.parent, lambda folder: f"{folder}/"])
def test_the_same_images_elsewhere(move, folder):
    before = facts(open_images(folder), content=True)
    assert difference(before, facts(open_images(str(move(folder))), content=True)) == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [(renamed, "renamed"), (removed, "removed"), (resized, "other sizes"), (repainted, "other content")],
)
def test_a_change_is_noticed(change, said, folder):
    before = facts(open_images(folder), content=True)
    change(folder)
    now = facts(open_images(folder), content=True)
    assert said in difference(before, now)
    by_size = difference({name: value for name, value in before.items() if name != "content"}, now)
    assert by_size == "" if change is repainted else said in by_size


def test_an_earlier_versions_checkpoint_knows_names_only(folder):
    before = {"images": facts(open_images(folder), content=False)["images"]}
    resized(folder)
    assert difference(before, facts(open_images(folder), content=True)) == ""
    renamed(folder)
    assert "renamed" in difference(before, facts(open_images(folder), content=True))


@pytest.fixture
def train(fresh_accelerate, tmp_path, monkeypatch):
    """Function that trains on images for so many steps; gives the run's directory."""
    monkeypatch.setattr(Reporter, "write", lambda *_, **__: {})
    own = {"data.channels": 1, "train.batch_size": 8, "train.checkpoint_every": 2}
    settings = {key: value for key, value in SETTINGS.items() if key != "data.kind"} | own

    def to_step(name, root, steps, **more):
        return dino.train(root, tmp_path / name, **settings | {"train.steps": steps} | more).path

    return to_step


def test_a_run_goes_on_with_an_archive_of_its_folder_bit_for_bit(train, folder, caplog):
    whole = train("whole", folder, 4)
    run = train("moved", folder, 4)
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    archive = zipped(folder)
    shutil.rmtree(folder)
    train("moved", archive, 4)
    assert (run / "backbone.safetensors").read_bytes() == (whole / "backbone.safetensors").read_bytes()
    config = dino.Run(run).config
    assert (config.data.root, config.data.kind) == (str(archive), "zip"), "its report finds them"


def test_a_start_that_does_not_compare_content_keeps_its_digest_for_the_next(train, folder):
    train("run", folder, 2, **{"data.verify": "content"})
    run = train("run", folder, 4)
    repainted(folder)
    with pytest.raises(UserError, match=r"step-00000004 was made with .*other content"):
        train("run", folder, 6, **{"data.verify": "content"})
    assert len(list((run / "checkpoints").iterdir())) == 2


def test_a_run_does_not_go_on_with_what_was_repainted_where_content_is_compared(train, folder):
    run = train("run", folder, 2, **{"data.verify": "content"})
    repainted(folder)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"images are not those that .* other content"):
        train("run", folder, 4, **{"data.verify": "content"})
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_old_command_of_a_run_that_was_extended_changes_nothing(train, folder, capsys):
    """Neither its config nor, by that, its page and what is left of it."""
    run = train("run", folder, 4)
    train("run", folder, 8)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    train("run", folder, 4)
    assert "has taken 8 steps, more than train.steps=4: nothing is left to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert dino.Run(run).config.train.steps == 8
