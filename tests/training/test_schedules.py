"""Schedules reach their start, peak and end exactly, at the step that each belongs to."""

import math

import numpy as np
import pytest
from builders import with_settings

from dino.config.schema import Config
from dino.methods.dino import DINO
from dino.methods.schedule import Schedule
from dino.training.schedules import optimizer_schedules


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
def test_linear_then_cosine_with_exact_start_peak_and_end(warmup, start, peak, end):
    schedule = Schedule(peak, end, 100, start=start, warmup=warmup)
    np.testing.assert_allclose([schedule(step) for step in range(100)], published(start, peak, end, warmup, 100))
    assert schedule(0) == (start if warmup else peak)
    assert (schedule(warmup), schedule(99), schedule(10_000)) == (peak, end, end)


def test_values_worked_by_hand():
    schedule = Schedule(peak=1.0, end=0.0, steps=14, start=0.2, warmup=5)  # the cosine spans steps 5 … 13
    assert schedule(1) == pytest.approx(0.36)
    assert schedule(4) == pytest.approx(0.84)
    assert schedule(7) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert schedule(9) == pytest.approx(0.5)


def test_a_run_of_one_step_takes_the_end():
    assert Schedule(peak=1.0, end=0.25, steps=1)(0) == 0.25


@pytest.mark.parametrize("warmup", [10, 25])
def test_a_warmup_as_long_as_the_run_rises_to_its_last_step(warmup):
    """The rise keeps its slope; nothing falls afterwards, as nothing comes afterwards."""
    schedule = Schedule(peak=1.0, end=0.0, steps=10, start=0.0, warmup=warmup)
    np.testing.assert_allclose([schedule(step) for step in range(10)], np.arange(10) / warmup)


def run(changes: dict | None = None) -> Config:
    """As if resolved, with published rates."""
    values = {
        "train.steps": 1000,
        "optim.lr": 0.002,
        "optim.warmup_steps": 100,
        "objective.teacher_temperature": 0.07,
        "objective.teacher_temperature_warmup": 300,
        "objective.teacher_momentum": 0.996,
        "objective.teacher_momentum_end": 1.0,
    }
    return with_settings(values | (changes or {}))


def rates(config: Config, step: int) -> dict[str, float]:
    schedules = optimizer_schedules(config) | DINO.make_schedules(config)
    return {name: schedule(step) for name, schedule in schedules.items()}


def test_published_course_of_a_run():
    """But for the first step: DINO's own begins with a rate of 0, which wastes it; a warm-up of 100 with 1/101."""
    names = ("optim/lr", "optim/weight_decay", "teacher/momentum", "teacher/temperature")
    assert rates(run(), 0) == dict(zip(names, (pytest.approx(0.002 / 101), 0.04, 0.996, 0.04), strict=True))
    assert rates(run(), 999) == dict(zip(names, (1e-6, 0.4, 1.0, 0.07), strict=True))
    rise = [rates(run(), step)["optim/lr"] for step in range(101)]
    np.testing.assert_allclose(np.diff(rise), 0.002 / 101)
    assert rise[100] == 0.002
    assert rates(run(), 150)["teacher/temperature"] == pytest.approx(0.055)  # half-way up
    assert {rates(run(), step)["teacher/temperature"] for step in range(300, 1000, 50)} == {0.07}


@pytest.mark.parametrize("steps", [1, 2, 3, 1000])
def test_runs_without_warmups_begin_with_the_peak_however_short(steps):
    config = run({"train.steps": steps, "optim.warmup_steps": 0, "objective.teacher_temperature_warmup": 0})
    assert all(math.isfinite(value) for step in range(steps) for value in rates(config, step).values())
    assert rates(config, 0)["teacher/temperature"] == 0.07
    assert rates(config, 0)["optim/lr"] == (0.002 if steps > 1 else 1e-6)
