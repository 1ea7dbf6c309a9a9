"""A run directory belongs to one run: others are refused, and a resumed one finds its files in order."""

import copy
import errno
import json
import os
from pathlib import Path

import pytest
from builders import resolved as resolve
from builders import with_settings

from dino.config.read import assign, get, leaves
from dino.config.schema import AUTO, Config
from dino.errors import UserError
from dino.run import RunDirectory
from dino.seal import sealed
from dino.training import resume
from dino.training.settings import load
from dino.training.train import Run


def resolved(changes: dict | None = None) -> Config:
    return resolve(with_settings({"data.root": "images"} | (changes or {})), images=10_000)


RESOLVED = resolved()
MAY_DIFFER = {  # DESIGN.md, "Run directory"
    *(
        f"train.{name}"
        for name in ("steps", "epochs", "time_limit", "checkpoint_every", "keep_checkpoints", "keep_best")
    ),
    *(f"train.{name}" for name in ("resume", "cpu_threads", "fsdp", "activation_checkpointing")),
    *(f"tracking.{name}" for name in ("project", "name", "backends", "artifacts")),
    *("data.workers", "data.cache", "data.verify", "monitor.log_every", "monitor.health_every", "run.dir"),
}


@pytest.fixture
def directory(tmp_path) -> RunDirectory:
    """A directory that holds a run."""
    directory = RunDirectory(tmp_path / "run")
    resume.prepare(directory, resolved(), 0)
    return directory


