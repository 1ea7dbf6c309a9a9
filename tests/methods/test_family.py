"""SimCLR, MoCo, MoCo v3, BYOL, SwAV and SimDINO: whole steps restated from the papers, and what must hold of each."""

import copy

import definitions
import pytest
import torch
from accelerate import Accelerator
from builders import assert_close, build, differing, normalised, packed, views_of_batch, weights
from torch import Tensor, nn

from dino.config.read import leaves
from dino.errors import UserError
from dino.methods import METHODS
from dino.training.checkpoint import Checkpoints
from dino.training.settings import load

TWO_VIEWS = {"views.local_crops": 0}
SMALL = {"objective.head_hidden": 12, "objective.head_output": 6, "optim.name": "sgd", "optim.lr": 0.05}
FAMILY = {  # method: settings of a very small one
    "simclr": TWO_VIEWS,
    "moco": TWO_VIEWS | {"objective.queue": 24},
    "moco_v3": TWO_VIEWS,
    "byol": TWO_VIEWS,
    "swav": {"objective.prototypes": 10, "objective.queue": 16, "objective.freeze_prototypes_steps": 1},
    "simdino": {},
}
family = pytest.mark.parametrize("name", FAMILY)
AVERAGED = {"moco", "moco_v3", "byol", "simdino"}
WITH_NORM = {"moco_v3", "byol", "swav"}  # BatchNorm in the head
WITHOUT_NORM = {"objective.batch_norm": False}


def settings(name: str, changes: dict | None = None) -> dict:
    return SMALL | {"objective.name": name} | FAMILY[name] | (changes or {})


def without_norm(name: str) -> dict:
    return settings(name, WITHOUT_NORM if name in WITH_NORM else {})


class Restated:
    """Steps of a method on copies of its networks: torch's SGD, the papers' losses, an average, a queue as a list."""

    def __init__(self, config, method):
        self.config, self.method = config, config.objective.name
        self.student, self.teacher = copy.deepcopy(method.student), copy.deepcopy(method.result)
        self.queue = list(method.queue.rows.clone()) if getattr(method, "queue", None) is not None else []
        decayed = [value for value in self.student.parameters() if value.ndim > 1]
        others = [value for value in self.student.parameters() if value.ndim == 1]
        self.optimizer = torch.optim.SGD([{"params": decayed}, {"params": others}], lr=1.0, momentum=0.9, fused=False)

    def embed(self, network: nn.Module, views: list[Tensor]) -> list[Tensor]:
        """Head of class tokens of each view; BatchNorm sees all views together."""
        tokens = [network.backbone(view) for view in views]
        return list(network.head(torch.cat(tokens)).chunk(len(views)))

    def loss(self, views: list[Tensor], step: int) -> Tensor:
        objective = self.config.objective
        if self.method == "simclr":
            return definitions.nt_xent(*self.embed(self.student, views), objective.temperature)
        if self.method == "swav":
            return self.swapped(views, step)
        with torch.no_grad():
            keys = self.embed(self.teacher, views[1:2] if self.method == "moco" else views[:2])
        if self.method == "moco":
            (queries,) = self.embed(self.student, views[:1])
            loss = definitions.queue_contrast(queries, keys[0], torch.stack(self.queue), objective.temperature)
            self.queue = [*definitions.unit(keys[0]), *self.queue][: objective.queue]
            return loss
        views = self.embed(self.student, views)
        if self.method == "simdino":
            rates = [definitions.coding_rate(view, objective.epsilon) for view in views[:2]]
            return definitions.view_distance(views, keys) - objective.coding_rate_weight * sum(rates) / 2
        crossed = ((views[0], keys[1]), (views[1], keys[0]))
        if self.method == "byol":
            return sum(definitions.regression(*pair) for pair in crossed)
        return sum(definitions.batch_contrast(*pair, objective.temperature) for pair in crossed)

    def swapped(self, views: list[Tensor], step: int) -> Tensor:
        objective, images = self.config.objective, len(views[0])
        outputs = self.embed(self.student, views)
        scores, codes = [output[:, : objective.prototypes] for output in outputs], []
        embeddings = [output[:, objective.prototypes :].detach() for output in outputs[:2]]
        for view in (0, 1):
            together = scores[view].detach()
            if step * images >= objective.queue:  # full
                past = torch.stack(self.queue).chunk(2, dim=1)[view]
                together = torch.cat([together, past @ self.student.head.prototypes.weight.detach().T])
            codes.append(definitions.sinkhorn(together, objective.epsilon, 3)[:images])
        self.queue = [*torch.cat(embeddings, dim=1), *self.queue][: objective.queue]
        return definitions.swapped(scores, codes, objective.temperature)

    def step(self, number: int, views: list[Tensor]) -> float:
        loss = self.loss(views, number)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 3.0)
        rates = {"optim/lr": 0.025 if number == 0 else 0.0}
        for group, decay in zip(self.optimizer.param_groups, (self.rate("optim/weight_decay", number), 0), strict=True):
            group["lr"], group["weight_decay"] = rates["optim/lr"] or self.rate("optim/lr", number), decay
        if self.method == "swav" and number < 1:
            self.student.head.prototypes.weight.grad = None
        self.optimizer.step()
        with torch.no_grad():
            if self.method == "swav":
                prototypes = self.student.head.prototypes.weight
                prototypes.copy_(definitions.unit(prototypes))
            if self.method in AVERAGED:
                momentum, own = self.rate("teacher/momentum", number), dict(self.student.named_parameters())
                for name, value in self.teacher.named_parameters():
                    value.copy_(momentum * value + (1 - momentum) * own[name])
        return loss.item()

    def rate(self, name: str, number: int) -> float:
        """A cosine over ten steps, of the learning rate from the second on."""
        objective, optim = self.config.objective, self.config.optim
        start, end, first = {
            "optim/lr": (optim.lr, optim.lr_end, 1),
            "optim/weight_decay": (optim.weight_decay, optim.weight_decay_end, 0),
            "teacher/momentum": (
                getattr(objective, "teacher_momentum", 0),
                getattr(objective, "teacher_momentum_end", 0),
                0,
            ),
        }[name]
        progress = torch.tensor((number - first) / (9 - first))
        return float(end + (start - end) * (1 + torch.cos(torch.pi * progress)) / 2)


