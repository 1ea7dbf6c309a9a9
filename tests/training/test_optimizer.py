"""Which parameters learn how fast and are decayed, what an optimizer does, and that a broken step leaves no trace."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from dino.config.schema import OptimConfig
from dino.methods.heads import DINOHead
from dino.methods.network import Network
from dino.models import ResNet, ResNetSpec, VisionTransformer, ViTSpec
from dino.training.optimizer import (
    build_optimizer,
    clip_gradients,
    parameter_groups,
    rate_factor,
    set_rates,
    step_unless,
)

BLOCK_DECAYED = {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
BLOCK_FREE = {
    *("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"),
    *("attn.qkv.bias", "attn.proj.bias", "mlp.fc1.bias", "mlp.fc2.bias"),
    *("ls1.gamma", "ls2.gamma"),
}
HEAD_DECAYED = {"head.mlp.0.weight", "head.mlp.2.weight", "head.last_layer.weight_v"}
HEAD_FREE = {"head.mlp.0.bias", "head.mlp.2.bias"}
TOKENS = {"backbone.cls_token", "backbone.pos_embed", "backbone.register_tokens", "backbone.mask_token"}


def transformer(norm_last_layer: bool = True, depth: int = 2, patch_head: bool = False) -> Network:
    spec = ViTSpec(16, depth, 2, 4, 8, registers=2, layer_scale=1e-5, mask_token=True)
    heads = [DINOHead(16, size, 2, 24, 8, norm_last_layer) for size in ((12, 20) if patch_head else (12,))]
    return Network(VisionTransformer(spec), *heads)


def names(network: nn.Module, group: dict) -> set[str]:
    return {name for name, value in network.named_parameters() if any(value is member for member in group["params"])}


def factors(network: nn.Module, groups: list[dict], key: str = "factor") -> dict[str, float]:
    """Of every trained parameter, by name; each is in exactly one group."""
    of_groups = {id(value): group[key] for group in groups for value in group["params"]}
    trained = {name: id(value) for name, value in network.named_parameters() if value.requires_grad}
    assert sum(len(group["params"]) for group in groups) == len(of_groups) == len(trained)
    return {name: of_groups[identity] for name, identity in trained.items()}


class TestDecay:
    """As published: class token, positions, registers and weight_g are decayed."""

    def test_vision_transformer(self):
        network = transformer()
        decayed, free = parameter_groups(network)
        blocks = [f"backbone.blocks.{index}." for index in range(2)]
        matrices = {block + name for block in blocks for name in BLOCK_DECAYED} | {"backbone.patch_embed.proj.weight"}
        vectors = {block + name for block in blocks for name in BLOCK_FREE}
        assert names(network, decayed) == matrices | TOKENS | HEAD_DECAYED
        norms = {"backbone.norm.weight", "backbone.norm.bias"}
        assert names(network, free) == vectors | norms | HEAD_FREE | {"backbone.patch_embed.proj.bias"}
        assert (decayed["decayed"], free["decayed"]) == (True, False)
        assert free["weight_decay"] == 0

    def test_tokens_may_be_exempt(self):
        network = transformer()
        with_tokens, without = parameter_groups(network, True), parameter_groups(network, False)
        assert names(network, with_tokens[0]) - names(network, without[0]) == TOKENS
        assert names(network, without[1]) - names(network, with_tokens[1]) == TOKENS

    def test_lengths_of_prototypes_are_decayed_where_they_are_learned(self):
        network = transformer(norm_last_layer=False)
        assert "head.last_layer.weight_g" in names(network, parameter_groups(network, decay_tokens=False)[0])
        network = transformer(norm_last_layer=True)
        grouped = set().union(*(names(network, group) for group in parameter_groups(network)))
        assert set(dict(network.named_parameters())) - grouped == {"head.last_layer.weight_g"}

    def test_resnet(self):
        """Convolutions are decayed, BatchNorm's gains and all biases are not; there are no layers of rates."""
        network = Network(ResNet(ResNetSpec("resnet18")), DINOHead(512, 12, 2, 24, 8))
        decayed, free = parameter_groups(network, True, 0.9, 0.2)
        of_kind: dict[type, set[str]] = {nn.Conv2d: set(), nn.BatchNorm2d: set()}
        for module_name, module in network.backbone.named_modules():
            for name, _ in module.named_parameters(recurse=False):
                of_kind[type(module)].add(f"backbone.{module_name}.{name}")
        assert names(network, decayed) == of_kind[nn.Conv2d] | HEAD_DECAYED
        assert names(network, free) == of_kind[nn.BatchNorm2d] | HEAD_FREE
        assert len(of_kind[nn.Conv2d]) == 20
        assert (decayed["factor"], free["factor"]) == (1.0, 1.0)


