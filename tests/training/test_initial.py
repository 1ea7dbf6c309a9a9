"""Starting from weights that exist: what they decide, that both networks begin as them, and the heads' warm-up."""

import json
from dataclasses import replace

import pytest
import torch
from dino.training.targets import Targets
from test_step import Trainer, assert_same, assert_untouched, packed, views_of_batch, weights
from torch import Tensor

from dino import load_backbone
from dino.config.auto import PoolFacts, resolve
from dino.config.read import assign, get
from dino.config.schema import Config
from dino.errors import UserError
from dino.methods.network import Network, Normalise, build_networks, vit_spec
from dino.models import Backbone, ResNet, ResNetSpec, VisionTransformer, ViTSpec, save_backbone
from dino.run import RunDirectory
from dino.training.initial import OF_THE_WEIGHTS, follow_weights
from dino.training.metrics import Metrics
from dino.training.optimizer import build_optimizer
from dino.training.schedules import schedules
from dino.training.settings import load
from dino.training.step import Step

OWN = ViTSpec(24, 3, 3, 4, 12, in_chans=1, ffn="swiglu", layer_scale=0.5, registers=2, mask_token=True)
DINOV2 = ViTSpec(128, 2, 2, 7, 21, layer_scale=1.0, mask_token=True, position_interpolation="offset")
PLAIN = ViTSpec(24, 2, 3, 4, 12)
RESNET = ResNetSpec("resnet18")
MEAN, STD = {1: [0.25], 3: [0.25, 0.5, 0.75]}, {1: [0.125], 3: [0.125, 0.25, 0.5]}


def random_backbone(spec: ViTSpec | ResNetSpec) -> Backbone:
    """In evaluation mode, with no parameter at a value that a fresh one could have, too."""
    backbone: Backbone = ResNet(spec) if isinstance(spec, ResNetSpec) else VisionTransformer(spec)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone.eval()


def write_own(folder, backbone: Backbone):
    """A run directory with nothing but its backbone."""
    folder.mkdir(exist_ok=True)
    channels = backbone.spec.in_chans
    preprocessing = {"image_size": 12, "mean": MEAN[channels], "std": STD[channels]}
    save_backbone(folder / "backbone.safetensors", backbone, preprocessing, {})
    return folder


def write_file(file, backbone: Backbone):
    """A state dict alone, as releases are; a ViT's parameter names are DINOv2's."""
    torch.save(backbone.state_dict(), file)
    return file


def trainer_of(accelerator, config: Config, initial: Backbone | None = None, guide: Network | None = None) -> Trainer:
    """Student, teacher and step as a run builds them."""
    torch.manual_seed(0)
    student, teacher = build_networks(config, initial)
    targets, optimizer = Targets(config), build_optimizer(student, config.optim)
    normalise = Normalise(config.views.mean, config.views.std)
    wrapped, prepared = accelerator.prepare(student, optimizer)
    plan = schedules(config)
    step = Step(accelerator, config, wrapped, teacher, targets, prepared, normalise, plan, guide)
    return Trainer(step, student, teacher, targets, optimizer)


def with_settings(**values) -> Config:
    """Not checked: what depends on the weights is not known before they are read."""
    config = Config()
    for key, value in values.items():
        assign(config, key.replace("__", "."), value)
    return config


def resolved(config: Config) -> Config:
    return resolve(config, PoolFacts(images=1000, channels=int(config.data.channels), kind="folder"))[0]


@pytest.fixture
def own(tmp_path):
    return write_own(tmp_path / "run", random_backbone(OWN))


EXPECTED = {
    "own": {
        "model.patch_size": 4,
        "model.embed_dim": 24,
        "model.depth": 3,
        "model.num_heads": 3,
        "model.ffn": "swiglu",
        "model.layer_scale": 0.5,
        "model.registers": 2,
        "model.position_interpolation": "size",
        "model.position_size": 12,
        "data.channels": 1,
        "views.mean": MEAN[1],
        "views.std": STD[1],
    },
    "DINOv2": {
        "model.patch_size": 7,
        "model.embed_dim": 128,
        "model.depth": 2,
        "model.num_heads": 2,
        "model.ffn": "mlp",
        "model.layer_scale": 1.0,
        "model.registers": 0,
        "model.position_interpolation": "offset",
        "model.position_size": 21,
        "data.channels": 3,
        "views.mean": [0.485, 0.456, 0.406],
        "views.std": [0.229, 0.224, 0.225],
    },
    "ResNet": {"model.arch": "resnet18", "data.channels": 3, "views.mean": [0.485, 0.456, 0.406]},
}
SPECS = {"own": OWN, "DINOv2": DINOV2, "ResNet": RESNET}


