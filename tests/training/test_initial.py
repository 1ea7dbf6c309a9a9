"""Starting from weights that exist: what they decide, that both networks begin as them, and the heads' warm-up."""

from dataclasses import replace

import pytest
import torch
from builders import (
    MEAN,
    STD,
    build,
    differing,
    normalised,
    packed,
    random_backbone,
    resolved,
    views_of_batch,
    weights,
    with_settings,
    write_own,
    write_release,
)

from dino import load_backbone
from dino.config.read import get
from dino.config.schema import Config
from dino.errors import UserError
from dino.methods.dino import build_networks
from dino.models import Backbone, ResNetSpec, ViTSpec, build_backbone
from dino.run import RunDirectory
from dino.training.initial import OF_THE_WEIGHTS, follow_weights
from dino.training.resume import refuse_other_config
from dino.training.settings import load

OWN = ViTSpec(24, 3, 3, 4, 12, in_chans=1, ffn="swiglu", layer_scale=0.5, registers=2, mask_token=True)
DINOV2 = ViTSpec(128, 2, 2, 7, 21, layer_scale=1.0, mask_token=True, position_interpolation="offset")
RESNET = ResNetSpec("resnet18")
SPECS = {"own": OWN, "DINOv2": DINOV2, "ResNet": RESNET}
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


@pytest.fixture
def own(tmp_path):
    return write_own(tmp_path / "run", random_backbone(OWN))


def followed(name: object, changes: dict | None = None) -> tuple[Config, Backbone | None]:
    config, initial, _ = follow_weights(with_settings({"model.init": str(name)} | (changes or {})), None)
    return config, initial


@pytest.mark.parametrize("kind", SPECS)
def test_weights_decide_the_architecture(kind, tmp_path):
    backbone = random_backbone(SPECS[kind])
    name = write_own(tmp_path / "run", backbone) if kind == "own" else write_release(tmp_path / "weights.pth", backbone)
    settings = {"model.init": str(name), "views.global_size": 28, "views.local_size": 28}
    config, initial, reasons = follow_weights(with_settings(settings), None)
    assert {key: get(config, key) for key in EXPECTED[kind]} == EXPECTED[kind]
    assert reasons.keys() >= EXPECTED[kind].keys()
    assert all(str(name) in reason for reason in reasons.values())
    assert differing(weights(initial), weights(backbone)) == set()
    assert config.views.global_size == 28
    expected = SPECS[kind] if kind == "ResNet" else replace(SPECS[kind], mask_token=False)
    assert build_backbone(resolved(config)).spec == expected


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (ViTSpec(192, 12, 3, 16, 32), {}),
        (ViTSpec(192, 12, 3, 16, 32), {"model.depth": 12}),
        (ViTSpec(24, 3, 3, 16, 32), {"model.arch": "vit_tiny", "model.embed_dim": 24, "model.depth": 3}),
    ],
    ids=["a named size", "number of a named size", "another name with all numbers"],
)
def test_a_size_may_be_said_in_other_words(spec, said, tmp_path):
    config, _ = followed(write_own(tmp_path / "run", random_backbone(spec)), said)
    assert build_backbone(resolved(config)).spec == spec
    if spec.embed_dim == 192:
        assert config.model.arch == "vit_tiny"


OTHER = {
    "model.arch": "vit_base",
    "model.patch_size": 8,
    "model.embed_dim": 48,
    "model.depth": 5,
    "model.num_heads": 2,
    "model.ffn": "mlp",
    "model.layer_scale": 0.1,
    "model.registers": 4,
    "model.positions": "rotary",
    "model.stem": "conv",
    "model.position_interpolation": "offset",
    "model.position_size": 16,
    "data.channels": 3,
    "views.mean": [0.5],
    "views.std": [0.5],
}


@pytest.mark.parametrize("key", OTHER)
def test_a_contradiction_is_refused_by_name_and_saying_the_same_is_fine(key, own):
    assert OTHER.keys() == set(OF_THE_WEIGHTS)
    with pytest.raises(UserError) as error:
        followed(own, {key: OTHER[key]})
    assert f"{key}={OTHER[key]}" in str(error.value)
    assert f"leave {key} out" in str(error.value)
    if key in EXPECTED["own"]:
        assert followed(own, {key: EXPECTED["own"][key]})[0] == followed(own)[0]


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
    name = write_release(tmp_path / "weights.pth", random_backbone(spec))
    with pytest.raises(UserError, match=said):
        follow_weights(load(None, [f"model.init={name}", *settings]), None)


def test_without_weights_nothing_changes():
    config = with_settings({"model.depth": 3})
    assert follow_weights(config, None) == (config, None, {})


