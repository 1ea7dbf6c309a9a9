"""Distillation: which heads a frozen teacher brings along, what it decides, and that steps learn from it alone."""

import argparse
import warnings

import pytest
import torch
import torch.nn.functional as F
from dino.training.artifacts import write_backbone
from test_dinov2_step import DINOV2, SEPARATE, SINKHORN, Reference, hidden_patches, named
from test_initial import MEAN, OWN, STD, random_backbone, trainer_of, with_settings, write_file, write_own
from test_step import Trainer, assert_same, assert_untouched, build, packed, views_of_batch, weights
from torch import Tensor, nn

from dino import load_backbone
from dino.config import read as configuration
from dino.config.read import assign, get, leaves
from dino.config.schema import Config, Phase
from dino.data import UnreadableImage
from dino.errors import UserError
from dino.methods import distill as distillation
from dino.methods.distill import Guide, TokenPrototypes, follow_guide
from dino.methods.network import Network
from dino.models import Backbone, ResNetSpec, ViTSpec
from dino.run import RunDirectory
from dino.training.checkpoint import Checkpoints

DINO_FILE = ViTSpec(64, 2, 1, 4, 16)
DINOV2_FILE = ViTSpec(64, 2, 1, 4, 16, layer_scale=1.0, mask_token=True)
PATCHES = {"objective.ibot_weight": 1}
NOT_REFUSED = pytest.fail.Exception


class Pictures:
    """16×16 pixels of noise in memory; those in `unreadable` cannot be read."""

    channels, kind, labels = 3, "folder", None

    def __init__(self, count: int, unreadable: range = range(0)):
        generator = torch.Generator().manual_seed(3)
        self.pixels = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
        self.names = [str(index) for index in range(count)]
        self.unreadable = unreadable

    def read(self, index: int) -> Tensor:
        if index in self.unreadable:
            raise UnreadableImage(f"{index} is broken")
        return self.pixels[index]


class PublishedHead(nn.Module):
    """The head of facebookresearch/dino and dinov2, with torch's own weight norm."""

    def __init__(self, prototypes: int, weight_norm):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(64, 24), nn.GELU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 8))
        self.last_layer = weight_norm(nn.Linear(8, prototypes, bias=False))
        randomise(self)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(tokens), dim=-1))


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return nn.utils.weight_norm(layer)


WEIGHT_NORMS = {"weight_g": old_weight_norm, "original0": nn.utils.parametrizations.weight_norm}


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def prefixed(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}


def write_dino(file, weight_norm=old_weight_norm) -> dict[str, tuple[Backbone, PublishedHead]]:
    """A full checkpoint of DINO; gives what it holds, by network."""
    networks = {name: (random_backbone(DINO_FILE), PublishedHead(15, weight_norm)) for name in ("teacher", "student")}
    content = {
        name: prefixed(f"{wrapper}backbone.", networks[name][0]) | prefixed(f"{wrapper}head.", networks[name][1])
        for name, wrapper in (("teacher", ""), ("student", "module."))
    }
    torch.save({**content, "optimizer": {"state": {}}, "epoch": 3, "args": argparse.Namespace(arch="vit_tiny")}, file)
    return networks


def write_dinov2(file, weight_norm=old_weight_norm, separate: bool = True) -> tuple:
    """A teacher checkpoint of DINOv2; gives backbone, head, and head of patches."""
    backbone, head = random_backbone(DINOV2_FILE), PublishedHead(15, weight_norm)
    patch_head = PublishedHead(18, weight_norm) if separate else None
    content = prefixed("backbone.", backbone) | prefixed("dino_head.", head)
    torch.save({"teacher": content | (prefixed("ibot_head.", patch_head) if separate else {})}, file)
    return backbone, head, patch_head


def write_run(folder, accelerator, config: Config, steps: tuple[int, ...] = (5,)) -> Network:
    """A run directory with a checkpoint for each of `steps`; gives the last one's teacher."""
    trainer = trainer_of(accelerator, config)
    modules = {"student": trainer.student, "teacher": trainer.teacher, "targets": trainer.targets}
    checkpoints = Checkpoints(folder / "checkpoints", accelerator, modules, trainer.optimizer, keep=3)
    for step in steps:
        randomise(trainer.teacher)
        checkpoints.save(step, {})
    (folder / "config.yaml").write_text(configuration.dump(config))
    write_backbone(RunDirectory(folder), config, trainer.teacher.backbone, steps[-1], "images")
    return trainer.teacher.eval()