@pytest.mark.parametrize("kind", SPECS)
def test_weights_decide_the_architecture(kind, tmp_path):
    backbone = random_backbone(SPECS[kind])
    name = write_own(tmp_path / "run", backbone) if kind == "own" else write_file(tmp_path / "weights.pth", backbone)
    config, initial, reasons = follow_weights(
        with_settings(model__init=str(name), views__global_size=28, views__local_size=28), None
    )
    assert {key: get(config, key) for key in EXPECTED[kind]} == EXPECTED[kind]
    assert reasons.keys() >= EXPECTED[kind].keys()
    assert all(str(name) in reason for reason in reasons.values())
    assert_untouched(weights(initial), weights(backbone))
    assert config.views.global_size == 28
    student, _ = build_networks(resolved(config), initial)
    if kind != "ResNet":
        assert vit_spec(resolved(config)) == replace(SPECS[kind], mask_token=False)
    assert type(student.backbone) is type(backbone)


def test_a_named_size_is_found(tmp_path):
    spec = ViTSpec(192, 12, 3, 16, 32)
    file = write_own(tmp_path / "run", random_backbone(spec))
    config, _, _ = follow_weights(with_settings(model__init=str(file)), None)
    assert (config.model.arch, config.model.embed_dim, config.model.depth, config.model.num_heads) == (
        "vit_tiny", 192, 12, 3,
    )  # fmt: skip
    assert vit_spec(resolved(config)) == spec


OTHER = {
    "model.arch": "vit_base",
    "model.patch_size": 8,
    "model.embed_dim": 48,
    "model.depth": 5,
    "model.num_heads": 2,
    "model.ffn": "mlp",
    "model.layer_scale": 0.1,
    "model.registers": 4,
    "model.position_interpolation": "offset",
    "model.position_size": 16,
    "data.channels": 3,
    "views.mean": [0.5],
    "views.std": [0.5],
}


@pytest.mark.parametrize("key", OTHER)
def test_a_contradiction_is_refused_by_name(key, own):
    assert OTHER.keys() == set(OF_THE_WEIGHTS)
    config = with_settings(model__init=str(own))
    assign(config, key, OTHER[key])
    with pytest.raises(UserError) as error:
        follow_weights(config, None)
    assert f"{key}={OTHER[key]}" in str(error.value)
    assert f"leave {key} out" in str(error.value)


@pytest.mark.parametrize("key", EXPECTED["own"])
def test_saying_the_same_is_fine(key, own):
    config = with_settings(model__init=str(own))
    assign(config, key, EXPECTED["own"][key])
    assert follow_weights(config, None)[0] == follow_weights(with_settings(model__init=str(own)), None)[0]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (ViTSpec(192, 12, 3, 16, 32), {"model__depth": 12}),
        (ViTSpec(24, 3, 3, 16, 32), {"model__arch": "vit_tiny", "model__embed_dim": 24, "model__depth": 3}),
    ],
    ids=["number of a named size", "another name with all numbers"],
)
def test_saying_the_same_size_in_other_words_is_fine(spec, said, tmp_path):
    name = str(write_own(tmp_path / "run", random_backbone(spec)))
    config, _, _ = follow_weights(with_settings(model__init=name, **said), None)
    assert vit_spec(resolved(config)) == spec


def test_crops_need_only_fit_the_patches_of_the_weights(own):
    config = load(None, [f"model.init={own}", "views.global_size=20", "views.local_size=12"])
    assert follow_weights(config, None)[0].model.patch_size == 4


@pytest.mark.parametrize(
    ("spec", "settings", "said"),
    [
        (DINOV2, ["views.global_size=224", "views.local_size=96"], "views.local_size=96 is not divisible"),
        (RESNET, ["objective.ibot_weight=1"], "objective.ibot_weight needs patches"),
    ],
    ids=["crops", "masks"],
)
def test_what_the_weights_cannot_do_is_told_at_once(spec, settings, said, tmp_path):
    name = write_file(tmp_path / "weights.pth", random_backbone(spec))
    with pytest.raises(UserError, match=said):
        follow_weights(load(None, [f"model.init={name}", *settings]), None)


