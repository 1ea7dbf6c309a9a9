"""A run directory belongs to one run: others are refused, and a resumed one finds its files in order."""

import errno
import json
import os
from pathlib import Path

import pytest

from dino import run as run_directory
from dino.config.auto import PoolFacts, resolve
from dino.config.read import assign, get, leaves
from dino.config.schema import AUTO, Config
from dino.errors import UserError
from dino.run import RunDirectory
from dino.training.settings import load


def resolved(**values) -> Config:
    config = Config()
    config.data.root = "images"
    for key, value in values.items():
        assign(config, key.replace("__", "."), value)
    return resolve(config, PoolFacts(10_000, 3, "folder"))[0]


@pytest.fixture
def directory(tmp_path) -> RunDirectory:
    """A directory that holds a run."""
    found = RunDirectory(tmp_path / "run")
    found.prepare(resolved(), 0)
    return found


class TestEarlierRun:
    def test_a_directory_that_is_new_or_empty_holds_none(self, tmp_path):
        assert RunDirectory(tmp_path / "new").earlier_config("auto") is None
        assert not (tmp_path / "new").exists()
        assert RunDirectory(tmp_path).earlier_config("never") is None

    def test_what_a_run_leaves_that_was_killed_before_its_config_is_no_run(self, tmp_path):
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / ".config.yaml.partial").write_text("half")
        assert RunDirectory(tmp_path).earlier_config("auto") is None

    def test_its_config_is_read_back(self, directory):
        assert directory.earlier_config("auto") == resolved()

    def test_resume_never_is_refused_with_both_ways_on(self, directory):
        with pytest.raises(UserError, match=r"train\.resume=never.*another directory.*train\.resume=auto"):
            directory.earlier_config("never")

    def test_something_else_in_it_is_refused(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("do not lose me")
        with pytest.raises(UserError, match="holds no run: name another directory"):
            RunDirectory(tmp_path).earlier_config("auto")

    def test_a_file_of_that_name_is_refused(self, tmp_path):
        (tmp_path / "run").write_text("a file")
        with pytest.raises(UserError, match="run"):
            RunDirectory(tmp_path / "run").earlier_config("auto")

    def test_a_damaged_config_is_told(self, directory):
        directory.config.write_text("train: {batch_size: [")
        with pytest.raises(UserError, match=r"config\.yaml is not valid YAML"):
            directory.earlier_config("auto")


class TestOtherConfig:
    def test_the_same_is_accepted(self, directory):
        assert directory.refuse_other_config(resolved(), resolved()) is None

    def test_every_difference_is_listed_with_both_values_and_both_ways_on(self, directory):
        now = resolved(optim__lr=0.5, model__arch="vit_tiny", train__seed=7)
        with pytest.raises(UserError) as caught:
            directory.refuse_other_config(now, resolved(optim__lr=0.25))
        text = str(caught.value)
        for line in ("optim.lr: 0.25 there, 0.5 now", "model.arch: vit_small there, vit_tiny now"):
            assert line in text
        assert "train.seed: 0 there, 7 now" in text
        assert "resume" in text
        assert "run.dir=" in text

    # DESIGN.md, "Run directory": what may differ on resume.
    MAY = (
        *("train.steps", "train.time_limit", "train.checkpoint_every", "data.workers", "data.cache"),
        *("tracking.project", "tracking.name", "tracking.backends", "monitor.log_every", "monitor.health_every"),
        *(
            "train.epochs",
            "train.keep_checkpoints",
            "train.resume",
            "train.cpu_threads",
            "train.fsdp",
            "train.activation_checkpointing",
            "run.dir",
        ),
    )

    @pytest.mark.parametrize("key", [key for key, _ in leaves()])
    def test_only_what_leaves_the_training_the_same_may_differ(self, key, directory):
        changed = resolved()
        value = get(changed, key)
        assign(changed, key, [*value, 1.0] if isinstance(value, list) else "other")
        if key in self.MAY:
            directory.refuse_other_config(changed, resolved())
        else:
            with pytest.raises(UserError, match=key.replace(".", r"\.")):
                directory.refuse_other_config(changed, resolved())


class TestStartingPoint:
    def test_newest_whole_checkpoint(self, directory):
        assert directory.starting_point("auto") is None
        for name in ("step-00000005", "step-00000100", ".step-00000200.partial"):
            (directory.checkpoints / name).mkdir()
        assert directory.starting_point("auto").name == "step-00000100"

    def test_one_by_its_path(self, directory, tmp_path):
        named = tmp_path / "elsewhere" / "step-00000007"
        named.mkdir(parents=True)
        (named / "state.json").write_text("{}")
        assert directory.starting_point(str(named)) == named

    def test_a_run_that_began_elsewhere_goes_on_from_its_own(self, directory, tmp_path):
        """The same command, with the path in it, started again."""
        named = tmp_path / "elsewhere" / "step-00000007"
        named.mkdir(parents=True)
        (named / "state.json").write_text("{}")
        own = directory.checkpoints / "step-00000009"
        own.mkdir()
        assert directory.starting_point(str(named)) == own

    def test_an_earlier_one_of_its_own_may_be_named(self, directory):
        for name in ("step-00000005", "step-00000009"):
            (directory.checkpoints / name).mkdir()
            (directory.checkpoints / name / "state.json").write_text("{}")
        earlier = directory.checkpoints / "step-00000005"
        assert directory.starting_point(str(earlier)) == earlier
        directory.prepare(resolved(), 5)  # and what came after it is of another course of the run
        assert list(directory.checkpoints.iterdir()) == [earlier]

    @pytest.mark.parametrize("wrong", ["missing", "."])
    def test_a_path_that_is_no_checkpoint(self, directory, tmp_path, wrong):
        with pytest.raises(UserError, match=r"is no checkpoint: name a folder like"):
            directory.starting_point(str(tmp_path / wrong))


class TestPrepare:
    def test_writes_a_config_that_repeats_the_run(self, tmp_path):
        directory, config = RunDirectory(tmp_path / "deep" / "run"), resolved(optim__lr=1e-5, tracking__name="1e-3")
        directory.prepare(config, 0)
        assert load(directory.config) == config
        assert AUTO not in {get(config, key) for key in ("optim.lr", "train.steps", "objective.prototypes")}

    def test_sweeps_up_what_a_killed_run_left_half_done(self, directory):
        half = directory.checkpoints / ".step-00000009.partial"
        half.mkdir()
        (half / "student.safetensors").write_bytes(b"half")
        (directory.path / ".backbone.safetensors.partial").write_bytes(b"half")
        whole = directory.checkpoints / "step-00000005"
        whole.mkdir()
        directory.prepare(resolved(), 5)
        assert list(directory.checkpoints.iterdir()) == [whole]
        assert not list(directory.path.glob(".*"))

    def test_metrics_after_the_resumed_step_are_dropped(self, directory):
        """They will be written again; a step must not appear twice in the curves."""
        write_metrics(directory.metrics, [10, 20, 30, 40])
        directory.prepare(resolved(), 20)
        assert [line["step"] for line in directory.read_metrics()] == [10, 20]
        assert directory.metrics.read_text().endswith("\n")

    def test_a_line_half_written_by_a_killed_run_is_dropped(self, directory):
        write_metrics(directory.metrics, [10, 20])
        with directory.metrics.open("a") as file:
            file.write('{"step": 30, "loss/di')
        assert [line["step"] for line in directory.read_metrics()] == [10, 20]
        directory.prepare(resolved(), 30)
        write_metrics(directory.metrics, [30], mode="a")
        assert [line["step"] for line in directory.read_metrics()] == [10, 20, 30]

    def test_other_files_stay(self, directory):
        directory.results.write_text("{}")
        directory.add_skipped([("a.png", "broken")])
        directory.prepare(resolved(), 0)
        assert directory.results.read_text() == "{}"
        assert directory.read_skipped() == {"a.png": "broken"}

    def test_a_disk_that_cannot_be_written(self, tmp_path, monkeypatch):
        def full(path: Path, text: str) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(run_directory, "_replace", full)
        with pytest.raises(UserError, match=r"cannot be written: No space left"):
            RunDirectory(tmp_path / "run").prepare(resolved(), 0)


def write_metrics(path: Path, steps: list[int], mode: str = "w") -> None:
    with path.open(mode) as file:
        file.writelines(json.dumps({"step": step, "loss/dino": float(step)}) + "\n" for step in steps)


class TestSkipped:
    def test_grows_by_every_process(self, directory):
        assert directory.read_skipped() == {}
        directory.add_skipped([("a.png", "truncated"), ("b.png", "empty")])
        RunDirectory(directory.path).add_skipped([("c.png", "a reason: with, signs")])
        expected = {"a.png": "truncated", "b.png": "empty", "c.png": "a reason: with, signs"}
        assert directory.read_skipped() == expected

    def test_listed_twice_counts_once(self, directory):
        for _ in range(2):
            directory.add_skipped([("a.png", "truncated")])
        assert directory.read_skipped() == {"a.png": "truncated"}

    @pytest.mark.parametrize(
        "name",
        [
            "folder/with space/é ü 日本.png",
            os.fsdecode(b"not utf-8 \xff\xfe.png"),
            "tab\tin name.png",
            "line\nbreak.png",
            "carriage\rreturn.png",
            "form\x0cfeed.png",
            "next\x85line.png",
            "separator\u2028of lines.png",
        ],
        ids=repr,
    )
    def test_odd_names_come_back_as_they_are(self, directory, name):
        """Names are counted against data.max_unreadable: one that came back as two would end a good run."""
        directory.add_skipped([(name, "why"), ("plain.png", "because")])
        assert directory.read_skipped() == {name: "why", "plain.png": "because"}

    def test_may_be_written_anew(self, directory):
        directory.add_skipped([("a.png", "truncated"), ("b.png", "empty")])
        directory.write_skipped([("b.png", "still empty")])
        assert directory.read_skipped() == {"b.png": "still empty"}
        directory.write_skipped([])
        assert directory.read_skipped() == {}

    def test_a_reason_of_two_lines_is_one_entry(self, directory):
        directory.add_skipped([("a.png", "first\nsecond\tthird")])
        assert list(directory.read_skipped()) == ["a.png"]
