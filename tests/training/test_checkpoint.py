"""A checkpoint gives the whole state back bit by bit, and a failure to write one costs nothing that was there."""

import contextlib
import copy
import errno
import json
import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from builders import differing
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dino.config.schema import OptimConfig
from dino.errors import UserError
from dino.methods.losses import Center
from dino.run import whole_checkpoints
from dino.seal import Damaged, verified
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
        assert "make room on the disk and start the same command again" in str(caught.value)
        assert contents(tmp_path) == before
        monkeypatch.undo()
        assert run.checkpoints.save(2, {}) == run.checkpoints.newest()

    @pytest.mark.parametrize(
        ("number", "advice"),
        [
            (errno.EDQUOT, "make room on the disk"),
            (errno.EPERM, "allow writing there"),
            (errno.EROFS, "mount that file system for writing"),
            (errno.ENOENT, "put its folder back"),
            (errno.EIO, "mend that"),
        ],
    )
    @pytest.mark.parametrize("at", ["_write", "sync_folder"])
    def test_what_helps_is_by_what_went_wrong(self, at, number, advice, accelerator, tmp_path, monkeypatch):
        def fail(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(checkpoint, at, fail)
        with pytest.raises(UserError, match=rf"\({os.strerror(number)}\); .*: {advice}.* start the same command again"):
            Run(tmp_path, accelerator).checkpoints.save(2, {})

    def test_what_is_no_longer_needed_and_cannot_be_removed_is_told(self, accelerator, tmp_path, monkeypatch, caplog):
        def fail(*_: object) -> None:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        run = Run(tmp_path, accelerator, keep=1)
        earlier = run.checkpoints.save(1, {})
        monkeypatch.setattr(checkpoint, "remove", fail)
        run.checkpoints.save(2, {})
        assert f"{earlier} is no longer needed and cannot be removed (Operation not permitted)" in caplog.text

    def test_a_file_where_it_is_to_lie_gives_way(self, accelerator, tmp_path):
        (tmp_path / "step-00000001").write_text("no checkpoint")
        assert Run(tmp_path, accelerator).checkpoints.save(1, {}).is_dir()

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


def one_bit_flipped(content: bytes) -> bytes:
    """In the middle, where a file's tensors are."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


class TestDamage:
    @pytest.fixture
    def saved(self, accelerator, tmp_path) -> tuple[Run, Path]:
        run = Run(tmp_path, accelerator)
        run.train(1)
        return run, run.checkpoints.save(1, {})

    @pytest.mark.parametrize("kind", ["missing", "empty", "short", "longer", "garbage", "one bit", "of another step"])
    def test_is_told_with_the_file_and_both_ways_on_before_anything_is_changed(self, saved, kind):
        run, path = saved
        run.train(1)
        other, before = run.checkpoints.save(2, {}), run.state()
        for name in FILES:
            content = (path / name).read_bytes()
            changed = {
                "missing": None,
                "empty": b"",
                "short": content[:-2],
                "longer": content + b"}",
                "garbage": bytes(range(256)) * 2,
                "one bit": one_bit_flipped(content),
                "of another step": (other / name).read_bytes(),
            }[kind]
            (path / name).unlink()
            if changed is not None:
                (path / name).write_bytes(changed)
            with pytest.raises(UserError, match=r"damaged.*Restore it from a copy.*newest_whole") as caught:
                run.checkpoints.load(path)
            assert f"{path} is damaged: " in str(caught.value)
            assert name in str(caught.value)
            (path / name).write_bytes(content)
        assert differing(run.state(), before) == set()
        assert run.checkpoints.load(path)["step"] == 1

    def test_every_byte_of_the_state_counts(self, saved):
        """The step, names, digests, the keys that say that there are any."""
        _, path = saved
        content, facts = (path / "state.json").read_bytes(), verified(path)
        for index in range(len(content)):
            changed = bytearray(content)
            changed[index] ^= 1 << index % 8
            (path / "state.json").write_bytes(changed)
            with contextlib.suppress(Damaged):
                assert verified(path) == facts, "only what JSON does not read may differ"

    def test_whole_files_in_a_wrong_place(self, saved):
        run, path = saved
        (path / "random-1.safetensors").write_bytes(b"of another run")  # not the checkpoint's: not read
        run.checkpoints.load(path)
        student, teacher = path / "student.safetensors", path / "teacher.safetensors"
        teacher.write_bytes(student.read_bytes())
        with pytest.raises(UserError, match=r"teacher\.safetensors has changed"):
            run.checkpoints.load(path)
        later = path.rename(path.with_name("step-00000009"))
        with pytest.raises(UserError, match=r"state\.json is of step 1"):
            run.checkpoints.load(later)

    def test_an_earlier_versions_opens_and_what_can_be_told_is(self, saved, caplog):
        run, path = saved
        state, facts = run.state(), json.loads((path / "state.json").read_text())
        (path / "health-0.safetensors").unlink(missing_ok=True)
        (path / "state.json").write_text(json.dumps({key: facts[key] for key in ("step", "scaler")}))
        run.train(1)
        run.checkpoints.load(path)
        assert caplog.text.count("wrote no digests") == 1
        assert differing(run.state(), state) == set()
        optimizer = path / "optimizer.safetensors"
        tensors = load_file(optimizer)
        for wrong, said in (
            ({}, "is empty"),
            ({name: tensor[:1] if tensor.ndim else tensor for name, tensor in tensors.items()}, "another network"),
            ({f"other.{name}": tensor for name, tensor in tensors.items()}, "another network"),
        ):
            save_file(wrong, optimizer)
            with pytest.raises(UserError, match=rf"optimizer\.safetensors .*{said}"):
                run.checkpoints.load(path)
        save_file(tensors, optimizer)
        (path / "random-0.safetensors").unlink()
        with pytest.raises(UserError, match=r"random-0\.safetensors is missing"):
            run.checkpoints.load(path)

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
