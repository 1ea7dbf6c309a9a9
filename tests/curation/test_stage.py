"""A stage's folder: what it keeps, what it removes, and what is not its own."""

from types import SimpleNamespace

import pytest

from dino.curation.stage import Stage
from dino.errors import UserError

ALONE = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)


def stage(folder, key):
    return Stage(folder / "stage", [key], ALONE)


def test_is_done_once(tmp_path):
    one = stage(tmp_path, "a")
    assert one.begin()
    (tmp_path / "stage" / "half").write_text("1")
    assert stage(tmp_path, "a").begin()
    assert (tmp_path / "stage" / "half").exists()
    one.finish()
    assert not stage(tmp_path, "a").begin()


def test_another_key_begins_anew(tmp_path):
    one = stage(tmp_path, "a")
    one.begin()
    (tmp_path / "stage" / "parts").mkdir()
    (tmp_path / "stage" / "parts" / "1").write_text("1")
    one.finish()
    assert stage(tmp_path, "b").begin()
    assert [path.name for path in (tmp_path / "stage").iterdir()] == ["begun.json"]
    assert stage(tmp_path, "a").begin()


def test_killed_while_it_is_cleared_it_is_not_taken_for_done(tmp_path, monkeypatch):
    one = stage(tmp_path, "a")
    one.begin()
    for name in ("tokens.npy", "facts.json"):
        (tmp_path / "stage" / name).write_text("1")
    one.finish()
    kill_after = iter((True, False))
    unlink = type(tmp_path).unlink

    def mortal(path, missing_ok=False):
        if path.suffix != ".partial" and not next(kill_after):
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "unlink", mortal)
        with pytest.raises(KeyboardInterrupt):
            stage(tmp_path, "b").begin()
    assert stage(tmp_path, "a").begin()
    assert stage(tmp_path, "b").begin()


def test_a_link_in_place_of_its_mark_is_replaced_and_what_it_leads_to_stays(tmp_path):
    stage(tmp_path, "a").begin()
    (tmp_path / "elsewhere").write_text("somebody's")
    (tmp_path / "stage" / "begun.json").unlink()
    (tmp_path / "stage" / "begun.json").symlink_to(tmp_path / "elsewhere")
    assert stage(tmp_path, "a").begin()
    assert (tmp_path / "elsewhere").read_text() == "somebody's"


def test_what_is_not_its_own_is_left_alone(tmp_path):
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "picture.png").write_text("mine")
    with pytest.raises(UserError, match=r"picture\.png: move it elsewhere"):
        stage(tmp_path, "a").begin()
    assert (tmp_path / "stage" / "picture.png").read_text() == "mine"
