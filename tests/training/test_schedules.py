"""Schedules reach their start, peak and end exactly, at the step that each belongs to."""

import math

import numpy as np
import pytest

from dino.config.schema import Config
from dino.training.schedules import Schedule, schedules


def published(start: float, peak: float, end: float, warmup: int, steps: int) -> np.ndarray:
    """Linear warm-up, then half a cosine, as two lists put together (after DINO's utils.cosine_scheduler).

    The published list has its peak twice and never reaches its end; here the cosine takes one step more, so that both
    are reached once.
    """
    rise = np.linspace(start, peak, warmup, endpoint=False)
    fall = end + 0.5 * (peak - end) * (1 + np.cos(np.pi * np.linspace(0, 1, steps - warmup)))
    return np.concatenate([rise, fall])


@pytest.mark.parametrize("warmup", [0, 1, 10, 97])
@pytest.mark.parametrize(("start", "peak", "end"), [(0.0, 1e-3, 1e-6), (0.04, 0.07, 0.07), (0.0, 0.996, 1.0)])
def test_linear_then_cosine(warmup, start, peak, end):
    schedule = Schedule(peak, end, 100, start=start, warmup=warmup)
    np.testing.assert_allclose([schedule(step) for step in range(100)], published(start, peak, end, warmup, 100))


@pytest.mark.parametrize("warmup", [1, 10, 50])
def test_start_peak_and_end_are_exact(warmup):
    schedule = Schedule(peak=0.3, end=1e-6, steps=100, start=0.1, warmup=warmup)
    assert schedule(0) == 0.1
    assert schedule(warmup) == 0.3
    assert schedule(99) == 1e-6
    assert max(schedule(step) for step in range(100)) == 0.3
    assert [schedule(step) for step in range(100)].count(0.3) == 1


def test_values_worked_by_hand():
    schedule = Schedule(peak=1.0, end=0.0, steps=14, start=0.2, warmup=5)  # the cosine spans steps 5 … 13
    assert schedule(1) == pytest.approx(0.36)
    assert schedule(4) == pytest.approx(0.84)
    assert schedule(7) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert schedule(9) == pytest.approx(0.5)


def test_without_warmup_the_first_step_has_the_peak():
    schedule = Schedule(peak=0.04, end=0.4, steps=100)
    assert schedule(0) == 0.04
    assert schedule(99) == 0.4


def test_equal_peak_and_end_are_constant():
    assert {Schedule(0.07, 0.07, 100)(step) for step in range(100)} == {0.07}


def test_after_the_last_step_the_end_is_kept():
    assert Schedule(1.0, 0.25, 10)(10_000) == 0.25


def test_a_run_of_one_step_takes_the_end():
    assert Schedule(peak=1.0, end=0.25, steps=1)(0) == 0.25


@pytest.mark.parametrize("warmup", [10, 25])
def test_a_warmup_as_long_as_the_run_rises_to_its_last_step(warmup):
    """The rise keeps its slope; nothing falls afterwards, as nothing comes afterwards."""
    schedule = Schedule(peak=1.0, end=0.0, steps=10, start=0.0, warmup=warmup)
    np.testing.assert_allclose([schedule(step) for step in range(10)], np.arange(10) / warmup)


def run(**values) -> Config:
    """A config as if resolved: ten steps, published rates."""
    config = Config()
    config.train.steps = 1000
    config.optim.lr, config.optim.warmup_steps = 0.002, 100
    config.objective.teacher_temperature, config.objective.teacher_temperature_warmup = 0.07, 300
    config.objective.teacher_momentum, config.objective.teacher_momentum_end = 0.996, 1.0
    for key, value in values.items():
        group, name = key.split("__")
        setattr(getattr(config, group), name, value)
    return config


class TestOfARun:
    def test_published_course(self):
        plan = schedules(run())
        first, last = plan.at(0), plan.at(999)
        assert plan.lr(100) == 0.002
        assert last == {
            "optim/lr": 1e-6,
            "optim/weight_decay": 0.4,
            "teacher/momentum": 1.0,
            "teacher/temperature": 0.07,
        }
        assert first["optim/weight_decay"] == 0.04
        assert first["teacher/momentum"] == 0.996
        assert first["teacher/temperature"] == 0.04
        assert plan.temperature(150) == pytest.approx(0.055)  # half-way up
        assert {plan.temperature(step) for step in range(300, 1000)} == {0.07}

    def test_the_first_step_learns_something(self):
        """DINO's own schedule begins with a rate of 0, which wastes a step; a warm-up of 100 begins with 1/101."""
        plan = schedules(run())
        assert plan.lr(0) == pytest.approx(0.002 / 101)
        rise = [plan.lr(step + 1) - plan.lr(step) for step in range(100)]
        np.testing.assert_allclose(rise, 0.002 / 101)

    def test_without_warmup_the_learning_rate_begins_at_its_peak(self):
        assert schedules(run(optim__warmup_steps=0)).lr(0) == 0.002

    def test_temperature_may_start_at_its_end(self):
        plan = schedules(run(objective__teacher_temperature=0.04, objective__teacher_temperature_warmup=0))
        assert {plan.temperature(step) for step in range(1000)} == {0.04}

    @pytest.mark.parametrize("steps", [1, 2, 3])
    def test_the_shortest_runs_have_finite_rates(self, steps):
        plan = schedules(run(train__steps=steps, optim__warmup_steps=0))
        for step in range(steps):
            assert all(math.isfinite(value) for value in plan.at(step).values())
