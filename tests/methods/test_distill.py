"""Distillation: which heads a frozen teacher brings along, what it decides, and that steps learn from it alone."""

import argparse
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from builders import (
    DINOV2,
    MEAN,
    SEPARATE,
    SINKHORN,
    STD,
    Built,
    Pictures,
    add_noise,
    assert_close,
    build,
    differing,
    normalised,
    packed,
    random_backbone,
    views_of_batch,
    weights,
    with_settings,
    write_own,
    write_release,
)
from reference import Reference, hidden_patches
from torch import Tensor, nn

from dino import load_backbone
from dino.config.read import assign, dump, follow, get, leaves
from dino.config.schema import Config, Phase
from dino.errors import UserError
from dino.methods import Outside, distill
from dino.methods.dino import DINO
from dino.methods.distill import FrozenTeacher, TokenPrototypes
from dino.methods.network import Network
from dino.models import Backbone, ResNetSpec, ViTSpec
from dino.training.backbone_file import write_backbone
from dino.training.checkpoint import Checkpoints

SPEC = ViTSpec(24, 2, 3, 4, 12)
DINO_FILE = ViTSpec(64, 2, 1, 4, 16)
DINOV2_FILE = replace(DINO_FILE, layer_scale=1.0, mask_token=True)
PATCHES = {"objective.ibot_weight": 1}


class PublishedHead(nn.Module):
    """The head of facebookresearch/dino and dinov2, with torch's own weight norm."""

    def __init__(self, prototypes: int, weight_norm):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(64, 24), nn.GELU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 8))
        self.last_layer = weight_norm(nn.Linear(8, prototypes, bias=False))
        add_noise(self, 0.2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(tokens), dim=-1))


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return nn.utils.weight_norm(layer)


WEIGHT_NORMS = {"weight_g": old_weight_norm, "original0": nn.utils.parametrizations.weight_norm}


def prefixed(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}


def write_dino(file, weight_norm=old_weight_norm) -> dict[str, tuple[Backbone, PublishedHead]]:
    """A full checkpoint of DINO; gives what it holds, by network."""
    networks = {name: (random_backbone(DINO_FILE), PublishedHead(15, weight_norm)) for name in ("teacher", "student")}
    content: dict = {"optimizer": {"state": {}}, "epoch": 3, "args": argparse.Namespace(arch="vit_tiny")}
    for name, wrapper in (("teacher", ""), ("student", "module.")):
        backbone, head = networks[name]
        content[name] = prefixed(f"{wrapper}backbone.", backbone) | prefixed(f"{wrapper}head.", head)
    torch.save(content, file)
    return networks


def write_dinov2(file, weight_norm=old_weight_norm, separate: bool = True) -> tuple:
    """A teacher checkpoint of DINOv2; gives backbone, head, and head of patches."""
    backbone, head = random_backbone(DINOV2_FILE), PublishedHead(15, weight_norm)
    patch_head = PublishedHead(18, weight_norm) if separate else None
    content = prefixed("backbone.", backbone) | prefixed("dino_head.", head)
    torch.save({"teacher": content | (prefixed("ibot_head.", patch_head) if separate else {})}, file)
    return backbone, head, patch_head


@pytest.fixture
def run(accelerator, tiny, tmp_path):
    """Function that writes a run with changed settings and a checkpoint for each step; gives its name and teacher."""

    def write(changes: dict | None = None, steps: tuple[int, ...] = (5,)) -> tuple[str, Network]:
        folder, config = tmp_path / "run", tiny(changes)
        _, method, optimizer = build(accelerator, config)
        checkpoints = Checkpoints(folder / "checkpoints", accelerator, method.state(), optimizer, keep=3)
        for step in steps:
            add_noise(method.teacher, 0.2)
            checkpoints.save(step, {})
        (folder / "config.yaml").write_text(dump(config))
        write_backbone(folder, config, method.teacher.backbone, steps[-1], "images")
        return str(folder), method.teacher.eval()

    return write


