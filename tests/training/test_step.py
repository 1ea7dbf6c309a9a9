"""What must hold of an optimizer step whatever the method; that it is what papers say is in tests/methods."""

import math
from types import SimpleNamespace

import pytest
import torch
from builders import Built, assert_close, build, differing, packed, views_of_batch, weights
from torch import Tensor

from dino.data.sampler import EpochStream, MicroBatches
from dino.methods import dino
from dino.training.normalise import Normalise


def break_loss(monkeypatch, at: int) -> None:
    """Make one loss NaN, as an overflow in the student would."""
    original, calls = dino.dino_loss, iter(range(100))

    def broken(*arguments):
        return original(*arguments) * (math.nan if next(calls) == at else 1)

    monkeypatch.setattr(dino, "dino_loss", broken)


def moments(built: Built) -> dict[str, Tensor]:
    return {
        f"{index}.{key}": value.clone()
        for index, state in built.optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


@pytest.fixture
def built(accelerator, tiny) -> Built:
    return build(accelerator, tiny(), exact=True)


class TestBrokenSteps:
    def test_change_no_weight_of_the_student_and_no_moment(self, built, monkeypatch):
        """An average goes on to follow the unchanged student."""
        break_loss(monkeypatch, at=1)
        built.take(0)
        student, teacher, before = weights(built.method.student), weights(built.method.teacher), moments(built)
        built.take(1)
        assert differing(weights(built.method.student), student) == set()
        assert differing(moments(built), before) == set()
        momentum = built.method.schedules["teacher/momentum"](1)
        expected = {name: momentum * teacher[name] + (1 - momentum) * student[name] for name in teacher}
        assert_close(weights(built.method.teacher), expected, rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize("centering", ["center", "sinkhorn"])
    def test_by_pixels_that_are_not_numbers_leave_everything_finite(self, centering, accelerator, tiny):
        built = build(accelerator, tiny({"objective.centering": centering}))
        built.take(0)
        before, shift = weights(built.method.student), built.step.normalise.shift.clone()
        built.step.normalise.shift.fill_(math.nan)
        built.take(1)
        built.step.normalise.shift.copy_(shift)
        assert differing(weights(built.method.student), before) == set()
        assert int(built.step.first_broken) == 1
        built.take(2)
        assert all(value.isfinite().all() for value in weights(*built.method.state().values()).values())

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_by_a_gradient_under_a_finite_loss_are_noticed_too(self, bad, built):
        built.take(0)
        before = weights(built.method.student)
        hook = built.method.student.backbone.cls_token.register_hook(lambda gradient: gradient + bad)
        built.take(1)
        hook.remove()
        assert differing(weights(built.method.student), before) == set()
        assert int(built.step.first_broken) == 1

    def test_the_first_one_is_remembered(self, built, monkeypatch):
        assert int(built.step.first_broken) == -1
        break_loss(monkeypatch, at=2)
        built.take(0, 1)
        assert int(built.step.first_broken) == -1
        built.take(2, 3)
        monkeypatch.undo()
        break_loss(monkeypatch, at=0)
        built.take(4)
        assert int(built.step.first_broken) == 2

    def test_one_broken_micro_batch_breaks_the_step(self, accelerator, tiny, monkeypatch):
        built = build(accelerator, tiny({"train.accumulation": 2}))
        break_loss(monkeypatch, at=0)
        before = weights(built.method.student)
        built.take(0)
        assert differing(weights(built.method.student), before) == set()
        assert int(built.step.first_broken) == 0


def test_rates_move_with_steps_and_not_with_micro_batches(accelerator, tiny):
    built = build(accelerator, tiny({"train.accumulation": 4}))
    built.take(0)
    assert {float(state["step"]) for state in built.optimizer.state.values()} == {1.0}
    assert {group["lr"] for group in built.optimizer.param_groups} == {0.005}


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (1, 4), (2, 1), (3, 2), (2, 3)])
def test_batches_know_their_images_rows_in_the_global_batch(processes, accumulation, accelerator, tiny, monkeypatch):
    """In every process and micro-batch those of the images that the sampler gives it."""
    built = build(accelerator, tiny({"train.accumulation": accumulation, "train.batch_size": 12}))
    stream, size = EpochStream(12, 12, seed=0), 12 // (processes * accumulation)
    monkeypatch.setattr(type(accelerator), "num_processes", processes)
    for rank in range(processes):
        monkeypatch.setattr(type(accelerator), "process_index", rank)
        given: list = []
        monkeypatch.setattr(
            built.step, "method", SimpleNamespace(look=lambda batches, step, to=given: to.extend(batches))
        )
        views = [view[:size].repeat(accumulation, 1, 1, 1) for view in views_of_batch(built.step.config, 0)]
        built.step.look(0, packed(views, accumulation))
        expected = [
            [stream.batch(0).index(image) for image in part]
            for part in MicroBatches(stream, 0, 1, rank, processes, accumulation)
        ]
        assert [list(batch.rows) for batch in given] == expected
        assert all(len(batch.crops[0]) == 2 * size for batch in given)


def test_metrics_stay_on_the_device_and_carry_no_graph(built):
    logged = built.step(0, packed(views_of_batch(built.step.config, 0)))
    assert set(logged) == {"loss/dino", "health/gradient_norm"}
    assert all(value.shape == () and not value.requires_grad for value in logged.values())


def test_a_look_changes_nothing(built):
    """But shows what the method made of the images."""
    before, random = weights(*built.method.state().values()), torch.get_rng_state()
    built.step.look(0, packed(views_of_batch(built.step.config, 0)))
    assert differing(weights(*built.method.state().values()), before) == set()
    assert torch.equal(torch.get_rng_state(), random)
    assert built.method.seen.tokens.shape == (2, 8, 16)
    assert all(module.training for module in built.method.student.modules())


def test_normalise_is_to_tensor_and_normalize():
    """torchvision's two operations, on every value a pixel can have."""
    from torchvision.transforms.v2 import functional

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    expected = functional.normalize(functional.to_dtype(pixels, torch.float32, scale=True), mean, std)
    torch.testing.assert_close(Normalise(mean, std)(pixels), expected, rtol=1e-5, atol=1e-6)