@pytest.fixture
def run(accelerator, tiny, tmp_path):
    """Function that writes a run with changed settings; gives its name and teacher."""

    def write(changes: dict | None = None, steps: tuple[int, ...] = (5,)) -> tuple[str, Network]:
        folder = tmp_path / "run"
        return str(folder), write_run(folder, accelerator, tiny(changes), steps)

    return write


class TestHeads:
    @pytest.mark.parametrize(
        "changes",
        [{}, PATCHES, PATCHES | SEPARATE, {"objective.head_layers": 3, "objective.norm_last_layer": False}],
        ids=["class tokens", "shared", "separate", "deeper"],
    )
    def test_are_those_of_the_newest_checkpoint_of_a_run(self, changes, run):
        name, teacher = run(changes, steps=(5, 10))
        guide = Guide(name)
        assert_untouched(weights(guide.backbone), weights(teacher.backbone))
        assert_untouched(weights(guide.head), weights(teacher.head))
        assert (guide.patch_head is None) == (teacher.patch_head is None) == (changes != PATCHES | SEPARATE)
        if teacher.patch_head is not None:
            assert_untouched(weights(guide.patch_head), weights(teacher.patch_head))

    @pytest.mark.parametrize("spelling", WEIGHT_NORMS)
    @pytest.mark.parametrize("network", ["", "@teacher", "@student"])
    def test_are_those_of_dinos_full_checkpoint(self, network, spelling, tmp_path):
        file = tmp_path / "checkpoint.pth"
        backbone, head = write_dino(file, WEIGHT_NORMS[spelling])[network[1:] or "teacher"]
        assert any(spelling in name for name in head.state_dict())
        guide, tokens = Guide(f"{file}{network}"), torch.randn(5, 64)
        torch.testing.assert_close(guide.head(tokens), head(tokens))
        assert guide.patch_head is None
        assert_untouched(weights(guide.backbone), weights(backbone))

    @pytest.mark.parametrize("spelling", WEIGHT_NORMS)
    @pytest.mark.parametrize("separate", [True, False])
    def test_are_those_of_dinov2s_teacher_checkpoint(self, separate, spelling, tmp_path):
        file = tmp_path / "teacher_checkpoint.pth"
        backbone, head, patch_head = write_dinov2(file, WEIGHT_NORMS[spelling], separate)
        guide, tokens = Guide(str(file)), torch.randn(5, 64)
        torch.testing.assert_close(guide.head(tokens), head(tokens))
        assert (guide.patch_head is not None) == separate
        if separate:
            torch.testing.assert_close(guide.patch_head(tokens), patch_head(tokens))
        assert_untouched(weights(guide.backbone), weights(backbone))

    def test_that_do_not_fit_are_refused(self, tmp_path):
        file = tmp_path / "teacher_checkpoint.pth"
        write_dinov2(file)
        content = torch.load(file, weights_only=True)
        del content["teacher"]["dino_head.mlp.2.bias"]
        torch.save(content, file)
        with pytest.raises(UserError, match=r"\(head\) does not fit the model, 1 missing: mlp.2.bias"):
            Guide(str(file))

    def test_are_absent_from_a_release(self, tmp_path):
        guide = Guide(str(write_file(tmp_path / "weights.pth", random_backbone(DINO_FILE))))
        assert (guide.head, guide.patch_head) == (None, None)

    @pytest.mark.parametrize("left", ["backbone.safetensors", "run"])
    def test_are_absent_where_a_run_has_no_checkpoint(self, left, run, tmp_path):
        name, _ = run()
        if left == "run":
            for file in (tmp_path / "run" / "checkpoints").rglob("*.*"):
                file.unlink()
            (tmp_path / "run" / "checkpoints" / "step-00000005").rmdir()
        guide = Guide(name if left == "run" else f"{name}/{left}")
        assert (guide.head, guide.patch_head) == (None, None)

    @pytest.mark.parametrize("name", ["~/run", "~/run@teacher"])
    def test_come_with_the_backbone_however_a_run_is_named(self, name, run, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        _, teacher = run()
        guide = Guide(name)
        assert_untouched(weights(guide.backbone), weights(teacher.backbone))
        assert guide.head is not None
        assert_untouched(weights(guide.head), weights(teacher.head))


def cosines(tokens: Tensor, prototypes: Tensor, mean: Tensor) -> Tensor:
    """(B, K)."""
    one, other = tokens - mean, prototypes - mean
    return one @ other.T / (one.norm(dim=1)[:, None] * other.norm(dim=1))


def test_similarities_worked_by_hand():
    """Mean (2, 0): the tokens less it are (3, 4), (-3, 4), (0, -8); (2, 1) looks up, (7, 0) to the right."""
    head = TokenPrototypes(torch.tensor([[5.0, 4.0], [-1.0, 4.0], [2.0, -8.0]]))
    found = head(torch.tensor([[2.0, 1.0], [7.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.8, 0.8, -1.0], [0.6, -0.6, 0.0]]))


class TestTokens:
    """As prototypes, where a backbone comes alone."""

    @pytest.fixture
    def guide(self, tmp_path) -> Guide:
        return Guide(str(write_own(tmp_path / "run", random_backbone(ViTSpec(24, 2, 3, 4, 12)))))

    def settings(self, tiny, **more) -> Config:
        return tiny(
            PATCHES | {"objective.ibot_head": "separate"} | {key.replace("__", "."): v for key, v in more.items()}
        )

    def features(self, guide: Guide, images: Pictures) -> tuple[Tensor, Tensor]:
        """Class tokens (N, D) and patches (N, 16, D) of all images, which have the size of global crops already."""
        mean, std = (torch.tensor(values[3]).view(3, 1, 1) for values in (MEAN, STD))
        with torch.no_grad():
            found = load_backbone(guide.name).forward_features((images.pixels / 255 - mean) / std)
        return found["x_norm_clstoken"], found["x_norm_patchtokens"]

    @pytest.mark.parametrize("batch", [5, 64])
    def test_of_all_images_where_there_are_as_many(self, batch, guide, tiny, monkeypatch):
        monkeypatch.setattr(distillation, "BATCH", batch)
        images = Pictures(12)
        head = guide.network(self.settings(tiny), images).head
        tokens, _ = self.features(guide, images)
        found = head(tokens)
        image = found.argmax(dim=0)
        assert sorted(image.tolist()) == list(range(12))
        assert image.tolist() != list(range(12)), "not drawn"
        others = torch.randn(4, 24)
        for of in (tokens, others):
            torch.testing.assert_close(head(of), cosines(of, tokens[image], tokens.mean(dim=0)), rtol=1e-4, atol=1e-5)

    def test_of_patches_are_one_of_each_image(self, guide, tiny):
        images = Pictures(12)
        head = guide.network(self.settings(tiny), images).patch_head
        _, patches = self.features(guide, images)
        best, place = cosines(patches.flatten(0, 1), head.prototypes + head.mean, head.mean).max(dim=0)
        torch.testing.assert_close(best, torch.ones(12), rtol=0, atol=1e-5)
        assert sorted((place // 16).tolist()) == list(range(12))
        assert len(set((place % 16).tolist())) > 3
        torch.testing.assert_close(head.mean, patches.flatten(0, 1)[place].mean(dim=0), rtol=1e-4, atol=1e-5)

    def test_are_used_again_where_images_are_fewer(self, guide, tiny):
        images = Pictures(7)
        head = guide.network(self.settings(tiny), images).head
        nearest = head(self.features(guide, images)[0]).argmax(dim=0)
        assert sorted(nearest.bincount().tolist()) == [1, 1, 2, 2, 2, 2, 2]

    @pytest.mark.parametrize(("patches", "expected"), [("none", 12), (5, 5), (20, 20)])
    def test_are_as_many_as_the_settings_say(self, patches, expected, guide, tiny):
        network = guide.network(self.settings(tiny, objective__ibot_prototypes=patches), Pictures(30))
        assert network.head(torch.randn(2, 24)).shape == (2, 12)
        assert network.patch_head(torch.randn(2, 24)).shape == (2, expected)

    def test_of_patches_are_absent_without_their_loss(self, guide, tiny):
        assert guide.network(tiny(), Pictures(12)).patch_head is None

    def test_are_a_function_of_the_seed(self, guide, tiny):
        """And of nothing else, nor do they take from torch's random state: a resumed run has the same ones."""
        images, found = Pictures(30), []
        for seed in (0, 0, 1):
            torch.manual_seed(len(found))
            state = torch.get_rng_state()
            found.append(weights(guide.network(self.settings(tiny, train__seed=seed), images)))
            assert torch.equal(torch.get_rng_state(), state)
        assert_untouched(found[0], found[1])
        for name in ("head.prototypes", "patch_head.prototypes", "head.mean", "patch_head.mean"):
            assert not torch.equal(found[0][name], found[2][name])

    @pytest.mark.parametrize("unreadable", [range(3), range(20, 28)])
    def test_pass_over_images_that_cannot_be_read(self, unreadable, guide, tiny):
        images = Pictures(12 + len(unreadable) + 8, unreadable)
        head = guide.network(self.settings(tiny), images).head
        tokens, _ = self.features(guide, images)
        mean = head.mean
        best, image = cosines(tokens, head.prototypes + mean, mean).max(dim=0)
        torch.testing.assert_close(best, torch.ones(12), rtol=0, atol=1e-5)
        assert len(set(image.tolist())) == 12
        assert not set(image.tolist()) & set(unreadable)

    def test_need_images(self, guide, tiny):
        with pytest.raises(UserError, match="none of 40 images can be read"):
            guide.network(self.settings(tiny), Pictures(40, range(40)))

    def test_of_few_images_are_of_each_several_times(self, guide, tiny):
        prototypes = guide.network(self.settings(tiny), Pictures(40, range(5, 40))).head.prototypes
        assert len(prototypes) == 12
        assert len(prototypes.round(decimals=4).unique(dim=0)) == 5

    def test_see_images_of_any_size_as_global_crops(self, guide, tiny):
        images = Pictures(12)
        images.pixels = torch.rand(12, 3, 30, 21).mul(255).byte()
        assert guide.network(self.settings(tiny), images).head(torch.randn(2, 24)).isfinite().all()


def write_guide(kind: str, folder, run) -> str:
    if kind.startswith("run"):
        heads = PATCHES | SEPARATE if kind == "run, two heads" else {}
        return run(heads | {"views.mean": "[0.1,0.2,0.3]", "views.std": "[0.4,0.5,0.6]"})[0]
    if kind == "own":
        return str(write_own(folder / "own", random_backbone(OWN)))
    file = folder / "weights.pth"
    {"DINO": write_dino, "DINOv2": write_dinov2, "release": lambda file: write_file(file, random_backbone(DINO_FILE))}[
        kind
    ](file)
    return str(file)


IMAGENET = {"views.mean": [0.485, 0.456, 0.406], "views.std": [0.229, 0.224, 0.225], "data.channels": 3}
OF_RUN = {"views.mean": [0.1, 0.2, 0.3], "views.std": [0.4, 0.5, 0.6], "data.channels": 3}
DECIDED = {  # without and with a loss of patches
    "run": (OF_RUN | {"objective.prototypes": 12}, {}),
    "run, two heads": (
        OF_RUN | {"objective.prototypes": 12},
        {"objective.ibot_head": "separate", "objective.ibot_prototypes": 20},
    ),
    "DINO": (IMAGENET | {"objective.prototypes": 15}, {}),
    "DINOv2": (
        IMAGENET | {"objective.prototypes": 15},
        {"objective.ibot_head": "separate", "objective.ibot_prototypes": 18},
    ),
    "release": (IMAGENET, {"objective.ibot_head": "separate"}),
    "own": ({"views.mean": MEAN[1], "views.std": STD[1], "data.channels": 1}, {"objective.ibot_head": "separate"}),
}


class TestSettings:
    @pytest.mark.parametrize("ibot_weight", [0, 1])
    @pytest.mark.parametrize("kind", DECIDED)
    def test_decided_by_the_guide(self, kind, ibot_weight, run, tmp_path):
        name = write_guide(kind, tmp_path, run)
        config = with_settings(objective__distill=name, objective__ibot_weight=ibot_weight, model__patch_size=4)
        followed, guide, reasons = follow_guide(config)
        always, with_patches = DECIDED[kind]
        expected = always | (with_patches if ibot_weight else {})
        everything = {key: get(config, key) for key, _ in leaves()}
        assert {key: get(followed, key) for key, _ in leaves()} == everything | expected
        assert reasons == dict.fromkeys(expected, f"of objective.distill={name}")
        assert guide.name == name

    @pytest.mark.parametrize(
        ("kind", "key", "value"),
        [
            ("run", "objective.prototypes", 13),
            ("run", "views.mean", [0.5, 0.5, 0.5]),
            ("run", "views.std", [0.5, 0.5, 0.5]),
            ("run", "data.channels", 1),
            ("run, two heads", "objective.ibot_prototypes", 12),
            ("DINO", "objective.prototypes", 12),
            ("DINOv2", "objective.ibot_prototypes", 15),
            ("own", "data.channels", 3),
        ],
    )
    def test_that_contradict_it_are_refused_by_name(self, kind, key, value, run, tmp_path):
        name = write_guide(kind, tmp_path, run)
        config = with_settings(objective__distill=name, objective__ibot_weight=1, model__patch_size=4)
        assign(config, key, value)
        with pytest.raises(UserError) as error:
            follow_guide(config)
        said = (DECIDED[kind][0] | DECIDED[kind][1])[key]
        assert str(error.value) == f"{key}={value}, but objective.distill={name} has {said}: leave {key} out"

    @pytest.mark.parametrize("kind", DECIDED)
    def test_that_say_the_same_are_fine(self, kind, run, tmp_path):
        name = write_guide(kind, tmp_path, run)
        plain = with_settings(objective__distill=name, objective__ibot_weight=1, model__patch_size=4)
        explicit = with_settings(objective__distill=name, objective__ibot_weight=1, model__patch_size=4)
        for key, value in (DECIDED[kind][0] | DECIDED[kind][1]).items():
            assign(explicit, key, value)
        assert follow_guide(explicit)[0] == follow_guide(plain)[0]

    @pytest.mark.parametrize("spec", [ViTSpec(24, 2, 3, 4, 12), ResNetSpec("resnet18")], ids=["ViT", "ResNet"])
    def test_patches_of_another_size_cannot_be_compared(self, spec, tmp_path):
        name = str(write_own(tmp_path / "run", random_backbone(spec)))
        config = with_settings(objective__distill=name, objective__ibot_weight=1, model__patch_size=8)
        with pytest.raises(UserError, match=r"objective\.ibot_weight compares patches: model\.patch_size=8 must be"):
            follow_guide(config)
        config.objective.ibot_weight = 0
        assert follow_guide(config)[1].backbone.spec == spec

    def test_crops_must_fit_the_guides_patches_too(self, tmp_path):
        name = str(write_own(tmp_path / "run", random_backbone(ViTSpec(24, 2, 3, 4, 12))))
        config = with_settings(objective__distill=name, views__global_size=18, model__patch_size=2)
        with pytest.raises(UserError, match=rf"views\.global_size=18 is not divisible by {name}'s 4"):
            follow_guide(config)
        config.views.global_size, config.views.local_size = 20, 6  # of local crops the guide sees nothing
        assert follow_guide(config)[1] is not None

    def test_crops_of_phases_must_fit_the_guides_patches_too(self, tmp_path):
        name = str(write_own(tmp_path / "run", random_backbone(ViTSpec(24, 2, 3, 4, 12))))
        config = with_settings(objective__distill=name, views__global_size=16, model__patch_size=2)
        config.train.phases = [Phase(0.5, 18, 8)]
        with pytest.raises(UserError, match=r"train\.phases\[0\]\.global_size=18"):
            follow_guide(config)

    def test_patches_need_as_many_prototypes_as_the_guides_only_head(self, run):
        name, _ = run()
        config = with_settings(objective__distill=name, objective__ibot_weight=1, model__patch_size=4)
        config.objective.ibot_head, config.objective.ibot_prototypes = "separate", 20
        with pytest.raises(UserError, match=r"objective\.ibot_prototypes=20"):
            follow_guide(config)

    def test_nothing_happens_without_a_guide(self):
        config = with_settings(objective__ibot_weight=1)
        assert follow_guide(config) == (config, None, {})

    def test_a_guide_that_is_not_there(self):
        with pytest.raises(UserError, match="no weights at 'nowhere'"):
            follow_guide(with_settings(objective__distill="nowhere"))


class Distilled(Reference):
    """DINOv2's step with a frozen network's targets, and no patch hidden from the student."""

    def __init__(self, config: Config, student: Network, teacher: Network, guide: Network):
        super().__init__(config, student, teacher)
        self.guide = {name: value.detach().clone() for name, value in named(guide)}

    def vit(self, of: dict[str, Tensor], image: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().vit(self.guide if of is self.teacher else of, image)

    def head(self, of: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        if of is not self.teacher:
            return super().head(of, name, x)
        has_one = not any(key.startswith("patch_head") for key in self.guide)
        return super().head(self.guide, "head" if has_one else name, x)


WIDER = {"model.embed_dim": 24, "objective.head_hidden": 20, "objective.head_bottleneck": 6}
STEPS = {  # settings of the guide's run, and further ones of the student's
    "class tokens": (WIDER, {"objective.ibot_weight": 0, "objective.koleo_weight": 0}),
    "one head": (WIDER | PATCHES, {}),
    "one head that knew no patches": (WIDER, {}),
    "two heads": (WIDER | PATCHES | SEPARATE, {}),
    "two heads for one": (WIDER | PATCHES, {"objective.ibot_head": "separate"}),
    "Sinkhorn": (WIDER | PATCHES, SINKHORN),
    "two micro-batches": (WIDER | PATCHES, {"train.accumulation": 2}),
}


def distilling(accelerator, config: Config, guide: Network) -> Trainer:
    """In double precision; the student has left its teacher."""
    trainer = build(accelerator, config)
    trainer.step.guide = guide.double()
    return trainer


@pytest.mark.parametrize("option", STEPS)
def test_three_steps_are_distillation(option, accelerator, tiny, run):
    """Against the papers' equations: targets of the guide, nothing hidden, an average of the student as the teacher."""
    of_guide, of_student = STEPS[option]
    name, _ = run(of_guide)
    config, guide, _ = follow_guide(tiny(DINOV2 | of_student | {"objective.distill": name}))
    network = guide.network(config, Pictures(8))
    trainer = distilling(accelerator, config, network)
    reference = Distilled(config, trainer.student, trainer.teacher, network)
    for number in range(3):
        views = views_of_batch(config, number)
        expected, norm = reference.step(number, views, hidden_patches(trainer, number))
        found = trainer.step(number, packed(views, config.train.accumulation))
        assert found.pop("health/gradient_norm").item() == pytest.approx(norm, rel=1e-4)
        assert {name: loss.item() for name, loss in found.items()} == pytest.approx(expected, rel=1e-5)
    assert_same(dict(named(trainer.student)), reference.student, rtol=1e-4, atol=1e-4)
    assert_same(dict(named(trainer.teacher)), reference.teacher, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["ViT", "ResNet", "tokens"])
def test_the_guide_is_frozen(kind, accelerator, tiny, run, tmp_path):
    changes = {}
    if kind == "ViT":
        name, _ = run(PATCHES | SEPARATE)
        changes = DINOV2
    else:
        spec = ResNetSpec("resnet18") if kind == "ResNet" else ViTSpec(24, 2, 3, 4, 12)
        name = str(write_own(tmp_path / "own", random_backbone(spec)))
    config = tiny(changes | {"objective.distill": name, "train.batch_size": 4})
    config.views.mean = config.views.std = None
    config, guide, _ = follow_guide(config)
    network = guide.network(config, Pictures(12))
    before = weights(network)
    trainer = trainer_of(accelerator, config, guide=network)
    moved = weights(trainer.student)
    for number in range(3):
        trainer.step.look(number, packed(views_of_batch(config, number)))
        trainer.step(number, packed(views_of_batch(config, number)))
    assert_untouched(weights(network), before)
    assert not any(value.requires_grad or value.grad is not None for value in network.parameters())
    assert not any(module.training for module in network.modules())
    assert any(not torch.equal(moved[name], value) for name, value in weights(trainer.student).items())


def test_targets_are_the_guides_probabilities(accelerator, tiny, run):
    """Centred by what it gave before; health looks at the tokens of the network that is learned."""
    name, teacher = run()
    config, guide, _ = follow_guide(tiny({"objective.distill": name}))
    trainer = trainer_of(accelerator, config, guide=guide.network(config, Pictures(8)))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.views.mean, config.views.std))
    centre = torch.zeros(12)
    for number, temperature in ((0, 0.04), (1, 0.055), (2, 0.07)):
        views = views_of_batch(config, number)
        pixels = [(view / 255 - mean) / std for view in views[:2]]
        with torch.no_grad():
            scores = torch.stack([teacher.head(teacher.backbone(view)) for view in pixels])
            tokens = torch.stack([trainer.teacher.backbone(view) for view in pixels])
        expected = ((scores - centre) / temperature).exp()
        expected /= expected.sum(dim=-1, keepdim=True)
        trainer.step(number, packed(views))
        output = trainer.step.teacher_output
        torch.testing.assert_close(output.targets, expected, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(output.logits, scores, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.tokens, tokens, rtol=1e-4, atol=1e-5)
        centre = 0.9 * centre + 0.1 * scores.flatten(0, 1).mean(dim=0)


def test_no_patch_is_hidden_from_the_student(accelerator, tiny, run):
    """It has nothing to put in a patch's place; without a guide it has."""
    name, _ = run(PATCHES)
    config, guide, _ = follow_guide(tiny(DINOV2 | {"objective.distill": name}))
    trainer = trainer_of(accelerator, config, guide=guide.network(config, Pictures(8)))
    assert trainer.student.backbone.mask_token is None
    assert trainer.step(0, packed(views_of_batch(config, 0)))["loss/ibot"].isfinite()
    assert trainer_of(accelerator, tiny(DINOV2)).student.backbone.mask_token is not None


ONE_TEMPERATURE = {
    "objective.student_temperature": 0.07,
    "objective.teacher_temperature": 0.07,
    "objective.teacher_temperature_start": 0.07,
    "views.local_crops": 0,
}


def test_none_does_better_than_the_guide_itself(accelerator, tiny, run):
    """Of two equal views at one temperature, its own weights give the targets' entropy, and nothing to learn."""
    name, teacher = run(PATCHES | SEPARATE)
    changes = PATCHES | SEPARATE | ONE_TEMPERATURE
    config, guide, _ = follow_guide(tiny(changes | {"objective.distill": name}))
    view = views_of_batch(config, 0)[0]

    def step(noise: float) -> dict[str, float]:
        trainer = trainer_of(accelerator, config, guide=guide.network(config, Pictures(8)))
        state = {name: tensor for name, tensor in teacher.state_dict().items() if "mask_token" not in name}
        trainer.student.load_state_dict(state)
        with torch.no_grad():
            for parameter in trainer.student.parameters():
                parameter.add_(noise * torch.randn_like(parameter))
        found = trainer.step(0, packed([view, view]))
        probabilities = trainer.step.teacher_output.targets
        entropy = -(probabilities * probabilities.log()).sum(dim=-1).mean()
        return {name: value.item() for name, value in found.items()} | {"entropy": entropy.item()}

    best = step(0.0)
    assert best["loss/dino"] == pytest.approx(best["entropy"], rel=1e-5)
    for others in [step(noise) for noise in (0.01, 0.01, 0.1, 0.1)]:
        assert others["entropy"] == best["entropy"]
        assert others["loss/dino"] > best["loss/dino"]
        assert others["loss/ibot"] > best["loss/ibot"]
        assert others["health/gradient_norm"] > 1000 * best["health/gradient_norm"]
