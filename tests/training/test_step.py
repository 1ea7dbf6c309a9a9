"""One optimizer step against DINO's algorithm written out in plain PyTorch, and what must hold of any step.

Networks are in double precision here, so that what should be equal differs by less than what Adam could blow up.
"""

import copy
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from dino.training.targets import Targets
from torch import Tensor, nn

from dino.config.schema import Config
from dino.methods.losses import Centre
from dino.methods.network import Network, Normalise, build_networks
from dino.training import step as step_module
from dino.training.optimizer import build_optimizer
from dino.training.schedules import schedules
from dino.training.step import Step


class Trainer(NamedTuple):
    """All that takes part in a step."""

    step: Step
    student: Network
    teacher: Network
    targets: Targets
    optimizer: torch.optim.Optimizer


def build(accelerator: Accelerator, config: Config) -> Trainer:
    torch.manual_seed(0)
    student, teacher = (network.double() for network in build_networks(config))
    with torch.no_grad():  # a trained student has left its teacher
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    targets, optimizer = Targets(config), build_optimizer(student, config.optim)
    normalise = Normalise(config.views.mean, config.views.std).double()
    wrapped, prepared = accelerator.prepare(student, optimizer)
    take_step = Step(accelerator, config, wrapped, teacher, targets, prepared, normalise, schedules(config))
    return Trainer(take_step, student, teacher, targets, optimizer)