class TestResumed:
    def test_the_weights_are_not_read_again(self, own):
        config, _ = followed(own)
        (own / "backbone.safetensors").unlink()
        again = with_settings({"model.init": str(own)})
        assert follow_weights(again, resolved(config)) == (config, None, {})
        with pytest.raises(UserError, match="no weights"):
            followed(own)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"model.registers": 4}, "model.registers: 2 there, 4 now"),
            ({"model.init": "elsewhere"}, "model.init: .* there, elsewhere now"),
        ],
    )
    def test_a_contradiction_is_left_to_be_refused(self, changes, said, own, tmp_path):
        earlier = resolved(followed(own)[0])
        config, _, _ = follow_weights(with_settings({"model.init": str(own)} | changes), earlier)
        with pytest.raises(UserError, match=said):
            refuse_other_config(RunDirectory(tmp_path), config, earlier, has_checkpoint=True)


def begun(spec, tmp_path, changes: dict | None = None) -> tuple[Config, Backbone]:
    """Config and weights of a run that starts from a file of random ones."""
    patch = 8 if spec == RESNET else spec.patch_size
    settings = {
        "objective.head_hidden": 16,
        "objective.head_bottleneck": 8,
        "objective.prototypes": 16,
        "views.global_size": 3 * patch,
        "views.local_size": 2 * patch,
        "views.local_crops": 1,
        "train.batch_size": 4,
        "train.steps": 20,
    }
    config, initial = followed(write_own(tmp_path / "run", random_backbone(spec)), settings | (changes or {}))
    return resolved(config), initial


@pytest.mark.parametrize("ibot_weight", [0.0, 1.0])
@pytest.mark.parametrize("has_token", [False, True])
def test_both_backbones_are_the_weights_bit_by_bit(has_token, ibot_weight, tmp_path):
    """All but the mask token: it is dropped where it is not needed, and zero where the weights have none."""
    config, initial = begun(replace(OWN, mask_token=has_token), tmp_path, {"objective.ibot_weight": ibot_weight})
    expected = {name: tensor for name, tensor in weights(initial).items() if name != "0.mask_token"}
    if ibot_weight:
        expected["0.mask_token"] = initial.mask_token.detach() if has_token else torch.zeros(1, 24)
    for network in build_networks(config, initial):
        assert differing(weights(network.backbone), expected) == set()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_features_at_any_crop_size_are_those_of_the_weights(spec, tmp_path):
    config, initial = begun(spec, tmp_path)
    images = torch.randn(2, spec.in_chans, 28, 28)
    for network in build_networks(config, initial):
        assert torch.equal(network.eval().backbone(images), load_backbone(config.model.init)(images))


@pytest.mark.parametrize(("spec", "frozen"), [(OWN, 0), (OWN, 2), (RESNET, 1)], ids=str)
def test_the_backbone_stands_still_for_exactly_that_many_steps(spec, frozen, accelerator, tmp_path):
    """Neither gradients, nor weight decay, nor a moving average of equals may touch one bit of it; heads move."""
    changes = {
        "optim.freeze_backbone_steps": frozen,
        "optim.lr": 0.01,
        "objective.teacher_momentum": 0.37,
        "objective.ibot_weight": float(spec is OWN),
        "objective.freeze_last_layer_steps": 0,
    }
    built = build(accelerator, *begun(spec, tmp_path, changes))

    def parameters() -> dict[str, torch.Tensor]:
        """All that are learned, but the lengths of the prototypes, which are not."""
        named = torch.nn.ModuleDict({"student": built.method.student, "teacher": built.method.teacher})
        return {n: p.detach().clone() for n, p in named.named_parameters() if not n.endswith("weight_g")}

    of_backbones = {name for name in parameters() if ".backbone." in name}
    for number in range(frozen + 2):
        before = parameters()
        built.take(number)
        same = before.keys() - differing(before, parameters())
        assert same == (of_backbones if number < frozen else set())


@pytest.mark.parametrize("spec", [OWN, RESNET], ids=["ViT", "ResNet"])
def test_a_look_at_the_start_sees_the_weights_as_they_are(spec, accelerator, tmp_path):
    """BatchNorm takes in no statistics of it, and nothing of torch's random state is used."""
    config, initial = begun(spec, tmp_path)
    step, method, _ = build(accelerator, config, initial)
    before, random = weights(*method.state().values()), torch.get_rng_state()
    step.look(0, packed(views_of_batch(config, 0)))
    assert differing(weights(*method.state().values()), before) == set()
    assert torch.equal(torch.get_rng_state(), random)
    tokens = torch.stack([initial(normalised(config, view)) for view in views_of_batch(config, 0)[:2]]).detach()
    assert (method.seen.tokens - tokens).norm() < 1e-4 * tokens.norm()


@pytest.mark.parametrize(("steps", "frozen"), [(5, 0), (400, 40), (100_000, 1000)])
def test_auto_rules(steps, frozen):
    new, continued = (
        resolved(with_settings({"model.init": init, "train.steps": steps}), images=10_000) for init in (None, "runs")
    )
    assert new.optim.freeze_backbone_steps == 0
    assert continued.optim.freeze_backbone_steps == frozen
    assert continued.optim.lr == pytest.approx(new.optim.lr / 10, rel=1e-4)