class TestResumed:
    def test_the_weights_are_not_read_again(self, own):
        config = with_settings(model__init=str(own))
        first, _, _ = follow_weights(config, None)
        (own / "backbone.safetensors").unlink()
        earlier = resolved(first)
        assert follow_weights(config, earlier) == (first, None, {})
        with pytest.raises(UserError, match="no weights"):
            follow_weights(config, None)

    def test_a_contradiction_is_left_to_be_refused(self, own, tmp_path):
        earlier = resolved(follow_weights(with_settings(model__init=str(own)), None)[0])
        config, _, _ = follow_weights(with_settings(model__init=str(own), model__registers=4), earlier)
        with pytest.raises(UserError, match=r"model.registers: 2 there, 4 now"):
            RunDirectory(tmp_path).refuse_other_config(config, earlier)

    def test_other_weights_are_another_run(self, own, tmp_path):
        earlier = resolved(follow_weights(with_settings(model__init=str(own)), None)[0])
        config, _, _ = follow_weights(with_settings(model__init="elsewhere"), earlier)
        with pytest.raises(UserError, match=r"model.init: .* there, elsewhere now"):
            RunDirectory(tmp_path).refuse_other_config(config, earlier)


def test_without_weights_nothing_changes():
    config = with_settings(model__depth=3)
    assert follow_weights(config, None) == (config, None, {})


def begun(spec, tmp_path, ibot_weight: float = 0.0, **more) -> tuple[Config, Backbone]:
    """Config and weights of a run that starts from a file of random ones."""
    name = str(write_own(tmp_path / "run", random_backbone(spec)))
    settings = {
        "model__init": name,
        "objective__ibot_weight": ibot_weight,
        "objective__head_hidden": 16,
        "objective__head_bottleneck": 8,
        "objective__prototypes": 16,
        "views__global_size": 14 if spec is DINOV2 else 12,
        "views__local_size": 7 if spec is DINOV2 else 8,
        "views__local_crops": 2,
        "train__batch_size": 4,
        "train__steps": 20,
    }
    config, initial, _ = follow_weights(with_settings(**settings | more), None)
    return resolved(config), initial


@pytest.mark.parametrize("ibot_weight", [0.0, 1.0])
@pytest.mark.parametrize("has_token", [False, True])
def test_both_backbones_are_the_weights_bit_by_bit(has_token, ibot_weight, tmp_path):
    """All but the mask token: it is dropped where it is not needed, and zero where the weights have none."""
    config, initial = begun(replace(OWN, mask_token=has_token), tmp_path, ibot_weight)
    expected = {name: tensor for name, tensor in weights(initial).items() if name != "mask_token"}
    if ibot_weight:
        expected["mask_token"] = initial.mask_token.detach() if has_token else torch.zeros(1, 24)
    for network in build_networks(config, initial):
        assert_untouched(weights(network.backbone), expected)


@pytest.mark.parametrize("spec", [OWN, DINOV2, RESNET], ids=["own", "DINOv2", "ResNet"])
def test_features_at_any_crop_size_are_those_of_the_weights(spec, tmp_path):
    config, initial = begun(spec, tmp_path)
    images = torch.randn(2, spec.in_chans, 28, 28)
    for network in build_networks(config, initial):
        assert torch.equal(network.eval().backbone(images), load_backbone(config.model.init)(images))


def test_heads_are_new_and_alike(tmp_path):
    config, initial = begun(OWN, tmp_path, 1.0, objective__ibot_head="separate")
    heads = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        student, teacher = build_networks(config, initial)
        assert_untouched(weights(student), weights(teacher))
        heads.append(weights(student.head) | {f"patch.{k}": v for k, v in weights(student.patch_head).items()})
    by_chance = {name for name in heads[0] if not name.endswith(("bias", "weight_g"))}
    assert {name for name in heads[0] if not torch.equal(heads[0][name], heads[1][name])} == by_chance