@family
def test_steps_are_those_of_the_papers(name, accelerator, tiny):
    """Losses, student, teacher and queue of three steps, with the paper's own settings but for sizes."""
    config = tiny(settings(name))
    step, method, _ = build(accelerator, config)
    restated = Restated(config, method)
    for number in range(3):
        views = views_of_batch(config, number)
        expected = restated.step(number, [normalised(config, view) for view in views])
        logged = step(number, packed(views))
        total = sum(value.item() for key, value in logged.items() if key.startswith("loss/"))
        assert total == pytest.approx(expected, rel=1e-4)
        assert set(METHODS[name].watched(config)) == {key for key in logged if key.startswith("loss/")}
    assert_close(
        dict(method.student.named_parameters()), dict(restated.student.named_parameters()), rtol=1e-3, atol=1e-5
    )
    assert differing(weights(method.student), weights(build(accelerator, config).method.student))
    if name in AVERAGED:
        assert method.result is method.teacher
        expected_teacher = dict(restated.teacher.named_parameters())
        assert_close(dict(method.teacher.named_parameters()), expected_teacher, rtol=1e-4, atol=1e-5)
        assert all(not value.requires_grad and value.grad is None for value in method.teacher.parameters())
    else:
        assert method.result is method.student
    if restated.queue:
        torch.testing.assert_close(method.queue.rows, torch.stack(restated.queue), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["moco", "byol"])
def test_micro_batches_equal_one_large_batch(name, fresh_accelerate, tiny):
    """Where no image is compared with others of the batch, and no BatchNorm looks at it."""
    states = []
    for parts in (1, 2, 4):
        built = build(Accelerator(cpu=True), tiny(without_norm(name) | {"train.accumulation": parts}))
        logged = [built.take(number) for number in range(3)]
        rows = [] if name == "byol" else [built.method.queue.rows.sort(dim=0).values]  # whose order does not matter
        states.append((logged, weights(built.method.student, built.method.teacher), rows))
        assert built.method.seen.tokens.shape == (2, 8, 16)
        assert built.method.seen.pairs.queries.shape[1:] == built.method.seen.pairs.keys.shape[1:] == (8, 6)
    for logged, state, rows in states[1:]:
        for of_parts, expected in zip(logged, states[0][0], strict=True):
            assert of_parts == pytest.approx(expected, rel=1e-4)
        assert_close(state, states[0][1], rtol=1e-3, atol=1e-5)
        assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(rows, states[0][2], strict=True))


@pytest.mark.parametrize("name", ["simclr", "moco_v3", "swav", "simdino"])
def test_micro_batches_are_contrasted_and_balanced_by_themselves(name, fresh_accelerate, tiny):
    """The loss of two is the mean of what each gives alone, at the same weights."""
    changes = without_norm(name) | ({"objective.queue": 0} if name == "swav" else {})
    if name == "simdino":
        changes["objective.coding_rate_weight"] = 0.1
    built = build(Accelerator(cpu=True), tiny(changes | {"train.accumulation": 2}))
    views = views_of_batch(built.step.config, 0)
    together = built.step(0, packed(views, 2))
    parts = []
    for part in range(2):
        alone = build(Accelerator(cpu=True), tiny(changes | {"train.batch_size": 4}))
        parts.append(alone.step(0, packed([view.chunk(2)[part] for view in views])))
    for key in METHODS[name].watched(built.step.config):
        assert float(together[key]) == pytest.approx((float(parts[0][key]) + float(parts[1][key])) / 2, rel=1e-4)
    assert built.method.seen.tokens.shape == (2, 8, 16)


