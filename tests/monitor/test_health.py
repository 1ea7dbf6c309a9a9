"""What health reports of a fabricated method whose state is known."""

import copy
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import worlds
from accelerate import Accelerator
from scipy.stats import entropy
from sklearn.neighbors import KNeighborsClassifier

from dino.config.schema import Config
from dino.methods import Seen
from dino.monitor.health import QUEUE, Health

K, D, B = 12, 16, 8  # prototypes as in the tiny config
SCHEDULE = {"monitor.health_every": 20, "monitor.log_every": 15, "train.steps": 100}


class Watch(Health):
    """Health of a method that has seen what a test says."""

    def __init__(self, accelerator: Accelerator, config: Config, labels: list[str] | None = None, start: int = 0):
        self.fake = SimpleNamespace(seen=None, outputs=lambda config: K)
        of_pool = None
        if labels is not None:
            classes, codes = np.unique(labels, return_inverse=True)
            of_pool = SimpleNamespace(classes=classes.tolist(), codes=codes)
        super().__init__(accelerator, config, self.fake, of_pool)
        self.measured = start

    def show(self, seen: Seen, indices=range(B)) -> "Watch":
        self.fake.seen = seen
        self.observe(indices)
        return self


@pytest.fixture
def health(accelerator, tiny):
    def build(labels: list[str] | None = None, start: int = 0, **changes) -> Watch:
        return Watch(accelerator, tiny(SCHEDULE | changes), labels, start)

    return build


def tokens_of(seed: int, images: int = B) -> torch.Tensor:
    return torch.randn(2, images, D, generator=torch.Generator().manual_seed(seed))


def seen(targets: torch.Tensor | None = None, tokens: torch.Tensor | None = None, seed: int = 0) -> Seen:
    """Both views of B images; balanced certain targets and random tokens unless given."""
    logits = torch.randn(2, B, K, generator=torch.Generator().manual_seed(seed))
    balanced = torch.eye(K)[torch.arange(2 * B) % K].view(2, B, K)
    return Seen(
        tokens=tokens_of(seed) if tokens is None else tokens,
        logits=logits,
        targets=balanced if targets is None else targets,
    )


class TestWhen:
    @pytest.mark.parametrize("every", [1, 10, 15, 20, 40, 70, 1000])
    @pytest.mark.parametrize("log_every", [5, 10, 15])
    @pytest.mark.parametrize("start", [0, 30, 60])  # log points of each
    def test_at_the_first_log_point_of_each_period_and_at_the_end(self, health, every, log_every, start):
        """Also after a resume: what an uninterrupted run would still have measured."""
        watch = health(start=start, **{"monitor.health_every": every, "monitor.log_every": log_every})
        measured, expected, before = [], [], start
        for steps in (*range(start + log_every, 100, log_every), 100):
            if any(step % every == 0 for step in range(before + 1, steps + 1)) or steps == 100:
                expected.append(steps)
            before = steps
            if watch.is_due(steps):
                measured.append(steps)
                watch.show(seen()).measure(steps)
        assert measured == expected

    def test_never(self, health):
        watch = health(**{"monitor.health_every": 0})
        assert not any(watch.is_due(steps) for steps in range(101))

    def test_nothing_to_measure_yet(self, health):
        watch = health()
        watch.observe(range(B))
        assert watch.measure(10) == {}


def test_one_that_goes_on_measures_what_one_without_a_break_does(health):
    """Rank and neighbours are of many steps: without those before the break they would be of a few images."""
    whole, first = health(), health()
    for step in range(20):
        for watch in (whole, first):
            watch.show(seen(seed=step), range(step * B, step * B + B))
    second = health()
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    second.views = first.views
    for watch in (whole, second):
        watch.show(seen(seed=20), range(B))
    values = whole.measure(21)
    assert values["health/rank_me"] > 1
    assert second.measure(21) == values


