"""What health reports of fabricated teachers whose state is known."""

import copy
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from accelerate import Accelerator
from scipy.stats import entropy
from sklearn.neighbors import KNeighborsClassifier

from dino.config.schema import Config
from dino.monitor.health import QUEUE, Health, TeacherOutput

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

    @pytest.mark.parametrize("every", [1, 10, 15, 20, 40, 70, 1000])
    @pytest.mark.parametrize("log_every", [5, 10, 15])
    @pytest.mark.parametrize("start", [0, 30, 60])  # log points of each
    def test_at_the_first_log_point_of_each_period_and_at_the_end(self, health, every, log_every, start):
        """Also after a resume: what an uninterrupted run would still have measured."""
        watch = health(start=start, **{"monitor.health_every": every, "monitor.log_every": log_every})
        measured, expected, before = [], [], start
        for taken in (*range(start + log_every, 100, log_every), 100):
            if any(step % every == 0 for step in range(before + 1, taken + 1)) or taken == 100:
                expected.append(taken)
            before = taken
            if watch.is_due(taken):
                measured.append(taken)
                watch.observe(output(), range(B))
                watch.measure(taken)
        assert measured == expected

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
        assert found["health/kl_to_center"] == pytest.approx(0, abs=1e-5)

    def test_one_prototype(self, health):
        watch = health()
        watch.observe(output(torch.eye(K)[3].expand(2, B, K)), range(B))
        found = watch.measure(1)
        assert found["health/entropy_ratio"] == pytest.approx(0, abs=1e-6)
        assert found["health/kl_to_center"] == pytest.approx(0, abs=1e-6)
        assert found["health/prototypes_in_use"] == pytest.approx(1 / K)

    def test_certain_and_balanced(self, health):
        """Each image its own prototype, as at the end of a run that went well: KL is that of a fair draw of them."""
        watch = health()
        targets = torch.eye(K)[torch.arange(2 * B) % K].view(2, B, K)
        watch.observe(output(targets), range(B))
        found = watch.measure(1)
        assert found["health/entropy_ratio"] == pytest.approx(0, abs=1e-6)
        assert found["health/kl_to_center"] == pytest.approx(entropy(targets.mean(dim=(0, 1)).numpy()), rel=1e-5)
        assert found["health/prototypes_in_use"] == 1

    def test_against_scipy_and_of_the_last_step_alone(self, health):
        watch = health()
        watch.observe(output(torch.full((2, B, K), 1 / K)), range(B))
        last = output(torch.softmax(2 * output(seed=3).logits, dim=2), seed=4)
        watch.observe(last, range(B))
        found, rows = watch.measure(2), last.targets.flatten(0, 1).double().numpy()
        entropies = [entropy(row) for row in rows]
        assert found["health/teacher_entropy"] == pytest.approx(np.mean(entropies), rel=1e-5)
        assert found["health/entropy_ratio"] == pytest.approx(np.mean(entropies) / np.log(K), rel=1e-5)
        divergences = [entropy(row, rows.mean(axis=0)) for row in rows]
        assert found["health/kl_to_center"] == pytest.approx(np.mean(divergences), rel=1e-4)
        mean = last.logits.flatten(0, 1).numpy().mean(axis=0)
        assert found["health/center_norm"] == pytest.approx(np.linalg.norm(mean), rel=1e-5)

    def test_fewer_views_than_prototypes_can_still_use_all_they_could(self, health):
        watch = health()
        watch.observe(output(torch.eye(K)[:4].view(2, 2, K), torch.randn(2, 2, D)), range(2))
        assert watch.measure(1)["health/prototypes_in_use"] == 1

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

    def test_votes_are_scikit_learns_among_other_images(self, health):
        """Classes that overlap, and images that come twice with other tokens."""
        generator, labels = torch.Generator().manual_seed(0), [str(index % 3) for index in range(40)]
        watch, tokens, indices = health(labels=labels), [], []
        for _ in range(12):
            chosen = torch.randint(0, 40, (B,), generator=generator).tolist()
            views = torch.randn(2, B, D, generator=generator)
            views[..., 0] += torch.tensor([1.5 * (index % 3) for index in chosen])
            watch.observe(output(tokens=views), chosen)
            tokens += views[0].tolist()
            indices += chosen
        values, classes = np.array(tokens), np.array([int(labels[index]) for index in indices])
        right = []
        for place, index in enumerate(indices):
            others = [other for other, image in enumerate(indices) if image != index]
            peer = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
            right.append(peer.fit(values[others], classes[others]).predict(values[place : place + 1])[0])
        accuracy = np.mean(np.array(right) == classes)
        assert watch.measure(1)["health/knn"] == pytest.approx(accuracy, abs=1e-6)
        assert 0.4 < accuracy < 0.95

    def test_two_views_agree_on_other_images_only(self, health):
        """Whoever counted an image's own earlier tokens, nearest to both of its views, would find more in common."""
        watch, generator = health(), torch.Generator().manual_seed(0)
        earlier = torch.randn(80, D, generator=generator)
        for first in range(0, 80, B):
            part = earlier[first : first + B]
            watch.observe(output(tokens=torch.stack([part, part])), range(first, first + B))
        views = earlier[:B] + 0.5 * torch.randn(2, B, D, generator=generator)
        watch.observe(output(tokens=views), range(B))
        queue, indices = torch.cat([earlier, views[0]]), [*range(80), *range(B)]
        shares = []
        for image in range(B):
            near = []
            for view in views[:, image]:
                similarity = torch.cosine_similarity(view[None], queue).tolist()
                ranked = sorted((place for place in range(88) if indices[place] != image), key=lambda i: -similarity[i])
                near.append(set(ranked[:10]))
            shares.append(len(near[0] & near[1]) / 10)
        assert watch.measure(1)["health/neighbour_agreement"] == pytest.approx(np.mean(shares))

    def test_rank_and_spread_are_those_of_the_queue(self, health):
        watch, tokens = health(), []
        for step in range(20):
            made = output(seed=step).tokens * torch.linspace(0.1, 2, D)
            watch.observe(output(tokens=made), range(B))
            tokens.append(made[0])
        found, queue = watch.measure(20), torch.cat(tokens).double().numpy()
        values = np.linalg.svd(queue, compute_uv=False)
        assert found["health/rank_me"] == pytest.approx(np.exp(entropy(values)), rel=1e-4)
        directions = queue / np.linalg.norm(queue, axis=1, keepdims=True)
        assert found["health/feature_std"] == pytest.approx(directions.std(axis=0, ddof=1).mean() * D**0.5, rel=1e-4)

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