PUBLISHED = {  # of DINOv2's training: decay .9, depth 12, patch embedding × .2
    **dict.fromkeys(sorted(TOKENS), 0.2542),
    "backbone.patch_embed.proj.weight": 0.0508,
    "backbone.patch_embed.proj.bias": 0.0508,
    "backbone.blocks.0.norm1.weight": 0.2824,
    "backbone.blocks.0.attn.qkv.bias": 0.2824,
    "backbone.blocks.1.mlp.fc1.weight": 0.3138,
    "backbone.blocks.10.attn.proj.weight": 0.81,
    "backbone.blocks.11.ls2.gamma": 0.9,
    "backbone.norm.weight": 1.0,
    "backbone.norm.bias": 1.0,
    "head.mlp.0.weight": 1.0,
    "head.last_layer.weight_v": 1.0,
    "patch_head.mlp.2.bias": 1.0,
    "patch_head.last_layer.weight_g": 1.0,
}


class TestLayerDecay:
    @pytest.mark.parametrize("decay_tokens", [True, False])
    def test_rates_are_the_published_factors_times_those_of_the_step(self, decay_tokens):
        """Set again for every step, and weight decay without the factor: AdamW multiplies it by the rate itself."""
        network = transformer(norm_last_layer=False, depth=12, patch_head=True)
        assert {name: rate_factor(name, 12, 0.9, 0.2) for name in PUBLISHED} == pytest.approx(PUBLISHED, abs=5e-5)
        settings = OptimConfig(layer_decay=0.9, patch_embed_lr=0.2, decay_tokens=decay_tokens)
        optimizer = build_optimizer(network, settings)
        for lr, decay in ((0.25, 0.04), (0.125, 0.4)):
            set_rates(optimizer, lr, decay)
            rates = factors(network, optimizer.param_groups, key="lr")
            expected = {name: lr * factor for name, factor in PUBLISHED.items()}
            assert {name: rates[name] for name in expected} == pytest.approx(expected, rel=1e-3)
            for index in range(12):
                of_block = {rate for name, rate in rates.items() if name.startswith(f"backbone.blocks.{index}.")}
                assert list(of_block) == pytest.approx([lr * 0.9 ** (12 - index)])
            for group in optimizer.param_groups:
                assert group["weight_decay"] == (decay if group["decayed"] else 0.0)

    def test_without_it_all_learn_alike_but_the_patch_embedding(self):
        """DINOv2's ViT-L and ViT-g: layer decay 1, patch embedding × .2."""
        network = transformer()
        for name, factor in factors(network, parameter_groups(network, True, 1.0, 0.2)).items():
            assert factor == pytest.approx(0.2 if "patch_embed" in name else 1.0)
        assert set(factors(network, parameter_groups(network)).values()) == {1.0}

    def test_no_parameter_changes_sides(self):
        """What is exempt from weight decay is so with every factor."""
        network = transformer()
        plain, layered = (factors(network, parameter_groups(network, True, rate), "decayed") for rate in (1.0, 0.9))
        assert plain == layered

    @pytest.mark.parametrize("depth", [1, 2])
    def test_the_first_step_of_adamw_moves_by_the_rate(self, depth):
        """With a gradient of ones, Adam's first step is the learning rate itself."""
        network = transformer(norm_last_layer=False, depth=depth).double()
        optimizer = build_optimizer(network, OptimConfig(layer_decay=0.5, patch_embed_lr=0.2))
        set_rates(optimizer, 0.01, 0.0)
        before = {name: value.detach().clone() for name, value in network.named_parameters()}
        for value in network.parameters():
            value.grad = torch.ones_like(value)
        optimizer.step()
        layers = {f"backbone.blocks.{index}.": depth - index for index in range(depth)}
        layers |= {"backbone.norm.": 0, "head.": 0, "backbone.": depth + 1}
        for name, value in network.named_parameters():
            layer = next(layer for start, layer in layers.items() if name.startswith(start))
            moved = 0.01 * 0.5**layer * (0.2 if "patch_embed" in name else 1)
            torch.testing.assert_close(before[name] - value.detach(), torch.full_like(value, moved), rtol=1e-5, atol=0)