def views_of_batch(config: Config, seed: int) -> list[Tensor]:
    """Two global views and the local ones, each (B, C, size, size) uint8."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [config.views.global_size] * 2 + [config.views.local_size] * config.views.local_crops
    shapes = [(config.train.batch_size, int(config.data.channels), size, size) for size in sizes]
    return [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in shapes]


def packed(views: list[Tensor], parts: int = 1) -> list[list[Tensor]]:
    """Views as micro-batches: each a list of crops by size, view by view."""
    micro_batches = []
    for part in range(parts):
        share = [view.chunk(parts)[part] for view in views]
        by_size: dict[int, list[Tensor]] = {}
        for view in share:
            by_size.setdefault(view.shape[-1], []).append(view)
        micro_batches.append([torch.cat(same) for same in by_size.values()])
    return micro_batches


def weights(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def assert_untouched(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


class Reference:
    """DINO's algorithm 1 with its published surroundings: one view at a time, torch's own AdamW and clipping."""

    def __init__(self, config: Config, student: Network, teacher: Network):
        self.config = config
        self.student, self.teacher = copy.deepcopy(student), copy.deepcopy(teacher)
        trained = [value for value in self.student.parameters() if value.requires_grad]
        self.decayed = {"params": [value for value in trained if value.ndim > 1], "weight_decay": 0.04}
        free = {"params": [value for value in trained if value.ndim <= 1], "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW([self.decayed, free], lr=0.1, fused=False, foreach=False)
        self.centre = torch.zeros(int(config.objective.prototypes))

    def pixels(self, view: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.config.views.mean, self.config.views.std))
        return ((view / 255 - mean) / std).double()

    def scores(self, network: Network, view: Tensor) -> Tensor:
        return network.head(network.backbone(self.pixels(view)))

    def cosine(self, start: float, end: float, progress: float) -> float:
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2

    def step(self, number: int, views: list[Tensor]) -> tuple[float, float]:
        """Loss and gradient norm of one step; rates as the `tiny` config says: 1 step of warm-up, 10 in all."""
        lr = 0.005 if number == 0 else self.cosine(0.01, 1e-6, (number - 1) / 8)
        decay = self.cosine(0.04, 0.4, number / 9)
        momentum = self.cosine(0.9, 1.0, number / 9)
        temperature = 0.04 + min(number / 2, 1) * (0.07 - 0.04)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.param_groups[0]["weight_decay"] = decay

        with torch.no_grad():
            teacher = [self.scores(self.teacher, view).float() for view in views[:2]]
        student = [self.scores(self.student, view) for view in views]
        losses = []
        for g, seen in enumerate(teacher):
            target = self.targets(torch.cat(teacher), temperature)[g * len(seen) : (g + 1) * len(seen)]
            for v, scores in enumerate(student):
                if v != g:
                    losses.append(-(target * F.log_softmax(scores.float() / 0.1, dim=1)).sum(dim=1).mean())
        loss = sum(losses) / len(losses)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.config.optim.clip_grad)
        self.optimizer.step()
        with torch.no_grad():
            for mine, followed in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mine.copy_(momentum * mine + (1 - momentum) * followed)
        self.centre = 0.9 * self.centre + 0.1 * torch.cat(teacher).mean(dim=0)
        return loss.item(), norm.item()

    def targets(self, scores: Tensor, temperature: float) -> Tensor:
        if self.config.objective.centering == "centre":
            return F.softmax((scores - self.centre) / temperature, dim=1)
        q = torch.exp(scores.double() / temperature)
        for _ in range(3):
            q = q / q.sum(dim=0, keepdim=True)
            q = q / q.sum(dim=1, keepdim=True)
        return q.float()


OPTIONS = {
    "centre": {},
    "sinkhorn": {"objective.centering": "sinkhorn"},
    "no local crops": {"views.local_crops": 0},
    "local crops of the global size": {"views.local_size": 16},
    "tight clipping": {"optim.clip_grad": 0.05},
    "learned prototype lengths": {"objective.norm_last_layer": False},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_three_steps_are_dinos_algorithm(option, accelerator, tiny):
    config = tiny(OPTIONS[option])
    trainer = build(accelerator, config)
    reference = Reference(config, trainer.student, trainer.teacher)
    for number in range(3):
        views = views_of_batch(config, number)
        expected_loss, expected_norm = reference.step(number, views)
        found = trainer.step(number, packed(views))
        assert found["loss/dino"].item() == pytest.approx(expected_loss, rel=1e-5)
        assert found["health/gradient_norm"].item() == pytest.approx(expected_norm, rel=1e-4)
    assert_same(weights(trainer.student), weights(reference.student), rtol=1e-4, atol=1e-5)
    assert_same(weights(trainer.teacher), weights(reference.teacher), rtol=1e-4, atol=1e-5)
    if isinstance(trainer.targets.dino, Centre):
        torch.testing.assert_close(trainer.targets.dino.center[0], reference.centre, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("option", ["centre", "sinkhorn", "no local crops"])
def test_micro_batches_equal_one_large_batch(option, parts, fresh_accelerate, tiny):
    """Nothing that belongs to the step (teacher, centre, balance, rates) may see single micro-batches."""
    found = []
    for accumulation in (1, parts):
        config = tiny({**OPTIONS[option], "train.accumulation": accumulation})
        trainer = build(Accelerator(cpu=True, mixed_precision="no"), config)
        losses = [
            trainer.step(number, packed(views_of_batch(config, number), accumulation))["loss/dino"].item()
            for number in range(3)
        ]
        found.append((losses, weights(trainer.student), weights(trainer.teacher), weights(trainer.targets)))
    (whole_losses, *whole), (parts_losses, *in_parts) = found
    assert parts_losses == pytest.approx(whole_losses, rel=1e-5)
    for one, other in zip(whole, in_parts, strict=True):
        assert_same(one, other, rtol=1e-4, atol=1e-5)


def test_rates_move_with_steps_and_not_with_micro_batches(accelerator, tiny):
    trainer = build(accelerator, tiny({"train.accumulation": 4}))
    trainer.step(0, packed(views_of_batch(trainer.step.config, 0), 4))
    states = list(trainer.optimizer.state.values())
    assert {float(state["step"]) for state in states} == {1.0}
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.005, 0.005]


class TestTeacher:
    def test_gets_no_gradient(self, accelerator, tiny):
        trainer = build(accelerator, tiny())
        trainer.step(0, packed(views_of_batch(trainer.step.config, 0)))
        assert all(value.grad is None and not value.requires_grad for value in trainer.teacher.parameters())

    def test_starts_as_the_student_without_its_stochastic_depth(self, tiny):
        torch.manual_seed(0)
        student, teacher = build_networks(tiny({"model.drop_path": 0.3}))
        assert_untouched(weights(student), weights(teacher))
        assert [block.drop_path.rate for block in student.backbone.blocks] == pytest.approx([0.0, 0.3])
        assert {block.drop_path.rate for block in teacher.backbone.blocks} == {0.0}

    @pytest.mark.parametrize("option", ["centre", "sinkhorn", "local crops of the global size"])
    def test_sees_only_global_crops(self, option, accelerator, tiny, monkeypatch):
        """Other local crops leave what the teacher says, and with it targets and centre, as it was."""
        config = tiny(OPTIONS[option])
        trainer = build(accelerator, config)
        targets, losses = [], []

        def spy(student, teacher, temperature):
            targets.append(teacher)
            return original(student, teacher, temperature)

        original = step_module.dino_loss
        monkeypatch.setattr(step_module, "dino_loss", spy)
        start = [weights(module) for module in (trainer.student, trainer.teacher, trainer.targets)]
        centres = []
        for seed in (1, 2):
            for module, state in zip((trainer.student, trainer.teacher, trainer.targets), start, strict=True):
                module.load_state_dict(state)
            views = views_of_batch(config, 0)[:2] + views_of_batch(config, seed)[2:]
            losses.append(trainer.step(0, packed(views))["loss/dino"].item())
            centres.append(weights(trainer.targets))
        assert torch.equal(targets[0], targets[1])
        assert_untouched(centres[0], centres[1])
        assert losses[0] != losses[1]


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_last_layer_stands_still_while_frozen(steps, accelerator, tiny):
    """Neither gradients, nor weight decay, nor moments gathered meanwhile move the prototypes; all else moves."""
    config = tiny({"objective.freeze_last_layer_steps": steps, "objective.norm_last_layer": False})
    trainer = build(accelerator, config)
    for number in range(3):
        before = weights(trainer.student)
        trainer.step(number, packed(views_of_batch(config, number)))
        after = weights(trainer.student)
        same = {name for name in before if torch.equal(before[name], after[name])}
        frozen = {"head.last_layer.weight_v", "head.last_layer.weight_g"}
        assert same == (frozen if number < steps else set())
        moments = [
            value for value in trainer.student.head.last_layer.parameters() if trainer.optimizer.state.get(value)
        ]
        assert bool(moments) == (number >= steps)


def break_loss(monkeypatch, at: int) -> None:
    """Make the loss of one step NaN, as an overflow in the student would."""
    original, calls = step_module.dino_loss, [0]

    def broken(*arguments):
        calls[0] += 1
        return original(*arguments) * (math.nan if calls[0] - 1 == at else 1)

    monkeypatch.setattr(step_module, "dino_loss", broken)


class TestBrokenSteps:
    def run(self, trainer: Trainer, steps: range) -> None:
        for number in steps:
            trainer.step(number, packed(views_of_batch(trainer.step.config, number)))

    def moments(self, trainer: Trainer) -> dict[str, Tensor]:
        return {
            f"{index}.{key}": value.clone()
            for index, state in trainer.optimizer.state_dict()["state"].items()
            for key, value in state.items()
        }

    def test_change_no_weight_of_the_student_and_no_moment(self, accelerator, tiny, monkeypatch):
        trainer = build(accelerator, tiny())
        break_loss(monkeypatch, at=1)
        self.run(trainer, range(1))
        before, moments = weights(trainer.student), self.moments(trainer)
        self.run(trainer, range(1, 2))
        assert_untouched(weights(trainer.student), before)
        assert_untouched(self.moments(trainer), moments)

    def test_leave_the_teacher_following_the_unchanged_student(self, accelerator, tiny, monkeypatch):
        trainer = build(accelerator, tiny())
        break_loss(monkeypatch, at=1)
        self.run(trainer, range(1))
        before, student = weights(trainer.teacher), weights(trainer.student)
        self.run(trainer, range(1, 2))
        momentum = trainer.step.schedules.momentum(1)
        expected = {name: momentum * before[name] + (1 - momentum) * student[name] for name in before}
        assert_same(weights(trainer.teacher), expected, rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize("centering", ["centre", "sinkhorn"])
    def test_by_pixels_that_are_not_numbers_leave_everything_finite(self, centering, accelerator, tiny):
        trainer = build(accelerator, tiny({"objective.centering": centering}))
        self.run(trainer, range(1))
        before = weights(trainer.student)
        shift = trainer.step.normalise.shift.clone()
        trainer.step.normalise.shift.fill_(math.nan)
        self.run(trainer, range(1, 2))
        trainer.step.normalise.shift.copy_(shift)
        assert_untouched(weights(trainer.student), before)
        for module in (trainer.student, trainer.teacher, trainer.targets):
            assert all(value.isfinite().all() for value in module.state_dict().values())
        assert int(trainer.step.first_broken) == 1
        self.run(trainer, range(2, 3))
        assert all(value.isfinite().all() for value in trainer.student.parameters())

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_by_a_gradient_under_a_finite_loss_are_noticed_too(self, bad, accelerator, tiny):
        trainer = build(accelerator, tiny())
        self.run(trainer, range(1))
        before = weights(trainer.student)
        hook = trainer.student.backbone.cls_token.register_hook(lambda gradient: gradient + bad)
        self.run(trainer, range(1, 2))
        hook.remove()
        assert_untouched(weights(trainer.student), before)
        assert int(trainer.step.first_broken) == 1

    def test_the_first_one_is_remembered(self, accelerator, tiny, monkeypatch):
        trainer = build(accelerator, tiny())
        assert int(trainer.step.first_broken) == -1
        break_loss(monkeypatch, at=2)
        self.run(trainer, range(2))
        assert int(trainer.step.first_broken) == -1
        self.run(trainer, range(2, 4))
        monkeypatch.undo()
        break_loss(monkeypatch, at=0)
        self.run(trainer, range(4, 6))
        assert int(trainer.step.first_broken) == 2

    def test_one_broken_micro_batch_breaks_the_step(self, accelerator, tiny, monkeypatch):
        trainer = build(accelerator, tiny({"train.accumulation": 2}))
        break_loss(monkeypatch, at=0)
        before = weights(trainer.student)
        trainer.step(0, packed(views_of_batch(trainer.step.config, 0), 2))
        assert_untouched(weights(trainer.student), before)
        assert int(trainer.step.first_broken) == 0


def test_metrics_stay_on_the_device_and_carry_no_graph(accelerator, tiny):
    found = build(accelerator, tiny()).step(0, packed(views_of_batch(tiny(), 0)))
    assert set(found) == {"loss/dino", "health/gradient_norm"}
    assert all(value.shape == () and not value.requires_grad for value in found.values())


def test_normalise_is_to_tensor_and_normalize():
    """torchvision's two operations, on every value a pixel can have."""
    from torchvision.transforms.v2 import functional

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    expected = functional.normalize(functional.to_dtype(pixels, torch.float32, scale=True), mean, std)
    torch.testing.assert_close(Normalise(mean, std)(pixels), expected, rtol=1e-5, atol=1e-6)