class TestTargets:
    @pytest.mark.parametrize(
        ("targets", "ratio", "divergence", "in_use"),
        [
            (torch.full((2, B, K), 1 / K), 1, 0, 1 / K),
            (torch.eye(K)[3].expand(2, B, K), 0, 0, 1 / K),
            # Each image its own prototype, as where a run went well: KL is that of a fair draw of them.
            (seen().targets, 0, entropy(seen().targets.mean(dim=(0, 1)).numpy()), 1),
        ],
        ids=["uniform", "one prototype", "certain and balanced"],
    )
    def test_known_cases(self, health, targets, ratio, divergence, in_use):
        values = health().show(seen(targets)).measure(1)
        assert values["health/teacher_entropy"] == pytest.approx(ratio * math.log(K), abs=1e-5)
        assert values["health/entropy_ratio"] == pytest.approx(ratio, abs=1e-5)
        assert values["health/kl_to_center"] == pytest.approx(divergence, abs=1e-5)
        assert values["health/prototypes_in_use"] == pytest.approx(in_use)

    def test_against_scipy_and_of_the_last_step_alone(self, health):
        watch = health().show(seen(torch.full((2, B, K), 1 / K)))
        last = seen(torch.softmax(2 * seen(seed=3).logits, dim=2), seed=4)
        values, rows = watch.show(last).measure(2), last.targets.flatten(0, 1).double().numpy()
        mean_entropy = np.mean([entropy(row) for row in rows])
        mean_logits = last.logits.flatten(0, 1).numpy().mean(axis=0)
        assert values["health/teacher_entropy"] == pytest.approx(mean_entropy, rel=1e-5)
        assert values["health/entropy_ratio"] == pytest.approx(mean_entropy / np.log(K), rel=1e-5)
        divergences = [entropy(row, rows.mean(axis=0)) for row in rows]
        assert values["health/kl_to_center"] == pytest.approx(np.mean(divergences), rel=1e-4)
        assert values["health/center_norm"] == pytest.approx(np.linalg.norm(mean_logits), rel=1e-5)

    def test_fewer_views_than_prototypes_can_still_use_all_they_could(self, health):
        four = Seen(torch.randn(2, 2, D), torch.zeros(2, 2, K), torch.eye(K)[:4].view(2, 2, K))
        assert health().show(four, range(2)).measure(1)["health/prototypes_in_use"] == 1

    def test_prototypes_are_counted_over_steps_and_anew_after_each_measure(self, health):
        watch = health()
        for first in (0, 2):  # of two prototypes each
            watch.show(seen(torch.eye(K)[first + torch.arange(2 * B) % 2].view(2, B, K)))
        assert watch.measure(1)["health/prototypes_in_use"] == pytest.approx(4 / K)
        watch.show(seen(torch.eye(K)[:1].expand(2 * B, K).view(2, B, K)))
        assert watch.measure(2)["health/prototypes_in_use"] == pytest.approx(1 / K)

    def test_a_method_without_targets_is_judged_by_its_tokens(self, health):
        watch = health()
        for step in range(10):
            watch.show(Seen(tokens_of(step)), range(step * B, (step + 1) * B))
        assert watch.measure(1).keys() == {"health/rank_me", "health/feature_std", "health/neighbour_agreement"}