def test_looking_changes_nothing(health):
    """Neither what it is given, nor the random state, nor by a gradient."""
    watch, given = health(labels=["a", "b"] * 16), output()
    kept, state = copy.deepcopy(given), torch.get_rng_state()
    for step in range(10):
        watch.observe(given, [(step * B + place) % 32 for place in range(B)])
        watch.measure(step)
    assert all(torch.equal(one, other) for one, other in zip(given, kept, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert not watch.tokens.requires_grad


STEPS, SHARED = 12, 2  # steps of 2 · B images, and the processes that share them


def shares(rank: int, processes: int) -> list[tuple[TeacherOutput, list[int]]]:
    """What a process sees of steps whose halves are unlike: other classes, other prototypes, other spread."""
    seen = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        tokens, logits = (torch.randn(2, 2 * B, width, generator=generator) for width in (D, K))
        tokens[:, B:, 4:] *= 0.1
        logits[:, B:, : K // 2] += 4
        logits[:, :B, K // 2 :] += 4
        indices = [(step * 2 * B + place) % 50 for place in range(2 * B)]
        part = slice(rank * 2 * B // processes, (rank + 1) * 2 * B // processes)
        targets = torch.softmax(3 * logits, dim=2)
        seen.append((TeacherOutput(tokens[:, part], logits[:, part], targets[:, part]), indices[part]))
    return seen


def measured(accelerator: Accelerator, config: Config, rank: int, processes: int) -> list[dict[str, float]]:
    """Twice: after the first half of the steps, and at the end."""
    watch, found = Health(accelerator, config, [str(index % 5) for index in range(50)], 0), []
    for step, (seen, indices) in enumerate(shares(rank, processes), 1):
        watch.observe(seen, indices)
        if step in (STEPS // 2, STEPS):
            found.append(watch.measure(step))
    return found


def process(rank: int, config: Config, folder: str) -> None:
    """One of the processes that share the steps."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(SHARED), LOCAL_WORLD_SIZE=str(SHARED))
    os.environ.update(OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=SHARED)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    assert accelerator.num_processes == SHARED
    torch.save(measured(accelerator, config, rank, SHARED), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_find_what_one_does(accelerator, tiny, tmp_path):
    """Statistics of targets are those of the whole batch; rank and neighbours the mean of both processes' own."""
    config = tiny({"train.steps": STEPS})
    whole = measured(accelerator, config, 0, 1)
    halves = [measured(accelerator, config, rank, SHARED) for rank in range(SHARED)]  # each as if it were alone
    multiprocessing.spawn(process, (config, str(tmp_path)), nprocs=SHARED)
    both = [torch.load(Path(tmp_path) / f"{rank}.pt") for rank in range(SHARED)]
    assert both[0] == both[1]
    own = {"health/rank_me", "health/feature_std", "health/knn"}
    for found, one, *parts in zip(both[0], whole, *halves, strict=True):
        assert found.keys() == parts[0].keys()
        for name, value in found.items():
            wanted = np.mean([part[name] for part in parts]) if name in own else one[name]
            assert value == pytest.approx(wanted, rel=1e-4), name
    assert both[0][1].keys() >= own
    for name in ("health/kl_to_center", "health/prototypes_in_use", "health/center_norm"):
        means = np.mean([half[1][name] for half in halves])
        assert both[0][1][name] != pytest.approx(means, rel=0.05), f"{name}: the halves are too much alike to tell"
