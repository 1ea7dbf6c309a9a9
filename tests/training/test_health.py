"""What health reports of fabricated teachers whose state is known."""

import math

import pytest
import torch

from dino.training.health import QUEUE, Health, TeacherOutput

K, D, B = 12, 16, 8  # prototypes as in the tiny config


@pytest.fixture
def health(accelerator, tiny):
    def build(labels=None, start: int = 0, **changes) -> Health:
        config = tiny({"monitor.health_every": 20, "monitor.log_every": 15, "train.steps": 100, **changes})
        return Health(accelerator, config, labels, start)

    return build


def output(targets: torch.Tensor | None = None, tokens: torch.Tensor | None = None, seed: int = 0) -> TeacherOutput:
    """Both views of B images; balanced certain targets and random tokens unless given."""
    generator = torch.Generator().manual_seed(seed)
    if targets is None:
        targets = torch.eye(K)[torch.arange(2 * B) % K].view(2, B, K)
    if tokens is None:
        tokens = torch.randn(2, B, D, generator=generator)
    return TeacherOutput(tokens, torch.randn(2, B, K, generator=generator), targets)


def fill(health: Health, steps: int, images: int = 4 * B) -> None:
    for step in range(steps):
        health.observe(output(seed=step), [(step * B + place) % images for place in range(B)])


class TestWhen:
    def test_a_period_that_is_no_multiple_of_the_log_points(self, health):
        watch = health()
        measured = []
        for taken in range(15, 101, 15):  # log points; 100 is the last step
            if watch.is_due(taken):
                measured.append(taken)
                watch.observe(output(), range(B))
                watch.measure(taken)
        assert measured == [30, 45, 60, 90]
        assert watch.is_due(100)

    def test_never(self, health):
        watch = health(**{"monitor.health_every": 0})
        assert not any(watch.is_due(taken) for taken in range(101))

    def test_a_resumed_run_goes_on_from_its_start(self, health):
        watch = health(start=60)
        assert not watch.is_due(75)
        assert watch.is_due(80)

    def test_nothing_to_measure_yet(self, health):
        assert health().measure(10) == {}


class TestTargets:
    def test_uniform(self, health):
        watch = health()
        watch.observe(output(torch.full((2, B, K), 1 / K)), range(B))
        found = watch.measure(1)
        assert found["health/teacher_entropy"] == pytest.approx(math.log(K), rel=1e-5)
        assert found["health/entropy_ratio"] == pytest.approx(1, rel=1e-5)
        assert found["health/kl_to_centre"] == pytest.approx(0, abs=1e-5)

    def test_one_prototype(self, health):
        watch = health()
        watch.observe(output(torch.eye(K)[3].expand(2, B, K)), range(B))
        found = watch.measure(1)
        assert found["health/entropy_ratio"] == pytest.approx(0, abs=1e-6)
        assert found["health/kl_to_centre"] == pytest.approx(0, abs=1e-6)
        assert found["health/prototypes_in_use"] == pytest.approx(1 / K)

    def test_prototypes_are_counted_over_steps_and_anew_after_each_measure(self, health):
        watch = health()
        for first in (0, 1):  # of two prototypes each
            watch.observe(output(torch.eye(K)[2 * first + torch.arange(2 * B) % 2].view(2, B, K)), range(B))
        assert watch.measure(1)["health/prototypes_in_use"] == pytest.approx(4 / K)
        watch.observe(output(torch.eye(K)[:1].expand(2 * B, K).view(2, B, K)), range(B))
        assert watch.measure(2)["health/prototypes_in_use"] == pytest.approx(1 / K)


class TestNeighbours:
    def test_an_image_is_never_its_own_neighbour(self, health):
        """Each image comes twice with the very same token; its class is that of no other image near it."""
        watch = health(labels=[str(index) for index in range(64)])
        tokens = torch.randn(2, 64, D, generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            for first in range(0, 64, B):
                watch.observe(output(tokens=tokens[:, first : first + B]), range(first, first + B))
        assert watch.measure(1)["health/knn"] == 0

    def test_classes_that_lie_apart_are_named(self, health):
        watch = health(labels=["a", "b"] * 64)
        for step in range(16):
            indices = range(step * B, (step + 1) * B)
            tokens = torch.randn(2, B, D, generator=torch.Generator().manual_seed(step))
            tokens[..., 0] += torch.tensor([30.0 if index % 2 else -30.0 for index in indices])
            watch.observe(output(tokens=tokens), indices)
        assert watch.measure(1)["health/knn"] == 1

    def test_views_that_agree_and_views_that_do_not(self, health):
        for same, wanted in ((True, 1.0), (False, 0.35)):
            watch = health()
            fill(watch, 15, images=1000)
            tokens = output(seed=99).tokens
            tokens[1] = tokens[0] if same else torch.randn(B, D, generator=torch.Generator().manual_seed(7))
            watch.observe(output(tokens=tokens), range(900, 900 + B))
            found = watch.measure(1)["health/neighbour_agreement"]
            assert found == pytest.approx(1) if same else found < wanted

    def test_few_tokens_say_nothing(self, health):
        watch = health(labels=["a", "b"] * 100)
        watch.observe(output(), range(B))
        assert not {"health/knn", "health/rank_me", "health/feature_std"} & watch.measure(1).keys()

    def test_the_queue_keeps_the_newest(self, health):
        watch = health()
        for step in range(QUEUE // B + 3):
            watch.observe(output(tokens=torch.full((2, B, D), float(step))), [step] * B)
        assert watch.tokens.shape == (QUEUE, D)
        assert watch.indices.tolist() == [step for step in range(3, QUEUE // B + 3) for _ in range(B)]
        assert watch.tokens[:, 0].tolist() == [float(index) for index in watch.indices]