class TestTokens:
    def test_an_image_is_never_its_own_neighbour(self, health):
        """Each image comes twice with the very same token; its class is that of no other image near it."""
        watch, tokens = health(labels=[str(index) for index in range(64)]), tokens_of(0, images=64)
        for first in [*range(0, 64, B)] * 2:
            watch.show(seen(tokens=tokens[:, first : first + B]), range(first, first + B))
        assert watch.measure(1)["health/knn"] == 0

    @pytest.mark.parametrize(("distance", "least", "most"), [(60.0, 1, 1), (1.5, 0.4, 0.95)])
    def test_votes_are_scikit_learns_among_other_images(self, health, distance, least, most):
        """Classes that lie apart or overlap, and images that come twice with other tokens."""
        generator, labels = torch.Generator().manual_seed(0), [str(index % 3) for index in range(40)]
        watch, tokens, indices = health(labels=labels), [], []
        for step in range(12):
            batch = torch.randint(0, 40, (B,), generator=generator).tolist()
            views = tokens_of(step)
            views[:, torch.arange(B), torch.tensor(batch) % 3] += distance
            watch.show(seen(tokens=views), batch)
            tokens += views[0].tolist()
            indices += batch
        values, classes = np.array(tokens), np.array([int(labels[index]) for index in indices])
        right = []
        for row, index in enumerate(indices):
            others = [other for other, image in enumerate(indices) if image != index]
            peer = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
            peer.fit(values[others], classes[others])
            right.append(peer.predict(values[row : row + 1])[0] == classes[row])
        assert watch.measure(1)["health/knn"] == pytest.approx(np.mean(right), abs=1e-6)
        assert least <= np.mean(right) <= most

    def test_two_views_agree_on_other_images_only(self, health):
        """Whoever counted an image's own earlier tokens, nearest to both of its views, would find more in common."""
        watch, generator = health(), torch.Generator().manual_seed(0)
        earlier = torch.randn(80, D, generator=generator)
        for first in range(0, 80, B):
            watch.show(seen(tokens=earlier[first : first + B].expand(2, -1, -1)), range(first, first + B))
        views = earlier[:B] + 0.5 * torch.randn(2, B, D, generator=generator)
        watch.show(seen(tokens=views))
        queue, indices = torch.cat([earlier, views[0]]), torch.tensor([*range(80), *range(B)])
        fractions = []
        for image in range(B):
            similarity = torch.cosine_similarity(views[:, image, None], queue[None], dim=2)
            similarity[:, indices == image] = -2
            nearest = [set(row.tolist()) for row in similarity.topk(10, dim=1).indices]
            fractions.append(len(nearest[0] & nearest[1]) / 10)
        assert watch.measure(1)["health/neighbour_agreement"] == pytest.approx(np.mean(fractions))

    def test_rank_and_spread_are_those_of_the_newest_tokens(self, health):
        watch, tokens = health(), []
        for step in range(QUEUE // B + 3):
            views = tokens_of(step) * torch.linspace(0.1, 2, D) + step / 100
            watch.show(seen(tokens=views), [step] * B)
            tokens.append(views[0])
        values, queue = watch.measure(20), torch.cat(tokens)[-QUEUE:].double().numpy()
        singular = np.linalg.svd(queue, compute_uv=False)
        assert values["health/rank_me"] == pytest.approx(np.exp(entropy(singular)), rel=1e-4)
        directions = queue / np.linalg.norm(queue, axis=1, keepdims=True)
        assert values["health/feature_std"] == pytest.approx(directions.std(axis=0, ddof=1).mean() * D**0.5, rel=1e-4)
        assert watch.indices.tolist() == [step for step in range(3, QUEUE // B + 3) for _ in range(B)]

    def test_few_tokens_say_nothing(self, health):
        values = health(labels=["a", "b"] * 100).show(seen()).measure(1)
        assert not {"health/knn", "health/rank_me", "health/feature_std"} & values.keys()


def test_looking_changes_nothing(health):
    """Neither what it is given, nor the random state, nor by a gradient."""
    watch, given = health(labels=["a", "b"] * 16), seen()
    before, state = copy.deepcopy(given), torch.get_rng_state()
    for step in range(10):
        watch.show(given, [(step * B + row) % 32 for row in range(B)]).measure(step)
    assert all(torch.equal(one, other) for one, other in zip(given[:3], before[:3], strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert not watch.tokens.requires_grad


STEPS, SHARED = 12, 2  # steps of 2 · B images, and the processes that share them


def parts(rank: int, processes: int) -> list[tuple[Seen, list[int]]]:
    """What a process sees of steps whose halves are unlike: other classes, other prototypes, other spread."""
    steps = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        tokens, logits = (torch.randn(2, 2 * B, width, generator=generator) for width in (D, K))
        tokens[:, B:, 4:] *= 0.1
        logits[:, B:, : K // 2] += 4
        logits[:, :B, K // 2 :] += 4
        indices = [(step * 2 * B + row) % 50 for row in range(2 * B)]
        part = slice(rank * 2 * B // processes, (rank + 1) * 2 * B // processes)
        targets = torch.softmax(3 * logits, dim=2)
        steps.append((Seen(tokens[:, part], logits[:, part], targets[:, part]), indices[part]))
    return steps


def measured(accelerator: Accelerator, config: Config, rank: int, processes: int) -> list[dict[str, float]]:
    """Twice: after the first half of the steps, and at the end."""
    watch, values = Watch(accelerator, config, [str(index % 5) for index in range(50)]), []
    for step, (step_seen, indices) in enumerate(parts(rank, processes), 1):
        watch.show(step_seen, indices)
        if step in (STEPS // 2, STEPS):
            values.append(watch.measure(step))
    return values


class OfTwo:
    """`measured`, of each of two processes that share the steps."""

    def __init__(self, config: Config):
        self.config = config

    def __call__(self, rank: int, processes: int) -> list[dict[str, float]]:
        # Accelerate asks for these.
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1")
        os.environ.update(LOCAL_WORLD_SIZE=str(processes), OMP_NUM_THREADS="1")
        accelerator = Accelerator(cpu=True, mixed_precision="no")
        assert accelerator.num_processes == SHARED
        return measured(accelerator, self.config, rank, processes)


@pytest.mark.slow
def test_two_processes_find_what_one_does(accelerator, tiny, tmp_path):
    """Statistics of targets are those of the whole batch; rank and neighbours the mean of both processes' own."""
    config = tiny({"train.steps": STEPS})
    whole = measured(accelerator, config, 0, 1)
    halves = [measured(accelerator, config, rank, SHARED) for rank in range(SHARED)]  # each as if it were alone
    both = worlds.run(OfTwo(config), [SHARED], tmp_path)[SHARED]
    assert both[0] == both[1]
    own = {"health/rank_me", "health/feature_std", "health/knn"}
    for values, alone, *of_halves in zip(both[0], whole, *halves, strict=True):
        assert values.keys() == of_halves[0].keys()
        means = {name: np.mean([half[name] for half in of_halves]) for name in values}
        for name, value in values.items():
            assert value == pytest.approx(means[name] if name in own else alone[name], rel=1e-4), name
    assert both[0][1].keys() >= own
    for name in ("health/kl_to_center", "health/prototypes_in_use", "health/center_norm"):
        assert both[0][1][name] != pytest.approx(means[name], rel=0.05), f"{name}: the halves are too alike to tell"