class TestEarlierRun:
    def test_a_directory_that_is_new_or_empty_holds_none(self, tmp_path):
        assert resume.earlier_config(RunDirectory(tmp_path / "new"), "auto") is None
        assert not (tmp_path / "new").exists()
        assert resume.earlier_config(RunDirectory(tmp_path), "never") is None

    def test_what_a_run_leaves_that_was_killed_before_its_config_is_no_run(self, tmp_path):
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / ".config.yaml.17.partial").write_text("half")
        assert resume.earlier_config(RunDirectory(tmp_path), "auto") is None

    def test_its_config_is_read_back(self, directory):
        assert resume.earlier_config(directory, "auto") == resolved()

    def test_resume_never_is_refused_with_both_ways_on(self, directory):
        with pytest.raises(UserError, match=r"train\.resume=never.*another directory.*train\.resume=auto"):
            resume.earlier_config(directory, "never")

    def test_something_else_is_refused(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("do not lose me")
        with pytest.raises(UserError, match="holds no run: name another directory"):
            resume.earlier_config(RunDirectory(tmp_path), "auto")
        with pytest.raises(UserError, match=r"thesis\.tex is a file: name another directory"):
            resume.refuse_what_is_in_the_way(RunDirectory(tmp_path / "thesis.tex"))

    def test_a_damaged_config_is_told(self, directory):
        directory.config.write_text("train: {batch_size: [")
        with pytest.raises(UserError, match=r"config\.yaml is not valid YAML"):
            resume.earlier_config(directory, "auto")


class TestOtherConfig:
    def test_every_difference_is_listed_with_both_values_and_both_ways_on(self, directory):
        now = resolved({"optim.lr": 0.5, "model.arch": "vit_tiny", "train.seed": 7})
        with pytest.raises(UserError) as caught:
            resume.refuse_other_config(directory, now, resolved({"optim.lr": 0.25}), has_checkpoint=True)
        text = str(caught.value)
        for line in (
            "optim.lr: 0.25 there, 0.5 now",
            "model.arch: vit_small there, vit_tiny now",
            "resume",
            "run.dir=",
        ):
            assert line in text
        assert "train.seed: 0 there, 7 now" in text

    @pytest.mark.parametrize("has_checkpoint", [True, False])
    @pytest.mark.parametrize("key", leaves(Config()))
    def test_only_what_leaves_the_training_the_same_may_differ(self, key, has_checkpoint, directory):
        """Where images lie may, if a checkpoint says which they are."""
        changed, earlier = copy.deepcopy(RESOLVED), copy.deepcopy(RESOLVED)
        value = get(changed, key)
        assign(changed, key, [*value, 1.0] if isinstance(value, list) else "other")
        if key in MAY_DIFFER or (has_checkpoint and key in ("data.root", "data.kind")):
            resume.refuse_other_config(directory, changed, earlier, has_checkpoint)
        else:
            with pytest.raises(UserError, match=key.replace(".", r"\.")):
                resume.refuse_other_config(directory, changed, earlier, has_checkpoint)

    def test_a_path_written_another_way_is_no_difference(self, directory, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "images").mkdir()
        for root in ("images", "images/", "./images", f"{tmp_path}/images", "run/../images"):
            now = resolved({"data.root": root})
            resume.refuse_other_config(directory, now, resolved({"data.root": "images"}), has_checkpoint=False)


class TestStartingPoint:
    def checkpoint(self, folder: Path, step: int) -> Path:
        path = folder / f"step-{step:08d}"
        path.mkdir(parents=True)
        (path / "state.json").write_bytes(sealed({"step": step}, {}))
        return path

    def test_newest_whole_checkpoint(self, directory):
        assert resume.starting_point(directory, "auto") is None
        self.checkpoint(directory.checkpoints, 5)
        newest = self.checkpoint(directory.checkpoints, 100)
        (directory.checkpoints / ".step-00000200.partial").mkdir()
        assert resume.starting_point(directory, "auto") == newest

    def test_one_by_its_path(self, directory, tmp_path):
        """A run that began elsewhere goes on from its own: the same command, started again."""
        named = self.checkpoint(tmp_path / "elsewhere", 7)
        assert resume.starting_point(directory, str(named)) == named
        own = self.checkpoint(directory.checkpoints, 9)
        assert resume.starting_point(directory, str(named)) == own

    def test_an_earlier_one_of_its_own_may_be_named(self, directory):
        earlier, _ = (self.checkpoint(directory.checkpoints, step) for step in (5, 9))
        assert resume.starting_point(directory, str(earlier)) == earlier
        resume.prepare(directory, resolved(), 5)  # and what came after it is of another course of the run
        assert list(directory.checkpoints.iterdir()) == [earlier]

    def test_the_newest_whole_one_only_where_it_is_asked_for(self, directory, caplog):
        assert resume.starting_point(directory, "newest_whole") is None
        whole, damaged = (self.checkpoint(directory.checkpoints, step) for step in (5, 9))
        (damaged / "state.json").write_text('{"step": 8}')
        assert resume.starting_point(directory, "auto") == damaged
        assert resume.starting_point(directory, "newest_whole") == whole
        assert f"passed over: the checkpoint {damaged} is damaged" in caplog.text
        (whole / "state.json").unlink()
        with pytest.raises(UserError, match=r"all checkpoints in .* are damaged: restore one"):
            resume.starting_point(directory, "newest_whole")

    @pytest.mark.parametrize("word", ["nevr", "newest_hole", "Auto"])
    def test_a_misspelt_word_is_no_path_of_an_earlier_start(self, directory, word):
        self.checkpoint(directory.checkpoints, 5)
        with pytest.raises(
            UserError, match=rf"train\.resume={word} is no checkpoint: .* or auto, never or newest_whole"
        ):
            resume.starting_point(directory, word)

    @pytest.mark.parametrize("wrong", ["missing", "."])
    def test_a_path_that_is_no_checkpoint(self, directory, tmp_path, wrong):
        with pytest.raises(UserError, match=r"is no checkpoint: name a folder like"):
            resume.starting_point(directory, str(tmp_path / wrong))


def write_metrics(directory: RunDirectory, steps: list[int], mode: str = "w") -> None:
    with directory.metrics.open(mode) as file:
        file.writelines(json.dumps({"step": step, "loss/dino": float(step)}) + "\n" for step in steps)


def logged_steps(directory: RunDirectory) -> list[int]:
    return [line["step"] for line in directory.read_metrics()]


class TestPrepare:
    def test_writes_a_config_that_repeats_the_run(self, tmp_path):
        directory, config = (
            RunDirectory(tmp_path / "deep" / "run"),
            resolved({"optim.lr": 1e-5, "tracking.name": "1e-3"}),
        )
        resume.prepare(directory, config, 0)
        assert load(directory.config) == directory.read_config() == config
        assert AUTO not in {get(config, key) for key in ("optim.lr", "train.steps", "objective.prototypes")}

    def test_sweeps_up_what_a_killed_run_left_half_done(self, directory):
        half = directory.checkpoints / ".step-00000009.partial"
        half.mkdir()
        (half / "student.safetensors").write_bytes(b"half")
        (directory.path / ".backbone.safetensors.17.partial").write_bytes(b"half")
        whole = directory.checkpoints / "step-00000005"
        whole.mkdir()
        resume.prepare(directory, resolved(), 5)
        assert list(directory.checkpoints.iterdir()) == [whole]
        assert not list(directory.path.glob(".*"))

    def test_metrics_after_the_resumed_step_are_dropped(self, directory):
        """They will be written again; a step must not appear twice in the curves."""
        write_metrics(directory, [10, 20, 30, 40])
        resume.prepare(directory, resolved(), 20)
        assert logged_steps(directory) == [10, 20]
        assert directory.metrics.read_text().endswith("\n")

    def test_a_line_half_written_by_a_killed_run_is_dropped(self, directory):
        write_metrics(directory, [10, 20])
        with directory.metrics.open("a") as file:
            file.write('{"step": 30, "loss/di')
        assert logged_steps(directory) == [10, 20]
        resume.prepare(directory, resolved(), 30)
        write_metrics(directory, [30], mode="a")
        assert logged_steps(directory) == [10, 20, 30]

    def test_other_files_stay(self, directory):
        directory.results.write_text("{}")
        directory.add_skipped({"a.png": "broken"})
        resume.prepare(directory, resolved(), 0)
        assert directory.results.read_text() == "{}"
        assert directory.read_skipped() == {"a.png": "broken"}

    def test_a_disk_that_cannot_be_written(self, tmp_path, monkeypatch):
        def full(path: Path, text: str) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(resume, "write_text", full)
        with pytest.raises(UserError, match=r"cannot be written: No space left"):
            resume.prepare(RunDirectory(tmp_path / "run"), resolved(), 0)


class TestSkipped:
    def test_grows_by_every_process_and_counts_a_name_once(self, directory):
        assert directory.read_skipped() == {}
        for _ in range(2):
            directory.add_skipped({"a.png": "first\nsecond\tline", "b.png": "empty"})
        RunDirectory(directory.path).add_skipped({"c.png": "a reason: with, signs"})
        expected = {"a.png": "first\nsecond\tline", "b.png": "empty", "c.png": "a reason: with, signs"}
        assert directory.read_skipped() == expected
        directory.write_skipped({"b.png": "still empty"})
        assert directory.read_skipped() == {"b.png": "still empty"}
        directory.write_skipped({})
        assert directory.read_skipped() == {}

    def test_odd_names_come_back_as_they_are(self, directory):
        """Names are counted against data.max_unreadable: one that came back as two would end a good run."""
        signs = "\t\n\r\x0c\x85\u2028 é ü 日本"
        entries = {f"folder/with{sign}sign.png": "why" for sign in signs} | {
            os.fsdecode(b"not utf-8 \xff\xfe.png"): "why"
        }
        directory.add_skipped(entries)
        assert directory.read_skipped() == entries


def test_a_run_is_looked_at_by_its_directory(directory):
    write_metrics(directory, [10, 20])
    with directory.metrics.open("a") as file:
        file.write('{"step": 30, "health/verdict": "healthy", "health/centre_norm": 2.0}\n')
    run = Run(str(directory.path))
    assert run.config == resolved()
    assert [line["step"] for line in run.metrics] == [10, 20, 30]
    assert run.metrics[-1]["health/center_norm"] == 2.0  # by the name that it has now
    assert run.verdict == "healthy"
    assert run.report == directory.report
