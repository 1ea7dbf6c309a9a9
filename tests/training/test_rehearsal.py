"""What a dry run says of memory and time."""

from types import SimpleNamespace

import pytest
import torch
from builders import DINOV2, build, packed, views_of_batch

from dino.config.schema import TrainConfig
from dino.errors import UserError
from dino.training import memory
from dino.training.memory import Estimate, Memory, gigabytes
from dino.training.rehearsal import duration, rehearse

GIGABYTE = 10**9
ESTIMATE = Estimate(GIGABYTE, GIGABYTE, GIGABYTE // 2, GIGABYTE // 16, images=64, free=10 * GIGABYTE)


class TestEstimate:
    def test_says_what_takes_how_much(self):
        assert ESTIMATE.text() == (
            "about 6.5 GB: 1.0 GB in use, 1.0 GB gradients and moments, 4.5 GB activations of 64 images; "
            "11.0 GB can be had"
        )

    def test_what_fits_passes(self):
        ESTIMATE.check(TrainConfig(batch_size=64), processes=1)

    @pytest.mark.parametrize(
        ("free", "processes", "accumulation", "expected"),
        [
            (5.4, 1, 1, "train.accumulation=2 (the same batch in smaller parts; 4.5 GB)"),
            (2.6, 1, 1, "train.accumulation=4 (the same batch in smaller parts; 3.5 GB)"),
            (2.6, 2, 1, "train.accumulation=4 "),
            (2.6, 1, 2, "train.accumulation=4 "),
        ],
    )
    def test_what_does_not_fit_is_refused_with_the_fewest_micro_batches_that_would(
        self, free, processes, accumulation, expected
    ):
        images = 64 // accumulation
        estimate = ESTIMATE._replace(free=int(free * GIGABYTE), images=images)
        train = TrainConfig(batch_size=64 * processes, accumulation=accumulation)
        with pytest.raises(UserError, match="does not fit into memory") as refused:
            estimate.check(train, processes)
        assert expected in str(refused.value)
        assert "train.activation_checkpointing=true" in str(refused.value)

    def test_no_number_of_micro_batches_would_help(self):
        with pytest.raises(UserError) as refused:
            ESTIMATE._replace(free=GIGABYTE).check(TrainConfig(batch_size=64, activation_checkpointing=True), 1)
        assert "Ways on: smaller views, a smaller model" in str(refused.value)


class TestMemory:
    @pytest.mark.parametrize("changes", [{}, DINOV2 | {"train.batch_size": 8}], ids=["DINO", "DINOv2"])
    def test_counted_on_a_few_images_it_is_that_of_all(self, accelerator, tiny, changes):
        built = build(accelerator, tiny(changes))
        (crops,) = packed(views_of_batch(built.step.config, 0))
        estimator = Memory(built.step)
        estimate = estimator.estimate([crops], 0)
        counted = estimator._kept(crops, 8, 8, 0)
        assert estimate.images == 8
        assert estimate.fixed + 8 * estimate.of_image == pytest.approx(counted, rel=0.02)
        parameters = sum(tensor.numel() for tensor in built.method.student.parameters())
        assert estimate.state == pytest.approx(20 * parameters, rel=0.05)  # gradients, two moments, and a copy of these

    def test_leaves_the_run_as_it_was(self, accelerator, tiny):
        built = build(accelerator, tiny(), exact=True)
        before = {name: tensor.clone() for name, tensor in built.method.student.state_dict().items()}
        forward = built.method.forward
        Memory(built.step).estimate(packed(views_of_batch(built.step.config, 0)), 0)
        assert built.method.forward is forward
        assert all(torch.equal(before[name], tensor) for name, tensor in built.method.student.state_dict().items())
        assert all(parameter.grad is None for parameter in built.method.student.parameters())

    def test_a_container_may_have_less_than_the_machine(self, monkeypatch, tmp_path):
        """Of either, what is left counts."""
        (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 4000 kB\n")
        (tmp_path / "memory.max").write_text("3000000\n")
        (tmp_path / "memory.current").write_text("1000000\n")
        monkeypatch.setattr(memory, "Path", lambda path: tmp_path / path.rsplit("/", 1)[1])
        assert memory.free(torch.device("cpu")) == 2_000_000
        (tmp_path / "memory.max").write_text("max\n")
        assert memory.free(torch.device("cpu")) == 4000 * 1024


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "3 seconds"), (119, "119 seconds"), (150, "2.5 minutes"), (9000, "2.5 hours")]
)
def test_a_duration_has_the_unit_that_people_would_use(seconds, text):
    assert duration(seconds) == text


def test_sizes_have_the_unit_that_people_would_use():
    assert [gigabytes(amount) for amount in (999_000_000, 1_500_000_000)] == ["999 MB", "1.5 GB"]


def test_each_phase_is_timed_and_the_whole_is_their_sum(accelerator, tiny, capsys, monkeypatch):
    """Steps take 2 s in the first 6 of 10 steps and 5 s after that, by a clock of the test's own."""
    config = tiny({"train.phases": "[{begin: 0.6, global_size: 24, local_size: 12}]"})
    built = build(accelerator, config)
    now = [0.0]

    def batches(first: int, end: int):
        for step in range(first, end):
            now[0] += 2 if step < 6 else 5
            yield packed(views_of_batch(config, step))

    pool = SimpleNamespace(names=["a", "b"], read=lambda *_: torch.zeros(3, 4, 4, dtype=torch.uint8))
    source = SimpleNamespace(config=config, images=pool, start=0, between=batches)
    monkeypatch.setattr("dino.training.rehearsal.time.perf_counter", lambda: now[0])
    rehearse(built.step, source, accelerator)
    printed = capsys.readouterr().out
    assert "steps 1 to 6: loss" in printed
    assert "2 s each" in printed
    assert "5 s each" in printed
    assert "time: 32 seconds for 10 steps" in printed
    assert printed.count("memory: about") == 2