class Pair:
    """A module with the project's optimizer, and its twin with torch's plain one of the same name."""

    def __init__(self, name: str):
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        self.twin = copy.deepcopy(self.module)
        self.optimizer = build_optimizer(self.module, OptimConfig(name=name, betas=[0.8, 0.95]))
        groups = [
            {"params": [value for value in self.twin.parameters() if value.ndim > 1]},
            {"params": [value for value in self.twin.parameters() if value.ndim <= 1], "weight_decay": 0.0},
        ]
        plain = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
        options = {"momentum": 0.9} if name == "sgd" else {"betas": (0.8, 0.95)}
        self.plain = plain(groups, lr=0.1, weight_decay=0.3, fused=False, foreach=False, **options)
        set_rates(self.optimizer, 0.1, 0.3)

    def both(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return list(zip(self.module.parameters(), self.twin.parameters(), strict=True))

    def step(self, seed: int, broken: bool = False, without: int = 4) -> None:
        """A step of both, or a broken one of the project's alone; from parameter `without` on there is no gradient."""
        generator = torch.Generator().manual_seed(seed)
        for index, (parameter, twin) in enumerate(self.both()):
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.clone() if index < without else None
            twin.grad = gradient if index < without else None
            if broken:
                parameter.grad[0] = math.nan
        step_unless(self.optimizer, torch.tensor(broken))
        if not broken:
            self.plain.step()

    def state(self) -> dict[str, Tensor]:
        """Parameters and moments of the project's optimizer."""
        moments = self.optimizer.state_dict()["state"]
        tensors = {f"{index}.{key}": value for index, values in moments.items() for key, value in values.items()}
        return {name: value.clone() for name, value in (tensors | self.module.state_dict()).items()}

    def assert_alike(self) -> None:
        for parameter, twin in self.both():
            torch.testing.assert_close(parameter, twin)
            for name, expected in self.plain.state[twin].items():
                torch.testing.assert_close(self.optimizer.state[parameter][name], expected)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
class TestStep:
    """Of DINO's optimizers, for ViT and for ResNet-50."""

    def test_is_torchs_with_rates_that_change(self, name):
        pair = Pair(name)
        for seed, (lr, decay) in enumerate([(0.1, 0.3), (0.05, 0.2), (0.01, 0.4), (0.02, 0.0)]):
            set_rates(pair.optimizer, lr, decay)
            for group, shrink in zip(pair.plain.param_groups, (decay, 0.0), strict=True):
                group["lr"], group["weight_decay"] = lr, shrink
            pair.step(seed)
            pair.assert_alike()

    def test_prototypes_that_stood_still_begin_to_move(self, name):
        """As after `objective.freeze_last_layer_steps`: until then the last layer has no gradient."""
        pair = Pair(name)
        for seed in range(4):
            pair.step(seed, without=2 if seed < 2 else 4)
            for parameter, twin in pair.both():
                torch.testing.assert_close(parameter, twin)

    @pytest.mark.parametrize("pattern", [(True, False, False), (False, True, True, False)], ids=["first", "later"])
    def test_broken_steps_are_as_if_never_taken(self, name, pattern):
        """Parameters, moments and step count follow the good steps alone, bit by bit; no mark is left."""
        pair = Pair(name)
        for seed, broken in enumerate(pattern):
            before = pair.state()
            pair.step(seed, broken)
            if broken:
                for key, value in pair.state().items():
                    assert torch.equal(value, before.get(key, torch.zeros_like(value))), key
            else:
                pair.assert_alike()
        for parameter, twin in pair.both():
            parameter.grad = twin.grad = torch.ones_like(parameter)
        pair.optimizer.step()
        pair.plain.step()
        pair.assert_alike()


def test_a_broken_first_step_leaves_no_momentum():
    """Torch's fused SGD makes its buffers without filling them, and leaves them so where the step is left out."""
    module = nn.Linear(100, 100)
    optimizer = build_optimizer(module, OptimConfig(name="sgd"))
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    memory = [torch.full_like(parameter, 7.0) for parameter in module.parameters()]  # what it may hold from before
    del memory
    step_unless(optimizer, torch.tensor(True))
    for parameter in module.parameters():
        assert not optimizer.state[parameter].get("momentum_buffer", torch.zeros(1)).any()


def with_gradients(scale: float = 1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (2, 2, 2), (1,))]
    for number, parameter in enumerate(parameters):
        parameter.grad = scale * (number + 0.2) * torch.randn(parameter.shape, generator=generator)
    return [*parameters, nn.Parameter(torch.zeros(3))]  # the last has no gradient: a frozen layer


def gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


class TestClipping:
    @pytest.mark.parametrize("largest", [0.0, 0.01, 1.0, 3.0, 1e6])
    @pytest.mark.parametrize("scope", ["global", "parameter"])
    def test_is_torchs_or_dinos_and_gives_the_norm_from_before(self, largest, scope):
        """main_dino.py clips each tensor by itself, where max / (norm + 1e-6) < 1; 0 leaves all as they are."""
        clipped, expected = with_gradients(), with_gradients()
        norm = math.sqrt(sum(float((gradient.double() ** 2).sum()) for gradient in gradients(expected)))
        if scope == "global" and largest:
            nn.utils.clip_grad_norm_(expected, largest)
        for gradient in gradients(expected) if scope == "parameter" and largest else []:
            coefficient = largest / (math.sqrt(float((gradient.double() ** 2).sum())) + 1e-6)
            gradient.mul_(min(1.0, coefficient))
        assert clip_gradients(clipped, largest, scope).item() == pytest.approx(norm, rel=1e-6)
        torch.testing.assert_close(gradients(clipped), gradients(expected))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("scope", ["global", "parameter"])
    def test_a_broken_gradient_shows_in_the_norm(self, bad, scope):
        parameters = with_gradients()
        parameters[1].grad[2] = bad
        assert not clip_gradients(parameters, 1.0, scope).isfinite()