def assert_heads(teacher: FrozenTeacher, backbone: nn.Module, head: nn.Module, patch_head: nn.Module | None) -> None:
    """That it has this backbone, and heads that compute the same."""
    assert differing(weights(teacher.backbone), weights(backbone)) == set()
    tokens = torch.randn(5, backbone.embed_dim)
    torch.testing.assert_close(teacher.head(tokens), head(tokens))
    assert (teacher.patch_head is None) == (patch_head is None)
    if patch_head is not None:
        torch.testing.assert_close(teacher.patch_head(tokens), patch_head(tokens))


class TestHeads:
    @pytest.mark.parametrize(
        "changes",
        [{}, PATCHES, PATCHES | SEPARATE, {"objective.head_layers": 3, "objective.norm_last_layer": False}],
        ids=["class tokens", "shared", "separate", "deeper"],
    )
    def test_are_those_of_the_newest_checkpoint_of_a_run(self, changes, run):
        name, teacher = run(changes, steps=(5, 10))
        assert_heads(FrozenTeacher(name), teacher.backbone, teacher.head, teacher.patch_head)

    @pytest.mark.parametrize("name", ["~/run", "~/run@teacher"])
    def test_come_with_the_backbone_however_a_run_is_named(self, name, run, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        _, teacher = run()
        assert_heads(FrozenTeacher(name), teacher.backbone, teacher.head, None)

    @pytest.mark.parametrize("spelling", WEIGHT_NORMS)
    @pytest.mark.parametrize("network", ["", "@teacher", "@student"])
    def test_are_those_of_dinos_full_checkpoint(self, network, spelling, tmp_path):
        file = tmp_path / "checkpoint.pth"
        backbone, head = write_dino(file, WEIGHT_NORMS[spelling])[network[1:] or "teacher"]
        assert any(spelling in name for name in head.state_dict())
        assert_heads(FrozenTeacher(f"{file}{network}"), backbone, head, None)

    @pytest.mark.parametrize("spelling", WEIGHT_NORMS)
    @pytest.mark.parametrize("separate", [True, False])
    def test_are_those_of_dinov2s_teacher_checkpoint(self, separate, spelling, tmp_path):
        file = tmp_path / "teacher_checkpoint.pth"
        networks = write_dinov2(file, WEIGHT_NORMS[spelling], separate)
        assert_heads(FrozenTeacher(str(file)), *networks)

    def test_that_do_not_fit_are_refused(self, tmp_path):
        file = tmp_path / "teacher_checkpoint.pth"
        write_dinov2(file)
        content = torch.load(file, weights_only=True)
        del content["teacher"]["dino_head.mlp.2.bias"]
        torch.save(content, file)
        with pytest.raises(UserError, match=r"\(head\) does not fit the model, 1 missing: mlp.2.bias"):
            FrozenTeacher(str(file))

    @pytest.mark.parametrize("kind", ["release", "backbone.safetensors", "run without checkpoint"])
    def test_are_absent_from_a_backbone_alone(self, kind, run, tmp_path):
        if kind == "release":
            name = str(write_release(tmp_path / "weights.pth", random_backbone(DINO_FILE)))
        elif kind == "backbone.safetensors":
            name = f"{run()[0]}/backbone.safetensors"
        else:
            name = str(write_own(tmp_path / "own", random_backbone(SPEC)))
        teacher = FrozenTeacher(name)
        assert (teacher.head, teacher.patch_head) == (None, None)


def cosines(tokens: Tensor, prototypes: Tensor, mean: Tensor) -> Tensor:
    """(B, K)."""
    one, other = tokens - mean, prototypes - mean
    return one @ other.T / (one.norm(dim=1)[:, None] * other.norm(dim=1))


def test_similarities_worked_by_hand():
    """Mean (2, 0): the tokens less it are (3, 4), (-3, 4), (0, -8); (2, 1) looks up, (7, 0) to the right."""
    head = TokenPrototypes(torch.tensor([[5.0, 4.0], [-1.0, 4.0], [2.0, -8.0]]))
    similarities = head(torch.tensor([[2.0, 1.0], [7.0, 0.0]]))
    torch.testing.assert_close(similarities, torch.tensor([[0.8, 0.8, -1.0], [0.6, -0.6, 0.0]]))


class TestTokens:
    """As prototypes, where a backbone comes alone."""

    @pytest.fixture
    def teacher(self, tmp_path) -> FrozenTeacher:
        return FrozenTeacher(str(write_own(tmp_path / "run", random_backbone(SPEC))))

    def settings(self, tiny, changes: dict | None = None) -> Config:
        return tiny(PATCHES | {"objective.ibot_head": "separate"} | (changes or {}))

    def features(self, teacher: FrozenTeacher, images: Pictures) -> tuple[Tensor, Tensor]:
        """Class tokens (N, D) and patches (N, 16, D) of all images, which have the size of global crops already."""
        mean, std = (torch.tensor(values[3]).view(3, 1, 1) for values in (MEAN, STD))
        with torch.no_grad():
            features = load_backbone(teacher.name).forward_features((images.pixels / 255 - mean) / std)
        return features["x_norm_clstoken"], features["x_norm_patchtokens"]

    @pytest.mark.parametrize(
        ("count", "unreadable"), [(12, range(0)), (7, range(0)), (23, range(3)), (28, range(20, 28)), (12, range(7))]
    )
    @pytest.mark.parametrize("batch", [5, 64])
    def test_of_readable_images_as_evenly_as_can_be(self, count, unreadable, batch, teacher, tiny, monkeypatch):
        """12 of them: of as many images where there are, drawn at random; else of all, again and again."""
        monkeypatch.setattr(distill, "BATCH", batch)
        images, readable = Pictures(count, unreadable), sorted(set(range(count)) - set(unreadable))
        head = teacher.network(self.settings(tiny), images).head
        tokens, _ = self.features(teacher, images)
        mean = head.mean
        best, index = cosines(tokens, head.prototypes + mean, mean).max(dim=0)
        torch.testing.assert_close(best, torch.ones(12), rtol=0, atol=1e-5)
        times = index.bincount(minlength=count)
        assert times.sum() == 12
        assert not times[list(unreadable)].any()
        assert set(times[readable].tolist()) <= {12 // len(readable), -(-12 // len(readable))}
        torch.testing.assert_close(mean, tokens[index].mean(dim=0), rtol=1e-4, atol=1e-5)
        others = torch.randn(4, 24)
        torch.testing.assert_close(head(others), cosines(others, tokens[index], mean), rtol=1e-4, atol=1e-5)

    def test_of_patches_are_one_of_each_image(self, teacher, tiny):
        images = Pictures(12)
        head = teacher.network(self.settings(tiny), images).patch_head
        _, patches = self.features(teacher, images)
        best, index = cosines(patches.flatten(0, 1), head.prototypes + head.mean, head.mean).max(dim=0)
        torch.testing.assert_close(best, torch.ones(12), rtol=0, atol=1e-5)
        assert sorted((index // 16).tolist()) == list(range(12))
        assert len(set((index % 16).tolist())) > 3

    @pytest.mark.parametrize(("patches", "expected"), [("none", 12), (5, 5), (20, 20)])
    def test_are_as_many_as_the_settings_say(self, patches, expected, teacher, tiny):
        config = self.settings(tiny, {"objective.ibot_prototypes": patches})
        network = teacher.network(config, Pictures(30))
        assert (len(network.head.prototypes), len(network.patch_head.prototypes)) == (12, expected)
        assert teacher.network(tiny(), Pictures(12)).patch_head is None

    def test_are_a_function_of_the_seed(self, teacher, tiny):
        """And of nothing else, nor do they take from torch's random state: a resumed run has the same ones."""
        results = []
        for start, seed in enumerate((0, 0, 1)):
            torch.manual_seed(start)
            state = torch.get_rng_state()
            network = teacher.network(self.settings(tiny, {"train.seed": seed}), Pictures(30))
            results.append(weights(network.head, network.patch_head))
            assert torch.equal(torch.get_rng_state(), state)
        assert differing(results[0], results[1]) == set()
        assert differing(results[0], results[2]) == results[0].keys()

    def test_need_images_of_any_size(self, teacher, tiny):
        with pytest.raises(UserError, match="none of 40 images can be read"):
            teacher.network(self.settings(tiny), Pictures(40, range(40)))
        images = Pictures(12)
        images.pixels = torch.rand(12, 3, 30, 21).mul(255).byte()
        assert teacher.network(self.settings(tiny), images).head.prototypes.isfinite().all()


def write_teacher(kind: str, folder, run) -> str:
    if kind.startswith("run"):
        heads = PATCHES | SEPARATE if kind == "run, two heads" else {}
        return run(heads | {"views.mean": "[0.1,0.2,0.3]", "views.std": "[0.4,0.5,0.6]"})[0]
    if kind == "own":
        return str(write_own(folder / "own", random_backbone(replace(SPEC, in_chans=1))))
    file = folder / "weights.pth"
    if kind == "release":
        return str(write_release(file, random_backbone(DINO_FILE)))
    (write_dino if kind == "DINO" else write_dinov2)(file)
    return str(file)


IMAGENET = {"views.mean": [0.485, 0.456, 0.406], "views.std": [0.229, 0.224, 0.225], "data.channels": 3}
OF_RUN = {"views.mean": [0.1, 0.2, 0.3], "views.std": [0.4, 0.5, 0.6], "data.channels": 3}
TWO_HEADS = {"objective.ibot_head": "separate"}
DECIDED = {  # without and with a loss of patches
    "run": (OF_RUN | {"objective.prototypes": 12}, {}),
    "run, two heads": (OF_RUN | {"objective.prototypes": 12}, TWO_HEADS | {"objective.ibot_prototypes": 20}),
    "DINO": (IMAGENET | {"objective.prototypes": 15}, {}),
    "DINOv2": (IMAGENET | {"objective.prototypes": 15}, TWO_HEADS | {"objective.ibot_prototypes": 18}),
    "release": (IMAGENET, TWO_HEADS),
    "own": ({"views.mean": MEAN[1], "views.std": STD[1], "data.channels": 1}, TWO_HEADS),
}


def followed(config: Config) -> tuple[Config, Outside]:
    """As a run lets the frozen teacher decide."""
    outside = DINO.outside(config)
    return follow(config, outside.settings, outside.source)[0], outside


def distilling(name: str, changes: dict | None = None) -> Config:
    return with_settings({"objective.distill": name, "model.patch_size": 4} | PATCHES | (changes or {}))


class TestSettings:
    @pytest.mark.parametrize("ibot_weight", [0, 1])
    @pytest.mark.parametrize("kind", DECIDED)
    def test_decided_by_the_frozen_teacher(self, kind, ibot_weight, run, tmp_path):
        """Whether they are left out, or say the same."""
        name = write_teacher(kind, tmp_path, run)
        config = distilling(name, {"objective.ibot_weight": ibot_weight})
        always, with_patches = DECIDED[kind]
        expected = always | (with_patches if ibot_weight else {})
        outside = DINO.outside(config)
        assert outside.settings == expected
        assert outside.source == f"objective.distill={name}"
        result, _ = followed(config)
        everything = {key: get(config, key) for key in leaves(config)}
        assert {key: get(result, key) for key in leaves(result)} == everything | expected
        for key, value in expected.items():
            assign(config, key, value)
        assert followed(config)[0] == result

    @pytest.mark.parametrize(
        ("kind", "key", "value"),
        [
            ("run", "objective.prototypes", 13),
            ("run", "views.std", [0.5, 0.5, 0.5]),
            ("run", "objective.ibot_prototypes", 20),  # patches need as many as its only head has
            ("run, two heads", "objective.ibot_prototypes", 12),
            ("DINOv2", "objective.ibot_prototypes", 15),
            ("own", "data.channels", 3),
        ],
    )
    def test_that_contradict_it_are_refused_by_name(self, kind, key, value, run, tmp_path):
        name = write_teacher(kind, tmp_path, run)
        changes = TWO_HEADS if key == "objective.ibot_prototypes" else {}
        with pytest.raises(UserError) as error:
            followed(distilling(name, changes | {key: value}))
        always, with_patches = DECIDED[kind]
        decided = ({"objective.ibot_prototypes": 12} | always | with_patches)[key]
        assert str(error.value) == f"{key}={value}, but objective.distill={name} has {decided}: leave {key} out"

    @pytest.mark.parametrize("spec", [SPEC, ResNetSpec("resnet18")], ids=["ViT", "ResNet"])
    def test_patches_of_another_size_cannot_be_compared(self, spec, tmp_path):
        name = str(write_own(tmp_path / "run", random_backbone(spec)))
        with pytest.raises(UserError, match=r"objective\.ibot_weight compares patches: model\.patch_size=8 must be"):
            followed(distilling(name, {"model.patch_size": 8}))
        config = distilling(name, {"model.patch_size": 8, "objective.ibot_weight": 0})
        assert followed(config)[1].weights.backbone.spec == spec

    @pytest.mark.parametrize(
        ("changes", "key"),
        [
            ({"views.global_size": 18}, "views.global_size=18"),
            ({"train.phases": [Phase(0.5, 18, 8)]}, "train.phases[0].global_size=18"),
            ({"views.global_size": 20, "views.local_size": 6}, ""),  # of local crops it sees nothing
        ],
    )
    def test_crops_must_fit_its_patches_too(self, changes, key, tmp_path):
        name = str(write_own(tmp_path / "run", random_backbone(SPEC)))
        config = distilling(name, {"model.patch_size": 2, "objective.ibot_weight": 0} | changes)
        if not key:
            followed(config)
            return
        with pytest.raises(UserError) as error:
            followed(config)
        assert str(error.value) == f"{key} is not divisible by {name}'s 4"

    def test_without_a_frozen_teacher_nothing_is_decided(self):
        assert DINO.outside(with_settings(PATCHES)) is None
        with pytest.raises(UserError, match="no weights at 'nowhere'"):
            DINO.outside(with_settings({"objective.distill": "nowhere"}))


class Distilled(Reference):
    """DINOv2's step with a frozen network's targets, and no patch hidden from the student."""

    def __init__(self, config: Config, student: nn.Module, teacher: nn.Module, frozen: nn.Module):
        super().__init__(config, student, teacher)
        self.frozen = {name: value.detach().clone() for name, value in frozen.named_parameters()}

    def vit(self, of: dict[str, Tensor], image: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().vit(self.frozen if of is self.teacher else of, image)

    def head(self, of: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        if of is not self.teacher:
            return super().head(of, name, x)
        has_one = not any(key.startswith("patch_head") for key in self.frozen)
        return super().head(self.frozen, "head" if has_one else name, x)


WIDER = {"model.embed_dim": 24, "objective.head_hidden": 20, "objective.head_bottleneck": 6}
STEPS = {  # settings of the frozen teacher's run, and further ones of the student's
    "class tokens": (WIDER, {"objective.ibot_weight": 0, "objective.koleo_weight": 0}),
    "one head": (WIDER | PATCHES, {}),
    "one head that knew no patches": (WIDER, {}),
    "two heads": (WIDER | PATCHES | SEPARATE, {}),
    "two heads for one": (WIDER | PATCHES, TWO_HEADS),
    "Sinkhorn, two micro-batches": (WIDER | PATCHES, SINKHORN | {"train.accumulation": 2}),
}


def student_of(accelerator, config: Config, **options) -> Built:
    config, outside = followed(config)
    return build(accelerator, config, outside=outside, images=Pictures(12), **options)


@pytest.mark.parametrize("option", STEPS)
def test_three_steps_are_distillation(option, accelerator, tiny, run):
    """Against the papers' equations: the frozen teacher's targets, nothing hidden, an average of the student."""
    of_teacher, of_student = STEPS[option]
    config = tiny(DINOV2 | of_student | {"objective.distill": run(of_teacher)[0]})
    step, method, _ = student_of(accelerator, config, exact=True)
    assert method.student.backbone.mask_token is None
    config = step.config
    reference = Distilled(config, method.student, method.teacher, method.target_network)
    for number in range(3):
        views = views_of_batch(config, number)
        expected = reference.step(number, views, hidden_patches(method, number, config))
        logged = step(number, packed(views, config.train.accumulation))
        assert {name: value.item() for name, value in logged.items()} == pytest.approx(expected, rel=1e-5)
    assert_close(dict(method.student.named_parameters()), reference.student, rtol=1e-4, atol=1e-4)
    assert_close(dict(method.teacher.named_parameters()), reference.teacher, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["ViT", "ResNet", "tokens"])
def test_the_frozen_teacher_is_frozen(kind, accelerator, tiny, run, tmp_path):
    changes: dict = {"views.mean": "none", "views.std": "none", "train.batch_size": 4}
    if kind == "ViT":
        name, changes = run(PATCHES | SEPARATE)[0], DINOV2
    else:
        spec = ResNetSpec("resnet18") if kind == "ResNet" else SPEC
        name = str(write_own(tmp_path / "own", random_backbone(spec)))
    config = tiny(changes | {"objective.distill": name})
    if kind != "ViT":
        config.views.mean = config.views.std = None  # which the weights decide
    built = student_of(accelerator, config)
    network = built.method.target_network
    before, of_student = weights(network), weights(built.method.student)
    for number in range(2):
        built.step.look(number, packed(views_of_batch(built.step.config, number)))
        built.take(number)
    assert differing(weights(network), before) == set()
    assert not any(value.requires_grad or value.grad is not None for value in network.parameters())
    assert not any(module.training for module in network.modules())
    assert differing(weights(built.method.student), of_student)


def test_health_looks_at_the_tokens_of_the_network_that_is_learned(accelerator, tiny, run):
    """And at the logits and targets of the frozen teacher, which are centered by what it gave before."""
    name, teacher = run()
    step, method, _ = student_of(accelerator, tiny({"objective.distill": name}))
    for number in range(2):
        views = views_of_batch(step.config, number)
        pixels = [normalised(step.config, view) for view in views[:2]]
        with torch.no_grad():
            logits = torch.stack([teacher.head(teacher.backbone(view)) for view in pixels])
            tokens = torch.stack([method.teacher.backbone(view) for view in pixels])
        step(number, packed(views))
        torch.testing.assert_close(method.seen.logits, logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(method.seen.tokens, tokens, rtol=1e-4, atol=1e-5)
        assert method.seen.targets.shape == logits.shape


def test_a_run_goes_on_with_the_frozen_teacher_that_it_began_with(accelerator, tiny, tmp_path):
    name = str(write_own(tmp_path / "own", random_backbone(SPEC)))
    config = tiny()
    config.views.mean = config.views.std = None
    config.objective.distill = name
    method = student_of(accelerator, config).method
    facts = method.checkpoint_facts()
    method.check_state(facts, tmp_path)
    method.check_state({"guide": facts["frozen_teacher"]}, tmp_path)  # as checkpoints of earlier versions say it
    with pytest.raises(UserError, match=rf"objective\.distill={name} is not what .* was made with"):
        method.check_state({"frozen_teacher": "other"}, tmp_path)