@pytest.mark.parametrize("frozen", [0, 1, 3])
@pytest.mark.parametrize("spec", [OWN, RESNET], ids=["ViT", "ResNet"])
def test_the_backbone_stands_still_for_exactly_that_many_steps(spec, frozen, accelerator, tmp_path):
    """Neither gradients, nor weight decay, nor a moving average of equals may touch one bit of it; heads move."""
    settings = {"optim__freeze_backbone_steps": frozen, "objective__momentum": 0.37, "optim__lr": 0.01}
    if spec is RESNET:
        settings |= {"views__global_size": 32, "views__local_size": 32}
    config, initial = begun(spec, tmp_path, float(spec is OWN), optim__freeze_last_layer_steps=0, **settings)
    trainer = trainer_of(accelerator, config, initial)
    for number in range(5):
        before = parameters(trainer)
        trainer.step(number, packed(views_of_batch(config, number)))
        after = parameters(trainer)
        same = {name for name in before if torch.equal(before[name], after[name])}
        of_backbones = {name for name in before if ".backbone." in name}
        if number < frozen:
            assert same == of_backbones
        else:
            assert not same & of_backbones
    assert before.keys() > of_backbones


def parameters(trainer: Trainer) -> dict[str, Tensor]:
    """All that are learned, but the lengths of the prototypes, which are not."""
    pairs = (("student", trainer.student), ("teacher", trainer.teacher))
    named = {f"{of}.{name}": value for of, network in pairs for name, value in network.named_parameters()}
    return {name: value.detach().clone() for name, value in named.items() if not name.endswith("weight_g")}


@pytest.mark.parametrize(
    "spec",
    [OWN, RESNET],
    ids=["ViT", "ResNet"],
)
def test_looking_at_the_start_changes_nothing(spec, accelerator, tmp_path):
    config, initial = begun(spec, tmp_path)
    trainer = trainer_of(accelerator, config, initial)
    modules = (trainer.student, trainer.teacher, trainer.targets)
    before, random = [weights(module) for module in modules], torch.get_rng_state()
    trainer.step.look(0, packed(views_of_batch(config, 0)))
    for module, state in zip(modules, before, strict=True):
        assert_same(weights(module), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    tokens = torch.cat([initial(view) for view in normalised(config, 0)]).detach()
    torch.testing.assert_close(trainer.step.teacher_output.tokens.flatten(0, 1), tokens, rtol=1e-3, atol=1e-4)


def normalised(config: Config, seed: int) -> list[Tensor]:
    """The two global views of a batch."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.views.mean, config.views.std))
    return [(view / 255 - mean) / std for view in views_of_batch(config, seed)[:2]]


@pytest.mark.parametrize(("steps", "frozen"), [(5, 0), (400, 40), (100_000, 1000)])
def test_auto_rules(steps, frozen):
    new, continued = (resolve(with_settings(model__init=init, train__steps=steps), POOL)[0] for init in (None, "runs"))
    assert new.optim.freeze_backbone_steps == 0
    assert continued.optim.freeze_backbone_steps == frozen
    assert continued.optim.lr == pytest.approx(new.optim.lr / 10, rel=1e-4)


POOL = PoolFacts(images=10_000, channels=3, kind="folder")


class Indicators:
    """In place of Health: a healthy run whose neighbours name the class in half of all cases."""

    def is_due(self, _: int) -> bool:
        return True

    def measure(self, _: int) -> dict[str, float]:
        return HEALTHY | {"health/knn": 0.5}


HEALTHY = {
    "health/entropy_ratio": 0.5,
    "health/kl_to_center": 1.0,
    "health/prototypes_in_use": 0.9,
    "health/rank_me": 12.0,
    "health/feature_std": 0.9,
}


@pytest.mark.parametrize(
    "start",
    [0, 40],
)
def test_the_verdict_compares_with_the_weights_also_when_resumed(start, accelerator, tiny, tmp_path):
    config, directory = tiny({"train.steps": 100}), RunDirectory(tmp_path)
    with Metrics(accelerator, config, directory, 16, 0) as metrics:
        metrics.begin(HEALTHY | {"health/knn": 0.9})
        for step in (20, 40):
            metrics.add({"loss/dino": torch.tensor(1.0)})
            metrics.log(step, 0.1, {}, Indicators())
        if start:
            metrics = Metrics(accelerator, config, directory, 16, start)
        metrics.add({"loss/dino": torch.tensor(1.0)})
        metrics.log(60, 0.1, {}, Indicators())
        metrics.bar.close()
    verdicts = [json.loads(line).get("health/verdict") for line in directory.metrics.read_text().splitlines()]
    assert verdicts == [None, "warming up", "getting worse", "getting worse"]