@family
def test_a_resumed_run_goes_on_bit_by_bit(name, accelerator, tiny, tmp_path):
    """Queue and BatchNorm included; a look in between changes nothing."""
    config = tiny(settings(name))
    whole = build(accelerator, config)
    whole.take(0, 1)
    modules = whole.method.state()
    assert ("queue" in modules) == (name in ("moco", "swav"))
    saved = Checkpoints(tmp_path, accelerator, modules, whole.optimizer, 1).save(2, {})
    before = weights(*modules.values())
    whole.step.look(2, packed(views_of_batch(config, 7)))
    assert differing(weights(*modules.values()), before) == set()
    whole.take(2, 3)
    again = build(accelerator, config)
    Checkpoints(tmp_path, accelerator, again.method.state(), again.optimizer, 1).load(saved)
    again.take(2, 3)
    assert differing(weights(*again.method.state().values()), weights(*modules.values())) == set()


@pytest.mark.parametrize("arch", ["vit_tiny", "resnet18", "resnet50"])
@pytest.mark.parametrize("name", FAMILY)
def test_every_backbone_takes_steps(name, arch, fresh_accelerate, tiny):
    """ViTs in bf16, whose convolutions take CPUs long."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if arch == "vit_tiny" else "no")
    sizes = {"views.global_size": 8, "views.local_size": 8, "train.batch_size": 4, "model.arch": arch}
    built = build(accelerator, tiny(settings(name, sizes if arch != "vit_tiny" else {})))
    before = weights(built.method.student)
    logged = built.take(0)
    assert all(torch.isfinite(torch.tensor(value)) for value in logged.values())
    assert len(differing(weights(built.method.student), before)) > len(before) / 4
    assert {value.dtype for value in built.method.student.parameters()} == {torch.float32}


def test_a_network_without_transformer_blocks_runs_in_bf16(fresh_accelerate, tiny):
    built = build(
        Accelerator(cpu=True, mixed_precision="bf16"),
        tiny(settings("byol", {"model.arch": "resnet18", "train.batch_size": 4})),
    )
    with torch.no_grad(), built.method.autocast():
        assert built.method.student([torch.zeros(2, 3, 8, 8)]).logits.isfinite().all()


def test_a_broken_step_does_not_reach_the_queue(accelerator, tiny):
    built = build(accelerator, tiny(settings("moco")))
    built.take(0)
    before = weights(built.method.queue)
    shift = built.step.normalise.shift.clone()
    built.step.normalise.shift.fill_(torch.nan)
    built.take(1)
    assert differing(weights(built.method.queue), before) == set()
    built.step.normalise.shift.copy_(shift)
    built.take(2)
    assert built.method.queue.steps.tolist() == [2] * 8 + [0] * 8 + [-1] * 8
    assert built.method.queue.rows.isfinite().all()


def test_a_frozen_patch_projection_stays_random(accelerator, tiny):
    built = build(accelerator, tiny(settings("moco_v3", {"objective.freeze_patch_projection": True})))
    before = weights(built.method.student)
    built.take(0, 1)
    unmoved = before.keys() - differing(weights(built.method.student), before)
    assert {name for name in unmoved if "backbone" in name} == {
        "0.backbone.patch_embed.proj.weight",
        "0.backbone.patch_embed.proj.bias",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.name": "byol"}, r"byol looks at the two global crops only: set views\.local_crops=0"),
        (
            {**TWO_VIEWS, "objective.name": "moco_v3", "objective.freeze_patch_projection": True}
            | {"model.arch": "resnet50"},
            "for a ViT's patches, which model.arch=resnet50 has not",
        ),
        ({**TWO_VIEWS, "objective.name": "simclr", "train.batch_size": 1}, "a micro-batch must have at least 2"),
        ({"objective.name": "swav", "objective.queue": 10, "train.fsdp": True}, "objective.queue needs whole"),
        ({"objective.name": "moko"}, "did you mean 'moco'"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(changes, message):
    with pytest.raises(UserError, match=message):
        load(None, changes)


@family
def test_remedies_name_settings_that_exist(name):
    import re

    config = load(None, {"objective.name": name} | FAMILY[name])
    assert METHODS[name].remedies.keys() >= {"uniform", "worse"}
    for text in METHODS[name].remedies.values():
        named = set(re.findall(r"\b(?:views|objective|optim|train)\.[a-z_]+", text))
        assert named
        assert named <= leaves(config).keys()
        load(None, [f"objective.name={name}", "views.local_crops=0", *re.findall(r"\b[a-z]+\.[a-z_]+=[\w.]*\w", text)])
