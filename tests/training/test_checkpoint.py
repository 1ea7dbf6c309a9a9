"""A checkpoint gives the whole state back bit by bit, and a failure to write one costs nothing that was there."""

import copy
import errno
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from builders import differing
from safetensors.torch import load_file
from torch import Tensor, nn

from dino.config.schema import OptimConfig
from dino.errors import UserError
from dino.methods.losses import Center
from dino.run import whole_checkpoints
from dino.training import checkpoint
from dino.training.checkpoint import Checkpoints
from dino.training.optimizer import build_optimizer, set_rates


class Run:
    """A student with BatchNorm and a frozen parameter, its teacher, a center, an optimizer, and their checkpoints."""

    def __init__(self, folder: Path, accelerator: Accelerator, seed: int = 0, keep: int = 3, optimizer: str = "adamw"):
        torch.manual_seed(seed)
        self.student = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
        self.student[3].bias.requires_grad_(False)
        self.teacher = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Identity(), nn.Linear(6, 3))
        self.center = Center(3)
        self.optimizer = build_optimizer(self.student, OptimConfig(name=optimizer))
        set_rates(self.optimizer, 0.01, 0.1)
        self.modules = {"student": self.student, "teacher": self.teacher, "targets": self.center}
        self.checkpoints = Checkpoints(folder, accelerator, self.modules, self.optimizer, keep)

    def train(self, steps: int) -> None:
        """Steps whose data and dropout come from torch's random state."""
        for _ in range(steps):
            images = torch.randn(8, 4)
            self.student(images).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.center.update(self.teacher(images))

    def state(self) -> dict[str, Tensor]:
        tensors = {f"{name}/{key}": value for name, m in self.modules.items() for key, value in m.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{key}": value for key, value in values.items()}
        return copy.deepcopy({**tensors, "random": torch.get_rng_state()})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_resumed_run_is_the_uninterrupted_one(accelerator, tmp_path, optimizer):
    """Everything comes back bit by bit, and nothing is missing that later steps depend on."""
    run = Run(tmp_path, accelerator, optimizer=optimizer)
    run.train(3)
    saved = run.state()
    path = run.checkpoints.save(3, {"images": "abc"})
    assert differing(run.state(), saved) == set()
    run.train(4)
    through = run.state()
    resumed = Run(tmp_path, accelerator, seed=1, optimizer=optimizer)
    resumed.train(5)
    assert differing(resumed.state(), saved)
    facts = resumed.checkpoints.load(path)
    assert (facts["step"], facts["images"]) == (3, "abc")
    assert differing(resumed.state(), saved) == set()
    resumed.train(4)
    assert differing(resumed.state(), through) == set()


class TestRoundTrip:
    def test_before_the_first_step(self, accelerator, tmp_path):
        """The optimizer has no state yet, and has none after loading."""
        run = Run(tmp_path, accelerator)
        path = run.checkpoints.save(0, {})
        other = Run(tmp_path, accelerator, seed=1)
        other.checkpoints.load(path)
        assert differing(other.state(), run.state()) == set()

    def test_its_files_are_no_pickles_and_moments_go_by_names(self, accelerator, tmp_path):
        run = Run(tmp_path, accelerator)
        run.train(2)
        path = run.checkpoints.save(2, {"images": "abc"})
        assert {file.name for file in path.iterdir()} == set(FILES)
        assert json.loads((path / "state.json").read_text())["step"] == 2
        stored = {name: load_file(path / name) for name in FILES[:-1]}["optimizer.safetensors"]
        for name, parameter in run.student.named_parameters():
            for key, value in run.optimizer.state.get(parameter, {}).items():
                assert torch.equal(stored[f"{name}/{key}"], value)
        assert not [key for key in stored if key.startswith("3.bias/")]  # not trained


class TestKeeping:
    def test_the_newest_are_kept(self, accelerator, tmp_path):
        run = Run(tmp_path, accelerator, keep=2)
        assert run.checkpoints.newest() is None
        for step in (5, 10, 900, 1000, 20000):
            assert run.checkpoints.save(step, {}) == run.checkpoints.newest()
        assert {path.name for path in tmp_path.iterdir()} == {"step-00001000", "step-00020000"}
        assert [path.name for path in whole_checkpoints(tmp_path)] == ["step-00001000", "step-00020000"]

    def test_a_step_saved_again_is_replaced_and_what_a_killed_save_left_is_no_obstacle(self, accelerator, tmp_path):
        run = Run(tmp_path, accelerator)
        partial = tmp_path / ".step-00000001.partial"
        partial.mkdir()
        (partial / "stray").write_bytes(b"x")
        assert whole_checkpoints(tmp_path) == []
        for word in ("old", "new"):
            path = run.checkpoints.save(1, {"images": word})
            run.train(1)
            assert [folder.name for folder in tmp_path.iterdir()] == [path.name] == ["step-00000001"]
            assert run.checkpoints.load(path)["images"] == word
            assert not (path / "stray").exists()

    def test_it_is_renamed_only_when_every_file_is_written(self, accelerator, tmp_path, monkeypatch):
        run, names = Run(tmp_path, accelerator), []

        def watch(path: Path, content: bytes) -> None:
            assert whole_checkpoints(tmp_path) == []
            original(path, content)
            names.append(path.name)

        original = checkpoint._write
        monkeypatch.setattr(checkpoint, "_write", watch)
        path = run.checkpoints.save(1, {})
        assert sorted(names) == sorted(file.name for file in path.iterdir())


class TestFullDisk:
    @pytest.mark.parametrize("files", [0, 1, 5])
    def test_earlier_ones_stay_whole_and_the_message_says_what_to_do(self, files, accelerator, tmp_path, monkeypatch):
        run = Run(tmp_path, accelerator, keep=1)
        run.train(1)
        earlier = run.checkpoints.save(1, {})
        before = contents(tmp_path)
        run.train(1)
        monkeypatch.setattr(checkpoint, "_write", failing_after(files))
        with pytest.raises(UserError, match=r"step 2 could not be written.*No space left") as caught:
            run.checkpoints.save(2, {})
        assert str(earlier) in str(caught.value)
        assert "Make room on the disk and start the same command again" in str(caught.value)
        assert contents(tmp_path) == before
        monkeypatch.undo()
        assert run.checkpoints.save(2, {}) == run.checkpoints.newest()

    def test_without_an_earlier_one_it_says_so(self, accelerator, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(UserError, match="could not be written"):
            Run(tmp_path / "file", accelerator).checkpoints.save(1, {})
        run = Run(tmp_path / "folder", accelerator)
        monkeypatch.setattr(checkpoint, "_write", failing_after(0))
        with pytest.raises(UserError, match="there is no earlier one"):
            run.checkpoints.save(2, {})
        assert run.checkpoints.newest() is None


def failing_after(files: int):
    """Stands in for `_write` on a disk that takes so many files more, and half of the next."""
    room = [files]
    original = checkpoint._write

    def write(path: Path, content: bytes) -> None:
        if not room[0]:
            path.write_bytes(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= 1
        original(path, content)

    return write


FILES = [*(f"{part}.safetensors" for part in ("student", "teacher", "targets", "optimizer", "random-0")), "state.json"]


class TestDamage:
    @pytest.fixture
    def saved(self, accelerator, tmp_path) -> tuple[Run, Path]:
        run = Run(tmp_path, accelerator)
        run.train(1)
        return run, run.checkpoints.save(1, {})

    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.parametrize(
        "content", [None, 0, 20, bytes(range(256)) * 2], ids=["missing", "empty", "short", "garbage"]
    )
    def test_is_told_with_the_path_and_the_way_on(self, saved, name, content):
        """But for a random state: one that is missing is of a process that the saved run did not have."""
        run, path = saved
        whole = (path / name).read_bytes()
        (path / name).unlink()
        if content is not None:
            (path / name).write_bytes(whole[:content] if isinstance(content, int) else content)
        random = torch.get_rng_state()
        if content is None and name == "random-0.safetensors":
            run.checkpoints.load(path)
            assert torch.equal(torch.get_rng_state(), random)
            return
        with pytest.raises(UserError, match="damaged") as caught:
            run.checkpoints.load(path)
        assert str(path) in str(caught.value)

    def test_of_a_run_that_did_not_rebalance(self, saved, accelerator, tmp_path):
        """It is whole, so nobody is told to remove it."""
        _, path = saved
        other = Run(tmp_path, accelerator)
        other.checkpoints.modules["draws"] = nn.Linear(1, 1)
        with pytest.raises(UserError, match=r"set data\.rebalance_every=0, as it did"):
            other.checkpoints.load(path)

    def test_another_network_is_refused_by_name(self, saved, accelerator, tmp_path):
        _, path = saved
        other = Run(tmp_path, accelerator)
        modules = {**other.checkpoints.modules, "student": nn.Sequential(nn.Linear(4, 5))}
        checkpoints = Checkpoints(tmp_path, accelerator, modules, build_optimizer(modules["student"], OptimConfig()), 3)
        with pytest.raises(UserError, match=r"student\.safetensors does not fit the model.*0\.weight"):
            checkpoints.load(path)
